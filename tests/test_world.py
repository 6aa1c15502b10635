"A network of no gene in particular: its inputs, its weights, and the gate before it."
import numpy as np
import pytest

import biojepa as bj
from biojepa.relations import Lines, elsewhere, lines_of, relations, transfer


@pytest.fixture(scope="module")
def screen():
    "Four lines, with a drug."
    raw = bj.simulate(
        n_genes=60, n_perturbations=8, cells_per_perturbation=20, n_controls=60, cell_types=4, n_drugs=1, seed=3
    )
    cells = bj.prepare(raw, n_genes=60)
    return cells, *lines_of(cells)


def answer(lines, genes, new=3):
    "Relations of the last line to the others, genes in an order of one's own."
    back = np.argsort(genes)
    own = np.where(lines.own >= 0, back[lines.own], -1)
    parts = [x[..., genes] for x in (lines.effect, lines.sem, lines.mean, lines.sd, lines.response)]
    lines = Lines(*parts, own)
    return relations(lines.take([0, 1, 2]), lines.mean[new], lines.sd[new], lines.response[new])


def test_relations_know_no_gene_by_its_place(screen):
    cells, lines, actions, contexts = screen
    order = np.random.default_rng(1).permutation(60)
    a, b = answer(lines, np.arange(60)), answer(lines, order)
    for x, y in ((a.inputs, b.inputs), (a.start, b.start), (a.basis, b.basis), (a.scale, b.scale)):
        assert np.isfinite(x).all() and np.allclose(x[:, order], y, atol=1e-3)


def test_a_drug_has_no_target_and_a_gene_has_itself(screen):
    cells, lines, actions, contexts = screen
    for action, own in zip(actions, lines.own):
        target = action.parts[0].target
        assert own == (list(cells.var_names).index(target) if target in cells.var_names else -1)
    assert (elsewhere(lines.own, 60).sum(1) == 60 - (lines.own >= 0)).all()


def test_lines_that_are_alike_predict_each_other(screen):
    lines = screen[1]
    assert transfer(lines.take([1, 1]))[1] > transfer(lines)[1]
