"Laws of the closed form: each of these fails when the line it guards is broken."
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
from biojepa.effects import control_means
from biojepa.error_variance import known_noise


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


def test_the_prediction_of_a_training_target_does_not_use_its_own_effect(screen, prior):
    cells, fold, table, seen = screen
    e = effects(seen)
    targets, beyond, _ = single_effects(
        actions_of(e.obs), np.asarray(e.X, float), list(cells.var_names)
    )
    spoilt = beyond.copy()
    spoilt[3] += 100
    predicted = [
        KernelSmoother().fit(targets, b, table, prior.smoother.setting).held_out
        for b in (beyond, spoilt)
    ]
    assert np.allclose(predicted[0][3], predicted[1][3], atol=1e-6) and not np.allclose(
        predicted[0], predicted[1]
    )


def test_principal_directions_hardly_depend_on_the_row_that_is_left_out():
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


def test_the_target_itself_is_set_to_the_mean_and_doses_are_divided_out():
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


def test_variance_grows_with_distance_and_is_larger_for_unseen_targets(screen):
    cells, fold, table, seen = screen
    closed_form = ClosedForm().fit(seen, table)
    known = next(a for a in closed_form.actions if len(a.parts) == 1)
    new = Action.parse(next(n for n in fold.test if "+" not in n))
    closed_form.errors.slope = 0.0
    std = closed_form.predict([known, new], ["LINE0"] * 2)[1]
    # what is peculiar to an unseen target is not known
    assert std[1].mean() > std[0].mean()
    closed_form.errors.slope = 1.0
    v = closed_form.prior.smoother.variance(
        [(a.parts[0].target, a.parts[0].mode) for a in (known, new)]
    )
    d = closed_form.variance_factor([known, new])
    assert (d[0] < d[1]) == (v[0] < v[1]) and np.isclose(np.log(d[1] / d[0]), np.log(v[1] / v[0]))


def test_a_saved_prior_predicts_the_same(screen, prior):
    arrays, facts = prior.state()
    again = Prior.from_state(arrays, facts, prior.smoother.table)
    names = ["GENE1", "GENE2+GENE5", "GENE99"]
    a = [Action.parse(n) for n in names]
    assert np.allclose(again.expect(a, ["LINE0"] * 3), prior.expect(a, ["LINE0"] * 3), atol=1e-5)


def only(cells, *names):
    return cells[cells.obs.perturbation.isin([*names, "control"]).values].copy()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_perturbations_leave_a_wide_interval(screen, n):
    cells, fold, table, seen = screen
    names = sorted(x for x in fold.train if "+" not in x)[:n]
    model = ClosedForm().fit(only(seen, *names), table)
    mean, std = model.predict([Action.parse("STRANGER")], ["LINE0"])
    # an unseen target: n / (n + 1) of the mean, a spread no smaller than the effects that were seen
    assert np.allclose(mean[0], model.prior.centre * n / (n + 1))
    assert (std**2).mean() > 0.4 * (model.truth**2).mean() and std.min() > 0.01
    every = effects(
        cells[(fold.mask(cells, "test") | (cells.obs.perturbation == "control")).values]
    )
    alone = np.array(["+" not in x for x in every.obs.perturbation])
    mean, std = model.predict(
        [a for a, o in zip(actions_of(every.obs), alone) if o], ["LINE0"] * alone.sum()
    )
    spread = np.sqrt(std**2 + every.layers["sem"][alone] ** 2)
    assert (np.abs(every.X[alone] - mean) < 1.645 * spread).mean() > 0.8


def test_a_measured_perturbation_keeps_its_own_interval(screen):
    cells, fold, table, seen = screen
    name = sorted(x for x in fold.train if "+" not in x)[0]
    model = ClosedForm().fit(only(seen, name), table)
    mean, std = model.predict(
        [Action.parse(name), Action.parse("STRANGER"), Action()], ["LINE0"] * 3
    )
    assert np.corrcoef(mean[0], model.truth[0])[0, 1] > 0.95 and std[0].mean() < std[1].mean()
    assert not mean[2].any() and not std[2].any()


def test_doses_beyond_training_saturate():
    raw = bj.simulate(
        n_genes=60,
        n_perturbations=20,
        n_drugs=10,
        doses=(0.1, 1.0, 10.0),
        cells_per_perturbation=12,
        seed=1,
    )
    model = ClosedForm().fit(bj.prepare(raw, n_genes=60))
    assert model.largest_doses() == {"drug": 10.0, "CRISPRi": 1.0}
    def ask(dose, **more):
        return model.predict([Action.parse("DRUG0", "drug", dose=dose)], ["LINE0"], **more)
    top = ask(10.0)
    for dose in (11.0, 100.0, 1000.0):
        for a, b in zip(ask(dose), top): assert np.array_equal(a, b)
    assert np.array_equal(ask(3.0)[0], ask(3.0, extrapolate=True)[0])
    assert np.linalg.norm(ask(1000.0, extrapolate=True)[0]) > 2 * np.linalg.norm(top[0])


def test_one_cell_in_a_condition_leaves_the_fit_as_it_is(screen):
    cells, fold, table, seen = screen
    name = sorted(x for x in fold.train if "+" not in x)[3]
    own = np.flatnonzero((seen.obs.perturbation == name).values)
    less = seen[np.setdiff1d(np.arange(seen.n_obs), own[1:])].copy()
    ask = [Action.parse(x) for x in fold.test], ["LINE0"] * len(fold.test)
    one, whole = (ClosedForm().fit(c, table).predict(*ask) for c in (less, seen))
    assert np.isfinite(one[0]).all() and np.isfinite(one[1]).all()
    assert np.corrcoef(one[0].ravel(), whole[0].ravel())[0, 1] > 0.95
    noise = known_noise(np.array([[1.0, 2], [3, 4], [np.nan, np.nan]]), [4, 4, 1])
    assert (
        np.allclose(noise[2], [20, 40]) and np.isfinite(known_noise(np.full((2, 3), np.nan))).all()
    )


@pytest.fixture(scope="module")
def contexts():
    raw = bj.simulate(
        n_genes=80, n_perturbations=20, cells_per_perturbation=30, cell_types=5, seed=7
    )
    return bj.prepare(raw, n_genes=80)


def test_intervals_of_a_new_context_come_from_contexts_that_are_left_out(contexts):
    observed = effects(contexts)
    for name in observed.obs.perturbation.unique()[:2]:
        covered = []
        for new in sorted(contexts.obs.cell_type.unique()):
            rows = (contexts.obs.cell_type != new).values
            model = ClosedForm().fit(only(contexts[rows], name))
            at = ((observed.obs.cell_type == new) & (observed.obs.perturbation == name)).values
            mean, std = model.predict(actions_of(observed.obs[at]), [new], control_means(contexts))
            assert model.new_lines.typical_distance > 0
            spread = np.sqrt(std**2 + observed.layers["sem"][at] ** 2)
            covered.append((np.abs(observed.X[at] - mean) < 1.645 * spread).mean())
        assert np.mean(covered) > 0.85 and min(covered) > 0.6


def test_support_falls_with_the_distance_of_a_context(contexts):
    control = control_means(contexts)
    first, second, *_, last = sorted(control)
    model = ClosedForm().fit(contexts[(contexts.obs.cell_type != last).values].copy())
    support = model.context_support(control | {"far": control[last] + 6})
    assert support[first] == support[second] == 1 > support[last] > 0.1 > support["far"]
    one = (
        ClosedForm()
        .fit(contexts[(contexts.obs.cell_type == first).values].copy())
        .context_support(control)
    )
    assert one[first] == 1 > one[last]
