"Needed genes: a planted driver is found, its twin is not, noise gives no answer, copies agree with their formula."
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import biojepa as bj
from biojepa.needed_genes import (
    INFORMATIVE, MOVES, NEEDED, BadProcess, comparable, conditional_loss, intervened, readout, rescaled, updated_mask, verdicts)

PROCESS = [f"P{k}" for k in range(6)]


def screen(seed=0, drive=1.0, made=("DRIVER", "TWIN", "F0", "F1", "F2", "F3"), n=150):
    "Counts of a chain: DRIVER -> process and TWIN; 30 fillers. DRIVER's library share is as the others'."
    rng = np.random.default_rng(seed)
    names = np.repeat(["control", *made], [3 * n] + [n] * len(made))
    genes = ["DRIVER", "TWIN", *PROCESS, *(f"F{k}" for k in range(30))]
    level = pd.DataFrame(rng.normal(0, 0.4, (len(names), len(genes))), columns=genes)
    level.loc[names == "DRIVER", "DRIVER"] -= 2.0
    level["TWIN"] += 0.9 * level["DRIVER"]
    level.loc[names == "TWIN", "TWIN"] -= 2.0
    for g in PROCESS: level[g] += drive * level["DRIVER"] * 0.5
    for g in ("F0", "F1", "F2", "F3"): level.loc[names == g, g] -= 2.0
    counts = rng.poisson(np.exp(level + 2.0)).astype(np.float32)
    obs = pd.DataFrame(dict(perturbation=names), index=[f"c{k}" for k in range(len(names))])
    return bj.prepare(AnnData(counts, obs=obs, var=pd.DataFrame(index=genes)), "perturbation", "control", n_genes=len(genes))


@pytest.fixture(scope="module")
def fitted():
    cells = screen()
    features = pd.DataFrame(np.random.default_rng(0).normal(size=(6, 4)), ["TWIN", "F0", "F1", "F2", "F3", "P0"])
    fold = next(f for f in (bj.split(cells, "unseen_gene", seed=k) for k in range(20)) if {"DRIVER", "F1"} <= set(f.train))
    return cells, bj.BioJEPA.fit(cells, fold, features=features, network=False, progress=False)


def test_the_driver_is_needed_and_its_twin_is_not(fitted):
    cells, model = fitted
    answer = bj.needed_genes(model, cells, PROCESS)
    found = answer.table[answer.table.verdict == NEEDED].set_index("gene")
    assert list(found.index) == ["DRIVER"] and not found.annotated["DRIVER"] and found.effect["DRIVER"] < 0
    assert found.low["DRIVER"] > 0 and "DRIVER" in repr(answer)
    known = bj.needed_genes(model, cells, PROCESS, known={"a set": ["DRIVER"]})
    assert known.table.set_index("gene").annotated["DRIVER"]


def test_what_was_never_perturbed_is_at_most_informative(fitted):
    cells, model = fitted
    rest = cells[~cells.obs.perturbation.isin(["DRIVER", "TWIN"])].copy()
    answer = bj.needed_genes(model, rest, PROCESS)
    assert answer.abstains and "informative" in answer.reason
    assert answer.table.set_index("gene").verdict["DRIVER"] == INFORMATIVE


def test_no_driver_no_answer(fitted):
    model = fitted[1]
    assert sum(not bj.needed_genes(model, screen(seed, drive=0.0), PROCESS).abstains for seed in range(1, 6)) <= 1


def test_a_perturbation_as_a_process(fitted):
    cells, model = fitted
    answer = bj.needed_genes(model, cells, "DRIVER")
    assert "DRIVER" not in set(answer.table.gene)
    idle = bj.needed_genes(model, cells, "F1")
    assert idle.abstains and "third" in idle.reason


def test_an_unmeasured_target_is_judged_by_its_perturbation(fitted):
    rows = pd.DataFrame(dict(p_cells=[np.nan], weight=[np.nan], p_screen=[1e-4], effect=[-1.0], own=[np.nan]), ["RECEPTOR"])
    said = verdicts(rows).loc["RECEPTOR"]
    assert said.verdict == MOVES and said.evidence == "perturbation"


def test_both_kinds_of_evidence_must_agree_and_many_candidates_need_more():
    row = dict(p_cells=1e-5, weight=1.0, p_screen=1e-5, effect=-1.0, own=-2.0)
    rows = pd.DataFrame([row, row | dict(weight=-1.0)], ["AGREES", "TURNED"])
    assert list(verdicts(rows).verdict) == [NEEDED, MOVES]                # lowered, the process should rise
    idle = pd.DataFrame([row | dict(p_cells=0.9, p_screen=0.9)] * 30).add_prefix("", axis=0)
    weak = pd.DataFrame([row | dict(p_cells=0.05, p_screen=0.05)], ["WEAK"])
    assert verdicts(weak).verdict["WEAK"] == NEEDED and not verdicts(pd.concat([weak, idle])).verdict["WEAK"]
    assert not verdicts(weak, alpha=0.01).verdict["WEAK"]


@pytest.mark.parametrize("process, word", [(["NOBODY"], "none of the 1 genes"), (pd.Series({"P0": np.nan}), "P0")])
def test_a_process_that_cannot_be_read_is_named(fitted, process, word):
    cells, model = fitted
    with pytest.raises(BadProcess, match=word): bj.needed_genes(model, cells, process)


def test_names_that_cannot_be_meant(fitted):
    cells, model = fitted
    with pytest.raises(BadProcess, match="NOBODY"): bj.needed_genes(model, cells, PROCESS, candidates=["NOBODY"])
    with pytest.raises(BadProcess, match="no candidate"): bj.needed_genes(model, cells, PROCESS, candidates=[])
    with pytest.raises(BadProcess, match="cell_type="): bj.needed_genes(model, cells, PROCESS, cell_type="LOST")


def test_the_gain_is_what_copies_cost():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(900, 4))
    X[:, 1] += X[:, 0]                                             # a twin that does nothing
    y = X[:, 0] + rng.normal(size=900)
    learn = np.arange(900) < 300
    rows = conditional_loss(X, y, learn)
    assert rows.p_cells[0] < 1e-6 and rows.low[0] > 0 and (rows.p_cells[1:] > 0.01).all()
    expected = 2 * 0.5 / y.var()                                   # 2 b^2 var(x0 | x1), of the variance of y
    assert abs(rows.necessity[0] - expected) < 0.12


def test_p_values_are_uniform_where_nothing_counts():
    rng = np.random.default_rng(1)
    p = np.concatenate([
        conditional_loss(rng.normal(size=(200, 10)), rng.normal(size=200), np.arange(200) < 70).p_cells for _ in range(40)])
    assert abs((p < 0.1).mean() - 0.1) < 0.05 and abs(p.mean() - 0.5) < 0.06
    q = [intervened(rng.normal(size=100), np.arange(100) < 20, np.arange(100) >= 20)[1] for _ in range(400)]
    assert abs(np.mean(np.array(q) < 0.1) - 0.1) < 0.05


def test_the_median_gene_stays_where_it_was(fitted):
    cells, _ = fitted
    X, error = rescaled(cells)
    at, control = ((cells.obs.perturbation == n).to_numpy() for n in ("DRIVER", "control"))
    moved = np.log(np.expm1(X[at]).mean(0) / np.expm1(X[control]).mean(0))
    assert abs(np.median(moved)) < 0.05 and (error > 0).all()


def test_the_mask_includes_what_moves_the_process(fitted):
    cells, model = fitted
    seen = comparable(cells)
    learn = np.ones(cells.n_obs, bool)
    y = seen.X @ readout(model, cells, PROCESS, seen, learn)
    made = {g: list(cells.var_names).index(g) for g in ("DRIVER", "F0")}
    mask = updated_mask([], seen, y, made, learn, alpha=1e-6)
    assert mask == [made["DRIVER"]]


def test_from_a_shell(fitted, tmp_path):
    from typer.testing import CliRunner
    from biojepa.cli import app
    cells, model = fitted
    model.save(tmp_path/"model")
    cells.write_h5ad(tmp_path/"cells.h5ad")
    (tmp_path/"process.txt").write_text("\n".join(PROCESS))
    words = ["discover", "genes", str(tmp_path/"model"), str(tmp_path/"cells.h5ad"), "--out", str(tmp_path/"needed.html")]
    done = CliRunner().invoke(app, [*words, "--process", str(tmp_path/"process.txt")])
    assert done.exit_code == 0 and "needed: DRIVER" in done.output, done.output
    assert pd.read_csv(tmp_path/"needed.csv").gene[0] == "DRIVER" and "<svg" in (tmp_path/"needed.html").read_text()
    wrong = CliRunner().invoke(app, words)
    assert isinstance(wrong.exception, ValueError) and "--process" in str(wrong.exception)
