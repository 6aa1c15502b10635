"""Do the defaults work untuned? `BioJEPA.fit` as it is, from 300 to 200,000 cells and from 300 to 8,000 genes, beside baselines on the same features.

    python benchmarks/sizes.py                   # about an hour on one core, and 20 GB for the largest; goes on where it stopped

Each screen is simulated, fitted and scored in a process of its own. In the largest, 20,000 simulated cells are sequenced ten times over, each time with 70 % of their molecules.
Writes benchmarks/sizes.csv, one row per perturbation and version."""
import csv, json, resource, subprocess, sys, time, warnings
from pathlib import Path

FILE = Path(__file__).parent/"sizes.csv"
FIELDS = [
    "cells",
    "genes",
    "perturbations",
    "seed",
    "name",
    "perturbation",
    "pearson_delta",
    "pearson_pert",
    "covered",
    "gate",
    "steps",
    "best_step",
    "loss",
    "rank",
    "seconds",
    "gb",
]
BASELINES = ("no_change", "mean", "ridge", "linear_response", "ridge_and_response")
# cells, genes -> perturbations, cells of each, controls, times that each cell is sequenced, screens
# that are drawn
SIZES = {
    (300, 300): (15, 15, 75, 1, 5),
    (300, 8000): (15, 15, 75, 1, 1),
    (3000, 1000): (60, 40, 600, 1, 2),
    (20_000, 1000): (400, 45, 2000, 1, 1),
    (20_000, 8000): (400, 45, 2000, 1, 1),
    (200_000, 300): (200, 900, 20_000, 1, 1),
    (200_000, 1000): (600, 300, 20_000, 1, 1),
    (200_000, 8000): (400, 45, 2000, 10, 1),
}


def screen(genes, seed, perturbations, each, controls, times):
    "A simulated screen, prepared; and its features."
    import anndata, numpy as np
    import biojepa as bj
    raw = bj.simulate(
        n_genes=genes,
        n_perturbations=perturbations,
        cells_per_perturbation=each,
        n_controls=controls,
        seed=seed,
    )
    features = bj.simulated_features(raw)
    if times == 1: return bj.prepare(raw, n_genes=genes), features
    rng = np.random.default_rng(0)
    blocks = []
    del raw.uns["truth"]
    for i in range(times):
        x = raw.X.copy()
        x.data = rng.binomial(x.data.astype(np.int64), .7).astype(np.float32)
        x.eliminate_zeros()
        blocks.append(
            bj.prepare(
                anndata.AnnData(x, obs=raw.obs.set_axis(raw.obs_names + f"-{i}"), var=raw.var),
                n_genes=genes,
            )
        )
        # as large as X, and nothing here reads it
        del blocks[-1].layers["counts"]
    return anndata.concat(blocks, uns_merge="same"), features

def one(cells, genes, seed):
    "Rows of one fit: defaults, and the baselines; a fifth of the perturbations is held out."
    import numpy as np
    import biojepa as bj
    from biojepa.effects import beyond, pearson_rows
    from biojepa.cells import CONTROL
    from biojepa.effects import effects
    from biojepa.learned_baselines import ALL_BASELINES
    from biojepa.splits import folds
    perturbations, *rest, _ = SIZES[cells, genes]
    data, features = screen(genes, seed, perturbations, *rest)
    assert data.shape == (cells, genes), data.shape
    s = folds(data, 5, seed=seed)[0]
    start = time.process_time()
    model = bj.BioJEPA.fit(data, s, features=features, seed=seed, progress=False)
    seconds = time.process_time() - start
    gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    truth = effects(data[s.mask(data, "test") | (data.obs.perturbation == CONTROL).values])
    centre = effects(s.cells(data, "train")).X.mean(0)
    names = list(truth.obs.perturbation)
    line = data.obs.cell_type.iloc[0]
    history = model.history["training"]
    out = model.predict(data, names)
    covered = (
        np.abs(out.layers["delta"] - truth.X)
        < 1.645 * np.sqrt(out.layers["std"] ** 2 + truth.layers["sem"] ** 2)
    ).mean(1)
    facts = dict(
        gate=f"{model.gate:.2f}",
        steps=len(history),
        best_step=int(history.validation.idxmax()) + 1 if "validation" in history else "",
        loss=f"{history.loss.tail(20).mean():.3f}",
        rank=f"{model.history['pretraining']['rank'].dropna().iloc[-1]:.1f}",
        seconds=f"{seconds:.0f}",
        gb=f"{gb:.2f}",
    )
    guesses = {"base": out.layers["delta"]}
    gate, model.gate = model.gate, 1.0
    guesses["base, all of the network let in"] = model.predict(data, names).layers["delta"]
    guesses |= {
        b: np.asarray(ALL_BASELINES[b]().fit(data, s, features).answer(names, line))
        for b in BASELINES
    }
    for name, guess in guesses.items():
        delta = pearson_rows(guess, truth.X)
        pert = pearson_rows(beyond(guess, centre), truth.X - centre)
        for i, p in enumerate(names):
            yield dict(
                cells=cells,
                genes=genes,
                perturbations=perturbations,
                seed=seed,
                name=name,
                perturbation=p,
                pearson_delta=f"{delta[i]:.4f}",
                pearson_pert=f"{pert[i]:.4f}",
                **(facts | dict(covered=f"{covered[i]:.3f}") if name == "base" else {}),
            )

def main():
    done = set()
    if FILE.exists():
        with open(FILE) as f:
            done = {(r["cells"], r["genes"], r["seed"]) for r in csv.DictReader(f)}
    for (cells, genes), (*_, n) in SIZES.items():
        for seed in range(n):
            if (str(cells), str(genes), str(seed)) in done: continue
            run = subprocess.run(
                [sys.executable, __file__, str(cells), str(genes), str(seed)],
                capture_output=True,
                text=True,
            )
            if run.returncode: sys.exit(run.stderr)
            rows = json.loads(run.stdout.splitlines()[-1])
            with open(FILE, "a", newline="") as f:
                out = csv.DictWriter(f, FIELDS)
                if not f.tell(): out.writeheader()
                out.writerows(rows)
            print(
                cells,
                genes,
                seed,
                {k: rows[0][k] for k in ("gate", "rank", "seconds", "gb")},
                flush=True,
            )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    if len(sys.argv) == 1: main()
    else: print(json.dumps(list(one(*map(int, sys.argv[1:])))))
