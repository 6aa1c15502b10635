"Several screens as one: alignment, names, units, gaps, and a joint model seen from inside."
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings, strategies as st
from scipy import sparse

import biojepa as bj
from biojepa.cells import CONTROL, BadCells, check, dense
from biojepa.effects import effects
from biojepa.splits import Leak, Split
from biojepa.concat import WithinDataset, concat, joint_split
from biojepa.units import scale_of

pytestmark = pytest.mark.filterwarnings("ignore:.*are not measured", "ignore:.*cells left out")
few = settings(max_examples=10, deadline=None)


def screen(
    genes, seed=0, storage=sparse.csr_matrix, names=("G1", "G2", "G3"), lines=("L",), cells=6
):
    """Prepared cells of a small screen with these genes and some housekeeping ones, so that totals
    are large."""
    rng = np.random.default_rng(seed)
    rows = [(n, l, f"{i % 2}") for l in lines for n in (CONTROL, *names) for i in range(cells)]
    obs = pd.DataFrame(rows, columns=["perturbation", "cell_type", "batch"])
    obs.index = "c" + obs.index.astype(str)
    X = rng.poisson(3, (len(obs), len(genes))).astype(np.float32)
    X[:, 0] += 1
    raw = AnnData(storage(X) if storage else X, obs=obs, var=pd.DataFrame(index=list(genes)))
    return bj.prepare(raw, cell_type="cell_type", batch="batch", n_genes=len(genes))


GENES = [f"G{i}" for i in range(1, 25)]
cut = st.tuples(st.integers(0, 8), st.integers(14, 24))


@few
@given(cut, cut, st.booleans(), st.booleans(), st.sampled_from(["inner", "outer"]))
def test_values_stand_under_their_gene_and_cell(one, two, dense_one, dense_two, join):
    """Whatever the genes, their order and the storage; the order of the datasets does not matter;
    nothing else is invented."""
    a = screen(GENES[slice(*one)], 0, None if dense_one else sparse.csr_matrix)
    b = screen(GENES[slice(*two)][::-1], 1, None if dense_two else sparse.csr_matrix)
    both = concat({"a": a, "b": b}, join=join)
    op = set.intersection if join == "inner" else set.union
    assert (
        set(both.var_names) == op(set(a.var_names), set(b.var_names))
        and both.n_obs == a.n_obs + b.n_obs
    )
    frame = both.to_df()
    for i, (n, c) in enumerate((("a", a), ("b", b))):
        own = frame[(both.obs.dataset == n).values]
        there = [g for g in c.var_names if g in frame]
        np.testing.assert_array_equal(own[there].values, c.to_df()[there].values)
        assert own.drop(columns=there).isna().all(axis=None) and list(own.index) == [
            f"{n}:{x}" for x in c.obs_names
        ]
        assert set(both.var_names[both.varm["measured"][:, i]]) == set(there)
    other = concat({"b": b, "a": a}, join=join)[both.obs_names, both.var_names]
    np.testing.assert_array_equal(dense(other.X), dense(both.X))


@few
@given(cut, st.integers(0, 99))
def test_effects_do_not_notice_the_company(two, seed):
    "Own controls, own batches, NaN where nothing was measured."
    a = screen(GENES, 0)
    b = screen(GENES[slice(*two)], seed, lines=("L", "M"))
    e = effects(concat({"a": a, "b": b}, join="outer"))
    alone = effects(b)
    own = e[e.obs.cell_type.str.startswith("b:").values]
    assert list(own.obs.cell_type) == [f"b:{c}" for c in alone.obs.cell_type] and list(
        own.obs.perturbation
    ) == list(alone.obs.perturbation)
    for layer in (None, "sem", "control"):
        x, y = (
            (t[:, b.var_names] for t in (own, alone))
            if layer is None
            else (own[:, b.var_names].layers[layer], alone[:, b.var_names].layers[layer])
        )
        np.testing.assert_allclose(
            x.X if layer is None else x, y.X if layer is None else y, atol=1e-5
        )
    assert np.isnan(own[:, [g for g in e.var_names if g not in set(b.var_names)]].X).all()


def test_names_of_two_screens_never_meet():
    "Same barcodes, same batches, same line, and still nothing is shared."
    both = concat([screen(GENES), screen(GENES, 1)])
    o = both.obs
    assert o.index.is_unique and set(o.dataset) == {"dataset0", "dataset1"} and set(o.line) == {"L"}
    for column in ("batch", "cell_type"):
        assert not set(o[column][o.dataset == "dataset0"]) & set(o[column][o.dataset == "dataset1"])
    check(both)
    with pytest.raises(BadCells, match="two datasets are called 'x'"):
        x = screen(GENES)
        y = screen(GENES, 1)
        x.obs["dataset"] = y.obs["dataset"] = "x"
        concat([x, y])


def spoiled(how):
    c = screen(GENES, 1)
    if how == "logged twice": c.X = np.log1p(dense(c.X))
    if how == "other total": c.X = np.log1p(np.expm1(dense(c.X)) / 2.5)
    if how == "scaled": c.X = dense(c.X) - dense(c.X).mean(0)
    if how == "smoothed": c.X = (dense(c.X) + dense(c.X)[::-1]) / 2
    if how == "not finite": X = dense(c.X).copy(); X[0, 0] = np.nan; c.X = X
    if how == "not prepared": del c.uns["biojepa"]
    return c


@pytest.mark.parametrize(
    "how, says",
    [
        ("logged twice", "its counts give .* changed after prepare"),
        ("other total", "its counts give .* changed after prepare"),
        ("scaled", "changed after prepare"),
        ("smoothed", "normalised differently"),
        ("not finite", "X holds nan"),
        ("not prepared", "were not prepared"),
    ],
)
def test_normalisations_are_never_mixed(how, says):
    with pytest.raises(BadCells, match=f"dataset 'bad'.*{says}"):
        concat({"good": screen(GENES), "bad": spoiled(how)})


def test_logged_cells_with_their_library_size_are_welcome():
    """An honest log1p file is told from another total by its whole counts; a file that kept part
    of the genes has ratio near 1."""
    rng = np.random.default_rng(0)
    X = rng.poisson(2, (40, 30)).astype(float)
    total = X.sum(1) + 300
    for share, fine in ((1.0, True), (0.9, True), (0.5, False)):
        obs = pd.DataFrame(
            dict(perturbation=[CONTROL] * 20 + ["G1"] * 20, size=total),
            index=[f"c{i}" for i in range(40)],
        )
        raw = AnnData(
            sparse.csr_matrix(np.log1p(X / (total * share)[:, None] * 1e4).astype(np.float32)),
            obs=obs,
            var=pd.DataFrame(index=[f"G{i}" for i in range(30)]),
        )
        if not fine:                               # refused as early as it can be
            with pytest.raises(BadCells, match="divided by 0.50 times column 'size'"):
                bj.prepare(raw, kind="log1p", total="size", n_genes=30)
            continue
        c = bj.prepare(raw, kind="log1p", total="size", n_genes=30)
        assert scale_of(c)[0] > 0.99 and abs(scale_of(c)[1] - share) < 0.02
        assert concat({"a": c, "b": c}).n_obs == 80


def test_gaps_are_refused_by_what_cannot_use_them():
    a = screen(GENES)
    b = screen(GENES[:12], 1)
    outer = concat({"a": a, "b": b}, join="outer")
    with pytest.raises(
        BadCells,
        match=(
            "X holds nan for cell 'b:c0', gene 'G13'; its dataset did not measure that "
            "gene: concat with join='inner'"
        ),
    ):
        check(outer)
    with pytest.raises(BadCells, match="did not measure"):
        bj.BioJEPA.fit(
            outer,
            Split("unseen_gene", 0, ("G1", "G2"), (), ("G3",), {"G3": "unseen_gene"}),
            network=False,
            progress=False,
        )
    check(concat({"a": a, "b": b}, join="outer", fill=0.0))
    check(concat({"a": a, "b": b}))
    broken = outer.copy()
    broken.X = broken.X.copy()
    broken.X[0, 0] = np.inf
    with pytest.raises(BadCells, match="X holds inf"): effects(broken)


def test_other_words_for_wrong_arguments():
    a = screen(GENES)
    with pytest.raises(BadCells, match="neither 'inner' nor 'outer'"):
        concat({"a": a, "b": a}, join="left")
    with pytest.raises(BadCells, match="a, b have no gene in common"):
        concat({"a": a, "b": screen([f"H{i}" for i in range(9)], names=("H1",))})
    with pytest.raises(BadCells, match="takes a list or a dict"): concat(a)


def test_one_split_hides_in_all():
    one = Split(
        "unseen_gene", 0, ("A", "B", "C"), ("D",), ("E",), {"D": "unseen_gene", "E": "unseen_gene"}
    )
    two = Split(
        "unseen_gene", 0, ("D", "F"), ("E",), ("B",), {"E": "unseen_gene", "B": "unseen_gene"}
    )
    s = joint_split({"x": one, "y": two})
    assert set(s.test) == {"B", "E"} and set(s.val) == {"D"} and set(s.train) == {"A", "C", "F"}
    with pytest.raises(Leak, match="'B' is held out as unseen_gene, but training holds 'B.C'"):
        joint_split(
            {"x": Split("unseen_gene", 0, ("A", "B+C"), (), ("E",), {"E": "unseen_gene"}), "y": two}
        )


@pytest.fixture(scope="module")
def joint():
    a = screen(GENES, 0, names=("G1", "G2", "G3", "G4"))
    b = screen(GENES[6:], 1, names=("G20", "G21", "G22", "G4"), lines=("L", "M"))
    b.obs["mode"] = np.where(b.obs.perturbation == CONTROL, CONTROL, "CRISPRa")
    s = joint_split(
        {
            "a": Split("unseen_gene", 0, ("G1", "G2", "G3"), (), ("G4",), {"G4": "unseen_gene"}),
            "b": Split(
                "unseen_gene",
                0,
                ("G20", "G21"),
                (),
                ("G22", "G4"),
                {"G22": "unseen_gene", "G4": "unseen_gene"},
            ),
        }
    )
    both = concat({"a": a, "b": b}, join="outer", fill=0.0)
    return a, b, s, both, bj.BioJEPA.fit(both, s, network=False, progress=False, device="cpu")


def test_inside_says_what_outside_says(joint):
    a, b, s, both, model = joint
    told = WithinDataset(model, "b", b).predict(b, ["G22", "G4"], "M")
    said = model.predict(both, ["G22", "G4"], "b:M", mode="CRISPRa")[:, b.var_names]
    np.testing.assert_allclose(told.layers["delta"], said.layers["delta"], atol=1e-6)
    np.testing.assert_allclose(told.layers["std"], said.layers["std"], atol=1e-6)
    assert list(told.obs.cell_type) == ["M", "M"] and list(told.var_names) == list(b.var_names)
    both_lines = WithinDataset(model, "b", b).predict(b, ["G22"])
    assert list(both_lines.obs_names) == ["G22@L", "G22@M"]


def test_inside_passes_the_mode_of_its_screen(joint, monkeypatch):
    "The joint model's commonest mode is no answer for a screen of the other mode."
    a, b, s, both, model = joint
    asked = []
    real = model.predict
    monkeypatch.setattr(
        model,
        "predict",
        lambda cells, names, cell_type, mode, dose: asked.append(mode)
        or real(cells, names, cell_type, mode, dose),
    )
    for n, c, mode in (("a", a, None), ("b", b, None), ("b", b, "CRISPRi")):
        WithinDataset(model, n, c).predict(c, ["G4"], "L", mode)
    assert asked == [{"G4": "CRISPRi"}, {"G4": "CRISPRa"}, "CRISPRi"]


def test_inside_knows_the_mode_of_each_target(joint, monkeypatch):
    """A screen of genes and a drug, mostly together:

    no target gets the modes of a pair, and a new one gets the commonest.
    """
    a, b, s, both, model = joint
    mixed = a.copy()
    asked = []
    real = model.predict
    mixed.obs["perturbation"] = mixed.obs.perturbation.replace(
        {"G2": "DRUG+G1", "G3": "DRUG+G1", "G4": "DRUG"}
    ).map(lambda n: "DRUG+G1" if "+" in n else n)
    mixed.obs["mode"] = mixed.obs.perturbation.map(
        {CONTROL: CONTROL, "G1": "CRISPRi", "DRUG": "drug", "DRUG+G1": "drug+CRISPRi"}
    )
    monkeypatch.setattr(
        model,
        "predict",
        lambda cells, names, cell_type, mode, dose: asked.append(mode)
        or real(cells, names, cell_type, mode, dose),
    )
    inside = WithinDataset(model, "a", mixed)
    for n in ("G1", "DRUG+G1", "DRUG", "G9"): inside.predict(mixed, n, "L")
    assert asked[:3] == [
        {"G1": "CRISPRi"},
        {"DRUG": "drug", "G1": "CRISPRi"},
        {"DRUG": "drug"},
    ] and asked[3]["G9"] in ("CRISPRi", "drug")


def test_the_scorecard_takes_it(joint):
    a, b, s, both, model = joint
    own = Split(
        "unseen_gene",
        0,
        ("G20", "G21"),
        (),
        ("G22", "G4"),
        {"G22": "unseen_gene", "G4": "unseen_gene"},
    )
    card = bj.scorecard(
        b,
        own,
        {"joint": WithinDataset(model, "b", b)},
        baselines=("mean",),
        metrics=["pearson_delta"],
    )
    assert set(card.table.model) >= {"joint", "mean"}
    leaky = Split("unseen_gene", 0, ("G21", "G22"), (), ("G20",), {"G20": "unseen_gene"})
    with pytest.raises(Leak, match="'G20' is to be judged"):
        bj.scorecard(
            b,
            leaky,
            {"joint": WithinDataset(model, "b", b)},
            baselines=(),
            metrics=["pearson_delta"],
        )


REAL = Path(os.environ.get("BIOJEPA_DATA", "nowhere")) / "data"


@pytest.mark.skipif(not REAL.exists(), reason="set BIOJEPA_DATA to the folder of the real extracts")
def test_norman_and_papalexi_train_one_model():
    screens = {
        "norman": bj.dataset(
            "norman", "PerturBench", paths=REAL / "norman19_mcfaline23/devel.h5ad"
        ),
        "papalexi": bj.dataset("papalexi", paths=REAL / "papalexi21/papalexi_thp1_299genes.h5ad"),
    }
    assert scale_of(screens["norman"])[0] > 0.99 and scale_of(screens["papalexi"]) == (1.0, 1.0)
    both = concat(screens, join="outer", fill=0.0)
    assert both.n_vars == 796 and sorted(both.var_names[both.varm["measured"].all(1)]) == [
        "FN1",
        "SIRPD",
        "SSTR2",
    ]
    split = joint_split({n: bj.split(c, "unseen_gene", seed=0) for n, c in screens.items()})
    model = bj.BioJEPA.fit(both, split, network=False, progress=False, device="cpu")
    for n, c in screens.items():
        own = [t for t in split.test if t in set(c.obs.perturbation)]
        p = WithinDataset(model, n, c).predict(c, own)
        assert p.shape == (len(own), c.n_vars) and np.isfinite(p.X).all() and p.X.std() > 0


def test_one_network_trains_on_two_screens(joint):
    a, b, split, both, _ = joint
    model = bj.BioJEPA.fit(
        both,
        split,
        closed_form=False,
        model=dict(width=16, layers=1, predictor_layers=1),
        pretraining=dict(steps=4, batch=8),
        training=dict(steps=6, sets=4, cells=2, validate_every=3),
        progress=False,
        device="cpu",
    )
    for n, c in (("a", a), ("b", b)):
        out = WithinDataset(model, n, c).predict(c, ["G4"], "L")
        assert np.isfinite(out.X).all() and out.X.any() and set(out.var_names) <= set(c.var_names)
