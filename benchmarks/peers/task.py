"""A task on the side of a peer: read the files, write the predictions. Needs anndata, numpy and pandas only, old ones too."""
import argparse, json, random
from importlib.metadata import version
from pathlib import Path

import anndata
import numpy as np
import pandas as pd


class Task:
    """One folder: `.cells`, `.features`, names in `.train`, `.val`, `.test`, `.control`, `.seed`,
    `.quick`, a smoke test, and `.epochs(own)`."""
    def __init__(self, folder, quick=False, at_most=None):
        self.folder = Path(folder).resolve()
        self.quick = quick
        self.at_most = at_most
        self.settings = json.loads((self.folder/"task.json").read_text())
        for key in ("train", "val", "test", "control", "seed", "dataset"):
            setattr(self, key, self.settings[key])
        self.cells = anndata.read_h5ad(self.folder/"cells.h5ad")
        self.features = anndata.read_h5ad(self.folder/"features.h5ad")
        self.names = self.cells.obs["perturbation"].astype(str).to_numpy()
        random.seed(self.seed)
        np.random.seed(self.seed)

    @classmethod
    def from_command_line(cls):
        ask = argparse.ArgumentParser()
        ask.add_argument("folder")
        ask.add_argument("--quick", action="store_true")
        ask.add_argument("--epochs", type=int)
        a = ask.parse_args()
        return cls(a.folder, a.quick, a.epochs)

    def epochs(self, own, quick=2):
        "How many epochs to train: the peer's own number, or fewer where the command line says so."
        return min(own, quick if self.quick else self.at_most or own)

    def scratch(self):
        out = self.folder/"scratch"
        out.mkdir(exist_ok=True)
        return out

    def parts(self, name): return name.split("+")

    def white(self):
        "Whitened features as a DataFrame, the targets of which something is known."
        known = np.asarray(self.features.obsm["known"]).any(1)
        return pd.DataFrame(
            np.asarray(self.features.obsm["white"])[known], self.features.obs_names[known]
        )

    def kinds(self):
        return self.settings["split"]["groups"]   # name -> 'unseen_gene', 'pair_seen0' to 2

    def mean(self, rows): return np.asarray(self.cells.X[rows].mean(0)).ravel()

    def control_mean(self): return self.mean(self.names == self.control)

    def average(self):
        "The mean effect of the training perturbations: an answer where nothing is known."
        return np.mean([self.mean(self.names == n) for n in self.train], 0) - self.control_mean()

    def answer(self, delta, package, epochs, features_used, cut_short=False, note="", refused=None):
        "Write predictions {name: change per gene} and how they were made."
        names = list(delta)
        values = np.array([np.asarray(delta[n], dtype=np.float32).ravel() for n in names]).reshape(
            len(names), self.cells.n_vars
        )
        obs = pd.DataFrame({"perturbation": names}, index=[str(i) for i in range(len(names))])
        out = anndata.AnnData(
            values,
            obs=obs,
            var=pd.DataFrame(index=list(self.cells.var_names)),
            layers={"delta": values},
        )
        out.write_h5ad(self.folder/"predictions.h5ad")
        about = dict(
            version=f"{package} {version(package)}",
            features_used=features_used,
            epochs=str(epochs),
            cut_short=bool(cut_short),
            note=note,
            refused=refused or {},
        )
        (self.folder/"about.json").write_text(json.dumps(about, indent=1))
