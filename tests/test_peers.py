"Tasks for peers: what the files hold, which predictions are accepted, and the rows that come of them. No peer runs here."
import ast
import json
import re
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

import biojepa as bj
from biojepa.baselines import training_effects
from biojepa.cells import CONTROL
from biojepa.featurizers import as_table
from biojepa.splits import Leak, Split

HERE = Path(__file__).resolve().parents[1]/"benchmarks/peers"
sys.path.insert(0, str(HERE))
import task_files  # noqa: E402
import run  # noqa: E402

SCRIPTS = sorted(HERE.glob("peer_*.py"))


@pytest.fixture(scope="module")
def screen():
    cells = bj.prepare(
        bj.simulate(n_genes=48, n_perturbations=24, n_doubles=6, cells_per_perturbation=8, seed=0),
        n_genes=48,
    )
    return cells, bj.split(cells, "simulation", seed=0), bj.simulated_features(cells)


@pytest.fixture()
def task(screen, tmp_path): return task_files.write_task(*screen, tmp_path/"task", dataset="toy")


def test_same_cells_same_split(screen, task):
    cells, split, _ = screen
    given = anndata.read_h5ad(task/"cells.h5ad")
    settings = json.loads((task/"task.json").read_text())
    held = cells.obs.perturbation.isin(split.test).to_numpy()
    assert (
        list(given.obs_names) == list(cells.obs_names[~held])
        and (given.X != cells[~held].X).nnz == 0
    )
    assert (given.layers["counts"] != cells[~held].layers["counts"]).nnz == 0
    for part in ("train", "val"):
        own = given.obs.perturbation[given.obs.part == part]
        assert set(own) - {CONTROL} == set(getattr(split, part)) == set(settings[part])
    assert Split.from_dict(settings["split"]) == split and settings["test"] == list(split.test)


def test_nothing_of_a_test_perturbation_nor_of_the_truth(screen, task):
    cells, split, _ = screen
    given = anndata.read_h5ad(task/"cells.h5ad")
    assert not set(given.obs.perturbation) & set(split.test)
    # what must not go out
    assert "truth" in cells.uns and "guide_failed" in cells.obs
    assert set(given.uns) == {"biojepa"} and set(given.obs) == {*task_files.COLUMNS, "part"}


def test_features_are_those_of_base_and_ridge(screen, task):
    cells, split, features = screen
    given = anndata.read_h5ad(task/"features.h5ad")
    fitted = as_table(features).fit(task_files.targets_of(split.train))
    assert set(task_files.targets_of(split.test)) <= set(given.obs_names)
    np.testing.assert_allclose(given.X, features.loc[given.obs_names].to_numpy(), rtol=1e-6)
    np.testing.assert_allclose(given.obsm["white"], fitted.transform(given.obs_names)[0], rtol=1e-6)


def test_no_task_is_written_for_a_leaking_split(screen, tmp_path):
    cells, split, features = screen
    leaking = Split.from_dict(split.to_dict() | {"train": (*split.train, split.test[0])})
    with pytest.raises(Leak, match=re.escape(split.test[0])):
        task_files.write_task(cells, leaking, features, tmp_path / "task")
    assert not (tmp_path/"task").exists()


def test_a_new_task_forgets_the_old_answer(screen, task):
    answer(task, screen)
    (task/"measured.json").write_text("{}")
    task_files.write_task(*screen, task)
    assert not (task/"measured.json").exists() and not (task/"predictions.h5ad").exists()
    with pytest.raises(task_files.BadAnswer, match="about.json is missing"):
        task_files.read_predictions(task, screen[0].var_names, screen[1])


def answer(task, screen, value=None, **about):
    "Write an answer through the peer's side."
    from task import Task
    peer = Task(task)
    delta = (
        {n: np.full(screen[0].n_vars, 0.5 + i) for i, n in enumerate(peer.test)}
        if value is None
        else value
    )
    peer.answer(delta, "anndata", **{**dict(epochs=3, features_used="none"), **about})


def test_an_answer_comes_back_as_it_was_given(screen, task):
    cells, split, _ = screen
    answer(task, screen, note="all well")
    table, about = task_files.read_predictions(task, cells.var_names, split)
    assert list(table.index) == list(split.test) and list(table.columns) == list(cells.var_names)
    assert (table.to_numpy() == 0.5 + np.arange(len(table))[:, None]).all()
    assert (
        about["note"] == "all well"
        and about["epochs"] == "3"
        and about["version"].startswith("anndata ")
    )


def test_order_does_not_matter(screen, task):
    cells, split, _ = screen
    answer(task, screen)
    straight = task_files.read_predictions(task, cells.var_names, split)[0]
    out = anndata.read_h5ad(task/"predictions.h5ad")
    out[::-1, ::-1].copy().write_h5ad(task/"predictions.h5ad")
    pd.testing.assert_frame_equal(straight, task_files.read_predictions(task, cells.var_names, split)[0])


def spoil(what, out):
    if what == "no delta": del out.layers["delta"]
    if what == "no names": del out.obs["perturbation"]
    if what == "a name lost": out = out[1:].copy()
    if what == "a gene lost": out = out[:, 1:].copy()
    if what == "a name twice": out = anndata.concat([out, out[:1]], index_unique="-")
    if what == "not finite": out.layers["delta"][2, 3] = np.nan
    return out


@pytest.mark.parametrize(
    "what, message",
    [
        ("no delta", "layers"),
        ("no names", "obs"),
        ("a name lost", "no prediction for perturbation {0!r}"),
        ("a gene lost", "no prediction for gene {g!r}"),
        ("a name twice", "perturbation {0!r} is there twice"),
        ("not finite", "{2!r} is not finite"),
    ],
)
def test_malformed_predictions_are_refused_by_name(screen, task, what, message):
    cells, split, _ = screen
    answer(task, screen)
    spoil(what, anndata.read_h5ad(task/"predictions.h5ad")).write_h5ad(task/"predictions.h5ad")
    with pytest.raises(
        task_files.BadAnswer, match=re.escape(message.format(*split.test, g=cells.var_names[0]))
    ):
        task_files.read_predictions(task, cells.var_names, split)


@pytest.mark.parametrize("key", list(task_files.ABOUT))
def test_a_peer_must_tell_everything(screen, task, key):
    answer(task, screen)
    about = json.loads((task/"about.json").read_text())
    del about[key]
    (task/"about.json").write_text(json.dumps(about))
    with pytest.raises(task_files.BadAnswer, match=key):
        task_files.read_predictions(task, screen[0].var_names, screen[1])


def test_a_refused_group_needs_no_answer_and_others_do(screen, task):
    cells, split, _ = screen
    able = {n: np.zeros(cells.n_vars) for n in split.test if split.groups[n] != "unseen_gene"}
    assert 0 < len(able) < len(split.test)
    answer(task, screen, able, refused={"unseen_gene": "learns one vector per gene"})
    table, _ = task_files.read_predictions(task, cells.var_names, split)
    assert {n for n in table.index if table.loc[n].isna().all()} == set(split.test) - set(able)
    answer(task, screen, able)
    with pytest.raises(task_files.BadAnswer, match="no prediction for perturbation"):
        task_files.read_predictions(task, cells.var_names, split)


MEAN = """
import numpy as np
from task import Task
task = Task.from_command_line()
base = task.control_mean()
delta = np.mean([task.mean(task.names == n) - base for n in task.train], 0)
ballast = np.ones(25_000_000)
task.answer({n: delta for n in task.test if task.kinds()[n] == "unseen_gene"}, "numpy", "none", "none", refused={k: "pairs are not for me" for k in set(task.kinds().values()) - {"unseen_gene"}})
"""


def test_rows_of_a_peer_that_answers_the_training_mean(screen, tmp_path, monkeypatch):
    """From the files through a process of its own to the table:

    it must score as the baseline of that name.
    """
    cells, split, features = screen
    monkeypatch.setitem(run.PEERS, "toy", "toy.txt")
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    (tmp_path/"peer_toy.py").write_text(MEAN)
    monkeypatch.setattr(run, "HERE", tmp_path)
    run.run_peer("toy", cells, [split], features, tmp_path/"sim", sys.executable, 60)
    rows = run.rows_of("sim", cells, [split], features, tmp_path/"sim")
    assert list(rows.columns) == list(run.COLUMNS)
    one = rows[rows.split == "unseen_gene"].set_index("peer")
    for m in ("pearson_delta", "mse"):
        assert one.loc["toy", m] == pytest.approx(one.loc["mean", m], abs=0.02)
    assert (
        0 < one.loc["toy", "cpu_seconds"]
        and one.loc["toy", "seconds"] >= 0
        and 0.2 < one.loc["toy", "peak_memory_gb"] < 4
        and one.loc["toy", "n_test"] == sum(split.groups[n] == "unseen_gene" for n in split.test)
    )
    pairs = rows[(rows.peer == "toy") & (rows.split != "unseen_gene")]
    assert (
        len(pairs)
        and pairs.pearson_delta.isna().all()
        and (pairs.n_test == 0).all()
        and pairs.note.str.contains("not for me").all()
    )


def test_a_peer_that_fails_or_is_too_slow_says_so(screen, tmp_path, monkeypatch):
    cells, split, features = screen
    monkeypatch.setitem(run.PEERS, "toy", "toy.txt")
    monkeypatch.setattr(run, "HERE", tmp_path)
    for text, limit in (("raise SystemExit(3)", 60), ("import time; time.sleep(60)", 0.5)):
        (tmp_path/"peer_toy.py").write_text(text)
        run.run_peer("toy", cells, [split], features, tmp_path/"sim", sys.executable, limit)
        row = (
            run.rows_of("sim", cells, [split], features, tmp_path / "sim")
            .query("peer == 'toy'")
            .iloc[0]
        )
        assert (
            f"ended with status {3 if limit == 60 else -9}" in row.note
            and np.isnan(row.mse)
            and row.n_test == 0
        )


def test_rows_replace_those_of_their_dataset_only(tmp_path):
    path = tmp_path/"results.csv"
    def frame(name, value):
        return pd.DataFrame([{"dataset": name, "peer": "x", "mse": value}])
    for name, value in (("sim", 1.0), ("norman", 2.0), ("sim", 3.0)):
        run.write_rows(frame(name, value), path)
    assert pd.read_csv(path).set_index("dataset").mse.to_dict() == {"sim": 3.0, "norman": 2.0}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_a_script_needs_only_its_peer(path):
    "Each runs where biojepa is not installed; what it needs is pinned."
    peer = path.stem.removeprefix("peer_")
    assert peer in run.PEERS
    if run.PEERS[peer] is None: return
    imported = {
        n.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        for n in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert "biojepa" not in imported and "task_files" not in imported and "task" in imported
    pinned = run.pip_words(HERE/"requirements"/run.PEERS[peer])
    assert all("==" in word for words in pinned for word in words if word != "--no-deps") and all(
        "--no-deps" in words for words in pinned[1:]
    )


def test_stored_results():
    """The table in the repository:

    each dataset has its scale, its baselines, and three peers or more with numbers.
    """
    rows = pd.read_csv(HERE/"results.csv")
    assert list(rows.columns) == list(run.COLUMNS) and set(rows.dataset) == {"sim", "norman"}
    for name, own in rows.groupby("dataset"):
        for group, each in own.groupby("split"):
            assert {"floor", "split_half", *run.BASELINES} <= set(each.peer), (name, group)
        assert own[(own.kind == "peer") & own.pearson_delta.notna()].peer.nunique() >= 3, name
    peers = rows[rows.kind.isin(("peer", "ours"))]
    assert (
        peers[["version", "features_used", "epochs", "seconds", "cpu_seconds", "peak_memory_gb"]]
        .notna()
        .all(axis=None)
    )
    assert peers.note[peers.n_test == 0].notna().all()
    scored = peers[peers.n_test > 0]
    assert all(
        ((scored[f"{m}_low"] <= scored[m] + 1e-4) & (scored[m] <= scored[f"{m}_high"] + 1e-4))[
            scored[m].notna() & (m != "severity")
        ].all()
        for m in run.METRICS
    )
