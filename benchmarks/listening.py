"""Does the trained network hear which gene is hit, and does its encoder know the line?

    python benchmarks/listening.py               # seeds 0 to 2; about six minutes on one core

A simulated screen of two lines; the network without the closed form. For unseen genes: the share of attention that each token of an action gets, from the gene that is hit and from all others,
beside an even share; how the predicted change of the hit gene ranks among all genes by size (1: it is the largest); and balanced accuracy of a linear probe for the line of a control cell,
from an encoder that saw nothing, one that was pretrained and the one after training. Writes benchmarks/listening.csv."""
import csv, sys, warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

import biojepa as bj
from biojepa.cells import CONTROL, dense
from biojepa.effects import effects
from biojepa.featurizers import encode_actions
from biojepa.perturbations import Action
from biojepa.predictor import PartAttention

GENES = 256


@torch.no_grad()
def tells_line(model, cells):
    own = cells[(cells.obs.perturbation == CONTROL).values]
    own = own[
        np.sort(
            np.concatenate(
                [np.flatnonzero(own.obs.cell_type == c)[:150] for c in own.obs.cell_type.unique()]
            )
        )
    ]
    x = (
        model.student(
            torch.tensor(dense(own.X)), torch.tensor(own.obs.log_total.values.astype(np.float32))
        )[1]
        .mean(1)
        .numpy()
    )
    return cross_val_score(
        LogisticRegression(max_iter=2000),
        (x - x.mean(0)) / (x.std(0) + 1e-6),
        own.obs.cell_type.astype(str),
        cv=5,
        scoring="balanced_accuracy",
    ).mean()

@torch.no_grad()
def attention(model, cells, names):
    "Share of each token, [layers, tokens], from the hit gene and from all others."
    shares = []
    def look(self, given, _):
        gene, change, tokens, seen, strength = given
        def split(x): return x.unflatten(-1, (self.heads, -1))
        q = split(self.q(gene) + self.q_change(change))
        k = split(self.k(tokens[:, 0]))  # single perturbations: one part
        score = torch.einsum("pghd,pkhd->pghk", q.expand(len(k), *q.shape[1:]), k) / k.shape[-1]**.5
        # [P, G, K]
        shares.append(score.masked_fill(~seen[:, 0][:, None, None], -torch.inf).softmax(-1).mean(2))
    hooks = [
        m.register_forward_hook(look) for m in model.model.modules() if isinstance(m, PartAttention)
    ]
    encoded = encode_actions([Action.parse(n, "CRISPRi") for n in names], model.genes, model.table)
    model.change(cells, encoded, [cells.obs.cell_type.iloc[0]] * len(names))
    for h in hooks: h.remove()
    layers = len(hooks)
    # [L, P, G, K]
    share = torch.stack([torch.cat(shares[i::layers]) for i in range(layers)]).numpy()
    hit = np.array([model.genes.index(n) for n in names])
    at = share[:, np.arange(len(names)), hit]
    return at.mean(1), (share.sum(2) - at).mean(1) / (share.shape[2] - 1)

def main(seeds):
    warnings.filterwarnings("ignore")
    with open(Path(__file__).parent/"listening.csv", "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["seed", "what", "who", "value"])
        def write(*row):
            out.writerow([*row[:-1], f"{row[-1]:.4f}"])
            f.flush()
            print(*row, flush=True)
        for seed in seeds:
            cells = bj.prepare(
                bj.simulate(
                    n_genes=GENES,
                    n_perturbations=150,
                    cells_per_perturbation=40,
                    cell_types=2,
                    seed=seed,
                ),
                n_genes=GENES,
            )
            split = bj.split(cells, "unseen_gene", seed=seed)
            def fit(**how):
                return bj.BioJEPA.fit(
                    cells,
                    split,
                    features=bj.simulated_features(cells),
                    seed=seed,
                    closed_form=False,
                    progress=False,
                    **how,
                )
            none = dict(training=dict(steps=0))
            for who, model in {
                "untrained": fit(pretraining=dict(steps=0), **none),
                "pretrained": fit(**none),
                "trained": fit(),
            }.items():
                write(seed, "tells the line", who, tells_line(model.model, cells))
            names = list(split.test)
            for who, share in zip(("the hit gene", "the others"), attention(model, cells, names)):
                for layer, row in enumerate(share):
                    for token, v in zip(
                        [
                            *(f"feature source {i + 1}" for i in range(share.shape[1] - 2)),
                            "mode and time",
                            "target gene",
                        ],
                        row,
                    ):
                        write(seed, f"attention to {token}, layer {layer + 1}", who, v)
            said = model.predict(cells, names, cell_type=cells.obs.cell_type.iloc[0])
            seen = effects(cells)
            seen = seen[(seen.obs.cell_type == cells.obs.cell_type.iloc[0]).values]
            def place(d, n):
                return 1 + int((np.abs(d) > abs(d[model.genes.index(n)])).sum())
            for who, e in {
                "predicted": {n: said[n].layers["delta"].ravel() for n in names},
                "observed": dict(zip(seen.obs.perturbation, np.asarray(seen.X))),
            }.items():
                write(
                    seed,
                    "median place of the hit gene among all by size of change",
                    who,
                    float(np.median([place(e[n], n) for n in names])),
                )


if __name__ == "__main__": main([int(x) for x in sys.argv[1:]] or range(3))
