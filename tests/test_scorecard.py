"Baselines, metrics and the scorecard: laws that hold for any screen, on small simulated ones."
import html
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings, strategies as st

from biojepa.estimator import BioJEPA
from biojepa.effects import beyond, pearson_rows
from biojepa.baselines import Additive, Mean, in_context, training_effects, training_mean
from biojepa.learned_baselines import BASELINES, RidgeEffects
from biojepa.cells import parts
from biojepa.prepare import prepare
from biojepa.effects import effects
from biojepa.cell_metrics import partial_spearman
from biojepa.embedding_metrics import gene_set_neighbour, probe
from biojepa.answers import Answers, answers, check_predictor, held_out, observed_effects
from biojepa.judge import CONTROLLED, _pairs_of, score_fold, wrong_names
from biojepa.card import Card, _made_of
from biojepa.scorecard import scorecard
from biojepa.metrics import METRICS, Case, bootstrap_interval, changed, spearman
from biojepa.ranks import places
from biojepa.judge import chosen
from biojepa.plots import enough, plot_effect, plot_scores
from biojepa.report import headline, refit_controls, shuffled_labels
from biojepa.simulator import simulate, simulated_features
from biojepa.splits import Leak, folds, split

SCORES = ["pearson_delta", "pearson_pert", "pearson_delta_top20", "rank"]


@pytest.fixture(scope="module")
def screen():
    cells = prepare(
        simulate(n_genes=100, n_perturbations=50, n_doubles=16, cells_per_perturbation=20, seed=0),
        n_genes=100,
    )
    return cells, simulated_features(cells), split(cells, "simulation", seed=0)


@pytest.fixture(scope="module")
def truth(screen):
    cells, _, fold = screen
    return effects(cells)[list(fold.test)].to_df()


@pytest.fixture(scope="module")
def card(screen, truth):
    cells, features, fold = screen
    names = list(truth.index)
    swap = wrong_names(names, [fold.groups[n] for n in names], n=1)[0]
    wrong = truth.iloc[np.where(swap < 0, np.arange(len(names))[::-1], swap)].set_axis(names)
    return scorecard(
        cells, fold, {"perfect": truth, "wrong names": wrong}, features=features, n_boot=200
    )


def arrays(p, g, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(p, g)), rng.normal(size=(p, g)), rng.normal(size=g)


# baselines

def test_baselines_are_blind_to_test_cells(screen):
    cells, features, fold = screen
    spoiled = cells.copy()
    spoiled.X = spoiled.X.toarray()
    spoiled.X[fold.mask(cells, "test")] = 7
    for kind in BASELINES.values():
        a, b = (kind().fit(c, fold, features).predict(cells, fold.test).X for c in (cells, spoiled))
        assert np.array_equal(a, b)


def test_every_baseline_answers_like_a_model(screen):
    cells, features, fold = screen
    for kind in BASELINES.values():
        out = kind().fit(cells, fold, features).predict(cells, [*fold.test, "control"])
        assert list(out.obs.perturbation) == [*fold.test, "control"] and list(
            out.var_names
        ) == list(cells.var_names)
        assert not out["control"].X.any() and np.array_equal(out.X, out.layers["delta"])


def test_additive_is_additive_and_needs_no_order(screen):
    cells, _, fold = screen
    model = Additive().fit(cells, fold)
    a, b, c = [n for n in fold.train if "+" not in n][:3]
    one, two, three, all_ = (model.predict(cells, n).X for n in (a, b, c, f"{c}+{a}+{b}"))
    assert np.allclose(one + two + three, all_, atol=1e-5)


def test_ridge_with_noise_for_features_is_near_the_mean(screen):
    cells, _, fold = screen
    genes = list(cells.var_names)
    noise = pd.DataFrame(np.random.default_rng(0).normal(size=(len(genes), 8)), index=genes)
    mean, ridge = (
        k().fit(cells, fold, noise).predict(cells, fold.test).X for k in (Mean, RidgeEffects)
    )
    assert np.corrcoef(mean.ravel(), ridge.ravel())[0, 1] > 0.5


def test_a_new_cell_type_is_answered_by_the_others():
    cells = prepare(
        simulate(n_genes=40, n_perturbations=12, cells_per_perturbation=8, cell_types=2, seed=1),
        n_genes=40,
    )
    across = split(cells, "unseen_context", context="LINE1")
    observed = training_effects(cells, across)
    assert set(observed.index.get_level_values(0)) == {"LINE0"} and in_context(
        observed, "LINE1"
    ).equals(in_context(observed, "LINE0"))
    assert np.allclose(
        Mean().fit(cells, across).predict(cells, across.test, "LINE1").X,
        training_mean(observed, ["LINE0"]),
        atol=1e-6,
    )


# metrics

@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(25, 60), st.integers(0, 10**6))
def test_metrics_have_their_best_value_for_the_truth(p, g, seed):
    _, observed, centre = arrays(p, g, seed)
    case = Case(observed, observed, centre)
    for name in SCORES: assert np.allclose(METRICS[name].function(case), 1)
    assert not METRICS["mse"].function(case).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(25, 60), st.integers(0, 10**6), st.floats(0.01, 100))
def test_correlations_ignore_size_and_order_of_genes(p, g, seed, scale):
    predicted, observed, centre = arrays(p, g, seed)
    order = np.random.default_rng(seed).permutation(g)
    case = Case(predicted, observed, centre)
    stretched = Case(centre + scale * (predicted - centre), observed, centre)
    mixed = Case(predicted[:, order], observed[:, order], centre[order])
    for name in ("pearson_pert", "rank"):
        assert np.allclose(METRICS[name].function(case), METRICS[name].function(stretched))
    for name in SCORES + ["mse"]:
        assert np.allclose(METRICS[name].function(case), METRICS[name].function(mixed))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(25, 60), st.integers(0, 10**6))
def test_who_knows_only_the_mean_knows_nothing_beyond_it(p, g, seed):
    _, observed, centre = arrays(p, g, seed)
    case = Case(np.tile(centre, (p, 1)).astype(np.float32), observed, centre)
    assert (
        not METRICS["pearson_pert"].function(case).any()
        and (METRICS["rank"].function(case) == 0.5).all()
    )


def test_rank_of_noise_is_one_half():
    ranks = [METRICS["rank"].function(Case(*arrays(20, 50, s))).mean() for s in range(60)]
    assert abs(np.mean(ranks) - 0.5) < 0.02


def test_rank_does_not_pay_for_the_target_gene():
    hit = np.eye(10, 40, dtype=bool)
    observed = np.random.default_rng(0).normal(size=(10, 40)) - 9 * hit
    assert (METRICS["rank"].function(Case(-9. * hit, observed, np.zeros(40))) == 1).all()
    assert (
        METRICS["rank"].function(Case(-9.0 * hit, observed, np.zeros(40), targets=hit)) == 0.5
    ).all()


def test_registry_says_what_it_measures():
    for name, m in METRICS.items():
        assert (
            m.name == name
            and len(m.definition) > 40
            and m.unit
            and m.best in ("high", "low", "")
            and m.floor in ("shuffled", "no_change")
        )


def test_interval_shrinks_with_the_root_of_n_and_covers():
    rng = np.random.default_rng(0)
    width = {}
    for n in (100, 400):
        ends = np.array([bootstrap_interval(rng.normal(size=n), 300, s) for s in range(60)])
        width[n] = (ends[:, 1] - ends[:, 0]).mean()
        assert ((ends[:, 0] < 0) & (0 < ends[:, 1])).mean() > 0.85
    assert np.isclose(width[100] / width[400], 2, rtol=0.15)
    assert (
        bootstrap_interval(np.full(9, 0.3)) == (0.3, 0.3)
        and np.isnan(bootstrap_interval([1.0])).all()
    )


def test_constant_rows_count_zero():
    flat = np.full((2, 9), 0.1, np.float32)
    assert not pearson_rows(flat, np.random.default_rng(0).normal(size=(2, 9))).any()
    assert not beyond(flat, flat[0].astype(float) + 1e-9).any()


# the card

def test_truth_wins_everything(card):
    t = card.table.set_index(["split", "metric", "model"]).sort_index().value
    for group in set(card.table.split):
        for m in SCORES:
            assert (
                np.isclose(t[group, m, "perfect"], 1)
                and t[group, m].max() == t[group, m, "perfect"]
            )
        assert t[group, "mse", "perfect"] == 0 == t[group, "mse"].min()


def test_wrong_names_fall_to_the_floor(card):
    t = card.table[card.table.n >= 10].set_index(["split", "metric", "model"]).sort_index()
    assert len(t)
    gaps = []
    for key in {k[:2] for k in t.index if k[1] in SCORES}:
        value = t.loc[key].value
        floor = t.loc[key].floor.iloc[0]
        gaps.append(value["wrong names"] - floor)
        # one shuffle of a dozen names scatters
        assert abs(gaps[-1]) < 0.3 and value["perfect"] - floor > 0.3
    assert abs(np.mean(gaps)) < 0.1


def test_table_is_tidy(card, screen):
    table = card.table
    fold = screen[2]
    assert list(table.columns)[:9] == [
        "model",
        "split",
        "metric",
        "value",
        "low",
        "high",
        "floor",
        "ceiling",
        "n",
    ]
    assert not table.duplicated(["model", "split", "metric"]).any() and {
        "no_change",
        "mean",
        "additive",
        "ridge",
    } <= set(table.model)
    assert {
        "global_mse",
        "pearson_top20",
        "r2_all_mean",
        "r2_all_median",
        "r2_top50_mean",
        "r2_top50_median",
        "mean_shift",
    } <= set(table.metric)
    counts = pd.Series([fold.groups[n] for n in fold.test]).value_counts()
    everyone = table.metric.isin([*SCORES, "mse", "energy", "global_mse", "severity"])
    assert (
        (table.n[everyone] == counts[table.split[everyone]].to_numpy()).all()
        and (table.n <= counts[table.split].to_numpy()).all()
        and np.isfinite(table.value).all()
    )
    assert set(table.separates) <= {"yes", "no", "unknown"} and not set(table.metric) & {
        m.name for m in METRICS.values() if m.level == "quantity"
    }
    inside = table.low.isna() | (table.low <= table.value + 1e-9) & (
        table.value <= table.high + 1e-9
    )
    assert inside.all()


def test_no_change_is_the_floor_of_the_old_columns(card):
    t = card.table.set_index(["model", "metric"]).sort_index()
    assert (t.loc[("no_change", "mean_shift")].value == 0).all() and (
        t.loc[("no_change", "pearson_delta")].value == 0
    ).all()
    same = t.loc[("no_change", "global_mse")]
    assert np.allclose(same.value, same.floor)


def test_same_seed_same_card(screen, card, truth, tmp_path):
    cells, features, fold = screen
    again = scorecard(cells, fold, {"perfect": truth}, features=features, n_boot=200).table
    both = card.table[card.table.model.isin(again.model)].reset_index(drop=True)
    pd.testing.assert_frame_equal(both, again.reset_index(drop=True))
    card.to_csv(tmp_path / "scores.csv")
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "scores.csv"), card.table.reset_index(drop=True), rtol=1e-4
    )


def test_folds_test_every_single_once(screen):
    cells, _, _ = screen
    three = folds(cells, 3, seed=0)
    out = scorecard(
        cells, three, {"mine": [Mean().fit(cells, s) for s in three]}, baselines=["mean"], n_boot=50
    )
    mine = out.per_perturbation.query(
        "model == 'mine' and metric == 'mse' and split == 'unseen_gene'"
    )
    assert sorted(mine.perturbation) == sorted(
        n for n in set(cells.obs.perturbation) if len(parts(n)) == 1
    )
    t = out.table.set_index(["model", "split", "metric"]).value
    assert np.allclose(t["mine"], t["mean"])


def test_gaps_are_named(screen, truth):
    cells, _, fold = screen
    tested = held_out(cells, fold)
    rows = observed_effects(tested)
    assert np.allclose(answers(truth, tested, rows), rows.X, atol=1e-6)
    holes = truth.copy()
    holes.iloc[0, 0] = np.nan
    for bad, word in (
        (truth.iloc[1:], truth.index[0]),
        (truth.iloc[:, 1:], truth.columns[0]),
        (holes, truth.index[0]),
        (pd.concat([truth, truth[:1]]), truth.index[0]),
    ):
        with pytest.raises((KeyError, ValueError), match=word.replace("+", r"\+")):
            answers(bad, tested, rows)


def test_no_predictor_sees_a_treated_test_cell(screen):
    cells, _, fold = screen

    class Spy:
        def predict(self, given, names):
            self.given = given
            return pd.DataFrame(0.0, index=names, columns=given.var_names)
    spy = Spy()
    score_fold(cells, fold, {"spy": spy})
    assert not set(spy.given.obs.perturbation) & set(fold.test) and "truth" not in spy.given.uns


def test_a_model_of_another_split_is_refused(screen):
    cells, _, fold = screen
    with pytest.raises(Leak):
        scorecard(
            cells, fold, {"x": Mean().fit(cells, split(cells, "simulation", seed=5))}, baselines=()
        )
    for wrong in (
        {"mean": Mean().fit(cells, fold)},
        {"floor": Mean().fit(cells, fold)},
        {"x": [1, 2]},
    ):
        with pytest.raises(ValueError): scorecard(cells, fold, wrong)


def test_every_dose_is_asked_for_and_a_drug_counts_once():
    drugs = prepare(
        simulate(n_genes=60, n_perturbations=20, n_drugs=12, cells_per_perturbation=12, seed=2),
        n_genes=60,
    )
    dosed = split(drugs, "unseen_gene", seed=3)
    card = scorecard(drugs, dosed, {}, ["mean"], n_boot=50)
    tried = [n for n in dosed.test if n.startswith("DRUG")]
    counts = card.per_perturbation.query(
        "metric == 'mse' and model == 'mean'"
    ).perturbation.value_counts()
    assert tried and (counts[tried] == 3).all() and card.table.n.max() == len(dosed.test)

    class Dosed:
        def predict(self, cells, names, mode=None, dose=None):
            return pd.DataFrame(dose, index=names, columns=drugs.var_names)
    tested = held_out(drugs, dosed)
    rows = observed_effects(tested)
    assert np.allclose(answers(Dosed(), tested, rows), rows.obs.dose.to_numpy()[:, None])


def test_an_unseen_cell_type_refuses_a_model_that_has_seen_it():
    lines = prepare(
        simulate(n_genes=60, n_perturbations=30, cells_per_perturbation=12, cell_types=2, seed=1),
        n_genes=60,
    )
    across = split(lines, "unseen_context", context="LINE1")
    card = scorecard(lines, across, {}, ["mean", "additive"], n_boot=50)
    assert set(card.table.split) == {"unseen_context"} and set(card.per_perturbation.cell_type) == {
        "LINE1"
    }
    with pytest.raises(Leak, match="LINE1"):
        scorecard(lines, across, {"x": Mean().fit(lines, split(lines, "unseen_gene", seed=0))})


def test_half_a_pair_is_too_much_for_a_pair_of_unseen_genes(screen):
    cells, _, fold = screen
    name = next(n for n in fold.test if fold.groups[n] in ("pair_seen0", "pair_seen1"))
    peeked = Mean().fit(cells, fold)
    peeked.split = replace(fold, train=fold.train + ("+".join(sorted((*parts(name), "ZZZ"))),))
    with pytest.raises(Leak): score_fold(cells, fold, {"peeked": peeked})


def test_expression_is_not_taken_for_a_change(screen, truth):
    cells, _, fold = screen
    data = AnnData(
        truth.to_numpy(), obs=pd.DataFrame(index=truth.index), var=pd.DataFrame(index=truth.columns)
    )
    with pytest.raises(KeyError, match="delta"): scorecard(cells, fold, {"x": data}, baselines=())


def test_a_file_is_a_predictor(screen, truth, tmp_path):
    cells, _, fold = screen
    data = AnnData(
        obs=pd.DataFrame(index=truth.index),
        var=pd.DataFrame(index=truth.columns),
        layers={"delta": truth.to_numpy()},
    )
    data.write_h5ad(tmp_path/"x.h5ad")
    out = (
        scorecard(
            cells,
            fold,
            {"file": tmp_path / "x.h5ad", "text": str(tmp_path / "x.h5ad"), "table": truth},
            (),
            n_boot=10,
        )
        .table.set_index(["split", "metric", "model"])
        .value.unstack()
    )
    assert np.allclose(out.file, out.table, equal_nan=True) and np.allclose(
        out.text, out.table, equal_nan=True
    )
    with pytest.raises(FileNotFoundError): scorecard(cells, fold, {"x": "nowhere.h5ad"}, ())


def test_several_seeds_are_one_model_with_a_spread(screen, truth):
    cells, _, fold = screen
    rng = np.random.default_rng(0)
    runs = tuple(truth + rng.normal(0, s, truth.shape) for s in (0.1, 0.3, 0.5))
    out = scorecard(
        cells, fold, {"x": runs, "one": runs[0]}, (), n_boot=10, metrics=["mse", "rank"]
    )
    alone = [
        scorecard(cells, fold, {"x": r}, (), n_boot=10, metrics=["mse"]).table.value.to_numpy()
        for r in runs
    ]
    t = out.table[out.table.metric == "mse"]
    assert np.allclose(t[t.model == "x"].value, np.mean(alone, 0)) and np.allclose(
        t[t.model == "x"].seed_sd, np.std(alone, 0, ddof=1)
    )
    assert t[t.model == "one"].seed_sd.isna().all() and (t.n <= len(fold.test)).all()


# the judge on trial

def test_a_metric_that_the_mean_wins_cannot_tell(card):
    v = card.verdict().loc["unseen_gene"]
    assert (
        v.separates["pearson_pert"] == v.separates["rank"] == "yes"
        and v.discrimination["pearson_pert"] > 0.9
    )
    assert (v.range[v.separates == "yes"] >= 0.1).all() and v.separates["mean_shift"] == "unknown"
    noise = card.per_perturbation.copy()
    end = noise.model == "ceiling"
    own = noise.metric == "rank"
    noise.loc[end & own, "value"] = np.random.default_rng(0).permutation(
        np.linspace(0, 1, (end & own).sum())
    )
    assert Card(noise, n_boot=200).verdict().loc["unseen_gene"].separates["rank"] == "no"


def test_who_does_not_use_the_action_is_told(card):
    used = card.uses_action().query("split == 'unseen_gene'").set_index(["model", "control"]).falls
    assert (
        used["perfect", "another's action"] == "yes"
        and (used["mean"] == "no").all()
        and (used["no_change"] == "no").all()
    )
    assert set(card.controls.metric) == set(CONTROLLED)
    with pytest.raises(KeyError, match="severity"): card.uses_action("severity")


def test_refitted_controls_stand_on_the_card(screen):
    cells, features, fold = screen
    bad = refit_controls(lambda c, s, f: RidgeEffects().fit(c, s, f), cells, fold, features)
    out = scorecard(
        cells, fold, {}, ["ridge"], features=features, controls={"ridge": bad}, n_boot=50
    )
    assert {"another's action", "zero action", *bad} == set(out.uses_action().control)
    assert "shuffled labels" not in set(out.table.model) and set(bad) == {
        "shuffled labels",
        "shuffled features",
    }
    with pytest.raises(ValueError, match="not on this card"):
        scorecard(cells, fold, {}, ["mean"], controls={"ridge": bad})
    mixed = shuffled_labels(cells, fold)
    assert sorted(mixed.obs.perturbation.unique()) == sorted(cells.obs.perturbation.unique())


def test_best_baseline_is_the_bar(card):
    t = card.table.query("metric in ('rank', 'mse') and split == 'unseen_gene'").set_index(
        ["metric", "model"]
    )
    names = [n for n in BASELINES if n in t.loc["rank"].index]
    assert np.allclose(t.bar["rank"], t.value["rank"][names].max()) and np.allclose(
        t.bar["mse"], t.value["mse"][names].min()
    )


def test_chosen_metrics_bring_what_they_need(screen, truth):
    cells, _, fold = screen
    assert {"predicted_size", "observed_size"} <= set(chosen(["severity"])) and not any(
        m.slow for m in chosen().values()
    )
    assert set(chosen("all")) == set(METRICS) and all(
        set(m.needs) <= set(METRICS) for m in METRICS.values()
    )
    out = scorecard(
        cells, fold, {"x": truth}, (), metrics=["severity", "de_auprc"], n_boot=10
    ).table
    assert set(out.metric) == {"severity", "de_auprc"} and np.allclose(
        out.query("metric == 'severity'").value, 1
    )
    with pytest.raises(KeyError, match="nonsense"):
        scorecard(cells, fold, {}, (), metrics=["nonsense"])


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 12), st.integers(25, 60), st.integers(0, 10**6))
def test_places_ties_and_memo(p, g, seed):
    predicted, observed, centre = arrays(p, g, seed)
    case = Case(predicted, observed, centre, sem=np.ones((p, g)))
    for how in ("cosine", "l1", "l2"):
        ahead, tied = places(case, how)
        assert ((ahead + tied) <= p - 1).all() and (
            places(case.answer(observed), how)[0] == 0
        ).all()
    chance = METRICS["recall_1"].function(case.answer(np.tile(centre, (p, 1))))
    assert np.allclose(chance, 1 / p) and changed(case).shape == (p, g)
    # what is remembered of the truth does not leak into another prediction
    for name, m in METRICS.items():
        if m.function and not m.slow:
            assert np.allclose(
                m.function(case.answer(predicted * 2)),
                m.function(Case(predicted * 2, observed, centre, sem=np.ones((p, g)))),
                equal_nan=True,
            )


def test_rank_statistics_against_scipy():
    from scipy.stats import spearmanr
    x = np.random.default_rng(0).normal(size=(4, 30, 3)).round(1)
    assert np.allclose(
        spearman(x[..., :2], axis=1), [spearmanr(r[:, 0], r[:, 1]).statistic for r in x]
    )
    assert (
        np.isclose(partial_spearman(np.c_[x[0, :, 0], x[0, :, 0], x[0, :, 2]]), 1)
        and partial_spearman(np.c_[x[0, :, 0], x[0, :, 1], x[0, :, 1]]) == 0
    )


def test_embeddings_without_structure_score_chance():
    rng = np.random.default_rng(0)
    labels = [{i % 4} for i in range(40)]
    assert (
        abs(
            np.mean(
                [gene_set_neighbour(rng.normal(size=(40, 9)), labels).mean() for _ in range(60)]
            )
            - 9 / 39
        )
        < 0.03
    )
    assert (
        abs(
            np.mean(
                [probe(rng.normal(size=(80, 4)), rng.random(80) > 0.5, seed=s) for s in range(10)]
            )
            - 0.5
        )
        < 0.1
    )


def test_the_page_says_what_the_table_says(card, tmp_path):
    page = card.to_html(tmp_path/"card.html").read_text()
    assert page.count("data:image/png") >= 5 and all(m in page for m in card.table.metric.unique())
    value = card.table.query(
        "model == 'perfect' and metric == 'pearson_pert' and split == 'unseen_gene'"
    ).value.iloc[0]
    assert f"pearson_pert {value:.3f}" in headline(
        card, "perfect"
    ) and "it uses the action" in headline(card, "perfect")


# pictures

def test_pictures_draw_the_numbers(card, screen, truth):
    import matplotlib.pyplot as plt
    cells, _, fold = screen
    figure = plot_scores(card.table, ("rank",))
    drawn = [
        float(l.get_xdata()[0]) for ax in figure.axes for l in ax.lines if l.get_marker() == "o"
    ]
    assert np.allclose(sorted(drawn), sorted(enough(card.table).query("metric == 'rank'").value))
    data = AnnData(
        truth.to_numpy(),
        obs=pd.DataFrame(index=truth.index),
        var=pd.DataFrame(index=truth.columns),
        layers={"delta": truth.to_numpy()},
    )
    name = fold.test[0]
    shown = {
        l.get_marker(): np.asarray(l.get_ydata(), float)
        for l in plot_effect(data, data, name, n=9).lines
    }
    assert np.allclose(shown["o"], shown["_"]) and np.allclose(
        sorted(np.abs(shown["_"])), truth.loc[name].abs().nlargest(9).sort_values()
    )
    with pytest.raises(KeyError): plot_effect(data, data, "nobody")
    plt.close("all")


def test_a_wrong_name_shares_no_target():
    names = ["A", "B", "C", "A+B", "A+C", "B+C", "D+E"]
    kinds = ["gene"] * 3 + ["pair"] * 4
    for row in wrong_names(names, kinds):
        for i, j in enumerate(row):
            assert kinds[i] == kinds[j] and not set(parts(names[i])) & set(parts(names[j]))
    # nothing else is tested: a training single
    assert set(wrong_names(["A"], ["gene"], ["A+B", "C", "D"])[:, 0]) == {2, 3}


def test_cell_types_are_judged_apart_and_perturbations_counted_once():
    cells = prepare(
        simulate(n_genes=60, n_perturbations=24, cells_per_perturbation=20, cell_types=2, seed=1),
        n_genes=60,
    )
    fold = split(cells, "unseen_gene", seed=0)
    out = scorecard(cells, fold, {}, ["no_change", "mean"], n_boot=10)
    assert (out.table.n == len(fold.test)).all() and out.per_perturbation.cell_type.nunique() == 2
    # each type has a mean of its own
    assert (out.table.query("metric == 'pearson_pert' and model == 'mean'").value == 0).all()
    held = split(cells, "unseen_context", context="LINE1")
    assert set(scorecard(cells, held, {}, n_boot=10).per_perturbation.cell_type) == {"LINE1"}


def test_baselines_by_word_and_by_name(screen):
    from biojepa.learned_baselines import ALL_BASELINES as all_baselines
    cells, _, fold = screen
    def names(b):
        return set(
            scorecard(
                cells, fold, {}, baselines=b, metrics=["pearson_delta"], n_boot=20
            ).table.model
        ) & set(all_baselines)
    assert (
        names("simple")
        == {"no_change", "mean", "additive", "ridge"}
        == names(["no_change", "mean", "additive", "ridge"])
    )
    assert names("all") == set(all_baselines) and names("linear_response") == {"linear_response"}
    with pytest.raises(ValueError, match="'forrest'.*'forest'"):
        scorecard(cells, fold, {}, baselines=["forrest"])


# never silently wrong

def test_other_units_are_refused_and_the_predictor_is_named(screen):
    cells, _, fold = screen
    x = cells.X.toarray()
    counts = np.minimum(cells.layers["counts"].toarray(), 18)
    gone = x.copy()
    gone[0, 0] = np.nan
    cases = {"counts": counts, "log2": x / np.log(2), "million": np.log1p(np.expm1(x) * 100), "gone": gone}
    for X in cases.values():
        theirs = AnnData(X, obs=cells.obs[["perturbation"]].copy(), var=cells.var[[]])
        with pytest.raises(ValueError, match="'theirs'.*(10,000|finite)"):
            scorecard(cells, fold, {"theirs": theirs}, "none", metrics=["mse"], n_boot=20)


def test_units_in_words_and_kinds_of_values(screen, truth):
    "Declared units, what is no real number, and a damaged file are refused; the impossible is warned of."
    cells, _, fold = screen
    def ask(table): return answers(table, held_out(cells, fold), observed_effects(held_out(cells, fold)))
    own = AnnData(truth.to_numpy() * 0, obs=pd.DataFrame(index=truth.index), var=pd.DataFrame(index=truth.columns))
    own.layers["delta"] = truth.to_numpy()
    own.uns["biojepa"] = {"units": "log2"}
    with pytest.raises(ValueError, match="units of 'log2'"): ask(own)
    for odd in (truth > 0, truth * 1j):
        with pytest.raises(ValueError, match="not real numbers"): ask(odd)
    z = pd.DataFrame(np.random.default_rng(0).normal(0, 3, truth.shape), truth.index, truth.columns)
    for far in (z, truth + 3):
        with pytest.warns(UserWarning, match="what cells cannot be"): ask(far)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.allclose(ask(truth), truth.loc[list(observed_effects(held_out(cells, fold)).obs.perturbation)])


def test_a_damaged_file_of_predictions_is_named(screen, tmp_path):
    cells, _, fold = screen
    (tmp_path / "mine.h5ad").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(ValueError, match="mine.h5ad cannot be read"): Answers(tmp_path / "mine.h5ad")


def test_controls_on_another_scale_are_refused(screen):
    cells, _, fold = screen
    half = AnnData(cells.X * 0.5, obs=cells.obs[["perturbation"]].copy(), var=cells.var[[]])
    with pytest.raises(ValueError, match="'theirs'"):
        scorecard(cells, fold, {"theirs": half}, "none", metrics=["mse"], n_boot=20)


def test_a_pair_in_either_order_and_a_gene_once(screen, truth):
    cells, _, fold = screen
    tested = held_out(cells, fold)
    rows = observed_effects(tested)
    turned = truth.set_axis(["+".join(n.split("+")[::-1]) for n in truth.index])
    assert np.array_equal(answers(turned, tested, rows), answers(truth, tested, rows))
    gene = truth.columns[0]
    twice = pd.concat([truth, truth[[gene]]], axis=1)
    with pytest.raises(ValueError, match=f"'theirs'.*{gene}"):
        scorecard(cells, fold, {"theirs": twice}, "none", metrics=["mse"], n_boot=20)


def test_a_score_above_the_ceiling_is_suspicious(card):
    t = card.table.set_index(["split", "metric", "model"]).suspicious
    assert t["unseen_gene", "pearson_pert", "perfect"] == t["unseen_gene", "mse", "perfect"] == "yes"
    assert t["unseen_gene", "pearson_pert", "mean"] == t["unseen_gene", "mse", "ridge"] == "no"
    assert "Suspicious: perfect" in repr(card) and "Suspicious: perfect" in card._repr_html_()


def test_ceiling_on_real_cells_is_the_corrected_split_half(screen):
    cells, _, fold = screen
    real = cells.copy()
    del real.uns["truth"]
    card = scorecard(real, fold, {}, ["mean"], metrics=["pearson_pert", "mse", "rank"], n_boot=20)
    t = card.table
    t = t[t.split == "unseen_gene"].set_index("metric")
    assert list(t.ceiling_by[["pearson_pert", "mse", "rank"]]) == ["Spearman-Brown", "quarter", "none"]
    r = t.split_half["pearson_pert"]
    assert np.isclose(t.ceiling["pearson_pert"], np.sqrt(2 * r / (1 + r)))
    assert np.isnan(t.ceiling["rank"]) and "no ceiling known" in headline(card, "mean", "rank")
    wide = card.wide(["pearson_pert", "rank"]).loc["unseen_gene"]
    assert wide["rank"].drop("ceiling").notna().all() and np.isnan(wide["rank"]["ceiling"])
    assert np.isclose(wide["rank"]["split_half"], t.split_half["rank"], atol=1e-3)


def test_small_groups_are_counted_not_scored(card):
    few = card.per_perturbation.copy()
    names = sorted(set(few.perturbation[few.split == "unseen_gene"]))
    few = few[(few.split == "unseen_gene") & few.perturbation.isin(names[:3])]
    small = Card(few, n_boot=20, controls=card.controls)
    assert small.wide().isna().all().all() and "3 perturbations, too few" in repr(small)
    assert not small.plot().axes and "too few" in headline(small, "perfect")


def test_names_are_text_everywhere(card, tmp_path):
    new = {"perfect": "=1+1", "ridge": "<b>$x$</b>"}
    own, tried = (t.assign(model=t.model.replace(new)) for t in (card.per_perturbation, card.controls))
    named = Card(own, n_boot=20, controls=tried)
    named.to_csv(tmp_path / "card.csv")
    assert "'=1+1" in (tmp_path / "card.csv").read_text()
    named.plot(["rank"]).canvas.draw()
    assert "<b>" not in named.to_html(tmp_path / "card.html").read_text()


def test_baselines_stay_within_what_expression_can_be(screen):
    cells, features, fold = screen
    for kind in BASELINES.values():
        mean = kind().fit(cells, fold, features).predict(cells, fold.test).layers["mean"]
        assert mean.min() >= 0 and mean.max() <= np.log(10001) + 1e-6


def test_single_cell_pairs_have_controls_of_their_time():
    "Where controls drift with time, a treated cell is paired with a control of its own time."
    cells = prepare(simulate(n_genes=30, n_perturbations=4, cells_per_perturbation=20, seed=0), n_genes=30)
    late = np.arange(cells.n_obs) % 2 == 1
    cells.obs["time"] = np.where(late, 48.0, 24.0)
    cells.X = np.tile(np.where(late, 2.0, 1.0)[:, None], (1, cells.n_vars)).astype(np.float32)
    first = cells.obs[cells.obs.perturbation != "control"].iloc[0]
    control, treated = _pairs_of(cells, [(first.perturbation, first.cell_type, first.dose)])
    assert np.array_equal(control[0], treated[0]) and len(np.unique(treated[0])) == 2


def test_card_gives_the_share_of_the_network_in_words(card, tmp_path):
    class Model:
        predictor = "its network: a BioJEPA has an attribute of this name"
        def predict(self, cells, names, **setting): raise NotImplementedError
        def what_answers(self): return "the closed form alone; the network's share is 0.00"

    opened = Answers(Model())
    fitted = {"base": [opened, (opened, Model())], "function": [len]}
    assert _made_of(fitted) == {"base": Model().what_answers()}
    words = {"perfect": "<b> alone", "ridge": "a baseline has no such line"}
    own = Card(card.per_perturbation, n_boot=20, controls=card.controls, made_of=words)
    page = own.to_html(tmp_path / "card.html").read_text()
    assert "What answers for perfect: &lt;b&gt; alone." in page and page.count("What answers for") == 1
    assert "Suspicious: perfect" in page and "suspicious, since it is above the ceiling" in page


def test_card_of_a_fitted_model_names_what_answers_and_refuses_a_leak(screen, tmp_path):
    cells, features, fold = screen
    model = BioJEPA.fit(cells, fold, features=features, network=False, progress=False)
    both = {"one": model, "two": [model]}
    page = scorecard(cells, fold, both, "none", metrics=["mse"], n_boot=20).to_html(tmp_path / "card.html")
    for name in both:
        line = f"What answers for {name}: {html.escape(model.what_answers())}."
        assert line in page.read_text()
    for given in (model, Answers(model)):
        with pytest.raises(Leak): check_predictor(given, split(cells, "simulation", seed=1))
