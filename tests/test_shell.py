"The command line as a newcomer meets it: a file of one's own to a judged model, and every mistake in one line."
import subprocess
import sys
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from typer.testing import CliRunner

from biojepa import proteins as P
from biojepa.cells import CONTROL, dense
from biojepa.prepare import prepare
from biojepa.cli import app
from biojepa.featurizers import FeatureTable, MissingFeatures
from biojepa.simulator import simulate, simulated_features

pytestmark = pytest.mark.filterwarnings("ignore")


def shell(*words):
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exception and not isinstance(result.exception, SystemExit): raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def raw():
    return simulate(n_genes=48, n_perturbations=20, n_doubles=4, cells_per_perturbation=8, seed=0)


@pytest.fixture(scope="module")
def messy(raw, tmp_path_factory):
    """Logged X, counts in a layer, identifiers, pairs with an underscore, doses as text, a column
    of times."""
    a = raw.copy()
    path = tmp_path_factory.mktemp("messy") / "messy.h5ad"
    a.uns, a.layers["umi"] = {}, a.X.copy()
    a.X = sparse.csr_matrix(np.log1p(a.X))
    a.var["gene_name"] = a.var_names
    a.var_names = [f"ENSG{i:011d}" for i in range(a.n_vars)]
    a.obs = pd.DataFrame(
        dict(
            guide=a.obs.perturbation.str.replace("+", "_").replace("control", "NT"),
            lane=a.obs.batch,
            uM=a.obs.dose.map("{:g}".format),
            hours=24,
        ),
        index=a.obs_names,
    )
    a.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def annotations(raw, tmp_path_factory):
    x = simulated_features(raw)
    says = (x > x.mean() + x.std()).stack()
    path = tmp_path_factory.mktemp("go") / "some.gaf"
    path.write_text(
        "".join(
            f"UniProtKB\tP0\t{g}\tinvolved_in\tGO:{t:07d}\tPMID:1\tIDA\n"
            for g, t in says[says].index
        )
    )
    return path


def test_own_columns_become_the_contract(raw, messy, tmp_path):
    out = shell(
        "prepare",
        messy,
        tmp_path / "c.h5ad",
        "--perturbation",
        "guide",
        "--control",
        "NT",
        "--sep",
        "_",
        "--batch",
        "lane",
        "--layer",
        "umi",
        "--genes",
        "gene_name",
        "--dose",
        "uM",
        "--time",
        "hours",
        "--mode",
        "CRISPRa",
        "--n-genes",
        48,
    )
    assert "c.h5ad: " in out
    cells = anndata.read_h5ad(tmp_path / "c.h5ad")
    plain = prepare(raw, n_genes=48)
    assert list(cells.obs.perturbation) == list(plain.obs.perturbation) and list(
        cells.var_names
    ) == list(plain.var_names)
    np.testing.assert_array_equal(dense(cells.X), dense(plain.X))
    treated = cells.obs[cells.obs.perturbation != CONTROL]
    assert (
        set(treated.dose) == {1.0}
        and set(treated.time) == {24.0}
        and set(treated["mode"]) == {"CRISPRa"}
        and set(cells.obs.batch) == {"0", "1"}
    )
    shell(
        "prepare",
        messy,
        tmp_path / "d.h5ad",
        "--perturbation",
        "guide",
        "--control",
        "NT",
        "--sep",
        "_",
        "--layer",
        "umi",
        "--genes",
        "gene_name",
        "--dose",
        "2.5",
        "--time",
        "48",
    )
    treated = (lambda o: o[o.perturbation != CONTROL])(anndata.read_h5ad(tmp_path / "d.h5ad").obs)
    assert set(treated.dose) == {2.5} and set(treated.time) == {48.0}


@pytest.fixture(scope="module")
def cells(raw, tmp_path_factory):
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    prepare(raw, n_genes=40).write_h5ad(path)
    return path


def test_features_fit_score_page_predict(cells, annotations, tmp_path):
    out = shell("features", cells, "--out", tmp_path / "f", "--go", annotations)
    assert "20 of 20 targets" in out
    shell(
        "fit",
        cells,
        "--out",
        tmp_path / "base",
        "--features",
        tmp_path / "f",
        "--steps",
        6,
        "--pretraining-steps",
        4,
        "--no-progress",
        "--device",
        "cpu",
    )
    out = shell(
        "score",
        cells,
        tmp_path / "base",
        "--features",
        tmp_path / "f",
        "--out",
        tmp_path / "s.csv",
        "--page",
        tmp_path / "card.html",
        "--baselines",
        "all",
    )
    assert "<html" in (tmp_path / "card.html").read_text() and {"base", "ridge", "forest"} <= set(
        pd.read_csv(tmp_path / "s.csv").model
    )
    shell("score", cells, tmp_path / "base", "--out", tmp_path / "t.csv", "--baselines", "none")
    assert set(pd.read_csv(tmp_path / "t.csv").model) == {"base"}
    genes = anndata.read_h5ad(cells).var_names
    assert "support" in shell(
        "predict", tmp_path / "base", cells, genes[-1], "--out", tmp_path / "p.h5ad"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingFeatures)
        shell(
            "predict",
            tmp_path / "base",
            cells,
            genes[-1],
            "--mode",
            "CRISPRa",
            "--dose",
            0,
            "--time",
            24,
            "--cell-type",
            "LINE0",
            "--out",
            tmp_path / "none.h5ad",
        )
    # a dose of nothing does nothing
    assert (
        anndata.read_h5ad(tmp_path / "none.h5ad").X.any() == False
        and anndata.read_h5ad(tmp_path / "p.h5ad").X.any()
    )
    file, = (tmp_path / "f").glob("*.*")
    frame = FeatureTable.read(file).sources[file.stem]
    target = anndata.read_h5ad(cells).obs.perturbation[lambda p: p.isin(frame.index)].iloc[0]
    (tmp_path / "g").mkdir()
    frame.loc[[target]].set_axis(["LINC01"]).rename_axis("symbol").to_csv(
        tmp_path / "g" / f"{file.stem}.csv"
    )
    pd.DataFrame(dict(symbol=["LINC01"], prev_symbol=["OLD1"])).to_csv(
        tmp_path / "hgnc.txt", sep="\t", index=False
    )
    asked = [
        "predict",
        tmp_path / "base",
        cells,
        "OLD1",
        "--symbols",
        tmp_path / "hgnc.txt",
        "--out",
        tmp_path / "q.h5ad",
    ]
    with pytest.warns(MissingFeatures, match="OLD1"): assert "support 0.00" in shell(*asked)
    # its twin was in training, or is as near
    assert "support 1.00" in shell(*asked, "--features", tmp_path / "g")


def test_the_first_versions_begin_from_a_file_of_gene_sets(cells, tmp_path):
    genes = list(anndata.read_h5ad(cells).var_names)
    rows = [f"set {k}\tmade up\t" + "\t".join(genes[5 * k : 5 * k + 6]) for k in range(7)]
    (tmp_path / "sets.gmt").write_text("\n".join(rows))
    common = ["--gene-sets", tmp_path / "sets.gmt", "--steps", 4, "--no-progress", "--device", "cpu"]
    for preset, more in (("v0_1", []), ("v0_2", ["--pretraining-steps", 3])):
        out = shell("fit", cells, "--out", tmp_path / preset, "--preset", preset, *common, *more)
        assert "pathways begun from 7 gene sets, such as 'set 0'" in out


def test_features_of_proteins_under_old_names(cells, tmp_path):
    """A gene that was renamed since the screen is found by HGNC's table; one without a chain has
    no row."""
    data = anndata.read_h5ad(cells)
    targets = sorted(
        {p for n in data.obs.perturbation.unique() if n != CONTROL for p in n.split("+")}
    )
    P._tiny_checkpoint(tmp_path / "tiny.pt")
    chains = [
        (
            f">sp|P{i}|X_HUMAN text OS=Homo sapiens GN={'NEW' if i == 0 else g} "
            f"PE=1\nM{'ACDEFGHIKL'[i % 10] * 4}KT{'AVLI'[i % 4]}\n"
        )
        for i, g in enumerate(targets[:-1])
    ]
    (tmp_path / "h.fasta").write_text("".join(chains))
    (tmp_path / "hgnc.txt").write_text(f"symbol\tprev_symbol\talias_symbol\nNEW\t{targets[0]}\t\n")
    words = [
        "features",
        cells,
        "--proteins",
        tmp_path / "h.fasta",
        "--model",
        tmp_path / "tiny.pt",
        "--targets-only",
        "--no-progress",
    ]
    n = len(targets)
    assert f"{n - 1} genes x 40; {n - 1} of {n} targets, not {targets[-1]}" in shell(
        *words, "--out", tmp_path / "a", "--aliases", tmp_path / "hgnc.txt"
    )
    assert f"{n - 2} of {n} targets, not {targets[0]}, {targets[-1]}" in shell(
        *words, "--out", tmp_path / "b"
    )
    a = FeatureTable.read(tmp_path / "a")
    b = FeatureTable.read(tmp_path / "b")
    assert (
        a.missing(targets) == targets[-1:]
        and a.transform(targets[1:-1])[0].tolist() == b.transform(targets[1:-1])[0].tolist()
    )


def test_features_of_structures_and_sequences(cells, tmp_path):
    targets = sorted(
        {
            p
            for n in anndata.read_h5ad(cells).obs.perturbation.unique()
            if n != CONTROL
            for p in n.split("+")
        }
    )
    (tmp_path / "d.tsv").write_text(
        "drug\tSMILES\n" + "\n".join(f"{g}\t{'C' * (i + 1)}O" for i, g in enumerate(targets[:5]))
    )
    (tmp_path / "s.fa").write_text(
        "".join(f">{g}\n{'ACGT'[i % 4] * 6}GATTACA\n" for i, g in enumerate(targets))
    )
    out = shell(
        "features",
        cells,
        "--out",
        tmp_path / "f",
        "--smiles",
        tmp_path / "d.tsv",
        "--sequences",
        tmp_path / "s.fa",
        "--no-progress",
    )
    assert (
        f"5 of {len(targets)} targets" in out
        and f"{len(targets)} genes x 256; {len(targets)} of" in out
    )
    read = FeatureTable.read(tmp_path / "f").sources
    assert set(read) == {"Morgan", "properties", "words"}
    rows = [
        f"{i},{g},{'C' * (i + 1)}O,{'ACGT'[i % 4] * 6}GATTACA" for i, g in enumerate(targets[:5])
    ]
    # the columns are found, in any order
    (tmp_path / "t.csv").write_text("\n".join(["number,name,SMILES,Sequence", *rows]))
    (tmp_path / "u.csv").write_text(
        "\n".join(["smiles,drug", *(f"{r.split(',')[2]},{r.split(',')[1]}" for r in rows)])
    )
    for n, words in {
        "t": ("--smiles", tmp_path / "t.csv", "--sequences", tmp_path / "t.csv"),
        "u": ("--smiles", tmp_path / "u.csv"),
    }.items():
        shell("features", cells, "--out", tmp_path / n, *words, "--no-progress")
        for k, x in FeatureTable.read(tmp_path / n).sources.items():
            pd.testing.assert_frame_equal(x, read[k].loc[x.index])


def test_names_of_a_table_of_texts(tmp_path):
    "As people write them; a name with two texts is refused, a copy is not."
    from biojepa.cli_steps import _column
    path = tmp_path / "drugs.csv"
    path.write_text("name,smiles\n(+)-JQ1,CCO\n aspirin ,CC\nNA,C\naspirin,CC\nnone,\n")
    assert _column(path, "smiles") == {"(plus)-JQ1": "CCO", "aspirin": "CC"}
    path.write_text("name,smiles\naspirin,CCO\naspirin,CC\n")
    with pytest.raises(ValueError, match="drugs.csv: 'aspirin' has two smiles"): _column(path, "smiles")


def test_annotations_need_no_rdkit(cells, annotations, tmp_path):
    "RDKit is for --smiles alone, and without it that is one red line."
    def run(*words):
        return subprocess.run(
            [
                sys.executable,
                "-W",
                "ignore",
                "-c",
                ("import sys; sys.modules['rdkit'] = None; from biojepa.cli import main; main()"),
                "features",
                str(cells),
                "--out",
                str(tmp_path / "f"),
                *map(str, words),
            ],
            capture_output=True,
            text=True,
        )
    assert run("--go", annotations).returncode == 0
    (tmp_path / "d.csv").write_text(
        "name,smiles\n"
        + anndata.read_h5ad(cells).obs.perturbation[lambda p: p != CONTROL].iloc[0]
        + ",CCO\n"
    )
    out = run("--smiles", tmp_path / "d.csv")
    assert (
        out.returncode == 2
        and "pip install 'biojepa[molecules]'" in out.stderr
        and "Traceback" not in out.stderr
    ), out.stderr


def test_prepared_cells_go_straight_into_demo(cells, annotations, tmp_path):
    shell("features", cells, "--out", tmp_path / "f", "--go", annotations)
    drop = anndata.read_h5ad(cells).obs.perturbation.value_counts().index[-1]
    out = shell(
        "demo",
        "--data",
        cells,
        "--features",
        tmp_path / "f",
        "--quick",
        "--no-progress",
        "--out",
        tmp_path / "demo",
        "--drop",
        drop,
    )
    assert "was prepared already: taken as it is" in out and (tmp_path / "demo/index.html").exists()
    assert drop not in set(anndata.read_h5ad(tmp_path / "demo/predictions.h5ad").obs.perturbation)
    with pytest.raises(ValueError, match="--drop NOBODY: no such perturbation"):
        shell("demo", "--data", cells, "--drop", "NOBODY", "--quick", "--out", tmp_path / "x")


def test_predictions_stand_beside_what_was_observed_at_their_dose():
    """Drugs at three doses beside genes, two lines:

    one row per condition, each with its own observed effect, and a drug is asked about as a
    drug.
    """
    from biojepa.effects import effects
    from biojepa.demo import predict_held_out, real_splits
    from biojepa.estimator import BioJEPA
    raw = simulate(
        n_genes=40, n_perturbations=12, n_drugs=4, cells_per_perturbation=6, cell_types=2, seed=0
    )
    cells = prepare(raw, n_genes=40)
    splits = real_splits(cells, 0)
    models = [
        BioJEPA.fit(
            cells, s, features=simulated_features(raw), device="cpu", progress=False, network=False
        )
        for s in splits
    ]
    p = predict_held_out(cells, splits, models)
    truth = effects(cells)
    assert p.n_obs == truth.n_obs and p.obs_names.is_unique and set(p.obs.dose) == {0.1, 1.0, 10.0}
    for i, row in enumerate(p.obs.itertuples()):
        same = (
            (truth.obs.perturbation == row.perturbation)
            & (truth.obs.cell_type == row.cell_type)
            & (truth.obs.dose == row.dose)
        )
        assert same.sum() == 1
        np.testing.assert_array_equal(p.layers["observed"][i], truth.X[same.to_numpy()][0])
    drug = (p.obs.perturbation == "DRUG2") & (p.obs.cell_type == "LINE0")
    model = next(m for m, s in zip(models, splits) if "DRUG2" in s.test)
    np.testing.assert_allclose(
        p[(drug & (p.obs.dose == 10)).to_numpy()].X,
        model.predict(cells, ["DRUG2"], cell_type="LINE0", mode="drug", dose=10).X,
        atol=1e-6,
    )


def test_a_warning_is_a_word_and_not_a_place_in_the_code(cells, annotations, tmp_path):
    shell("features", cells, "--out", tmp_path / "f", "--go", annotations)
    shell(
        "fit",
        cells,
        "--out",
        tmp_path / "m",
        "--features",
        tmp_path / "f",
        "--steps",
        4,
        "--pretraining-steps",
        4,
        "--no-progress",
        "--device",
        "cpu",
    )
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            "from biojepa.cli import main; main()",
            "predict",
            tmp_path / "m",
            cells,
            "GATA1",
            "--out",
            tmp_path / "p.h5ad",
        ],
        capture_output=True,
        text=True,
    )
    assert (
        out.returncode == 0
        and "MissingFeatures: nothing is known of GATA1" in out.stderr
        and ".py" not in out.stderr
    ), out.stderr


@pytest.mark.parametrize(
    "words, says",
    [
        (["features", "{cells}"], "name a source: --go, --proteins, --smiles or --sequences"),
        (["features", "{messy}", "--go", "x"], "run biojepa prepare first"),
        (["features", "{cells}", "--go", "{folder}/no.gaf"], "No such file"),
        (["features", "{cells}", "--smiles", "{folder}/x.csv"], "x.csv has no column smiles"),
        (
            ["features", "{cells}", "--sequences", "{folder}/x.fa"],
            ("has none of the targets: it has names such as stranger"),
        ),
        (["features", "{cells}", "--go", "{cells}"], "is it a GAF file?"),
        (["features", "{cells}", "--proteins", "{cells}"], "a FASTA file begins with '>'"),
        (["data", "get", "papalexi", "--file", "{folder}/no.h5ad"], "no file"),
        (
            ["prepare", "{messy}", "{folder}/c.h5ad", "--perturbation", "guide", "--control", "NT"],
            "layer='umi' holds whole numbers",
        ),
    ],
)
def test_a_mistake_is_one_red_line(words, says, cells, messy, tmp_path):
    words = [w.format(cells=cells, messy=messy, folder=tmp_path) for w in words]
    (tmp_path / "x.csv").write_text("drug,formula\naspirin,C9H8O4\n")
    (tmp_path / "x.fa").write_text(">stranger\nACGTACGT\n")
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "from biojepa.cli import main; main()", *words],
        capture_output=True,
        text=True,
    )
    assert (
        out.returncode == 2
        and says in out.stderr
        and "Traceback" not in out.stderr
        and len(out.stderr.strip().splitlines()) == 1
    ), out.stderr
