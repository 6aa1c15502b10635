"""Pairs, a new cell line and doses: predictions of the closed form against the noise-free truth of simulated screens, beside the plain answers.

    python benchmarks/targets.py                 # all three; about twenty minutes on one core

Writes benchmarks/targets.csv, one row per perturbation and version. Nothing here chooses anything: settings come from other seeds."""
import csv, sys, warnings
from pathlib import Path

import numpy as np

import biojepa as bj
from biojepa.effects import pearson_rows
from biojepa.cells import CONTROL
from biojepa.effects import effects
from biojepa.learned_baselines import ALL_BASELINES
from biojepa.splits import Split, split

FIELDS = [
    "experiment",
    "seed",
    "fold",
    "group",
    "perturbation",
    "dose",
    "name",
    "rmse",
    "pearson_delta",
    "size",
    "nonadditive",
    "std",
    "covered",
    "share",
]
SINGLES = (
    "mean",
    "ridge",
    "linear",
    "kernel_ridge",
    "neighbours",
    "forest",
    "linear_response",
    "ridge_and_response",
)
FAILURE = 0.1 # share of guides that do nothing, as in the screens


def fit(cells, s, seed):
    return bj.BioJEPA.fit(
        cells, s, features=bj.simulated_features(cells), network=False, progress=False, seed=seed
    )

def rows_of(names, truth, guesses, **facts):
    """One row per perturbation and version; `guesses`:

    name -> effects [P, G], or (effects, their standard deviations).
    """
    for version, guess in guesses.items():
        guess, std = guess if isinstance(guess, tuple) else (guess, None)
        rmse = np.sqrt(((guess - truth)**2).mean(1))
        pearson = pearson_rows(guess, truth)
        for i, n in enumerate(names):
            row = {
                k: v[i] if isinstance(v, (list, np.ndarray)) else v for k, v in facts.items()
            } | dict(
                perturbation=n,
                name=version,
                rmse=f"{rmse[i]:.5f}",
                pearson_delta=f"{pearson[i]:.4f}",
                size=f"{np.sqrt((truth[i] ** 2).mean()):.5f}",
            )
            if std is not None:
                row |= dict(
                    std=f"{np.sqrt((std[i] ** 2).mean()):.5f}",
                    covered=f"{(np.abs(guess[i] - truth[i]) < 1.645 * std[i]).mean():.3f}",
                )
            yield row

def observed(cells, names, dose=None):
    "Measured effects of names [P, G], at one dose."
    o = effects(cells)
    place = {
        n: i
        for i, (n, d) in enumerate(zip(o.obs.perturbation, o.obs.dose))
        if dose is None or d == dose
    }
    return np.asarray(o.X, float)[[place[n] for n in names]]


def pairs(seed):
    cells = bj.prepare(
        bj.simulate(
            n_genes=512, n_perturbations=200, n_doubles=100, cells_per_perturbation=40, seed=seed
        ),
        n_genes=512,
    )
    s = split(cells, "simulation", seed=seed)
    names = [n for n in s.test if "+" in n]
    truth = bj.true_effects(cells, names, guide_failure=FAILURE).values.astype(float)
    genes = sorted({p for n in names for p in n.split("+")})
    alone = bj.true_effects(cells, genes, guide_failure=FAILURE)
    expected = np.stack([alone.loc[n.split("+")].values.sum(0) for n in names])
    odd = np.sqrt(((truth - expected)**2).sum(1) / (expected**2).sum(1))
    seen = [g for g in genes if g in s.train]
    measured = dict(zip(seen, observed(cells, seen)))
    guesses = {}
    line = cells.obs.cell_type.iloc[0]
    # observed singles where training has them, the baseline's where not
    for b in SINGLES:
        said = (
            dict(
                zip(
                    genes,
                    np.asarray(
                        ALL_BASELINES[b]()
                        .fit(cells, s, bj.simulated_features(cells))
                        .answer(genes, line),
                        float,
                    ),
                )
            )
            | measured
        )
        guesses[f"singles added: {b}"] = np.stack(
            [sum(said[p] for p in n.split("+")) for n in names]
        )
    model = fit(cells, s, seed)
    out = model.predict(cells, names)
    guesses["base, closed form"] = (out.layers["delta"], out.layers["std"])
    model.closed_form.interaction_weights[:] = 0
    guesses["base, parts added"] = model.predict(cells, names).layers["delta"]
    groups = np.array([s.groups[n] for n in names])
    half = np.zeros(len(names), int)
    for g in set(groups): half[groups == g] = odd[groups == g] > np.median(odd[groups == g])
    yield from rows_of(
        names,
        truth,
        guesses,
        experiment="pairs",
        seed=seed,
        fold=0,
        group=list(groups),
        nonadditive=half,
    )


def lines(seed):
    cells = bj.prepare(
        bj.simulate(
            n_genes=400, n_perturbations=120, cells_per_perturbation=30, cell_types=4, seed=seed
        ),
        n_genes=400,
    )
    for i in range(4):
        s = split(cells, "unseen_context", context=f"LINE{i}", seed=seed)
        names = list(s.test)
        seen = effects(s.cells(cells, "train"))
        truth = bj.true_effects(
            cells, names, cell_type=f"LINE{i}", guide_failure=FAILURE
        ).values.astype(float)
        model = fit(cells, s, seed)
        out = model.predict(cells, names, f"LINE{i}")
        source = np.stack(
            [np.asarray(seen.X)[(seen.obs.perturbation == n).values].mean(0) for n in names]
        )
        guesses = {
            "no change": 0 * truth,
            "mean": np.tile(np.asarray(seen.X).mean(0), (len(names), 1)),
            "copy of the source": source,
            "base, closed form": (out.layers["delta"], out.layers["std"]),
        }
        home = model.closed_form.contexts[0]
        share = model.closed_form.new_lines.share
        there = model.predict(cells, names, home)
        guesses["base, as at home"] = there.layers["delta"]
        yield from rows_of(
            names,
            truth,
            guesses,
            experiment="new line",
            seed=seed,
            fold=i,
            group=f"LINE{i}",
            share=f"{share:.2f}",
        )


def doses(seed, known=(0.1, 1.0, 10.0), between=(0.3, 3.0)):
    cells = bj.prepare(
        bj.simulate(
            n_genes=400,
            n_perturbations=80,
            n_drugs=40,
            doses=sorted(known + between),
            cells_per_perturbation=30,
            seed=seed,
        ),
        n_genes=400,
    )
    seen = cells[~cells.obs.dose.isin(between).values].copy()
    drugs = sorted(n for n in set(cells.obs.perturbation) if n.startswith("DRUG"))
    taught = tuple(sorted(set(seen.obs.perturbation) - {CONTROL}))
    # all of these doses teach
    model = fit(seen, Split("unseen_gene", seed, taught, (), (), {}), seed)
    at = {d: observed(seen, drugs, d) for d in known}
    x = np.log10(known)
    # per drug and gene
    line = np.polyfit(x, np.stack([at[d].ravel() for d in known]), 1)
    for d in sorted(known + between):
        low = max(k for k in known if k <= d)
        high = min(k for k in known if k >= d)
        w = 0 if low == high else np.log(d / low) / np.log(high / low)
        out = model.predict(seen, drugs, dose=d)
        true = bj.true_effects(cells, drugs, dose=d, guide_failure=FAILURE).values.astype(float)
        guesses = {
            "no change": 0 * true,
            "interpolation": (1 - w) * at[low] + w * at[high],
            "line through the doses": (line[0] * np.log10(d) + line[1]).reshape(true.shape),
            "base, closed form": (out.layers["delta"], out.layers["std"]),
        }
        yield from rows_of(
            drugs,
            true,
            guesses,
            experiment="dose",
            seed=seed,
            fold=0,
            group="between" if d in between else "measured",
            dose=d,
        )


# few pairs of a screen are of two unseen genes, so there are more of these screens
SEEDS = {pairs: range(9), lines: range(3), doses: range(3)}

def main(which):
    warnings.filterwarnings("ignore")
    with open(Path(__file__).parent/"targets.csv", "w", newline="") as f:
        write = csv.DictWriter(f, FIELDS)
        write.writeheader()
        for experiment, seeds in SEEDS.items():
            for seed in which or seeds:
                write.writerows(experiment(seed))
                f.flush()
                print(experiment.__name__, seed, flush=True)


if __name__ == "__main__": main([int(x) for x in sys.argv[1:]])
