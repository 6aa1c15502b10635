"""The files of a task, on biojepa's side: written for a peer, its predictions read back. A peer's side is `task.py`.

A folder holds one task:

    cells.h5ad         training and validation cells with all controls: X log1p of counts per 10,000, layers['counts'] where there are counts,
                       obs['part'] 'train' or 'val'; no treated cell of a test perturbation, nothing of a simulation's truth
    features.h5ad      what is known of targets, one row each: X as the sources say it (zeros where `obsm['known']` is False),
                       obsm['white'] whitened on the training targets, which is what `base` and the ridge see; var['source']
    task.json          names of train, val and test perturbations, the control's name, the split, the seed
    predictions.h5ad   the answer: layers['delta'] (perturbations x genes), obs['perturbation']
    about.json         what the peer says of itself: version, features_used, epochs, cut_short, note, refused
"""
import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData

from biojepa.cells import CONTROL, COLUMNS, parts
from biojepa.featurizers import as_table
from biojepa.splits import check_split

FORMAT = 1
ABOUT = {
    "version": str,
    "features_used": str,
    "epochs": str,
    "cut_short": bool,
    "note": str,
    "refused": dict,
}


class BadAnswer(ValueError):
    """An answer that cannot be scored; the message names the file and what is wrong in it.

    """


def targets_of(names): return sorted({p for n in names for p in parts(n)})


def features_file(features, split, genes):
    "Features of every perturbed target and every gene, raw and whitened on training targets."
    raw = as_table(features)
    white = raw.fit(targets_of(split.train))
    names = sorted({*targets_of(split.train + split.val + split.test), *genes})
    (x, known) = raw.transform(names)
    (w, _) = white.transform(names)
    columns = [(s, f"{s}:{i}") for s, d in raw.dims.items() for i in range(d)]
    var = pd.DataFrame({"source": [s for s, _ in columns]}, index=[c for _, c in columns])
    out = AnnData(
        x, obs=pd.DataFrame(index=names), var=var, obsm={"known": known.astype(np.int8), "white": w}
    )
    out.uns["sources"] = np.array(list(raw.dims))
    return out


def write_task(cells, split, features, folder, dataset="", seed=0):
    """Write one task. Raises Leak before anything is written when a held-out perturbation could be
    learned from it."""
    check_split(split, cells)
    folder = Path(folder)
    train, val = (split.mask(cells, p) for p in ("train", "val"))
    given = cells[train | val].copy()
    given.obs = given.obs[list(COLUMNS)].assign(part=np.where(val[train | val], "val", "train"))
    given.uns = {"biojepa": cells.uns["biojepa"]}
    task = dict(
        format=FORMAT,
        dataset=dataset,
        seed=seed,
        control=CONTROL,
        split=split.to_dict(),
        train=split.train,
        val=split.val,
        test=split.test,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for old in ("predictions.h5ad", "about.json", "measured.json"):
        (folder / old).unlink(missing_ok=True)
    given.write_h5ad(folder/"cells.h5ad")
    features_file(features, split, given.var_names).write_h5ad(folder/"features.h5ad")
    (folder/"task.json").write_text(json.dumps(task, indent=1))
    return folder


def read_about(folder):
    "What the peer says of itself, every field there and of its type."
    path = Path(folder)/"about.json"
    if not path.is_file(): raise BadAnswer(f"{path.name} is missing: the peer did not end")
    about = json.loads(path.read_text())
    for key, kind in ABOUT.items():
        if not isinstance(about.get(key), kind):
            raise BadAnswer(f"{path.name}: {key!r} must be {kind.__name__}, not {about.get(key)!r}")
    return about


def read_predictions(folder, genes, split):
    """Predictions as a DataFrame (test perturbations x genes), NaN for those refused, and
    `about.json`. Raises BadAnswer naming what is wrong."""
    about = read_about(folder)
    path = Path(folder)/"predictions.h5ad"
    refused = [n for n in split.test if split.groups[n] in about["refused"]]
    if not path.is_file(): raise BadAnswer(f"{path.name} is missing")
    out = anndata.read_h5ad(path)
    if "delta" not in out.layers:
        raise BadAnswer(
            f"{path.name} has no layers['delta'], the predicted change of log1p expression"
        )
    if "perturbation" not in out.obs: raise BadAnswer(f"{path.name} has no obs['perturbation']")
    table = pd.DataFrame(
        np.asarray(out.layers["delta"], dtype=float),
        out.obs.perturbation.astype(str),
        out.var_names,
    )
    wanted = [n for n in split.test if n not in refused]
    for what, index, needed in (
        ("perturbation", table.index, wanted),
        ("gene", table.columns, genes),
    ):
        if index.duplicated().any():
            raise BadAnswer(f"{path.name}: {what} {index[index.duplicated()][0]!r} is there twice")
        lost = [n for n in needed if n not in index]
        if lost: raise BadAnswer(f"{path.name}: no prediction for {what} {lost[0]!r}")
    table = table.loc[wanted, list(genes)]
    bad = ~np.isfinite(table.to_numpy()).all(1)
    if bad.any():
        raise BadAnswer(
            f"{path.name}: the prediction for {table.index[bad.argmax()]!r} is not finite"
        )
    return table.reindex(list(split.test)), about
