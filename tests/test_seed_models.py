"The seed's models by one flag: their size, schedule, inputs and decoders, and what a fit of them will cost."
import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from anndata import AnnData
from typer.testing import CliRunner

from biojepa.cells import CONTROL
from biojepa.cli import app, demo
from biojepa.cli_steps import prepare_command
from biojepa.demo import budget, name_rows
from biojepa.estimator import BioJEPA
from biojepa.featurizers import as_table
from biojepa.model import configure, count_parameters
from biojepa.prepare import prepare
from biojepa.schedule import Cost, KINDS, approve, estimate, schedule
from biojepa.sets import SetSampler
from biojepa.simulator import simulate, simulated_features
from biojepa.splits import split

SIZES = dict(v0_2=(11_139_584, 6_853_632), v0_3=(6_019_840, 7_881_216))
TINY = dict(
    model=dict(width=16, layers=1, predictor_layers=1, pathways=8),
    pretraining=dict(steps=3, batch=4),
    training=dict(steps=3, sets=4),
    progress=False,
    device="cpu",
)
SEEDS = pytest.mark.parametrize("preset", ["v0_2", "v0_3"])


@pytest.fixture(scope="module")
def screen():
    raw = simulate(n_genes=40, n_perturbations=16, cells_per_perturbation=8, n_batches=3, seed=0)
    cells = prepare(raw, n_genes=40)
    return cells, simulated_features(cells), split(cells, seed=0)


@SEEDS
def test_the_size_of_the_seed_is_the_published_model(preset):
    with torch.device("meta"):
        model = BioJEPA.from_preset(preset, 5000, size="seed")
    assert (count_parameters(model.student), count_parameters(model.predictor)) == SIZES[preset]
    assert configure(preset, 5000, "seed") == configure(preset, 5000)
    small = configure(preset, 5000, "small")
    assert (small.width, small.layers, small.predictor_layers, small.pathways) == (64, 2, 2, 64)
    with pytest.raises(ValueError, match="'big' is not one of small, seed"): configure(preset, 10, "big")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10**5), st.integers(0, 40), st.sampled_from(["base", "v0_2", "v0_3"]))
def test_epochs_show_every_cell_as_often_as_they_say(n, epochs, preset):
    plan = schedule("seed", preset, 2 * n, n, epochs=epochs)
    for stage, kind in KINDS.items():
        config = kind(**plan[stage])
        shown = config.batch if stage != "training" else config.sets * (config.cells if preset == "base" else 1)
        wanted = epochs * n * (2 if stage == "pretraining" else 1)
        assert wanted <= config.steps * shown < wanted + shown


def test_steps_win_over_epochs_and_small_changes_nothing():
    given = dict(training=dict(steps=7), pretraining=dict(lr=1e-4))
    plan = schedule("seed", "v0_3", 1000, 900, **given)
    assert plan["training"]["steps"] == 7 and plan["pretraining"]["lr"] == 1e-4
    assert plan["pretraining"]["momentum"] == plan["pretraining"]["momentum_end"] == 0.996
    assert schedule("small", "v0_3", 1000, 900, **given) == dict(given, decoding={})
    with pytest.raises(ValueError, match="'training_stage'"): schedule("seed", "v0_3", 9, 9, dict(training_stage=1))


def test_a_fit_of_very_many_cpu_days_is_refused_before_anything_is_written(screen, tmp_path):
    months = Cost(dict(training=86_400 * 200), 8.0, "cpu", threads=2)
    approve(months, yes=True)
    approve(Cost(months.seconds, 8.0, "cuda"))                       # days of a GPU are its owner's
    with pytest.raises(ValueError, match="400 CPU-days"): approve(months)
    cells, features, fold = screen
    how = dict(features=features, size="seed", epochs=10**8, out=tmp_path / "run", device="cpu", progress=False)
    tiny = dict(model=TINY["model"], pretraining=dict(batch=2), training=dict(sets=2))
    with pytest.raises(ValueError, match=r"CPU-days.*GPU.*epochs.*small.*--yes"):
        BioJEPA.fit(cells, fold, "v0_3", **how, **tiny)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", ["base", "v0_2", "v0_3"])
def test_an_estimate_grows_with_the_work_and_moves_no_weight(screen, preset):
    cells, features, fold = screen
    torch.manual_seed(5)
    dims = dict(feature_dims=(features.shape[1],)) if preset == "base" else {}
    owner = BioJEPA.from_preset(preset, 40, **TINY["model"], **dims)
    owner.table = as_table(features)
    model, cpu = owner.model, torch.device("cpu")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    drawn = torch.get_rng_state()
    plan = {k: dict(steps=1000) for k in KINDS}
    cost = estimate(owner, cells, plan, cpu)
    larger = estimate(owner, cells, plan | dict(pretraining=dict(steps=1000, batch=3200)), cpu)
    assert set(cost.seconds) == set(KINDS) - ({"decoding"} if preset == "base" else set())
    assert min(cost.seconds.values()) > 0 and larger.gigabytes > cost.gigabytes
    assert larger.seconds["pretraining"] > cost.seconds["pretraining"]
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@SEEDS
def test_the_seeds_presets_take_features_as_they_are_and_train_their_decoders(screen, preset, tmp_path):
    cells, features, fold = screen
    own = TINY | dict(decoding=dict(steps=4, batch=8), features=features)
    model = BioJEPA.fit(cells, fold, preset, out=tmp_path / "run", **own)
    raw = as_table(features).transform(list(fold.test))[0]
    assert np.array_equal(model.table.transform(list(fold.test))[0], raw)
    assert list(model.history) == ["pretraining", "training", "decoding"]
    answer = model.predict(cells, list(fold.test))
    again = BioJEPA.load(tmp_path / "run").predict(cells, list(fold.test))
    assert np.allclose(answer.X, again.X, atol=1e-5) and np.allclose(answer.obs.support, again.obs.support)
    # a run that is called again goes on, and has nothing left to do
    twice = BioJEPA.fit(cells, fold, preset, out=tmp_path / "run", **own)
    assert np.allclose(answer.X, twice.predict(cells, list(fold.test)).X, atol=1e-5)
    # the closed form is the other way to read the same network
    closed = BioJEPA.fit(cells, fold, preset, features=features, **TINY)
    same = all(torch.equal(a, b) for a, b in zip(closed.model.parameters(), model.model.parameters()))
    assert same and "decoding" not in closed.history
    assert not torch.equal(closed.decoders[0].weight, model.decoders[0].weight)


def test_base_still_whitens(screen):
    cells, features, fold = screen
    model = BioJEPA.fit(cells, fold, network=False, features=features, progress=False)
    assert not np.allclose(model.table.transform(list(fold.test))[0][:, 0], features.loc[list(fold.test)].iloc[:, 0])


def test_every_treated_cell_keeps_one_control_of_its_batch(screen):
    cells = screen[0]
    sampler = SetSampler(cells, m=1, seed=3)
    group, treated, control = sampler.pairs()
    batch = cells.obs.batch.to_numpy(str)
    assert sorted(treated) == list(np.flatnonzero(cells.obs.perturbation != CONTROL))
    assert (batch[treated] == batch[control]).all()
    assert (cells.obs.perturbation.to_numpy(str)[control] == CONTROL).all()
    assert len(set(control)) > len(control) / 8                      # drawn, not the first of each pool
    names = sampler.groups.perturbation.to_numpy(str)[group]
    assert (names == cells.obs.perturbation.to_numpy(str)[treated]).all()
    n = len(treated)
    met = [sampler.pair_batch(s, 1) for s in range(2 * n)]
    def seen(some): return {(b.treated.sum().item(), b.control.sum().item()) for b in some}
    assert seen(met[:n]) == seen(met[n:])
    assert [b.group.item() for b in met[:n]] != [b.group.item() for b in met[n:]]


def test_eight_thousand_genes_go_all_the_way():
    "8,192 genes, prepared, trained, decoded and predicted; few cells of plain Poisson counts."
    rng = np.random.default_rng(0)
    G = 8192
    names = np.repeat([CONTROL, "GENE1", "GENE2", "GENE3", "GENE4", "GENE5"], [10, 3, 3, 3, 3, 3])
    rate = rng.gamma(1.0, 1.0, G).astype(np.float32)
    counts = sparse.csr_matrix(rng.poisson(rate, (len(names), G)).astype(np.float32))
    obs = pd.DataFrame(dict(perturbation=names), index=[f"cell{i}" for i in range(len(names))])
    raw = AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"GENE{g}" for g in range(G)]))
    cells = prepare(raw, n_genes=G)
    assert cells.n_vars == G
    features = pd.DataFrame(rng.normal(size=(6, 320)), index=[f"GENE{g}" for g in range(6)])
    fold = split(cells, seed=0)
    small = dict(model=TINY["model"], features=features, progress=False, device="cpu")
    stages = {k: dict(steps=1, batch=2) for k in ("pretraining", "decoding")}
    model = BioJEPA.fit(cells, fold, "v0_3", training=dict(steps=1, sets=2), **stages, **small)
    assert np.isfinite(model.predict(cells, list(fold.test)).X).all()


def shell(*words):
    return CliRunner().invoke(app, ["fit", *map(str, words)])


def test_the_seeds_v0_2_begins_from_gene_sets(screen, tmp_path):
    "A token per set, under the names of the sets, at the seed's width and depth."
    cells, features, _ = screen
    cells.write_h5ad(tmp_path / "cells.h5ad")
    features.rename(columns=str).to_parquet(tmp_path / "f.parquet")
    sets = {f"SET{i}": list(cells.var_names[8 * i:8 * i + 8]) for i in range(4)}
    (tmp_path / "x.gmt").write_text("\n".join("\t".join([n, "", *genes]) for n, genes in sets.items()))
    words = (tmp_path / "cells.h5ad", "--out", tmp_path / "run", "--features", tmp_path / "f.parquet", "--gene-sets")
    words += (tmp_path / "x.gmt", "--preset", "v0_2", "--size", "seed", "--device", "cpu", "--no-progress")
    said = shell(*words, "--steps", 1, "--pretraining-steps", 1, "--decoder-steps", 1, "--batch", 1)
    assert said.exit_code == 0, said.exception
    model = BioJEPA.load(tmp_path / "run")
    config = model.model.config
    assert (config.width, config.heads, config.layers) == (256, 4, 6)
    weights = [*model.model.state_dict().values(), *(d.weight for d in model.decoders)]
    assert all(torch.isfinite(w).all() for w in weights)
    assert set(sets) <= set(map(str, model.pathway_attention(cells).index))


def test_a_shell_refuses_what_would_take_a_year(screen, tmp_path):
    cells, features, _ = screen
    cells.write_h5ad(tmp_path / "cells.h5ad")
    words = (tmp_path / "cells.h5ad", "--out", tmp_path / "run", "--preset", "v0_3", "--size", "seed")
    said = shell(*words, "--epochs", 10**9, "--batch", 1, "--device", "cpu")
    assert isinstance(said.exception, ValueError) and "--yes" in str(said.exception)
    assert not (tmp_path / "run" / "settings.json").exists()


def test_the_shell_keeps_as_many_genes_as_python():
    wanted = inspect.signature(prepare).parameters["n_genes"].default
    for command in (demo, prepare_command):
        assert inspect.signature(command).parameters["n_genes"].default.default == wanted == 4096


def test_the_demo_trains_v0_3_when_asked_and_names_size_and_steps():
    assert budget() == budget(quick=True) == dict(base={})
    assert [s["steps"] for s in budget(v0_3=True)["v0_3"].values()] == [600, 1500]
    rows = pd.DataFrame(index=pd.MultiIndex.from_tuples([("g", "base"), ("g", "v0_3")], names=["split", "model"]))
    facts = dict(settings=budget(v0_3=True), parameters=dict(base=1, v0_3=332_608))
    names = list(name_rows(rows, facts).index.get_level_values("model"))
    assert names == ["base", "v0_3 (332,608 parameters, 600 + 1,500 steps)"]
