"Other people's tools: the files that they read, their real commands, and the metrics that must not drift from theirs."
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings, strategies as st

import biojepa as bj
from biojepa import external_evaluators
from biojepa.baselines import Mean
from biojepa.cells import BadCells, dense
from biojepa.prepare import prepare
from biojepa.judge import score_fold
from biojepa.evaluator_files import Files, to_cell_eval, with_mean
from biojepa.external_evaluators import SHARED, agreement, case_of, differences, one_batch, read_cell_eval, read_cells, run_cell_eval
from biojepa.metrics import METRICS, Case
from biojepa.ranks import DISTANCES, places
from biojepa.judge import chosen
from biojepa.answers import answers, held_out, observed_effects
from biojepa.simulator import simulate
from biojepa.splits import Leak, split

needs_cell_eval = pytest.mark.skipif(
    find_spec("cell_eval") is None,
    reason="cell-eval is not installed: pip install 'biojepa[evaluators]'",
)
needs_scperteval = pytest.mark.skipif(
    find_spec("scperteval") is None,
    reason="scperteval is not installed: pip install 'biojepa[evaluators]'",
)


DATA = Path(os.environ.get("BIOJEPA_DATA", Path(__file__).resolve().parents[2] / "shared")) / "data"


def noisy(truth, size, seed=0):
    """A third of the truth and some noise, as a table; the target itself is predicted to go up, so
    that it matters who leaves it out."""
    x = np.array(truth.X, dtype=float)
    target = np.array([truth.var_names == n for n in truth.obs.perturbation])
    return pd.DataFrame(
        0.3 * x + np.random.default_rng(seed).normal(0, size, x.shape) + 5 * target,
        truth.obs.perturbation.astype(str),
        truth.var_names,
    )


def uneven(cells):
    """The treated cells come mostly from one batch, the controls evenly, so that weighing the
    controls matters."""
    treated = (cells.obs.perturbation != "control").to_numpy()
    first = (cells.obs.batch == cells.obs.batch.iloc[0]).to_numpy()
    return cells[~treated | first | (np.random.default_rng(0).random(cells.n_obs) < .3)].copy()


@pytest.fixture(scope="module")
def screen():
    cells = uneven(
        prepare(
            simulate(
                n_genes=150,
                n_perturbations=60,
                n_doubles=12,
                cells_per_perturbation=50,
                n_batches=3,
                seed=1,
            ),
            n_genes=150,
        )
    )
    fold = split(cells, "simulation", seed=0)
    return cells, fold, noisy(observed_effects(held_out(cells, fold)), .2)


@pytest.fixture(scope="module")
def files(screen, tmp_path_factory):
    cells, fold, table = screen
    return to_cell_eval(cells, fold, table, tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def results(files):
    "What the command that we print writes, typed as a user types it."
    if find_spec("cell_eval") is None:
        pytest.skip("cell-eval is not installed: pip install 'biojepa[evaluators]'")
    program = shutil.which("cell-eval", path=str(Path(sys.executable).parent))
    words = files.command.split()
    assert program and words[:2] == ["cell-eval", "run"]
    out = subprocess.run([program, *words[1:]], cwd=files.folder, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    return read_cell_eval(files)


# files

def test_the_command_accepts_the_files(files, results, screen):
    scores, tables = results
    assert sorted(scores.index) == sorted(screen[1].test) and np.isfinite(
        scores[["pearson_delta", "mse", "discrimination_score_l1", "overlap_at_N"]]
    ).all(axis=None)
    assert {p.name for p in (files.folder / "cell-eval").iterdir()} == {
        "results.csv",
        "agg_results.csv",
        "real_de.csv",
        "pred_de.csv",
    }
    assert tables["real", "fdr"].shape == (len(screen[1].test), 150)


def test_files_hold_what_they_promise(files, screen):
    cells, fold, table = screen
    observed = anndata.read_h5ad(files.observed)
    predicted = anndata.read_h5ad(files.predicted)
    own = held_out(cells, fold)
    assert (
        np.array_equal(dense(observed.X), dense(own.X))
        and "truth" not in observed.uns
        and observed.X.dtype == np.float64
    )
    assert list(observed.var_names) == list(predicted.var_names) and predicted.X.min() >= 0
    assert (
        observed.obs.perturbation.value_counts().to_dict()
        == predicted.obs.perturbation.value_counts().to_dict()
    )
    control = [
        dense(a[(a.obs.perturbation == "control").to_numpy()].X) for a in (observed, predicted)
    ]
    assert np.array_equal(*control)
    truth = observed_effects(one_batch(own))
    carried = answers(files.predicted, one_batch(own), truth)
    wanted = table.loc[truth.obs.perturbation].to_numpy()
    base = control[0].astype(float).mean(0)
    # the effect, but for means below zero
    assert np.allclose(carried, np.maximum(base + wanted, 0) - base, atol=1e-6)
    assert np.isclose(files.below, (base + wanted < 0).mean())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 10**6))
def test_cells_have_exactly_the_mean(n, g, seed):
    rng = np.random.default_rng(seed)
    x = rng.exponential(1, (n, g)) * (rng.random((n, g)) < .4)
    level = rng.uniform(.2, 2, g)
    mean = rng.exponential(.8, g) * (rng.random(g) < .8)
    made = with_mean(x, mean, level, rng)
    assert np.allclose(made.mean(0), mean) and (made >= 0).all() and not made[:, mean == 0].any()
    same = with_mean(
        x, x.mean(0), np.where((x > 0).any(0), x.sum(0) / np.maximum((x > 0).sum(0), 1), 1.0), rng
    )
    # no change leaves the cells alone
    assert np.allclose(same, x)


def test_a_model_a_function_and_a_table_write_the_same(screen, tmp_path):
    cells, fold, table = screen
    class Model:
        def predict(self, controls, names, **told):
            assert set(controls.obs.perturbation) == {"control"}
            return table.loc[names]
    X = [
        dense(anndata.read_h5ad(to_cell_eval(cells, s, p, tmp_path / str(i)).predicted).X)
        for i, (s, p) in enumerate(
            [(fold, table), (fold, Model()), (list(fold.test), lambda names: table.loc[names])]
        )
    ]
    assert np.array_equal(X[0], X[1]) and np.array_equal(X[0], X[2])
    assert bj.to_cell_eval is to_cell_eval


def test_cells_of_another_tool_pass_untouched(screen, files, tmp_path):
    cells, fold, _ = screen
    again = to_cell_eval(cells, fold, files.predicted, tmp_path)
    assert (
        np.array_equal(
            dense(anndata.read_h5ad(again.predicted).X), dense(anndata.read_h5ad(files.predicted).X)
        )
        and again.below == 0
    )
    shuffled = anndata.read_h5ad(files.predicted)[:, ::-1].copy()
    sorted_again = anndata.read_h5ad(to_cell_eval(cells, fold, shuffled, tmp_path).predicted)
    assert list(sorted_again.var_names) == list(cells.var_names) and np.array_equal(
        dense(sorted_again.X), dense(anndata.read_h5ad(files.predicted).X)
    )


def test_what_cannot_be_written_is_named(screen, files, tmp_path):
    cells, fold, table = screen
    with pytest.raises(KeyError, match="NOBODY"): to_cell_eval(cells, ["NOBODY"], table, tmp_path)
    with pytest.raises(KeyError, match=str(table.index[0]).replace("+", r"\+")):
        to_cell_eval(cells, fold, table.iloc[1:], tmp_path)
    with pytest.raises(ValueError, match="log1p"): to_cell_eval(cells, fold, table + 50, tmp_path)
    dosed = cells.copy()
    one = np.flatnonzero(dosed.obs.perturbation == fold.test[0])[:5]
    dosed.obs["dose"] = np.where(np.isin(np.arange(cells.n_obs), one), 2., dosed.obs.dose)
    with pytest.raises(ValueError, match="several doses"):
        to_cell_eval(dosed, list(fold.test), table, tmp_path)
    class Taught:
        split = fold
        def predict(self, *_, **__): raise SystemExit("asked")
    with pytest.raises(Leak):
        to_cell_eval(cells, split(cells, "simulation", seed=3), Taught(), tmp_path)
    assert not list(tmp_path.iterdir())


# the same metrics

@pytest.fixture(scope="module")
def both(files, results):
    return agreement(files, run=False).set_index(["tool", "theirs"])


@needs_cell_eval
@needs_scperteval
@pytest.mark.parametrize("tool, theirs", [(s.tool, s.theirs) for s in SHARED if s.score])
def test_shared_metrics_equal_theirs(both, tool, theirs):
    row = both.loc[(tool, theirs)]
    assert row.n >= 3 and row.difference < 1e-6, row.to_dict()


@needs_cell_eval
def test_a_drift_is_seen(files, results, both, monkeypatch):
    "Any shared metric that is off by 1e-5, or by a definition, is no longer below 1e-6."
    theirs = results[0]
    case, truth = case_of(files)
    theirs = theirs.loc[truth.obs.perturbation.astype(str)]
    for s in SHARED:
        if s.tool != "cell-eval" or s.how != "as it is": continue
        monkeypatch.setitem(
            METRICS,
            s.ours,
            replace(
                METRICS[s.ours],
                function=lambda c, f=METRICS[s.ours].function: f(c) * (1 + 1e-5) + 1e-5,
            ),
        )
        assert np.abs(s.score(case) - theirs[s.theirs]).max() > 1e-6, s.theirs
        monkeypatch.undo()
        assert np.abs(s.score(case) - theirs[s.theirs]).max() < 1e-6, s.theirs
    for distance in ("l1", "l2"):      # our own definition of the rank is another number
        gap = np.abs(
            METRICS[f"rank_{distance}"].function(case) - theirs[f"discrimination_score_{distance}"]
        )
        assert gap.max() > 1e-3


@needs_cell_eval
def test_the_scorecard_itself_agrees(screen, files, results):
    """The judge, on the whole screen with the file as its predictor, gives cell-eval's numbers per
    perturbation."""
    cells, fold, _ = screen
    card = score_fold(
        one_batch(cells),
        fold,
        {"file": str(files.predicted)},
        metrics=["pearson_delta", "mse", "error"],
    )
    mine = card[card.model == "file"].pivot(index="perturbation", columns="metric", values="value")
    theirs = results[0].loc[mine.index]
    for a, b in (("pearson_delta", "pearson_delta"), ("mse_delta", "mse"), ("mae_delta", "error")):
        assert np.abs(theirs[a] - mine[b]).max() < 1e-6
    weighed = score_fold(cells, fold, {"file": str(files.predicted)}, metrics=["mse"])
    weighed = weighed[weighed.model == "file"].set_index("perturbation").value.loc[mine.index]
    assert np.abs(weighed - theirs.mse_delta).max() > 1e-4       # the batches do matter here


@needs_scperteval
def test_one_formula_fed_alike(files):
    from types import SimpleNamespace
    from scperteval.protocols import metrics as theirs
    chosen()
    case, truth = case_of(files)
    tested = anndata.read_h5ad(files.observed)
    control = dense(tested[(tested.obs.perturbation == "control").to_numpy()].X)
    cells = [
        dense(tested[(tested.obs.perturbation == n).to_numpy()].X) for n in truth.obs.perturbation
    ]
    case = replace(
        case,
        control=[control[: len(y)] for y in cells],
        treated=cells,
        spread=np.ones(truth.n_vars),
    )
    from biojepa.cell_metrics import _space
    axes, sets = case.once("space", lambda: _space(case))
    assert np.allclose(
        [
            theirs.energy_distance(y, x + d, None)
            for d, (x, y, *_) in zip(case.predicted @ axes, sets)
        ],
        METRICS["energy"].function(case),
        atol=1e-6,
    )
    assert np.allclose(
        [
            theirs.de_overlap(SimpleNamespace(statistic=d), np.abs(p), None)
            for d, p in zip(case.observed, case.predicted)
        ],
        METRICS["recovery_top50"].function(case),
    )
    assert np.allclose(
        [theirs.mse(d, p, None) for d, p in zip(case.observed, case.predicted)],
        METRICS["wmse"].function(case),
    )


def test_places_with_its_own_target_alone(files):
    case, _ = case_of(files)
    single = case.targets.any(1)
    for how in ("l1", "l2", "cosine"):
        nearer = []
        for p, target in zip(case.predicted, case.targets):
            far = DISTANCES[how](p[None, ~target], case.observed[:, ~target])[0]
            nearer.append((far < far[len(nearer)]).sum())
        found = places(case, how, own=True)[0]
        assert np.array_equal(found, nearer)
        # the target that is left out was wrong
        assert (
            how == "cosine"
            or (places(replace(case, targets=None), how)[0][single] > found[single]).any()
        )
        assert np.array_equal(
            places(replace(case, targets=None), how, own=True)[0],
            places(replace(case, targets=None), how)[0],
        )
    assert not np.array_equal(places(case, "l1", own=True)[0], places(case, "l1")[0])
    near = Case(np.zeros((2, 3)), np.array([[1., 0, 0], [1 + 1e-7, 0, 0]]), np.zeros(3))
    assert places(near, "l1")[1].sum() == 0 and (places(near, "l1", rounding=1e-6)[1] == 1).all()


# the list

def test_the_list_is_complete():
    listed = differences()
    assert (
        not listed.duplicated(["tool", "theirs"]).any() and (listed.difference.str.len() > 10).all()
    )
    assert set(listed.ours) - {""} <= set(chosen("all"))
    assert all(
        (s.score is not None) == (s.how in ("as it is", "option", "their test")) for s in SHARED
    )


@needs_cell_eval
@needs_scperteval
def test_the_list_knows_all_of_theirs():
    from cell_eval import metrics_registry
    from scperteval.protocols.table import TABLE
    listed = differences().groupby("tool").theirs.apply(set)
    assert listed["cell-eval"] == set(metrics_registry.list_metrics()) and listed["scperteval"] == {
        p.name for p in TABLE
    }


def test_a_missing_tool_is_a_sentence(files, monkeypatch):
    monkeypatch.setattr(external_evaluators, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"pip install 'biojepa\[evaluators\]'"):
        table = agreement(files)
    assert table.difference.isna().all() and len(table) == sum(s.score is not None for s in SHARED)


@needs_cell_eval
def test_a_failed_run_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="observed.h5ad"):
        run_cell_eval(Files(tmp_path, ("cell",)))


# several cell types

@needs_cell_eval
@needs_scperteval
def test_cell_types_are_compared_apart(tmp_path):
    cells = prepare(
        simulate(n_genes=80, n_perturbations=30, cells_per_perturbation=30, cell_types=2, seed=2),
        n_genes=80,
    )
    fold = split(cells, "unseen_gene", seed=0)
    truth = observed_effects(held_out(cells, fold))
    guess = AnnData(
        obs=truth.obs[["perturbation", "cell_type"]],
        var=truth.var[[]],
        layers={"delta": noisy(truth, 0.1).to_numpy()},
    )
    files = to_cell_eval(cells, fold, guess, tmp_path)
    assert "--celltype-col cell_type" in files.command and len(files.cell_types) == 2
    both = agreement(files)
    assert (both.difference.dropna() < 1e-6).all() and (
        both[both.how == "as it is"].n == 2 * len(fold.test)
    ).all()
    with pytest.raises(ValueError, match="cell_type"):
        nameless = anndata.read_h5ad(files.predicted)
        del nameless.obs["cell_type"]
        to_cell_eval(cells, fold, nameless, tmp_path/"x")


@needs_cell_eval
@needs_scperteval
def test_real_screen_and_a_predictor_full_of_ties(tmp_path):
    """Papalexi 2021, three replicates:

    the training mean for every knock-out. No metric differs; ranks that are ties are not
    compared.
    """
    path = DATA / "papalexi21/papalexi_thp1_299genes.h5ad"
    if not path.exists(): pytest.skip("papalexi21 is not in the folder that BIOJEPA_DATA names")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")       # some targets are not measured
        cells = prepare(
            anndata.read_h5ad(path),
            "perturbation",
            "non-targeting",
            drop=["unassigned"],
            batch="bio_rep",
            mode="CRISPRko",
            n_genes=299,
        )
    fold = split(cells, "unseen_gene", seed=0)
    both = agreement(to_cell_eval(cells, fold, Mean().fit(cells, fold), tmp_path)).set_index(
        ["tool", "theirs"]
    )
    assert (both.difference.dropna() < 1e-6).all() and (
        both[both.how == "as it is"].n == len(fold.test)
    ).all()
    assert both.n["scperteval", "rank"] == 0 and both.n[
        "cell-eval", "discrimination_score_l1"
    ] == len(fold.test)


# files of other tools

def test_a_foreign_file_is_a_predictor(screen, files, tmp_path):
    cells, fold, _ = screen
    own = anndata.read_h5ad(files.predicted)
    names = {
        p: "non-targeting"
        if p == "control"
        else "_".join(reversed(p.split("+")))
        if "+" in p
        else f"{p}_non-targeting"
        for p in own.obs.perturbation.unique()
    }
    foreign = AnnData(
        own.X,
        obs=pd.DataFrame(
            {"target_gene": own.obs.perturbation.map(names).astype(str)}, own.obs_names
        ),
        var=own.var,
    )
    foreign.write_h5ad(tmp_path/"theirs.h5ad")
    read = read_cells(tmp_path/"theirs.h5ad", "target_gene", sep="_")
    tested = held_out(cells, fold)
    truth = observed_effects(tested)
    assert np.array_equal(answers(read, tested, truth), answers(files.predicted, tested, truth))
    with pytest.raises(BadCells, match="target"): read_cells(tmp_path/"theirs.h5ad")
    with pytest.raises(BadCells, match="ctrl"): read_cells(foreign, "target_gene", "ctrl", sep="_")
