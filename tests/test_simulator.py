"Laws of the simulator, for any seed and size."
import anndata
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biojepa.effects import effects
from biojepa.network import draw_network, linear_response, steady_state
from biojepa.prepare import prepare
from biojepa.simulator import SHIFT, network_of, simulate, simulated_features, true_effects

few = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 10**6)


def screen(seed, **more):
    return simulate(
        **{
            **dict(
                n_genes=40,
                n_perturbations=10,
                cells_per_perturbation=3,
                n_controls=6,
                n_doubles=6,
                n_drugs=2,
                cell_types=2,
            ),
            **more,
        },
        seed=seed,
    )


@few
@given(seeds, st.integers(10, 150), st.floats(0, 3))
def test_one_steady_state_from_any_drive(seed, n_genes, size):
    network = draw_network(n_genes, cell_types=2, rng=seed)
    rng = np.random.default_rng(seed)
    R = network.regulators
    assert np.abs(np.linalg.eigvals(np.abs(network.weights[R]))).max() <= 0.81
    drive = network.base[1] + rng.normal(0, size, (5, n_genes))
    clamp = np.where(rng.random((5, n_genes)) < 0.1, rng.normal(0, 2, (5, n_genes)), np.nan)
    levels = steady_state(network, drive, 1, clamp)
    once = np.tanh(levels[:, R]) @ (network.weights * network.edges[1]).T + drive
    assert np.allclose(np.where(np.isnan(clamp), once, clamp), levels, atol=1e-3)


@few
@given(seeds)
def test_small_pushes_follow_the_closed_form(seed):
    network = draw_network(60, rng=seed)
    gene = int(network.regulators[seed % len(network.regulators)])
    clamp = np.full((1, 60), np.nan)
    clamp[0, gene] = network.rest[0][gene] + 0.02
    moved = (
        steady_state(network, network.base[[0]], clamp=clamp, tolerance=1e-7)[0] - network.rest[0]
    )
    moved[gene] = 0
    expected = 0.02 * linear_response(network)[gene]
    assert np.abs(moved - expected).max() <= 0.05 * np.abs(expected).max() + 1e-5


@few
@given(seeds, st.sampled_from(sorted(SHIFT)), st.sampled_from(["LINE0", "LINE1"]))
def test_effects_of_nothing_and_of_pairs(seed, mode, line):
    cells = screen(seed)
    a, b = cells.obs.perturbation[cells.obs["mode"] == "CRISPRi"].unique()[:2]
    effect = true_effects(cells, ["control", f"{a}+{b}", f"{b}+{a}", a, "DRUG0"], line, mode).values
    assert not effect[0].any() and np.array_equal(effect[1], effect[2]) and effect[3].any()
    assert not true_effects(
        cells, [a, f"{a}+{b}", "DRUG0"], line, mode, guide_failure=1.0
    ).values.any()
    assert not true_effects(cells, [a, f"DRUG0+{a}"], line, mode, dose=0).values.any()


@few
@given(seeds)
def test_the_seed_is_everything_and_the_first_line_does_not_see_the_others(seed):
    cells = screen(seed)
    same = screen(seed)
    more = screen(seed, cell_types=3, n_drugs=4, cells_per_perturbation=5)
    assert (cells.X != same.X).nnz == 0 and cells.obs.equals(same.obs)
    singles = [p for p in cells.obs.perturbation.unique() if p.startswith("GENE") and "+" not in p]
    assert set(singles) <= set(more.obs.perturbation)
    assert np.array_equal(true_effects(cells, singles).values, true_effects(more, singles).values)
    assert not cells.obs.guide_failed[cells.obs.perturbation == "control"].any()


def test_truth_survives_the_disk(tmp_path):
    cells = screen(3, modes=("CRISPRa", "CRISPRko"))
    cells.write_h5ad(tmp_path / "screen.h5ad")
    loaded = anndata.read_h5ad(tmp_path / "screen.h5ad")
    names = [*cells.obs.perturbation.unique(), "GENE0+GENE1+GENE2", "DRUG1+GENE3"]
    assert true_effects(loaded, names, "LINE1").equals(true_effects(cells, names, "LINE1"))
    assert simulated_features(loaded).equals(simulated_features(cells))
    assert np.array_equal(network_of(loaded).edges, network_of(cells).edges)


def test_seen_effects_are_the_true_ones_in_many_deep_cells():
    cells = simulate(
        n_genes=60,
        n_perturbations=6,
        n_doubles=3,
        cells_per_perturbation=500,
        n_controls=4000,
        depth=200,
        guide_failure=0.2,
        seed=0,
    )
    seen = effects(prepare(cells, n_genes=60))
    true = true_effects(cells, seen.obs_names, n=500, guide_failure=0.2).values
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(seen.X, true)) > 0.95
    assert (seen.X * true).sum() / (true**2).sum() == pytest.approx(1, abs=0.1)
