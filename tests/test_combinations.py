"Interactions: what adding misses, believed as far as made pairs allow, of a kind that can be checked by hand."
import numpy as np
import pandas as pd
import pytest

import biojepa as bj
from biojepa.combinations import calibrate, interaction_of, interaction_table, kind_of


def test_an_additive_world_has_no_interactions():
    rng = np.random.default_rng(0)
    claimed = 0
    for _ in range(60):
        predicted = rng.normal(size=(40, 20))
        fit = calibrate(predicted, rng.normal(size=(40, 20)))
        claimed += (interaction_table(np.linalg.norm(predicted, axis=1), fit).q <= 0.1).any()
    assert claimed <= 12


def test_intervals_cover_what_is_observed():
    rng = np.random.default_rng(1)
    predicted = rng.normal(size=(400, 20)) * rng.uniform(0.2, 3, (400, 1))
    observed = 0.7 * predicted + rng.normal(size=predicted.shape)
    fit = calibrate(predicted[:200], observed[:200])
    size = np.linalg.norm(predicted[200:], axis=1)
    along = (predicted[200:] * observed[200:]).sum(1) / size
    rows = interaction_table(size, fit)
    assert 0.84 < ((rows.low <= along) & (along <= rows.high)).mean() < 0.96


def test_many_questions_need_more_evidence_than_one():
    fit = calibrate(*np.random.default_rng(0).normal(size=(2, 30, 8)))
    fit.slope = 1.0
    one, many = interaction_table(np.array([3.0]), fit), interaction_table(np.r_[3.0, np.zeros(50)], fit)
    assert many.q[0] > 2 * one.q[0] and many.interaction[0] == one.interaction[0]


def test_what_is_missing_is_named():
    table = pd.DataFrame(np.eye(2), ["A", "A+B"])
    with pytest.raises(KeyError, match="'B'"): interaction_of(table, ["A+B"])


@pytest.mark.parametrize("kind, pair", [("synergy", (2, 2)), ("suppression", (0.4, 0.4)), ("dominance", (1, 0))])
def test_kinds(kind, pair):
    one, other = np.eye(2)
    assert kind_of(pair[0] * one + pair[1] * other, one, other) == kind


def test_no_pairs_no_claim():
    cells = bj.prepare(bj.simulate(n_genes=40, n_perturbations=20, cells_per_perturbation=12, seed=0), n_genes=40)
    fold = bj.split(cells, "unseen_gene", seed=0)
    features = bj.simulated_features(cells)
    model = bj.BioJEPA.fit(cells, fold, features=features, network=False, progress=False)
    answer = bj.combine(model, cells, list(fold.train[:4]))
    assert answer.abstains and "five" in answer.reason and len(answer.table) == 6


@pytest.fixture(scope="module")
def paired():
    cells = bj.prepare(bj.simulate(n_genes=60, n_perturbations=30, n_doubles=24, cells_per_perturbation=30, seed=3), n_genes=60)
    fold = bj.split(cells, "simulation", seed=0)
    features = bj.simulated_features(cells)
    return cells, fold, bj.BioJEPA.fit(cells, fold, features=features, network=False, progress=False)


def test_triples_regimens_and_goals(paired):
    cells, fold, model = paired
    names = [n for n in fold.train if "+" not in n][:5]
    triples = bj.combine(model, cells, names, size=3)
    assert len(triples.table) == 10 and all(len(n.split("+")) == 3 for n in triples.table.perturbation)
    with pytest.raises(ValueError, match="pairs"): triples.plot_matrix()
    regimen = "+".join(sorted(names[:2]))
    on_top = bj.combine(model, cells, names, regimen=regimen)
    assert set(on_top.table.perturbation) == {"+".join(sorted([*names[:2], n])) for n in names[2:]}
    # beyond adding to the regimen, not to its parts
    out = model.predict(cells, [regimen, names[2], "+".join(sorted(names[:3]))])
    effect = pd.DataFrame(out.layers["delta"], out.obs.perturbation.astype(str).to_numpy())
    gap = np.linalg.norm(effect.iloc[2] - effect.iloc[0] - effect.iloc[1])
    row = on_top.table.set_index("perturbation").loc["+".join(sorted(names[:3]))]
    assert np.isclose(row.interaction, on_top.calibration.slope * gap, rtol=1e-3)
    goal = pd.Series(effect.iloc[2].to_numpy(), model.genes)
    by_goal = bj.combine(model, cells, names, regimen=regimen, goal=goal)
    assert by_goal.table.perturbation[0] == "+".join(sorted(names[:3])) and by_goal.table.gap_closed.is_monotonic_decreasing
    with pytest.raises(ValueError, match="part of the regimen"): bj.combine(model, cells, names[:1], regimen=regimen)


def test_the_heat_map_is_symmetric(paired):
    cells, fold, model = paired
    names = [n for n in fold.train if "+" not in n][:4]
    image = bj.combine(model, cells, names).plot_matrix().axes[0].images[0].get_array()
    np.testing.assert_allclose(np.ma.filled(image, 0), np.ma.filled(image, 0).T)


def test_pairs_that_were_held_out_do_not_say_how_much_to_believe(paired):
    cells, fold, model = paired
    names = [n for n in fold.test if "+" in n][:4]
    with_them = bj.combine(model, cells, names)
    without = bj.combine(model, cells[~cells.obs.perturbation.isin([*fold.test, *fold.val])].copy(), names)
    assert with_them.calibration.n == without.calibration.n
    pd.testing.assert_frame_equal(with_them.table, without.table)


def test_nothing_is_claimed_below_the_rate(paired):
    cells, fold, model = paired
    answer = bj.combine(model, cells, [n for n in fold.train if "+" not in n][:6], alpha=1e-300)
    assert answer.abstains and (answer.table["class"] == "additive").all() and (answer.table.q < 1).any()
