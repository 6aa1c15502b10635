"Files of every common format, damaged ones, and matrices whose lists do not agree."
import gzip
import pickle

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings, strategies as st
from scipy import io, sparse

import biojepa as bj
from biojepa.files import BadCells, read, sound, storable

few = settings(max_examples=30, deadline=None)


def screen(n=12):
    "Counts of 5 genes in n cells, half of them treated."
    X = np.random.default_rng(0).poisson(4, (n, 5)).astype("float32") + 1
    obs = pd.DataFrame({"perturbation": np.repeat(["control", "G1"], n // 2)})
    obs.index = "c" + obs.index.astype(str)
    return AnnData(
        sparse.csr_matrix(X), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(5)])
    )


def refused(f):
    with pytest.raises(BadCells) as e: f()
    return str(e.value)


def parts(X, **other):
    "A csr or csc matrix with other lists."
    out = X.copy()
    for name, value in other.items(): setattr(out, name, value)
    return out


@few
@given(st.integers(0, 10**6), st.sampled_from(["csr", "csc"]), st.integers(0, 5))
def test_damaged_lists_are_refused_before_anything_is_computed(seed, form, kind):
    rng = np.random.default_rng(seed)
    X = sparse.random(6, 8, 0.5, format=form, random_state=seed)
    at = X.indices.copy()
    ends = X.indptr.copy()
    i = rng.integers(len(at))
    if kind == 0: at[i] = -1
    elif kind == 1: at[i] = 10**9
    elif kind == 2: ends[rng.integers(1, len(ends))] = len(at) + 5
    elif kind == 3: ends = ends[:-1]
    elif kind == 4: ends[0] = 1
    else: at = at[:-1]
    bad = parts(X, indices=at, indptr=ends)
    assert "damaged" in refused(lambda: sound(bad))
    cells = screen(6)
    cells.X = sparse.csr_matrix(np.ones((6, 8)))[:, :5]
    cells.layers["counts"] = sparse.csr_matrix(cells.X)
    cells.layers["counts"].indices[0] = -1
    assert "damaged" in refused(lambda: bj.prepare(cells, layer="counts"))


@few
@given(st.integers(0, 10**6), st.sampled_from(["csr", "csc"]))
def test_pieces_are_summed_and_the_input_is_kept(seed, form):
    X = sparse.random(6, 8, 0.5, format=form, random_state=seed)
    double = type(X)(
        (np.repeat(X.data / 2, 2), np.repeat(X.indices, 2), 2 * X.indptr), shape=X.shape
    )
    out = sound(double)
    np.testing.assert_allclose(out.toarray(), X.toarray())
    assert out.nnz == X.nnz and double.nnz == 2 * X.nnz and out.has_sorted_indices


def test_pieces_give_the_cells_of_their_sum():
    raw = screen()
    want = bj.prepare(raw)
    X = raw.X
    lists = np.repeat(X.data / 2, 2), np.repeat(X.indices, 2), 2 * X.indptr
    raw.X = sparse.csr_matrix(lists, shape=X.shape)
    raw.X.data = np.where(np.arange(2 * X.nnz) % 2, np.ceil(raw.X.data), np.floor(raw.X.data))
    np.testing.assert_allclose(bj.prepare(raw).X.toarray(), want.X.toarray(), atol=1e-5)


def test_every_format_gives_the_same_counts(tmp_path):
    a = screen()
    a.write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "a.h5ad.gz").write_bytes(gzip.compress((tmp_path / "a.h5ad").read_bytes()))
    a.write_zarr(tmp_path / "a.zarr")
    with h5py.File(tmp_path / "a.h5mu", "w") as f:
        anndata.io.write_elem(f, "mod/rna", a)
        anndata.io.write_elem(f, "mod/prot", a[:, :2].copy())
    with h5py.File(tmp_path / "a.loom", "w") as f:
        f["matrix"] = a.X.T.toarray()
        f["row_attrs/Gene"], f["col_attrs/CellID"] = list(a.var_names), list(a.obs_names)
        f["col_attrs/perturbation"] = list(a.obs.perturbation)
    (tmp_path / "mtx").mkdir()
    io.mmwrite(tmp_path / "mtx/matrix.mtx", sparse.coo_matrix(a.X.T.astype(int)))
    (tmp_path / "mtx/barcodes.tsv").write_text("\n".join(a.obs_names))
    (tmp_path / "mtx/genes.tsv").write_text("\n".join(f"E{g}\t{g}" for g in a.var_names))
    for name in ("a.h5ad", "a.h5ad.gz", "a.zarr", "a.h5mu", "a.loom", "mtx"):
        got = read(tmp_path / name)
        np.testing.assert_array_equal(sound(got.X).toarray(), a.X.toarray(), err_msg=name)
        assert list(got.var_names) == list(a.var_names)
        if name == "mtx":
            assert "mtx says nothing of its cells" in refused(lambda: bj.prepare(got))
            got.obs = a.obs
        assert bj.prepare(got).n_obs == a.n_obs


@few
@given(st.integers(0, 10**6))
def test_damaged_files_are_one_sentence(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("damaged")
    screen().write_h5ad(folder / "a.h5ad")
    rng = np.random.default_rng(seed)
    data = bytearray((folder / "a.h5ad").read_bytes())
    if seed % 2: data = data[:rng.integers(len(data))]
    else:
        for i in rng.integers(len(data), size=20): data[i] ^= 1 << int(rng.integers(8))
    (folder / "b.h5ad").write_bytes(data)
    try: read(folder / "b.h5ad")
    except BadCells as e: assert "b.h5ad" in str(e) and "h5ad" in str(e).replace("b.h5ad", "")


def test_nothing_outside_the_file_is_read_and_nothing_unpickled(tmp_path):
    a = screen()
    a.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as f:
        f["layers/secret"] = h5py.ExternalLink("other.h5ad", "/X")
    assert "not followed" in refused(lambda: read(tmp_path / "a.h5ad"))
    with h5py.File(tmp_path / "b.h5ad", "w") as f:
        f.create_dataset("X", (3, 2), external=[(str(tmp_path / "raw"), 0, 24)], dtype="f4")
    assert "not followed" in refused(lambda: read(tmp_path / "b.h5ad"))
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(1))
    assert "none of h5ad" in refused(lambda: read(tmp_path / "c.pkl"))
    with pytest.raises(FileNotFoundError, match="no file"): read(tmp_path / "none.h5ad")


def test_tables_that_no_file_holds_are_made_storable(tmp_path):
    a = screen()
    text = pd.array([*"abcdefghijk", None], dtype="string")
    a.obs = a.obs.assign(text=text, bin=pd.cut(range(12), 3), mixed=[1, "a", None, *range(9)])
    a.obs["share"] = pd.Series([0.5, None] * 6, dtype=object, index=a.obs_names)
    a.obs.index = pd.Index(a.obs.index, dtype="string")
    cells = bj.prepare(a)
    cells.write_h5ad(tmp_path / "c.h5ad")
    back = read(tmp_path / "c.h5ad")
    assert back.obs.text.isna().sum() == 1 and back.obs.share.dtype == float
    assert storable(back.obs).shape == back.obs.shape


def test_a_heap_of_texts_without_an_end_is_refused(tmp_path):
    from biojepa.files import HEAP, _check_heaps
    path = tmp_path/"a.h5ad"
    AnnData(np.ones((3, 2), "float32"), obs=pd.DataFrame({"gene": ["A", "B", "C"]}, index=list("abc"))).write_h5ad(path)
    assert bj.read(path).obs.gene.tolist() == ["A", "B", "C"]
    data = bytearray(path.read_bytes())
    first = data.find(HEAP) + 16
    data[first:first + 16] = bytes(16)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"): _check_heaps(path)  # HDF5 itself would not come back
    with pytest.raises(ValueError, match="a.h5ad.*damaged"): bj.read(path)
