"What the five uses share: how they are asked, and what they refuse."
import numpy as np
import pandas as pd
import pytest

import biojepa as bj


@pytest.fixture(scope="module")
def screen():
    raw = bj.simulate(n_genes=60, n_perturbations=20, n_doubles=8, cell_types=2, cells_per_perturbation=20, seed=3)
    cells = bj.prepare(raw, n_genes=60)
    fold = bj.split(cells, "unseen_gene", seed=0)
    return cells, bj.BioJEPA.fit(cells, fold, features=bj.simulated_features(cells), progress=False)


GOAL = pd.Series({"GENE1": 1.0, "GENE2": -1.0})
SETS = {"A": ["GENE1", "GENE2"], "B": ["GENE3", "GENE4"]}
USES = dict(
    plan=lambda m, c, **how: bj.plan(m, c, GOAL, **how),
    combine=lambda m, c, **how: bj.combine(m, c, ["GENE1", "GENE2"], **how),
    pathway_edges=lambda m, c, **how: bj.pathway_edges(m, c, SETS, **how),
    needed_genes=lambda m, c, **how: bj.needed_genes(m, c, ["GENE1", "GENE2", "GENE5"], **how),
)


@pytest.mark.parametrize("use", USES)
def test_of_several_cell_types_none_is_taken_in_silence(screen, use):
    cells, model = screen
    with pytest.raises(ValueError, match="LINE0, LINE1"): USES[use](model, cells)


@pytest.mark.parametrize("alpha", [0, 1, 3, -0.1, "0.1"])
@pytest.mark.parametrize("use", [*USES, "safety"])
def test_an_error_rate_is_between_0_and_1(screen, use, alpha):
    cells, model = screen
    def ask():
        if use == "safety": return bj.safety(model, cells, ["GENE1"], alpha=alpha)
        return USES[use](model, cells, cell_type="LINE0", alpha=alpha)
    with pytest.raises(ValueError, match="no rate"): ask()


@pytest.mark.parametrize("use", USES)
def test_other_cell_types_do_not_count(screen, use):
    cells, model = screen
    one = USES[use](model, cells[(cells.obs.cell_type == "LINE0").to_numpy()].copy())
    pd.testing.assert_frame_equal(one.table, USES[use](model, cells, cell_type="LINE0").table)


def test_the_way_to_a_state_begins_in_its_own_cell_type(screen):
    cells, model = screen
    def plan(cells):
        goal = ((cells.obs.perturbation == model.split.train[0]) & (cells.obs.cell_type == "LINE0")).to_numpy()
        return bj.plan(model, cells, goal, cell_type="LINE0").table
    pd.testing.assert_frame_equal(plan(cells), plan(cells[(cells.obs.cell_type == "LINE0").to_numpy()].copy()))


def test_one_name_is_a_list_of_one(screen):
    cells, model = screen
    assert set(bj.safety(model, cells, "GENE1").table.perturbation) == {"GENE1"}
    pair = bj.combine(model, cells, "GENE1+GENE2", cell_type="LINE0")
    assert pair.table.perturbation.tolist() == ["GENE1+GENE2"]
    with pytest.raises(ValueError, match="n_actions=0"):
        bj.plan(model, cells, GOAL, cell_type="LINE0", n_actions=0)


@pytest.mark.parametrize("use", USES)
def test_every_answer_has_one_shape(screen, use, tmp_path):
    cells, model = screen
    answer = USES[use](model, cells, cell_type="LINE0")
    assert isinstance(answer.table, pd.DataFrame) and answer.abstains == bool(answer.reason)
    assert not answer.abstains or answer.reason in repr(answer)
    page = answer.to_html(tmp_path / "page.html").read_text()
    assert "<svg" in page and np.all([str(x) in page for x in answer.table.iloc[:3, 0]])
