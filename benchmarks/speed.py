"""How fast, how large: v0_3 as the notebooks tell it, `base` with every gene at every step, and `base` as it is.

    python benchmarks/speed.py            # about ten minutes on two cores; writes benchmarks/speed.csv and speed.json

Every row is measured in a process of its own, with one warm-up and the median over repeats; models take turns,
so that a busy machine is busy for all. Only ratios are worth comparing between machines.
"""
import json, os, platform, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).parent
SIZE = dict(width=64, heads=4, layers=2, predictor_layers=2)
MODELS = ("v0_3", "base, plain", "base")
STAGES = ("pretraining", "action")
REPEATS, CELLS = 5, 16


def screen(n_genes, n_cells=400, n_perturbations=20):
    "Random counts: speed does not depend on what they say."
    import anndata, numpy as np, pandas as pd
    from scipy import sparse
    import biojepa as bj
    rng = np.random.default_rng(0)
    X = sparse.random(n_cells, n_genes, 0.3, "csr", dtype=np.float32, random_state=0)
    X.data = np.ceil(5 * X.data)
    names = np.where(
        np.arange(n_cells) < n_cells // 4,
        "control",
        [f"G{i}" for i in rng.integers(0, n_perturbations, n_cells)],
    )
    obs = pd.DataFrame({"perturbation": names}, index=[f"c{i}" for i in range(n_cells)])
    genes = [f"G{i}" for i in range(n_genes)]
    features = pd.DataFrame(rng.normal(size=(min(n_genes, 1000), 64)), index=genes[:1000])
    return bj.prepare(
        anndata.AnnData(X, obs=obs, var=pd.DataFrame(index=genes)), n_genes=n_genes
    ), features


def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_of(f):
    "Largest growth of memory, in MB, while f runs (Linux)."
    open("/proc/self/clear_refs", "w").write("5")
    before = resident()
    f()
    return (
        next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 2**10
        - before
    )


def timed(f, repeats=REPEATS):
    f(0)
    peak = peak_of(lambda: f(1))
    out = []
    for i in range(repeats):
        start = time.perf_counter()
        f(i + 2)
        out.append(time.perf_counter() - start)
    return sorted(out)[repeats // 2], peak


class StatePerSet:
    """A sampler whose conditions all claim a cell type of their own, so that every set is encoded
    by itself."""
    def __init__(self, sampler):
        self.batch = sampler.batch
        self.groups = sampler.groups.assign(cell_type=[str(i) for i in range(len(sampler.groups))])


def step(stage, name, n_genes):
    "Seconds and MB of one training step of CELLS cells, by the loops that `fit` uses."
    import torch
    from biojepa.featurizers import as_table, encode_actions
    from biojepa.effects import effects
    from biojepa.model import build, configure
    from biojepa.perturbations import actions_of
    from biojepa.loop import Loop
    from biojepa.pretraining import PretrainConfig, pretrain
    from biojepa.sets import SetSampler
    from biojepa.training import TrainConfig, effect_target, train
    cells, features = screen(n_genes)
    base = name != "v0_3"
    plain = name != "base"
    table = as_table(features).fit([f"G{i}" for i in range(20)])
    dims = dict(feature_dims=tuple(table.dims.values())) if base else {}
    model = build(configure("base" if base else "v0_3", n_genes, **SIZE, **dims))
    options = dict(steps=99, precision="float32" if plain else "auto") | (
        dict(genes=n_genes) if plain else {}
    )
    loops = []
    run = Loop.run
    # take the loop, run its steps here
    Loop.run = lambda self, progress: loops.append(self)
    if stage == "pretraining":
        pretrain(model, SetSampler(cells, m=1), PretrainConfig(batch=CELLS, **options))
    else:
        sampler = SetSampler(cells, m=4 if base else 1)
        if name == "base, plain":
            sampler = StatePerSet(sampler)
        config = TrainConfig(sets=CELLS // 4 if base else CELLS, cells=4, **options)
        groups = SetSampler(cells, m=1).groups
        target = effect_target(effects(cells), groups) if base else None
        train(
            model,
            sampler,
            encode_actions(actions_of(groups), list(cells.var_names), table),
            config,
            target=target,
        )
    Loop.run = run
    seconds, peak = timed(lambda i: loops[0].advance())
    return dict(seconds_per_cell=seconds / CELLS, mb=peak)


def predict(n_genes, n_perturbations):
    "Seconds to predict many perturbations in one context, with the whole estimator."
    import biojepa as bj
    cells, features = screen(n_genes, 1200, 60)
    few = dict(steps=4)
    model = bj.BioJEPA.fit(
        cells,
        bj.split(cells, seed=0),
        features=features,
        progress=False,
        pretraining=few,
        training=few,
    )
    model.gate = 1.0
    seconds, peak = timed(
        lambda i: model.predict(cells, [f"G{i}" for i in range(n_perturbations)]), repeats=1
    )
    return dict(seconds=seconds, mb=peak)


def simulate(n_cells, n_genes):
    import biojepa as bj
    def f(i):
        return bj.simulate(
            n_genes=n_genes,
            n_perturbations=450,
            cells_per_perturbation=n_cells // 500,
            n_controls=n_cells // 10,
            seed=0,
        )
    start = time.perf_counter()
    peak = peak_of(lambda: f(0))
    return dict(seconds=time.perf_counter() - start, mb=peak)


def prepare(n_cells, n_genes):
    import biojepa as bj
    raw = bj.simulate(
        n_genes=n_genes,
        n_perturbations=450,
        cells_per_perturbation=n_cells // 500,
        n_controls=n_cells // 10,
        seed=0,
    )
    seconds, peak = timed(lambda i: bj.prepare(raw, n_genes=n_genes), repeats=3)
    return dict(seconds=seconds, mb=peak)


def main():
    import pandas as pd, torch
    from biojepa.loop import pick_precision
    jobs = [dict(job="step", args=[s, m, g]) for g in (1000, 4000) for s in STAGES for m in MODELS]
    jobs += [dict(job="step", args=[s, "base", g]) for g in (2000, 8000, 16000) for s in STAGES]
    jobs += [
        dict(job="predict", args=[4000, 1000]),
        dict(job="simulate", args=[20000, 1000]),
        dict(job="prepare", args=[20000, 1000]),
    ]
    rows = []
    for job in jobs:
        done = subprocess.run(
            [sys.executable, __file__, json.dumps(job)], capture_output=True, text=True
        )
        if done.returncode: sys.exit(done.stderr)
        rows.append(
            dict(
                job=job["job"],
                what=" ".join(map(str, job["args"])),
                **json.loads(done.stdout.splitlines()[-1]),
            )
        )
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(HERE / "speed.csv", index=False, float_format="%.5g")
    facts = dict(
        cores=os.cpu_count(),
        torch=torch.__version__,
        machine=platform.machine(),
        precision=str(pick_precision(torch.device("cpu"))),
    )
    (HERE / "speed.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    if len(sys.argv) == 1: main()
    else:
        job = json.loads(sys.argv[1])
        print(json.dumps(globals()[job["job"]](*job["args"])))
