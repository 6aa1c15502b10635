"Small screens drawn at random, for the tests of cells, effects, splits and sets."
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import settings, strategies as st
from scipy import sparse

from biojepa.cells import CONTROL, BadCells, join_parts, parts

few = settings(max_examples=12, deadline=None)
GENES = [f"GENE{i}" for i in range(12)]
seeds = st.integers(0, 2**31)


def screen(seed, singles=5, pairs=3, cells=4, lines=1, batches=2, as_sparse=True):
    """Counts of 8 genes; single and double perturbations of 12; every batch of every line has
    controls."""
    rng = np.random.default_rng(seed)
    names = list(rng.choice(GENES, singles, replace=False))
    names += ["+".join(rng.choice(GENES, 2, replace=False)) for _ in range(pairs)]
    names = [join_parts(parts(n)) for n in dict.fromkeys(names)]
    rows = [
        (n, f"L{l}", f"b{i % batches}")
        for l in range(lines)
        for n in [CONTROL] * 3 + sorted(set(names))
        for i in range(cells)
    ]
    obs = pd.DataFrame(rows, columns=["perturbation", "cell_type", "batch"])
    obs.index = "cell" + obs.index.astype(str)
    X = rng.poisson(3, (len(obs), 8)).astype("float32")
    X[:, 7] += 1
    return AnnData(
        sparse.csr_matrix(X) if as_sparse else X, obs=obs, var=pd.DataFrame(index=GENES[:8])
    )


screens = st.builds(
    screen,
    seeds,
    st.integers(3, 8),
    st.integers(0, 12),
    st.integers(2, 6),
    st.integers(1, 3),
    st.integers(1, 2),
    st.booleans(),
)


def refused(f, error=BadCells):
    with pytest.raises(error) as e: f()
    return str(e.value)
