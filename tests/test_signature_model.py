"A model of signatures: laws on made-up labels, and `BioJEPA` as the one entry."
import importlib
import inspect
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

import biojepa as bj
from biojepa.cells import MODES, add_mode
from biojepa.symbols import Symbols
from biojepa.featurizers import MissingFeatures
from biojepa.perturbations import BadAction
from biojepa.signatures import check_signature, value_signatures
from biojepa.signature_views import (
    Entries,
    View,
    ViewConfig,
    base_rates,
    conjugate_gradients,
    unit_features,
)
from biojepa.signature_network import signature_loss
from biojepa.signature_model import NewContext, SignatureModel, stack_weights
from biojepa.signature_scores import (
    QUESTIONS,
    auroc_interval,
    gene_auroc,
    label_pairs,
    paired_auroc,
    score_changes,
)
from biojepa.signatures import BadSignatures, read_signatures, signature_folds, signatures

FAST = dict(
    progress=False, device="cpu", training=dict(steps=40, validate_every=20, width=16, rows=64)
)


def made_up(P=150, G=16, lines=("one", "two"), seed=0):
    """Labels of two lines that depend on four hidden directions of the features; half of the
    entries missing."""
    rng = np.random.default_rng(seed)
    names = [f"P{i}" for i in range(P)]
    x = rng.normal(size=(P, 4))
    w = rng.normal(size=(4, G))
    out = []
    for line in lines:
        y = (
            np.digitize(
                x @ (w + 0.3 * rng.normal(size=w.shape)) + 0.7 * rng.normal(size=(P, G)), (-1, 1)
            )
            - 1
        )
        out.append(
            (
                pd.DataFrame(
                    [
                        (p, f"G{g}", y[i, g])
                        for i, p in enumerate(names)
                        for g in range(G)
                        if rng.random() < 0.5
                    ],
                    columns=["pert", "gene", "effect"],
                ),
                line,
            )
        )
    return out, {"x": pd.DataFrame(x, index=names)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    tables, features = made_up()
    folder = tmp_path_factory.mktemp("labels")
    for table, line in tables: table.to_csv(folder / f"{line}.csv", index=False)
    sig = read_signatures(folder)
    return sig, signature_folds(sig, 3, seed=0)[0], features


@pytest.fixture(scope="module")
def model(data):
    return bj.BioJEPA.fit(data[0], data[1], features=data[2], seed=0, **FAST)


def aurocs(predicted, sig):
    truth = sig[predicted.obs_names].X
    return [
        np.nanmean(
            gene_auroc(predicted.layers[q], label_pairs(truth, np.zeros(len(truth), int), q, 3))
        )
        for q in QUESTIONS
    ]


def test_one_entry_learns_a_planted_signal(data, model):
    sig, fold, _ = data
    assert isinstance(model, SignatureModel) and model.lines == ["one", "two"]
    change, direction = aurocs(model.predict(sig, list(fold.test)), sig)
    assert change > 0.6 and direction > 0.85


def test_shuffled_features_fall_to_one_half(data):
    sig, fold, features = data
    mixed = {"x": features["x"].sample(frac=1, random_state=1).set_axis(features["x"].index)}
    lost = bj.BioJEPA.fit(sig, fold, features=mixed, seed=0, **FAST)
    for a in aurocs(lost.predict(sig, list(fold.test)), sig): assert abs(a - 0.5) < 0.1


def test_held_out_labels_teach_nothing(data, model):
    "Turned upside down, the labels of test perturbations change no weight and no prediction."
    sig, fold, features = data
    lies = sig.copy()
    t = lies.obs.perturbation.isin(fold.test).values
    lies.X[t] = -1 + 2 * (lies.X[t] == 0) + 0 * lies.X[t]
    other = bj.BioJEPA.fit(lies, fold, features=features, seed=0, **FAST)
    for q in QUESTIONS:
        assert np.array_equal(
            other.predict(sig, list(fold.test)).layers[q],
            model.predict(sig, list(fold.test)).layers[q],
        )


def test_a_perturbation_is_hidden_in_every_line(data):
    sig, fold, _ = data
    assert set(sig.obs.cell_type[sig.obs.perturbation.isin(fold.test)]) == {"one", "two"}
    assert not set(fold.test) & set(fold.train)


def test_save_and_load(data, model, tmp_path):
    sig, fold, _ = data
    model.save(tmp_path)
    again = bj.BioJEPA.load(tmp_path)
    assert json.loads((tmp_path / "model.json").read_text())["kind"] == "signature" and not list(
        tmp_path.glob("*.pkl")
    )
    a, b = (m.predict(sig, ["P0", "P7", "P149"]) for m in (model, again))
    assert a.obs.equals(b.obs) and list(a.var_names) == list(b.var_names)
    for q in QUESTIONS: assert np.array_equal(a.layers[q], b.layers[q])


def test_predictions_stay_in_range_and_say_their_support(data, model):
    sig, fold, _ = data
    p = model.predict(sig)
    assert (p.obs_names == sig.obs_names).all()
    assert (
        0 <= p.layers["change"].min()
        and p.layers["change"].max() <= 1
        and np.abs(p.layers["direction"]).max() <= 1
    )
    seen = p.obs.perturbation.isin(fold.train)
    assert (p.obs.support[seen] == 1).all() and (p.obs.support[~seen] < 1).all()


@pytest.mark.parametrize("target", ["labels", "values"])
def test_loss_ignores_what_was_not_measured(target):
    "Whatever stands at a missing entry moves neither the loss nor its gradient."
    g = torch.Generator().manual_seed(0)
    Y = torch.randint(-1, 2, (6, 5), generator=g).float()
    Y[torch.rand(Y.shape, generator=g) < 0.4] = torch.nan
    answers = torch.stack([Y.abs(), Y]) if target == "labels" else Y[None]
    base = torch.full_like(torch.nan_to_num(answers), 0.3)
    said = torch.randn(answers.shape, generator=g, requires_grad=True)
    loss = signature_loss(said, answers, base, target)
    grad, = torch.autograd.grad(loss, said)
    gone = ~answers.isfinite()
    assert gone.any() and (grad[gone] == 0).all() and (grad[~gone] != 0).any()
    assert signature_loss(torch.where(gone, 99.0, said), answers, base, target) == loss


def test_missing_labels_are_missing_to_the_views(data):
    "A row without labels, of an unseen perturbation, changes nothing that training rows said."
    sig, fold, features = data
    rows = sig[sig.obs.perturbation.isin(fold.train + fold.val)].copy()
    a, b = (
        bj.BioJEPA.fit(d, fold, features=features, network=False, progress=False)
        for d in (rows, sig)
    )
    for q in QUESTIONS:
        assert np.allclose(
            a.predict(None, ["P1", "P2"]).layers[q],
            b.predict(None, ["P1", "P2"]).layers[q],
            atol=1e-6,
        )


def test_a_view_without_sharing_is_kernel_ridge():
    "Only `own` on: gene by gene the closed form of a Gaussian process with the centred kernel."
    rng = np.random.default_rng(0)
    x = torch.nn.functional.normalize(torch.tensor(rng.normal(size=(30, 6)), dtype=torch.float32))
    y = torch.tensor(rng.normal(size=(1, 30, 3)), dtype=torch.float32)
    y[torch.tensor(rng.random((1, 30, 3)) < 0.3)] = torch.nan
    config = ViewConfig(
        own=1, line=0, alike=0, strength=0, row=0, noise=0.5, rank=30, iterations=300
    )
    view = View({"x": 1.0}, config).solve(
        y, x, torch.arange(30), torch.zeros(30, dtype=torch.long), 1, torch.zeros(3, 6)
    )
    got = view(x, torch.zeros(30, dtype=torch.long), torch.arange(3), torch.zeros(3, 6))[0]
    place = view.places(x)
    K = place @ place.T
    for g in range(3):
        s = y[0, :, g].isfinite()
        want = K[:, s] @ torch.linalg.solve(K[s][:, s] + 0.5 * torch.eye(int(s.sum())), y[0, s, g])
        assert torch.allclose(got[:, g], want, atol=2e-2)


def test_conjugate_gradients_solve():
    A = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    A = A @ A.transpose(1, 2) + torch.eye(8)
    b = torch.ones(2, 8, 1)
    assert torch.allclose(
        conjugate_gradients(lambda v: A @ v, b, 100, 1e-6), torch.linalg.solve(A, b), atol=1e-3
    )


def test_stack_prefers_the_part_that_says_something():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=4000)
    good = truth + rng.normal(size=4000)
    bad = rng.normal(size=4000)
    w = stack_weights(np.stack([good, bad]), truth, pull=0.05)
    assert w[0] > 5 * w[1] >= 0 and (stack_weights(np.stack([-good, bad]), truth) >= 0).all()
    by_skill, equal = (
        stack_weights(np.stack([good, good + 0.1 * bad]), truth, s, pull=100)
        for s in ([0.3, 0.1], None)
    )
    assert np.isclose(by_skill[0] / by_skill[1], 9, rtol=0.1) and np.isclose(
        equal[0] / equal[1], 1, rtol=0.1
    )


def test_paired_interval_is_narrower_than_two(data):
    sig, _, _ = data
    rng = np.random.default_rng(0)
    one = np.zeros(sig.n_obs, int)
    a = rng.normal(size=sig.shape) + 0.5 * np.nan_to_num(sig.X)
    b = a + 0.1 * rng.normal(size=sig.shape)
    pairs = label_pairs(sig.X, one, "direction")
    value, low, high = paired_auroc(a, b, pairs, 100)
    assert np.isclose(value, auroc_interval(a, pairs, 2)[0] - auroc_interval(b, pairs, 2)[0])
    wide = auroc_interval(a, pairs, 100)
    assert low <= value <= high and high - low < wide[2] - wide[1]
    assert paired_auroc(a, a, pairs, 10) == (0, 0, 0)


def test_values_use_the_same_entry():
    """Numbers in place of labels, one line, a squared loss; the unseen correlate, and shuffled
    features do not."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 5))
    y = x @ rng.normal(size=(5, 10)) + rng.normal(size=(120, 10))
    y[rng.random(y.shape) < 0.2] = np.nan
    names = [f"drug {i}" for i in range(120)]
    sig = value_signatures(
        pd.DataFrame(y, index=names, columns=[f"G{i}" for i in range(10)]), "all"
    )
    fold = signature_folds(sig, 4, seed=0)[0]
    features = {"x": pd.DataFrame(x, index=names)}
    def skill(f):
        p = bj.BioJEPA.fit(sig, fold, features=f, **FAST).predict(sig, list(fold.test))
        t = sig[list(fold.test)].X
        ok = np.isfinite(t)
        return np.corrcoef(p.layers["value"][ok], t[ok])[0, 1]
    assert (
        skill(features) > 0.7
        and abs(skill({"x": features["x"].sample(frac=1, random_state=1).set_axis(names)})) < 0.3
    )


def test_a_newcomer_brings_its_features_and_a_stranger_is_named(data, model):
    sig, fold, features = data
    known = fold.test[0]
    told = model.predict(
        None, ["new", known], features={"x": features["x"].loc[[known]].set_axis(["new"])}
    )
    for line in model.lines:
        assert np.allclose(
            told[f"new@{line}"].X, told[f"{known}@{line}"].X, atol=1e-4
        ) and told.obs.support[f"new@{line}"] == pytest.approx(
            told.obs.support[f"{known}@{line}"], abs=1e-4
        )
    with pytest.warns(MissingFeatures, match="new") as caught: blind = model.predict(None, ["new"])
    assert (
        len(caught) == 1
        and (blind.obs.support == 0).all()
        and (blind.obs.missing == "everything").all()
        and not np.allclose(blind.X, told[[f"new@{line}" for line in model.lines]].X, atol=1e-3)
    )
    renamed = model.predict(None, ["old"], symbols=Symbols([known], previous={"old": known}))
    assert (
        np.allclose(renamed.X, told[[f"{known}@{line}" for line in model.lines]].X, atol=1e-4)
        and list(renamed.obs.perturbation) == ["old"] * 2
    )
    with (
        pytest.warns(MissingFeatures, match="fitted without text"),
        pytest.warns(MissingFeatures, match="new"),
    ):
        model.predict(
            None, ["new"], features={"text": features["x"].loc[[known]].set_axis(["new"])}
        )


def test_added_modes_do_not_disturb_a_model_of_signatures(data, model, tmp_path):
    sig, fold, _ = data
    first = model.predict(None, list(fold.test[:4]))
    before = list(MODES)
    try:
        add_mode("editing")
        assert np.array_equal(model.predict(None, list(fold.test[:4])).X, first.X)
        facts = json.loads((model.save(tmp_path) / "model.json").read_text())
        assert facts["mode_names"][-1] == "editing"
        MODES.names[:] = [*before, "radiation"]
        assert (
            np.allclose(
                SignatureModel.load(tmp_path).predict(None, list(fold.test[:4])).X,
                first.X,
                atol=1e-6,
            )
            and "editing" in MODES
        )
    finally: MODES.names[:] = before


def test_errors_name_what_is_wrong(data, model):
    sig, fold, features = data
    cells = bj.prepare(
        bj.simulate(n_genes=30, n_perturbations=8, cells_per_perturbation=6, seed=0), n_genes=30
    )
    odd = sig.copy()
    strange = sig.copy()
    endless = sig.copy()
    odd.X[0, np.isfinite(odd.X[0])] = 0.5
    strange.uns["biojepa"] = strange.uns["biojepa"] | dict(target="colours")
    endless.X[3, 0] = np.inf
    for bad, word in (
        (lambda: SignatureModel.fit(cells, fold, features), "not signatures"),
        (lambda: bj.BioJEPA.fit(sig, fold), "features"),
        (lambda: bj.BioJEPA.fit(odd, fold, features=features), "0.5"),
        (lambda: bj.BioJEPA.fit(strange, fold, features=features), "colours"),
        (lambda: bj.BioJEPA.fit(endless, fold, features=features), endless.obs_names[3]),
        (lambda: bj.BioJEPA.fit(sig, fold, "v0_3", features=features), "v0_3"),
        (lambda: model.predict(cells, ["P1"]), "not signatures"),
        (lambda: model.predict(sig, ["P1+P2"]), "ask for P1 and P2 one by one"),
        (lambda: model.predict(sig, ["P1"], dose=1), "neither dose nor time"),
        (lambda: model.predict(sig, ["P1"], mode="magic"), "unknown mode 'magic'; one of CRISPRi"),
    ):
        with pytest.raises(BadSignatures, match=word): bad()
    with pytest.raises(ValueError, match="signatures, not cells.*score_signatures") as said:
        bj.scorecard(sig, fold, {"base": model})
    # what it points to is there, and takes that
    module, name, wants = re.search(r"(biojepa\.\w+)\.(\w+)\((.*)\)", str(said.value)).groups()
    assert list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)[
        :3
    ] == wants.split(", ")
    with pytest.raises(BadAction, match="cut a bracket in two"): model.predict(sig, ["C[N+](C)C"])


# probabilities and intervals

def rare(P=260, G=40, seed=0):
    """Labels of which most genes change in 1 % of perturbations, a quarter of them often; features
    tell."""
    rng = np.random.default_rng(seed)
    names = [f"P{i}" for i in range(P)]
    x = rng.normal(size=(P, 4))
    base = np.where(np.arange(G) % 4 == 0, 0.5, -4.5)
    logits = base + x @ rng.normal(size=(4, G)) + 0.5 * rng.normal(size=(P, 1))
    y = (rng.random((P, G)) < 1 / (1 + np.exp(-logits))) * rng.choice([-1, 1], size=(P, G))
    listed = [
        (p, f"G{g}", y[i, g]) for i, p in enumerate(names) for g in range(G) if rng.random() < 0.5
    ]
    sig = signatures(pd.DataFrame(listed, columns=["pert", "gene", "effect"]), "line")
    return sig, {"x": pd.DataFrame(x, index=names)}


def test_a_probability_of_change_beats_the_base_rate():
    """Also where genes have few labels of the rarer kind:

    Brier, log loss, calibration, ranks of genes.
    """
    sig, features = rare()
    fold = signature_folds(sig, 3, seed=0)[0]
    p = SignatureModel.fit(sig, fold, features, progress=False, network=False).predict(
        sig, list(fold.test)
    )
    table = score_changes(p, sig, n=100)
    assert (table.gain_low[["brier", "log_loss", "rank_within"]] > 0).all()
    assert table.value["calibration_error"] < 0.05
    few = p[:, sig.X.std(0, where=np.isfinite(sig.X)) < 0.35].copy()
    few = few[np.isfinite(sig[list(few.obs.perturbation), few.var_names].X).any(1)].copy()
    truth = sig[list(few.obs.perturbation), few.var_names].X
    here = np.isfinite(truth)
    assert abs(few.layers["change"][here].mean() - (truth[here] != 0).mean()) < 0.02
    table = score_changes(few, sig, n=50)
    assert table.value["brier"] < 1.05 * table.base_rate["brier"]


def test_intervals_of_a_probability_hold_the_shares():
    "The shares of changed genes of unseen perturbations, nine of ten within the mean interval."
    sig, features = rare()
    fold = signature_folds(sig, 3, seed=0)[0]
    p = SignatureModel.fit(sig, fold, features, progress=False, network=False).predict(
        sig, list(fold.test)
    )
    low, change, high = (p.layers[k] for k in ("low", "change", "high"))
    assert ((0 <= low) & (low <= change) & (change <= high) & (high <= 1)).all()
    truth = sig[list(fold.test)].X
    here = np.isfinite(truth)
    share, low, high = (
        np.where(here, v, 0).sum(1) / here.sum(1) for v in (truth != 0, low, high)
    )
    # a share of some twenty labels strays by chance too
    chance = np.sqrt(share * (1 - share) / here.sum(1))
    assert np.mean((low - chance <= share) & (share <= high + chance)) > 0.85


def values(P=120, own=-0.9, seed=0):
    "Knock-downs whose own gene falls, in log fold changes."
    rng = np.random.default_rng(seed)
    names = [f"P{i}" for i in range(P)]
    x = rng.normal(size=(P, 5))
    y = 0.2 * x @ rng.normal(size=(5, P)) + 0.2 * rng.normal(size=(P, P))
    np.fill_diagonal(y, own + 0.1 * rng.normal(size=P))
    return pd.DataFrame(y, names, names), {"x": pd.DataFrame(x, index=names)}


def test_the_own_gene_of_a_knock_down_falls():
    table, features = values()
    sig = value_signatures(table, "K562", "CRISPRi", "log fold change")
    fold = signature_folds(sig, 4, seed=0)[0]
    model = SignatureModel.fit(sig, fold, features, progress=False, network=False)
    p = model.predict(sig, list(fold.test))
    own = [(p[f"{n}@K562", n].X.item(), sig[n, n].X.item()) for n in fold.test]
    assert np.abs(np.subtract(*np.array(own).T)).mean() < 0.15 and np.mean(own, 0)[0] < -0.8
    inside = (p.layers["low"] <= table.loc[list(fold.test)]) & (
        p.layers["high"] >= table.loc[list(fold.test)]
    )
    assert 0.84 < inside.to_numpy().mean() < 0.97 and (p.layers["std"] > 0).all()
    # of another mode nothing is known
    sig = sig[:-1].copy()
    fold = signature_folds(sig, 4, seed=0)[0]
    model = SignatureModel.fit(sig, fold, features, progress=False, network=False)
    down, up = (
        model.predict(None, ["P119"], mode=m)[:, "P119"].X.item() for m in ("CRISPRi", "CRISPRa")
    )
    assert down < -0.8 and abs(up) < 0.6


def test_the_own_gene_in_labels():
    table, features = values()
    y = np.where(np.abs(table) > 0.45, np.sign(table), 0).astype(int)
    listed = pd.DataFrame(y, table.index, table.columns).rename_axis(index="pert", columns="gene")
    sig = signatures(listed.stack().rename("effect").reset_index(), "K562")
    fold = signature_folds(sig, 4, seed=0)[0]
    p = SignatureModel.fit(sig, fold, features, progress=False, network=False).predict(
        sig, list(fold.test)
    )
    own = [p[f"{n}@K562", n] for n in fold.test]
    assert min(o.layers["change"].item() for o in own) > 0.9
    assert max(o.layers["direction"].item() for o in own) < -0.9


def test_a_new_line_is_a_context_without_labels(data, model):
    "Base rates over lines, a wide interval, less support, and a warning that names it."
    sig, fold, _ = data
    names = list(fold.test[:6])
    with pytest.warns(NewContext, match="not in training: line three"):
        new = model.predict(None, names, cell_type="three")
    old = model.predict(None, names, cell_type="one")
    assert np.allclose(new.layers["base_rate"], model.base[0].mean(0), atol=1e-6)
    assert (new.obs.support.values < old.obs.support.values).all()
    width = [np.mean(p.layers["high"] - p.layers["low"]) for p in (new, old)]
    assert width[0] > width[1]
    both = np.mean(
        [model.predict(None, names, cell_type=c).layers["change"] for c in model.lines], 0
    )
    assert np.corrcoef(new.layers["change"].ravel(), both.ravel())[0, 1] > 0.9


def test_genes_are_matched_by_name_and_new_ones_are_answered(data, model):
    sig, fold, features = data
    names = list(fold.test[:3])
    whole = model.predict(sig, names)
    turned = model.predict(sig[:, ::-1].copy(), names)
    assert np.allclose(turned[:, whole.var_names].X, whole.X, atol=1e-5)
    more = sig[:, :3].copy()
    more.var_names = ["G0", "G1", "unheard of"]
    with pytest.warns(NewContext, match="1 responding genes .unheard of"):
        p = model.predict(more, names)
    assert np.isfinite(p.layers["change"]).all()
    assert np.allclose(p[:, "G1"].X, whole[:, "G1"].X, atol=1e-5)
    width = (p.layers["high"] - p.layers["low"]).mean(0)
    assert width[2] > width[:2].max()


def test_several_lines_in_one_table(data, model):
    tables, features = made_up()
    one = signatures(pd.concat([t.assign(cell_line=line) for t, line in tables]))
    sig = data[0]
    assert list(one.obs_names) == list(sig.obs_names) and np.array_equal(
        one.X, sig.X, equal_nan=True
    )
    x = pd.DataFrame(np.ones((2, 3)), ["A", "A"], list("xyz"))
    assert list(value_signatures(x, ["l1", "l2"]).obs_names) == ["A@l1", "A@l2"]
    with pytest.raises(BadSignatures, match="'A' stands twice"): value_signatures(x, "l1")


def test_entries_are_what_a_dense_table_is():
    "Blocks, order and missing entries change nothing that a view learns."
    g = torch.Generator().manual_seed(0)
    table = torch.randn(2, 20, 6, generator=g)
    table[:, torch.rand(20, 6, generator=g) < 0.5] = torch.nan
    x = torch.nn.functional.normalize(torch.randn(20, 5, generator=g))
    genes = torch.nn.functional.normalize(torch.randn(6, 5, generator=g))
    line = torch.tensor([0, 1] * 10)
    answers = []
    for chunk, order in ((512, torch.arange(20)), (3, torch.randperm(20, generator=g))):
        back = torch.argsort(order)[torch.arange(20)]
        view = View({"x": 1.0}, ViewConfig(chunk=chunk, iterations=200))
        view.solve(Entries.of(table[:, order]), x[order], back, line[order], 2, genes)
        answers.append(view(x, line, torch.arange(6), genes))
    assert torch.allclose(*answers, atol=1e-3)


MEMORY = """
import resource, numpy as np, pandas as pd
from biojepa.signatures import LABELS, _frame
from biojepa.signature_model import SignatureModel
from biojepa.splits import Split
rng = np.random.default_rng(0)
P, G, lines = 450, 2000, ["a", "b", "c", "d"]
X = np.full((4 * P, G), np.nan, np.float32)
some = rng.random(X.shape) < .02
X[some] = rng.choice([-1, 0, 0, 0, 1], size=some.sum())
names = [f"P{i}" for i in range(P)]
sig = _frame(X, np.tile(names, 4), np.repeat(lines, P), "CRISPRi", [f"G{i}" for i in range(G)])
x = pd.DataFrame(rng.normal(size=(P, 50)).astype(np.float32), index=names)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
split = Split("unseen_gene", 0, tuple(names[:320]), tuple(names[320:360]), tuple(names[360:]), {n: "unseen_gene" for n in names[320:]})
SignatureModel.fit(sig, split, {"x": x}, progress=False, network=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)
"""


def test_a_joint_fit_takes_little_memory():
    "A quarter of four screens: less than the 58 MB of the dense answers, times six."
    import subprocess, sys
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-500:]
    assert float(run.stdout) < 350
