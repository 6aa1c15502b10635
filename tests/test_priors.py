"Laws of the prior and the floor: every one of these fails when the line it guards is broken."
import numpy as np
import pytest

import biojepa as bj
from biojepa.effects import effects
from biojepa.featurizers import as_table
from biojepa.perturbations import Action, actions_of
from biojepa.effects import agreements
from biojepa.perturbations import strength
from biojepa.smoother import KernelSmoother, by_direction, leave_one_out, single_effects
from biojepa.prior import Prior
from biojepa.closed_form import ClosedForm


@pytest.fixture(scope="module")
def screen():
    cells = bj.prepare(
        bj.simulate(
            n_genes=120, n_perturbations=60, n_doubles=12, cells_per_perturbation=40, seed=3
        ),
        n_genes=120,
    )
    fold = bj.split(cells, "simulation", seed=0)
    table = as_table(bj.simulated_features(cells)).fit(
        sorted({p for n in fold.train for p in n.split("+")})
    )
    return cells, fold, table, fold.cells(cells, "train")


@pytest.fixture(scope="module")
def prior(screen):
    cells, fold, table, seen = screen
    e = effects(seen)
    return Prior().fit(
        seen, actions_of(e.obs), np.asarray(e.X, float), list(e.obs.cell_type), table
    )


def test_left_out_is_a_refit_without_the_row():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 4))
    y = rng.normal(size=(20, 3))
    K = x @ x.T
    held = leave_one_out(K, y, 2.0)[0]
    for i in (0, 7, 19):
        k = np.setdiff1d(np.arange(20), [i])
        assert np.allclose(
            held[i], K[i, k] @ np.linalg.solve(K[np.ix_(k, k)] + 2 * np.eye(19), y[k])
        )


def test_what_a_training_target_hears_does_not_hold_its_own_effect(screen, prior):
    cells, fold, table, seen = screen
    e = effects(seen)
    targets, beyond, _ = single_effects(
        actions_of(e.obs), np.asarray(e.X, float), list(cells.var_names)
    )
    spoilt = beyond.copy()
    spoilt[3] += 100
    said = [
        KernelSmoother().fit(targets, b, table, prior.smoother.setting).held_out
        for b in (beyond, spoilt)
    ]
    assert np.allclose(said[0][3], said[1][3], atol=1e-6) and not np.allclose(said[0], said[1])


def test_directions_hardly_notice_a_row_that_is_left_out():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6))
    K = x @ x.T / 6
    y = K @ rng.normal(size=(200, 5)) @ rng.normal(size=(5, 60)) / 10 + rng.normal(size=(200, 60))
    clean = by_direction(K, y, 10.0)[0]
    # its effect becomes another's: only the directions may notice
    for row in rng.permutation(200)[:8]:
        swapped = y.copy()
        swapped[row] = y[row - 1]
        assert np.corrcoef(by_direction(K, swapped, 10.0)[0][row], clean[row])[0, 1] > 0.95
    noise = rng.normal(size=y.shape)
    assert (
        abs(
            np.mean(
                [np.corrcoef(a, b)[0, 1] for a, b in zip(by_direction(K, noise, 10.0)[0], noise)]
            )
        )
        < 0.03
    )


def test_the_target_itself_says_nothing_and_doses_are_divided_out():
    a = [
        Action.parse("G0", "drug", dose=1.0),
        Action.parse("G0", "drug", dose=3.0),
        Action.parse("G1", "drug", dose=1.0),
    ]
    truth = np.array([[9.0, 1, 0], [18.0, 2, 0], [0, 9.0, 4]])
    targets, beyond, centre = single_effects(a, truth, ["G0", "G1", "G2"])
    assert targets == [("G0", "drug"), ("G1", "drug")] and np.isclose(strength(3.0), 2)
    assert np.allclose(beyond + centre, [[centre[0], 1, 0], [0, centre[1], 4]])


def test_features_under_other_names_do_not_help(screen, prior):
    cells, fold, table, seen = screen
    e = effects(cells[fold.mask(cells, "test") | (cells.obs.perturbation == "control").values])
    one = np.array(["+" not in p for p in e.obs.perturbation])
    actions = [a for a, o in zip(actions_of(e.obs), one) if o]
    types = list(e.obs.cell_type[one])
    truth = np.asarray(e.X, float)[one]
    centre = effects(seen).X.mean(0)
    frame = bj.simulated_features(cells)
    wrong = as_table(frame.set_axis(np.random.default_rng(0).permutation(frame.index))).fit(
        table.fitted_on
    )
    s = effects(seen)
    other = Prior(use_response=False).fit(
        seen, actions_of(s.obs), np.asarray(s.X, float), list(s.obs.cell_type), wrong
    )
    mine = Prior(use_response=False).fit(
        seen, actions_of(s.obs), np.asarray(s.X, float), list(s.obs.cell_type), table
    )
    def quality(p):
        return agreements(p.expect(actions, types) - centre, truth - centre, centre).mean()
    assert quality(mine) > quality(other) + 0.1 and other.smoother is None


def test_parts_add_up_in_any_order_and_nothing_is_nothing(screen, prior):
    a, b, ab, ba, none = (
        Action.parse(n) for n in ("GENE1", "GENE2", "GENE1+GENE2", "GENE2+GENE1", "control")
    )
    x, y, xy, yx, zero = prior.expect([a, b, ab, ba, none], ["LINE0"] * 5)
    assert np.allclose(x + y, xy) and np.allclose(xy, yx) and not zero.any()


def test_the_target_moves_as_its_mode_says(screen, prior):
    cells, fold, table, seen = screen
    g = next(g for g in cells.var_names if (g, "CRISPRi") not in prior.targets)
    i, move = prior.response.shift(Action.parse(g).parts[0], "LINE0")
    assert list(cells.var_names)[i] == g and np.isclose(
        prior.expect([Action.parse(g)], ["LINE0"])[0, i], move
    )
    assert prior.response.shift(Action.parse("NOBODY").parts[0], "LINE0") is None


def test_few_targets_leave_only_the_mean(screen):
    cells, fold, table, seen = screen
    few = sorted(n for n in fold.train if "+" not in n)[:5]
    small = seen[seen.obs.perturbation.isin([*few, "control"]).values].copy()
    e = effects(small)
    p = Prior().fit(small, actions_of(e.obs), np.asarray(e.X, float), list(e.obs.cell_type), table)
    assert p.smoother is None and not p.weights.any() and np.isclose(p.share, 5 / 6)
    far = next(n for n in fold.test if "+" not in n)
    out = p.expect([Action.parse(far)], ["LINE0"])[0]
    rest = np.array(cells.var_names) != far
    assert np.allclose(out[rest], p.share * p.centre[rest])


def test_doubt_grows_with_distance_and_unseen_targets_are_less_sure(screen):
    cells, fold, table, seen = screen
    closed_form = ClosedForm().fit(seen, table)
    known = next(a for a in closed_form.actions if len(a.parts) == 1)
    new = Action.parse(next(n for n in fold.test if "+" not in n))
    closed_form.slope = 0.0
    std = closed_form.predict([known, new], ["LINE0"] * 2)[1]
    # what is peculiar to an unseen target is not known
    assert std[1].mean() > std[0].mean()
    closed_form.slope = 1.0
    v = closed_form.prior.smoother.variance(
        [(a.parts[0].target, a.parts[0].mode) for a in (known, new)]
    )
    d = closed_form.variance_factor([known, new])
    assert (d[0] < d[1]) == (v[0] < v[1]) and np.isclose(np.log(d[1] / d[0]), np.log(v[1] / v[0]))


def test_it_keeps_its_word_on_disk(screen, prior):
    arrays, facts = prior.state()
    again = Prior.from_state(arrays, facts, prior.smoother.table)
    names = ["GENE1", "GENE2+GENE5", "GENE99"]
    a = [Action.parse(n) for n in names]
    assert np.allclose(again.expect(a, ["LINE0"] * 3), prior.expect(a, ["LINE0"] * 3), atol=1e-5)
