"Probes of embeddings, negative controls that were never trained, and who is first."
import numpy as np
import pytest

from biojepa.prepare import prepare
from biojepa.estimator import BioJEPA
from biojepa.scorecard import scorecard
from biojepa.probes import embeddings, has_network, probes, untrained
from biojepa.report import refit_controls
from biojepa.simulator import simulate, simulated_features
from biojepa.splits import split

TINY = dict(
    model=dict(width=16, layers=1, predictor_layers=1, pathways=8),
    pretraining=dict(steps=4, batch=8),
    training=dict(steps=4, sets=4),
    progress=False,
    device="cpu",
)


@pytest.fixture(scope="module")
def screen():
    cells = prepare(
        simulate(n_genes=48, n_perturbations=30, cells_per_perturbation=12, seed=1), n_genes=48
    )
    return (
        cells,
        simulated_features(cells),
        split(cells, "unseen_gene", seed=0),
        {f"GENE{g}": [f"module {m}"] for g, m in enumerate(cells.uns["truth"]["modules"])},
    )


@pytest.mark.parametrize("preset", ["base", "v0_3", "v0_2"])
def test_every_preset_has_embeddings_of_genes_actions_and_cells(screen, preset):
    cells, features, fold, modules = screen
    model = BioJEPA.fit(cells, fold, preset=preset, features=features, **TINY)
    said = embeddings(model, cells, fold.test)
    assert (
        list(said["gene"].index) == list(cells.var_names)
        and list(said["action"].index) == list(fold.test)
        and set(said["cell"].index) <= set(cells.obs_names)
    )
    assert all(np.isfinite(f).all(None) for f in said.values())
    blank = untrained(model, cells)
    assert blank.closed_form is None and not np.allclose(
        embeddings(blank, cells, fold.test)["gene"], said["gene"]
    )
    table = probes({"m": model}, cells, fold, modules, features=features)
    assert {"m", "m, untrained", "features", "PCA of cells"} <= set(table.of) and (
        table.embedding == "action"
    ).any()


def test_a_closed_form_has_nothing_to_probe_and_controls_without_network(screen):
    cells, features, fold, modules = screen
    def fit(c, s, f): return BioJEPA.fit(c, s, features=f, network=False, progress=False)
    model = fit(cells, fold, features)
    assert not has_network(model) and probes({"m": model}, cells, fold, modules) is None
    assert set(refit_controls(fit, cells, fold, features)) == {
        "shuffled labels",
        "shuffled features",
    }


def test_a_scorecard_asks_the_cells_of_a_loaded_model(tmp_path):
    raw = simulate(n_genes=40, n_perturbations=12, cells_per_perturbation=12, cell_types=2, seed=3)
    cells = prepare(raw, n_genes=40)
    fold = split(cells, "unseen_gene", seed=0)
    model = BioJEPA.fit(cells, fold, **TINY)
    again = BioJEPA.load(model.save(tmp_path))
    card = scorecard(cells, fold, {"m": again}, "none", n_boot=20, metrics=["mse"], probe=True)
    asked = card.probes.query("embedding == 'cell'").set_index(["probe", "of"]).value
    rows = {"m", "m, untrained", "expression", "PCA of cells"}
    for probe in ("cell_type", "perturbation"): assert set(asked[probe].index) == rows
    assert asked["cell_type", "PCA of cells"] > 0.9
    plain = scorecard(cells, fold, {"m": again}, "none", n_boot=20, metrics=["mse"])
    assert plain.probes is None


def test_the_winner_is_the_best_of_the_table_and_the_gap_is_its_lead(screen):
    cells, features, fold, _ = screen
    truth = BioJEPA.fit(cells, fold, features=features, network=False, progress=False)
    card = scorecard(cells, fold, {"closed form": truth}, "all", features, n_boot=50)
    first = card.winners(metrics=["pearson_delta", "mse"])
    for metric, row in first.iterrows():
        t = card.table[card.table.metric == metric].set_index("model").value
        assert (
            row["first"] == (t.idxmin() if metric == "mse" else t.idxmax()) and row.difference >= 0
        )
        assert np.isclose(row.difference, abs(t[row["first"]] - t[row.second]), atol=1e-6)
        assert row.clear == ("yes" if row.low > 0 else "no")
