"""Does self-supervised pretraining know anything of wiring? Eight ways to pretrain the encoder of `base`, and what a closed form can make of the gene embeddings.

    python benchmarks/remedies.py                # seeds 101 to 103; about 40 minutes on one core; goes on where it stopped

Each embedding becomes the only feature source of the closed form, which weighs it on targets left out and judges on unseen genes: a linear probe for knowledge of perturbations.
Beside it the rank of the embeddings (exp of the entropy of their singular values), and how well the state of a set tells which perturbation it had, of those that no training saw. Writes benchmarks/remedies.csv."""
import csv, sys, warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

import biojepa as bj
from biojepa.effects import beyond, pearson_rows
from biojepa.cells import CONTROL, dense
from biojepa.effects import effects
from biojepa.losses import l1_latent, vicreg
from biojepa.model import build, configure
from biojepa.teacher import random_mask
from biojepa.sets import SetSampler
from biojepa.splits import folds
from biojepa.teacher import momentum_schedule

FIELDS = [
    "seed",
    "pretraining",
    "embedding",
    "pearson_delta",
    "pearson_pert",
    "weight",
    "rank",
    "tells_perturbation",
]
GENES = 256
STEPS = 400
BATCH = 32
MASK = 0.6
PROGRAMMES = 24
# what each way changes: cells per set, what is hidden together, what is predicted, what keeps
# embeddings apart
WAYS = {
    "single cells": {},
    "sets of 16": dict(m=16),
    "sets, expression (MAE)": dict(m=16, target="expression"),
    "sets, whole programmes hidden": dict(m=16, mask="programmes"),
    "sets, layers averaged (data2vec)": dict(m=16, target="layers"),
    "sets, SIGReg": dict(m=16, keep_apart="sigreg"),
    "sets, what differs from the mean": dict(m=16, target="change"),
    "sets, told the action (inverse dynamics)": dict(m=16, told=True),
}


def sigreg(z, generator, directions=64):
    """Distance of random projections from a standard normal, by characteristic functions
    (Balestriero and LeCun 2025)."""
    d = torch.randn(z.shape[1], directions, generator=generator)
    t = torch.linspace(-3, 3, 17)
    normal = torch.exp(-t**2 / 2)
    angle = (z @ (d / d.norm(dim=0)))[:, :, None] * t
    return (((angle.cos().mean(0) - normal)**2 + angle.sin().mean(0)**2) * normal).mean() * len(z)

def reference(model, sampler, X, m):
    "The z-scores that the encoder reads: for sets by the spread of set means."
    spread = (
        torch.cat([sampler.batch(i, 64).treated.mean(1) for i in range(6)]).std(0).clamp(min=0.02)
        if m > 1
        else torch.tensor(X.std(0)).clamp(min=0.1)
    )
    for encoder in (model.student, model.teacher.encoder):
        encoder.embed.mean.copy_(torch.tensor(X.mean(0)))
        encoder.embed.sd.copy_(spread)

def hide(way, labels, genes, n, i, generator):
    if way != "programmes": return random_mask(n, genes, MASK, generator)
    order = np.concatenate(
        [np.flatnonzero(labels == c) for c in np.random.default_rng(i).permutation(PROGRAMMES)]
    )
    hidden = np.sort(order[:round(MASK * genes)])
    visible = np.sort(order[round(MASK * genes):])
    return torch.tensor(visible).expand(n, -1), torch.tensor(hidden).expand(n, -1)

def layers_of(encoder, x, total):
    "The mean over blocks of normalised outputs."
    h = encoder.embed(x, total)
    genes = h.shape[1]
    out = 0
    h = torch.cat([h, encoder.summary.expand(len(x), -1, -1)], 1)
    for block in encoder.blocks: h = block(h); out = out + F.layer_norm(h[:, :genes], h.shape[-1:])
    return out / len(encoder.blocks)

def pretrained(
    seen, seed, steps, m=1, mask="random", target="latent", keep_apart="vicreg", told=False
):
    model = build(configure("base", seen.n_vars, width=64, layers=2), seed)
    sampler = SetSampler(seen, m=m, seed=seed)
    reference(model, sampler, dense(seen[(seen.obs.perturbation == CONTROL).values].X), m)
    E = effects(seen).X
    labels = KMeans(PROGRAMMES, n_init=3, random_state=0).fit_predict(
        ((E - E.mean(0)) / (E.std(0) + 1e-3)).T
    )
    head = torch.nn.Linear(64, 1)
    action = torch.nn.Linear(64, len(sampler.groups))
    weights = [
        p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("predictor")
    ] + [*head.parameters(), *action.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=1e-3, weight_decay=.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 1e-3, total_steps=max(steps, 20), pct_start=0.1
    )
    for i in range(steps):
        generator = torch.Generator().manual_seed(1000003 * seed + i)
        if m == 1:
            x, total = sampler.cell_batch(i, BATCH)
        else:
            batch = sampler.batch(i, BATCH)
            x, total, x0, total0 = (
                v.mean(1)
                for v in (batch.treated, batch.treated_total, batch.control, batch.control_total)
            )
        visible, hidden = hide(mask, labels, seen.n_vars, BATCH, i, generator)
        tokens, summary = model.student(x, total, visible)
        said = model.masked_predictor(tokens, summary, model.student.identity(hidden))
        if target == "expression":
            z = ((x - model.student.embed.mean) / model.student.embed.sd).clamp(-8, 8)
            loss = F.smooth_l1_loss(head(said)[..., 0], z.gather(1, hidden))
        else:
            with torch.no_grad():
                latents = (
                    layers_of(model.teacher.encoder, x, total)
                    if target == "layers"
                    else model.teacher(x, total)
                )
                if target == "change":
                    latents = latents - latents.mean(0, keepdim=True)
                    latents = latents / (latents.std() + 1e-6)
            loss = l1_latent(said, latents.gather(1, hidden[..., None].expand_as(said)))
        cell = summary.mean(1)
        loss = loss + .1 * (vicreg(cell) if keep_apart == "vicreg" else sigreg(cell, generator))
        # which of the training actions leads from the control state to the treated one?
        if told:
            change = model.student(x, total)[1].mean(1) - model.student(x0, total0)[1].mean(1)
            loss = loss + F.cross_entropy(action(change), batch.group)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.)
        optimiser.step()
        schedule.step()
        model.teacher.update(model.student, momentum_schedule(i, steps, .99, 1.0))
    return model

@torch.no_grad()
def asked(model, seen, unseen, m):
    """Gene embeddings: identity, and token in control cells; the rank of the tokens; balanced
    accuracy of a linear probe for the 20 strongest held-out perturbations, from sets of 8
    cells."""
    control = seen[(seen.obs.perturbation == CONTROL).values][:256]
    def tensors(cells):
        return (
            torch.tensor(dense(cells.X)),
            torch.tensor(cells.obs.log_total.values.astype(np.float32)),
        )
    x, total = tensors(control)
    if m > 1: x, total = x.mean(0, keepdim=True), total.mean(0, keepdim=True)
    token = model.teacher.encoder(x, total)[0].mean(0).numpy()
    s = np.linalg.svd(token - token.mean(0), compute_uv=False)
    s = s / s.sum()
    strong = effects(unseen)
    strong = strong.obs.perturbation[np.argsort(-(strong.X**2).sum(1))[:20]]
    states = []
    who = []
    for n in strong:
        own, total = tensors(unseen[(unseen.obs.perturbation == n).values])
        own, total = (
            (own[:40].unflatten(0, (5, 8)).mean(1), total[:40].unflatten(0, (5, 8)).mean(1))
            if m > 1
            else (own[:40], total[:40])
        )
        cell = model.teacher.encoder(own, total)[1].mean(1).numpy()
        states.append(cell if m > 1 else cell.reshape(5, 8, -1).mean(1))
        who += [n] * 5
    states = np.concatenate(states)
    told = cross_val_score(
        LogisticRegression(max_iter=2000),
        (states - states.mean(0)) / (states.std(0) + 1e-6),
        who,
        cv=5,
    ).mean()
    return (
        {"identity": model.student.identity.weight.numpy(), "token": token},
        float(np.exp(-(s * np.log(s + 1e-12)).sum())),
        told,
    )

def judged(cells, split, frame):
    "What the closed form says of unseen genes with these embeddings as its only features."
    own = split.mask(cells, "test") | (cells.obs.perturbation == CONTROL).values
    truth = effects(cells[own])
    centre = effects(split.cells(cells, "train")).X.mean(0)
    # let in without having to earn it: a probe should see little things
    with patch("biojepa.prior.CLEAR", -np.inf):
        model = bj.BioJEPA.fit(cells, split, features=frame, network=False, progress=False)
    said = model.predict(cells, list(truth.obs.perturbation)).layers["delta"]
    return dict(
        pearson_delta=f"{pearson_rows(said, truth.X).mean():.4f}",
        pearson_pert=f"{pearson_rows(beyond(said, centre), truth.X - centre).mean():.4f}",
        weight=f"{model.closed_form.prior.weights[0]:.2f}",
    )

def correlations(X, n=32):
    "Leading directions of the correlation of genes."
    C = np.corrcoef((X - X.mean(0)).T + 1e-9 * np.random.default_rng(0).normal(size=X.T.shape))
    np.fill_diagonal(C, 0)
    u, s, _ = np.linalg.svd(C)
    return u[:, :n] * s[:n]

def main(seeds):
    warnings.filterwarnings("ignore")
    path = Path(__file__).parent/"remedies.csv"
    done = set()
    if path.exists():
        with open(path) as f: done = {(r["seed"], r["pretraining"]) for r in csv.DictReader(f)}
    with open(path, "a", newline="") as f:
        out = csv.DictWriter(f, FIELDS)
        if not done: out.writeheader()
        def write(**row): out.writerow(row); f.flush(); print(row, flush=True)
        for seed in seeds:
            cells = bj.prepare(
                bj.simulate(
                    n_genes=GENES, n_perturbations=200, cells_per_perturbation=40, seed=seed
                ),
                n_genes=GENES,
            )
            split = folds(cells, 5, seed=seed)[0]
            seen = split.cells(cells, "train")
            unseen = cells[split.mask(cells, "test") | (cells.obs.perturbation == CONTROL).values]
            def frame(v): return pd.DataFrame(v, index=list(cells.var_names))
            def todo(name): return (str(seed), name) not in done
            for name, features in {
                "no embedding": None,
                "the simulator's features": bj.simulated_features(cells),
            }.items():
                if todo(name): write(seed=seed, pretraining=name, **judged(cells, split, features))
            plain = {
                "co-expression of control cells": dense(
                    seen[(seen.obs.perturbation == CONTROL).values].X
                ),
                "co-response to training perturbations": effects(seen).X,
            }
            for name, X in plain.items():
                if todo(name):
                    write(
                        seed=seed,
                        pretraining=name,
                        embedding="components",
                        **judged(cells, split, frame(correlations(np.asarray(X, float)))),
                    )
            for name, way in {"none": None, **WAYS}.items():
                if not todo(name): continue
                model = pretrained(seen, seed, 0 if way is None else STEPS, **(way or {}))
                embeddings, rank, told = asked(model, seen, unseen, (way or {}).get("m", 1))
                for kind, v in embeddings.items():
                    write(
                        seed=seed,
                        pretraining=name,
                        embedding=kind,
                        rank=f"{rank:.1f}",
                        tells_perturbation=f"{told:.3f}",
                        **judged(cells, split, frame(v)),
                    )


if __name__ == "__main__": main([int(x) for x in sys.argv[1:]] or (101, 102, 103))
