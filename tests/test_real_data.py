"Reference figures on real screens; skipped where the data are absent."
import os
from pathlib import Path

import anndata
import numpy as np
import pytest

from biojepa.cells import BadCells, parts
from biojepa.prepare import prepare
from biojepa.effects import effects
from biojepa.demo import real_splits

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("BIOJEPA_DATA", ROOT.parent / "shared")) / "data"


def read(path):
    if not (DATA / path).exists():
        pytest.skip(f"{path} is not in the folder that BIOJEPA_DATA names")
    return anndata.read_h5ad(DATA / path)


def correlation(a, b): return np.corrcoef(a, b)[0, 1]


@pytest.fixture(scope="module")
def norman():
    raw = read("norman19_mcfaline23/devel.h5ad")
    return raw[(raw.obs.dataset == "norman19").values].copy()


def test_norman_reference_figures(norman):
    """The published Pearson of effects:

    mean of all others 0.367; pairs of seen singles: mean 0.28, additive 0.870.
    """
    seen = effects(
        prepare(norman, "condition", kind="log1p", mode="CRISPRa", total="ncounts", n_genes=500)
    ).to_df()
    singles = [n for n in seen.index if len(parts(n)) == 1]
    pairs = [n for n in seen.index if len(parts(n)) == 2 and set(parts(n)) <= set(singles)]
    assert len(pairs) == 5
    assert np.mean(
        [correlation(seen.drop(n).mean(), seen.loc[n]) for n in singles]
    ) == pytest.approx(0.367, abs=0.005)
    assert np.mean(
        [correlation(seen.loc[singles].mean(), seen.loc[n]) for n in pairs]
    ) == pytest.approx(0.28, abs=0.01)
    assert np.mean(
        [correlation(sum(seen.loc[p] for p in parts(n)), seen.loc[n]) for n in pairs]
    ) == pytest.approx(0.870, abs=0.003)


def test_norman_is_refused_as_counts(norman):
    with pytest.raises(BadCells, match="log1p"): prepare(norman, "condition")


def test_norman_splits_hold_out_singles_and_pairs(norman):
    splits = real_splits(
        prepare(norman, "condition", kind="log1p", mode="CRISPRa", total="ncounts", n_genes=500),
        seed=0,
    )
    tested = [n for s in splits[:5] for n in s.test if len(parts(n)) == 1]
    assert len(tested) == len(set(tested)) == 18 and set(
        splits[5].groups[n] for n in splits[5].test
    ) == {"pair_seen2"}


def test_papalexi_knows_its_strong_knock_outs():
    "Halves of the cells agree for the interferon pathway, and not for PDCD1LG2."
    cells = prepare(
        read("papalexi21/papalexi_thp1_299genes.h5ad"),
        control="non-targeting",
        drop=["unassigned"],
        batch="bio_rep",
        mode="CRISPRko",
        n_genes=299,
    )
    a, b = (effects(cells, half=h).to_df() for h in (0, 1))
    assert (
        min(correlation(a.loc[n], b.loc[n]) for n in ("IFNGR1", "IFNGR2", "JAK2", "STAT1")) > 0.85
    )
    assert correlation(a.loc["PDCD1LG2"], b.loc["PDCD1LG2"]) < 0.5
