"Laws of splits: what is held out stays out."
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

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
