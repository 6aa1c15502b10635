"Files in the shell: outputs never replace inputs, a failed write changes nothing, every error is one line."
import contextlib
import gzip
import inspect
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import biojepa as bj
from biojepa.cli import main
from biojepa.cli_options import SCREEN, explain
from biojepa.demo import real_splits

pytestmark = pytest.mark.filterwarnings("ignore")


def shell(*words):
    "(exit code, what was printed) of the command line, as its entry point runs."
    text = io.StringIO()
    old = sys.argv
    sys.argv = ["biojepa", *map(str, words)]
    code = 0
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text): main()
    except SystemExit as e: code = e.code or 0
    finally: sys.argv = old
    return code, text.getvalue()


def refused(*words):
    "The one line of a refusal."
    code, text = shell(*words)
    lines = text.strip().splitlines()
    assert code in (1, 2) and len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


def works(*words):
    code, text = shell(*words)
    assert code == 0, text
    return text


def counts(labels, n=12, genes=30, **obs):
    "n cells of each label: whole counts of genes G0, G1, ..."
    rng = np.random.default_rng(0)
    each = np.repeat(labels, n)
    rate = rng.gamma(2, 10, genes)[None] * rng.gamma(8, 1 / 8, (len(each), 1))
    return anndata.AnnData(
        sparse.csr_matrix(rng.poisson(rate).astype("float32")),
        obs=pd.DataFrame(dict(perturbation=each, **obs), index=[f"c{i}" for i in range(len(each))]),
        var=pd.DataFrame(index=[f"G{i}" for i in range(genes)]),
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "A folder with a raw screen, prepared cells and two models in folders of the same name."
    folder = tmp_path_factory.mktemp("work")
    labels = ["control", *(f"G{i}" for i in range(8))]
    counts(labels).write_h5ad(folder / "raw.h5ad")
    works("prepare", folder / "raw.h5ad", folder / "cells.h5ad")
    rng = np.random.default_rng(0)
    known = pd.DataFrame(rng.normal(size=(30, 4)), [f"G{i}" for i in range(30)])
    known.rename_axis("symbol").to_csv(folder / "known.csv")
    for run in ("one", "two"):
        works(
            "fit", folder / "cells.h5ad", "--out", folder / run / "base", "--no-network", "--no-progress",
            "--features", folder / "known.csv",
        )
    return folder


def test_every_keyword_of_prepare_is_an_option_with_the_same_default():
    own = inspect.signature(bj.prepare).parameters
    assert set(own) - {"adata"} <= set(SCREEN)
    for name in set(own) - {"adata", "drop"}:
        default = own[name].default
        assert SCREEN[name][1].default == ([default] if name == "control" else default), name


def test_the_shell_finds_the_columns_that_python_finds(tmp_path):
    a = counts(["control", "G1", "G2"])
    treated = a.obs.perturbation != "control"
    a.obs["mode"] = np.where(treated, "CRISPRa", "control")
    a.obs["dose"] = np.where(treated, 2.5, 0)
    a.obs["batch"] = ["x", "y"] * 18
    a.write_h5ad(tmp_path / "a.h5ad")
    works("prepare", tmp_path / "a.h5ad", tmp_path / "c.h5ad")
    shell_, python = anndata.read_h5ad(tmp_path / "c.h5ad").obs, bj.prepare(a).obs
    for k in ("mode", "dose", "time", "cell_type", "batch"):
        pd.testing.assert_series_equal(shell_[k], python[k], check_dtype=False, check_categorical=False)
    assert set(shell_["mode"]) == {"control", "CRISPRa"}


def test_several_labels_are_controls(tmp_path):
    guides = ["non-targeting_00021", "non-targeting_00025"]
    counts([*guides, "G1", "G2"]).write_h5ad(tmp_path / "a.h5ad")
    words = [w for g in guides for w in ("--control", g)]
    works("prepare", tmp_path / "a.h5ad", tmp_path / "c.h5ad", *words)
    assert (anndata.read_h5ad(tmp_path / "c.h5ad").obs.perturbation == "control").sum() == 24


@pytest.mark.parametrize("how", ["same", "relative", "link", "hard link", "link to its folder"])
def test_an_output_that_is_an_input_is_refused(how, work, tmp_path):
    raw = tmp_path / "raw.h5ad"
    raw.write_bytes((work / "raw.h5ad").read_bytes())
    before = raw.read_bytes()
    (tmp_path / "sub").mkdir()
    out = {
        "same": raw,
        "relative": tmp_path / "sub/../raw.h5ad",
        "link": tmp_path / "l.h5ad",
        "hard link": tmp_path / "h.h5ad",
        "link to its folder": tmp_path / "f/raw.h5ad",
    }[how]
    (tmp_path / "l.h5ad").symlink_to(raw)
    os.link(raw, tmp_path / "h.h5ad")
    (tmp_path / "f").symlink_to(tmp_path)
    assert "would be overwritten" in refused("prepare", raw, out, "--n-genes", 10)
    assert raw.read_bytes() == before


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "one/base", "cells.h5ad", "G1", "--out", "cells.h5ad"],
        ["predict", "one/base", "cells.h5ad", "G1", "--out", "one/base/model.safetensors"],
        ["predict", "one/base", "cells.h5ad", "G1", "--features", "known.csv", "--out", "known.csv"],
        ["score", "cells.h5ad", "one/base", "--out", "cells.h5ad"],
        ["score", "cells.h5ad", "one/base", "--page", "one/base/model.json"],
        ["score", "cells.h5ad", "one/base", "--features", "known.csv", "--out", "known.csv"],
        ["data", "get", "papalexi", "--file", "raw.h5ad", "--prepare", "raw.h5ad"],
    ],
)
def test_no_command_overwrites_what_it_reads(words, work, monkeypatch):
    monkeypatch.chdir(work)
    before = {f: f.read_bytes() for f in Path(".").rglob("*") if f.is_file()}
    assert "would be overwritten" in refused(*words)
    assert before == {f: f.read_bytes() for f in Path(".").rglob("*") if f.is_file()}


def test_features_do_not_replace_their_own_source(work, tmp_path):
    (tmp_path / "words.parquet").write_text(
        "".join(f">G{i}\n{'ACGT'[i % 4] * 6}GATTACA\n" for i in range(8))
    )
    words = ["features", work / "cells.h5ad", "--sequences", tmp_path / "words.parquet"]
    assert "would be overwritten" in refused(*words, "--out", tmp_path, "--no-progress")


def test_two_outputs_or_a_folder_or_a_file_in_the_way(work, tmp_path):
    cells, model = work / "cells.h5ad", work / "one/base"
    same = ["--out", tmp_path / "x", "--page", tmp_path / "x"]
    assert "written twice" in refused("score", cells, model, *same)
    assert "is a folder" in refused("prepare", work / "raw.h5ad", tmp_path)
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("fit", cells, "--out", tmp_path / "file")
    assert "is not a folder" in refused("prepare", work / "raw.h5ad", tmp_path / "file/c.h5ad")


def test_a_failed_write_leaves_the_old_file_whole(work, tmp_path, monkeypatch):
    out = tmp_path / "p.h5ad"
    out.write_text("old")
    def breaks(self, path, *_, **__):
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(anndata.AnnData, "write_h5ad", breaks)
    line = refused("predict", work / "one/base", work / "cells.h5ad", "G1", "--out", out)
    assert "No space left" in line and out.read_text() == "old" and os.listdir(tmp_path) == ["p.h5ad"]
    assert "No space left" in refused("prepare", work / "raw.h5ad", tmp_path / "new.h5ad")
    assert os.listdir(tmp_path) == ["p.h5ad"]


def test_models_of_the_same_folder_name_stay_two(work, tmp_path):
    words = [work / "one/base", work / "two/base", "--out", tmp_path / "s.csv"]
    works("score", work / "cells.h5ad", *words, "--baselines", "none")
    assert set(pd.read_csv(tmp_path / "s.csv").model) == {"one/base", "two/base"}
    words = [work / "one/base", work / "one/../one/base"]
    assert "given twice" in refused("score", work / "cells.h5ad", *words)


def test_one_model_alone_has_a_page(work, tmp_path):
    page = tmp_path / "p.html"
    words = ["--baselines", "none", "--page", page, "--out", tmp_path / "s.csv"]
    works("score", work / "cells.h5ad", work / "one/base", *words)
    assert "<html" in page.read_text() and set(pd.read_csv(tmp_path / "s.csv").model) == {"base"}


def test_the_shell_reads_other_formats(work, tmp_path):
    a = anndata.read_h5ad(work / "raw.h5ad")
    packed = tmp_path / "a.h5ad.gz"
    packed.write_bytes(gzip.compress((work / "raw.h5ad").read_bytes()))
    with h5py.File(tmp_path / "m.h5mu", "w") as f:
        anndata.io.write_elem(f.create_group("mod"), "rna", a)
    right = anndata.read_h5ad(work / "cells.h5ad")
    for path in (packed, tmp_path / "m.h5mu"):
        works("prepare", path, tmp_path / "c.h5ad")
        assert (anndata.read_h5ad(tmp_path / "c.h5ad").X != right.X).nnz == 0


def _deep(): return b"[" * 100_000


def _huge(path):
    with h5py.File(path, "a") as f:
        del f["X"]
        f.create_dataset("X", (10**5, 10**5), "f4", chunks=(1000, 1000))


def _zip(path):
    with zipfile.ZipFile(path, "w") as z: z.writestr("symbol.npy", b"no array")


DAMAGE = {
    "cut": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 3]),
    "empty": lambda p: p.write_bytes(b""),
    "noise": lambda p: p.write_bytes(np.random.default_rng(0).bytes(4000)),
    "text": lambda p: p.write_text("not this\n"),
    "undecodable": lambda p: p.write_bytes(b"\xff\xfe\xba\xad" * 50),
    "deep json": lambda p: p.write_bytes(_deep()),
    "no array": _zip,
    "gzip cut": lambda p: p.write_bytes(gzip.compress(b"x" * 10000)[:30]),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.parametrize("damage", [*DAMAGE, "huge"])
@pytest.mark.parametrize("what", ["raw.h5ad", "cells.h5ad", "known.csv", "known.npz", "known.parquet"])
def test_a_damaged_file_is_one_line_with_its_name(what, damage, work, tmp_path):
    path = tmp_path / what
    original = work / what
    path.write_bytes(original.read_bytes() if original.exists() else b"PAR1 or zip")
    if (what, damage) == ("known.csv", "cut"): pytest.skip("a shorter table is a table")
    if damage == "huge":
        if path.suffix != ".h5ad": pytest.skip("of HDF5 only")
        _huge(path)
    else: DAMAGE[damage](path)
    out = tmp_path / "out"
    if what == "raw.h5ad": line = refused("prepare", path, out / "c.h5ad")
    elif what == "cells.h5ad": line = refused("fit", path, "--out", out / "m", "--no-network")
    else: line = refused("fit", work / "cells.h5ad", "--out", out / "m", "--features", path)
    assert what in line and "unexpected" not in line, line
    assert not [f for f in out.rglob("*") if f.is_file()]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("what", ["model.json", "model.safetensors"])
def test_a_damaged_model_is_one_line_with_its_name(what, damage, work, tmp_path):
    model = tmp_path / "base"
    model.mkdir()
    for f in (work / "one/base").iterdir():
        if f.is_file(): (model / f.name).write_bytes(f.read_bytes())
    DAMAGE[damage](model / what)
    out = tmp_path / "p.h5ad"
    line = refused("predict", model, work / "cells.h5ad", "G1", "--out", out)
    assert str(model) in line and "unexpected" not in line and not out.exists(), line


def test_what_nobody_foresaw_is_one_line_and_says_how_to_see_more(work, tmp_path, monkeypatch):
    def breaks(*_, **__): raise ZeroDivisionError("division\nby zero")
    monkeypatch.setattr("biojepa.estimator.BioJEPA.predict", breaks)
    words = ["predict", work / "one/base", work / "cells.h5ad", "G1", "--out", tmp_path / "p.h5ad"]
    code, text = shell(*words)
    assert code == 1 and len(text.strip().splitlines()) == 1
    assert "unexpected ZeroDivisionError: division by zero" in text and "--traceback" in text
    with pytest.raises(ZeroDivisionError): shell(*words, "--traceback")
    monkeypatch.setenv("BIOJEPA_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError): shell(*words)


def test_memory_is_named():
    line, code = explain(MemoryError("Unable to allocate 8. TiB"))
    assert code == 2 and "--n-genes" in line


def test_demo_of_one_treatment_in_several_cell_types(tmp_path):
    "As interferon in Kang: nothing to hold out but a context."
    types = [f"type{i}" for i in range(3)]
    a = anndata.concat([counts(["ctrl", "G3"], cell_type=t) for t in types], index_unique="-")
    treated = (a.obs.perturbation == "G3").to_numpy()
    X = a.X.toarray()
    X[treated, 5:10] *= 3
    a.X = sparse.csr_matrix(X)
    a.write_h5ad(tmp_path / "a.h5ad")
    splits = real_splits(bj.prepare(a, control="ctrl"), 0)
    assert [s.test_contexts for s in splits] == [(t,) for t in types]
    words = ["--data", tmp_path / "a.h5ad", "--control", "ctrl", "--quick", "--no-progress"]
    works("demo", *words, "--out", tmp_path / "demo")
    p = anndata.read_h5ad(tmp_path / "demo/predictions.h5ad")
    assert sorted(p.obs.cell_type) == types and p.n_obs == 3
    score = pd.read_csv(tmp_path / "demo/scores.csv").query("metric == 'pearson_delta' and model == 'base'")
    assert score.value.iloc[0] > .8                 # the treatment does the same in all
    facts = json.loads((tmp_path / "demo/run.json").read_text())
    assert "unseen_context" in facts["what"]


def test_too_few_to_hold_anything_out_is_refused(tmp_path):
    counts(["control", "G1"]).write_h5ad(tmp_path / "a.h5ad")
    line = refused("demo", "--data", tmp_path / "a.h5ad", "--quick", "--out", tmp_path / "d")
    assert "name that column as cell_type" in line
