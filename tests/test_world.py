"A network of no gene in particular: its inputs, its weights, and the gate before it."
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import biojepa as bj
from biojepa.effects import control_means
from biojepa.loop import BadModel
from biojepa.new_line_answers import gains, opens, shipped_network
from biojepa.relations import Lines, elsewhere, lines_of, relations, transfer
from biojepa.splits import Split
from biojepa.world import world_loss


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


def test_the_perturbed_gene_teaches_nothing(screen):
    lines = screen[1]
    at = np.flatnonzero(lines.own >= 0)
    spoiled = lines.take()
    spoiled.effect = lines.effect.copy()
    spoiled.effect[0, at, lines.own[at]] += 9
    assert np.isclose(transfer(lines.take([0, 1]))[0], transfer(spoiled.take([0, 1]))[0], rtol=0.2)
    mean, truth = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    keep = torch.ones(3, 9, dtype=bool)
    keep[:, 4] = False
    def loss(mean): return world_loss(mean, torch.ones(3, 9), truth, keep, torch.ones(3, 1))
    assert loss(mean) == loss(torch.where(keep, mean, 99.0))


def test_the_gate_opens_for_what_holds_in_other_lines():
    rng = np.random.default_rng(0)
    assert opens(np.array([0.1, 0.11, 0.12])) and not opens(np.array([0.1, 0.1]))
    assert np.mean([opens(rng.normal(size=6)) for _ in range(1000)]) < 0.1
    one = np.ones((2, 4))
    gain = gains([0 * one] * 3, [one] * 3, [one, one, -one])
    assert np.isclose(gain[2], -3) and np.allclose(gain[:2], 0)   # each line's share is that of the two others


# the weights that the package carries, and how they came about

def benchmark():
    "benchmarks/worlds.py as a module."
    path = Path(__file__).resolve().parents[1] / "benchmarks/worlds.py"
    spec = importlib.util.spec_from_file_location("worlds", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_package_carries_weights_and_their_card():
    network, card = shipped_network()
    folder = Path(bj.__file__).parent / "weights/world"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 10e6
    assert card["worlds"] and card["steps"] and card["losses"] and card["prior"]
    setup = (Path(__file__).resolve().parents[1] / "setup.py").read_text()
    assert "weights/*/*" in setup  # a plain install has them


def test_damaged_weights_are_refused(tmp_path):
    folder = Path(bj.__file__).parent / "weights/world"
    for f in folder.iterdir(): (tmp_path / f.name).write_bytes(f.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\1\1")
    with pytest.raises(BadModel, match="sha256"): shipped_network(tmp_path)


def test_training_goes_on_where_it_stopped(tmp_path):
    worlds = benchmark()
    how = dict(n_genes=50, n_perturbations=6, cells_per_perturbation=8, n_controls=30, cell_types=3)
    small = dict(worlds=2, out=tmp_path / "weights", pool_size=3, stopping=[900], report=2, options=how)
    worlds.train(tmp_path, steps=2, **small)
    best = worlds.train(tmp_path, steps=4, **small)
    network, card = shipped_network(tmp_path / "weights")
    assert card["worlds"] == 2 and [row[0] for row in card["losses"]] == [2, 4]
    assert best["step"] == card["steps"] and network.shape["layers"] == 3


# preset='world'

@pytest.fixture(scope="module")
def model(screen):
    cells = screen[0]
    cells = cells[(cells.obs.cell_type != "LINE3").to_numpy() | (cells.obs.perturbation == "control").to_numpy()].copy()
    names = sorted(set(cells.obs.perturbation.astype(str)) - {"control"})
    plan = Split("own", 0, train=names, val=[], test=[])
    return cells, names, bj.BioJEPA.fit(cells, plan, preset="world", progress=False)


def test_world_answers_for_new_lines_only(model, monkeypatch):
    cells, names, fitted = model
    form = fitted.predict(cells, names, "LINE3")
    assert "lines without treated cells" in fitted.what_answers() and fitted.gate == 0
    assert len(fitted.new_line_answers.gain) == 3
    monkeypatch.setattr(fitted.new_line_answers, "share", 1.0)  # as if the gate had opened
    new, old = fitted.predict(cells, names, "LINE3"), fitted.predict(cells, names, "LINE1")
    assert not np.allclose(new.layers["delta"], fitted.closed_form.predict(*asked(fitted, cells, names, "LINE3"))[0])
    assert np.allclose(old.layers["delta"], fitted.closed_form.predict(*asked(fitted, cells, names, "LINE1"))[0], atol=1e-5)
    assert np.isfinite(new.layers["std"]).all() and (new.layers["std"] >= 0).all()
    for i, n in enumerate(names):  # the perturbed gene itself is left to the closed form
        if n in cells.var_names: assert np.isclose(new[i, n].X.item(), form[i, n].X.item(), atol=1e-6)


def test_a_line_that_is_left_out_is_not_seen(model, monkeypatch):
    answers = model[2].new_line_answers
    before = answers._without(0, [0, 1])
    spoiled = answers.lines.take()
    spoiled.effect = answers.lines.effect.copy()
    spoiled.effect[0] += 1
    monkeypatch.setattr(answers, "lines", spoiled)
    for x, y in zip(before, answers._without(0, [0, 1])): np.testing.assert_array_equal(x, y)
    assert not np.allclose(before[0], answers._without(1, [0, 1])[0])


def asked(fitted, cells, names, line):
    actions = [fitted._action(n, None, None, None) for n in names]
    return actions, [line] * len(names), control_means(cells)


def test_world_is_saved_with_its_lines(model, tmp_path, monkeypatch):
    cells, names, fitted = model
    monkeypatch.setattr(fitted.new_line_answers, "share", 0.7)
    fitted.save(tmp_path)
    back = bj.BioJEPA.load(tmp_path)
    a, b = (m.predict(cells, names, "LINE3") for m in (fitted, back))
    assert np.allclose(a.layers["delta"], b.layers["delta"], atol=1e-4)
    assert np.allclose(a.layers["std"], b.layers["std"], atol=1e-4)
    assert back.what_answers() == fitted.what_answers()


def test_world_stands_on_the_closed_form(model):
    cells, names, fitted = model
    with pytest.raises(ValueError, match="closed form"):
        bj.BioJEPA.fit(cells, fitted.split, preset="world", closed_form=False, progress=False)
