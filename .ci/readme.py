"""Write README.md from nbs/index.ipynb, or with --check fail where they differ.

Markdown cells are copied; a code cell becomes a fenced block unless it is hidden, and its pictures
become links to files under nbs/images. Quarto is not needed.
"""
import base64
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = ("#| hide", "#| echo: false")


def blocks(nb):
    "Text of the README, and the pictures in it by file name."
    out = []
    pictures = {}
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            out.append(source)
            continue
        if not source.startswith(HIDDEN): out.append(f"```python\n{source}\n```")
        for o in cell["outputs"]:
            data = o.get("data", {})
            if "text/markdown" in data: out.append("".join(data["text/markdown"]))
            if "image/png" in data:
                name = f"nbs/images/index-{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                out.append(f"![]({name})")
    return "\n\n".join(out) + "\n", pictures


def main():
    text, pictures = blocks(json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8")))
    text = "<!-- Written from nbs/index.ipynb by .ci/readme.py; edit that. -->\n\n" + text.replace(
        "(images/", "(nbs/images/"
    )
    if "--check" in sys.argv:
        stale = (ROOT / "README.md").read_text(encoding="utf-8") != text or any(
            not (ROOT / p).exists() or (ROOT / p).read_bytes() != b for p, b in pictures.items()
        )
        if stale: sys.exit(print("README.md is not the index page: run python .ci/readme.py") or 1)
        return
    (ROOT / "README.md").write_text(text, encoding="utf-8")
    for p, b in pictures.items():
        (ROOT / p).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / p).write_bytes(b)


if __name__ == "__main__": main()
