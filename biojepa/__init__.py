"A world model for cells: from a control state and an action to the treated state."
__version__ = "0.1.0"

import sys
from importlib import import_module
from types import ModuleType

# The names that users type, imported when first used: `biojepa --help` need not wait for torch.
_API = {
    "simulate": "simulator", "simulated_features": "simulator", "true_effects": "simulator",
    "read": "files", "preview_labels": "labels", "prepare": "prepare", "effects": "effects", "add_mode": "cells",
    "dataset": "catalog", "datasets": "catalog", "concat": "concat",
    "split": "splits", "folds": "splits",
    "BioJEPA": "estimator", "scorecard": "scorecard", "plot_effect": "plots",
    "plan": "planning", "signature": "goals", "sets_goal": "goals", "latent_distance": "goals",
    "plan_steps": "plan_steps",
    "combine": "combinations",
    "safety": "safety", "Head": "heads", "held_out_effects": "heads", "analogues": "analogues",
    "pathway_edges": "pathway_edges",
    "needed_genes": "needed_genes",
    "to_cell_eval": "evaluator_files",
}
__all__ = list(_API)


class _Package(ModuleType):
    def __setattr__(self, name, value):
        "`biojepa.prepare` is the function, also after the module of that name was imported."
        if isinstance(value, ModuleType) and _API.get(name) == name: value = getattr(value, name)
        super().__setattr__(name, value)


def __getattr__(name):
    if name not in _API: raise AttributeError(f"module 'biojepa' has no attribute {name!r}; it has {', '.join(_API)}")
    return getattr(import_module(f"biojepa.{_API[name]}"), name)


def __dir__(): return sorted([*globals(), *_API])


sys.modules[__name__].__class__ = _Package
