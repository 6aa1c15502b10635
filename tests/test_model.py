"Laws of the exported predictor and model, for sizes and actions drawn at random."
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from biojepa.cells import MODES
from biojepa.model import build, config_from_json, config_to_json, configure, count_parameters
from biojepa.perturbations import strength
from biojepa.predictor import MaskedPredictor, Predictor, PredictorV03, action_vector

torch.set_num_threads(1)
G = 12
D = 8
DIMS = (3, 2)
few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10_000)


@dataclass
class Batch:
    "The fields of an ActionBatch that the predictor reads."
    features: torch.Tensor
    present: torch.Tensor
    mode: torch.Tensor
    dose: torch.Tensor
    time: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor

    def map(self, f): return Batch(**{k: f(v) for k, v in self.__dict__.items()})


def actions(seed, n=3, parts=2):
    g = torch.Generator().manual_seed(seed)
    def integers(low, high): return torch.randint(low, high, (n, parts), generator=g)
    present = torch.rand(n, parts, len(DIMS), generator=g) < .7
    features = torch.randn(n, parts, sum(DIMS), generator=g) * present.repeat_interleave(
        torch.tensor(DIMS), -1
    )
    return Batch(features, present, integers(1, len(MODES)), torch.rand(n, parts, generator=g) * 3,
                 integers(0, 3).float(), integers(-1, G), torch.rand(n, parts, generator=g) < .8)


def setup(seed, layers=2):
    torch.manual_seed(seed)
    predictor = Predictor(G, D, 2, layers, DIMS)
    torch.nn.init.normal_(predictor.tokens.gate.weight)
    torch.nn.init.normal_(predictor.readout)
    return predictor.requires_grad_(False), torch.randn(1, G, D), torch.randn(G, D)


def close(a, b): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@few
@given(seeds)
def test_no_action_is_exactly_no_change(seed):
    predictor, context, identity = setup(seed)
    a = actions(seed)
    for nothing in (
        Batch(**{**a.__dict__, "mask": torch.zeros_like(a.mask)}),
        Batch(**{**a.__dict__, "dose": torch.zeros_like(a.dose)}),
    ):
        change = predictor(context, identity, nothing)
        assert (
            (change.mean == 0).all()
            and (change.delta == 0).all()
            and torch.isfinite(change.log_variance).all()
        )


@few
@given(seeds)
def test_parts_are_a_set_and_padding_is_nothing(seed):
    predictor, context, identity = setup(seed)
    a = actions(seed)
    delta = predictor(context, identity, a).delta
    close(predictor(context, identity, a.map(lambda v: v.flip(1))).delta, delta)
    junk = actions(seed + 1)
    junk.mask = torch.zeros_like(junk.mask)
    padded = Batch(**{k: torch.cat([v, getattr(junk, k)], 1) for k, v in a.__dict__.items()})
    close(predictor(context, identity, padded).delta, delta)


@few
@given(seeds)
def test_missing_source_is_never_read(seed):
    predictor, context, identity = setup(seed)
    a = actions(seed)
    noise = (
        10 * torch.randn(a.features.shape) * ~a.present.repeat_interleave(torch.tensor(DIMS), -1)
    )
    assert torch.equal(
        predictor(context, identity, Batch(**{**a.__dict__, "features": a.features + noise})).delta,
        predictor(context, identity, a).delta,
    )


@few
@given(seeds)
def test_genes_may_be_shuffled(seed):
    predictor, context, identity = setup(seed)
    a = actions(seed)
    order = torch.randperm(G, generator=torch.Generator().manual_seed(seed))
    delta = predictor(context, identity, a).delta
    predictor.readout.data = predictor.readout.data[order]
    place = torch.cat([order.argsort(), torch.tensor([-1])])      # -1 stays -1
    moved = Batch(**{**a.__dict__, "target": place[a.target]})
    close(predictor(context[:, order], identity[order], moved).delta, delta[:, order])


@few
@given(seeds)
def test_shared_context_equals_copies_and_actions_do_not_mix(seed):
    predictor, context, identity = setup(seed)
    a = actions(seed)
    delta = predictor(context, identity, a, latent=False).delta
    close(predictor(context.expand(3, -1, -1), identity, a).delta, delta)
    close(predictor(context, identity, a.map(lambda v: v[1:2])).delta, delta[1:2])


@few
@given(seeds)
def test_training_noise_is_a_function_of_the_generator(seed):
    predictor, context, identity = setup(seed)
    a = actions(seed, n=6)
    def draw(s): return torch.Generator().manual_seed(s)
    one, two, other = (predictor(context, identity, a, generator=draw(s)).delta for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    still = Batch(**{**a.__dict__, "mask": torch.zeros_like(a.mask)})
    assert (predictor(context, identity, still, generator=draw(1)).delta == 0).all()


def test_every_weight_of_the_predictor_learns():
    predictor, context, identity = setup(0)
    predictor.requires_grad_(True)
    change = predictor(context, identity, actions(3, n=8))
    sum(x.square().sum() for x in change).backward()
    assert [
        n for n, p in predictor.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ] == []


def test_interaction_is_of_second_order():
    predictor, context, identity = setup(1)
    a = actions(5)
    a.mask = torch.ones_like(a.mask)
    def miss(scale):
        b = Batch(**{**a.__dict__, "dose": torch.full_like(a.dose, 2 ** scale - 1)})
        both, one, two = (
            predictor(context, identity, x).delta
            for x in (b, b.map(lambda v: v[:, :1]), b.map(lambda v: v[:, 1:]))
        )
        return ((both - one - two).norm() / both.norm()).item()
    assert 1.5 < miss(.02) / miss(.01) < 2.5


def test_v03_counts_are_law():
    with torch.device("meta"):
        from biojepa.model import WorldModel
        model = WorldModel(configure("v0_3", n_genes=5000))
    assert (
        count_parameters(model.student) == 6_019_840
        and count_parameters(model.predictor) == 7_881_216
    )
    assert count_parameters(model.teacher) == 0 and model.masked_predictor is None


def test_v02_counts_are_law():
    with torch.device("meta"):
        from biojepa.model import WorldModel
        model = WorldModel(configure("v0_2", n_genes=5000))
    assert (
        count_parameters(model.student) == 11_139_584
        and count_parameters(model.predictor) == 6_853_632
    )
    assert count_parameters(model.teacher) == 0 and model.masked_predictor is None


def test_v01_counts_are_law():
    many = tuple(f"GENE{i}" for i in range(2057))
    with torch.device("meta"):
        from biojepa.model import WorldModel
        model = WorldModel(configure("v0_1", n_genes=5000, perturbations=many))
    assert (
        count_parameters(model.student) == 11_139_584
        and count_parameters(model.predictor) == 8_021_504
    )
    assert count_parameters(model.teacher) == 0 and model.masked_predictor is None


def test_v03_cross_attention_cannot_tell_genes_apart():
    torch.manual_seed(0)
    old = PredictorV03(G, D, 2, 1)
    context = torch.randn(2, G, D)
    vector = torch.randn(2, 320)
    old(context, vector)[0].square().sum().backward()
    cross = old.blocks[0].cross
    assert cross.q.weight.grad.norm() < 1e-4 * cross.v.weight.grad.norm()
    heard = cross(torch.randn(2, G, D), context=old.adapter(vector)[:, None])
    assert heard.std(1).max() < 1e-5


@pytest.mark.parametrize("width", [3, 5, 320])
def test_action_vector_has_its_width_and_ignores_order(width):
    a = actions(0)
    v = action_vector(a, width)
    assert v.shape == (3, width)
    close(action_vector(a.map(lambda x: x.flip(1)), width), v)
    close(action_vector(a, width), v)


def test_masked_predictor_answers_each_gene_by_itself():
    torch.manual_seed(0)
    guess = MaskedPredictor(D, 2, layers=2)
    tokens = torch.randn(2, 5, D)
    summary = torch.randn(2, 2, D)
    identity = torch.randn(2, 4, D)
    answer = guess(tokens, summary, identity)
    close(guess(tokens.flip(1), summary, identity[:, 1:3]), answer[:, 1:3])
    assert (answer[:, 0] - answer[:, 1]).norm() > .01


@pytest.mark.parametrize("preset", ["base", "v0_3", "v0_2", "v0_1"])
def test_build_is_seeded_and_config_survives(preset):
    config = configure(preset, n_genes=G, width=D, heads=2, layers=1, predictor_layers=1)
    before = torch.random.get_rng_state()
    one = build(config)
    two = build(config)
    other = build(config, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    assert config_from_json(config_to_json(config)) == config


@pytest.mark.parametrize("preset", ["base", "v0_3"])
def test_context_is_a_set_mean_and_both_presets_answer(preset):
    model = build(
        configure(
            preset, n_genes=G, width=D, heads=2, layers=1, predictor_layers=1, feature_dims=DIMS
        )
    )
    x = torch.rand(2, 5, G)
    total = torch.full((2, 5), 8.)
    with torch.no_grad():
        state = model.context(x, total)
        close(model.context(x.flip(1), total, chunk=3), state)
        change = model(state[:1], actions(0))
    assert change.mean.shape == (3, G, D) and (change.delta is None) == (preset == "v0_3")


@pytest.mark.parametrize(
    "bad", [dict(preset="v9"), dict(width=30), dict(preset="base", colour="red"),
            dict(preset="v0_2", pathway_names=("one",))]
)
def test_bad_configurations_are_refused(bad):
    with pytest.raises((ValueError, TypeError)): configure(**{"n_genes": G, **bad})


def test_without_features_targets_still_tell_actions_apart():
    torch.manual_seed(0)
    bare = Predictor(G, D, 2, 1)
    a = actions(0, parts=1)
    a.features = a.features[..., :0]
    a.present = a.present[..., :0]
    a.mode = a.mode * 0 + 1
    a.dose = a.dose * 0 + 1
    a.time = a.time * 0
    a.mask = a.mask | True
    a.target = torch.tensor([[0], [1], [1]])
    delta = bare(torch.randn(1, G, D), torch.randn(G, D), a).delta
    assert (delta[0] - delta[1]).abs().max() > 0 and torch.equal(delta[1], delta[2])


def test_strength_of_reference_dose_is_one():
    assert (strength(torch.tensor([0.0, 1.0, 1.0])) * torch.tensor([True, True, False])).tolist() == [
        0,
        1,
        0,
    ]


def test_pathways_start_with_columns_of_length_one():
    from biojepa.gene_sets import pathway_matrix
    start = pathway_matrix({"A": ["G0", "G1", "G2", "X"], "B": ["G3"]}, [f"G{i}" for i in range(5)])
    np.testing.assert_allclose((start**2).sum(), 1, rtol=1e-6)
    assert list(start.columns) == ["A", "B"] and not start.loc["G4"].any() and start.loc["G0", "A"] == start.loc["G2", "A"]
