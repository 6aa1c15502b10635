"""Build the documentation site without Quarto, and open every page in a browser.

    python .ci/site.py build            # notebooks -> _docs, by nbdev's filters and smalldocs
    python .ci/site.py browse [folder]  # check _docs in Chromium; with a folder, write screenshots there

KaTeX comes from a CDN; the check answers for it from npm's copy in .venv/katex.
"""
import functools, http.server, json, os, re, shutil, subprocess, sys, threading
from pathlib import Path
from urllib.parse import urldefrag, urljoin, urlparse

ROOT = Path(__file__).resolve().parents[1]
PROC = ROOT / "_proc"
DOCS = ROOT / "_docs"
KATEX = ROOT / ".venv/katex/node_modules/katex/dist"
WIDTHS = (390, 1400)


def document_methods():
    "nbdev gives an entry to functions and classes; here public methods of class bodies get one too."
    import ast
    from nbdev import processors
    plain = processors._def_names

    def with_methods(cell, shown):
        names = plain(cell, shown)
        for c in cell.parsed_() or []:
            if not isinstance(c, ast.ClassDef) or c.name not in names: continue
            own = [f for f in c.body if isinstance(f, ast.FunctionDef) and f.name[0] != "_" and not f.decorator_list]
            names = [*[f"{c.name}.{f.name}" for f in reversed(own)], *names]   # they are put in front of each other
        return names

    processors._def_names = with_methods


document_methods()                                           # in the worker processes too, which read this file


def page_names():
    """Processed notebook -> the name that its front matter asks for:

    14_splits.ipynb -> splits.ipynb.
    """
    out = {}
    for path in PROC.rglob("*.ipynb"):
        head = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        name = re.search(r"^output-file:\s*(\S+)\.html$", head, re.M)
        if name: out[path] = path.with_name(f"{name[1]}.ipynb")
    return out


def build():
    from nbdev.serve import proc_nbs
    for folder in (PROC, DOCS): shutil.rmtree(folder, ignore_errors=True)
    os.chdir(ROOT)
    proc_nbs(n_workers=2)
    names = page_names()
    change = {old.name: new.name for old, new in names.items() if old.name != new.name}
    pattern = re.compile("|".join(rf"\b{re.escape(x)}" for x in change))
    for path in [*names, PROC / "_quarto.yml"]:
        text = pattern.sub(lambda m: change[m[0]], path.read_text(encoding="utf-8"))
        # smalldocs names a page after its file
        path.write_text(re.sub(r"output-file: \w+\.html\\n", "", text), encoding="utf-8")
    for old, new in names.items(): old.rename(new)
    done = subprocess.run([Path(sys.executable).with_name("smalldocs"), "render", "--strict", PROC])
    if done.returncode: sys.exit(done.returncode)
    shutil.move(PROC / "_docs", DOCS)
    # source links go to the notebook under its own name
    for page in DOCS.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for old, new in change.items(): text = text.replace(f"/main/nbs/{new}", f"/main/nbs/{old}")
        page.write_text(text, encoding="utf-8")
    write_answers(DOCS / "answers")
    print(f"{len(list(DOCS.rglob('*.html')))} pages in {DOCS.name}")


def write_answers(folder):
    "The pages that people get: those of a demo, and one of each use, on a small screen."
    import biojepa as bj
    from biojepa.demo import budget, run_demo, simulated_screen, write_results
    cells, features, splits = simulated_screen(True, 0)
    result = run_demo(cells, features, splits, folder, budget(True), seed=0, progress=False, say=lambda x: None)
    write_results(result, folder, seed=0, data="simulated")
    model = bj.BioJEPA.load(folder / "base")
    singles = [n for n in splits[0].train if "+" not in n]
    genes = list(cells.var_names)
    uses = dict(
        plan_of_lists=bj.plan(model, cells, bj.signature(genes[:4], genes[4:8])),
        safety=bj.safety(model, cells, singles[:8]),
        combine=bj.combine(model, cells, singles[:6]),
        edges=bj.pathway_edges(model, cells, {f"set {k}": genes[12 * k:12 * k + 12] for k in range(6)}),
        genes=bj.needed_genes(model, cells, genes[:8]),
    )
    for name, found in uses.items(): found.to_html(folder / f"{name}.html")


def serve():
    "The built site on a free port of this machine."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a): pass
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=DOCS)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


def answer(route, base):
    "Our own pages pass; KaTeX is answered from npm's copy; every other host is blocked."
    url = route.request.url
    if url.startswith((base, "data:")): return route.continue_()
    file = KATEX / url.split("/dist/", 1)[-1].split("?")[0]
    return route.fulfill(path=file) if "katex" in url and file.is_file() else route.abort()


LOOK = """() => ({
  title: document.title, h1: document.querySelector('h1')?.innerText || '',
  ids: [...document.querySelectorAll('[id]')].map(e => e.id),
  links: [...document.querySelectorAll('a[href]')].map(e => e.href),
  broken: [...document.images].filter(e => !e.naturalWidth).map(e => e.src.slice(0, 80)),
  formulas: document.querySelectorAll('.katex').length, bad: document.querySelectorAll('.katex-error').length,
  math: document.querySelectorAll('.math').length,
  text: [...document.querySelectorAll('main p, main li, main h1, main h2, main h3, main td')].filter(e => !e.closest('pre, code, .katex, .cell-output')).map(e => {
    const c = e.cloneNode(true); c.querySelectorAll('code, pre, .katex').forEach(x => x.remove()); return c.textContent}).join('\\n'),
  cut: [...document.querySelectorAll('main pre, main table, main .sd-table, main .cell-output-display')].filter(e => {
    if (e.scrollWidth <= e.clientWidth + 1 || !e.clientWidth) return false;
    let box = e;                                     // the bar may belong to a box around it
    while (box && box.tagName != 'MAIN' && !['auto', 'scroll'].includes(getComputedStyle(box).overflowX)) box = box.parentElement;
    return !box || box.tagName == 'MAIN' || box.offsetHeight - box.clientHeight < 4;
  }).map(e => e.innerText.slice(0, 60)),
  tall: [...document.querySelectorAll('main tr')].filter(e => e.getBoundingClientRect().height >= 130).map(e => e.innerText.slice(0, 60)),
  wide: document.documentElement.scrollWidth - window.innerWidth })"""


def visit(page, url, messages):
    "What a browser sees at the narrow and at the wide width; what is wrong at either stays."
    messages.clear()
    page.goto(url, wait_until="load")
    page.wait_for_timeout(150)
    seen = None
    wide = {}
    cut = {}
    for w in WIDTHS:
        page.set_viewport_size({"width": w, "height": 900})
        page.evaluate(
            "() => { document.querySelectorAll('img[loading=lazy]').forEach(e => "
            "e.loading = 'eager'); }"
        )
        page.evaluate("() => Promise.all([...document.images].map(e => e.decode().catch(() => 0)))")
        seen = page.evaluate(LOOK)
        wide[w] = seen["wide"]
        cut |= {x: f"at {w}: cut without a bar: {x!r}" for x in seen["cut"]}
        cut |= {x: f"at {w}: a row 130 px high or more: {x!r}" for x in seen["tall"]}
    seen["boxes"] = list(cut.values())
    return seen, wide, [m for m in messages if "ERR_FAILED" not in m]


def faults(name, seen, wide, console, source):
    "Everything wrong with one page."
    out = [f"console: {m}" for m in console] + [f"picture not loaded: {x}" for x in seen["broken"]]
    if not seen["h1"] or len(seen["title"]) < 4: out.append("no title")
    out += [f"{seen['bad']} formulas failed"] * (seen["bad"] > 0)
    if seen["math"] and seen["formulas"] < seen["math"]:
        out.append(f"{seen['math']} formulas, {seen['formulas']} rendered")
    if source and not seen["formulas"]: out.append("the notebook has formulas, the page has none")
    out += [f"raw {x!r} in the text" for x in ("$$", ":::", "#|", "@fig-") if x in seen["text"]]
    out += seen["boxes"]
    out += [f"{x} px too wide at {w}" for w, x in wide.items() if x > 2]
    return [f"{name}: {x}" for x in out]


def has_formula(name):
    "Does the notebook behind this page hold a display formula?"
    path = PROC / name.replace(".html", ".ipynb")
    return path.exists() and any(
        c["cell_type"] == "markdown" and "$$" in "".join(c["source"])
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
    )


BAD = """<title>a page with every fault</title><h1>bad</h1><main><p>raw $$x$$ and ::: and #| and @fig-1</p><img src="none.png">
<a href="none.html">x</a><a href="index.html#none">y</a><span class="math">z</span><div style="width:3000px">wide</div>
<pre style="overflow:hidden;width:200px">a box whose end is cut and has no bar to scroll it with</pre><table><tr style="height:200px"><td>tall</td></tr></table></main><script>nothing()</script>"""
CAUGHT = (
    "console:",
    "picture not loaded",
    "formulas, 0 rendered",
    "raw '$$'",
    "raw ':::'",
    "raw '#|'",
    "raw '@fig-'",
    "too wide at 390",
    "cut without a bar",
    "a row 130 px high",
    "link to nothing",
    "no anchor #none",
)


def browse(shots=None):
    from playwright.sync_api import sync_playwright
    chrome = next(
        p for p in map(shutil.which, ("chromium", "google-chrome", "chromium-browser")) if p
    )
    # the checks must catch every fault of this page, or they check nothing
    (DOCS / "bad.html").write_text(BAD)
    base = serve()
    pages = sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.html"))
    bad = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chrome, args=["--no-sandbox"], ignore_default_args=["--hide-scrollbars"])
        page = browser.new_page()
        messages = []
        found = {}
        page.route("**/*", lambda r: answer(r, base))
        page.on("console", lambda m: messages.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: messages.append(str(e)))
        for name in pages:
            found[name], wide, console = visit(page, base + name, messages)
            bad += faults(name, found[name], wide, console, has_formula(name))
            if shots and name != "bad.html": shoot(page, Path(shots), name)
        browser.close()
    for name, seen in found.items(): bad += broken_links(name, seen["links"], found, base)
    (DOCS / "bad.html").unlink()
    own = [x for x in bad if x.startswith("bad.html")]
    bad = [x for x in bad if not x.startswith("bad.html")]
    bad += [f"the check itself did not catch: {c}" for c in CAUGHT if not any(c in x for x in own)]
    print(
        *bad,
        (
            f"{len(pages) - 1} pages opened at {' and '.join(map(str, WIDTHS))} pixels, "
            f"{sum(s['formulas'] for s in found.values())} formulas, {len(bad)} faults"
        ),
        sep="\n",
    )
    sys.exit(bool(bad))


def broken_links(name, links, found, base):
    "Links into the site that lead to no page, file or anchor."
    out = []
    for link in sorted(set(links)):
        target, anchor = urldefrag(urljoin(base + name, link))
        if not target.startswith(base): continue
        path = urlparse(target).path.lstrip("/") or "index.html"
        if not (DOCS / path).is_file():
            out.append(f"{name}: link to nothing: {path}")
        elif anchor and path in found and anchor not in found[path]["ids"]:
            out.append(f"{name}: no anchor #{anchor} in {path}")
    return out


def shoot(page, folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    for w in WIDTHS:
        page.set_viewport_size({"width": w, "height": 900})
        page.wait_for_timeout(400)
        page.screenshot(path=folder / f"{name.replace('/', '-').removesuffix('.html')}-{w}.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["build"]: build()
    elif sys.argv[1:2] == ["browse"]: browse(*sys.argv[2:3])
    else: sys.exit(__doc__)
