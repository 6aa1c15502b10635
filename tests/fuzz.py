"""Damaged and odd inputs, drawn by kind from a seed: is each refused with a sentence, or answered rightly?

    python -m tests.fuzz 300 0              # 300 cases from seed 0; fails on what must not happen
    python -m tests.fuzz 300 0 labels       # one kind only
    python -m tests.fuzz 1 217 units        # one case again

Each case runs in a process of its own. It *works*, or is refused in a *clear* sentence; it must not end in a
*traceback*, a *crash* of the process or a *hang*, nor be *silently* wrong.
"""
import collections, contextlib, io, json, os, re, resource, shutil, signal, sys, tempfile, time, traceback, warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")  # OpenMP does not live through a fork

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse

import biojepa as bj

LIMIT = 60
MEMORY = 8 << 30  # seconds of one case; bytes it may claim
BAD = ("traceback", "crash", "hang", "silent")
REFUSALS = (ValueError, KeyError, OSError)


class Silent(Exception): "A wrong answer without a word."


def screen(labels, n=10, genes=24, seed=0, **obs):
    "n cells of each label: whole counts of genes G0, G1, ..."
    rng = np.random.default_rng(seed)
    each = np.repeat(labels, n)
    rate = rng.gamma(2, 10, genes)[None] * rng.gamma(8, 1 / 8, (len(each), 1))
    X = rng.poisson(rate).astype("float32")
    X[:, 0] += 1
    names = [f"c{i}" for i in range(len(each))]
    obs = pd.DataFrame({"perturbation": each, **obs}, index=names)
    return ad.AnnData(
        sparse.csr_matrix(X), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(genes)])
    )


def ask(f):
    "(result, refusal, warnings as text); whatever is no refusal goes on."
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        try: out, refusal = f(), None
        except REFUSALS as e:
            if len(str(e)) < 10: raise
            out = None
            refusal = str(e)
    return (
        out,
        refusal,
        " | ".join(
            str(x.message)
            for x in w
            if not issubclass(x.category, (FutureWarning, DeprecationWarning))
        ),
    )


def shell(*words):
    "(exit code, text) of the command line, in this process."
    from biojepa.cli import main
    text = io.StringIO()
    sys.argv = ["biojepa", *map(str, words)]
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            main()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        else:
            code = 0
    if "Traceback" in text.getvalue(): raise RuntimeError(text.getvalue()[-500:])
    if code and len(text.getvalue().strip()) < 10:
        raise RuntimeError(f"exit {code} without a sentence")
    return code, text.getvalue()


def wrong_unless(right, what):
    if not right: raise Silent(what)
    return "works"


def same(a, b, what):
    "The same prepared cells, or it is silently wrong."
    a = a[b.obs_names, b.var_names]
    far = np.abs(np.asarray((a.X - b.X).todense() if sparse.issparse(a.X) else a.X - b.X)).max()
    return wrong_unless(far < 1e-3, f"{what}: values off by {far:.3g}")


# ---- kinds: each takes a random generator and a folder, and returns 'works' or 'clear', or raises

def bytes_of_a_screen(rng, folder):
    "Bits flipped, an end cut off or a range overwritten in an h5ad."
    path = folder/"a.h5ad"
    screen(["control", "G1", "G2"]).write_h5ad(path)
    damage(rng, path)
    code, _ = shell("prepare", path, folder/"c.h5ad")
    if code:
        if (folder/"c.h5ad").exists(): raise Silent("refused, and left a file behind")
        return "clear"
    out = ad.read_h5ad(folder/"c.h5ad")
    X = out.X.toarray() if sparse.issparse(out.X) else out.X
    return wrong_unless(
        np.isfinite(X).all() and (np.expm1(X).sum(1) < 10010).all(),
        "cells that break the contract were written",
    )


def damage(rng, path):
    data = bytearray(path.read_bytes())
    how = rng.integers(3)
    if how == 0:
        for i in rng.integers(len(data), size=rng.integers(1, 40)): data[i] ^= 1 << rng.integers(8)
    elif how == 1: data = data[:rng.integers(len(data))]
    else:
        at = rng.integers(len(data))
        data[at:at + 64] = rng.bytes(64)
    path.write_bytes(bytes(data))


def matrix_of_a_screen(rng, folder):
    "A matrix whose numbers or places are not what a matrix holds."
    a = screen(["control", "G1", "G2"])
    path = folder/"a.h5ad"
    clean = bj.prepare(a)
    if rng.random() < .3: a.X = sparse.csc_matrix(a.X)
    a.write_h5ad(path)
    how = rng.choice(
        [
            "beyond",
            "negative place",
            "pointer",
            "short",
            "nan",
            "inf",
            "below zero",
            "fraction",
            "order",
            "twice",
            "huge shape",
        ]
    )
    with h5py.File(path, "a") as f:
        X = f["X"]
        at = rng.integers(len(X["indices"]) - 1)
        if how == "beyond":
            X["indices"][at] = rng.choice([24 + 10, 10**9, 2**31 - 1])
        elif how == "negative place":
            X["indices"][at] = -rng.integers(1, 10**6)
        elif how == "pointer":
            X["indptr"][rng.integers(1, len(X["indptr"]))] = rng.choice([-5, 10**9, 2**31 - 1])
        elif how == "short":
            kept = X["data"][: -int(rng.integers(1, 50))]
            del X["data"]
            X["data"] = kept
        elif how in ("nan", "inf", "below zero", "fraction"):
            X["data"][at] = dict(
                zip(("nan", "inf", "below zero", "fraction"), (np.nan, np.inf, -3, 1.37))
            )[how]
        elif how == "huge shape":
            X.attrs["shape"] = [30, 10**10]
        else:
            reorder(X, twice=how == "twice")
    code, _ = shell("prepare", path, folder/"c.h5ad")
    if code: return "clear"
    if how in ("order", "twice"): return same(ad.read_h5ad(folder/"c.h5ad"), clean, how)
    raise Silent(f"{how}: prepared")


def reorder(X, twice):
    "The same matrix with entries out of order, or each in two pieces."
    at = X["indptr"][:]
    index = X["indices"][:]
    data = X["data"][:]
    rows = [slice(a, b) for a, b in zip(at, at[1:])]
    if twice:
        half = np.floor(data / 2)
        index = np.concatenate([np.r_[index[r], index[r]] for r in rows])
        data = np.concatenate([np.r_[half[r], data[r] - half[r]] for r in rows])
        at = at * 2
    else:
        index, data = (np.concatenate([v[r][::-1] for r in rows]) for v in (index, data))
    for key, value in (("indptr", at), ("indices", index), ("data", data)):
        del X[key]
        X[key] = value


def labels(rng, folder):
    "Labels as labs write them, with a known meaning."
    control = str(
        rng.choice(
            [
                "control",
                "NT",
                "neg_ctrl",
                "non-targeting",
                "ctrl+ctrl",
                "DMSO (0.1%)",
                "safe-targeting-1",
            ]
        )
    )
    sep = str(rng.choice(["+", "_", "-", "|", "&", ";"]))
    odd = [
        "(+)-JQ1",
        "2i (LIF+MEKi)",
        "AAGAB_+_67546963.23-P1P2",
        "N-[4-(a+b)]",
        "x (R,S)+(S,R)",
        "TGFb{A+B}",
        "HLA-DRA",
        "NKX2-1",
        "MT-ND1",
        "C1_orf",
        "a|b (c;d)",
        "(-)-nicotine & water",
        "IFN-g",
    ]
    own = list(rng.choice(["G1", "G2", "G3", "G4", "G5"], 3, replace=False))
    truth = {
        control: "control",
        own[0]: own[0],
        f"{own[1]}{sep}{own[2]}": "+".join(sorted(own[1:])),
    }
    if rng.random() < .6: truth[f"{own[1]}{sep}{control}"] = own[1]
    if rng.random() < .6: truth[f"{control}{sep}{own[2]}"] = own[2]
    strange = [str(x) for x in rng.choice(odd, rng.integers(3), replace=False)]
    for x in strange:
        outside = re.sub(r"\(.*?\)|\[.*?\]|\{.*?\}", "", x)
        if sep not in outside or sep == "+": truth[x] = x  # else it could be either
    a = screen(list(truth), 6)
    out, no, said = ask(
        lambda: bj.prepare(a, control=control, sep=sep, mode=str(rng.choice(["drug", "CRISPRi"])))
    )
    if no:
        return (
            "clear"
            if any(l in no for l in truth)
            else raise_(Silent(f"a refusal that names no label: {no}"))
        )
    got = dict(zip(a.obs.perturbation, out.obs.perturbation))
    # a '+' that joins nothing is written as 'plus', so that the name stays one target
    def same_name(a, b): return a.replace(" plus ", "+").replace("plus", "+") == b
    bad = {l: got[l] for l in truth if not same_name(got[l], truth[l]) and l not in said}
    if control != "control": bad.pop("control", None)
    return wrong_unless(not bad, f"control {control!r}, sep {sep!r}: {bad}")


def raise_(e): raise e


def units(rng, folder):
    "Values on another scale than they are said to be."
    a = screen(
        ["control", "G1", "G2"], genes=int(rng.integers(20, 80)), seed=int(rng.integers(100))
    )
    right = bj.effects(bj.prepare(a)).X
    X = a.X.toarray().astype(np.float64)
    scale = {
        "10,000": 1e4,
        "median": np.median(X.sum(1)),
        "none": None,
        "million": 1e6,
        "1,000": 1e3,
        "100": 100,
    }
    how = str(rng.choice(list(scale)))
    base = X if scale[how] is None else X / X.sum(1, keepdims=True) * scale[how]
    logs = {
        "log1p": np.log1p,
        "log2": lambda x: np.log2(1 + x),
        "log10": lambda x: np.log10(1 + x),
        "twice": lambda x: np.log1p(np.log1p(x)),
        "root": np.sqrt,
        "plain": lambda x: x,
        "scaled": lambda x: (np.log1p(x) - np.log1p(x).mean(0)) / (np.log1p(x).std(0) + 1e-9),
        "clipped": lambda x: np.minimum(np.log1p(x), 2.0),
    }
    kind_of = str(rng.choice(list(logs)))
    b = a.copy()
    b.X = logs[kind_of](base).astype("float32")
    if rng.random() < .5: b.X = sparse.csr_matrix(b.X)
    kind = str(rng.choice(["log1p", "counts"]))
    out, no, said = ask(lambda: bj.prepare(b, kind=kind))
    if no: return "clear"
    far = np.abs(bj.effects(out).X - right).max()
    words = said.replace("perturbed genes are not measured", "")
    return wrong_unless(
        far < 1e-2 or any(w in words for w in ("10,000", "log", "scale", "base")),
        f"{kind_of} of {how} taken as {kind}: effects off by {far:.2f}",
    )


def columns(rng, folder):
    "Text where a name or number should be, in a column of the contract."
    a = screen(["control", "G1", "G2", "G3"])
    key = str(rng.choice(["perturbation", "cell_type", "batch", "dose", "time", "mode"]))
    gaps = ["nan", "None", "NA", "<NA>", "", " ", "NaN", "null", "N/A", "none"]
    numbers = {
        "0_5": None,
        "1,5": None,
        "1e3": 1000.0,
        " 2 ": 2.0,
        "inf": None,
        "-1": None,
        "0x10": None,
        "1_000": None,
        "5": 5.0,
        "٣": None,
        "ten": None,
        "10uM": None,
        "1.0.0": None,
        "1e400": None,
    }
    plain = dict(cell_type="K562", batch="b1", dose="1", time="24", mode="CRISPRi")
    is_number = key in ("dose", "time") and rng.random() < .7
    odd = str(rng.choice(list(numbers) if is_number else gaps))
    some = (a.obs.perturbation == "G3").to_numpy()
    text = np.where(some, odd, a.obs.perturbation if key == "perturbation" else plain[key]).astype(
        object
    )
    a.obs[key] = text
    out, no, said = ask(lambda: bj.prepare(a))
    if no: return "clear"
    got = (
        out.obs[key][some] if some.sum() == (out.obs_names.isin(a.obs_names[some])).sum() else None
    )
    if is_number:
        want = numbers[odd]
        return wrong_unless(
            want is not None and got is not None and np.allclose(got.astype(float), want),
            f"{key} {odd!r} became {None if got is None else got.iloc[0]!r}",
        )
    if got is None:
        return wrong_unless(bool(said), f"cells with {key} {odd!r} were dropped without a word")
    fine = key == "time" and got.isna().all()
    return wrong_unless(
        fine or repr(odd) in said or str(got.iloc[0]).strip() != odd.strip(),
        f"{key} {odd!r} is taken for a name",
    )


def unused_columns(rng, folder):
    "What the lab recorded under other names than ours."
    a = screen(["control", "D1", "D2"], 24)
    lines = np.resize(["A549", "K562"], a.n_obs)
    doses = np.where(a.obs.perturbation == "control", 0., np.resize([.1, 1., 10.], a.n_obs))
    given = (
        {
            str(
                rng.choice(["celltype", "cell_line", "cellline", "cell_line_name", "CellType"])
            ): lines
        }
        if rng.random() < 0.7
        else {}
    )
    if rng.random() < 0.7:
        given[str(rng.choice(["dose_value", "dosage", "Dose", "dose_val"]))] = doses
    if rng.random() < 0.5:
        given[str(rng.choice(["timepoint", "time_point", "hours"]))] = np.resize(
            [6.0, 24.0], a.n_obs
        )
    for k, v in given.items(): a.obs[k] = v
    out, no, said = ask(lambda: bj.prepare(a, mode="drug"))
    if no: return "clear"
    lost = [k for k in given if k not in said]
    return wrong_unless(not lost, f"pooled over {lost} without a word")


def fitted(folder):
    "A small screen and a closed form fitted on it."
    raw = bj.simulate(n_genes=30, n_perturbations=14, n_doubles=4, cells_per_perturbation=6, seed=0)
    cells = bj.prepare(raw, n_genes=30)
    features = bj.simulated_features(raw)
    split = bj.split(cells, "simulation", seed=0)
    model = bj.BioJEPA.fit(
        cells,
        split,
        features=features,
        network=False,
        device="cpu",
        progress=False,
        out=folder / "m",
    )
    return cells, split, features, model


def model_folder(rng, folder):
    "Files of a saved model, damaged."
    cells, split, _, model = fitted(folder)
    names = [split.test[0], split.train[0]]
    right = model.predict(cells, names)
    path = folder/"m"/str(rng.choice(["model.safetensors", "model.json"]))
    if path.suffix == ".json" and rng.random() < .7:
        facts = json.loads(path.read_text())
        key = str(rng.choice(list(facts)))
        new = rng.choice(["drop", "nan", "text", "huge", "empty", "list"])
        if new == "drop":
            facts.pop(key)
        else:
            facts[key] = dict(nan=float("nan"), text="text", huge=1e308, empty=None, list=[1, "a"])[
                new
            ]
        path.write_text(json.dumps(facts))
    else: damage(rng, path)
    out, no, said = ask(lambda: bj.BioJEPA.load(folder/"m").predict(cells, names))
    if no: return "clear"
    far = max(np.abs(out.layers[k] - right.layers[k]).max() for k in ("delta", "std"))
    return wrong_unless(far < 1e-5, f"{path.name} damaged, predictions off by {far:.3g}")


def questions(rng, folder):
    "Predictions asked of what cannot be, or lies far from what was trained."
    cells, split, features, model = fitted(folder)
    name = rng.choice(
        np.array(
            [
                "",
                " ",
                "A++B",
                "+A",
                "nan",
                5,
                None,
                np.nan,
                split.train[0],
                split.test[0],
                "NOBODY",
                "control",
                "control+" + split.train[0],
                b"x",
            ],
            dtype=object,
        )
    )
    more = {}
    if rng.random() < 0.5:
        more["dose"] = rng.choice(
            np.array([-1, 0, 1, 1e3, 1e300, np.inf, np.nan, "1", None], dtype=object)
        )
    if rng.random() < 0.5:
        more["time"] = rng.choice(np.array([-1, 0, 24, 1e5, np.inf, "x", None], dtype=object))
    if rng.random() < 0.3:
        more["mode"] = rng.choice(np.array(["CRISPRa", "drug", "", "none", 3], dtype=object))
    if rng.random() < .3: more["cell_type"] = rng.choice(np.array(["nowhere", "", 4], dtype=object))
    asked = [name] if rng.random() < .9 else []
    try: out, no, said = ask(lambda: model.predict(cells, asked, **more))
    except TypeError as e: no = str(e)
    if no: return "clear"
    top = np.log(10001) + 1e-3
    X = [out.layers[k] for k in ("mean", "delta", "std")]
    wrong_unless(
        all(np.isfinite(x).all() for x in X), f"{name!r} {more}: a prediction that is no number"
    )
    wrong_unless(
        not len(X[0]) or (-1e-3 <= X[0].min() and X[0].max() <= top),
        f"{name!r} {more}: a mean from {X[0].min():.2f} to {X[0].max():.2f}",
    )
    far = (
        more.get("dose") in (1e3,)
        or more.get("time") in (1e5,)
        or more.get("mode") in ("CRISPRa", "drug")
        or name == "NOBODY"
    )
    idle = name == "control" or more.get("dose") == 0 and name != "NOBODY"  # no action, wherever
    return wrong_unless(
        not far or idle or bool(said) or out.obs.support.max() < 0.99,
        f"{name!r} {more}: support {out.obs.support.max():.2f} and no word",
    )


def feature_files(rng, folder):
    "Tables of features with what does not belong there."
    cells, split, features, _ = fitted(folder)
    table = features if isinstance(features, pd.DataFrame) else next(iter(features.values()))
    table = table.copy().astype(object)
    how = str(
        rng.choice(["nan", "inf", "text", "twice", "empty", "no rows", "constant", "bytes", "huge"])
    )
    i = rng.integers(table.shape[0])
    j = rng.integers(table.shape[1])
    if how in ("nan", "inf", "text", "huge"):
        table.iloc[i, j] = dict(nan=np.nan, inf=np.inf, text="x", huge=1e300)[how]
    elif how == "twice":
        table = pd.concat([table, table.iloc[[i]] * 2])
    elif how == "empty":
        table = table.iloc[:, :0]
    elif how == "no rows":
        table = table.iloc[:0]
    elif how == "constant":
        table.iloc[:, :] = 1.0
    path = folder/"f.csv"
    table.to_csv(path)
    if how == "bytes": damage(rng, path)
    out, no, said = ask(
        lambda: bj.BioJEPA.fit(
            cells, split, features=path, network=False, device="cpu", progress=False
        ).predict(cells, list(split.test))
    )
    if no: return "clear"
    return wrong_unless(
        all(np.isfinite(out.layers[k]).all() for k in ("delta", "std")),
        f"{how}: predictions that are no numbers",
    )


def predictions(rng, folder):
    "Somebody's predictions, handed to the scorecard in other units, orders and names."
    cells, split, _, _ = fitted(folder)
    x = cells.X.toarray()
    how = str(
        rng.choice(
            [
                "right",
                "counts",
                "log2",
                "log10",
                "million",
                "nan",
                "inf",
                "rows",
                "genes",
                "gene twice",
                "lost",
                "negative",
                "plain",
            ]
        )
    )
    X = {
        "counts": cells.layers["counts"].toarray(),
        "log2": x / np.log(2),
        "log10": x / np.log(10),
        "million": np.log1p(np.expm1(x) * 100),
        "negative": x - 1,
        "plain": np.expm1(x),
    }.get(how, x).copy()
    where = np.flatnonzero(cells.obs.perturbation == split.test[0])
    if how in ("nan", "inf"): X[rng.choice(where), 3] = np.nan if how == "nan" else np.inf
    p = ad.AnnData(X, obs=cells.obs[["perturbation"]].copy(), var=cells.var[[]].copy())
    if how == "rows": p = p[rng.permutation(p.n_obs)].copy()
    if how == "genes": p = p[:, rng.permutation(p.n_vars)].copy()
    if how == "lost": p = p[(p.obs.perturbation != split.test[0]).to_numpy()].copy()
    if how == "gene twice":
        p = ad.AnnData(
            np.c_[X, X[:, :1] + 1],
            obs=p.obs,
            var=pd.DataFrame(index=[*p.var_names, p.var_names[0]]),
        )
    card, no, said = ask(
        lambda: bj.scorecard(cells, split, {"theirs": p}, ["mean"], metrics=["mse"], n_boot=20)
    )
    if no: return "clear"
    own = card.table[card.table.model == "theirs"].value.max()
    return wrong_unless(
        own < 1e-6 or "theirs" in said, f"{how}: scored, mse {own:.3g} where the right units give 0"
    )


def run_folder(rng, folder):
    "A folder of an earlier fit, given to another one."
    cells, split, features, model = fitted(folder)
    how = str(rng.choice(["same", "counts", "split", "seed", "option", "features", "labels"]))
    c = cells
    s = split
    f = features
    more = {}
    if how == "counts":
        c = cells.copy()
        c.X = sparse.csr_matrix(np.maximum(c.X.toarray() - .01, 0))
        c.X = np.log1p(
            np.expm1(c.X.toarray()) / np.expm1(c.X.toarray()).sum(1, keepdims=True) * 1e4
        )
    elif how == "split":
        s = bj.split(cells, "simulation", seed=int(rng.integers(1, 50)))
    elif how == "seed":
        more = dict(seed=3)
    elif how == "option":
        more = dict(closed_form_options=dict(rank=3))
    elif how == "features":
        f = (
            features * 1.1
            if isinstance(features, pd.DataFrame)
            else {k: v * rng.normal(1, 0.3, v.shape) for k, v in features.items()}
        )
    elif how == "labels":
        c = cells.copy()
        names = c.obs.perturbation.astype(str).to_numpy()
        a, b = split.train[:2]
        c.obs["perturbation"] = np.where(names == a, b, np.where(names == b, a, names))
    def fit(**k):
        return bj.BioJEPA.fit(
            c, s, features=f, network=False, device="cpu", progress=False, **more, **k
        )
    out, no, said = ask(lambda: fit(out=folder/"m"))
    if no:
        return "clear" if how != "same" else raise_(Silent(f"the same run again is refused: {no}"))
    fresh = fit()
    names = [*split.test][:4]
    far = np.abs(
        out.predict(c, names).layers["delta"] - fresh.predict(c, names).layers["delta"]
    ).max()
    return wrong_unless(
        far < 1e-5, f"other {how}: predictions of the earlier run, off by {far:.3g}"
    )


def names_of_a_split(rng, folder):
    "One target under several names."
    drugs = [f"DRG{chr(65 + i)}{chr(75 + i)}INIB" for i in range(8)]
    style = str(rng.choice(["at", "underscore", "tahoe", "guide", "case", "number"]))
    many = {
        "at": lambda d: [f"{d}@{x}uM" for x in (0.1, 1, 10)],
        "underscore": lambda d: [f"{d}_{x}" for x in (0.1, 1.5, 10.5)],
        "tahoe": lambda d: [f"[('{d}', {x}, 'uM')]" for x in (0.05, 0.5, 5.0)],
        "guide": lambda d: [f"{d}-{x}" for x in "ABC"],
        "case": lambda d: [d, d.lower(), d.capitalize()],
        "number": lambda d: [f"{d}_{i}" for i in (1, 2, 3)],
    }[style]
    of = {l: d for d in drugs for l in many(d)}
    a = screen(["control", *of], 4)
    cells, no, said = ask(lambda: bj.prepare(a, mode="CRISPRi" if style == "guide" else "drug"))
    if no: return "clear"
    split, no, said2 = ask(lambda: bj.split(cells, "unseen_gene", seed=int(rng.integers(50))))
    if no: return "clear"
    both = {of.get(n, n) for n in split.train} & {of.get(n, n) for n in split.test}
    words = (said + said2).replace("perturbed genes are not measured", "")
    return wrong_unless(
        not both or any(n in words for n in of),
        f"{style}: {sorted(both)[:2]} on both sides of the split",
    )


def outputs(rng, folder):
    "An output that would replace an input."
    path = folder/"raw.h5ad"
    screen(["control", "G1", "G2"], genes=60).write_h5ad(path)
    before = path.read_bytes()
    way = rng.integers(4)
    if way == 0: to = path
    elif way == 1:
        to = folder/"link.h5ad"
        to.symlink_to(path)
    elif way == 2: to = folder/"."/".."/folder.name/"raw.h5ad"
    else:
        to = folder/"hard.h5ad"
        os.link(path, to)
    code, _ = shell("prepare", path, to)
    wrong_unless(path.read_bytes() == before, "the raw screen was overwritten")
    return "clear" if code else "works"


def formats(rng, folder):
    "The same screen in the formats of others."
    import gzip
    a = screen(["control", "G1", "G2"])
    want = bj.prepare(a)
    how = str(
        rng.choice(
            [
                "zarr",
                "gz",
                "nullable",
                "csc",
                "dense",
                "int",
                "backed",
                "empty file",
                "folder",
                "text",
                "zip",
            ]
        )
    )
    path = folder/"a.h5ad"
    if how == "csc": a.X = sparse.csc_matrix(a.X)
    if how == "dense": a.X = a.X.toarray()
    if how == "int": a.X = a.X.astype(rng.choice(["int32", "int64", "uint16", "float64"]))
    if how == "nullable": a.obs["perturbation"] = a.obs.perturbation.astype("string")
    if how == "nullable": ad.settings.allow_write_nullable_strings = True
    a.write_h5ad(path)
    if how == "zarr":
        path = folder/"a.zarr"
        a.write_zarr(path)
    elif how == "gz":
        path = folder/"a.h5ad.gz"
        path.write_bytes(gzip.compress((folder/"a.h5ad").read_bytes()))
    elif how in ("empty file", "text", "zip"):
        path.write_bytes(
            {"empty file": b"", "text": b"a,b\n1,2\n", "zip": b"PK\x03\x04" + rng.bytes(80)}[how]
        )
    elif how == "folder":
        path = folder / "d.h5ad"
        path.mkdir()
    if how == "backed":
        out, no, _ = ask(lambda: bj.prepare(ad.read_h5ad(path, backed="r")))
        return "clear" if no else same(out, want, how)
    code, said = shell("prepare", path, folder/"c.h5ad")
    if code:
        return (
            "clear"
            if path.name in said
            else raise_(Silent(f"{how}: a refusal that does not name the file: {said[-200:]}"))
        )
    return same(ad.read_h5ad(folder/"c.h5ad"), want, how)


KINDS = {
    f.__name__: f
    for f in (
        bytes_of_a_screen,
        matrix_of_a_screen,
        labels,
        units,
        columns,
        unused_columns,
        model_folder,
        questions,
        feature_files,
        predictions,
        run_folder,
        names_of_a_split,
        outputs,
        formats,
    )
}


# ---- the runner

def in_child(kind, seed, report):
    "One case; what came of it is written to `report`."
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    folder = Path(tempfile.mkdtemp())
    try:
        warnings.simplefilter("ignore")
        with (
            open(os.devnull, "w") as null,
            contextlib.redirect_stdout(null),
            contextlib.redirect_stderr(null),
        ):
            verdict = KINDS[kind](np.random.default_rng([seed, len(kind)]), folder)
            why = ""
    except Silent as e: verdict, why = "silent", str(e)
    except BaseException as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        verdict = "traceback"
        why = f"{type(e).__name__}: {str(e)[:200]} ({Path(at.filename).name}:{at.lineno})"
    shutil.rmtree(folder, ignore_errors=True)
    Path(report).write_text(json.dumps([verdict, why]))


def run_case(kind, seed):
    "(verdict, why) of one case in a process of its own."
    handle, report = tempfile.mkstemp()
    os.close(handle)
    child = os.fork()
    if not child:
        try: in_child(kind, seed, report)
        finally: os._exit(0)
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done: break
        time.sleep(.002)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hang", f"more than {LIMIT} s"
    text = Path(report).read_text()
    os.unlink(report)
    return tuple(json.loads(text)) if text else ("crash", f"signal {os.WTERMSIG(status)}")


def warm_up():
    "Import and compile once, before the processes part, what every case needs."
    import biojepa.cli, biojepa.estimator, biojepa.scorecard  # noqa: F401
    bj.effects(bj.prepare(screen(["control", "G1", "G2"])))


def run(n, seed, kinds=None):
    "n cases: kind by kind in turn. Returns the counts and what must not happen."
    warm_up()
    names = list(kinds or KINDS)
    counts = collections.Counter()
    bad = []
    for i in range(n):
        kind = names[i % len(names)]
        verdict, why = run_case(kind, seed + i)
        counts[kind, verdict] += 1
        if verdict in BAD:
            bad.append(f"{verdict}: python -m tests.fuzz 1 {seed + i} {kind}   {why}")
    return counts, bad


def main():
    n, seed = (int(x) for x in (*sys.argv[1:3], 300, 0)[:2])
    counts, bad = run(n, seed, sys.argv[3:])
    table = pd.Series(counts).unstack(fill_value=0)
    print(table.reindex(columns=["works", "clear", *BAD], fill_value=0).to_string())
    print(*bad, f"{n} cases from seed {seed}: {len(bad)} that must not happen", sep="\n")
    sys.exit(bool(bad))


if __name__ == "__main__": main()
