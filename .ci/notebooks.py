"""Run notebooks the way nbdev does, in a fresh process each, and store or compare their outputs.

    python .ci/notebooks.py store nbs/10_cells.ipynb ...   # run, write the outputs into the file
    python .ci/notebooks.py compare [nbs/...]              # run, fail where stored text differs
    python .ci/notebooks.py serve                          # compare each path that stdin names; a line of JSON each

Cells under `#| slow`, `#| gpu` or `#| data` keep the outputs that were stored on purpose,
unless `--flags slow,data` asks for them. Cells under `#| eval: false` are never run.
"""
import argparse, base64, io, json, os, re, subprocess, sys, tempfile, traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("slow", "gpu", "data")
for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"): os.environ.setdefault(name, "1")
ENV = dict(
    BIOJEPA_PRECISION="float32",
    MPLBACKEND="agg",
    TQDM_DISABLE="1",
    PYTHONHASHSEED="0",
    PYTHONWARNINGS="ignore",
)


def skipped(source, on):
    "Is this a cell that the run leaves as it is?"
    directives = re.findall(r"^#\|\s*(.+?)\s*$", source, re.M)
    return any(d in FLAGS and d not in on for d in directives) or any(
        d.replace(" ", "") == "eval:false" for d in directives
    )


def text_of(outputs):
    """Streams and results as a reader sees them; no pictures, whose bytes vary with fonts."""
    out = []
    for o in outputs:
        if o["output_type"] == "stream":
            out.append("".join(o["text"]))
        else:
            data = o.get("data", {})
            out.append("".join(data.get("text/markdown") or data.get("text/plain", "")))
    return re.sub(r"<Figure size .*?>|<Axes.*?>", "", "".join(out)).strip()


NUMBER = re.compile(r"(?<![\w.])[-+]?\d+\.\d+(?:e[-+]?\d+)?")


def same(stored, now):
    "Equal words, and decimals within 2 % or 0.02: another processor rounds differently."
    if NUMBER.sub("#", stored).split() != NUMBER.sub("#", now).split(): return False
    return all(
        abs(float(a) - float(b)) <= 0.02 + 0.02 * abs(float(a))
        for a, b in zip(NUMBER.findall(stored), NUMBER.findall(now))
    )


def run_one(path, mode, on):
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    os.chdir(path.parent)
    nb = read_nb(path)
    old = read_nb(path)
    shell = CaptureShell(path.parent, mpl_format="png")
    shell._run("%config InlineBackend.rc = {\"figure.dpi\": 100}")
    shell.run_all(
        nb, exc_stop=True, preproc=lambda c: c.cell_type != "code" or skipped(c.source, on)
    )
    if mode == "store":
        clean(nb)
        write_nb(nb, path)
        return 0
    pairs = [
        (a, b)
        for a, b in zip(old.cells, nb.cells)
        if a.cell_type == "code" and not skipped(a.source, on)
    ]
    stale = [(a, b) for a, b in pairs if not same(text_of(a.outputs), text_of(b.outputs))]
    for a, b in stale:
        print(
            f"{path.name}: stale output of\n{a.source}\n--- "
            f"stored\n{text_of(a.outputs)}\n--- now\n{text_of(b.outputs)}"
        )
    return len(stale)


def lean(png):
    "The same picture in 256 colours, where that makes it smaller."
    from PIL import Image
    out = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(256).save(
        out, "PNG", optimize=True
    )
    return min("".join(png), base64.b64encode(out.getvalue()).decode(), key=len)


def clean(nb):
    "Plain metadata, small ids that do not change, no execution counts."
    for i, c in enumerate(nb.cells):
        c["id"], c["metadata"] = f"c{i:03d}", {}
        if c.cell_type == "code":
            c["execution_count"] = None
            for o in c["outputs"]:
                o.pop("execution_count", None)
                if "image/png" in o.get("data", {}):
                    o["data"]["image/png"] = lean("".join(o["data"]["image/png"]))
                if o["output_type"] == "execute_result": o["execution_count"] = None
                o["metadata"] = {} if o["output_type"] != "stream" else None
                if o["metadata"] is None: del o["metadata"]
    nb.metadata.setdefault(
        "kernelspec", dict(display_name="python3", language="python", name="python3")
    )


def compare_in_fork(path):
    "(exit code, what was printed) of a comparison in a process of its own, which inherits the imports of this one."
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if not child:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                for stream in (1, 2): os.dup2(said.fileno(), stream)
                code = min(run_one(Path(path).resolve(), "compare", []), 1)
            except BaseException: traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return code, said.read()


def serve():
    "Import once what notebooks import, then compare each notebook in a fork."
    if any(os.environ.get(k) != v for k, v in ENV.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENV})
    import execnb.shell, matplotlib.pyplot, scanpy, torch
    import biojepa.estimator, biojepa.scorecard
    for line in sys.stdin:
        print(json.dumps(compare_in_fork(line.strip())), flush=True)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("mode", choices=["store", "compare", "serve"])
    p.add_argument("paths", nargs="*")
    p.add_argument("--flags", default="")
    p.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_intermixed_args()
    if a.mode == "serve": return serve()
    paths = [Path(x).resolve() for x in a.paths] or sorted((ROOT / "nbs").rglob("*.ipynb"))
    if a.one: return sys.exit(run_one(paths[0], a.mode, a.flags.split(",")))
    def cmd(x):
        return subprocess.run(
            [sys.executable, __file__, a.mode, str(x), "--flags", a.flags, "--one"],
            env={**os.environ, **ENV},
        ).returncode
    with ThreadPoolExecutor(os.cpu_count()) as ex: codes = list(ex.map(cmd, paths))
    bad = [x.name for x, c in zip(paths, codes) if c]
    print(
        (
            f"{len(paths) - len(bad)} of {len(paths)} notebooks "
            f"{'stored' if a.mode == 'store' else 'fresh'}"
        ),
        *bad,
    )
    sys.exit(bool(bad))


if __name__ == "__main__": main()
