"Training, floor and estimator: laws of the exported modules on small simulated screens."
import copy
import json
import os
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biojepa.cells import MODES, BadCells, add_mode
from biojepa.prepare import prepare
from biojepa.effects import control_means, effects
from biojepa.demo import budget, real_splits
from biojepa.effects import centred_correlation
from biojepa.run import network_share
from biojepa.estimator import BioJEPA
from biojepa.gene_sets import BadGeneSets, pathway_matrix, read_gene_sets
from biojepa.symbols import Symbols
from biojepa.featurizers import BadFeatures, MissingFeatures, as_table, encode_actions
from biojepa.model import among, build, configure
from biojepa.perturbations import Action, BadAction, actions_of
from biojepa.predictor import ActionTokens
from biojepa.loop import BadModel, LoopConfig, learning_rate, pick_precision
from biojepa.pretraining import Collapse, draw_genes
from biojepa.linear_response import LinearResponse
from biojepa.closed_form import ClosedForm, hold_out_blocks
from biojepa.saved import read_model, write_model
from biojepa.sets import SetSampler
from biojepa.simulator import simulate, simulated_features, true_effects
from biojepa.splits import Leak, Split, split
from biojepa.training import TrainConfig, action_loss_base, control_states, effect_target

few = settings(max_examples=15, deadline=None)
TINY = dict(
    model=dict(width=16, layers=1, predictor_layers=1),
    pretraining=dict(steps=6, batch=8),
    training=dict(steps=8, sets=4, cells=2, validate_every=4),
    progress=False,
    device="cpu",
)


@pytest.fixture(scope="module")
def screen():
    cells = prepare(
        simulate(
            n_genes=48,
            n_perturbations=24,
            n_doubles=10,
            cells_per_perturbation=12,
            cell_types=2,
            seed=1,
        ),
        n_genes=48,
    )
    return cells, simulated_features(cells), split(cells, "simulation", seed=0)


@pytest.fixture(scope="module")
def model(screen):
    cells, features, fold = screen
    return BioJEPA.fit(cells, fold, features=features, seed=0, **TINY)


@few
@given(
    st.integers(2, 200),
    st.integers(1, 250),
    st.integers(0, 99),
    st.lists(st.integers(-1, 300), max_size=8),
)
def test_drawn_genes_hold_what_they_must(n_genes, n, seed, keep):
    keep = torch.tensor([k for k in keep if k < n_genes], dtype=torch.long)
    genes = draw_genes(n_genes, n, torch.Generator().manual_seed(seed), keep)
    if n >= n_genes: assert genes is None; return
    wanted = {int(k) for k in keep if k >= 0}
    assert (
        wanted <= set(genes.tolist())
        and (genes.diff() > 0).all()
        and len(genes) == max(n, len(wanted))
        and genes.min() >= 0
        and genes.max() < n_genes
    )


@few
@given(st.integers(1, 500), st.floats(1e-5, 1), st.floats(0, 0.5))
def test_the_rate_climbs_then_falls(steps, peak, warmup):
    config = LoopConfig(steps=steps, lr=peak, warmup=warmup)
    rates = np.array([learning_rate(i, config) for i in range(steps)])
    top = rates.argmax()
    assert (
        (rates > 0).all()
        and rates.max() <= peak * (1 + 1e-9)
        and (np.diff(rates[: top + 1]) >= 0).all()
        and (np.diff(rates[top:]) <= 1e-12).all()
    )


def test_precision_is_asked_for_by_name(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("BIOJEPA_PRECISION", "bfloat16")
    assert pick_precision(cpu) == torch.bfloat16 and pick_precision(cpu, "float32") == torch.float32
    monkeypatch.setenv("BIOJEPA_PRECISION", "half")
    with pytest.raises(ValueError, match="half"): pick_precision(cpu)


def test_some_genes_are_the_same_as_all_of_them_by_name(screen):
    cells, features, fold = screen
    net = build(configure("base", 48, width=16, layers=1, predictor_layers=1))
    sampler = SetSampler(fold.cells(cells, "train"), m=3)
    batch = sampler.batch(0, 6)
    actions = encode_actions(actions_of(sampler.groups), list(cells.var_names))
    chosen = actions[batch.group]
    target = effect_target(effects(fold.cells(cells, "train")), sampler.groups)
    def loss(genes, line=None):
        return action_loss_base(
            net, batch, chosen, target, TrainConfig(context=99), line=line, genes=genes
        )
    for a, b in zip(loss(None).values(), loss(torch.arange(48)).values()):
        torch.testing.assert_close(a, b)
    part = torch.unique(torch.cat([torch.arange(0, 48, 3), chosen.target.flatten().clamp(min=0)]))
    moved = among(chosen, part)
    known = chosen.target >= 0
    assert (part[moved.target[known]] == chosen.target[known]).all() and (
        moved.target[~known] == -1
    ).all()
    with pytest.raises(ValueError, match="not among"): among(chosen, torch.arange(2))
    own = control_states(net, batch, torch.arange(6), 99)
    # a state per set is the plain way
    torch.testing.assert_close(own, net.context(batch.control, batch.control_total))


def test_the_held_out_floor_is_a_refit_without_those_rows(screen):
    cells, features, fold = screen
    seen = fold.cells(cells, "train")
    floor = ClosedForm(use_response=False).fit(seen, None)
    blocks = hold_out_blocks(floor.actions)
    for i in (0, len(blocks) // 2, len(blocks) - 1):
        keep = np.setdiff1d(np.arange(len(blocks)), blocks[i])
        less = copy.copy(floor)
        less.mixed = floor.mixed.on_rows(keep)
        again = less.predict([floor.actions[i]], [floor.contexts[i]])[0][0]
        assert np.allclose(again, floor.held_out[i], atol=1e-6 + 1e-4 * np.abs(again).max())
        assert all(
            {p.target for p in floor.actions[i].parts} & {p.target for p in floor.actions[j].parts}
            for j in blocks[i]
        )


def test_a_floor_says_nothing_about_no_action_and_keeps_its_word_on_disk(screen):
    cells, features, fold = screen
    floor = ClosedForm().fit(fold.cells(cells, "train"), None)
    mean, std = floor.predict([Action(()), floor.actions[0]], ["LINE0", "LINE0"])
    assert (
        not mean[0].any()
        and (std[0] <= std[1] + 1e-9).all()
        and mean[1].any()
        and (std[1] > 0).all()
    )
    again = ClosedForm.from_state(*floor.state())
    assert np.allclose(
        again.predict(floor.actions, floor.contexts)[0],
        floor.predict(floor.actions, floor.contexts)[0],
        atol=1e-5,
    )
    # noqa: E712
    assert (
        LinearResponse().fit(fold.cells(cells, "train")).profile([Action(())], ["LINE0"]).any()
        == False
    )


def test_predictions_do_not_depend_on_order_and_survive_the_disk(model, screen, tmp_path):
    cells, features, fold = screen
    a, b = [n for n in fold.test if "+" not in n][:2]
    first = model.predict(cells, [a, f"{a}+{b}"])
    second = model.predict(cells, [f"{b}+{a}", a])
    assert first.n_obs == 4 and set(first.obs.cell_type) == {"LINE0", "LINE1"}
    for line in ("LINE0", "LINE1"):
        x, y = (p[(p.obs.cell_type == line).values] for p in (first, second))
        assert np.allclose(x.layers["delta"][[0, 1]], y.layers["delta"][[1, 0]], atol=1e-5)
    assert (first.layers["std"] > 0).all() and 0 <= model.gate <= 1 and model.stretch > 0
    assert (model.predict(cells, ["control"]).layers["delta"] == 0).all()
    loaded = BioJEPA.load(model.save(tmp_path / "m"))
    assert np.allclose(
        loaded.predict(cells, [a, f"{a}+{b}"]).layers["delta"], first.layers["delta"], atol=1e-5
    )
    assert np.array_equal(loaded.predict(cells, [a]).layers["std"] > 0, np.ones((2, 48), bool))


def test_the_support_is_one_for_seen_targets_and_less_for_others(model, screen):
    cells, features, fold = screen
    seen = fold.train[0]
    unseen = next(n for n in fold.test if fold.groups[n] == "unseen_gene")
    out = model.predict(cells, [seen, unseen], cell_type="LINE0").obs.support
    assert out.iloc[0] == 1 and 0 <= out.iloc[1] < 1


@contextmanager
def modes(*names):
    "Added modes, taken away again for the other tests."
    before = list(MODES)
    try:
        for n in names: add_mode(n)
        yield
    finally: MODES.names[:] = before


def rows_of(features, name, alias):
    return {s: f.loc[[name]].set_axis([alias]) for s, f in as_table(features).sources.items()}


def test_a_stranger_is_named_and_has_no_support(model, screen):
    cells, _, fold = screen
    seen = fold.train[0].split("+")[0]
    with pytest.warns(MissingFeatures, match="LINC01") as caught:
        out = model.predict(
            cells, ["LINC01", f"{seen}+LINC01", seen, "control"], cell_type="LINE0"
        ).obs
    assert (
        len(caught) == 1
        and out.support.tolist() == [0, 0, 1, 1]
        and out.missing.tolist() == ["LINC01: everything"] * 2 + ["", ""]
    )
    # a model without features is no reason to be silent
    bare = BioJEPA.fit(cells, fold, network=False, **TINY)
    gene = next(n for n in fold.test if fold.groups[n] == "unseen_gene")
    with pytest.warns(MissingFeatures, match=gene):
        assert bare.predict(cells, gene, cell_type="LINE0").obs.support.tolist() == [0]
    with (
        pytest.warns(MissingFeatures, match="fitted without"),
        pytest.warns(MissingFeatures, match="LINC01"),
    ):
        assert (
            bare.predict(
                cells, "LINC01", features=rows_of(screen[1], gene, "LINC01")
            ).obs.support.max()
            == 0
        )


def test_features_of_a_newcomer_are_used_without_training(model, screen, tmp_path):
    cells, features, fold = screen
    gene = next(n for n in fold.test if fold.groups[n] == "unseen_gene")
    seen = fold.train[0].split("+")[0]
    told = BioJEPA.fit(
        cells,
        fold,
        features={s: f.drop(index=gene) for s, f in as_table(features).sources.items()},
        seed=0,
        **TINY,
    )
    before = {k: v.clone() for k, v in told.model.state_dict().items()}
    given = {s: f.loc[[gene]] for s, f in as_table(features).sources.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = told.predict(cells, [gene, f"{gene}+{seen}"], cell_type="LINE0", features=given)
    # whose table had the gene from the start
    known = model.predict(cells, [gene, f"{gene}+{seen}"], cell_type="LINE0")
    assert (
        np.allclose(out.X, known.X, atol=1e-4)
        and np.allclose(out.layers["std"], known.layers["std"], atol=1e-4)
        and np.allclose(out.obs.support, known.obs.support, atol=1e-5)
    )
    assert all(
        torch.equal(v, before[k]) for k, v in told.model.state_dict().items()
    ) and told.table.missing([gene]) == [gene]
    again = BioJEPA.load(told.with_features(given).save(tmp_path))
    assert np.allclose(again.predict(cells, gene, cell_type="LINE0").X, out.X[:1], atol=1e-5)
    wide = {s: f.assign(more=0.) for s, f in given.items()}
    with pytest.raises(BadFeatures, match="columns"): told.predict(cells, gene, features=wide)
    with pytest.raises(BadFeatures, match=seen):
        told.predict(
            cells,
            gene,
            features={s: f.loc[[seen]] + 1 for s, f in as_table(features).sources.items()},
        )


@pytest.mark.filterwarnings("ignore:known in part", "ignore:the model was fitted without")
def test_a_guide_a_drug_and_a_gene_at_once():
    pytest.importorskip("rdkit", reason="needs the extra `molecules` (RDKit)")
    from biojepa.molecules import molecule_features
    from biojepa.nucleotides import kmer_profile
    raw = simulate(n_genes=40, n_perturbations=24, n_doubles=0, cells_per_perturbation=8, seed=2)
    rng = np.random.default_rng(0)
    targets = sorted(set(raw.obs.perturbation) - {"control"})
    guides = targets[:12]
    drugs = targets[12:]
    raw.obs["mode"] = np.where(raw.obs.perturbation.isin(drugs), "drug", "CRISPRi")
    cells = prepare(raw, n_genes=40, mode="mode")
    def spell(): return "".join(rng.choice(list("ACGT"), 20))
    def chain(i): return "C" * (i + 1) + "O" + "N" * (i % 3)
    features = {
        "guide": kmer_profile({g: spell() for g in guides}, 3),
        "Morgan": molecule_features({d: chain(i) for i, d in enumerate(drugs)}, progress=False)[
            "Morgan"
        ],
    }
    fold = split(cells, "simulation", seed=0)
    fitted = BioJEPA.fit(cells, fold, features=features, **TINY)
    more = {
        "guide": kmer_profile({"guide of LINC01": spell()}, 3),
        **molecule_features({"my drug": "CCCCON"}, progress=False),
    }
    names = ["guide of LINC01", "my drug", f"{fold.train[0]}+guide of LINC01+my drug"]
    with pytest.warns(MissingFeatures) as caught:
        out = fitted.predict(cells, names, mode={"my drug": "drug"}, features=more)
    text = " ".join(str(w.message) for w in caught)
    assert (
        "without properties" in text
        and "nothing is known" not in text
        and "no training action" not in text
    )
    assert (
        (out.obs.support > 0).all()
        and out.obs.missing.iloc[0] == "guide of LINC01: Morgan"
        and np.isfinite(out.X).all()
    )
    part = fitted.predict(cells, names[2].split("+")[::-1], mode={"my drug": "drug"}, features=more)
    # the worst part counts
    assert out.obs.support.iloc[2] == pytest.approx(part.obs.support.min(), abs=1e-6)


def test_a_source_that_lacks_a_target_is_named(screen):
    cells, features, fold = screen
    table = as_table(features).sources
    one = next(iter(table.values()))
    two = fold.train[0].split("+")[0]
    gene = next(n for n in fold.test if fold.groups[n] == "unseen_gene")
    part = BioJEPA.fit(
        cells, fold, features={"a": one, "b": one.drop(index=gene)}, network=False, **TINY
    )
    with pytest.warns(MissingFeatures, match=rf"{gene} \(not b\)"):
        out = part.predict(cells, [gene, two], cell_type="LINE0").obs
    assert out.missing.tolist() == [f"{gene}: b", ""] and out.support.iloc[0] > 0


def test_other_names_of_a_target(model, screen):
    cells, _, fold = screen
    gene = next(n for n in fold.test if fold.groups[n] == "unseen_gene")
    seen = fold.train[0].split("+")[0]
    symbols = Symbols(
        ["NEW", *model.genes], previous={"OLD": gene, seen: "NEW"}, aliases={"TWIN": [gene, seen]}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model.predict(cells, ["OLD", "NEW", "OLD+NEW"], symbols=symbols)
    assert (
        np.allclose(out.X, model.predict(cells, [gene, seen, f"{gene}+{seen}"]).X, atol=1e-5)
        and out.obs.perturbation.iloc[0] == "OLD"
    )
    with pytest.warns(MissingFeatures, match="say which"):
        assert model.predict(cells, "TWIN", symbols=symbols).obs.support.max() == 0


@pytest.mark.filterwarnings("ignore:no training action was of mode")
def test_a_mode_that_training_had_not(model, screen, tmp_path):
    cells, _, fold = screen
    seen = fold.train[0].split("+")[0]
    gene = next(n for n in fold.test if fold.groups[n] == "unseen_gene")
    plain = model.predict(cells, [seen, gene], cell_type="LINE0")
    with pytest.raises(BadAction, match="one of CRISPRi, .*add_mode"):
        model.predict(cells, seen, mode="editing")
    with pytest.warns(MissingFeatures, match="drug"):
        out = model.predict(cells, [f"{seen}+{gene}", gene], mode={gene: "drug"})
    assert (out.obs.support == 0).all()
    assert (
        model._action("B+A", {"B": "drug", "A": "CRISPRko"}, None)
        == Action.parse("B+A", ["drug", "CRISPRko"])
        == model._action("A+B", {"B": "drug", "A": "CRISPRko"}, None)
    )
    with modes("editing", "radiation"):
        with pytest.warns(MissingFeatures, match="editing"):
            new = model.predict(cells, seen, mode="editing", cell_type="LINE0")
        assert new.obs.support.tolist() == [0] and np.isfinite(new.X).all()
        # what was known is as it was
        assert np.array_equal(model.predict(cells, [seen, gene], cell_type="LINE0").X, plain.X)
        for p in model.model.predictor.modules():
            # as if trained since
            if isinstance(p, ActionTokens): torch.nn.init.normal_(p.gate.weight[-2:])
        model.gate, gate = 1.0, model.gate
        said = [
            model.predict(cells, seen, mode=m, cell_type="LINE0").X
            for m in ("editing", "radiation", "CRISPRi")
        ]
        assert not np.allclose(said[0], said[1], atol=1e-7)
        model.save(tmp_path)
    # another program, another order
    with modes("radiation"):
        again = BioJEPA.load(tmp_path)
        assert list(MODES)[-2:] == ["radiation", "editing"]
        for m, x in zip(("editing", "radiation", "CRISPRi"), said):
            assert np.allclose(
                again.predict(cells, seen, mode=m, cell_type="LINE0").X, x, atol=1e-6
            )
    model.gate = gate


def test_cells_of_an_added_mode_train_a_model(screen):
    raw = simulate(n_genes=30, n_perturbations=12, n_doubles=0, cells_per_perturbation=8, seed=1)
    with pytest.raises(BadCells, match="add_mode"):
        prepare(raw, n_genes=30, mode=raw.obs.assign(m="editing").m)
    with modes("editing"):
        cells = prepare(raw, n_genes=30, mode="editing")
        fold = split(cells, "simulation", seed=0)
        fitted = BioJEPA.fit(cells, fold, features=simulated_features(cells), **TINY)
        assert (
            set(fitted.modes.values()) == {"editing"}
            and fitted._action(fold.test[0], None, None).parts[0].mode == "editing"
        )
        for p in fitted.model.predictor.modules():
            if isinstance(p, ActionTokens): assert len(p.mode.weight) == len(MODES)
        assert fitted.predict(cells, fold.test[0]).obs.support.iloc[0] > 0


def test_hours_are_those_of_training_unless_given(screen, tmp_path):
    cells, features, fold = screen
    timed = cells.copy()
    timed.obs.loc[timed.obs.perturbation != "control", "time"] = 24.
    fitted = BioJEPA.fit(timed, fold, features=features, **TINY)
    with torch.no_grad():
        for p in fitted.model.predictor.modules():
            if isinstance(p, ActionTokens): torch.nn.init.normal_(p.time.weight)
    fitted.gate = 1.0
    name = fold.test[0]
    again = BioJEPA.load(fitted.save(tmp_path))
    said = {t: again.predict(timed, name, time=t).X for t in (None, 24, 0)}
    assert (
        fitted.time == 24
        and np.array_equal(said[None], said[24])
        and not np.allclose(said[24], said[0], atol=1e-7)
    )
    assert np.allclose(
        said[24],
        fitted.moments(timed, [Action.parse(name, time=24)] * 2, ["LINE0", "LINE1"])[0],
        atol=1e-5,
    )


def test_dose_time_and_mode_of_each_part(model, screen):
    cells, _, fold = screen
    a, b = [n for n in fold.train if "+" not in n][:2]
    def say(**how): return model.predict(cells, f"{b}+{a}", cell_type="LINE0", **how).X
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.allclose(say(), say(dose={a: 1.0}), atol=1e-6) and np.allclose(
            say(dose={a: 0.0, b: 0.0}), 0, atol=1e-6
        )
        assert not np.allclose(say(dose={a: 0.3}), say(dose={b: 0.3}), atol=1e-5)
        assert np.array_equal(
            say(mode="drug+CRISPRa"), say(mode={a: "CRISPRa", b: "drug"})
        ) and np.array_equal(say(time=24), say(time={a: 24, b: 24}))
        assert np.array_equal(say(dose=[0.3, 2.0]), say(dose={b: 0.3, a: 2.0})) and np.array_equal(
            say(mode=["drug", "CRISPRa"]), say(mode="drug+CRISPRa")
        )
        with pytest.warns(MissingFeatures, match=f"{a}X is near .*{a}"):
            model.predict(cells, f"{a}X")


@pytest.mark.parametrize(
    "how, says",
    [
        (dict(dose={"KLF1": 2}), "dose of 'KLF1', which is no part of what is asked for"),
        (dict(time={"A+B": 2}), "time of 'A.B', which is no part"),
        (dict(mode="drug+CRISPRi"), "2 values .* for 1 parts of 'GENE"),
        (dict(mode={"KLF1": "drug"}), "mode of 'KLF1'"),
        (dict(dose=[1, 2]), "2 values"),
        (dict(dose="high"), "dose 'high' is not a number"),
        (dict(time="noon"), "time 'noon' is not a number"),
    ],
)
def test_doses_times_and_modes_that_fit_nothing_are_named(model, screen, how, says):
    cells, _, fold = screen
    with pytest.raises(BadAction, match=says):
        model.predict(cells, next(n for n in fold.train if "+" not in n), **how)


def test_a_structure_as_a_name_is_refused_before_anything_is_said(model, screen):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadAction, match="cut a bracket in two"):
            model.predict(screen[0], "C[N+](C)C")


def test_genes_and_drugs_at_once():
    raw = simulate(
        n_genes=48, n_perturbations=12, n_drugs=6, doses=(1.0,), cells_per_perturbation=10, seed=3
    )
    gene = next(n for n in raw.obs.perturbation if n.startswith("GENE"))
    both = raw[:10].copy()
    both.obs_names = [f"both{i}" for i in range(10)]
    both.obs["perturbation"], both.obs["mode"] = f"DRUG1+{gene}", "drug+CRISPRi"
    joined = anndata.concat([raw, both])
    joined.uns = raw.uns
    fold = Split(
        "unseen_gene",
        0,
        tuple(
            n
            for n in sorted({*raw.obs.perturbation, f"DRUG1+{gene}"})
            if n not in ("control", "DRUG2", "DRUG3")
        ),
        ("DRUG3",),
        ("DRUG2",),
        {"DRUG2": "unseen_gene", "DRUG3": "unseen_gene"},
    )
    def fit():
        return BioJEPA.fit(
            prepare(joined, n_genes=48),
            fold,
            features=simulated_features(raw),
            network=False,
            **TINY,
        )
    model = fit()
    cells = prepare(joined, n_genes=48)
    assert model.modes[gene] == "CRISPRi" and model.modes["DRUG1"] == "drug"
    out = model.predict(cells, [f"DRUG2+{gene}", f"DRUG1+{gene}"])
    assert np.isfinite(out.X).all() and (out.obs.support > 0).all()
    # a weak guide teaches as a low dose does
    joined.obs["efficiency"] = np.where(joined.obs.perturbation == gene, 0.25, np.nan)
    assert not np.allclose(fit().predict(cells, gene).X, model.predict(cells, gene).X, atol=1e-4)


def test_refusals_name_what_is_wrong(model, screen, tmp_path):
    cells, features, fold = screen
    with pytest.raises(BadCells, match="LINE9"):
        model.predict(cells, [fold.test[0]], cell_type="LINE9")
    with pytest.raises(BadCells, match=cells.var_names[0]):
        model.predict(cells[:, 1:].copy(), [fold.test[0]])
    with pytest.raises(FileNotFoundError, match="model.json"): BioJEPA.load(tmp_path)
    from biojepa.featurizers import as_table
    everyone = as_table(features).fit([n for n in fold.test if "+" not in n])
    with pytest.raises(Leak): BioJEPA.fit(cells, fold, features=everyone, **TINY)
    BioJEPA.fit(cells, fold, features=features, out=tmp_path / "run", **TINY)
    with pytest.raises(ValueError, match="other settings"):
        BioJEPA.fit(cells, fold, features=features, seed=5, out=tmp_path / "run", **TINY)


def test_collapse_is_named(screen):
    "Without what keeps cells apart, with the student as its own teacher and a high rate."
    cells, features, fold = screen
    inviting = dict(steps=60, batch=16, vicreg_weight=0.0, momentum=0.0, momentum_end=0.0, lr=1e-2)
    with pytest.warns(Collapse, match=r"pretraining collapsed by step \d+: .* raise vicreg_weight"):
        BioJEPA.fit(cells, fold, features=features, **TINY | dict(pretraining=inviting))


def test_a_fit_keeps_the_ranks_of_both_stages(screen):
    cells, features, fold = screen
    # the last: a part of the genes per step
    for options in ({}, dict(preset="v0_3"), dict(training=TINY["training"] | dict(genes=20))):
        with warnings.catch_warnings():
            warnings.simplefilter("error", Collapse)
            history = BioJEPA.fit(cells, fold, features=features, **TINY | options).history
        for stage in ("pretraining", "training"):
            ranks = history[stage]["rank"].dropna()
            assert ranks.index[0] == 0 and len(ranks) > 1 and np.isfinite(ranks).all(), stage
        assert (
            history["pretraining"]["rank"].iloc[0] > 1
            and (history["pretraining"].spread.dropna() > 0).all()
        )


def test_the_network_can_be_all_or_nothing(screen):
    cells, features, fold = screen
    alone = BioJEPA.fit(cells, fold, features=features, network=False, **TINY)
    assert alone.gate == 0 and not alone.history
    bare = BioJEPA.fit(cells, fold, features=features, closed_form=False, **TINY)
    name = [n for n in fold.test if "+" not in n][0]
    change = bare.predict(cells, [name], cell_type="LINE0").layers["delta"][0]
    assert bare.closed_form is None and bare.gate == 1 and change.any()
    # nobody to show it to
    assert BioJEPA.fit(cells, replace(fold, val=()), features=features, **TINY).gate == 0


def test_a_network_is_let_in_only_when_validation_gains_clearly():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(24, 60))
    floor = np.zeros((24, 60))
    centre = rng.normal(size=60)
    knows = 2*truth + rng.normal(size=truth.shape)
    assert 0.3 < network_share(knows, floor, truth, centre) < 0.5
    assert (
        network_share(-knows, floor, truth, centre) == 0
        and network_share(floor, floor, truth, centre) == 0
    )
    # one name is no proof
    assert network_share(knows[:1], floor[:1], truth[:1], centre) == 0
    # two names carry the regression, the others lose
    lucky = np.where(np.arange(24)[:, None] < 2, 9*truth, rng.normal(size=truth.shape))
    assert network_share(lucky, 0.9*truth, truth, 0*centre) == 0


@few
@given(st.integers(0, 10**6))
def test_centred_correlation_is_what_it_says(seed):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(3, 20))
    b = rng.normal(size=(3, 20))
    c = rng.normal(size=20)
    direct = np.mean([np.corrcoef(x - c, y - c)[0, 1] for x, y in zip(a, b)])
    assert np.isclose(centred_correlation(a, b, c), direct)
    assert (
        np.isclose(centred_correlation(c + 2 * (b - c), b, c), 1)
        and centred_correlation(np.tile(c, (3, 1)), b, c) == 0
    )


def test_splits_of_a_real_screen_judge_every_single_once(screen):
    cells = screen[0]
    splits = real_splits(cells, 0)
    singles = {n for n in cells.obs.perturbation if n != "control" and "+" not in n}
    tested = [n for s in splits[:5] for n in s.test if "+" not in n]
    assert (
        sorted(tested) == sorted(singles)
        and len(splits) == 6
        and all("+" in n for n in splits[5].test)
    )


@few
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4]))
def test_folded_attention_is_the_attention_that_is_written_out(seed, heads):
    from biojepa.attention import linear_attention
    from biojepa.predictor import PartAttention, Spread
    torch.manual_seed(seed)
    P = 3
    G = 7
    A = 2
    K = 3
    D = 8
    gene = torch.randn(1, G, D)
    change = torch.randn(P, G, D)
    tokens = torch.randn(P, A, K, D)
    strength = torch.rand(P, A)
    seen = torch.rand(P, A, K) > 0.3
    seen[..., 0] = True
    def cut(x): return x.unflatten(-1, (heads, -1))
    with torch.no_grad():
        listen = PartAttention(D, heads)
        spread = Spread(D, heads)
        q, k, v = (
            cut(x)
            for x in (listen.q(gene) + listen.q_change(change), listen.k(tokens), listen.v(tokens))
        )
        score = torch.einsum("pghd,pakhd->phgak", q, k) / (D // heads) ** 0.5
        share = (
            score.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
            * strength[:, None, None, :, None]
        )
        plain = listen.out(torch.einsum("phgak,pakhd->pghd", share, v).flatten(2))
        torch.testing.assert_close(
            listen(gene, change, tokens, seen, strength), plain, atol=1e-5, rtol=1e-4
        )
        q, k, v = (
            cut(x).transpose(1, 2) for x in (spread.q(gene), spread.k(gene), spread.v(change))
        )
        torch.testing.assert_close(
            spread(gene, change),
            spread.out(linear_attention(q, k, v).transpose(1, 2).flatten(2)),
            atol=1e-5,
            rtol=1e-4,
        )


def test_sixteen_bits_are_enough_for_a_step(screen):
    cells, features, fold = screen
    losses = {}
    for precision in ("float32", "bfloat16"):
        less = {
            **TINY,
            "pretraining": {**TINY["pretraining"], "precision": precision},
            "training": {**TINY["training"], "precision": precision},
        }
        losses[precision] = BioJEPA.fit(cells, fold, features=features, seed=0, **less).history
    for stage in ("pretraining", "training"):
        a, b = (losses[p][stage].loss.to_numpy() for p in losses)
        assert np.allclose(a, b, rtol=0.05) and not np.array_equal(a, b)


def test_of_an_unknown_target_the_floor_says_what_all_share(screen):
    cells, _, fold = screen
    seen = fold.cells(cells, "train")
    # one line: no other kernel says what is shared
    seen = seen[(seen.obs.cell_type == "LINE0").values].copy()
    floor = ClosedForm(use_response=False).fit(seen, None)
    unseen = next(n for n in fold.test if fold.groups[n] == "unseen_gene")
    answer = floor.predict([Action.parse(unseen)], ["LINE0"])[0][0]
    assert np.corrcoef(answer, floor.truth.mean(0))[0, 1] > 0.7


def test_a_prediction_is_the_floor_plus_the_gated_network_with_a_stretched_doubt(model, screen):
    cells, _, fold = screen
    name = next(n for n in fold.test if fold.groups[n] == "unseen_gene")
    other = copy.copy(model)
    other.gate, other.stretch = 0.7, 1.5
    out = other.predict(cells, [name], cell_type="LINE0")
    action = model._action(name, None, None)
    mean, std = model.closed_form.predict(
        [action], ["LINE0"], control_means(cells, ["LINE0"])
    )
    change = model.change(cells, encode_actions([action], model.genes, model.table), ["LINE0"])
    assert np.abs(change).max() > 1e-4
    assert np.allclose(out.layers["delta"], mean + 0.7 * change, atol=1e-5) and np.allclose(
        out.layers["std"], 1.5 * std, rtol=1e-4
    )


@pytest.fixture(scope="module")
def three_lines():
    cells = prepare(
        simulate(n_genes=60, n_perturbations=30, cells_per_perturbation=15, cell_types=3, seed=2),
        n_genes=60,
    )
    return cells, split(cells, "unseen_context", context="LINE2", seed=0)


def test_a_new_line_is_answered_by_what_carries_over(three_lines, tmp_path):
    cells, fold = three_lines
    model = BioJEPA.fit(
        cells, fold, features=simulated_features(cells), network=False, progress=False
    )
    assert (
        set(model.closed_form.new_lines.lines) == set(model.closed_form.contexts)
        and "LINE2" not in model.closed_form.contexts
    )
    # learned on the validation line
    assert model.closed_form.new_lines.typical_distance > 0 and model.closed_form.new_lines.share != .5
    there, home = (
        model.predict(cells, fold.test, c) for c in ("LINE2", model.closed_form.contexts[0])
    )
    assert there.layers["std"].mean() > home.layers["std"].mean()
    own = np.array([[g == n for g in cells.var_names] for n in fold.test])
    model.closed_form.new_lines.share = 0.0
    silent = model.predict(cells, fold.test, "LINE2").layers["delta"]
    assert not silent[~own].any() and np.allclose(silent[own], there.layers["delta"][own])
    assert np.allclose(
        BioJEPA.load(model.save(tmp_path)).predict(cells, fold.test, "LINE2").layers["std"],
        model.predict(cells, fold.test, "LINE2").layers["std"],
        atol=1e-6,
    )


def test_doses_between_those_measured_are_covered():
    raw = simulate(
        n_genes=100,
        n_perturbations=30,
        n_drugs=20,
        doses=(0.1, 1.0, 10.0),
        cells_per_perturbation=20,
        seed=1,
    )
    cells = prepare(raw, n_genes=100)
    drugs = [f"DRUG{i}" for i in range(20)]
    fold = split(cells, "unseen_gene", seed=0)
    drugs = [d for d in drugs if d in fold.train]
    model = BioJEPA.fit(
        cells, fold, features=simulated_features(cells), network=False, progress=False
    )
    assert set(model.closed_form.mode_variance) == {"CRISPRi", "drug"} and not np.array_equal(
        model.closed_form.extra[3], model.closed_form.extra[1]
    )
    sizes = []
    for dose in (.3, 3.):
        out = model.predict(cells, drugs, dose=dose)
        truth = true_effects(cells, drugs, dose=dose, guide_failure=.1).values
        assert .75 < (np.abs(out.layers["delta"] - truth) < 1.645 * out.layers["std"]).mean() < 1
        sizes.append(np.linalg.norm(out.layers["delta"], axis=1))
    assert (sizes[1] > sizes[0]).all()                                            # more does more


def test_without_a_line_to_learn_from_half_carries_over():
    cells = prepare(
        simulate(n_genes=60, n_perturbations=30, cells_per_perturbation=15, cell_types=2, seed=2),
        n_genes=60,
    )
    fold = split(cells, "unseen_context", context="LINE1", seed=0)
    new_lines = BioJEPA.fit(cells, fold, network=False, progress=False).closed_form.new_lines
    assert new_lines.share == .5 and not new_lines.typical_distance


def test_nine_of_ten_held_out_effects_lie_in_the_interval(model, screen):
    cells, _, fold = screen
    floor = model.closed_form
    noise = np.asarray(effects(fold.cells(cells, "train")).layers["sem"])
    inside = np.abs(floor.truth - floor.held_out) <= 1.6449 * model.stretch * np.sqrt(
        floor.held_out_std**2 + noise**2
    )
    assert inside.mean() >= 0.9 - 1e-3


CLOSED = TINY | dict(network=False)


def test_a_run_folder_knows_its_data(screen, tmp_path):
    cells, features, fold = screen
    how = dict(features=features, seed=0, out=tmp_path / "m") | TINY
    first = BioJEPA.fit(cells, fold, **how)
    again = BioJEPA.fit(cells, fold, **how)
    for a, b in zip(first.model.state_dict().values(), again.model.state_dict().values()):
        assert torch.equal(a, b)
    other = cells.copy()
    other.X, other.layers["counts"] = other.X[:, ::-1].copy(), other.layers["counts"][:, ::-1].copy()
    timed = cells.copy()
    timed.obs["time"] = 24.0
    longer = TINY["training"] | dict(steps=9)
    for says, c, s, change in (
        ("other cells", other, fold, {}),
        ("other cells", timed, fold, {}),
        ("other split: simulation, seed 1", cells, split(cells, "simulation", seed=1), {}),
        ("other features", cells, fold, dict(features=features.iloc[::-1].set_axis(features.index))),
        ("option training.steps: 9, was 8", cells, fold, dict(training=longer)),
        ("option seed: 5, was 0", cells, fold, dict(seed=5)),
        ("option closed_form_options", cells, fold, dict(closed_form_options=dict(rank=3))),
    ):
        with pytest.raises(ValueError, match=says): BioJEPA.fit(c, s, **how | change)
    (tmp_path / "m" / "settings.json").unlink()
    with pytest.raises(ValueError, match="no settings.json"): BioJEPA.fit(cells, fold, **how)


def test_the_former_name_of_the_closed_form_is_understood(screen):
    cells, features, fold = screen
    with pytest.warns(FutureWarning, match="closed_form="):
        assert BioJEPA.fit(cells, fold, floor=False, **TINY).closed_form is None
    with pytest.raises(TypeError, match="ceiling"): BioJEPA.fit(cells, fold, ceiling=1, **TINY)


def test_fit_checks_the_split(screen):
    cells, features, fold = screen
    leaky = replace(fold, train=(*fold.train, fold.test[0]))
    with pytest.raises(Leak): BioJEPA.fit(cells, leaky, **CLOSED)


@pytest.fixture(scope="module")
def dosed():
    raw = simulate(
        n_genes=40, n_perturbations=16, n_drugs=6, doses=(0.1, 1.0, 10.0), cells_per_perturbation=12, seed=0
    )
    cells = prepare(raw, n_genes=40)
    cells.obs.loc[cells.obs.perturbation != "control", "time"] = 24.0
    fold = split(cells, seed=0)
    return cells, fold, BioJEPA.fit(cells, fold, features=simulated_features(raw), **CLOSED)


def test_support_falls_outside_of_what_was_trained(dosed):
    cells, fold, model = dosed
    drug = next(n for n in fold.train if n.startswith("DRUG"))
    def support(**how):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model.predict(cells, drug, **how).obs.support.iloc[0]
    assert support() == support(dose=3) == support(dose=10) == support(time=24) == 1
    assert 1 > support(dose=30) > support(dose=100) > support(dose=1000) and support(dose=1000) < 0.2
    assert 1 > support(time=48) > support(time=720) and support(dose=1e-3) < 0.5
    with pytest.warns(UserWarning, match="dose 1000 of .* outside .*0.1 to 10"):
        model.predict(cells, drug, dose=1000)
    with pytest.warns(UserWarning, match="time 720"): model.predict(cells, drug, time=720)
    for odd in (np.nan, np.inf, -1, 1e7):
        with pytest.raises(ValueError, match="dose"): model.predict(cells, drug, dose=odd)
    for odd in (np.inf, -1, 1e7):
        with pytest.raises(ValueError, match="time"): model.predict(cells, drug, time=odd)


def test_expression_stays_within_what_it_can_be(dosed):
    cells, fold, model = dosed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for out in (
            model.predict(cells, [*fold.train, *fold.test]),
            model.predict(cells, [n for n in fold.train if n.startswith("DRUG")], dose=1000),
        ):
            assert out.layers["mean"].min() >= 0 and out.layers["mean"].max() <= np.log1p(1e4) + 1e-5


def test_support_falls_with_the_distance_of_the_context(dosed):
    cells, fold, model = dosed
    other = cells.copy()
    other.X, other.layers["counts"] = other.X[:, ::-1].copy(), other.layers["counts"][:, ::-1].copy()
    with pytest.warns(UserWarning, match="far from those of training"):
        assert model.predict(other, fold.train[0]).obs.support.iloc[0] < 0.5
    part = cells[np.arange(cells.n_obs) % 2 == 0].copy()
    assert model.predict(part, fold.train[0]).obs.support.iloc[0] > 0.9
    again = BioJEPA.__new__(BioJEPA)
    again.__dict__.update(model.__dict__)
    assert again.context_support(cells, ["LINE0"]) == {"LINE0": 1.0}


def test_names_that_cannot_be_meant_are_one_sentence(model, screen):
    cells = screen[0]
    for names in ([], None, [float("nan")], [7], [""], 3):
        with pytest.raises(ValueError, match="perturbation|label"): model.predict(cells, names)


def test_a_stranger_after_one_perturbation_has_a_spread(screen):
    cells, _, fold = screen
    one = fold.train[0].split("+")[0]
    few = cells[cells.obs.perturbation.isin(["control", one]).values].copy()
    alone = BioJEPA.fit(few, Split("unseen_gene", 0, (one,), (), ()), **CLOSED)
    with pytest.warns(MissingFeatures):
        out = alone.predict(few, ["anything"], cell_type="LINE0")
    seen = alone.predict(few, [one], cell_type="LINE0")
    assert out.obs.support.iloc[0] == 0
    assert (out.layers["std"] > 0.5 * np.sqrt(np.mean(seen.X**2))).all()


@pytest.fixture
def whole_model(screen):
    "A fit of its own: other tests add modes to the shared one."
    cells, features, fold = screen
    return BioJEPA.fit(cells, fold, features=features, seed=0, **TINY)


def test_a_model_says_what_it_is(whole_model, screen, tmp_path):
    model = whole_model
    cells, _, fold = screen
    text = repr(model)
    for word in ("base", "fitted", "48 genes", f"{len(fold.train)} perturbations seen", "share"):
        assert word in text
    facts = model.predict(cells, fold.train[:1]).uns["biojepa"]
    assert facts["answers"] == model.what_answers() and facts["network_share"] == model.gate
    assert "loaded" in repr(BioJEPA.load(model.save(tmp_path)))


def rewritten(folder, **change):
    "The same model with other facts, as if it had been saved so."
    arrays, facts = read_model(folder)
    write_model(folder, arrays, facts | change)


def test_a_damaged_model_is_refused_in_one_sentence(whole_model, tmp_path):
    model = whole_model
    whole = model.save(tmp_path / "m")
    weights, text = ((whole / n).read_bytes() for n in ("model.safetensors", "model.json"))
    rng = np.random.default_rng(0)
    def refused(says="model"):
        with pytest.raises(BadModel, match=says) as e: BioJEPA.load(whole)
        assert str(whole) in str(e.value) and "\n" not in str(e.value) and "again" in str(e.value)
    for _ in range(20):
        flipped = bytearray(weights)
        flipped[rng.integers(len(weights))] ^= 1 << rng.integers(8)
        (whole / "model.safetensors").write_bytes(flipped)
        refused("sha256")
    for data in (b"", weights[:1000], b"PK\x03\x04" * 9):
        (whole / "model.safetensors").write_bytes(data)
        refused("sha256")
    (whole / "model.safetensors").unlink()
    refused("missing")
    (whole / "model.safetensors").write_bytes(weights)
    for data in (b"", b"[]", b"{}", b"[" * 100_000, b"\xff\xfe", text[:-20], text.replace(b'"gate": ', b'"gate": 1')):
        (whole / "model.json").write_bytes(data)
        refused()
    (whole / "model.json").write_bytes(text)
    for change in (
        dict(gate=float("nan")), dict(gate=1.5), dict(stretch=float("inf")), dict(stretch=1e308),
        dict(config={}), dict(genes=None), dict(mode_names=None), dict(trained=3), dict(split=[1]),
        dict(config=json.loads(text)["config"] | dict(n_genes=10**10)),
        dict(config=json.loads(text)["config"] | dict(layers=10**9)),
        dict(config=json.loads(text)["config"] | dict(width=32)),
    ):
        rewritten(whole, **change)
        refused()
        model.save(whole)
    arrays, facts = read_model(whole)
    name = next(k for k in arrays if k.startswith("weights.") and arrays[k].dtype.kind == "f")
    for odd in (
        {k: v for k, v in arrays.items() if k != name},
        arrays | {name: arrays[name] * np.nan},
        {k: v for k, v in arrays.items() if k != "closed_form.mixed.alpha"},
    ):
        write_model(whole, odd, facts)
        refused()


def test_a_failed_write_leaves_the_old_model_whole(whole_model, tmp_path, monkeypatch):
    model = whole_model
    whole = model.save(tmp_path / "m")
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    def full(*_): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr("os.replace", full)
        with pytest.raises(OSError): model.save(whole)
    assert before == {p.name: p.read_bytes() for p in whole.iterdir()}


@pytest.mark.parametrize("sep, label, ours", [("+", "(+)-JQ1", "(plus)-JQ1"), (None, "A+B", "A plus B")])
def test_a_label_with_a_plus_is_understood_as_it_was_written(sep, label, ours):
    "Features, split, predict, dose and scorecard take the label of the file and our name for it alike."
    from biojepa.scorecard import scorecard
    raw = simulate(n_genes=48, n_perturbations=16, cells_per_perturbation=12, seed=3)
    first = sorted(set(raw.obs.perturbation) - {"control"})[0]
    raw.obs["perturbation"] = raw.obs.perturbation.astype(str).replace({first: label})
    cells = prepare(raw, n_genes=48, sep=sep)
    names = sorted(set(cells.obs.perturbation) - {"control"})
    assert ours in names
    written = [label if n == ours and sep else n for n in names]
    features = pd.DataFrame(np.random.default_rng(0).normal(size=(16, 4)), index=written)
    rest = [n for n in written if n not in (label, ours)]
    asked = label if sep else ours
    fold = Split("by hand", 0, (asked, *rest[6:]), (), tuple(rest[:6]))
    model = BioJEPA.fit(cells, fold, features=features, network=False, progress=False)
    assert ours in fold.train and not model.table.missing([ours])
    dose = {label: 1.0} if sep else 1.0
    one, two = (model.predict(cells, [n], dose=dose) for n in (label, ours))
    assert np.array_equal(one.layers["delta"], two.layers["delta"]) and one.obs.support.iloc[0] == 1
    held = Split("by hand", 0, tuple(rest[6:]), (), (asked, *rest[:6]))
    with pytest.raises(ValueError, match=r"does not say how .* is held out"): scorecard(cells, held, {}, "none")
    held = replace(held, groups=dict.fromkeys((asked, *rest[:6]), "unseen_gene"))
    effect = effects(cells).to_df().rename(index={ours: asked})
    card = scorecard(cells, held, {"perfect": effect}, "none", metrics=["mse"], n_boot=20)
    assert card.table.value.abs().max() < 1e-6


def test_names_without_cells_are_warned_of():
    cells = prepare(simulate(n_genes=48, n_perturbations=12, cells_per_perturbation=12, seed=3), n_genes=48)
    fold = split(cells, seed=0)
    with pytest.warns(UserWarning, match="1 of .* training names have no cell here, such as 'NOPE'"):
        BioJEPA.fit(cells, replace(fold, train=(*fold.train, "NOPE")), network=False, progress=False)


JOINT = {k: v for k, v in TINY.items() if k != "pretraining"}
GENE_SETS = (
    Path(os.environ.get("BIOJEPA_DATA", Path(__file__).resolve().parents[2] / "shared")) / "priors/genesets"
)


@pytest.fixture(scope="module")
def programmes(screen):
    genes = list(screen[0].var_names)
    return {f"programme {k}": genes[4 * k : 4 * k + 5] for k in range(9)}


@pytest.fixture(scope="module")
def numbered(screen, programmes):
    return BioJEPA.fit(screen[0], screen[2], preset="v0_1", gene_sets=programmes, **JOINT)


def test_v01_repeats_what_it_has_seen_and_refuses_the_rest(numbered, screen, tmp_path):
    cells, _, fold = screen
    answer = numbered.predict(cells, list(fold.train[:2]), cell_type="LINE0")
    assert np.isfinite(answer.X).all() and np.isfinite(answer.layers["std"]).all()
    assert "pretraining" not in numbered.history
    with warnings.catch_warnings():
        warnings.simplefilter("error")                            # one sentence, no warning before it
        with pytest.raises(BadAction, match="has no number: preset v0_1 answers only the"):
            numbered.predict(cells, [fold.test[0]])
    numbered.save(tmp_path)
    again = BioJEPA.load(tmp_path)
    assert np.allclose(again.predict(cells, list(fold.train[:2]), cell_type="LINE0").X, answer.X, atol=1e-6)
    pd_frame = again.pathway_attention(cells)
    assert pd_frame.equals(numbered.pathway_attention(cells))
    with pytest.raises(ValueError, match="has no pretraining"):
        BioJEPA.fit(cells, fold, preset="v0_1", pretraining=dict(steps=3), **JOINT)


def test_v01_trains_all_its_parts_together(screen):
    cells, _, fold = screen
    out = BioJEPA.fit(cells, fold, preset="v0_1", **{**JOINT, "model": dict(TINY["model"], pathways=6)})
    config = out.model.config
    start = build(config, 0)
    moved = {k for k, v in out.model.state_dict().items() if not torch.equal(v.cpu(), start.state_dict()[k])}
    assert {"student.pathways", "student.identity.weight", "teacher.encoder.pathways"} <= moved
    assert config.perturbations == fold.train and "begun at random" in out.what_answers()


@pytest.mark.parametrize("preset", ["v0_2", "v0_1"])
def test_pathways_begin_from_gene_sets_and_keep_their_names(preset, screen, programmes, tmp_path):
    cells, _, fold = screen
    how = {**JOINT, "training": dict(steps=0), "gene_sets": programmes}
    if preset == "v0_2": how["pretraining"] = dict(steps=0)
    out = BioJEPA.fit(cells, fold, preset=preset, out=tmp_path, **how)
    start = pathway_matrix(programmes, cells.var_names)
    assert np.array_equal(out.student.pathways.detach().numpy(), start.to_numpy())
    assert np.array_equal(out.teacher.encoder.pathways.numpy(), start.to_numpy())
    attention = BioJEPA.load(tmp_path).pathway_attention(cells, "LINE1", layer=0)
    assert list(attention) == list(attention.index) == list(programmes)
    assert np.allclose(attention.sum(1), 1, atol=1e-5)
    with pytest.raises(ValueError, match="other gene sets"):
        BioJEPA.fit(cells, fold, preset=preset, out=tmp_path, **{**how, "gene_sets": {**programmes,
            "programme 0": list(cells.var_names[5:9])}})
    few_sets = {**how, "model": dict(TINY["model"], pathways=2)}
    assert BioJEPA.fit(cells, fold, preset=preset, **few_sets).model.config.pathways == 2


@pytest.mark.parametrize(
    "preset, sets, says",
    [
        ("v0_2", {"drugs": ["aspirin"]}, "no gene of the 1 gene sets .*'aspirin'.* is among the 48 genes"),
        ("v0_2", {"drugs": []}, "the set 'drugs' has no genes: leave it out"),
        ("v0_1", {"drugs": "GENE1"}, "the set 'drugs' is 'GENE1': give a list"),
        ("base", {"one": ["GENE1"]}, "preset 'base' has no pathway tokens"),
        ("v0_1", "a\t-\tGENE1\na\t-\tGENE2\n", "the set 'a' stands twice .line 2."),
        ("v0_1", "gene,set\n", "line 1, has no tab: a GMT file has"),
    ],
)
def test_gene_sets_that_cannot_start_a_model_are_named(preset, sets, says, screen, tmp_path):
    if isinstance(sets, str):
        (tmp_path / "sets.gmt").write_text(sets)
        sets = tmp_path / "sets.gmt"
    with pytest.raises(BadGeneSets, match=says):
        BioJEPA.fit(screen[0], screen[2], preset=preset, gene_sets=sets, out=tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.skipif(not GENE_SETS.exists(), reason="set BIOJEPA_DATA to the folder of the real extracts")
def test_real_gene_sets_become_pathways():
    hallmark = read_gene_sets(GENE_SETS / "h.all.v7.0.symbols.gmt")
    reactome = read_gene_sets(GENE_SETS / "ReactomePathways.gmt")
    assert (len(hallmark), len(reactome)) == (50, 2444)
    genes = sorted({g for members in hallmark.values() for g in members})[::2] + ["NOSUCHGENE"]
    start = pathway_matrix(hallmark, genes)
    assert list(start) == list(hallmark) and not start.loc["NOSUCHGENE"].any()
    assert start.loc[[g for g in genes if g in hallmark["HALLMARK_HYPOXIA"]], "HALLMARK_HYPOXIA"].all()
    assert pathway_matrix(reactome, genes, most=1024).shape == (len(genes), 1024)


def test_no_network_is_trained_where_nobody_asks_for_one(screen):
    cells, features, fold = screen
    plain = BioJEPA.fit(cells, fold, features=features, progress=False)
    alone = BioJEPA.fit(cells, fold, features=features, network=False, progress=False)
    assert not plain.history and not plain.has_network and "none was trained" in plain.what_answers()
    names = list(fold.test[:3])
    np.testing.assert_array_equal(plain.predict(cells, names).X, alone.predict(cells, names).X)
    # an option of the network asks for it; so does a preset that is one
    assert BioJEPA.fit(cells, fold, features=features, **TINY).has_network
    steps = {k: TINY[k] for k in ("pretraining", "training", "progress", "device")}
    assert BioJEPA.fit(cells, fold, "v0_3", model=TINY["model"], **steps).has_network


def test_fit_can_refuse_controls_of_another_kind(screen):
    cells, features, fold = screen
    moved = cells.copy()
    treated = (moved.obs.perturbation == fold.train[0]).to_numpy()
    moved.obs["batch"] = np.where(treated, "elsewhere", "here")
    with pytest.warns(UserWarning, match=fold.train[0].replace("+", r"\+")):
        BioJEPA.fit(moved, fold, features=features, **CLOSED)
    with pytest.raises(BadCells, match="add such controls"):
        BioJEPA.fit(moved, fold, features=features, fallback="refuse", **CLOSED)
    with pytest.raises(ValueError, match="fallback='no'"):
        BioJEPA.fit(moved, fold, features=features, fallback="no", **CLOSED)
