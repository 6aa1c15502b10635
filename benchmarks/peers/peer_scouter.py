"""Scouter (PyPI `scouter-learn`): control expression and gene embeddings through two small perceptrons. Takes our features as its embeddings."""
import pandas as pd
import torch
from scouter import Scouter, ScouterData

from task import Task

EPOCHS = 40        # its own default; it stops early on the validation perturbations


def main():
    task = Task.from_command_line()
    torch.manual_seed(task.seed)
    table = task.white()
    none = pd.DataFrame(0.0, ["ctrl"], table.columns)
    def label(n): return "ctrl" if n == task.control else n if "+" in n else f"{n}+ctrl"
    known = [n for n in task.test if all(p in table.index for p in task.parts(n))]
    cells = task.cells
    cells.obs["condition"] = pd.Categorical([label(n) for n in task.names])
    cells.var["gene_name"] = cells.var_names
    cells.X = cells.X.tocsr()
    data = ScouterData(cells, pd.concat([none, table]), "condition", "gene_name")
    data.setup_ad("embd_index", slim=False)
    data.gene_ranks()
    data.get_dropout_non_zero_genes()
    data.split_Train_Val_Test(if_test=False, val_conds=[label(n) for n in task.val])
    model = Scouter(data, device="cpu")
    model.model_init()
    epochs = task.epochs(EPOCHS)
    model.train(n_epochs=epochs)
    done = len(model.loss_history["train_loss"])
    base = task.control_mean()
    said = model.pred([label(n) for n in known], seed=task.seed)
    delta = {n: said[label(n)].mean(0) - base for n in known}
    delta.update({n: task.average() for n in task.test if n not in delta})
    lost = [n for n in task.test if n not in known]
    task.answer(
        delta,
        "scouter-learn",
        f"{done} of {EPOCHS}, "
        + ("stopped on validation loss" if done < epochs else "never stopped by validation"),
        "ours, whitened",
        done == epochs < EPOCHS,
        (f"no features for {', '.join(lost)}: answered by the average training effect")
        if lost
        else "",
    )


main()
