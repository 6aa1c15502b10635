"Laws of effects: matched controls, standard errors, halves, agreement."
import warnings

from unittest import mock

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given
from scipy import sparse

from biojepa.cells import CONTROL, dense, part_modes
from biojepa.effects import (
    KEYS,
    ControlPools,
    agreements,
    beyond,
    centred_correlation,
    conditions,
    control_means,
    effects,
    mean_agreement,
    pearson_rows,
)
from biojepa.prepare import prepare
from biojepa.simulator import simulate
from tests.screens import few, refused, screen, screens, seeds

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*are not measured",
    "ignore:Observation names are not unique",
    "ignore:Variable names are not unique",
)


def test_rows_of_effects_get_names_that_differ():
    cells = prepare(screen(3, cells=8, lines=2))
    e = effects(cells)
    assert e.obs_names.is_unique and all("@L" in n for n in e.obs_names)
    one = cells[cells.obs.cell_type == "L0"].copy()
    name = effects(one).obs_names[0]
    own = np.flatnonzero(one.obs.perturbation == name)
    one.obs["mode"] = np.where(
        np.isin(np.arange(one.n_obs), own[:4]), "CRISPRa", one.obs["mode"].astype(str)
    )
    assert {f"{name}@CRISPRa", f"{name}@CRISPRi"} <= set(effects(one).obs_names)


@few
@given(screens, seeds)
def test_what_a_batch_adds_to_all_its_cells_cancels(raw, seed):
    cells = prepare(raw)
    shifted = cells.copy()
    place = pd.factorize(cells.obs.cell_type + cells.obs.batch)[0]
    shifted.X = (
        dense(cells.X)
        + np.random.default_rng(seed).normal(size=(place.max() + 1, 8)).astype("float32")[place]
    )
    # values below 0 are no cells of the contract; the law holds for them too
    with mock.patch("biojepa.effects.check"):
        np.testing.assert_allclose(effects(shifted).X, effects(cells).X, atol=1e-4)


@few
@given(screens, seeds)
def test_halves_share_no_cell_and_make_the_whole(raw, seed):
    cells = prepare(raw)
    a = effects(cells, 0, seed)
    b = effects(cells, 1, seed)
    both = effects(cells)
    assert (
        list(a.obs_names) == list(b.obs_names) == list(both.obs_names) and both.obs_names.is_unique
    )
    n = a.obs.n_cells.to_numpy()[:, None]
    m = b.obs.n_cells.to_numpy()[:, None]
    assert (n + m == both.obs.n_cells.to_numpy()[:, None]).all() and (abs(n - m) <= 1).all()
    np.testing.assert_allclose(
        (n * a.layers["mean"] + m * b.layers["mean"]) / (n + m),
        both.layers["mean"],
        rtol=1e-4,
        atol=1e-4,
    )


@few
@given(screens)
def test_conditions_tell_every_cell(raw):
    cells = prepare(raw)
    table, code = conditions(cells)
    assert ((code == -1) == (cells.obs.perturbation == CONTROL)).all()
    treated = cells.obs[code >= 0]
    for key in KEYS[:4]:
        assert (table[key].to_numpy()[code[code >= 0]] == treated[key].to_numpy()).all()
    assert (
        table.equals(table.sort_values(KEYS).reset_index(drop=True))
        and not table.duplicated(KEYS).any()
    )


# the reference resembles the treated

def level(rate, **obs):
    "Prepared cells with these rates [N, 20] and columns."
    X = np.random.default_rng(0).poisson(rate).astype(np.float32)
    obs = pd.DataFrame(obs, index=[f"c{i}" for i in range(len(rate))])
    genes = pd.DataFrame(index=[f"G{i}" for i in range(20)])
    return prepare(AnnData(sparse.csr_matrix(X), obs=obs, var=genes))


def crossed(**axes):
    "300 cells for every combination of the axes, which are columns of obs; rates of 20 genes."
    table = pd.MultiIndex.from_product(axes.values(), names=axes).to_frame(index=False)
    obs = table.loc[table.index.repeat(300)].reset_index(drop=True)
    return np.full((len(obs), 20), 10.0), obs.to_dict("list")


def words(f):
    "(result, text of warnings)."
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        result = f()
    return result, " | ".join(str(w.message) for w in given)


@pytest.mark.parametrize("axis, levels", [("time", [6.0, 48.0]), ("batch", ["p1", "p2"])])
def test_what_changes_with_time_or_batch_is_no_effect(axis, levels):
    rate, obs = crossed(perturbation=["control", "G1"], **{axis: levels})
    changed = np.array(obs[axis]) == levels[1]
    rate[changed, 3] *= 4
    cells = level(rate, **obs)
    table, said = words(lambda: effects(cells))
    assert (np.abs(table.X[:, 3]) < 0.1).all() and not said
    # without such controls the change is in the effect, and the condition is named
    lonely = cells[~(changed & (cells.obs.perturbation == CONTROL))].copy()
    table, said = words(lambda: effects(lonely))
    assert table.X[:, 3].max() > 0.5 and "'G1'" in said and f"{levels[1]:g}"[:2] in said if (
        axis == "time"
    ) else "(batch 'p2')" in said
    assert "add such controls" in refused(lambda: effects(lonely, fallback="refuse"))
    assert not words(lambda: effects(lonely, fallback="accept"))[1]
    assert "not one of warn" in refused(lambda: effects(cells, fallback="no"), ValueError)


def test_time_is_kept_before_batch():
    """No controls of this batch at this time: those of the same time in another batch, not those of
    the same batch at another time."""
    rate, obs = crossed(
        perturbation=["control", "G1"], batch=["p1", "p2"], time=[6.0, 48.0]
    )
    rate[np.array(obs["time"]) == 48, 3] *= 4
    cells = level(rate, **obs)
    gone = (cells.obs.perturbation == CONTROL) & (cells.obs.time == 48) & (cells.obs.batch == "p2")
    table, said = words(lambda: effects(cells[~gone].copy()))
    assert (np.abs(table.X[:, 3]) < 0.1).all()
    assert "'G1' (batch 'p2') with all of cell type 'cell', time 48" in said


def test_controls_without_a_time():
    """No control has a time: treated cells of one time are compared with them without a word, of two
    times with a warning."""
    rate, obs = crossed(perturbation=["control", "G1", "G2"])
    name = np.array(obs["perturbation"])
    once = level(rate, time=np.where(name == CONTROL, np.nan, 24), **obs)
    assert not words(lambda: effects(once))[1]
    twice = level(rate, time=np.select([name == "G1", name == "G2"], [6.0, 48.0], np.nan), **obs)
    said = words(lambda: effects(twice))[1]
    assert "2 of 2 conditions" in said and "'G1' (time 6)" in said and "'G2' (time 48)" in said
    # controls at the start only
    start = once.copy()
    start.obs["time"] = np.where(name == CONTROL, 0.0, 24.0)
    assert "(time 24)" in words(lambda: effects(start))[1]


def test_vehicles_of_several_doses_are_matched():
    rate, obs = crossed(perturbation=["control", "G1"])
    cells = level(rate, **obs)
    cells.obs["dose"] = np.tile([1.0, 2.0], len(cells) // 2)
    high = (cells.obs.dose == 2).to_numpy()
    cells.X = dense(cells.X) + high[:, None].astype(np.float32)
    table, said = words(lambda: effects(cells))
    assert list(table.obs.dose) == [1, 2] and np.abs(table.X).max() < 0.2 and not said


@few
@given(screens)
def test_pools_are_the_controls_of_a_place(raw):
    cells = prepare(raw)
    pools = ControlPools(cells)
    control = (cells.obs.perturbation == CONTROL).to_numpy()
    for line, batch in cells.obs[["cell_type", "batch"]].drop_duplicates().itertuples(index=False):
        place = dict(cell_type=line, time=-1.0, dose=1.0, batch=batch)
        rows, kept = pools.find(place)
        own = control & (cells.obs.cell_type == line) & (cells.obs.batch == batch)
        assert kept == ("batch",) and list(rows) == list(np.flatnonzero(own))
        rows, kept = pools.find(place | dict(batch="nowhere"))
        assert kept == () and set(cells.obs.cell_type.iloc[rows]) == {line}
    assert "'M'" in refused(lambda: pools.find(dict(cell_type="M", batch="b0")))


# standard errors

def test_one_cell_has_the_error_of_its_cell_type():
    """Where every gene has the variance s^2, one cell against n controls is off by s sqrt(1 + 1/n);
    nothing is NaN."""
    rate, obs = crossed(perturbation=["control", "G1", "G2"])
    cells = level(rate, **obs)
    name = cells.obs.perturbation.to_numpy(str)
    keep = (name != "G2") | (np.arange(len(cells)) == np.flatnonzero(name == "G2")[0])
    few_cells = effects(cells[keep].copy())
    deviation = np.concatenate(
        [dense(cells.X)[name == p] - dense(cells.X)[name == p].mean(0) for p in (CONTROL, "G1")]
    )
    pooled = np.sqrt((deviation**2).sum(0) / (2 * 299))
    controls = dense(cells.X)[name == CONTROL].std(0, ddof=1)
    expected = np.sqrt(pooled**2 + controls**2 / 300)
    np.testing.assert_allclose(few_cells["G2"].layers["sem"][0], expected, rtol=1e-4)
    np.testing.assert_allclose(few_cells["G1"].layers["sem"], effects(cells)["G1"].layers["sem"])


def test_errors_of_single_cells_cover_the_truth():
    "Controls, one of them under another name: delta over its error has variance near 1."
    rate, obs = crossed(perturbation=["control", "G1"])
    cells = level(rate, **obs)
    cells = cells[cells.obs.perturbation == CONTROL].copy()
    z = []
    for i in range(60):
        cells.obs["perturbation"] = np.where(np.arange(len(cells)) == i, "G1", CONTROL)
        one = effects(cells)
        z.append(one.X / one.layers["sem"])
    assert 0.9 < np.std(z) < 1.1


def test_one_control_is_enough_for_an_error():
    cells = prepare(screen(4))
    control = np.flatnonzero(cells.obs.perturbation == CONTROL)
    assert "no control cells" in refused(lambda: effects(cells[cells.obs.perturbation != CONTROL]))
    one = cells[np.setdiff1d(np.arange(len(cells)), control[1:])].copy()
    table = effects(one, fallback="accept")
    assert np.isfinite(table.layers["sem"]).all() and (table.layers["sem"] > 0).any()


# agreement

def test_correlations_are_numpys_and_agree_with_each_other():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 5, 40))
    centre = rng.normal(size=40)
    by_hand = [[np.corrcoef(x, y)[0, 1] for x, y in zip(*pair)] for pair in zip(a, b)]
    np.testing.assert_allclose(pearson_rows(a, b), by_hand)
    a, b = a[0], b[0]
    assert not pearson_rows(a, 0 * b + 3).any() and not pearson_rows(0 * a, b).any()
    np.testing.assert_allclose(
        agreements(a - centre, b - centre, centre),
        pearson_rows(a, b) + pearson_rows(a - centre, b - centre),
    )
    assert mean_agreement(a, b, centre) == pytest.approx(
        agreements(a - centre, b - centre, centre).mean()
    )
    assert centred_correlation(a, b, centre) == pytest.approx(
        pearson_rows(beyond(a, centre), beyond(b, centre)).mean()
    )


def test_control_means_are_means_of_controls():
    cells = prepare(simulate(30, 6, 6, n_controls=12, cell_types=2, seed=0), n_genes=30)
    for X in (cells.X, dense(cells.X)):
        cells.X = X
        means = control_means(cells)
        for line, mean in means.items():
            own = (cells.obs.perturbation == CONTROL) & (cells.obs.cell_type == line)
            np.testing.assert_allclose(mean, dense(cells[own.values].X).mean(0), rtol=1e-5)
        assert list(means) == ["LINE0", "LINE1"] and list(control_means(cells, ["LINE1"])) == ["LINE1"]
    assert "'LINE7'" in refused(lambda: control_means(cells, ["LINE0", "LINE7"]))
