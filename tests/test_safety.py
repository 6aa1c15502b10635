"Safety: verdicts err at their rate, a head sees no label of its own, hopeless questions are refused or left open."
import numpy as np
import pandas as pd
import pytest

import biojepa as bj
from biojepa.heads import (
    CLEAR, CONCERN, OPEN, BadHead, GeneMean, Readout, conformal_ends, effect_table, held_out_effects, p_values, verdicts)
from biojepa.safety import _apart, _benefit, _overall, _worst, pareto_front

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def fitted():
    raw = bj.simulate(n_genes=60, n_perturbations=56, cells_per_perturbation=20, cell_types=2, seed=4)
    cells = bj.prepare(raw, n_genes=60)
    fold = bj.split(cells, "unseen_gene", seed=0)
    features = bj.simulated_features(cells)
    return cells, fold, bj.BioJEPA.fit(cells, fold, features=features, network=False, progress=False)


@pytest.fixture(scope="module")
def saved(fitted, tmp_path_factory):
    return fitted[2].save(tmp_path_factory.mktemp("safety")/"model")


@pytest.fixture(scope="module")
def head(fitted):
    measured = effect_table(held_out_effects(fitted[2]), "observed")
    return bj.Head.fit(measured, measured.iloc[:, :30].sum(axis=1), harm="low")


@pytest.mark.parametrize("skill", [0, 1, 3])
def test_verdicts_err_at_their_rate(skill):
    rng = np.random.default_rng(skill)
    alarms, cleared = [], []
    for _ in range(500):
        harmful = rng.random(81) < 0.3
        score = rng.normal(size=81) + skill * harmful
        said = verdicts(*p_values(score[:1], score[1:][~harmful[1:]], score[1:][harmful[1:]]))[0]
        (cleared if harmful[0] else alarms).append(said == (CLEAR if harmful[0] else CONCERN))
    assert np.mean(alarms) < 0.14 and np.mean(cleared) < 0.16


def test_a_new_score_is_ranked_among_the_known_ones_and_itself():
    first, last = p_values([9.0], np.arange(9), np.arange(9)), p_values([8.0], np.arange(9), np.arange(9))
    assert first[0] == 1 / 10 and last[0] == 2 / 10 and first[1] == 1      # nothing is more certain than 1 / (n + 1)


@pytest.mark.parametrize("alpha", [0.1, 0.4])
def test_conformal_ends_hold_their_share(alpha):
    miss = np.random.default_rng(0).exponential(size=(1000, 60))
    ends = np.array([conformal_ends(m[1:], alpha) for m in miss])
    inside = ((ends[:, 0] <= miss[:, 0]) & (miss[:, 0] <= ends[:, 1])).mean()
    assert abs(inside - (1 - alpha)) < 0.04
    assert conformal_ends(miss[0, :5], 0.1) == (-np.inf, np.inf)           # five cannot say what one in ten does


def two_types(shift=0.0, n=30):
    "A readout with 2n examples, half of them harmful; scores of type B are higher by a shift."
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([range(n), ["A", "B"]])
    labels = pd.Series(np.repeat(np.arange(n) % 2, 2), index).astype(float)
    return Readout().calibrated(labels + rng.normal(size=2 * n) + shift * np.tile([0, 1], n), labels)


def test_harm_downwards_is_harm_upwards_turned_round():
    up, new = two_types(), np.linspace(-2, 3, 9)
    down = up.calibrated(-up.scores, -up.labels)
    down.harm = "low"
    np.testing.assert_array_equal(up.judge(new, 0.5), down.judge(-new, -0.5))
    assert np.isclose(up.usual_limit(0.3), -down.usual_limit(0.3))


def test_a_cell_type_with_enough_examples_is_judged_by_its_own():
    new = np.linspace(-2, 3, 9)
    one, other = two_types(), two_types(shift=50)
    np.testing.assert_array_equal(one.judge(new, 0.5, "A"), other.judge(new, 0.5, "A"))
    assert not np.array_equal(one.judge(new, 0.5, "A", 0.01), other.judge(new, 0.5, "A", 0.01))   # too few: all count


def test_examples_are_blind_predictions_and_what_was_measured(fitted):
    blind, form = held_out_effects(fitted[2]), fitted[2].closed_form
    row = list(blind.obs_names).index(f"{form.actions[0].targets[0]}@{form.contexts[0]}")
    np.testing.assert_allclose(blind.layers["delta"][row], form.held_out[0])
    np.testing.assert_allclose(blind.layers["observed"][row], form.truth[0])
    for readout in (GeneMean(), GeneMean(list(blind.var_names[:9]))):
        own = readout.on(blind)
        np.testing.assert_allclose(own.scores, readout.score(effect_table(blind)))
        np.testing.assert_allclose(own.labels, readout.score(effect_table(blind, "observed")))


def test_the_label_of_a_perturbation_does_not_move_its_scores_in_any_cell_type(fitted):
    measured = effect_table(held_out_effects(fitted[2]), "observed")
    labels = measured.iloc[:, :30].sum(axis=1)
    largest = labels.idxmax()
    moved = bj.Head.fit(measured, labels.where(labels.index != largest, labels + 3)).scores
    before = bj.Head.fit(measured, labels).scores
    pd.testing.assert_series_equal(before.loc[[largest[0]]], moved.loc[[largest[0]]])
    assert len(before.loc[[largest[0]]]) == 2 and not np.allclose(before, moved)


def test_a_label_does_not_score_its_own_row(fitted):
    measured = effect_table(held_out_effects(fitted[2]), "observed")
    noise = pd.Series(np.random.default_rng(0).normal(size=len(measured)), measured.index)
    head = bj.Head.fit(measured, noise)
    assert abs(np.corrcoef(head.scores, noise)[0, 1]) < 0.3
    classes = bj.Head.fit(measured, noise > 0)
    value = classes.predict(measured)
    assert value.value.between(0, 1).all() and (value.low <= value.high).all()


def test_own_genes_do_not_count(fitted, head):
    cells, fold, model = fitted
    out = model.predict(cells, [fold.test[0]], "LINE0")
    before = head.predict(out).value[0]
    out.layers["delta"][:, list(cells.var_names).index(fold.test[0])] = 50
    assert head.predict(out).value[0] == before


def test_the_table_and_its_choice(fitted, head):
    cells, fold, model = fitted
    answer = bj.safety(model, cells, list(fold.test), heads={"viability": head}, target="LINE1",
                       programmes={"some": list(cells.var_names[:9])})
    columns = ["perturbation", "cell_type", "readout", "value", "low", "high", "verdict", "support"]
    assert list(answer.table) == columns and len(answer.table) == len(fold.test) * 3 * 3
    assert set(answer.table.verdict) <= {CLEAR, CONCERN, OPEN}
    assert list(answer.selectivity.perturbation) and answer.selectivity.front.any()
    assert (answer.table.low <= answer.table.value + 1e-9).all()
    again = bj.safety(model, cells, list(fold.test), heads={"viability": head}, limits={"viability": -1e6})
    one = again.table[again.table.readout == "viability"]
    assert (one.verdict == OPEN).all()                     # nothing measured is beyond that limit


def test_a_head_is_judged_by_blind_predictions_whatever_it_was_fitted_to(fitted, head):
    cells, fold, model = fitted
    one, other = (bj.safety(model, cells, list(fold.test[:3]), ["LINE0"], heads={"viability": h}).table
                  for h in (head, head.on(held_out_effects(model))))
    pd.testing.assert_frame_equal(one, other)


def test_an_error_that_no_examples_can_hold_leaves_all_open(fitted, head):
    cells, fold, model = fitted
    table = bj.safety(model, cells, list(fold.test), heads={"viability": head}, alpha=1e-4).table
    assert (table.verdict == OPEN).all() and (table.low == -np.inf).all() and (table.high == np.inf).all()


def test_a_cell_type_without_measured_perturbations_is_left_open(fitted, head):
    cells, fold, model = fitted
    new = cells[((cells.obs.perturbation == "control") & (cells.obs.cell_type == "LINE1")).to_numpy()].copy()
    new.obs["cell_type"] = "LINE9"
    answer = bj.safety(model, new, list(fold.test), heads={"viability": head})
    assert answer.abstains and (answer.table.verdict == OPEN).all() and answer.table.low.isna().all()


def test_one_concern_is_enough_and_clear_are_all():
    def said(harmless, harmful):
        rows = pd.DataFrame(dict(perturbation="A", readout=["x", "y"], p_harmless=harmless, p_harmful=harmful))
        return _overall(rows, 0.1)["A"]
    assert said([0.04, 1], [1, 1]) == CONCERN
    assert said([0.06, 1], [1, 1]) == OPEN                 # two readouts: each may err half as often
    assert said([1, 1], [0.05, 0.05]) == CLEAR and said([1, 1], [0.05, 0.5]) == OPEN


def test_the_worst_cell_type_counts():
    index = pd.MultiIndex.from_product([["P", "Q"], ["A", "B", "C"]])
    scores = pd.Series([1.0, 5, 3, 2, 0, 4], index)
    assert _worst(scores, 1).tolist() == [5, 4] and _worst(scores, -1).tolist() == [1, 0]
    for harm, ends in (("high", [5, 4]), ("low", [1, 0])):
        readout = Readout().calibrated(scores, 10 * scores)
        readout.harm = harm
        whole = readout.worst(["A", "B", "C"])
        assert whole.scores.tolist() == ends and (whole.labels == 10 * whole.scores).all()
        assert readout.worst(["A", "D"]).scores.empty      # training has no D
    assert _apart(scores, "A", ["B", "C"])[1].tolist() == [1 - 5, 2 - 4]


def test_selectivity_is_uncertain_and_its_front_avoids_harm(fitted, head):
    cells, fold, model = fitted
    table = bj.safety(model, cells, list(fold.test), heads={"viability": head}, target="LINE1").selectivity
    assert (table.low < table.selectivity).all() and (table.selectivity < table.high).all()
    assert (table.front == pareto_front(table.wanted, -table.harm)).all()       # low viability is harm


def test_a_wanted_signature_does_not_ask_for_the_perturbed_gene(fitted):
    measured = effect_table(held_out_effects(fitted[2]), "observed")
    goal = measured.iloc[0].copy()
    before = _benefit(goal, {}, measured)
    goal[measured.index[0][0]] = 9.0
    after = _benefit(goal, {}, measured)
    assert np.isclose(before.iloc[0], after.iloc[0]) and not np.allclose(before, after)


def test_a_loaded_model_answers_the_same(fitted, head, saved):
    cells, fold, model = fitted
    two = [bj.safety(m, cells, list(fold.test[:3]), heads={"viability": head}).table
           for m in (model, bj.BioJEPA.load(saved))]
    pd.testing.assert_frame_equal(*two, atol=1e-4)


def test_without_support_nothing_is_told(fitted, head):
    cells, _, model = fitted
    answer = bj.safety(model, cells, ["NOBODY"], heads={"viability": head})
    assert answer.abstains and "support" in answer.reason and (answer.table.verdict == OPEN).all()


@pytest.mark.parametrize("labels, word", [
    ({"NOBODY": 2.0}, "no name is in both"),
    ({}, "no label"),
    ("three", "two classes"),
    ("few", "needs 20"),
    ("one", "the same"),
])
def test_labels_that_teach_nothing(fitted, labels, word):
    effects = held_out_effects(fitted[2])
    names = sorted(set(effects.obs.perturbation))
    made = {"three": dict(zip(names, ["a", "b", "c"] * 40)), "few": dict(zip(names[:9], range(2, 11))),
            "one": dict.fromkeys(names, "fine")}
    with pytest.raises(BadHead, match=word): bj.Head.fit(effects, made.get(labels, labels) if isinstance(labels, str) else labels)


def test_the_front_is_what_nothing_beats():
    benefit, harm = np.random.default_rng(1).random((2, 40))
    front = pareto_front(benefit, harm)
    for i in range(40):
        beaten = ((benefit >= benefit[i]) & (harm <= harm[i]) & ((benefit > benefit[i]) | (harm < harm[i]))).any()
        assert front[i] != beaten


def test_a_programme_without_measured_genes(fitted):
    with pytest.raises(BadHead, match="none of the 1 genes"): GeneMean(["Q"]).on(held_out_effects(fitted[2]))


def test_from_a_shell(fitted, saved, tmp_path):
    from typer.testing import CliRunner
    from biojepa.cli import app
    cells, fold, model = fitted
    cells.write_h5ad(tmp_path/"cells.h5ad")
    (tmp_path/"labels.csv").write_text("perturbation,dead\n" + "".join(f"{n},{i % 2}\n" for i, n in enumerate(fold.train)))
    words = ["safety", str(saved), str(tmp_path/"cells.h5ad"), "--out", str(tmp_path/"s.html")]
    done = CliRunner().invoke(app, [*words, fold.test[0], "--labels", f"dead={tmp_path/'labels.csv'}", "--cell-type", "LINE0"])
    assert done.exit_code == 0 and set(pd.read_csv(tmp_path/"s.csv").readout) == {"size", "dead"}, done.output
    for more, word in (([], "name a candidate"), (["X", "--labels", "dead"], "NAME=FILE"), ([fold.test[0], "--target", "LIVER"], "LIVER")):
        wrong = CliRunner().invoke(app, [*words, *more])
        assert isinstance(wrong.exception, ValueError) and word in str(wrong.exception)


def test_analogues_are_near_valid_and_new():
    pytest.importorskip("rdkit")
    from rdkit import Chem
    from biojepa.analogues import TradeOff, accessibility
    start = "COc1ccc(CC(=O)O)cc1Cl"
    table = bj.analogues(start, least=0.3)
    assert len(table) > 8 and table.smiles.is_unique and start not in set(table.smiles)
    assert all(Chem.MolFromSmiles(s) is not None for s in table.smiles)
    assert (table.accessibility <= accessibility(start) + 1).all() and table.similarity.is_monotonic_decreasing
    assert "acid to tetrazole" in set(table.change) and not table.smiles.str.contains("C(=O)F", regex=False).any()
    values = np.random.default_rng(0).random((2, len(table)))
    trade = TradeOff(table.assign(perturbation=table.smiles, wanted=values[0], harm=values[1]))
    assert trade.table.front.iloc[0] and trade.table.wanted[0] == values[0].max()
