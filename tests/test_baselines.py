"The larger set of baselines: laws that hold for any screen, on small simulated ones."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.linear_model import Ridge

from biojepa.baselines import Additive, Mean, training_effects
from biojepa.learned_baselines import BASELINES
from biojepa.cells import parts
from biojepa.prepare import prepare
from biojepa.effects import effects
from biojepa.effects import mean_agreement
from biojepa.baselines import CopySource, MatchingMean, validation
from biojepa.feature_regression import Bilinear
from biojepa.learned_baselines import ALL_BASELINES, ResponseEffects, RidgeResponse
from biojepa.simulator import simulate, simulated_features
from biojepa.splits import Leak, split

NEED_FEATURES = ("ridge", "kernel_ridge", "neighbours", "forest")


@pytest.fixture(scope="module")
def screen():
    cells = prepare(
        simulate(n_genes=80, n_perturbations=60, n_doubles=16, cells_per_perturbation=20, seed=0),
        n_genes=80,
    )
    return cells, simulated_features(cells), split(cells, "simulation", seed=0)


@pytest.fixture(scope="module")
def fitted(screen):
    cells, features, fold = screen
    return {name: kind().fit(cells, fold, features) for name, kind in ALL_BASELINES.items()}


def test_the_default_four_are_among_them_and_first():
    assert (
        list(ALL_BASELINES)[:4] == list(BASELINES) == ["no_change", "mean", "additive", "ridge"]
        and len(ALL_BASELINES) == 12
    )


def test_blind_to_test_cells(screen, fitted):
    cells, features, fold = screen
    spoiled = cells.copy()
    spoiled.X = cells.X.toarray()
    spoiled.X[fold.mask(cells, "test")] = 7
    for name, kind in ALL_BASELINES.items():
        assert np.array_equal(
            fitted[name].predict(cells, fold.test).X,
            kind().fit(spoiled, fold, features).predict(cells, fold.test).X,
        ), name


def test_answers_like_a_model(screen, fitted):
    cells, _, fold = screen
    for name, model in fitted.items():
        out = model.predict(cells, [*fold.test, "control", "NOBODY"])
        assert list(out.obs.perturbation) == [*fold.test, "control", "NOBODY"] and list(
            out.var_names
        ) == list(cells.var_names)
        assert np.isfinite(out.X).all() and not out["control"].X.any(), name
        swapped = model.predict(cells, ["+".join(parts(n)[::-1]) for n in fold.test]).X
        assert np.allclose(swapped, out.X[:len(fold.test)], atol=1e-5), name


def test_shuffled_features_lose_what_features_say(screen, fitted):
    cells, features, fold = screen
    truth = effects(cells)
    centre = training_effects(cells, fold).values.mean(0)
    tested = [n for n in fold.test if fold.groups[n] == "unseen_gene"]
    wrong = pd.DataFrame(
        np.random.default_rng(0).permutation(features.values), index=features.index
    )
    def agreement(model):
        return mean_agreement(model.predict(cells, tested).X, truth[tested].X, centre)
    for name in NEED_FEATURES + ("linear", "ridge_and_response"):
        assert (
            agreement(fitted[name])
            > agreement(ALL_BASELINES[name]().fit(cells, fold, wrong)) + 0.05
        ), name


def test_features_of_held_out_genes_are_refused(screen):
    from biojepa.featurizers import FeatureTable
    cells, features, fold = screen
    leaking = FeatureTable.from_frame(features).fit(fold.train + fold.test)
    for name in NEED_FEATURES + ("linear", "ridge_and_response"):
        with pytest.raises(Leak): ALL_BASELINES[name]().fit(cells, fold, leaking)


def test_without_features(screen):
    cells, _, fold = screen
    mean = Mean().fit(cells, fold).predict(cells, fold.test).X
    for name in NEED_FEATURES:
        assert np.allclose(
            ALL_BASELINES[name]().fit(cells, fold).predict(cells, fold.test).X, mean, atol=1e-5
        ), name
    alone = [
        ALL_BASELINES[n]().fit(cells, fold).predict(cells, fold.test).X
        for n in ("linear", "linear_response")
    ]
    for x in alone: assert not np.allclose(x, mean, atol=1e-2)


def test_settings_are_those_that_validation_likes_best(screen):
    cells, features, _ = screen
    fold = split(cells, "unseen_gene", seed=0, val=0.2)
    held = validation(cells, fold)
    assert held is not None and set(held.obs.perturbation) == set(fold.val)
    for name in ("kernel_ridge", "neighbours", "linear"):
        model = ALL_BASELINES[name]().fit(cells, fold, features)
        x = model.inputs(model.observed.index.get_level_values(1))
        y = model.observed.values - model.centre("LINE0")
        def score(s):
            return mean_agreement(
                model.make(s).fit(x, y).predict(model.inputs(held.obs.perturbation))
                + model.centre("LINE0"),
                held.X,
                model.centre("LINE0"),
            )
        scores = {s: score(s) for s in model.settings}
        assert scores[model.setting] == max(scores.values()) and len(set(scores.values())) > 1, name


@settings(max_examples=20, deadline=None)
@given(st.integers(6, 20), st.integers(2, 5), st.floats(0.1, 10), st.integers(0, 10**6))
def test_bilinear_with_all_components_is_ridge(p, f, penalty, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(p, f))
    y = rng.normal(size=(p, 2 * p))
    x = x - x.mean(0)
    y = y - y.mean(0) - y.mean(1, keepdims=True) + y.mean()
    assert np.allclose(
        Bilinear(p - 1, penalty, 0).fit(x, y).predict(x),
        Ridge(penalty).fit(x, y).predict(x),
        atol=1e-6,
    )


def test_matching_mean_is_half_of_the_sum(screen):
    cells, _, fold = screen
    pairs = [n for n in fold.test if fold.groups[n] == "pair_seen2"]
    half, whole = (k().fit(cells, fold).predict(cells, pairs).X for k in (MatchingMean, Additive))
    assert len(pairs) and np.allclose(2 * half, whole, atol=1e-5)


def test_linear_response_reads_wiring_that_is_there(screen):
    """Without any effect of a perturbation beyond the target's own fall:

    agreement with unseen genes on the other genes, gone once fluctuations are shuffled.
    """
    cells, _, fold = screen
    truth = effects(cells)
    centre = training_effects(cells, fold).values.mean(0)
    rng = np.random.default_rng(0)
    mixed = cells.copy()
    mixed.X = cells.X.toarray()
    for rows in cells.obs.groupby(["perturbation", "batch"], observed=True).indices.values():
        for g in range(cells.n_vars): mixed.X[rows, g] = mixed.X[rng.permutation(rows), g]
    tested = [n for n in fold.test if fold.groups[n] == "unseen_gene"]
    def others(model):
        keep = ~model.targets(tested)
        guess = model.predict(cells, tested).X - centre
        return np.mean(
            [
                np.corrcoef(a[k], b[k])[0, 1] if a[k].std() > 1e-6 else 0
                for a, b, k in zip(guess, truth[tested].X - centre, keep)
            ]
        )
    real = ResponseEffects().fit(cells, fold)
    blind = ResponseEffects().fit(mixed, fold)
    assert others(real) > others(blind) and real.beta > blind.beta


def test_the_usual_mode_is_of_a_part(screen):
    """Where the commonest condition is a gene with a drug, a stranger still gets one mode:

    what is done to most parts.
    """
    cells, _, fold = screen
    pairs = cells.obs.perturbation.str.contains("+", regex=False) & cells.obs.perturbation.isin(
        fold.train
    )
    some = cells[
        pairs
        | ~cells.obs.perturbation.isin(fold.train)
        | cells.obs.perturbation.isin(fold.train[:4])
    ].copy()
    joined = some.obs.perturbation.str.contains("+", regex=False)
    some.obs["mode"] = np.where(
        some.obs.perturbation == "control", "control", np.where(joined, "CRISPRi+drug", "CRISPRi")
    )
    few = replace(fold, train=tuple(n for n in fold.train if n in set(some.obs.perturbation)))
    assert sum("+" in n for n in few.train) > len(few.train) / 2
    model = ResponseEffects().fit(some, few)
    assert model.usual == "CRISPRi" and np.isfinite(model.predict(some, ["NOBODY"]).X).all()


def test_stack_without_features_is_the_linear_response(screen):
    cells, features, fold = screen
    a, b = (
        k().fit(cells, fold).predict(cells, fold.test).X for k in (ResponseEffects, RidgeResponse)
    )
    assert np.allclose(a, b, atol=1e-6)
    assert min(RidgeResponse().fit(cells, fold, features).weights) >= 0


def test_copy_source_copies():
    cells = prepare(
        simulate(
            n_genes=40,
            n_perturbations=24,
            n_doubles=6,
            cells_per_perturbation=15,
            cell_types=3,
            seed=1,
        ),
        n_genes=40,
    )
    across = split(cells, "unseen_context", context="LINE2", seed=0)
    model = CopySource().fit(cells, across)
    source, share = model.setting
    observed = training_effects(cells, across)
    rows = observed.groupby(level=1).mean() if source == "all" else observed.loc[source]
    want = share * rows.loc[list(across.test)].values + (1 - share) * observed.groupby(
        level=1
    ).mean().values.mean(0)
    assert np.allclose(model.predict(cells, across.test, "LINE2").X, want, atol=1e-5)
    assert across.val_contexts and validation(cells, across) is not None


def test_several_cell_types_each_have_their_own_mean():
    cells = prepare(
        simulate(n_genes=40, n_perturbations=30, cells_per_perturbation=15, cell_types=2, seed=1),
        n_genes=40,
    )
    fold = split(cells, "unseen_gene", seed=0)
    for name, kind in ALL_BASELINES.items():
        out = kind().fit(cells, fold, simulated_features(cells)).predict(cells, fold.test)
        assert set(out.obs.cell_type) == {"LINE0", "LINE1"} and np.isfinite(out.X).all(), name


def test_ridge_is_chosen_by_both_agreements():
    from sklearn.linear_model import Ridge
    from biojepa.effects import pearson_rows
    from biojepa.feature_regression import ALPHAS, RidgeEffects
    from biojepa.effects import effects
    differs = np.zeros(2, int)
    for seed in range(6):
        cells = prepare(
            simulate(n_genes=60, n_perturbations=50, cells_per_perturbation=10, seed=seed),
            n_genes=60,
        )
        fold = split(cells, "unseen_gene", seed=seed, val=0.25)
        ridge = RidgeEffects().fit(cells, fold, simulated_features(cells))
        truth = effects(cells)
        centre = ridge.centre("LINE0")
        x = ridge.inputs(fold.train)
        y = truth[list(fold.train)].X - centre
        held = truth[list(fold.val)].X
        guess = [Ridge(alpha=a).fit(x, y).predict(ridge.inputs(fold.val)) for a in ALPHAS]
        scores = np.array(
            [
                [pearson_rows(g + centre, held).mean(), pearson_rows(g, held - centre).mean()]
                for g in guess
            ]
        )
        assert ridge.alpha == ALPHAS[scores.sum(1).argmax()]
        differs += ALPHAS[scores.argmax(0)] != ridge.alpha
    assert differs.all(), "no screen here tells the choice by both from the choice by one"
