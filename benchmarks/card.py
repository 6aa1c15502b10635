"""How long a scorecard takes: 300 test perturbations x 1,000 genes, all metrics but differential expression, and differential expression alone.

python benchmarks/card.py             # writes benchmarks/card.csv"""
import csv, resource, time, warnings
from pathlib import Path


import biojepa as bj
from biojepa.metrics import METRICS


def timed(f):
    start = time.time()
    cpu = time.process_time()
    f()
    return dict(
        seconds=f"{time.time() - start:.1f}",
        cpu_seconds=f"{time.process_time() - cpu:.1f}",
        peak_gb=f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}",
    )

def main():
    warnings.filterwarnings("ignore")
    cells = bj.prepare(
        bj.simulate(n_genes=1000, n_perturbations=400, cells_per_perturbation=40, seed=0),
        n_genes=1000,
    )
    split = bj.split(cells, "unseen_gene", test=.75, seed=0)
    modules = cells.uns["truth"]["modules"]
    gene_sets = {f"GENE{g}": [f"module {m}"] for g, m in enumerate(modules)}
    model = bj.BioJEPA.fit(
        cells, split, features=bj.simulated_features(cells), network=False, progress=False
    )
    with open(Path(__file__).parent/"card.csv", "w", newline="") as f:
        out = csv.DictWriter(
            f, ["what", "perturbations", "genes", "cells", "seconds", "cpu_seconds", "peak_gb"]
        )
        out.writeheader()
        for what, metrics in (
            (
                "all metrics but differential expression",
                [m for m in METRICS if not m.startswith("de_")],
            ),
            ("differential expression", [m for m in METRICS if m.startswith("de_")]),
        ):
            row = dict(
                what=what, perturbations=len(split.test), genes=cells.n_vars, cells=cells.n_obs
            ) | timed(
                lambda: bj.scorecard(
                    cells, split, {"base": model}, (), metrics=metrics, gene_sets=gene_sets
                )
            )
            out.writerow(row)
            f.flush()
            print(row)


if __name__ == "__main__": main()
