"A world model for cells: from a control state and an action to the treated state."
__version__ = "0.1.0"

# The names that users type, imported when first used: `biojepa --help` need not wait for torch.
_API = {"simulate": "simulator", "simulated_features": "simulator", "true_effects": "simulator", "prepare": "cells", "effects": "cells", "add_mode": "cells",
        "dataset": "catalog", "datasets": "catalog", "concat": "together", "split": "splits", "folds": "splits", "BioJEPA": "estimator", "scorecard": "evaluation",
        "to_cell_eval": "exchange"}
__all__ = list(_API)


def __getattr__(name):
    if name not in _API: raise AttributeError(f"module 'biojepa' has no attribute {name!r}; it has {', '.join(_API)}")
    from importlib import import_module
    return getattr(import_module(f"biojepa.{_API[name]}"), name)


def __dir__(): return sorted([*globals(), *_API])
