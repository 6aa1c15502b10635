"Laws of the sampler of sets."
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from biojepa.cells import CONTROL, dense
from biojepa.prepare import prepare
from biojepa.sets import SetSampler, visit
from biojepa.splits import split
from tests.screens import few, screen, screens, seeds

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*are not measured",
    "ignore:Observation names are not unique",
    "ignore:Variable names are not unique",
)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 12), seeds)
def test_visits_do_not_depend_on_the_step_size(n, a, b, seed):
    long = [
        np.concatenate([visit(n, s, size, seed) for s in range(a * b // size)]) for size in (a, b)
    ]
    np.testing.assert_array_equal(*long)
    whole = long[0][:len(long[0]) // n * n].reshape(-1, n)
    assert (np.sort(whole) == np.arange(n)).all()


@few
@given(screens, st.integers(1, 6), st.integers(0, 1000), st.integers(1, 9), seeds)
def test_a_step_is_a_pure_function(raw, m, step, size, seed):
    cells = prepare(raw)
    used = SetSampler(cells, m, seed)
    fresh = SetSampler(cells, m, seed)
    for s in range(3): used.batch(s, size)
    a = used.batch(step, size)
    b = fresh.batch(step, size)
    assert all(torch.equal(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    assert (
        a.treated.shape == a.control.shape == (size, m, cells.n_vars)
        and a.group.dtype == torch.int64
    )
    assert all(
        torch.equal(x, y) for x, y in zip(used.cell_batch(step, size), fresh.cell_batch(step, size))
    )


@few
@given(screens, st.integers(1, 6), st.integers(0, 1000), seeds)
def test_sets_match(raw, m, step, seed):
    cells = prepare(raw)
    sampler = SetSampler(cells, m, seed)
    group, treated, control = sampler.rows(step, 7)
    obs = {k: cells.obs[k].to_numpy(str) for k in ("perturbation", "cell_type", "batch")}
    assert (obs["perturbation"][control] == CONTROL).all()
    assert (obs["batch"][treated] == obs["batch"][control]).all() and (
        obs["cell_type"][treated] == obs["cell_type"][control]
    ).all()
    for key in ("perturbation", "cell_type"):
        assert (obs[key][treated] == sampler.groups[key].to_numpy(str)[group][:, None]).all()
    size = sampler.groups.n_cells.to_numpy()[group]
    distinct = np.array([len(set(t)) for t in treated])
    assert (distinct == np.minimum(size, m)).all()
    batch = sampler.batch(step, 7)
    np.testing.assert_array_equal(batch.treated.numpy(), dense(cells.X)[treated])
    np.testing.assert_array_equal(
        batch.control_total.numpy(), cells.obs.log_total.to_numpy()[control]
    )


def test_training_draws_nothing_held_out():
    cells = prepare(screen(3, singles=8, pairs=6))
    s = split(cells, seed=0)
    assert set(SetSampler(s.cells(cells, "train")).groups.perturbation) == set(s.train)


def test_controls_of_a_set_are_of_the_same_time():
    cells = prepare(screen(1, cells=8))
    hours = np.where(np.arange(len(cells)) % 4 < 2, 6.0, 48.0)
    cells.obs["time"] = hours
    group, treated, control = SetSampler(cells, 4, 0).rows(0, 12)
    assert (hours[treated] == hours[control]).all()
    batch = cells.obs.batch.to_numpy(str)
    assert (batch[treated] == batch[control]).all()
