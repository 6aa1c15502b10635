"Laws of the exported actions and feature tables, for actions and tables drawn at random."
import copy
import math
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from biojepa.cells import MODES
from biojepa.featurizers import (
    BadFeatures,
    FeatureTable,
    MissingFeatures,
    as_table,
    encode_actions,
    whitening,
)
from biojepa.perturbations import Action, BadAction, Part, actions_of

few = settings(max_examples=40, deadline=None)
GENES = [f"GENE{i}" for i in range(12)]
names = st.sampled_from(GENES)
one_part = st.builds(
    Part,
    names,
    st.sampled_from(MODES[1:]),
    st.floats(0, 100),
    st.just(math.nan) | st.floats(0, 100),
)
part_lists = st.lists(one_part, max_size=4, unique_by=lambda p: p.target)


def frame(rows, columns=5, seed=0):
    return pd.DataFrame(np.random.default_rng(seed).normal(size=(len(rows), columns)), index=rows)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.__dict__.values(), b.__dict__.values()))


def refused(f, error=BadFeatures):
    with pytest.raises(error) as e: f()
    return str(e.value)


# actions

@pytest.mark.parametrize("text", ["nan", "NA", "None", "<NA>", "n/a", " NULL "])
def test_a_missing_name_is_no_target(text):
    for make in (Part, Action.parse, lambda n: Action.parse("GENE1+" + n)):
        assert "missing name" in refused(lambda: make(text), BadAction)
    assert Action.parse("NANOG").targets == ("NANOG",)


def test_an_amount_is_no_target():
    for label in ("GENE1+10uM", "JQ1+24h"):
        assert "no target" in refused(lambda: Action.parse(label, "drug"), BadAction)
    assert Action.parse("5-FU+GENE1", "drug").targets == ("5-FU", "GENE1")


@pytest.mark.parametrize("what", ["dose", "time"])
def test_numbers_are_those_that_people_write(what):
    for bad in (True, np.True_, "0_5", "1,5", "10uM", "inf", "", None, [1, 2]):
        message = refused(lambda: Part("GENE1", **{what: bad}), BadAction)
        assert "'GENE1'" in message and what in message and repr(bad) in message
    for good, value in (("0.5", 0.5), (" 1e-3 ", 0.001), (np.float32(2), 2.0), (np.int64(3), 3.0)):
        assert getattr(Part("GENE1", **{what: good}), what) == value
    table = pd.DataFrame({"perturbation": ["GENE1"], what: ["0_5"]})
    assert "'0_5'" in refused(lambda: actions_of(table), BadAction)


@few
@given(st.lists(st.sampled_from(["(+)-JQ1", "(+/-)-X", "A_+_6", "2i (LIF+MEKi)", "GENE1"]), min_size=1,
                unique=True))
def test_a_plus_that_joins_nothing_is_no_joint(labels):
    "As people write it or as `prepare` does: one action, with as many parts as labels."
    from biojepa.labels import cut, join_parts, parts
    if "A_+_6" in labels: labels = ["A_+_6"]  # no target ends or begins with a mark: it stands alone
    name = "+".join(labels)
    action = Action.parse(name, "drug")
    assert len(action) == len(labels) and action == Action.parse(join_parts(cut(name)), "drug")
    assert parts(name) == action.targets and parts(action.name) == action.targets


@few
@given(part_lists, st.randoms())
def test_order_of_parts_is_forgotten(parts, random):
    mixed = random.sample(parts, len(parts))
    a = Action(tuple(parts))
    b = Action(tuple(mixed))
    assert a == b and hash(a) == hash(b) and a.name == b.name and str(a) == str(b)


@few
@given(part_lists)
def test_an_action_is_the_sum_of_its_singles(parts):
    action = Action(tuple(parts))
    assert (
        sum(action.singles, Action()) == action
        and action + Action() == action
        and len(action) == len(parts)
    )


@few
@given(part_lists)
def test_copies_are_equal(parts):
    action = Action(tuple(parts))
    for other in (pickle.loads(pickle.dumps(action)), copy.deepcopy(action)):
        assert other == action and hash(other) == hash(action)


@few
@given(one_part, one_part)
def test_parts_are_ordered_totally(a, b): assert (a < b) + (b < a) + (a == b) == 1


@few
@given(
    st.lists(names, min_size=1, max_size=4, unique=True),
    st.sampled_from(MODES[1:]),
    st.floats(0, 10),
    st.floats(0, 99),
)
def test_a_table_gives_the_action_that_was_written(targets, mode, dose, time):
    row = pd.DataFrame(
        dict(
            perturbation=["+".join(targets), "control"],
            mode=[mode, "control"],
            dose=[dose, 0],
            time=[time, math.nan],
        )
    )
    assert actions_of(row) == [Action.parse("+".join(sorted(targets)), mode, dose, time), Action()]


@pytest.mark.parametrize("label", ["", "A+", "+", "A++B", "A+A", "A+control", None, 3, math.nan])
def test_labels_that_mean_nothing(label): refused(lambda: Action.parse(label), BadAction)


@pytest.mark.parametrize(
    "bad",
    [
        dict(mode="control"),
        dict(mode="crispri"),
        dict(dose=-1),
        dict(dose=math.inf),
        dict(time=-1),
        dict(time=math.inf),
    ],
)
def test_parts_that_cannot_be(bad):
    assert "'A'" in refused(lambda: Part("A", **bad), BadAction)


def test_lists_must_fit_the_label():
    assert "3 values" in refused(lambda: Action.parse("A+B", mode=["drug"] * 3), BadAction)


# tables

@few
@given(
    st.integers(0, 1000), st.integers(3, 16), st.integers(1, 384), st.sampled_from([0.0, 1.0, 10.0])
)
def test_whitening_is_finite_small_and_centred(seed, n, d, shrink):
    x = np.random.default_rng(seed).normal(size=(n, d)) + 100
    centre, to_white = whitening(x, shrink=shrink)
    z = (x - centre) @ to_white
    assert to_white.shape[1] <= min(n - 1, d, 64) and np.isfinite(z).all()
    assert np.isclose((z**2).mean(), 1) and np.allclose(z.mean(0), 0, atol=1e-6)


@few
@given(st.integers(0, 1000))
def test_whitening_forgets_shift_and_unit(seed):
    x = np.random.default_rng(seed).normal(size=(20, 6))
    z, other = ((y - whitening(y)[0]) @ whitening(y)[1] for y in (x, 1000 * x + 7))
    np.testing.assert_allclose(z, other, atol=1e-6)


@few
@given(st.sets(names, min_size=3, max_size=11), st.integers(0, 1000))
def test_what_is_held_out_cannot_leak(train, seed):
    given_ = frame(GENES)
    other = frame(GENES)
    held_out = [g for g in GENES if g not in train]
    other.loc[held_out] = 100 * np.random.default_rng(seed).normal(size=(len(held_out), 5))
    a, b = (FeatureTable.from_frame(f).fit(sorted(train)) for f in (given_, other))
    assert a.fitted_on == tuple(sorted(train))
    np.testing.assert_array_equal(a.transform(sorted(train))[0], b.transform(sorted(train))[0])


@few
@given(st.sets(names, min_size=3), st.lists(names | st.just("unknown"), min_size=1, max_size=8))
def test_a_gap_changes_nothing_else(knows, targets):
    full = FeatureTable({"a": frame(GENES), "b": frame(GENES, 3, 1)})
    gap = FeatureTable({"a": frame(GENES), "b": frame(GENES, 3, 1).loc[sorted(knows)]})
    (x, present) = full.transform(targets)
    (y, seen) = gap.transform(targets)
    np.testing.assert_array_equal(x[:, :5], y[:, :5])
    np.testing.assert_array_equal(seen[:, 1], [t in knows for t in targets])
    np.testing.assert_array_equal(y[:, 5:], np.where(seen[:, 1:], x[:, 5:], 0))
    assert gap.missing(targets) == [t for t in targets if t == "unknown"]


def test_order_of_sources_orders_columns_only():
    a = {"a": frame(GENES)}
    b = {"b": frame(GENES[:7], 3, 1)}
    x, y = (FeatureTable(s).fit(GENES[:6]).transform(GENES)[0] for s in (a | b, b | a))
    np.testing.assert_array_equal(x, np.hstack([y[:, 3:], y[:, :3]]))


def test_order_of_training_names_does_not_matter():
    table = FeatureTable.from_frame(frame(GENES))
    x, y = (
        table.fit(names).transform(GENES)[0]
        for names in (["GENE3+GENE1", "GENE5", "control"], ["GENE5", "GENE1", "GENE3"])
    )
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("fitted", [True, False])
def test_state_survives_a_file(tmp_path, fitted):
    table = FeatureTable({"a": frame(GENES), "b": frame(GENES[:7], 3, 1)})
    if fitted: table = table.fit(GENES[:6])
    np.savez(tmp_path / "t.npz", **table.state())
    with np.load(tmp_path / "t.npz", allow_pickle=False) as z: back = FeatureTable.from_state(z)
    assert (
        back.fitted_on == table.fitted_on and back.dims == table.dims and repr(back) == repr(table)
    )
    for x, y in zip(back.transform(GENES), table.transform(GENES)):
        np.testing.assert_array_equal(x, y)
    if fitted:
        np.testing.assert_array_equal(
            back.extend({"a": frame(["X"])}).transform(["X"])[0],
            table.extend({"a": frame(["X"])}).transform(["X"])[0],
        )


@pytest.mark.parametrize(
    "break_it, said",
    [
        (lambda f: f.iloc[[0, 1, 0]], "'GENE0' stands twice"),
        (lambda f: f.iloc[:0], "empty"),
        (lambda f: f.iloc[:, :0], "empty"),
        (lambda f: f.assign(x="text"), "column 'x' is not numeric"),
        (lambda f: f.assign(x=np.nan), "symbol 'GENE0', column 'x' is nan"),
        (lambda f: f.assign(x=np.inf), "column 'x' is inf"),
        (lambda f: f.to_numpy(), "DataFrame is needed"),
        (
            lambda f: f.assign(x=pd.array([1, None] + [1] * 10, "Int64")),
            "symbol 'GENE1', column 'x' is nan",
        ),
    ],
)
def test_bad_tables_are_named(break_it, said):
    message = refused(lambda: FeatureTable({"go": break_it(frame(GENES))}))
    assert "'go'" in message and said in message


def test_bad_files_are_named(tmp_path):
    (tmp_path / "features.xlsx").touch()
    assert "features.xlsx" in refused(lambda: as_table(tmp_path / "features.xlsx"))
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    assert "x.npz" in refused(lambda: as_table(tmp_path / "x.npz"))
    (tmp_path / "empty").mkdir()
    assert "no .npz" in refused(lambda: as_table(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError): as_table(tmp_path / "nothing.csv")
    with pytest.raises(FileNotFoundError, match="nothing.xlsx"): as_table(tmp_path / "nothing.xlsx")
    assert "at least one" in refused(lambda: as_table({}))


def test_constant_features_are_refused():
    assert "same features" in refused(
        lambda: as_table(pd.DataFrame(np.ones((5, 3)), index=list("ABCDE"))).fit("ABCDE")
    )


def test_numbers_as_symbols_and_one_column():
    table = as_table(pd.DataFrame({"x": [1, 2, 4, 8]}, index=[1, 2, 3, 4])).fit(["1", "2", "3"])
    assert table.dims == {"features": 1} and np.isfinite(table.transform(["4"])[0]).all()


# batches

TABLE = FeatureTable({"a": frame(GENES[:9]), "b": frame(GENES[4:], 3, 1)}).fit(GENES[:8])
batches = st.lists(part_lists.map(lambda p: Action(tuple(p))), min_size=1, max_size=5)


@few
@given(batches)
def test_each_action_is_encoded_as_if_alone(actions):
    batch = encode_actions(actions, GENES[:6], TABLE)
    for i, action in enumerate(actions):
        alone = encode_actions([action], GENES[:6], TABLE)
        n = len(action)
        for x, y in zip(alone.__dict__.values(), batch[i].__dict__.values()):
            assert torch.equal(x[:, :n], y[:, :n])
        assert batch.mask[i].tolist() == [True] * n + [False] * (batch.mask.shape[1] - n)


@few
@given(batches)
def test_padding_and_gaps_are_zero_and_say_so(actions):
    batch = encode_actions(actions, GENES[:6], TABLE)
    empty = ~batch.mask
    assert (
        not batch.features[empty].any()
        and not batch.present[empty].any()
        and not batch.dose[empty].any()
        and (batch.target[empty] == -1).all()
    )
    for s, x in enumerate(batch.features.split(list(TABLE.dims.values()), -1)):
        assert not x[~batch.present[..., s]].any()
    assert torch.isfinite(batch.time).all() and (batch.mode[batch.mask] > 0).all()


@few
@given(batches, st.permutations(GENES))
def test_targets_follow_the_genes(actions, genes):
    a = encode_actions(actions, GENES)
    b = encode_actions(actions, genes)
    assert all(GENES[i] == genes[j] for i, j in zip(a.target[a.mask], b.target[b.mask]))


@few
@given(batches, st.data())
def test_indexing_and_encoding_commute(actions, data):
    rows = data.draw(st.lists(st.integers(0, len(actions) - 1), min_size=1, max_size=4))
    batch = encode_actions(actions, GENES, TABLE)[rows]
    longest = max(1, *(len(actions[i]) for i in rows)) if rows else 1
    again = encode_actions([actions[i] for i in rows], GENES, TABLE)
    for x, y in zip(batch.__dict__.values(), again.__dict__.values()):
        assert torch.equal(x[:, :longest], y)
    assert len(batch[0]) == 1 and len(batch[:1]) == 1 and equal(batch.to("cpu"), batch)


def test_unknown_targets_are_named_once():
    with pytest.warns(MissingFeatures, match="no feature source knows NOBODY$"):
        batch = encode_actions([Action.parse("NOBODY+GENE1"), Action.parse("NOBODY")], GENES, TABLE)
    assert not batch.present[1].any() and batch.mask[1, 0]


def test_no_table_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = encode_actions([Action(), Action.parse("NOBODY")], GENES)
    assert (
        batch.features.shape == (2, 1, 0)
        and batch.target.tolist() == [[-1], [-1]]
        and len(encode_actions([], GENES, TABLE)) == 0
    )


def test_labels_are_not_actions():
    with pytest.raises(TypeError, match="not an Action"): encode_actions(["A+B"], GENES)


@few
@given(
    st.lists(st.sampled_from(MODES[1:]), min_size=1, max_size=4),
    st.floats(0, 1),
    st.floats(0.1, 10),
)
def test_efficiency_weakens_guides_and_no_drug(modes, efficiency, dose):
    "Each part of an action, whatever is done beside it; what nobody measured changes nothing."
    name = "+".join("ABCD"[:len(modes)])
    rows = pd.DataFrame(
        dict(perturbation=name, mode="+".join(modes), dose=dose, efficiency=[efficiency, math.nan])
    )
    weak, whole = actions_of(rows)
    for m, p, q in zip(modes, weak.parts, whole.parts):
        assert (
            p.mode == m
            and q.dose == dose
            and math.isclose(p.dose, dose if m in ("drug", "cytokine") else dose * efficiency)
        )


@pytest.mark.parametrize(
    "bad",
    [
        dict(dose="high"),
        dict(dose=[[1, 2]]),
        dict(dose=[{}]),
        dict(time="noon"),
        dict(dose=[1, 2]),
        dict(mode="drug+CRISPRi"),
    ],
)
def test_what_is_no_number_is_named(bad):
    assert "'A'" in refused(lambda: Action.parse("A", **bad), BadAction)
