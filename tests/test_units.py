"Scales are told apart by what counts leave in them; labels, numbers and columns are understood."
import warnings

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from scipy import sparse

import biojepa as bj
from biojepa.cells import check
from biojepa.columns import key_of
from biojepa.files import BadCells
from biojepa.labels import cut, missing, number, parts
from biojepa.units import problem


def screen(labels=("control", "G1", "G2"), n=12, genes=60, **obs):
    rng = np.random.default_rng(0)
    lab = np.repeat(labels, n)
    rate = rng.gamma(0.7, 5, genes) * rng.gamma(8, 1 / 8, (len(lab), 1)) + 0.2
    X = rng.poisson(rate).astype("float32")
    X[:, 0] += 1
    o = pd.DataFrame({"perturbation": lab, **obs}, index=[f"c{i}" for i in range(len(lab))])
    return AnnData(
        sparse.csr_matrix(X), obs=o, var=pd.DataFrame(index=[f"G{i}" for i in range(genes)])
    )


def logged(total=1e4, base=None, keep_note=False):
    a = screen()
    if total is not False: sc.pp.normalize_total(a, target_sum=total)
    sc.pp.log1p(a, base=base)
    if not keep_note: a.uns.clear()
    return a


def changed(a, f):
    a = a.copy()
    a.X = sparse.csr_matrix(f(a.X.toarray()).astype("float32"))
    return a


def refused(f):
    with pytest.raises(BadCells) as e: f()
    return str(e.value)


OTHERS = {
    "median": lambda: logged(None),
    "not scaled": lambda: logged(False),
    "log10": lambda: logged(base=10),
    "log2": lambda: logged(base=2),
    "per 1,000": lambda: logged(1e3),
    "per million": lambda: logged(1e6),
    "twice": lambda: changed(logged(), np.log1p),
    "root": lambda: changed(screen(), np.sqrt),
    "not logged": lambda: changed(logged(), np.expm1),
    "scaled": lambda: changed(logged(), lambda X: X / np.maximum(X.std(0), 1e-9)),
    "centred": lambda: changed(logged(), lambda X: X - X.mean(0)),
    "counts": screen,
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_scales_are_refused_as_log1p(what):
    a = OTHERS[what]()
    assert refused(lambda: bj.prepare(a, kind="log1p")) and problem(a.X, a.var_names)


def test_the_right_scale_is_taken_with_a_subset_of_genes_too():
    a = logged()
    assert problem(a.X) is None and bj.prepare(a, kind="log1p").n_obs == a.n_obs
    a.obs["umi"] = np.asarray(screen().X.sum(1)).ravel()
    few = a[:, :20].copy()
    np.testing.assert_allclose(
        bj.prepare(few, kind="log1p", total="umi").X.toarray(), few.X.toarray(), rtol=1e-6
    )
    with pytest.warns(UserWarning, match="not to 10,000"): bj.prepare(few, kind="log1p")
    a.obs["umi"] *= 4
    assert "divided by" in refused(lambda: bj.prepare(a, kind="log1p", total="umi"))
    assert "base 2" in refused(lambda: bj.prepare(logged(base=2, keep_note=True), kind="log1p"))


@pytest.mark.parametrize(
    "what",
    [
        np.log1p,
        lambda X: X * np.log2(np.e),
        lambda X: X - X.mean(0),
        lambda X: X / 10,
        lambda X: np.log1p(np.expm1(X) / 10),
        lambda X: 0 * X,
    ],
)
@pytest.mark.parametrize("counts", [True, False])
def test_prepared_cells_that_were_altered_are_refused(what, counts):
    cells = bj.prepare(screen())
    check(cells)
    if not counts: del cells.layers["counts"]
    check(cells)
    assert "after prepare" in refused(lambda: check(changed(cells, what)))


def test_noise_is_rounded_and_corrected_counts_are_not():
    a = screen()
    want = bj.prepare(a).X.toarray()
    noisy = a.copy()
    noisy.X = noisy.X.astype(float)
    noisy.X.data += 1e-7
    np.testing.assert_allclose(bj.prepare(noisy).X.toarray(), want, atol=1e-5)
    assert "numpy.rint" in refused(lambda: bj.prepare(changed(a, lambda X: 0.93 * X + 20)))
    raw = changed(a, np.log1p)
    raw.raw = a
    assert "raw.to_adata()" in refused(lambda: bj.prepare(raw))


# labels

ONE = [
    "(+)-JQ1",
    "flurbiprofen-(+|-)",
    "2i (LIF+MEKi+GSK3i)",
    "AAGAB_+_67546963.23-P1P2",
    "x-[a+b]-y",
    "(+/-)-Z",
]


@pytest.mark.parametrize("label", ONE)
@pytest.mark.parametrize("sep", ["+", None])
def test_a_plus_that_joins_nothing(label, sep):
    (name,) = cut(label, ["control"], sep)
    assert len(parts(name)) == 1


@pytest.mark.parametrize(
    "label, controls, sep, targets",
    [
        ("G1_neg_ctrl", ["neg_ctrl"], "_", ("G1",)),
        ("neg_ctrl_G1", ["neg_ctrl"], "_", ("G1",)),
        ("G1-non-targeting", ["non-targeting"], "-", ("G1",)),
        ("ctrl+ctrl", ["ctrl"], "+", ()),
        ("B+ctrl+A", ["ctrl"], "+", ("B", "A")),
        ("(+)-JQ1+Dox", ["DMSO"], "+", ("(plus)-JQ1", "Dox")),
        ("HLA-A-B2M", ["NT"], "-", ("HLA-A", "B2M")),
        ("NKX2-1", ["NT"], "-", ("NKX2-1",)),
    ],
)
def test_labels_are_cut_at_joints_only(label, controls, sep, targets):
    assert cut(label, controls, sep, {"HLA-A", "B2M", "NKX2-1"}) == targets


@pytest.mark.parametrize(
    "label", ["G2+control", "A+DMSO", "A+10uM", "A(B+C", "C[N+](C)C", "A+", "control"]
)
def test_what_could_be_read_in_two_ways_is_refused_by_name(label):
    assert repr(label) in refused(lambda: cut(label, ["ctrl"]))


def test_labels_with_doses_and_guides_are_read_when_asked():
    a = screen(["DMSO", "X@1uM", "X@10uM", "Y_500nM"])
    with pytest.warns(UserWarning, match="doses.*parse_labels=True"):
        plain = bj.prepare(a, control="DMSO", mode="drug")
    assert "X@1uM" in set(plain.obs.perturbation)
    cells = bj.prepare(a, control="DMSO", mode="drug", parse_labels=True)
    doses = cells.obs.groupby("perturbation", observed=True).dose.unique().map(sorted).to_dict()
    assert doses == {"X": [1, 10], "Y": [0.5], "control": [0]}
    b = screen(["non-targeting", "non-targeting_00001", "G1-B", "G1-D", "g2_1"])
    cells = bj.prepare(b, control="non-targeting", parse_labels=True)
    assert dict(cells.obs.perturbation.value_counts()) == {"control": 24, "G1": 24, "G2": 12}
    assert list(bj.preview_labels(b, control="non-targeting").target) == [
        "control",
        "control",
        "G1",
        "G1",
        "G2",
    ]


def test_several_controls():
    both = ["NT_1", "NT_2"]
    a = screen([*both, "G1"])
    assert (bj.prepare(a, control=both).obs.perturbation == "control").sum() == 24
    assert "'NT_3'" in refused(lambda: bj.prepare(a, control=["NT_1", "NT_3"]))


@pytest.mark.parametrize("gap", ["nan", "None", "NA", "<NA>", "", " ", "NaN", "null"])
def test_missing_as_text_is_no_name(gap):
    a = screen(["control", "G1", "G2", gap])
    assert "empty" in refused(lambda: bj.prepare(a))
    assert bj.prepare(a, drop=[gap]).n_obs == 36
    for column in ("batch", "cell_type", "dose", "mode"):
        b = screen(**{column: "CRISPRi" if column == "mode" else "1"})
        b.obs.iloc[20, b.obs.columns.get_loc(column)] = gap
        assert "'c20'" in refused(lambda: bj.prepare(b))
    assert missing(pd.Series([gap])).all()


def test_numbers_as_people_write_them():
    assert [number(t, "dose") for t in ("1e3", " 1 ", ".5", 2, "1+1")] == [1000, 1, 0.5, 2, 1]
    for text, word in {
        "0_5": "number",
        "1,5": "comma",
        "10uM": "unit",
        "inf": "number",
        "-1": "number",
    }.items():
        assert word in refused(lambda: number(text, "dose"))


def test_columns_that_are_left_unused_are_named():
    a = screen(["control", "D1", "D2"], 24)
    a.obs["cell_line"] = np.resize(["A", "B"], a.n_obs)
    a.obs["dose_val"] = np.resize([0.1, 1, 10], a.n_obs)
    a.obs["time_point"] = np.resize([6, 6, 6, 48, 48, 48], a.n_obs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bj.prepare(a, mode="drug")
        said = " ".join(str(w.message) for w in caught)
        for word in ("cell_type='cell_line'", "dose='dose_val'", "time='time_point'"):
            assert word in said
        caught.clear()
        bj.prepare(a, mode="drug", cell_type="cell_line", dose="dose_val", time="time_point")
        assert not any("pooled" in str(w.message) for w in caught)
    assert key_of("pseudotime") is None and key_of("Celltype") == "cell_type"
