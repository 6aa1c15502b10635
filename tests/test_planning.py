"Plans: the goal that is among the candidates is found, hopeless goals are refused, the perturbed gene does not count."
import numpy as np
import pandas as pd
import pytest

import biojepa as bj
from biojepa.planning import BadGoal, _no_answer, _search, gap_closed, wanted_change


@pytest.fixture(scope="module")
def fitted():
    cells = bj.prepare(bj.simulate(n_genes=60, n_perturbations=30, cells_per_perturbation=40, seed=2), n_genes=60)
    split = bj.split(cells, "unseen_gene", seed=0)
    features = bj.simulated_features(cells)
    return cells, split, bj.BioJEPA.fit(cells, split, features=features, network=False, progress=False)


def test_a_seen_effect_is_found_and_its_own_gene_does_not_count(fitted):
    cells, split, model = fitted
    effects = bj.effects(cells).to_df()
    strong = effects.loc[list(split.train)].pow(2).sum(1).nlargest(5).index
    places = []
    for name in strong:
        answer = bj.plan(model, cells, effects.loc[name], candidates=list(split.train))
        spoiled = effects.loc[name].copy()
        spoiled[name] = 9.0                               # a goal that shouts the name of its own gene
        again = bj.plan(model, cells, spoiled, candidates=[name]).table.gap_closed[0]
        assert np.isclose(again, answer.table.set_index("perturbation").gap_closed[name], atol=1e-6)
        places.append(list(answer.table.perturbation).index(name))
    assert np.median(places) <= 2


def test_no_answer_where_there_is_none(fitted):
    cells, split, model = fitted
    control = np.flatnonzero(cells.obs.perturbation == "control")
    half = np.isin(np.arange(cells.n_obs), control[::2])
    nothing = bj.plan(model, cells, half, candidates=list(split.train))
    assert nothing.abstains and "scatter" in nothing.reason
    far, sure = np.array([1.0, -2.0]), np.zeros(2)
    assert "doing nothing" in _no_answer(far, sure, -0.1, 0.01, 0.1)     # all overshoot, whatever luck would do
    assert "shuffled" in _no_answer(far, sure, 0.2, 0.3, 0.1) and not _no_answer(far, sure, 0.2, 0.01, 0.1)


@pytest.mark.parametrize("goal, word", [
    (pd.Series({"NOBODY": 1.0}), "none of the 1 genes"),
    (pd.Series({"GENE1": np.nan}), "GENE1"),
    (pd.Series([1.0, 2.0], ["GENE1", "GENE1"]), "twice"),
    (np.zeros(3, bool), "one per cell"),
])
def test_a_goal_that_cannot_be_read_is_named(fitted, goal, word):
    cells, _, model = fitted
    with pytest.raises(BadGoal, match=word): bj.plan(model, cells, goal, candidates=["GENE1"])


def test_the_way_back_is_the_way_there_turned_round(fitted):
    cells, split, _ = fitted
    some = (cells.obs.perturbation == split.train[0]).to_numpy()
    there = wanted_change(some, cells, list(cells.var_names))[0]
    back = wanted_change("control", cells, list(cells.var_names), start=some)[0]
    assert np.allclose(there, -back, atol=1e-6)
    assert np.isclose(gap_closed(there[None], there, np.ones(60), np.zeros((1, 60), bool))[0], 1)


def test_a_loaded_model_plans_the_same(fitted, tmp_path):
    cells, split, model = fitted
    goal = bj.effects(cells).to_df().loc[split.train[0]]
    model.save(tmp_path/"model")
    names = list(split.train)
    one, other = (bj.plan(m, cells, goal, candidates=names).table for m in (model, bj.BioJEPA.load(tmp_path/"model")))
    pd.testing.assert_frame_equal(one, other, atol=1e-4)


def test_the_answer_does_not_depend_on_chunks(fitted, monkeypatch):
    from biojepa import planning
    cells, split, model = fitted
    names, genes = list(split.train), list(cells.var_names)
    goal = bj.effects(cells).to_df().loc[names[0]].to_numpy()
    named = np.ones(len(genes), bool)
    def ask(some): return model.predict(cells, some)
    def search(chunk):
        monkeypatch.setattr(planning, "CHUNK", chunk)
        return _search(ask, names, genes, goal, named / named.sum(), named, seed=0)
    for whole, parts in zip(search(1000), search(3)): np.testing.assert_allclose(whole, parts, atol=1e-6)


def test_from_a_shell(fitted, tmp_path):
    from typer.testing import CliRunner
    from biojepa.cli import app
    cells, split, model = fitted
    model.save(tmp_path/"model")
    cells.write_h5ad(tmp_path/"cells.h5ad")
    strong = bj.effects(cells).to_df().loc[list(split.train)].pow(2).sum(1).idxmax()
    words = ["plan", str(tmp_path/"model"), str(tmp_path/"cells.h5ad"), "--out", str(tmp_path/"plan.html")]
    done = CliRunner().invoke(app, [*words, "--to", f"perturbation={strong}"])
    assert done.exit_code == 0 and strong in set(pd.read_csv(tmp_path/"plan.csv").perturbation[:3]), done.output
    for more, word in ((["--to", "lost=1"], "lost=1"), ([], "name one goal"), (["--to", "control", "--up", "GENE1"], "one goal")):
        wrong = CliRunner().invoke(app, [*words, *more])
        assert isinstance(wrong.exception, ValueError) and word in str(wrong.exception)
