"The project as a whole: every notebook runs, the library is their export, the README is the index page."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    p.relative_to(ROOT).as_posix()
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if not any(x.startswith((".", "_")) for x in p.parts[len(ROOT.parts) :])
)
ENV = {
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    **os.environ,
    "MPLBACKEND": "agg",
    "TQDM_DISABLE": "1",
}


def run(*words, cwd=ROOT):
    return subprocess.run([str(w) for w in words], cwd=cwd, env=ENV, capture_output=True, text=True)


@pytest.fixture(scope="session")
def runner():
    "A process that has imported what notebooks import, and compares each in a fork."
    words = [sys.executable, ".ci/notebooks.py", "serve"]
    with subprocess.Popen(words, cwd=ROOT, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield server
        server.stdin.close()


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook(runner, path):
    """Runs in a process of its own and prints what is stored; `slow`, `gpu` and `data` cells keep
    their outputs."""
    runner.stdin.write(f"{ROOT/path}\n")
    runner.stdin.flush()
    code, said = json.loads(runner.stdout.readline())
    assert code == 0, said[-6000:]


def test_notebooks_are_clean_and_exported(tmp_path):
    "nbdev_export and nbdev_clean change nothing."
    copy = tmp_path / "copy"
    for name in ("nbs", "biojepa", "settings.ini", "_quarto.yml", "README.md"):
        subprocess.run(
            ["cp", "-a", ROOT / name, copy / name]
            if copy.exists()
            else ["sh", "-c", f"mkdir {copy} && cp -a {ROOT / name} {copy / name}"],
            check=True,
        )
    for tool in ("nbdev_export", "nbdev_clean"):
        out = run(Path(sys.executable).with_name(tool), cwd=copy)
        assert out.returncode == 0, out.stderr
    for folder in ("nbs", "biojepa"):
        out = run(
            "diff",
            "-r",
            "-q",
            "-x",
            "__pycache__",
            "-x",
            "sidebar.yml",
            "-x",
            ".ipynb_checkpoints",
            ROOT / folder,
            copy / folder,
        )
        assert out.returncode == 0, f"run nbdev_export and nbdev_clean, then commit:\n{out.stdout}"


def test_readme_is_the_index_page():
    out = run(sys.executable, ".ci/readme.py", "--check")
    assert out.returncode == 0, out.stdout


def test_library_needs_no_development_package():
    "Users never meet nbdev or fastcore."
    for path in (ROOT / "biojepa").glob("*.py"):
        if path.name == "_modidx.py": continue
        bad = [
            l
            for l in path.read_text().splitlines()
            if l.startswith(("import ", "from ")) and ("nbdev" in l or "fastcore" in l)
        ]
        assert not bad, f"{path.name}: {bad}"


def test_killed_run_resumes_to_the_same_weights(tmp_path):
    """kill -9 in the middle of training; the run that goes on ends where an uninterrupted one does.

    The run stops at step 40 of training by itself, so that nothing hangs on how fast it is.
    """
    program = tmp_path / "fit.py"
    program.write_text(
        "import os, signal, sys, biojepa as bj\n"
        "from biojepa.loop import Loop\n"
        "advance = Loop.advance\n"
        "def stops(self):\n"
        "    if self.name == 'training' and self.state['step'] == 40:\n"
        "        open(os.path.join(sys.argv[1], f'.model.{os.getpid()}.part.json'), 'w').write('{')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return advance(self)\n"
        "if len(sys.argv) > 2: Loop.advance = stops\n"
        "cells = bj.prepare(bj.simulate(n_genes=48, n_perturbations=16, "
        "cells_per_perturbation=8, seed=0), n_genes=48)\n"
        "split = bj.split(cells, 'unseen_gene', seed=0)\n"
        "bj.BioJEPA.fit(cells, split, features=bj.simulated_features(cells), "
        "out=sys.argv[1], progress=False, device='cpu',\n"
        "    model=dict(width=16, layers=1, predictor_layers=1), "
        "pretraining=dict(steps=30, checkpoint_every=3),\n"
        "    training=dict(steps=60, checkpoint_every=3, validate_every=50, "
        "patience=9, sets=4, cells=2))\n"
    )
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    assert run(sys.executable, program, whole).returncode == 0
    assert run(sys.executable, program, broken, "kill").returncode == -9
    from safetensors import safe_open
    with safe_open(broken / "training.safetensors", "np") as f:
        assert json.loads(f.metadata()["state"])["step"] == 39
    assert not (broken / "model.json").exists()
    assert run(sys.executable, program, broken).returncode == 0
    # what the killed run left half-written is gone
    assert not list(broken.glob(".*"))
    with (
        safe_open(whole / "model.safetensors", "np") as a,
        safe_open(broken / "model.safetensors", "np") as b,
    ):
        assert sorted(a.keys()) == sorted(b.keys())
        different = [k for k in a.keys() if not (a.get_tensor(k) == b.get_tensor(k)).all()]
    assert not different, different[:5]


def test_notebooks_are_light():
    "No notebook over 300 KB, so that the site and the repository stay quick."
    heavy = {
        p: (ROOT / p).stat().st_size // 1000
        for p in NOTEBOOKS
        if (ROOT / p).stat().st_size > 300_000
    }
    assert not heavy, f"KB: {heavy}"


def test_pages_tell_what_the_ladder_measured():
    """Every table under 'On the ladder', once more from the rows:

    the mean exactly, the ends of its interval from another draw.
    """
    rows = pd.concat([pd.read_csv(ROOT/f"benchmarks/ladder_{s}.csv") for s in ("closed_form", "network")])
    kinds = {
        "network": ("network", "network alone"),
        "closed form": ("closed_form", "base, closed form"),
        "closed form on pairs": ("network", "base, closed form"),
    }
    told = 0
    for path in NOTEBOOKS:
        for cell in json.loads((ROOT / path).read_text())["cells"]:
            text = "".join(cell["source"])
            if not text.startswith("## On the ladder"): continue
            (kind, *screens), _, *lines = [
                [x.strip() for x in l.strip("|").split("|")]
                for l in text.splitlines()
                if l.startswith("|")
            ]
            for version, *numbers in lines:
                for screen, number in zip(screens, numbers, strict=True):
                    stage, whole = kinds[kind.split(':')[0]]
                    t = rows[(rows.stage == stage) & (rows.data == screen.lower())]
                    if "pairs" in kind:
                        t, version = (
                            t[t.perturbation.str.contains("+", regex=False)],
                            "base, closed form: " + version.removeprefix("base, closed form: "),
                        )
                    t = t.pivot_table(
                        index=["perturbation", "seed"], columns="name", values="pearson_pert"
                    )[[version, whole]].dropna()
                    gain = t[version] - t[whole]
                    by = gain.groupby(level=0).agg(["sum", "size"]).to_numpy()
                    drawn = by[
                        np.random.default_rng(1).integers(len(by), size=(2000, len(by)))
                    ].sum(1)
                    mean, low, high = (
                        float(x) for x in re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", number).groups()
                    )
                    assert abs(mean - gain.mean()) < .0006, (path, version, screen)
                    assert np.abs(
                        np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975]) - [low, high]
                    ).max() < 0.002 + 0.1 * (high - low), (path, version, screen)
                    told += 1
    assert told > 50


def test_laws_of_the_house():
    "Imports run down, short lines, small modules, cells that are shown, arguments that are explained, a whole sidebar."
    out = run(sys.executable, ".ci/laws.py")
    assert out.returncode == 0, out.stdout[-3000:]


def test_help_explains_every_argument():
    "`help` of functions, methods of classes and methods added by `patch`, under their own names."
    from biojepa.estimator import BioJEPA
    from biojepa.prepare import prepare
    for function, argument in ((BioJEPA.fit, "preset"), (BioJEPA.predict, "dose"), (BioJEPA.save, "folder"), (prepare, "n_genes")):
        assert function.__name__ in ("fit", "predict", "save", "prepare")
        assert f"\n{argument}\n    " in function.__doc__, function
    assert BioJEPA.predict.__qualname__ == "BioJEPA.predict"
