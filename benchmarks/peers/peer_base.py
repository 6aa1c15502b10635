"""biojepa's own `base` on the same files, as a plain `fit` makes it; runs in the environment of the driver."""
import biojepa as bj
import numpy as np
import pandas as pd
from biojepa.splits import Split

from task import Task


def main():
    task = Task.from_command_line()
    split = Split.from_dict(task.settings["split"])
    f = task.features
    known = dict(zip(f.uns["sources"], f.obsm["known"].astype(bool).T))
    table = {
        s: pd.DataFrame(np.asarray(f[k, f.var.source == s].X), f.obs_names[k])
        for s, k in known.items()
    }
    model = bj.BioJEPA.fit(
        task.cells,
        split,
        preset="base",
        features=table,
        seed=task.seed,
        progress=False,
        device="cpu",
    )
    out = model.predict(task.cells, list(task.test))
    delta = dict(zip(out.obs.perturbation, np.asarray(out.layers["delta"])))
    task.answer(
        delta, "biojepa", "closed form", "ours, whitened", note=f"gate of the network {model.gate:.2f}"
    )


main()
