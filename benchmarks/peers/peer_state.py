"""State transition model of the Arc Institute (PyPI `arc-state`): sets of control cells to sets of treated cells by a transformer.

Trained and asked by its own command line (`state tx train`, `state tx infer`), from scratch, with our features as its `perturbation_features_file`.
Smaller than its defaults, and far fewer steps, so that it ends on a CPU.
"""
import json
import subprocess
import sys

import anndata
import numpy as np
import pandas as pd
import torch

from task import Task

STEPS, OWN = 1000, 400_000         # trained here, and its own default
SET = 32
WIDTH = 128  # cells in a set (its default is 512; a perturbation here has 40 to 100), width (768)


def cells_for(task, X, names):
    "Cells as State reads them: obsm['X_hvg'] is log1p expression, obs categorical."
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(names),
            "cell_type": pd.Categorical(["LINE"] * len(names)),
            "batch": pd.Categorical(["0"] * len(names)),
        },
        index=[f"c{i}" for i in range(len(names))],
    )
    genes = list(task.cells.var_names)
    out = anndata.AnnData(
        X,
        obs=obs,
        var=pd.DataFrame({"gene_name": genes}, index=genes),
        obsm={"X_hvg": X.toarray().astype(np.float32)},
    )
    out.uns["log1p"] = {}
    return out


def state(*words, cwd):
    subprocess.run([sys.executable, "-m", "state", *map(str, words)], check=True, cwd=cwd)


def main():
    task = Task.from_command_line()
    folder = task.scratch()
    table = task.white()
    (folder/"screen").mkdir(exist_ok=True)
    X = task.cells.X.tocsr()
    cells_for(task, X, task.names).write_h5ad(folder/"screen/screen.h5ad")
    def vector(n):
        return torch.tensor(table.reindex(task.parts(n)).fillna(0.0).sum().to_numpy(np.float32))
    torch.save(
        {n: vector(n) for n in [task.control, *task.train, *task.val, *task.test]},
        folder / "features.pt",
    )
    (folder / "screen.toml").write_text(
        f'[datasets]\nscreen = "{folder}/screen"\n\n[training]\nscreen = '
        '"train"\n\n[zeroshot]\n\n[fewshot."screen.LINE"]\nval = '
        f'{json.dumps(task.val)}\ntest = []\n'
    )
    steps = task.epochs(STEPS, quick=20)
    every = max(10, steps // 10)
    data = dict(
        toml_config_path=folder / "screen.toml",
        embed_key="X_hvg",
        output_space="gene",
        num_workers=0,
        pin_memory="false",
        batch_col="batch",
        pert_col="perturbation",
        cell_type_key="cell_type",
        control_pert=task.control,
        perturbation_features_file=folder / "features.pt",
    )
    model = dict(cell_set_len=SET, hidden_dim=WIDTH)
    backbone = dict(
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=WIDTH // 4,
    )
    training = dict(
        batch_size=8,
        lr=3e-4,
        max_steps=steps,
        val_freq=every,
        ckpt_every_n_steps=every,
        train_seed=task.seed,
    )
    words = [f"data.kwargs.{k}={v}" for k, v in data.items()] + [
        f"model.kwargs.{k}={v}" for k, v in model.items()
    ]
    words += [f"model.kwargs.transformer_backbone_kwargs.{k}={v}" for k, v in backbone.items()] + [
        f"training.{k}={v}" for k, v in training.items()
    ]
    state(
        "tx",
        "train",
        "model=state",
        *words,
        "use_wandb=false",
        f"output_dir={folder}",
        "name=run",
        "overwrite=true",
        cwd=folder,
    )
    rng = np.random.default_rng(task.seed)
    control = np.flatnonzero(task.names == task.control)
    rows = [control, *(rng.choice(control, 2 * SET) for _ in task.test)]
    names = np.repeat([task.control, *task.test], [len(r) for r in rows])
    cells_for(task, X[np.concatenate(rows)], names).write_h5ad(folder/"asked.h5ad")
    best = folder/"run/checkpoints/best.ckpt"
    best = best if best.exists() else folder/"run/checkpoints/final.ckpt"
    state(
        "tx",
        "infer",
        "--model-dir",
        folder / "run",
        "--checkpoint",
        best,
        "--adata",
        folder / "asked.h5ad",
        "--embed-key",
        "X_hvg",
        "--pert-col",
        "perturbation",
        "--output",
        folder / "said.h5ad",
        "--seed",
        task.seed,
        "--quiet",
        cwd=folder,
    )
    said = np.asarray(anndata.read_h5ad(folder/"said.h5ad").obsm["X_hvg"])
    base = task.control_mean()
    delta = {n: said[names == n].mean(0) - base for n in task.test}
    task.answer(
        delta,
        "arc-state",
        f"{steps} steps of {OWN}, the best on validation kept",
        "ours, whitened",
        True,
        (
            f"a small one: sets of {SET} cells, width {WIDTH}, 4 layers "
            "(its default: 512, 768, 8), batches of 8 sets (16), learning "
            "rate 3e-4 (1e-4), trained from scratch"
        ),
    )


main()
