"Arrows between gene sets: planted wires are found with their sign, worlds without wires have none, shared genes do not count."
import numpy as np
import pandas as pd
import pytest

import biojepa as bj
from biojepa.effects import control_means
from biojepa.arrows import Edges, edge_table, random_set_p
from biojepa.gene_sets import BadGeneSets
from biojepa.network import Recipe
from biojepa.pathway_edges import membership, set_scores, specific
from biojepa.simulator import network_of

WIRES = ((0, 1, 1), (0, 2, 1), (3, 4, -1), (4, 5, 1), (6, 5, -1), (2, 7, 1), (6, 3, 1))


def world(seed, recipe, n=100):
    raw = bj.simulate(n_genes=n, n_perturbations=n // 2, cells_per_perturbation=25, recipe=recipe, seed=seed)
    cells = bj.prepare(raw, n_genes=n)
    fold = bj.split(cells, "unseen_gene", seed=0)
    model = bj.BioJEPA.fit(cells, fold, features=bj.simulated_features(cells), network=False, progress=False)
    module = network_of(cells).modules
    sets = {f"M{k}": [g for g in cells.var_names if module[int(g[4:])] == k] for k in sorted(set(module))}
    return cells, model, sets


@pytest.fixture(scope="module")
def planted():
    return world(1, Recipe(module_size=25, arrows=WIRES, elsewhere=0.02, preference=0.5), n=200)


def test_arrows_agree_with_what_the_network_does(planted):
    cells, model, sets = planted
    answer = bj.pathway_edges(model, cells, sets)
    level = control_means(cells)["LINE0"]
    own = membership(sets, cells.var_names)
    truth, _ = set_scores(specific(-bj.true_effects(cells, list(cells.var_names)), level), own, own)
    truth = pd.DataFrame(truth, list(sets), list(sets))
    assert not answer.abstains
    for r in answer.arrows.itertuples(): assert r.sign == np.sign(truth.loc[r.source, r.target])


def test_no_wires_no_arrows():
    bare = Recipe(module_size=12, weight=1e-6, stress=0.0)
    found = [not bj.pathway_edges(m, c, s).abstains for c, m, s in (world(seed, bare) for seed in range(6))]
    assert sum(found) <= 2


def test_a_source_that_moves_every_gene_alike_drives_none_and_a_driven_set_is_found():
    rng = np.random.default_rng(0)
    change = rng.normal(0, 0.1, (40, 40))
    sets = membership({"A": range(8), "B": range(8, 16)}, range(40))
    def p_of(change): return random_set_p(change, sets, sets, set_scores(change, sets, sets)[0])[0, 1]
    strong, moved, driven = change.copy(), change.copy(), change.copy()
    strong[:8] += 1                         # one source moves all genes
    moved[:, 8:16] += 1                     # all sources move one set
    driven[:8, 8:16] += 1
    assert p_of(strong) > 0.05 and p_of(moved) > 0.05 and p_of(driven) < 0.005


def test_many_pairs_need_more_evidence_and_arrows_keep_to_their_rate():
    p = np.full((6, 6), 0.9)
    p[0, 1] = 0.04
    table = edge_table(list("ABCDEF"), np.ones((6, 6)), p, p, ~np.eye(6, dtype=bool), "intervention")
    assert table.q[0] > 0.5                 # one in thirty such p is luck
    assert len(Edges(table, alpha=0.95).arrows) == 30 and Edges(table, alpha=0.5).arrows.empty


def test_a_shared_gene_is_left_out():
    change = np.zeros((4, 4))
    change[1, 2] = 5.0                      # gene 1 moves gene 2, and both belong to both sets
    sets = membership({"A": [0, 1, 2], "B": [1, 2, 3]}, range(4))
    score, _ = set_scores(change, sets, sets, np.stack([np.arange(4)] * 2, 1))
    assert score[0, 1] == 0


def test_sets_of_one_gene_are_gene_edges(planted):
    cells, model, _ = planted
    answer = bj.pathway_edges(model, cells, {g: [g] for g in cells.var_names})
    assert len(answer.table) == 200 * 199 and answer.table.notna().all().all()


@pytest.mark.parametrize("sets, word", [
    ({"A": ["GENE1"]}, "1 gene sets"), ({"A": ["NOBODY"], "B": ["NONE"]}, "NOBODY"),
    ({"A": ["GENE1"], "B": ["GENE1"]}, "shared"),
])
def test_what_cannot_be_asked_is_named(planted, sets, word):
    cells, model, _ = planted
    with pytest.raises(BadGeneSets, match=word): bj.pathway_edges(model, cells, sets)


def test_a_model_without_attention_says_so(planted):
    cells, model, sets = planted
    alone = bj.pathway_edges(model, cells, sets, way="attention")
    assert alone.abstains and "no trained network" in alone.reason and alone.table.empty
    both = bj.pathway_edges(model, cells, sets, way="both")
    assert "no trained network" in both.headline() and set(both.table.way) == {"intervention"}
    with pytest.raises(ValueError, match="looking"): bj.pathway_edges(model, cells, sets, way="looking")


def test_the_page_of_no_arrow_opens(planted, tmp_path):
    cells, model, sets = planted
    for way in ("intervention", "attention"):
        page = bj.pathway_edges(model, cells, sets, way=way, alpha=1e-9).to_html(tmp_path/f"{way}.html").read_text()
        assert "No answer" in page and "<svg" in page
