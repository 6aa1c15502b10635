"Steps need times and start where the last one ended; the figures show what the plan says."
import numpy as np
import pytest

import biojepa as bj
from biojepa.goals import BadGoal
from biojepa.plan_figures import landscape, plot_landscape, plot_trajectory, trajectory
from biojepa.plan_steps import plan_steps


@pytest.fixture(scope="module")
def fitted():
    cells = bj.prepare(bj.simulate(n_genes=40, n_perturbations=24, n_doubles=8, cells_per_perturbation=30, seed=2), n_genes=40)
    split = bj.split(cells, "simulation", seed=0)
    features = bj.simulated_features(cells)
    return cells, split, bj.BioJEPA.fit(cells, split, features=features, network=False, progress=False)


def test_steps(fitted):
    cells, split, model = fitted
    names = [n for n in split.train if "+" not in n]
    wanted = bj.effects(cells).to_df().loc[names[:2]].sum()
    with pytest.raises(BadGoal, match="two times"): plan_steps(model, cells, wanted, candidates=names)
    timed = cells.copy()
    timed.obs["time"] = np.where(np.arange(cells.n_obs) % 2, 24.0, 48.0)
    one, two = (plan_steps(model, timed, wanted, candidates=names, steps=k).table for k in (1, 2))
    assert two.gap_closed[0] >= one.gap_closed[0]
    best = one.perturbation[0]
    without = plan_steps(model, timed, wanted, candidates=names, forbidden=[best]).table
    assert not any(best in row.split(", ") for row in without.perturbation)
    spoiled = wanted.copy()
    first = two.perturbation[0].split(", ")[0]
    spoiled[first] = 9.0                                  # the first step's own gene does not count after the second
    again = plan_steps(model, timed, spoiled, candidates=two.perturbation[0].split(", ")).table
    assert np.isclose(again.set_index("perturbation").gap_closed[two.perturbation[0]], two.gap_closed[0], atol=1e-6)
    np.testing.assert_allclose(one.gap_closed, bj.plan(model, cells, wanted, candidates=names).table.gap_closed, atol=1e-5)


def test_figures(fitted):
    cells, split, model = fitted
    name = next(n for n in split.train if "+" in n)
    goal = (cells.obs.perturbation == name).to_numpy()
    answer = bj.plan(model, cells, goal, candidates=[name])
    assert np.isclose(answer.by_gene().share.sum(), answer.table.gap_closed[0], atol=1e-5)
    answer.plot_genes()
    field = landscape(model, cells, goal, *name.split("+"), "LINE0", n=3)
    assert np.isclose(field.iloc[-1, -1], answer.table.gap_closed[0], atol=1e-5) and abs(field.iloc[0, 0]) < 1e-6
    plot_landscape(field)
    path = trajectory(model, cells, name, (cells.obs.perturbation == "control").to_numpy(), goal, "LINE0", n=3)
    assert (path.kind == "way").sum() == 3
    plot_trajectory(path)
