"Safety: verdicts err at their rate, a head sees no label of its own, hopeless questions are refused or left open."
import numpy as np
import pandas as pd
import pytest

import biojepa as bj
from biojepa.heads import CLEAR, CONCERN, OPEN, BadHead, GeneMean, effect_table, held_out_effects, p_values, verdicts
from biojepa.safety import pareto_front

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def fitted():
    raw = bj.simulate(n_genes=60, n_perturbations=56, cells_per_perturbation=20, cell_types=2, seed=4)
    cells = bj.prepare(raw, n_genes=60)
    fold = bj.split(cells, "unseen_gene", seed=0)
    features = bj.simulated_features(cells)
    return cells, fold, bj.BioJEPA.fit(cells, fold, features=features, network=False, progress=False)


@pytest.fixture(scope="module")
def saved(fitted, tmp_path_factory):
    return fitted[2].save(tmp_path_factory.mktemp("safety")/"model")


@pytest.fixture(scope="module")
def head(fitted):
    measured = effect_table(held_out_effects(fitted[2]), "observed")
    return bj.Head.fit(measured, measured.iloc[:, :30].sum(axis=1), harm="low")


@pytest.mark.parametrize("skill", [0, 1, 3])
def test_verdicts_err_at_their_rate(skill):
    rng = np.random.default_rng(skill)
    alarms, cleared = [], []
    for _ in range(500):
        harmful = rng.random(81) < 0.3
        score = rng.normal(size=81) + skill * harmful
        said = verdicts(*p_values(score[:1], score[1:][~harmful[1:]], score[1:][harmful[1:]]))[0]
        (cleared if harmful[0] else alarms).append(said == (CLEAR if harmful[0] else CONCERN))
    assert np.mean(alarms) < 0.14 and np.mean(cleared) < 0.16


def test_a_label_does_not_score_its_own_row(fitted):
    measured = effect_table(held_out_effects(fitted[2]), "observed")
    noise = pd.Series(np.random.default_rng(0).normal(size=len(measured)), measured.index)
    head = bj.Head.fit(measured, noise)
    assert abs(np.corrcoef(head.scores, noise)[0, 1]) < 0.3
    classes = bj.Head.fit(measured, noise > 0)
    value = classes.predict(measured)
    assert value.value.between(0, 1).all() and (value.low <= value.high).all()


def test_own_genes_do_not_count(fitted, head):
    cells, fold, model = fitted
    out = model.predict(cells, [fold.test[0]], "LINE0")
    before = head.predict(out).value[0]
    out.layers["delta"][:, list(cells.var_names).index(fold.test[0])] = 50
    assert head.predict(out).value[0] == before


def test_the_table_and_its_choice(fitted, head):
    cells, fold, model = fitted
    answer = bj.safety(model, cells, list(fold.test), heads={"viability": head}, target="LINE1",
                       programmes={"some": list(cells.var_names[:9])})
    columns = ["perturbation", "cell_type", "readout", "value", "low", "high", "verdict", "support"]
    assert list(answer.table) == columns and len(answer.table) == len(fold.test) * 3 * 3
    assert set(answer.table.verdict) <= {CLEAR, CONCERN, OPEN}
    assert list(answer.selectivity.perturbation) and answer.selectivity.front.any()
    assert (answer.table.low <= answer.table.value + 1e-9).all()
    again = bj.safety(model, cells, list(fold.test), heads={"viability": head}, limits={"viability": -1e6})
    one = again.table[again.table.readout == "viability"]
    assert (one.verdict == OPEN).all()                     # nothing measured is beyond that limit


def test_a_loaded_model_answers_the_same(fitted, head, saved):
    cells, fold, model = fitted
    two = [bj.safety(m, cells, list(fold.test[:3]), heads={"viability": head}).table
           for m in (model, bj.BioJEPA.load(saved))]
    pd.testing.assert_frame_equal(*two, atol=1e-4)


def test_without_support_nothing_is_told(fitted, head):
    cells, _, model = fitted
    answer = bj.safety(model, cells, ["NOBODY"], heads={"viability": head})
    assert answer.abstains and "support" in answer.reason and (answer.table.verdict == OPEN).all()


@pytest.mark.parametrize("labels, word", [
    ({"NOBODY": 2.0}, "no name is in both"),
    ({}, "no label"),
    ("three", "two classes"),
    ("few", "needs 20"),
    ("one", "the same"),
])
def test_labels_that_teach_nothing(fitted, labels, word):
    effects = held_out_effects(fitted[2])
    names = sorted(set(effects.obs.perturbation))
    made = {"three": dict(zip(names, ["a", "b", "c"] * 40)), "few": dict(zip(names[:9], range(2, 11))),
            "one": dict.fromkeys(names, "fine")}
    with pytest.raises(BadHead, match=word): bj.Head.fit(effects, made.get(labels, labels) if isinstance(labels, str) else labels)


def test_the_front_is_what_nothing_beats():
    benefit, harm = np.random.default_rng(1).random((2, 40))
    front = pareto_front(benefit, harm)
    for i in range(40):
        beaten = ((benefit >= benefit[i]) & (harm <= harm[i]) & ((benefit > benefit[i]) | (harm < harm[i]))).any()
        assert front[i] != beaten


def test_a_programme_without_measured_genes(fitted):
    with pytest.raises(BadHead, match="none of the 1 genes"): GeneMean(["Q"]).on(held_out_effects(fitted[2]))


def test_from_a_shell(fitted, saved, tmp_path):
    from typer.testing import CliRunner
    from biojepa.cli import app
    cells, fold, model = fitted
    cells.write_h5ad(tmp_path/"cells.h5ad")
    (tmp_path/"labels.csv").write_text("perturbation,dead\n" + "".join(f"{n},{i % 2}\n" for i, n in enumerate(fold.train)))
    words = ["safety", str(saved), str(tmp_path/"cells.h5ad"), "--out", str(tmp_path/"s.html")]
    done = CliRunner().invoke(app, [*words, fold.test[0], "--labels", f"dead={tmp_path/'labels.csv'}", "--cell-type", "LINE0"])
    assert done.exit_code == 0 and set(pd.read_csv(tmp_path/"s.csv").readout) == {"size", "dead"}, done.output
    for more, word in (([], "name a candidate"), (["X", "--labels", "dead"], "NAME=FILE"), ([fold.test[0], "--target", "LIVER"], "LIVER")):
        wrong = CliRunner().invoke(app, [*words, *more])
        assert isinstance(wrong.exception, ValueError) and word in str(wrong.exception)


def test_analogues_are_near_valid_and_new():
    pytest.importorskip("rdkit")
    from rdkit import Chem
    from biojepa.analogues import TradeOff, accessibility
    start = "COc1ccc(CC(=O)O)cc1Cl"
    table = bj.analogues(start, least=0.3)
    assert len(table) > 8 and table.smiles.is_unique and start not in set(table.smiles)
    assert all(Chem.MolFromSmiles(s) is not None for s in table.smiles)
    assert (table.accessibility <= accessibility(start) + 1).all() and table.similarity.is_monotonic_decreasing
    assert "acid to tetrazole" in set(table.change) and not table.smiles.str.contains("C(=O)F", regex=False).any()
    values = np.random.default_rng(0).random((2, len(table)))
    trade = TradeOff(table.assign(perturbation=table.smiles, wanted=values[0], harm=values[1]))
    assert trade.table.front.iloc[0] and trade.table.wanted[0] == values[0].max()
