"Latents of cells and genes: from a fitted and from a loaded model, and what is refused."
import anndata
import numpy as np
import pandas as pd
import pytest

from biojepa.cells import BadCells, check
from biojepa.estimator import BioJEPA
from biojepa.prepare import prepare
from biojepa.simulator import simulate
from biojepa.splits import split

SHORT = dict(model=dict(width=16, layers=1, predictor_layers=1), progress=False)
SHORT |= dict(pretraining=dict(steps=6), training=dict(steps=6, validate_every=3))


@pytest.fixture(scope="module")
def cells():
    raw = simulate(n_genes=40, n_perturbations=12, cells_per_perturbation=8, cell_types=2, seed=0)
    return prepare(raw, n_genes=40)


@pytest.fixture(scope="module", params=["base", "v0_3", "v0_2"])
def model(cells, request): return BioJEPA.fit(cells, split(cells), preset=request.param, **SHORT)


def test_a_loaded_model_keeps_history_network_and_latents(model, cells, tmp_path):
    again = BioJEPA.load(model.save(tmp_path))
    assert again.has_network and set(again.history) == {"pretraining", "training"}
    for stage, history in model.history.items():
        pd.testing.assert_frame_equal(again.history[stage], history, check_dtype=False)
    for per in ("cell", "gene"):
        a, b = (m.encode(cells, per=per) for m in (model, again))
        assert np.array_equal(a.obsm["X_biojepa"], b.obsm["X_biojepa"])
        assert a.uns["X_biojepa"] == b.uns["X_biojepa"]
        assert a.uns["X_biojepa"]["training"] == "pretraining 6 steps, training 6 steps"


def test_latents_go_to_a_file_and_back(model, cells, tmp_path):
    out = model.encode(cells)
    out.write_h5ad(tmp_path / "cells.h5ad")
    back = anndata.read_h5ad(tmp_path / "cells.h5ad")
    check(back)
    assert np.array_equal(back.obsm["X_biojepa"], out.obsm["X_biojepa"])
    assert np.isfinite(out.obsm["X_biojepa"]).all() and out.obsm["X_biojepa"].std(0).max() > 0
    genes = model.encode(cells, per="gene")
    genes.write_h5ad(tmp_path / "genes.h5ad")
    assert list(anndata.read_h5ad(tmp_path / "genes.h5ad").obs_names) == model.genes


def test_other_cells_and_no_network_are_refused_by_name(model, cells, tmp_path):
    with pytest.raises(BadCells, match=f"2 genes are missing .{cells.var_names[0]}"):
        model.encode(cells[:, 2:])
    with pytest.raises(BadCells, match="not prepared"):
        model.encode(anndata.AnnData(np.ones((3, 40), np.float32)))
    gaps = cells.copy()
    gaps.X = gaps.X.toarray() if hasattr(gaps.X, "toarray") else gaps.X
    gaps.X[3, 5] = np.nan
    with pytest.raises(BadCells, match=cells.var_names[5]): model.encode(gaps)
    alone = BioJEPA.fit(cells, split(cells), network=False, progress=False)
    for closed in (alone, BioJEPA.load(alone.save(tmp_path))):
        assert not closed.has_network
        with pytest.raises(ValueError, match="network=True.*scanpy.pp.pca"): closed.encode(cells)
