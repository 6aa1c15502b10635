"""The ladder: every version of the model, and every baseline, on perturbations that nobody chose.

    python benchmarks/ladder.py closed_form          # closed form, its terms, all baselines: simulator (1,000 genes, five folds, three seeds) and real screens
    python benchmarks/ladder.py network          # networks with each part off, without the closed form: simulator and Norman (256 genes, singles and pairs), three seeds
    python benchmarks/ladder.py choice           # what a part costs the network where settings may be chosen: simulated seeds 101 to 103
    python benchmarks/ladder.py pretraining      # with and without pretraining, from 25 to 200 training perturbations and from 300 to 6,000 control cells

Writes benchmarks/ladder_STAGE.csv, one row per perturbation, and goes on where it stopped. Real screens need BIOJEPA_DATA."""
import csv, os, sys, time, warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import anndata
import numpy as np
import torch

import biojepa as bj
from biojepa.effects import beyond, pearson_rows
from biojepa.cells import CONTROL, dense
from biojepa.effects import effects
from biojepa.demo import real_splits
from biojepa.learned_baselines import ALL_BASELINES
from biojepa.featurizers import as_table
from biojepa.losses import effect_loss, inverse_dynamics
from biojepa.metrics import Case
from biojepa.ranks import rank
from biojepa.predictor import ActionTokens, Predictor
from biojepa.splits import Split, folds, split
from biojepa.training import action_loss_base

FIELDS = [
    "stage",
    "data",
    "seed",
    "fold",
    "name",
    "perturbation",
    "group",
    "pearson_delta",
    "pearson_pert",
    "rmse",
    "size",
    "std",
    "covered",
    "gate",
    "seconds",
    "rank",
]
DATA = Path(os.environ.get("BIOJEPA_DATA", Path(__file__).parents[2]/"shared"))
SOURCES = [DATA/f"priors/features/{n}.npz" for n in ("go_svd_128", "string_svd_128")]


def simulator(n_genes, n_perturbations, n_doubles, seed, n_controls=None):
    cells = bj.prepare(
        bj.simulate(
            n_genes=n_genes,
            n_perturbations=n_perturbations,
            n_doubles=n_doubles,
            cells_per_perturbation=40,
            n_controls=n_controls,
            seed=seed,
        ),
        n_genes=n_genes,
    )
    return cells, bj.simulated_features(cells)

def norman(n_genes=500):
    raw = anndata.read_h5ad(DATA/"data/norman19_mcfaline23/devel.h5ad")
    cells = bj.prepare(
        raw[(raw.obs.dataset == "norman19").values].copy(),
        "condition",
        kind="log1p",
        mode="CRISPRa",
        total="ncounts",
        n_genes=n_genes,
    )
    return cells, SOURCES

def papalexi():
    raw = anndata.read_h5ad(DATA/"data/papalexi21/papalexi_thp1_299genes.h5ad")
    return bj.prepare(
        raw, control="non-targeting", drop=["unassigned"], batch="bio_rep", mode="CRISPRko"
    ), SOURCES

def shuffled(features, seed=0):
    "The same features under other names: what is left of a score does not come from them."
    table = as_table(features)
    rng = np.random.default_rng(seed)
    return {k: v.set_axis(rng.permutation(v.index), axis=0) for k, v in table.sources.items()}


FLOOR = dict(network=False)
TERMS = {
    "one penalty for all directions": ("priors.MANY", 10**9),
    "features always let in": ("priors.CLEAR", -np.inf),
    "mean never shrunk": ("priors.SHARES", (1.0,)),
    "nothing of a target's own": ("readout.RATIOS", np.array([1e-12])),
}
TERMS = {n: FLOOR | dict(instead=i) for n, i in TERMS.items()} | {
    "parts added": FLOOR | dict(closed_form_options=dict(use_interactions=False))
}
STAGES = {
    "closed_form": {
        "base, closed form": FLOOR,
        "no features": FLOOR | dict(features=None),
        "no wiring": FLOOR | dict(closed_form_options=dict(use_response=False)),
        "neither": FLOOR | dict(features=None, closed_form_options=dict(use_response=False)),
        "features shuffled": FLOOR | dict(features=shuffled),
        **TERMS,
        **{f"baseline: {n}": n for n in ALL_BASELINES if n != "copy_source"},
    }
}

# parts that have no option: what stands in their place
def one_token(self, *args, told=ActionTokens.forward):
    """Every token of a part is the mean of those that are there, so attention has nothing to
    choose from."""
    tokens, seen, strength = told(self, *args)
    here = seen[..., None].to(tokens)
    return (
        ((tokens * here).sum(2, keepdim=True) / here.sum(2, keepdim=True).clamp(min=1)).expand_as(
            tokens
        ),
        seen,
        strength,
    )

def no_target(self, context, identity, action, generator=None, stream=Predictor.stream):
    "Nobody says which gene is hit."
    return stream(
        self,
        context,
        identity,
        replace(action, target=torch.full_like(action.target, -1)),
        generator,
    )

def untied(self, context, identity, action, generator=None, stream=Predictor.stream):
    "Every gene sees the mean of all tokens in place of its own."
    return stream(
        self, context.mean(-2, keepdim=True).expand_as(context), identity, action, generator
    )

def unweighted(guess, delta, centre, weight):
    return effect_loss(guess, delta, centre, torch.ones_like(weight))

def told(
    model, batch, actions, target, config, generator, line=None, genes=None, loss=action_loss_base
):
    """Inverse dynamics into the encoder:

    two halves of a set, and only they, should show the change of the same action.
    """
    parts = loss(model, batch, actions, target, config, generator, line, genes)
    half = batch.treated.shape[1] // 2
    halves = [
        model.context(batch.treated[:, cut], batch.treated_total[:, cut], genes=genes)
        - model.context(batch.control[:, cut], batch.control_total[:, cut], genes=genes)
        for cut in (slice(half), slice(half, None))
    ]
    return parts | {"inverse": inverse_dynamics(*(h.mean(1) for h in halves), batch.group)}

ALONE = dict(closed_form=False)
STAGES["network"] = {
    "base": {},
    "network alone": ALONE,
    "no pretraining": ALONE | dict(pretraining=dict(steps=0)),
    "no latent term": ALONE | dict(training=dict(nll_weight=0.0)),
    "single cells (m = 1)": ALONE | dict(training=dict(cells=1)),
    "features shuffled": ALONE | dict(features=shuffled),
    "v0_3": dict(preset="v0_3"),
    "VICReg on changes": ALONE | dict(training=dict(vicreg_weight=0.1)),
    "encoder trained on": ALONE | dict(training=dict(freeze=False)),
    "no noise on features": ALONE | dict(model=dict(feature_noise=0.0)),
    "v0_2": dict(preset="v0_2"),
    "base, closed form": FLOOR,
    "inverse dynamics": ALONE | dict(training=dict(inverse_weight=0.1)),
    "energy distance": ALONE | dict(training=dict(energy_weight=1.0)),
    "no target-gene token": ALONE | dict(instead=("predictor.Predictor.stream", no_target)),
    "one action token": ALONE | dict(instead=("predictor.ActionTokens.forward", one_token)),
    "tokens not tied to their own gene": ALONE
    | dict(instead=("predictor.Predictor.stream", untied)),
    "effect loss unweighted": ALONE | dict(instead=("training.effect_loss", unweighted)),
    "pairs in two steps": ALONE | dict(rollout=True),
    "encoder trained on, told the action": ALONE
    | dict(
        training=dict(freeze=False, inverse_weight=0.1), instead=("training.action_loss_base", told)
    ),
}
STAGES["network"] |= {f"base, closed form: {n}": o for n, o in TERMS.items()}
COSTLY = (
    "network alone",
    "no latent term",
    "encoder trained on",
    "effect loss unweighted",
    "single cells (m = 1)",
    "tokens not tied to their own gene",
    "no pretraining",
)
STAGES["choice"] = {n: STAGES["network"][n] for n in COSTLY} | {
    "encoder trained on, unweighted": STAGES["network"]["effect loss unweighted"]
    | STAGES["network"]["encoder trained on"]
}
PRETRAINED = (0, 160) # steps
STAGES["pretraining"] = {
    f"{n} perturbations, {k} steps of pretraining": ALONE
    | dict(few=n, controls=1200, pretraining=dict(steps=k))
    for n in (25, 50, 100, 200)
    for k in PRETRAINED
}
STAGES["pretraining"] |= {
    f"{n} control cells, {k} steps of pretraining": ALONE
    | dict(few=100, controls=n, pretraining=dict(steps=k))
    for n in (300, 6000)
    for k in PRETRAINED
}


def screens(stage):
    "(name, seed, fold, cells, features, split)"
    for seed in (101, 102, 103) if stage == "choice" else range(3):
        if stage == "closed_form":
            cells, features = simulator(1000, 300, 0, seed)
            for i, s in enumerate(folds(cells, 5, seed=seed)):
                yield "simulator", seed, i, cells, features, s
        else:
            cells, features = (
                simulator(256, 150, 50, seed)
                if stage != "pretraining"
                else simulator(256, 240, 0, seed, 6000)
            )
            yield (
                "simulator",
                seed,
                0,
                cells,
                features,
                folds(cells, 5, seed=seed)[0]
                if stage == "pretraining"
                else split(cells, "simulation", seed=seed),
            )
    if stage in ("pretraining", "choice") or not SOURCES[0].exists(): return
    if stage == "network":
        cells, features = norman(256)
        for seed in range(3):
            yield "norman", seed, 0, cells, features, split(cells, "simulation", seed=seed)
        return
    for name, read in (("norman", norman), ("papalexi", papalexi)):
        cells, features = read()
        for seed in range(3):
            for i, s in enumerate(real_splits(cells, seed)): yield name, seed, i, cells, features, s

def fewer(s, n):
    "The split with n training perturbations; validation and test stay."
    return (
        s
        if n is None
        else Split(
            s.kind,
            s.seed,
            tuple(np.random.default_rng(0).permutation(s.train)[:n]),
            s.val,
            s.test,
            s.groups,
        )
    )

def fewer_controls(cells, n):
    "All treated cells, and n of the untreated."
    untreated = np.flatnonzero((cells.obs.perturbation == CONTROL).values)
    return (
        cells
        if n is None
        else cells[
            np.setdiff1d(
                np.arange(cells.n_obs), np.random.default_rng(0).permutation(untreated)[n:]
            )
        ].copy()
    )

def observed(cells, s, part):
    own = s.mask(cells, part)
    return effects(cells[own | (cells.obs.perturbation == CONTROL).values])

def in_two_steps(model, cells, names):
    """A rollout: the state after the first gene is where the second one starts, in both orders;
    mean of the two."""
    out = model.predict(cells, names)
    untreated = cells[(cells.obs.perturbation == CONTROL).values]
    for i, (a, b) in ((i, n.split("+")) for i, n in enumerate(names) if "+" in n):
        both = []
        for first, second in ((a, b), (b, a)):
            step = model.predict(cells, [first]).layers["delta"]
            moved = anndata.AnnData(
                np.maximum(dense(untreated.X) + step, 0).astype(np.float32),
                obs=untreated.obs,
                var=untreated.var,
                uns=untreated.uns,
            )
            both.append(step + model.predict(moved, [second]).layers["delta"])
        out.layers["delta"][i] = np.mean(both, 0)[0]
    return out

def judge(cells, s, names, options, seed):
    "Predictions of one version for the test perturbations."
    names = list(names)
    if isinstance(options, str):
        return ALL_BASELINES[options]().fit(cells, s, FEATURES).answer(
            names, cells.obs.cell_type.iloc[0]
        ), None
    options = dict(options)
    few, controls, features, instead, rollout = (
        options.pop(k, v)
        for k, v in (
            ("few", None),
            ("controls", None),
            ("features", FEATURES),
            ("instead", None),
            ("rollout", False),
        )
    )
    cells = fewer_controls(cells, controls)
    with ExitStack() as other:
        if instead: other.enter_context(patch(f"biojepa.{instead[0]}", instead[1]))
        model = bj.BioJEPA.fit(
            cells,
            fewer(s, few),
            features=features(FEATURES) if callable(features) else features,
            seed=seed,
            progress=False,
            **options,
        )
        return in_two_steps(model, cells, names) if rollout else model.predict(
            cells, names
        ), model.gate


def main(stage):
    global FEATURES
    warnings.filterwarnings("ignore")
    done = set()
    out_file = Path(__file__).parent/f"ladder_{stage}.csv"
    if out_file.exists():
        with open(out_file) as f:
            done = {
                (r["stage"], r["data"], r["seed"], r["fold"], r["name"]) for r in csv.DictReader(f)
            }
    new = not out_file.exists()
    with open(out_file, "a", newline="") as f:
        write = csv.DictWriter(f, FIELDS)
        if new: write.writeheader()
        for data, seed, fold, cells, FEATURES, s in screens(stage):
            todo = [n for n in STAGES[stage] if (stage, data, str(seed), str(fold), n) not in done]
            if not todo: continue
            truth = observed(cells, s, "test")
            centre = effects(s.cells(cells, "train")).X.mean(0)
            hit = np.stack([cells.var_names.isin(n.split("+")) for n in truth.obs.perturbation])
            for name in todo:
                start = time.process_time()
                out, gate = judge(cells, s, truth.obs.perturbation, STAGES[stage][name], seed)
                seconds = time.process_time() - start
                guess, std = (
                    (out.layers["delta"], out.layers["std"])
                    if isinstance(out, anndata.AnnData)
                    else (np.asarray(out), None)
                )
                delta = pearson_rows(guess, truth.X)
                pert = pearson_rows(beyond(guess, centre), truth.X - centre)
                place = rank(Case(guess, truth.X, centre, hit)) if stage == "closed_form" else None
                rmse, size = (np.sqrt((x**2).mean(1)) for x in (guess - truth.X, guess))
                if std is not None:
                    covered = (
                        np.abs(guess - truth.X) < 1.645 * np.sqrt(std**2 + truth.layers["sem"] ** 2)
                    ).mean(1)
                    std = np.sqrt((std**2).mean(1))
                for i, p in enumerate(truth.obs.perturbation):
                    write.writerow(
                        dict(
                            stage=stage,
                            data=data,
                            seed=seed,
                            fold=fold,
                            name=name,
                            perturbation=p,
                            group=s.groups.get(p, s.kind),
                            pearson_delta=f"{delta[i]:.4f}",
                            pearson_pert=f"{pert[i]:.4f}",
                            rmse=f"{rmse[i]:.5f}",
                            size=f"{size[i]:.5f}",
                            **(
                                {}
                                if std is None
                                else dict(std=f"{std[i]:.5f}", covered=f"{covered[i]:.3f}")
                            ),
                            gate="" if gate is None else f"{gate:.2f}",
                            seconds=f"{seconds:.1f}",
                            **({} if place is None else dict(rank=f"{place[i]:.4f}")),
                        )
                    )
                f.flush()
                print(
                    data,
                    seed,
                    fold,
                    name,
                    f"{delta.mean():.3f} {pert.mean():.3f} {seconds:.0f} s",
                    flush=True,
                )


if __name__ == "__main__": main(sys.argv[1])
