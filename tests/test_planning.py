"Plans: the goal that is among the candidates is found, hopeless goals are refused, the perturbed gene does not count."
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import biojepa as bj
from biojepa.demo import places
from biojepa.goals import BadGoal, Change, Energy, as_goal, gap_closed, missed_gap, wanted_change
from biojepa.limits import allowed, predicted_harm
from biojepa.planning import WAYS, Question, _no_answer, search_all


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
    far = Change(np.array([1.0, -2.0]), np.zeros(2), np.ones(2, bool))
    assert "doing nothing" in _no_answer(far, -0.1, 0.01, 0.1)     # all overshoot, whatever luck would do
    assert "shuffled" in _no_answer(far, 0.2, 0.3, 0.1) and not _no_answer(far, 0.2, 0.01, 0.1)
    assert "regimen alone" in _no_answer(far, 0.2, 0.01, 0.1, regimen=0.2)
    assert "cap on harm" in _no_answer(far, -np.inf, 0.01, 0.1)


def test_goals_that_can_be_reached_are_answered_and_shuffled_ones_are_not(fitted):
    cells, split, model = fitted
    names, effects = list(split.train), bj.effects(cells).to_df()
    strong = effects.loc[names].pow(2).sum(1).nlargest(6).index
    rng = np.random.default_rng(0)
    def answers(goal, **how): return not bj.plan(model, cells, goal, candidates=names, **how).abstains
    mixed = [pd.Series(rng.permutation(effects.loc[n]), model.genes) for n in strong]
    assert sum(answers(effects.loc[n]) for n in strong) >= 5 and sum(map(answers, mixed)) <= 2
    assert not any(answers(effects.loc[n], alpha=0.001) for n in strong)     # 200 shuffles cannot tell so much


def test_nine_of_ten_blind_predictions_lie_in_the_interval(fitted):
    cells, split, model = fitted
    goal = as_goal(bj.effects(cells).to_df().loc[split.train[0]], cells, list(model.genes))
    form = model.closed_form
    own = np.array([[g in a.targets for g in model.genes] for a in form.actions])
    miss = goal.closed(form.truth, own) - goal.closed(form.held_out, own)
    low, high = missed_gap(model, goal)
    assert 0.8 <= ((low <= miss) & (miss <= high)).mean() <= 0.95 and low < 0 < high
    table = bj.plan(model, cells, goal, candidates=list(split.train)).table
    assert np.allclose(table.low - table.gap_closed, low) and (table.high <= table.gap_closed + high + 1e-9).all()


def test_a_function_of_the_perturbed_gene_alone_is_not_moved_by_it():
    goal = Energy(lambda x: x[:, 0], np.ones(20))
    effect = np.zeros((1, 20))
    effect[0, 0] = -1.0
    own = effect < 0
    assert goal.closed(effect, own)[0] == 0 and goal.closed(effect, own & False)[0] == 1
    assert goal.chance(effect, own & False).mean() < 0.5


def test_a_part_that_is_forbidden_forbids_the_whole():
    assert allowed(["A+B", "C"], forbidden=["A"]) == ["C"] and allowed(["A+B", "C", "A"], only=["A", "C"]) == ["C", "A"]
    class Viability:
        harm = "low"
        def predict(self, effects): return effects.sum(axis=1)
    assert predicted_harm(Viability(), pd.DataFrame([[-3.0], [1.0]])).tolist() == [3, -1]


def test_the_place_of_the_right_answer():
    def plan(names, abstains=False):
        return SimpleNamespace(table=pd.DataFrame(dict(perturbation=names)), abstains=abstains)
    plans = {"A": plan(["A", "B"]), "B": plan(["A", "B"]), "C": plan(["A", "B"]), "D": plan(["D"], abstains=True)}
    assert places(plans) == {"A": 1, "B": 2, "C": 3}


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
    names = list(split.train)
    goal = as_goal(bj.effects(cells).to_df().loc[names[0]], cells, list(cells.var_names))
    question = Question(model, cells, "LINE0", goal, names)
    def search(chunk):
        monkeypatch.setattr(planning, "CHUNK", chunk)
        return search_all(question, [(i,) for i in range(len(names))], seed=0)
    whole, parts = search(1000), search(3)
    assert whole.scores == pytest.approx(parts.scores)
    np.testing.assert_allclose(whole.chance, parts.chance, atol=1e-6)


def test_trying_some_finds_nearly_what_trying_all_finds(fitted):
    cells, split, model = fitted
    goal = bj.effects(cells).to_df().loc[split.test[0]]
    names = sorted([*split.train, *split.test])
    best = {w: bj.plan(model, cells, goal, candidates=names, n_actions=2, way=w) for w in WAYS}
    for answer in best.values():
        assert answer.table.gap_closed[0] > 0.99 * best["exhaustive"].table.gap_closed[0]
    row = best["gradient"].vectors.iloc[-1]
    assert row.parts == 2 and row.vector.shape[0] == 2 and np.isclose(row.loss, row.closed_by_vector - row.closed_by_real)
    again = bj.plan(model, cells, goal, candidates=names, n_actions=2, way="cem")
    pd.testing.assert_frame_equal(again.table, best["cem"].table)


def test_limits(fitted):
    cells, split, model = fitted
    names, goal = list(split.train), bj.effects(cells).to_df().loc[split.train[0]]
    free = bj.plan(model, cells, goal, candidates=names)
    def others(**limits): return bj.plan(model, cells, goal, candidates=names, **limits).table
    assert free.table.perturbation[0] not in set(others(forbidden=[free.table.perturbation[0]]).perturbation)
    assert set(others(only=names[:3], n_actions=2).perturbation) <= {"+".join(sorted(p)) for p in
        [(a,) for a in names[:3]] + [(a, b) for a in names[:3] for b in names[:3] if a < b]}
    def size(effects): return (effects**2).sum(axis=1).to_numpy()
    table = others(harm=size, most_harm=0.5)
    assert (table.harm[np.isfinite(table.gap_closed)] <= 0.5).all()
    with pytest.raises(BadGoal, match="each"): others(harm=lambda e: 1.0)
    none = bj.plan(model, cells, goal, candidates=names, harm=size, most_harm=-1)
    assert none.abstains and "harm" in none.reason
    fixed = bj.plan(model, cells, goal, candidates=names, fixed=names[1])
    assert all(names[1] in n.split("+") for n in fixed.table.perturbation) and "regimen alone" in fixed.headline()
    tried = others(modes=["CRISPRi", "CRISPRa"], doses=[0.5, 1])
    assert len(tried) == 4 * len(names) and {"mode", "dose"} <= set(tried)


def test_a_function_as_goal(fitted):
    cells, split, model = fitted
    name = split.train[0]
    wanted = bj.effects(cells).to_df().loc[name].to_numpy()
    base = cells[cells.obs.perturbation == "control"].to_df().to_numpy().mean(0)
    def far(x): return ((x - base - wanted) ** 2).sum(1)
    names = list(split.train)
    one, other = (bj.plan(model, cells, g, candidates=names) for g in (far, pd.Series(wanted, model.genes)))
    assert one.table.perturbation[0] == other.table.perturbation[0] and one.wanted is None
    one.plot()
    with pytest.raises(BadGoal, match="one number each"): bj.plan(model, cells, lambda x: x, candidates=names)
    with pytest.raises(BadGoal, match="per gene"): bj.plan(model, cells, far, candidates=names, way="gradient")
    with pytest.raises(BadGoal, match="luck"): bj.plan(model, cells, far, candidates=names, way="luck")


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
