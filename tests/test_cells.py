"Laws of the exported cells, for screens drawn at random."
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from hypothesis import given, strategies as st
from scipy import sparse

import biojepa as bj
from biojepa.cells import (
    CONTROL,
    MODES,
    BadCells,
    add_mode,
    check,
    dense,
    gene_hash,
    join_parts,
    part_modes,
    parts,
)
from biojepa.prepare import gene_names, prepare
from biojepa.effects import effects
from biojepa.perturbations import Action, BadAction, actions_of
from biojepa.simulator import simulate
from biojepa.splits import split
from tests.screens import GENES, few, refused, screen, screens

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*are not measured",
    "ignore:Observation names are not unique",
    "ignore:Variable names are not unique",
)


# what many files hold: logged values in X, counts in a layer, identifiers for genes

def usual(seed=0):
    a = screen(seed)
    a.layers["umi"] = a.X.copy()
    a.X = sparse.csr_matrix(np.log1p(a.X.toarray()))
    a.var["symbol"] = pd.Categorical(a.var_names)
    a.var_names = [f"ENSG{i:011d}" for i in range(a.n_vars)]
    return a


def test_counts_from_a_layer_under_symbols():
    a = usual()
    plain = prepare(screen(0))
    assert "; layer='umi' holds whole numbers" in refused(lambda: prepare(a))
    cells = prepare(a, layer="umi", genes="symbol")
    assert list(cells.var_names) == list(plain.var_names)
    np.testing.assert_array_equal(dense(cells.X), dense(plain.X))
    np.testing.assert_array_equal(dense(cells.layers["counts"]), dense(plain.layers["counts"]))
    assert "no layer 'counts'; the file has ['umi']" in refused(lambda: prepare(a, layer="counts"))
    assert "no column 'gene_name' for gene symbols; it has ['symbol']" in refused(
        lambda: prepare(a, layer="umi", genes="gene_name")
    )
    del a.layers["umi"]
    assert "layer=" not in refused(lambda: prepare(a))


@pytest.mark.filterwarnings("default:.*are not measured")
def test_identifiers_for_symbols_are_spotted():
    with pytest.warns(UserWarning, match="names such as 'ENSG00000000000'.*Give it as genes="):
        prepare(usual(), layer="umi")
    a = usual()
    a.var_names = [*GENES[:1], *a.var_names[1:]]
    a.obs.loc[a.obs.perturbation != CONTROL, "perturbation"] = [GENES[0], GENES[9]] * (
        (a.obs.perturbation != CONTROL).sum() // 2
    )
    with pytest.warns(UserWarning, match="1 of 2 perturbed genes are not measured: GENE9$"):
        prepare(a, layer="umi")


def test_repeated_and_missing_symbols_keep_every_row():
    a = usual()
    a.var["symbol"] = ["A", "A", None, *GENES[3:8]]
    assert list(gene_names(a, "symbol")) == [
        "A_ENSG00000000000",
        "A_ENSG00000000001",
        "ENSG00000000002",
        *GENES[3:8],
    ]


# names

@given(st.lists(st.sampled_from(GENES)))
def test_a_combination_has_one_name(targets):
    name = join_parts(targets)
    assert parts(name) == tuple(sorted(set(targets))) and join_parts(parts(name)) == name
    assert join_parts(targets[::-1]) == name


# prepare

@few
@given(screens)
def test_contract(raw):
    cells = prepare(raw)
    check(cells)
    assert cells.X.dtype == np.float32 and sparse.issparse(cells.X) == sparse.issparse(raw.X)
    np.testing.assert_allclose(np.expm1(dense(cells.X).astype(float)).sum(1), 1e4, rtol=1e-4)
    np.testing.assert_array_equal(dense(cells.layers["counts"]), dense(raw.X))
    np.testing.assert_allclose(np.expm1(cells.obs.log_total), dense(raw.X).sum(1), rtol=1e-5)
    assert ((cells.obs["mode"] == CONTROL) == (cells.obs.perturbation == CONTROL)).all()
    assert cells.uns["biojepa"]["genes_hash"] == gene_hash(cells.var_names)


@few
@given(screens, st.randoms())
def test_order_of_cells_and_genes_does_not_matter(raw, random):
    i = np.arange(raw.n_obs)
    j = np.arange(raw.n_vars)
    random.shuffle(i)
    random.shuffle(j)
    cells = prepare(raw)
    mixed = prepare(raw[i][:, j])
    back = mixed[cells.obs_names, cells.var_names]
    np.testing.assert_allclose(dense(back.X), dense(cells.X), rtol=1e-5)
    pd.testing.assert_frame_equal(back.obs, cells.obs)
    np.testing.assert_allclose(effects(mixed)[:, cells.var_names].X, effects(cells).X, atol=1e-4)


@few
@given(screens, st.integers(2, 9))
def test_depth_does_not_matter(raw, times):
    deep = raw.copy()
    deep.X = deep.X * np.float32(times)
    np.testing.assert_allclose(dense(prepare(deep).X), dense(prepare(raw).X), rtol=1e-4)


@few
@given(screens, st.integers(1, 7))
def test_perturbed_genes_stay(raw, n):
    cells = prepare(raw, n_genes=n)
    targets = {p for name in set(raw.obs.perturbation) for p in parts(name)}
    assert targets & set(raw.var_names) <= set(cells.var_names)
    assert set(cells.uns["biojepa"]["absent"]) == targets - set(raw.var_names)
    assert cells.n_vars == max(n, len(targets & set(raw.var_names)))
    assert list(cells.var_names) == [g for g in raw.var_names if g in set(cells.var_names)]
    np.testing.assert_allclose(dense(cells.X), dense(prepare(raw)[:, cells.var_names].X))


@few
@given(screens, st.integers(0, 10**6), st.sampled_from([-1.0, 0.5, np.nan, np.inf]))
def test_one_bad_entry_is_named_and_nothing_is_touched(raw, at, value):
    i, j = divmod(at % (raw.n_obs * raw.n_vars), raw.n_vars)
    X = dense(raw.X).copy()
    X[i, j] = value
    bad = AnnData(
        sparse.csr_matrix(X) if sparse.issparse(raw.X) else X.copy(), obs=raw.obs, var=raw.var
    )
    said = refused(lambda: prepare(bad))
    assert f"{raw.obs_names[i]!r}" in said and f"{raw.var_names[j]!r}" in said
    np.testing.assert_array_equal(dense(bad.X), X)
    assert bad.obs.equals(raw.obs)


def test_other_refusals():
    raw = screen(0)
    assert "'perturbed'" in refused(lambda: prepare(raw, "perturbed")) and "'plate'" in refused(
        lambda: prepare(raw, batch="plate")
    )
    assert "'NT'" in refused(lambda: prepare(raw, control="NT"))
    empty = raw.copy()
    empty.X[5] = 0
    empty.X.eliminate_zeros()
    assert "'cell5'" in refused(lambda: prepare(empty))
    twice = raw.copy()
    twice.var_names = ["A", "A", *raw.var_names[2:]]
    assert "'A'" in refused(lambda: prepare(twice))
    lonely = raw.copy()
    lonely.obs.loc["cell3", "perturbation"] = "GENE99"
    assert "'GENE99'" in refused(lambda: prepare(lonely))
    logged = raw.copy()
    sc.pp.normalize_total(logged, target_sum=1e4)
    sc.pp.log1p(logged)
    assert "log1p" in refused(lambda: prepare(logged))
    np.testing.assert_allclose(
        dense(prepare(logged, kind="log1p").X), dense(prepare(raw).X), rtol=1e-5
    )
    assert "already" in refused(lambda: prepare(prepare(raw)))
    assert "'unasigned'" in refused(lambda: prepare(raw, drop=["unasigned"])) and "-1" in refused(
        lambda: prepare(raw, dose=-1)
    )
    name = raw.obs.perturbation.iloc[-1]
    assert name not in set(prepare(raw, drop=name).obs.perturbation) and set(
        prepare(raw, drop=name).obs.perturbation
    ) == set(raw.obs.perturbation) - {name}
    assert "half=2" in refused(lambda: effects(prepare(raw), half=2), ValueError)


def as_array(seed=0):
    "The same screens with an array for X, and one more column."
    raw = screen(seed, as_sparse=False)
    raw.obs["note"] = "x"
    return raw


def with_column(name, values):
    raw = as_array()
    raw.obs[name] = values
    return raw


@pytest.mark.parametrize(
    "label, control, sep, word",
    [
        ("control", "NT", "_", "called"),
        ("A_", "NT", "_", "empty part"),
        ("A+B", "NT", "_", "holds a '+'"),
    ],
)
def test_names_that_could_be_read_in_two_ways(label, control, sep, word):
    raw = with_column(
        "guide", [control, label] * (as_array().n_obs // 2) + [control] * (as_array().n_obs % 2)
    )
    assert word in refused(lambda: prepare(raw, "guide", control, sep=sep))


def test_names_that_can_be_read():
    raw = as_array()
    for label, sep, name in (
        ("A_A", "_", "A"),
        ("B_NT", "_", "B"),
        ("A+B", "+", "A+B"),
        ("HLA-A_x", None, "HLA-A_x"),
    ):
        raw.obs["guide"] = np.where(np.arange(raw.n_obs) % 2, label, "NT")
        assert set(prepare(raw, "guide", "NT", sep=sep).obs.perturbation) == {CONTROL, name}


def test_doses():
    treated = as_array().obs.perturbation != CONTROL
    assert set(prepare(with_column("dose", np.where(treated, "1+1", "1"))).obs.dose) == {0.0, 1.0}
    bad = with_column("dose", np.where(treated, "1+2", "1"))
    assert "dose '1+2'" in refused(lambda: prepare(bad))
    assert set(prepare(bad, dose=2.5).obs.dose) == {0.0, 2.5}
    for value in (-1, np.inf):
        assert "from 0 up" in refused(
            lambda: prepare(as_array(), dose=value)
        ) and "from 0 up" in refused(lambda: prepare(as_array(), time=value))


def test_more_refusals():
    low = with_column("umi", 3)
    assert "'umi'" in refused(lambda: prepare(low, total="umi")) and "'umi2'" in refused(
        lambda: prepare(low, total="umi2")
    )
    assert "says many" in refused(lambda: prepare(with_column("umi", "many"), total="umi"))
    much = as_array()
    much.X = np.log1p(1e4 * much.X)
    assert "at most 9.21" in refused(lambda: prepare(much, kind="log1p"))
    much.X = np.log1p(np.random.default_rng(0).uniform(1e3, 9e3, much.shape))
    assert "more than 10,000" in refused(lambda: prepare(much, kind="log1p"))
    assert "neither" in refused(lambda: prepare(low, kind="tpm")) and "neither" in refused(
        lambda: prepare(low, select="random")
    )
    assert "at least one" in refused(lambda: prepare(low, n_genes=0)) and "CRISPRko" in refused(
        lambda: prepare(low, mode="knock-out")
    )
    assert "X is empty" in refused(lambda: prepare(AnnData(obs=low.obs, var=low.var)))


def test_modes_grow_and_keep_their_order():
    before = list(MODES)
    try:
        assert (
            add_mode(" editing ") == "editing" == add_mode("editing")
            and list(MODES) == [*before, "editing"]
            and MODES.added[-1:] == ("editing",)
        )
        assert [MODES.index(m) for m in before] == list(
            range(len(before))
        ) and bj.add_mode is add_mode
        for bad in ("Editing", "drug+editing", "", None):
            with pytest.raises(BadCells, match="mode"): add_mode(bad)
        assert len(MODES) == len(before) + 1
    finally: MODES.names[:] = before


def mixed():
    "Genes knocked down, drugs, and both at once, the drug named first."
    a = screen(0, singles=4, pairs=0, cells=6)
    a.obs["perturbation"] = np.resize(["control", "GENE1", "ZORRO", "ZORRO+GENE1"], a.n_obs)
    a.obs["mode"] = a.obs.perturbation.map(
        {"control": "control", "GENE1": "CRISPRi", "ZORRO": "drug", "ZORRO+GENE1": "drug+CRISPRi"}
    )
    return a


def test_modes_of_a_combination_follow_their_parts():
    a = mixed()
    cells = prepare(a)
    assert dict(zip(cells.obs.perturbation, cells.obs["mode"])) == {
        "control": "control",
        "GENE1": "CRISPRi",
        "ZORRO": "drug",
        "GENE1+ZORRO": "CRISPRi+drug",
    }
    # a drug is no gene that is missing
    assert list(cells.uns["biojepa"]["absent"]) == []
    action = {x.name: x for x in actions_of(effects(cells).obs)}["GENE1+ZORRO"]
    assert [(p.target, p.mode) for p in action.parts] == [("GENE1", "CRISPRi"), ("ZORRO", "drug")]
    a.obs["mode"] = a.obs["mode"].replace("drug+CRISPRi", "drug+drug")
    assert set(prepare(a).obs["mode"]) == {"control", "CRISPRi", "drug"}
    a.obs["mode"] = a.obs["mode"].replace("drug+drug", "drug+CRISPRi+CRISPRi")
    assert "has 2 parts, but mode 'drug+CRISPRi+CRISPRi' has 3" in refused(lambda: prepare(a))
    a.obs["mode"] = a.obs["mode"].replace("drug+CRISPRi+CRISPRi", "drug+magic")
    assert "'magic' is not one of" in refused(lambda: prepare(a))


def test_efficiency_of_guides_reaches_the_actions():
    a = mixed()
    gene = (a.obs.perturbation == "GENE1").to_numpy()
    a.obs["efficiency"] = np.nan
    a.obs.loc[gene, "efficiency"] = np.resize([.6, .8, np.nan], gene.sum())
    table = effects(prepare(a)).obs.set_index("perturbation")
    known = a.obs.efficiency[gene].mean()
    assert np.isclose(table.efficiency["GENE1"], known) and table.efficiency.isna().sum() == 2
    doses = {x.name: x.parts[0].dose for x in actions_of(table.reset_index())}
    assert np.isclose(doses["GENE1"], known) and doses["ZORRO"] == 1
    assert "efficiency" not in effects(prepare(mixed())).obs
    for bad in (80, "good"):
        a.obs["efficiency"] = a.obs.efficiency.astype(object)
        a.obs.iloc[5, a.obs.columns.get_loc("efficiency")] = bad
        assert f"'efficiency' says {bad!r} for cell 'cell5'" in refused(lambda: prepare(a))


def test_as_many_modes_as_parts():
    for name in ("control", "A", "B+A", "A+B+C"):
        assert part_modes(name, "drug") == [(p, "drug") for p in parts(name)]
        own = list(MODES[1:1 + len(parts(name))])
        if own: assert part_modes(name, "+".join(own)) == list(zip(parts(name), own))
        assert "give one mode, or one for each part" in refused(
            lambda: part_modes(name, "drug+CRISPRi+CRISPRa+drug")
        )


def test_a_structure_is_not_cut_at_its_charge():
    a = mixed()
    a.obs["perturbation"] = a.obs.perturbation.replace("ZORRO", "C[N+](C)C")
    a.obs["mode"] = a.obs["mode"].replace("drug+CRISPRi", "drug")
    assert "cut a bracket in two" in refused(lambda: prepare(a))
    with pytest.raises(BadAction, match="cut a bracket in two"): Action.parse("C[N+](C)C", "drug")


def test_a_mode_for_each_cell_and_what_is_carried_along():
    raw = as_array()
    name = raw.obs.perturbation.iloc[-1]
    raw.obs["how"] = np.where(raw.obs.perturbation == name, "CRISPRa", "CRISPRi")
    raw.uns["truth"] = {"net": np.ones(2)}
    cells = prepare(raw, mode="how")
    assert set(cells.obs["mode"]) == {CONTROL, "CRISPRa", "CRISPRi"} and set(
        cells.obs["mode"][cells.obs.perturbation == name]
    ) == {"CRISPRa"}
    assert (
        set(cells.obs.batch) == {"b0", "b1"}
        and "note" in cells.obs
        and (cells.uns["truth"]["net"] == 1).all()
    )


def test_whole_numbers_by_column_and_variable_genes():
    raw = screen(5)
    csc = raw.copy()
    csc.X = sparse.csc_matrix(csc.X.astype(int))
    assert (prepare(csc).X != prepare(raw).X).nnz == 0 and prepare(csc).X.format == "csr"
    measured = {p for n in set(raw.obs.perturbation) for p in parts(n)} & set(raw.var_names)
    hvg = prepare(raw, n_genes=1, select="hvg")
    assert measured <= set(hvg.var_names) and list(hvg.var_names) == [
        g for g in raw.var_names if g in set(hvg.var_names)
    ]


def test_a_file_gives_the_same_cells(tmp_path):
    cells = prepare(screen(1, lines=2))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    back = sc.read_h5ad(tmp_path / "cells.h5ad")
    check(back)
    np.testing.assert_array_equal(dense(back.X), dense(cells.X))
    np.testing.assert_array_equal(effects(back).X, effects(cells).X)
    assert list(back.uns["biojepa"]["input_genes"]) == GENES[:8]
    effects(back).write_h5ad(tmp_path / "effects.h5ad")
    assert split(back, seed=3) == split(cells, seed=3)


def test_a_library_smaller_than_its_genes_is_refused_for_counts_only():
    cells = simulate(n_genes=30, n_perturbations=6, cells_per_perturbation=6, n_controls=12, seed=0)
    summed = np.asarray(cells.X.sum(1)).ravel()
    cells.obs["library"] = summed
    assert np.allclose(
        prepare(cells, n_genes=30, total="library").obs.log_total, np.log1p(summed), rtol=1e-5
    )
    cells.obs.loc["cell3", "library"] = summed[3] - 1
    with pytest.raises(BadCells, match="cell3"): prepare(cells, n_genes=30, total="library")
    cells.obs["library"] = 0.9 * summed
    logged = cells.copy()
    logged.X = prepare(cells, n_genes=30)[cells.obs_names, cells.var_names].X
    # logged values do not add up to a library
    assert prepare(logged, n_genes=30, kind="log1p", total="library").n_obs == cells.n_obs


def test_values_clipped_to_one_whole_number_are_no_counts():
    "Whole by accident: every value above 0 is the bound."
    cells = simulate(n_genes=20, n_perturbations=4, cells_per_perturbation=6, seed=0)
    cells.X = cells.X.copy()
    cells.X.data[:] = 2.0
    with pytest.raises(BadCells, match="clipped"): prepare(cells)


@pytest.mark.parametrize("label, sep", [("A+nan", "+"), ("A+<NA>", "+"), ("A_None", "_"), ("control+NA", "+")])
def test_a_missing_part_of_a_combination_is_no_target(label, sep):
    from biojepa.cells import BadCells
    from biojepa.labels import cut
    with pytest.raises(BadCells, match="missing"): cut(label, ("control",), sep)
    assert cut("NANOG+A", ("control",)) == ("NANOG", "A")
