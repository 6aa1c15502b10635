"Laws of the exported attention, encoder, teacher and losses, for sizes and numbers drawn at random."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy import stats

from biojepa.attention import (
    Block,
    CrossAttention,
    LinearAttention,
    MLP,
    linear_attention,
    softmax_attention,
)
from biojepa.adaptive_norm import GatedBlock, PredictorV01
from biojepa.encoder import Encoder, EncoderV03, GeneTokens, value_features
from biojepa.gene_sets import pathway_matrix
from biojepa.losses import (
    effect_loss,
    effective_rank,
    energy_distance,
    gaussian_nll,
    inverse_dynamics,
    l1_latent,
    vicreg,
    vicreg_flat,
)
from biojepa.seed_presets import EncoderV02, rotate
from biojepa.teacher import Teacher, momentum_schedule, random_mask

torch.set_num_threads(1)
few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10_000)
sizes = st.integers(1, 9)
close = torch.testing.assert_close


def count(module): return sum(p.numel() for p in module.parameters())


def qkv(seed, n, m, b=2, h=2, d=4):
    g = torch.Generator().manual_seed(seed)
    def r(k): return 3 * torch.randn(b, h, k, d, generator=g)
    return r(n), r(m), r(m), torch.rand(b, m, generator=g) < .6


def cells(seed, b=3, n=10):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(b, n, generator=g).mul(4).sub(2).clamp(min=0), 7 + torch.rand(b, generator=g)


def encoder(seed, n=10, d=8, layers=2, **kw):
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    return Encoder(n, d, 2, layers, **kw).set_reference(
        torch.rand(n, generator=g), torch.rand(n, generator=g)
    )


# attention

@few
@given(seeds, sizes, sizes)
def test_linear_attention_is_its_quadratic_form(seed, n, m):
    q, k, v, mask = qkv(seed, n, m)
    score = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2) * mask[:, None, None]
    share = score / score.sum(-1, keepdim=True)
    close(linear_attention(q, k, v, mask), torch.nan_to_num(share) @ v, atol=1e-4, rtol=1e-4)


@few
@given(seeds, sizes, sizes)
def test_masked_keys_are_absent_and_nobody_is_silence(seed, n, m):
    q, k, v, mask = qkv(seed, n, m)
    for attend in (linear_attention, softmax_attention):
        out = attend(q, k, v, mask)
        for b in range(2):
            if not mask[b].any():
                assert (out[b] == 0).all()
            else:
                close(
                    out[b : b + 1],
                    attend(q[b : b + 1], k[b : b + 1, :, mask[b]], v[b : b + 1, :, mask[b]]),
                    atol=1e-4,
                    rtol=1e-4,
                )


@few
@given(seeds, sizes)
def test_one_key_says_the_same_to_every_query(seed, n):
    q, k, v, _ = qkv(seed, n, 1)
    for attend in (linear_attention, softmax_attention):
        close(attend(q, k, v), v.expand_as(q), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width,heads", [(8, 2), (64, 4), (256, 4), (256, 8)])
def test_counts(width, heads):
    assert (
        count(LinearAttention(width, heads))
        == count(CrossAttention(width, heads))
        == 4 * width**2 + 4 * width
    )
    assert count(MLP(width)) == 8 * width**2 + 5 * width
    assert count(Block(width, heads)) == 12 * width**2 + 13 * width


def test_counts_of_the_seed():
    assert [count(m) for m in (LinearAttention(256, 4), MLP(256), Block(256, 4))] == [
        263_168,
        525_568,
        789_760,
    ]
    with torch.device("meta"): assert count(EncoderV03(5000, 256, 4, 6)) == 6_019_840


@few
@given(seeds, st.integers(2, 9))
def test_a_block_treats_tokens_as_a_set(seed, n):
    torch.manual_seed(seed)
    block = Block(8, 2)
    x = torch.randn(2, n, 8)
    order = torch.randperm(n)
    close(block(x)[:, order], block(x[:, order]))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="30.*4"): LinearAttention(30, 4)


# encoders

@few
@given(seeds)
def test_v03_faults_are_kept(seed):
    torch.manual_seed(seed)
    old = EncoderV03(10, 8, 2, 2)
    (x, total) = cells(seed)
    hidden = torch.rand(3, 10) < .5
    with torch.no_grad(): plain, guess = old(x, total), old(x, total, hidden)
    for b in range(3):
        for rows in (plain[b, x[b] == 0], guess[b, hidden[b]]):
            if len(rows) > 1: close(rows, rows[:1].expand_as(rows), atol=1e-5, rtol=0)


@few
@given(seeds)
def test_silent_genes_keep_their_names(seed):
    with torch.no_grad(): tokens = encoder(seed)(torch.zeros(1, 10), torch.tensor([5.]))[0][0]
    assert torch.pdist(tokens).min() > .05


@few
@given(seeds, st.integers(1, 10))
def test_the_order_of_visible_genes_does_not_matter(seed, k):
    model = encoder(seed)
    (x, total) = cells(seed)
    visible = torch.rand(3, 10).argsort(1)[:, :k]
    order = torch.randperm(k)
    with torch.no_grad():
        (a, s), (b, t) = model(x, total, visible), model(x, total, visible[:, order])
    close(a[:, order], b, atol=1e-4, rtol=1e-4)
    close(s, t, atol=1e-4, rtol=1e-4)


@few
@given(seeds, st.integers(1, 9))
def test_hidden_genes_have_no_say(seed, k):
    model = encoder(seed)
    (x, total) = cells(seed)
    visible, masked = random_mask(3, 10, (10 - k) / 10, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        a = model(x, total, visible)
        b = model(x.scatter(1, masked, 9.0), total, visible)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@few
@given(seeds)
def test_cells_do_not_hear_each_other(seed):
    model = encoder(seed)
    (x, total) = cells(seed)
    with torch.no_grad(): close(model(x[1:2], total[1:2])[0], model(x, total)[0][1:2])


def test_reference_is_stored_and_checked():
    a = encoder(1)
    b = encoder(2)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.embed.mean, b.embed.mean) and a.embed.sd.min() >= .1
    with pytest.raises(ValueError, match="10 genes"):
        GeneTokens(10, 8).set_reference(torch.zeros(9), torch.ones(9))
    with pytest.raises(ValueError, match="gene 3"):
        GeneTokens(10, 8).set_reference(np.where(np.arange(10) == 3, np.nan, 0), np.ones(10))


def test_z_scores_of_the_reference():
    x = cells(0, b=50)[0]
    z = value_features(x, x.mean(0), x.std(0))[..., 1]
    close(z.mean(0), torch.zeros(10), atol=1e-5, rtol=0)
    close(z.std(0), torch.ones(10))


# teacher

@few
@given(seeds, st.integers(2, 30), st.floats(.05, .95))
def test_masks_are_partitions(seed, n, fraction):
    def draw(): return random_mask(4, n, fraction, torch.Generator().manual_seed(seed))
    if not 0 < round(fraction * n) < n:
        with pytest.raises(ValueError): draw()
        return
    visible, masked = draw()
    assert masked.shape[1] == round(fraction * n) and torch.equal(masked, draw()[1])
    assert (torch.cat([visible, masked], 1).sort(1).values == torch.arange(n)).all()
    assert (visible.diff() > 0).all() and (masked.diff() > 0).all()


@few
@given(seeds, st.floats(0, 1), st.integers(1, 12))
def test_ema_closed_form(seed, m, steps):
    torch.manual_seed(seed)
    student = torch.nn.Linear(2, 3)
    teacher = Teacher(student, m)
    start = student.weight.detach().double()
    past = []
    for _ in range(steps):
        with torch.no_grad(): student.weight.normal_()
        past.append(student.weight.detach().double())
        teacher.update(student)
    expected = m**steps * start + (1 - m) * sum(m**(steps - 1 - i) * s for i, s in enumerate(past))
    close(teacher.encoder.weight.double(), expected, atol=1e-5, rtol=1e-5)


def test_teacher_is_frozen_and_normalised():
    student = encoder(0)
    teacher = Teacher(student).train()
    (x, total) = cells(0)
    y = teacher(x, total)
    assert (
        not teacher.encoder.training
        and not y.requires_grad
        and not any(p.requires_grad for p in teacher.parameters())
    )
    close(y.mean(-1), torch.zeros(3, 10), atol=1e-5, rtol=0)
    student.set_reference(torch.full((10,), .5), torch.ones(10))
    teacher.update(student, momentum=1.)
    assert torch.equal(teacher.encoder.embed.mean, student.embed.mean)
    with pytest.raises(ValueError): teacher.update(encoder(0, layers=1))


@given(st.integers(1, 300), st.floats(.5, 1), st.floats(.5, 1))
def test_schedule_stays_between_its_ends(total, a, b):
    path = [momentum_schedule(i, total, a, b) for i in range(total + 3)]
    assert (
        math.isclose(path[0], a)
        and (total == 1 or math.isclose(path[total - 1], b))
        and path[-1] == path[total]
    )
    assert all(min(a, b) - 1e-9 <= m <= max(a, b) + 1e-9 for m in path)


# losses

@few
@given(seeds, sizes)
def test_gaussian_nll_is_the_density(seed, n):
    m, s, t = torch.randn(3, n, generator=torch.Generator().manual_seed(seed))
    close(gaussian_nll(m, s, t), -torch.distributions.Normal(m, (s / 2).exp()).log_prob(t).mean())


def test_l1_leaves_the_target_alone():
    a = torch.randn(4, requires_grad=True)
    b = torch.randn(4, requires_grad=True)
    l1_latent(a, b).backward()
    assert b.grad is None and torch.equal(a.grad.abs(), torch.full((4,), .25))


@few
@given(seeds, st.integers(3, 9))
def test_identical_cells_cost_as_much_as_collapse(seed, n):
    tokens = torch.randn(1, 12, 6, generator=torch.Generator().manual_seed(seed)).expand(n, -1, -1)
    collapsed = vicreg(torch.zeros(n, 6))
    close(vicreg(tokens.mean(1)), collapsed, atol=1e-4, rtol=0)
    close(vicreg_flat(tokens), vicreg(tokens.flatten(0, 1)))
    with pytest.raises(ValueError): vicreg(tokens)


def test_vicreg_of_a_batch_in_any_order():
    z = torch.randn(20, 5)
    close(vicreg(z[torch.randperm(20)] + 3), vicreg(z))
    close(vicreg(z, z), vicreg(z))


@few
@given(seeds)
def test_effect_loss_between_perfect_and_no_skill(seed):
    g = torch.Generator().manual_seed(seed)
    delta, centre, w, unit = (
        torch.randn(3, 5, generator=g),
        torch.randn(5, generator=g),
        *torch.rand(2, 5, generator=g).add(0.1),
    )
    assert effect_loss(delta, delta, centre, w) == 0
    close(effect_loss(centre.expand(3, -1), delta, centre, w), torch.tensor(1.))
    half = (delta + centre) / 2
    close(effect_loss(half, delta, centre, w), torch.tensor(.25))
    close(effect_loss(half * unit, delta * unit, centre * unit, w / unit**2), torch.tensor(.25))


@few
@given(seeds, sizes, sizes)
def test_energy_distance_is_scipys(seed, n, m):
    g = np.random.default_rng(seed)
    a = g.normal(size=n)
    b = g.normal(size=m)
    ours = energy_distance(torch.tensor(a)[:, None], torch.tensor(b)[:, None]).item()
    assert abs(ours - stats.energy_distance(a, b)**2) < 1e-9 and ours > -1e-12


@few
@given(seeds, sizes, sizes)
def test_energy_distance_of_equal_sets_is_zero(seed, n, d):
    x = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    close(energy_distance(x, x.flip(1)), torch.zeros(2, dtype=torch.double), atol=1e-10, rtol=0)


def test_inverse_dynamics_without_and_with_skill():
    for n in (2, 5, 11):
        close(
            inverse_dynamics(torch.randn(n, 4), torch.ones(n, 4), torch.arange(n)).item(),
            math.log(n),
            atol=1e-4,
            rtol=0,
        )
        assert inverse_dynamics(torch.eye(n), torch.eye(n), torch.arange(n)) < .01
        assert inverse_dynamics(torch.randn(n, 4), torch.randn(n, 4), torch.zeros(n).long()) == 0


@few
@given(seeds, st.integers(1, 6))
def test_effective_rank_counts_directions(seed, k):
    torch.manual_seed(seed)
    z = (
        torch.linalg.qr(torch.randn(30, 6))[0][:, :k]
        @ torch.linalg.qr(torch.randn(9, 9))[0][:k]
        * 30**0.5
    )
    assert abs(effective_rank(z, centre=False) - k) < 1e-2
    assert effective_rank(torch.ones(30, 4) + 1e-6 * torch.randn(30, 4)) == 0


# the parts of v0.2 and v0.1


@few
@given(seeds, st.integers(0, 200), st.integers(1, 8))
def test_rotated_scores_depend_on_the_distance_alone(seed, shift, n):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(n, 8, generator=g)
    k = torch.randn(n, 8, generator=g)
    place = torch.arange(n)
    def scores(s): return rotate(q, place + s) @ rotate(k, place + s).T
    close(scores(shift), scores(0), atol=1e-3, rtol=1e-3)


@few
@given(seeds, st.integers(1, 9))
def test_closed_gates_are_the_identity(seed, n):
    torch.manual_seed(seed)
    block = GatedBlock(8, 2, n)
    x = torch.randn(2, n, 8)
    assert torch.equal(block(x, torch.randn(2, 8)), x)
    torch.nn.init.normal_(block.modulation[1].weight)
    assert (block(x, torch.randn(2, 8)) - x).abs().max() > 1e-3


@few
@given(seeds)
def test_the_predictor_of_numbers_tells_trained_ones_apart(seed):
    torch.manual_seed(seed)
    predictor = PredictorV01(3, 5, 8, 2, 1)
    context = torch.randn(1, 5, 8).expand(2, -1, -1)
    both = torch.tensor([1, 2])
    before = predictor(context, both)
    assert torch.equal(before[0], before[1])
    for block in predictor.blocks: torch.nn.init.normal_(block.modulation[1].weight)
    after = predictor(context, both)
    assert (after[0] - after[1]).abs().max() > 1e-3


@few
@given(seeds, st.integers(2, 12))
def test_genes_and_rows_of_the_matrix_may_be_shuffled_together(seed, n):
    torch.manual_seed(seed)
    names = [f"GENE{i}" for i in range(n)]
    sets = {"one": names[: n // 2 + 1], "two": names[n // 2 :]}
    def begun(order):
        return EncoderV02(n, 8, 2, 1, 2).set_pathways(
            pathway_matrix(sets, [names[i] for i in order])
        )
    order = torch.randperm(n)
    one = begun(range(n))
    other = begun(order.tolist())
    other.load_state_dict({**one.state_dict(), "pathways": other.pathways})
    with torch.no_grad(): other.identity.weight.copy_(one.identity.weight[order])
    x, total = cells(seed, n=n)
    close(other(x[:, order], total), one(x, total), atol=1e-4, rtol=1e-3)
    shares = one.attention(x, total)
    close(shares.sum(-1), torch.ones(3, 2))
