"""Peers in the same run: the same cells, split and features; accuracy, seconds and peak memory.

    python benchmarks/peers/run.py scouter --data sim        # install, write the task, run, read predictions, add rows to results.csv
    python benchmarks/peers/run.py gears --data norman       # Norman is read from the folder that BIOJEPA_DATA names
    python benchmarks/peers/run.py score --data sim          # score again what is there

Each peer lives in an environment of its own under `--work` (default: runs/peers, which git ignores).
"""
import argparse, json, os, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

PEERS = {           # name -> what the row says; None: runs in the environment of this command
    "base": None,
    "scouter": "scouter.txt",
    "gears": "gears.txt",
    "cpa": "cpa.txt",
    "state": "state.txt",
}
BASELINES = ("no_change", "mean", "additive", "ridge")
METRICS = (
    "pearson_delta",
    "pearson_pert",
    "pearson_delta_top20",
    "direction_sig",
    "rank",
    "recall_5",
    "mse",
    "severity",
)
FACTS = (
    "dataset",
    "split",
    "peer",
    "kind",
    "version",
    "features_used",
    "epochs",
    "seconds",
    "cpu_seconds",
    "peak_memory_gb",
    "n_test",
)
COLUMNS = (*FACTS, *(c for m in METRICS for c in (m, f"{m}_low", f"{m}_high")), "note")


def dataset(name, quick=False):
    "Cells, splits and features."
    import biojepa as bj
    if name == "sim":
        size = (
            dict(n_genes=96, n_perturbations=30, cells_per_perturbation=12)
            if quick
            else dict(n_genes=1000, n_perturbations=300, cells_per_perturbation=40)
        )
        cells = bj.prepare(bj.simulate(**size, seed=0), n_genes=size["n_genes"])
        return cells, [bj.split(cells, "unseen_gene", seed=0)], bj.simulated_features(cells)
    import anndata
    from biojepa.demo import real_splits
    folder = Path(os.environ.get("BIOJEPA_DATA", ROOT.parent/"shared"))
    raw = anndata.read_h5ad(folder/"data/norman19_mcfaline23/devel.h5ad")
    raw = raw[(raw.obs.dataset == "norman19").values].copy()
    cells = bj.prepare(raw, "condition", kind="log1p", mode="CRISPRa", total="ncounts", n_genes=500)
    return (
        cells,
        real_splits(cells, seed=0),
        [folder / "priors/features" / f"{n}.npz" for n in ("go_svd_128", "string_svd_128")],
    )


def pip_words(path):
    """Arguments of pip, one list per call:

    all lines together, then those that go without their dependencies (development tools, say).
    """
    lines = path.read_text().splitlines()
    return [
        [l for l in lines if not l.startswith("--")],
        *(l.split() for l in lines if l.startswith("--")),
    ]


def environment(peer, work, python):
    "The interpreter of a peer, installed when it is not there."
    if PEERS[peer] is None: return sys.executable
    home = work/"envs"/peer
    own = home/"bin/python"
    done = home/"installed.txt"
    if not done.exists():
        wanted = HERE/"requirements"/PEERS[peer]
        print(f"installing {wanted.read_text().split()} into {home}")
        subprocess.run([python, "-m", "venv", home], check=True)
        for words in pip_words(wanted):
            subprocess.run([own, "-m", "pip", "install", "-q", *words], check=True)
        done.write_text(
            subprocess.run(
                [own, "-m", "pip", "freeze"], check=True, capture_output=True, text=True
            ).stdout
        )
    return str(own)


def measured(command, log, limit, threads):
    "Run to the end or to the limit: (exit status, facts)."
    own = {
        **os.environ,
        **{k: str(threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")},
        "TQDM_MININTERVAL": "30",
        "CUDA_VISIBLE_DEVICES": "",
        "MPLBACKEND": "agg",
        "PYTHONUNBUFFERED": "1",
    }
    start = time.time()
    with open(log, "w") as f:
        process = subprocess.Popen(
            list(map(str, command)), stdout=f, stderr=subprocess.STDOUT, env=own, cwd=HERE
        )
        pid = 0
        while not pid:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if not pid and limit and time.time() - start > limit: process.kill(); limit = None
            if not pid: time.sleep(0.2)
    process.returncode = os.waitstatus_to_exitcode(status)
    memory = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    return process.returncode, dict(
        seconds=round(time.time() - start, 1),
        cpu_seconds=round(used.ru_utime + used.ru_stime, 1),
        peak_memory_gb=round(memory, 2),
    )


def run_peer(peer, cells, splits, features, home, python, limit=None, threads=1, more=()):
    "Every split in turn; what was measured lies beside the answer."
    from task_files import write_task
    for i, split in enumerate(splits):
        folder = write_task(cells, split, features, home/peer/f"split{i}", dataset=home.name)
        print(
            (f"{peer}, {home.name}, split {i + 1} of {len(splits)}: log in {folder / 'log.txt'}"),
            flush=True,
        )
        status, facts = measured(
            [python, HERE / f"peer_{peer}.py", folder, *more], folder / "log.txt", limit, threads
        )
        (folder / "measured.json").write_text(
            json.dumps(dict(status=status, threads=threads, **facts))
        )
        if status:
            print(
                f"{peer} ended with status {status}; the last lines of its log:\n"
                + "\n".join((folder / "log.txt").read_text().splitlines()[-5:])
            )


def answer_of(folder, cells, split):
    "A peer's answer on one split: (table or None, about, measured)."
    from task_files import BadAnswer, read_predictions
    was = json.loads((folder/"measured.json").read_text())
    if was["status"]: return None, dict(note=f"ended with status {was['status']}"), was
    try: return (*read_predictions(folder, cells.var_names, split), was)
    except BadAnswer as e: return None, dict(note=f"refused: {e}"), was


def rows_of(name, cells, splits, features, home):
    "The rows of one dataset: its scale, baselines, and every peer that has run on all splits."
    import pandas as pd
    from biojepa.scorecard import scorecard
    from biojepa.featurizers import as_table
    about = {
        p: [answer_of(home / p / f"split{i}", cells, s) for i, s in enumerate(splits)]
        for p in PEERS
        if all((home / p / f"split{i}" / "measured.json").exists() for i in range(len(splits)))
    }
    whole = {
        p: [t.fillna(0.0) for t, *_ in each]
        for p, each in about.items()
        if all(t is not None for t, *_ in each)
    }
    card = scorecard(
        cells,
        splits,
        whole,
        baselines=BASELINES,
        features=as_table(features),
        metrics=list(METRICS),
    )
    rows = [
        r
        for g in dict.fromkeys(card.table.split)
        for r in _group_rows(name, g, card.table[card.table.split == g], about, whole, splits)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _group_rows(name, group, table, about, whole, splits):
    n_test = int(table[table.metric == "mse"].n.max())
    own = [i for i, s in enumerate(splits) if group in {s.groups[n] for n in s.test}]
    ends = table.groupby("metric")[list(END_NOTES)].first()
    for end in ends:
        yield dict(
            dataset=name,
            split=group,
            peer=end,
            kind="scale",
            n_test=n_test,
            **ends[end].to_dict(),
            note=END_NOTES[end],
        )
    for b in BASELINES:
        yield dict(
            dataset=name,
            split=group,
            peer=b,
            kind="baseline",
            features_used="ours, whitened" if b == "ridge" else "none",
            n_test=n_test,
            **_values(table, b),
        )
    for p, each in about.items():
        each = [each[i] for i in own]
        refusals = list(
            dict.fromkeys(t["refused"][group] for _, t, _ in each if group in t.get("refused", {}))
        )
        def fact(key):
            return "; ".join(dict.fromkeys(str(t[key]) for _, t, _ in each if t.get(key)))
        scored = p in whole and not refusals
        notes = [
            *refusals,
            fact("note"),
            "cut short" if any(t.get("cut_short") for _, t, _ in each) else "",
        ]
        yield dict(
            dataset=name,
            split=group,
            peer=p,
            kind="ours" if PEERS[p] is None else "peer",
            version=fact("version"),
            features_used=fact("features_used"),
            epochs=fact("epochs"),
            **{k: round(sum(m[k] for *_, m in each)) for k in ("seconds", "cpu_seconds")},
            peak_memory_gb=max(m["peak_memory_gb"] for *_, m in each),
            n_test=n_test if scored else 0,
            **(_values(table, p) if scored else {}),
            note=". ".join(n for n in notes if n),
        )


END_NOTES = {
    "floor": "no skill: no change, or the answer for another perturbation",
    "split_half": "one half of the cells as the prediction of the other",
    "ceiling": "what a perfect predictor reaches on effects with this noise",
}


def _values(table, model):
    out = {}
    for r in table[table.model == model].itertuples():
        out |= {r.metric: r.value, f"{r.metric}_low": r.low, f"{r.metric}_high": r.high}
    return out


def write_rows(rows, path):
    "Replace the rows of this dataset."
    import pandas as pd
    if path.exists():
        old = pd.read_csv(path)
        rows = pd.concat(
            [old[~old.dataset.isin(set(rows.dataset))].astype(object), rows.astype(object)]
        )[list(rows.columns)]
    rows.sort_values("dataset", ascending=False, kind="stable").to_csv(
        path, index=False, float_format="%.5g"
    )


def main():
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("peer", choices=[*PEERS, "score"])
    ask.add_argument("--data", choices=["sim", "norman"], default="sim")
    ask.add_argument(
        "--work",
        type=Path,
        default=ROOT / "runs/peers",
        help="folder of environments and task files",
    )
    ask.add_argument(
        "--python", default=sys.executable, help="interpreter that a new environment is made from"
    )
    ask.add_argument("--limit", type=float, default=1800, help="seconds after which a fit is ended")
    ask.add_argument("--threads", type=int, default=1)
    ask.add_argument("--results", type=Path, default=HERE/"results.csv")
    ask.add_argument(
        "--epochs",
        type=int,
        help=(
            "at most so many epochs (or steps, for those that count steps); the row "
            "says if it is fewer than the peer's own number"
        ),
    )
    ask.add_argument(
        "--no-score", action="store_true", help="run only; `score` adds the rows later"
    )
    ask.add_argument(
        "--quick",
        action="store_true",
        help="a smoke test on a tiny screen; writes results under --work",
    )
    a = ask.parse_args()
    cells, splits, features = dataset(a.data, a.quick)
    name = f"{a.data}_quick" if a.quick else a.data
    home = a.work.resolve()/name
    more = [*(["--quick"] if a.quick else []), *(["--epochs", str(a.epochs)] if a.epochs else [])]
    if a.peer != "score":
        run_peer(
            a.peer,
            cells,
            splits,
            features,
            home,
            environment(a.peer, a.work.resolve(), a.python),
            a.limit,
            a.threads,
            more,
        )
    if a.no_score: return
    rows = rows_of(name, cells, splits, features, home)
    write_rows(rows, a.work/"quick.csv" if a.quick else a.results)
    print(
        rows[
            [
                "split",
                "peer",
                "pearson_delta",
                "pearson_pert",
                "rank",
                "mse",
                "seconds",
                "cpu_seconds",
                "peak_memory_gb",
                "note",
            ]
        ].to_string(max_colwidth=50)
    )


if __name__ == "__main__": main()
