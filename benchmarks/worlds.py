"""The network for new lines: worlds drawn from a wide prior, training, and the judgement that decides whether it is used.

    python benchmarks/worlds.py train --folder runs/worlds --steps 20000    # draws worlds, trains, writes the weights; goes on where it stopped
    python benchmarks/worlds.py judge --folder runs/worlds                  # simulator, SERGIO and Kang; writes benchmarks/worlds.csv, one row per line and method

Training worlds have seeds from 1,000 on, those that say when to stop 900 to 911, those of the judgement 1 to 5: the simulator's own recipe, which no
setting was chosen on. One core, nice. Kang needs BIOJEPA_DATA, and the
other simulator the package sergio_rs.
"""
import argparse, csv, os, warnings
from importlib.util import find_spec
from pathlib import Path

import anndata
import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingRegressor

import biojepa as bj
from biojepa.closed_form import ClosedForm
from biojepa.effects import control_means
from biojepa.featurizers import as_table
from biojepa.network import Recipe
from biojepa.new_line_answers import gains, opens, regressed_share, shipped_network
from biojepa.relations import Lines, elsewhere, lines_of, relations
from biojepa.saved import write_model
from biojepa.world import WorldNetwork, answers, world_loss

HERE = Path(__file__).parent
DATA = Path(os.environ.get("BIOJEPA_DATA", HERE.parent.parent / "shared"))
WEIGHTS = HERE.parent / "biojepa/weights/world"
ARRAYS = ("effect", "sem", "mean", "sd", "response", "own")
STOPPING, JUDGED, SERGIO = range(900, 912), range(1, 6), range(1, 4)
MODES = [("CRISPRi",), ("CRISPRko",), ("CRISPRa",), ("CRISPRi", "CRISPRa")]


# worlds

def prior(seed):
    "Arguments of `simulate` for one world, drawn widely around what screens look like."
    rng = np.random.default_rng(seed)
    u = rng.uniform
    modes = MODES[rng.choice(4, p=[0.5, 0.2, 0.2, 0.1])]
    recipe = Recipe(
        regulators=u(0.3, 0.8), out_degree=u(4, 12), tail=u(1.2, 1.9), module_size=u(10, 45), own_module=u(2, 14),
        preference=u(0.8, 2.8), activating=u(0.5, 0.9), flip=u(0, 0.25), hubs_on_top=u(0, 0.5), weight=u(0.35, 0.8),
        feedback=u(0.5, 0.88), rest=(u(-0.3, 1.1), u(0.3, 0.8)), abundance=(u(2.2, 4.2), 4.0), essential=u(0.2, 0.7),
        stress=u(0.05, 0.35), stressed=u(0.05, 0.3), programme=u(0.03, 0.25), line=u(0.25, 1.1), off=u(0.05, 0.4),
    )
    n_genes = int(u(150, 420))
    return dict(
        n_genes=n_genes, n_perturbations=int(u(16, min(56, 0.5 * n_genes * recipe.regulators))),
        cells_per_perturbation=int(10 ** u(1.1, 1.75)), n_controls=int(10 ** u(2.2, 2.65)), cell_types=int(rng.integers(3, 8)),
        modes=modes, n_drugs=int(rng.integers(0, 9)), doses=(float(u(1, 10)),), intrinsic=u(0.05, 0.3), depth=float(10 ** u(0, 1.1)),
        batch_sd=u(0, 0.25), guide_failure=u(0, 0.3), dispersion=u(0.1, 0.5), recipe=recipe, seed=seed,
    )

def screen(options):
    "Prepared cells of a world."
    return bj.prepare(bj.simulate(**options), n_genes=options["n_genes"])

def true_lines(cells, options, lines, actions, contexts, n=32):
    "Noise-free effects [S, P, G], guides that fail as often as in the screen."
    names = np.array([a.parts[0].target for a in actions])
    gene = np.array([not x.startswith("DRUG") for x in names])
    truth = np.zeros_like(lines.effect)
    for s, c in enumerate(contexts):
        for which, dose in ((gene, 1.0), (~gene, options.get("doses", (1.0,))[0])):
            if which.any(): truth[s, which] = bj.true_effects(cells, names[which], c, dose=dose, n=n)
    return truth * (1 - options.get("guide_failure", 0.1))

def cached(path, make):
    "Arrays of a file, made when it is not there."
    if not path.exists():
        arrays = {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in make().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(part, **arrays)
        part.replace(path)
    with np.load(path) as found: return {k: found[k] for k in found.files}

def world(folder, seed, options=None):
    "Lines and truth of one world of the prior."
    def make():
        how = options or prior(seed)
        cells = screen(how)
        lines, actions, contexts = lines_of(cells)
        return dict(vars(lines), truth=true_lines(cells, how, lines, actions, contexts))
    found = cached(Path(folder) / "worlds" / f"{seed}.npz", make)
    return Lines(*(found[k] for k in ARRAYS)), found["truth"]


# training

LEAST_EFFECT = 3e-4  # added to the mean square by which a world's errors are divided

def asked(lines, truth, line, sources, some, blind=False, rows=slice(None)):
    "Inputs, candidates, start, scale, truth and which entries count, for a line that was left out."
    given = lines.take(sources, some)
    own, response = given.own, lines.response[line][some]
    if blind: given = Lines(**vars(given) | dict(own=np.full_like(own, -1), response=0 * given.response))
    r = relations(given, lines.mean[line], lines.sd[line], 0 * response if blind else response, rows=rows)
    keep = elsewhere(own, truth.shape[2])[rows]
    return [r.inputs, r.basis, r.start, r.scale, truth[line][some][rows].astype(np.float32), keep]

def example(rng, lines, truth, most_rows=24, most_genes=200):
    "One line of a world left out, some of the others given, some targets hidden as those of a drug are."
    S, P, G = truth.shape
    line = int(rng.integers(S))
    rest = np.setdiff1d(np.arange(S), [line])
    least = 1 if rng.random() < 0.3 else min(2, len(rest))
    n = len(rest) if rng.random() < 0.5 else int(rng.integers(least, len(rest) + 1))
    sources, blind = np.sort(rng.choice(rest, n, replace=False)), rng.random() < 0.25
    if rng.random() < 0.12:  # screens of one perturbation, as a cytokine is
        some = rng.choice(P, min(4, P), replace=False)
        parts = [asked(lines, truth, line, sources, some[[i]], blind) for i in range(len(some))]
        x, own = [np.concatenate(v) for v in zip(*parts)], lines.own[some]
    else:
        some = np.sort(rng.choice(P, P if rng.random() < 0.5 else int(rng.integers(min(4, P), P + 1)), replace=False))
        keep = rng.choice(len(some), min(len(some), most_rows), replace=False)
        x, own = asked(lines, truth, line, sources, some, blind, keep), lines.own[some][keep]
    size = np.sqrt((x[4] ** 2)[x[5]].mean() + LEAST_EFFECT)
    must = np.unique(own[own >= 0])
    genes = np.append(must, rng.permutation(np.setdiff1d(np.arange(G), must)))[: max(most_genes, len(must))]
    at = {g: i for i, g in enumerate(genes)}
    return [v[:, genes].astype(v.dtype if v.dtype == bool else np.float16) for v in x], np.array([at.get(o, -1) for o in own]), size

def batch(rng, pool, examples=16, rows=3, genes=64):
    "Tensors of a few perturbations and genes of each of some examples."
    out = []
    for _ in range(examples):
        x, own, size = pool[rng.integers(len(pool))]
        row = rng.choice(len(own), rows, replace=len(own) < rows)
        must = np.unique(own[row][own[row] >= 0])
        gene = rng.permutation(x[0].shape[1])
        gene = np.append(must, gene[~np.isin(gene, must)])[:genes]
        gene = np.append(gene, rng.choice(gene, genes - len(gene)))
        y = [v[row][:, gene] for v in x]
        out.append([v if v.dtype == bool else v.astype(np.float32) for v in y] + [np.full(y[4].shape, size, np.float32)])
    return [torch.from_numpy(np.concatenate(v)) for v in zip(*out)]

def r2(guess, truth, keep): return float(1 - ((truth - guess)[keep] ** 2).sum() / (truth[keep] ** 2).sum())

def validate(network, worlds, most=12):
    "Mean R2 of network and start over left-out lines of the worlds that say when to stop."
    out = []
    for lines, truth in worlds:
        every = np.arange(truth.shape[1])
        rows = every[:: max(1, len(every) // most)]
        for line in range(len(truth)):
            x = asked(lines, truth, line, [s for s in range(len(truth)) if s != line], every, rows=rows)
            with torch.no_grad(): mean = network(*map(torch.from_numpy, x[:4]))[0].numpy()
            out.append((r2(mean, x[4], x[5]), r2(x[2], x[4], x[5])))
    return np.mean(out, 0)

def begin(pool, state):
    "A network standardised by the first examples, its average, an optimiser; as they were in `state`, if given."
    flat = np.concatenate([x[0].reshape(-1, x[0].shape[-1]) for x, _, _ in pool]).astype(np.float32)
    network = WorldNetwork(flat.shape[1], pool[0][0][1].shape[-1])
    network.centre.copy_(torch.tensor(flat.mean(0)))
    network.spread.copy_(torch.tensor(flat.std(0) + 0.1))
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    if state:
        network.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
    average = {k: v.clone() for k, v in (state["average"] if state else network.state_dict()).items()}
    return network, average, optimizer

def step_once(network, average, optimizer, x, step, lr):
    "One step, and the running mean of the weights."
    for group in optimizer.param_groups: group["lr"] = lr
    with torch.autocast("cpu", torch.bfloat16): mean, variance = network(*x[:4])
    loss, share = world_loss(mean.float(), variance.float(), *x[4:])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    keep = min(0.998, (step + 1) / (step + 10))
    for k, v in network.state_dict().items(): average[k].lerp_(v, 1 - keep)
    return float(share.detach())

def train(folder, steps=20_000, worlds=320, lr=2e-3, out=WEIGHTS, pool_size=2500, stopping=STOPPING, report=500, options=None):
    "Train on worlds 1,000 onwards, keep the average that is best on the stopping worlds, write weights and card."
    folder = Path(folder)
    torch.manual_seed(0)
    seeds = range(1000, 1000 + worlds)
    held = [world(folder, s, options and options | dict(seed=s)) for s in stopping]
    file = folder / "checkpoint.pt"
    state = torch.load(file, weights_only=False) if file.exists() else None
    first = state["step"] if state else 0
    rng = np.random.default_rng([0, first])
    def one():
        seed = int(rng.choice(seeds))
        return example(rng, *world(folder, seed, options and options | dict(seed=seed)))
    pool = [one() for _ in range(min(60, pool_size))]
    network, average, optimizer = begin(pool, state)
    best, log = (state["best"], state["log"]) if state else (None, [])
    shares = []
    for step in range(first, steps):
        if step % 2 == 0:
            if len(pool) < pool_size: pool.append(one())
            else: pool[rng.integers(pool_size)] = one()
        rate = lr * min(1, (step + 1) / 100) * (0.02 + 0.49 * (1 + np.cos(np.pi * step / steps)))
        shares.append(step_once(network, average, optimizer, batch(rng, pool), step, rate))
        if (step + 1) % report and step + 1 < steps: continue
        tried = WorldNetwork(**network.shape)
        tried.load_state_dict(average)
        score, start = validate(tried.eval(), held)
        log.append([step + 1, round(float(np.mean(shares)), 4), round(float(score), 4), round(float(start), 4)])
        print(f"step {step + 1}: error {log[-1][1]:.3f} of the effects' square; stopping worlds R2 {score:.3f}, start {start:.3f}", flush=True)
        shares = []
        if best is None or score > best["r2"]: best = dict(r2=float(score), step=step + 1, weights={k: v.clone() for k, v in average.items()})
        torch.save(dict(weights=network.state_dict(), average=average, optimizer=optimizer.state_dict(), step=step + 1, best=best, log=log), file)
    card = dict(kind="world network", shape=network.shape, worlds=worlds, steps=best["step"], stopping_r2=best["r2"], losses=log)
    write_model(out, {k: v.numpy() for k, v in best["weights"].items()}, card | dict(prior="benchmarks/worlds.py, prior(seed), seeds from 1,000"))
    return best


# judgement

def closed_forms(cells, actions, contexts, table=None):
    """Answer and standard deviation [S, P, G] of the closed form, each line left out; and `inner` [S, S, P, G],
    its answers where a second line is left out too, from which the gate is judged."""
    out = {k: np.full((len(contexts), len(actions), cells.n_vars), np.nan) for k in ("closed", "closed_std")}
    out["inner"] = np.full((len(contexts), len(contexts), len(actions), cells.n_vars), np.nan)
    number = {a: i for i, a in enumerate(actions)}
    for h, c in enumerate(contexts):
        form = ClosedForm().fit(cells[(cells.obs.cell_type != c).to_numpy()].copy(), table)
        out["closed"][h], out["closed_std"][h] = form.predict(actions, [c] * len(actions), control_means(cells, [c]))
        mean, _, _, _, scale, own, _ = form.left_out
        guess = mean * np.where(own, scale, scale * form.new_lines.share)
        for i, row in zip(form.left_out_rows, guess): out["inner"][h, contexts.index(form.contexts[i]), number[form.actions[i]]] = row
    return out

def judged_world(folder, seed):
    "A world of the simulator's own recipe, with the closed form's answers."
    options = dict(n_genes=400, n_perturbations=100, cells_per_perturbation=40, cell_types=6, seed=seed)
    def make():
        cells = screen(options)
        lines, actions, contexts = lines_of(cells)
        table = as_table(bj.simulated_features(cells)).fit(sorted(a.parts[0].target for a in actions))
        truth = true_lines(cells, options, lines, actions, contexts, n=64)
        return dict(vars(lines), truth=truth, **closed_forms(cells, actions, contexts, table))
    return cached(Path(folder) / "judged" / f"{seed}.npz", make)

def kang():
    "Lines, effects that were measured and the closed form, of five blood cell types with and without interferon."
    raw = anndata.read_h5ad(DATA / "data/kang18/example_sce.h5ad")
    raw.obs["donor"] = raw.obs.sample_id.astype(str).str.extract(r"^(?:ctrl|stim)(.+)$", expand=False).to_numpy()
    raw.obs["label"] = raw.obs.group_id.astype(str).replace(dict(stim="IFNB1")).to_numpy()
    cells = bj.prepare(raw, "label", control="ctrl", cell_type="cluster_id", batch="donor", mode="cytokine", n_genes=raw.n_vars)
    lines, actions, contexts = lines_of(cells)
    return dict(vars(lines), truth=lines.effect, noise=lines.sem**2, **closed_forms(cells, actions, contexts)), contexts

def sergio_network(sergio_rs, seed, n_genes=150, masters=15, regulators=45):
    "A network of another simulator (SERGIO: Hill kinetics, stochastic differential equations), lines by their master regulators."
    rng = np.random.default_rng(seed)
    genes = [sergio_rs.Gene(f"G{i:03d}", 0.8) for i in range(n_genes)]
    grn = sergio_rs.GRN()
    for target in range(masters, n_genes):
        pool = np.arange(min(target, regulators))
        for r in rng.choice(pool, int(rng.integers(1, 5)), replace=False):
            sign = 1 if rng.random() < 0.7 else -1
            grn.add_interaction(genes[r], genes[target], sign * float(rng.uniform(1, 5)), None, 2)
    grn.set_mrs()
    knocked = sorted(rng.choice(regulators, 30, replace=False))
    return grn, sergio_rs.MrProfile.from_random(grn, 6, (0.3, 1.5), (1.5, 4.0), seed), [f"G{i:03d}" for i in knocked]

def sergio_cells(sergio_rs, grn, profile, n, seed, names):
    "Expression [6 n, G] of n cells of each of six lines; 0 for a gene that is not there."
    table = sergio_rs.Sim(grn, n, 400, 40, 0.05, 1, seed).simulate(profile)  # cells two units of time apart, so that they are independent
    found = dict(zip(table["Genes"].to_list(), table.drop("Genes").to_numpy()))
    return np.stack([found.get(g, np.zeros(6 * n)) for g in names], 1)

def log_mean(x):
    "Mean log1p of counts per 10,000 of each line [6, G], without the noise of counting."
    return np.log1p(1e4 * x / x.sum(1, keepdims=True)).reshape(6, -1, x.shape[1]).mean(1)

def sergio(folder, seed, n=60, many=400):
    "A screen of knock-outs from a simulator that is not ours, with the closed form's answers; needs the package sergio_rs."
    import sergio_rs
    def make():
        grn, profile, knocked = sergio_network(sergio_rs, seed)
        names = [f"G{i:03d}" for i in range(150)]
        rng = np.random.default_rng(seed)
        def counts(x): return rng.poisson(x / x.sum(1, keepdims=True) * 600 * np.exp(rng.normal(0, 0.3, (len(x), 1)))).astype(np.float32)
        blocks = [sergio_cells(sergio_rs, grn, profile, 150, seed, names)]
        still = log_mean(sergio_cells(sergio_rs, grn, profile, many, seed + 1000, names))
        true, rows = {}, [("control", c) for c in range(6) for _ in range(150)]
        for k, gene in enumerate(knocked):
            less, other = grn.ko_perturbation(gene, profile)
            blocks.append(sergio_cells(sergio_rs, less, other, n, seed + k + 1, names))
            true[gene] = log_mean(sergio_cells(sergio_rs, less, other, many, seed + k + 2000, names)) - still
            rows += [(gene, c) for c in range(6) for _ in range(n)]
        raw = anndata.AnnData(counts(np.concatenate(blocks)))
        raw.var_names = names
        raw.obs["perturbation"], raw.obs["cell_type"] = [r[0] for r in rows], [f"LINE{r[1]}" for r in rows]
        cells = bj.prepare(raw, n_genes=150, mode="CRISPRko")
        lines, actions, contexts = lines_of(cells)
        order = [names.index(g) for g in cells.var_names]
        truth = np.stack([true[a.parts[0].target][:, order] for a in actions], 1)
        return dict(vars(lines), truth=truth, **closed_forms(cells, actions, contexts))
    return cached(Path(folder) / "sergio" / f"{seed}.npz", make)

def trees_of(folder, seeds, rows=700):
    "Boosted trees on the same inputs, target and weights, from the same worlds."
    rng = np.random.default_rng(0)
    X, y, weight = [], [], []
    for seed in seeds:
        lines, truth = world(folder, seed)
        for line in range(len(truth)):
            r = related(lines, line)
            keep = elsewhere(lines.own, truth.shape[2])
            size = np.sqrt((truth[line][keep] ** 2).mean() + LEAST_EFFECT)
            at = rng.choice(np.flatnonzero(keep.ravel()), rows, replace=False)
            X.append(r.inputs.reshape(-1, r.inputs.shape[-1])[at])
            y.append(((truth[line] - r.start).ravel() / r.unit)[at])
            weight.append(np.full(rows, (r.unit / size) ** 2))
    trees = HistGradientBoostingRegressor(max_iter=300, learning_rate=0.06, min_samples_leaf=60, l2_regularization=5.0, random_state=0)
    return trees.fit(np.concatenate(X), np.concatenate(y), sample_weight=np.concatenate(weight))

def related(lines, line):
    "Relations of one line to all others."
    rest = [s for s in range(len(lines.mean)) if s != line]
    return relations(lines.take(rest), lines.mean[line], lines.sd[line], lines.response[line])

def gate(lines, inner, line, network, most=30):
    "The network's share for a new line, as `NewLineAnswers` opens it: from the other lines, each left out in turn; 0 where it stays shut."
    rest = [s for s in range(len(lines.mean)) if s != line]
    rows = np.arange(len(lines.own))[:: max(1, len(lines.own) // most)]
    keep = elsewhere(lines.own, lines.mean.shape[1])[rows]
    fixed, other, seen = [], [], []
    for s in rest:
        view = lines.mean[s], lines.sd[s], lines.response[s]
        answer = answers(network, relations(lines.take([k for k in rest if k != s]), *view, rows=rows))[0]
        for pile, x in ((fixed, inner[line, s][rows]), (other, answer), (seen, lines.effect[s][rows])): pile.append(x * keep)
    return regressed_share(fixed, other, seen) if opens(gains(fixed, other, seen)) else 0.0

def judge_lines(data, found, names, network, trees):
    "Rows of the table: R2 against no change of each method in each left-out line, and the coverage of 90 % intervals."
    lines = Lines(*(np.asarray(found[k], float) if k != "own" else found[k] for k in ARRAYS))
    shares = [gate(lines, found["inner"], line, network) for line in range(len(names))]
    print(data, "shares behind the gate", np.round(shares, 2), flush=True)
    out = []
    for line, name in enumerate(names):
        r, truth = related(lines, line), found["truth"][line]
        keep = elsewhere(lines.own, truth.shape[1])
        noise = found["noise"][line] if "noise" in found else 0.0
        rest = [s for s in range(len(names)) if s != line]
        mean, shrunk = lines.effect[rest].mean(0), r.basis[..., 0]
        fixed, std = found["closed"][line], found["closed_std"][line]
        answer, variance = answers(network, r)
        tree = r.start + r.unit * trees.predict(r.inputs.reshape(-1, r.inputs.shape[-1])).reshape(truth.shape)
        scaled = mean * (mean * truth)[keep].sum() / (mean[keep] ** 2).sum()
        guesses = {"no change": 0 * truth, "mean of the lines": mean, "mean, best scale in hindsight": scaled, "start": r.start}
        guesses |= {"closed form": fixed, "trees": tree, "network": answer, "behind the gate": fixed + shares[line] * (answer - fixed)}
        spread = {"closed form": std**2, "network": variance}
        for method, guess in guesses.items():
            wide = np.sqrt(spread[method] + noise) if method in spread else None
            inside = float((np.abs(truth - guess) < 1.6449 * wide)[keep].mean()) if method in spread else np.nan
            correlation = float(np.corrcoef(guess[keep], truth[keep])[0, 1]) if guess.any() else 0.0
            out.append(dict(data=data, line=name, method=method, r2=round(r2(guess, truth, keep), 4), correlation=round(correlation, 4), inside=round(inside, 4)))
    return out

def judge(folder, n_trees=130):
    "The whole table."
    network = shipped_network()[0]
    trees = trees_of(folder, range(1000, 1000 + n_trees))
    rows = []
    for seed in JUDGED:
        found = judged_world(folder, seed)
        rows += judge_lines(f"simulator, seed {seed}", found, [f"LINE{s}" for s in range(len(found["truth"]))], network, trees)
    if find_spec("sergio_rs"):
        for seed in SERGIO: rows += judge_lines(f"sergio, seed {seed}", sergio(folder, seed), [f"LINE{s}" for s in range(6)], network, trees)
    if (DATA / "data/kang18").is_dir(): rows += judge_lines("kang18", *kang(), network, trees)
    with open(HERE / "worlds.csv", "w", newline="") as f:
        table = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return rows


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("stage", choices=["train", "judge"])
    arguments.add_argument("--folder", default="runs/worlds", help="of worlds, checkpoint and judged worlds")
    arguments.add_argument("--steps", type=int, default=20_000)
    arguments.add_argument("--worlds", type=int, default=320)
    asked_for = arguments.parse_args()
    if asked_for.stage == "train": train(asked_for.folder, asked_for.steps, asked_for.worlds)
    else: judge(asked_for.folder)
