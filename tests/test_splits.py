"Laws of splits: what is held out stays out."
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

from biojepa.aliases import identical_rows, near_equal, stem
from biojepa.cells import CONTROL, parts
from biojepa.prepare import prepare
from biojepa.simulator import simulate
from biojepa.splits import PARTS, RULES, Leak, Split, check_split, folds, split
from tests.screens import few, refused, screen, screens

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*are not measured",
    "ignore:Observation names are not unique",
    "ignore:Variable names are not unique",
)


def made(raw, kind, seed):
    "A split, or a skip where the screen is too small for one."
    try: return split(prepare(raw), kind, seed, context="L0" if kind == "unseen_context" else None)
    except ValueError: assume(False)


def test_a_split_made_by_hand_holds_a_target_out_also_of_pairs():
    told = refused(lambda: check_split(Split("mine", 0, ("A+B", "C"), (), ("A",))), Leak)
    assert "'A'" in told and "A+B" in told
    check_split(Split("mine", 0, ("A", "B"), (), ("A+B",)))
    check_split(Split("mine", 0, ("A+B",), (), ("A",), test_contexts=("L1",)))


@few
@given(screens, st.sampled_from([*RULES, "unseen_context"]), st.integers(0, 1000))
def test_every_split_is_apart(raw, kind, seed):
    cells = prepare(raw)
    s = made(raw, kind, seed)
    masks = np.stack([s.mask(cells, p) for p in PARTS])
    control = (cells.obs.perturbation == CONTROL).to_numpy()
    assert masks.sum(0).max() == 1 and masks[0, control].all() and not masks[1:, control].any()
    taught = {g for n in s.train for g in parts(n)}
    for name, group in s.groups.items():
        if group == "unseen_context": continue
        assert name not in s.train
        if group in ("unseen_gene", "pair_seen0"): assert not taught & set(parts(name))
        else: assert len(taught & set(parts(name))) == int(group[-1])
    assert set(s.groups) == set(s.val) | set(s.test)
    assert Split.from_dict(json.loads(json.dumps(s.to_dict()))) == s == made(raw[::-1], kind, seed)
    s.check_features(sorted(taught))


@few
@given(screens, st.sampled_from(list(RULES)), st.integers(0, 1000), st.randoms())
def test_the_assertion_fires(raw, kind, seed, random):
    cells = prepare(raw)
    s = made(raw, kind, seed)
    name = random.choice(s.test)
    assert f"{name!r}" in refused(lambda: check_split(replace(s, train=s.train + (name,))), Leak)
    hidden = [n for n in s.test if s.groups[n] == "unseen_gene"]
    if hidden:
        gene = random.choice(hidden)
        assert f"{gene!r}" in refused(
            lambda: check_split(replace(s, train=s.train + (f"{gene}+ZZZ",))), Leak
        )
        assert f"{gene!r}" in refused(lambda: s.check_features([gene]), Leak)
    twin = cells.copy()
    held = s.mask(cells, "test")
    twin.obs_names = np.where(held, "twin", cells.obs_names)
    twin.obs_names = [f"x{i % 2}" if n == "twin" else n for i, n in enumerate(twin.obs_names)]
    check_split(s, cells)
    twin.obs_names = ["x0", *twin.obs_names[1:]]
    assert "'x0'" in refused(lambda: check_split(s, twin), Leak)


@few
@given(st.integers(0, 10**6), st.integers(8, 12), st.integers(0, 30))
def test_the_shares_of_gears(seed, singles, pairs):
    raw = screen(seed, singles, pairs)
    s = made(raw, "simulation", seed % 100)
    names = set(raw.obs.perturbation) - {CONTROL}
    genes = {g for n in names for g in parts(n)}
    assert set(s.train) | set(s.val) | set(s.test) == names
    kept = {g for n in s.train + s.val for g in parts(n)}
    assert len(kept) <= int(0.75 * len(genes))
    untested = [n for n in s.train + s.val if "+" in n]
    seen = set(
        np.random.RandomState(seed % 100).choice(
            sorted(genes), int(0.75 * len(genes)), replace=False
        )
    )
    assert kept <= seen and len(untested) == int(
        0.75 * sum("+" in n and set(parts(n)) <= seen for n in names)
    )


@few
@given(
    st.integers(0, 10**6),
    st.integers(6, 10),
    st.integers(10, 30),
    st.sampled_from(["simulation", "unseen_gene"]),
)
def test_validation_has_a_single_to_choose_by(seed, singles, pairs, kind):
    s = made(screen(seed, singles, pairs, cells=2), kind, seed % 100)
    if sum("+" not in n for n in s.train + s.val) >= 5: assert any("+" not in n for n in s.val)


@few
@given(screens, st.integers(2, 3), st.integers(0, 100))
def test_folds_judge_every_single_once(raw, k, seed):
    try: out = folds(prepare(raw), k, seed)
    except ValueError: assume(False)
    tested = [n for s in out for n in s.test if "+" not in n]
    assert sorted(tested) == sorted(
        n for n in set(raw.obs.perturbation) if "+" not in n and n != CONTROL
    )


@pytest.mark.parametrize("kind", ["unseen_gene", "simulation", "unseen_pair", "unseen_context"])
def test_validation_can_be_left_out_and_shares_are_shares(kind):
    cells = prepare(
        simulate(
            n_genes=60,
            n_perturbations=24,
            n_doubles=16,
            cells_per_perturbation=2,
            cell_types=3,
            seed=0,
        ),
        n_genes=60,
    )
    more = dict(context="LINE1") if kind == "unseen_context" else {}
    bare = split(cells, kind, seed=0, val=0, **more)
    assert bare.val == () and not bare.val_contexts and bare.train and bare.test
    full = split(cells, kind, seed=0, **more)
    assert full.val or full.val_contexts
    for wrong in (dict(val=1.5), dict(val=-0.1), dict(test=0), dict(test=1)):
        with pytest.raises(ValueError, match="not a share"):
            split(cells, kind, seed=0, **more, **wrong)


# one target under several names

@pytest.mark.parametrize(
    "one, two, what",
    [
        ("Trametinib@1uM", "Trametinib@10uM", "dose"),
        ("drugx_0.1", "Drugx", "dose"),
        ("[('Erlotinib', 0.05, 'uM')]", "[('Erlotinib', 5.0, 'uM')]", "dose"),
        ("GATA1-B", "GATA1-D", "guide"),
        ("GATA1_sg1", "GATA1_sg2", "guide"),
        ("sgTP53", "TP53", "guide"),
        ("MYC_ACGTACGTACGTACGTACGT", "MYC_TTTTACGTACGTACGTACGT", "guide"),
        ("GENE61_1", "GENE61_2", "number"),
        ("GENE61", "GENE61_2", "number"),
        ("non-targeting_00001", "non-targeting_00002", "number"),
        ("ENSG00000102145.15", "ENSG00000102145", "version"),
        ("Gata1", "GATA1", "spelling"),
        ("IFN-gamma", "IFN gamma", "spelling"),
    ],
)
def test_two_names_of_one_target(one, two, what):
    assert near_equal([one, "KLF1"], [two, "SPI1"]) == [(one, two, what)]
    s = Split("by hand", 0, (one, "KLF1"), (), (two,), {two: "unseen_gene"})
    with pytest.warns(UserWarning) as given: check_split(s)
    text = str(given[0].message)
    assert repr(one) in text and repr(two) in text and what in text and "parse_labels" in text


@pytest.mark.parametrize(
    "names",
    [
        ["GENE7", "GENE77", "GENE777"],
        ["HOXA1", "HOXA2", "HOXA11", "HLA-A", "HLA-B", "HLA-DRA", "NKX2-1", "NKX2-5", "MT-ND1"],
        ["IGHV3-23", "IGHV3-33", "TRAV12-1", "TRAV1-21", "C4B", "C4B_2", "MT-TP", "MTTP"],
        ["PF-562271", "PF-573228", "SB-431542", "Latrunculin A", "Latrunculin B", "(+)-JQ1"],
        ["BRD-K12345678", "BRD-K12345679", "compound_1", "compound_2", "drug 1", "drug 2"],
        ["C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O", "C=C", "CC"],
        [f"XYZ_{i}" for i in range(30)],
    ],
)
def test_other_targets_are_left_alone(names):
    assert not near_equal(names[::2], names[1::2]) and not near_equal(names, names)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_numbers_of_the_simulator_are_names(a, b):
    assert stem(f"GENE{a}") == stem(f"GENE{b}") if a == b else stem(f"GENE{a}") != stem(f"GENE{b}")


def quiet(f):
    "What f returns; a warning fails."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return f()


@few
@given(screens, st.sampled_from([*RULES, "unseen_context"]), st.integers(0, 100))
def test_no_false_alarm(raw, kind, seed):
    s, cells = made(raw, kind, seed), prepare(raw)
    quiet(lambda: check_split(s, cells))


def test_copies_of_training_cells():
    cells = prepare(simulate(60, 10, 6, n_controls=12, seed=0), n_genes=60)
    s = quiet(lambda: split(cells, seed=0))
    X = cells.X.toarray()
    train, test = (np.flatnonzero(s.mask(cells, p)) for p in ("train", "test"))
    source = next(i for i in train if cells.obs.perturbation.iloc[i] != CONTROL)
    X[test[0]] = X[source]
    for form in (np.asarray, type(cells.X)):
        copied = cells.copy()
        copied.X = form(X)
        with pytest.warns(UserWarning) as given: check_split(s, copied)
        text = str(given[0].message)
        assert repr(cells.obs_names[source]) in text and repr(cells.obs_names[test[0]]) in text
    side = np.where(np.arange(len(X)) == test[0], 1, 0)
    assert identical_rows(X, side) == [(source, test[0])]


# few perturbations, several contexts

def one_treatment(lines):
    "A single treatment in these cell types."
    cells = prepare(simulate(40, 3, 6, n_controls=12, cell_types=len(lines), seed=0), n_genes=40)
    name = sorted(set(cells.obs.perturbation) - {CONTROL})[0]
    cells = cells[cells.obs.perturbation.isin([CONTROL, name])].copy()
    number = cells.obs.cell_type.astype(str).str.removeprefix("LINE").astype(int)
    cells.obs["cell_type"] = number.map(dict(enumerate(lines)))
    return cells, name


@pytest.mark.parametrize("lines", [("A", "B"), ("A", "B", "C"), ("A", "B", "C", "D")])
def test_one_treatment_in_several_contexts(lines):
    cells, name = one_treatment(lines)
    s = quiet(lambda: split(cells, "unseen_context", context=lines[-1]))
    assert s.train == s.test == (name,) and s.test_contexts == lines[-1:]
    assert s.val == ((name,) if len(lines) > 2 else ()) and len(s.val_contexts) == (len(lines) > 2)
    train = s.cells(cells, "train").obs
    assert lines[-1] not in set(train.cell_type[train.perturbation != CONTROL])
    assert set(s.cells(cells, "test").obs.cell_type) == {lines[-1]}
    assert Split.from_dict(json.loads(json.dumps(s.to_dict()))) == s
    for kind in RULES:
        said = refused(lambda: split(cells, kind), ValueError)
        assert "kind='unseen_context'" in said and "kind='elsewhere'" in said
    assert "kind='unseen_context'" in refused(lambda: folds(cells, 2), ValueError)


def test_train_on_everything_and_test_elsewhere():
    cells, name = one_treatment(("A", "B"))
    s = split(cells, "elsewhere", context=["C", "D"])
    assert s.train == s.test == (name,) and s.val == () and s.groups == {name: "unseen_context"}
    assert s.mask(cells, "train").all() and not s.mask(cells, "test").any()
    others = cells.copy()
    others.obs["cell_type"] = others.obs.cell_type.map({"A": "C", "B": "D"})
    others.obs_names = "other " + others.obs_names
    treated = (others.obs.perturbation != CONTROL).to_numpy()
    assert (s.mask(others, "test") == treated).all() and not (s.mask(others, "train") & treated).any()
    check_split(s, others)
    assert Split.from_dict(json.loads(json.dumps(s.to_dict()))) == s
    assert split(cells, "elsewhere").test == () == split(cells, "elsewhere").test_contexts
    assert "'B' is among these cells" in refused(
        lambda: split(cells, "elsewhere", context="B"), ValueError
    )
    with_val = split(cells, "elsewhere", context="C", val=0.1)
    assert with_val.val_contexts and set(with_val.val) <= set(with_val.train)
    check_split(with_val, cells)


def test_contexts_held_out_twice_are_a_leak():
    s = Split("unseen_context", 0, ("A",), ("A",), ("A",), {}, ("L1", "L2"), ("L2",))
    assert "'L2' is held out for val and for test" in refused(lambda: check_split(s), Leak)
    alone = one_treatment(("A",))[0]
    assert "kind='elsewhere'" in refused(
        lambda: split(alone, "unseen_context", context="A"), ValueError
    )
