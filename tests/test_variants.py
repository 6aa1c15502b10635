"Variants: their names, their sequences, and what a model answers of them."
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biojepa.aliases import gene_of
from biojepa.estimator import BioJEPA
from biojepa.featurizers import MissingFeatures, as_table, encode_actions
from biojepa.nucleotides import kmer_profile
from biojepa.perturbations import Action, BadAction
from biojepa.prepare import prepare
from biojepa.simulator import simulate, simulated_features
from biojepa.splits import Leak, check_split, split
from biojepa.variants import (
    CODE,
    BadVariant,
    parse_variant,
    translate,
    variant_sequences,
    with_changes,
)

CODONS = sorted(c for c, a in CODE.items() if a != "*")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(CODONS), min_size=2, max_size=20), st.data())
def test_a_nucleotide_and_its_residue_make_the_same_protein(codons, data):
    coding = "".join(codons) + "TAA"
    place = data.draw(st.integers(1, 3 * len(codons)))
    new = data.draw(st.sampled_from([b for b in "ACGT" if b != coding[place - 1]]))
    letter = parse_variant(f"G:c.{place}{coding[place - 1]}>{new}")
    chain = letter.protein(coding=coding)
    at = (place - 1) // 3
    old, now = CODE[coding[3 * at : 3 * at + 3]], CODE[letter.coding(coding)[3 * at : 3 * at + 3]]
    if old == now:
        assert chain == translate(coding)
        return
    residue = parse_variant(f"G:p.{old}{at + 1}{now}")
    assert residue.protein(translate(coding)) == chain == translate(residue.coding(coding))
    changed = sum(a != b for a, b in zip(residue.coding(coding), coding))
    assert changed == 1


@pytest.mark.parametrize(
    "name, says",
    [
        ("TP53:p.B175H", "'B' is no residue"),
        ("TP53:p.Xyz175His", "'Xyz' is no residue"),
        ("TP53:p.R0H", "count from 1"),
        ("TP53:p.R175R", "no change"),
        ("TP53:p.R175fs", "one substitution"),
        ("TP53:c.375+1G>A", "one substitution"),
        ("TP53:c.524G>", "one substitution"),
    ],
)
def test_what_is_no_substitution_is_refused_by_name(name, says):
    with pytest.raises(BadVariant, match="TP53:") as e: parse_variant(name)
    assert says in str(e.value)


def test_a_wrong_residue_or_place_is_refused_by_name():
    with pytest.raises(BadVariant, match="letter 3 of the protein of TP53 is R, not K"):
        variant_sequences(["TP53:p.K3H"], {"TP53": "MKR"})
    with pytest.raises(BadVariant, match="has 3 letters, so none at 175"):
        variant_sequences(["TP53:p.R175H"], {"TP53": "MKR"})
    with pytest.raises(BadVariant, match="a coding sequence of TP53 is needed"):
        variant_sequences(["TP53:c.2T>A"], {"TP53": "MKR"})
    with pytest.raises(BadVariant, match="a protein of TP53 is needed"): variant_sequences(["TP53:p.R3H"])


@pytest.fixture(scope="module")
def screen():
    raw = simulate(n_genes=40, n_perturbations=16, cells_per_perturbation=10, seed=2)
    cells = prepare(raw, n_genes=40)
    rng = np.random.default_rng(0)
    genes = {g: "ATG" + "".join(rng.choice(CODONS, 60)) for g in cells.var_names}
    words = {"protein": pd.DataFrame(
        {a: [translate(s).count(a) / 61 for s in genes.values()] for a in set(CODE.values()) - {"*"}},
        list(genes),
    )}
    words["transcript"] = kmer_profile(genes, 2)
    fold = split(cells, seed=0)
    model = BioJEPA.fit(
        cells,
        fold,
        features=words,
        progress=False,
        model=dict(width=16, layers=1, predictor_layers=1),
        pretraining=dict(steps=2),
        training=dict(steps=2),
    )
    return cells, genes, fold, model


def described(names, genes):
    chains, coding = variant_sequences(names, transcripts=genes)
    letters = sorted(set(CODE.values()) - {"*"})
    return {
        "protein": pd.DataFrame([[c.count(a) / 61 for a in letters] for c in chains.values()], list(chains), letters),
        "transcript": kmer_profile(coding, 2),
    }


def test_both_sources_side_by_side_and_the_change_beside_them(screen):
    cells, genes, fold, model = screen
    gene = fold.train[0]
    old = translate(genes[gene])[4]
    names = [f"{gene}:p.{old}5{'W' if old != 'W' else 'A'}", f"{gene}:c.4{genes[gene][3]}>{'A' if genes[gene][3] != 'A' else 'C'}"]
    frames = with_changes(described(names, genes))
    assert list(frames) == ["protein", "transcript", "protein change", "transcript change"]
    for frame in frames.values(): assert list(frame.index) == [gene, *names]
    assert not frames["transcript change"].loc[gene].any()
    assert frames["transcript change"].loc[names].abs().sum(axis=1).min() > 0
    with pytest.raises(BadVariant, match="wild type"): with_changes({"x": frames["protein"].drop(gene)})


def test_a_variant_is_supported_as_its_gene(screen):
    cells, genes, fold, model = screen
    for gene in (fold.train[0], fold.test[0]):
        name = f"{gene}:c.1A>C"
        chains = described([name], genes)
        order = model.table.sources
        frames = {s: f.loc[[name]] for s, f in chains.items()}
        frames["protein"] = frames["protein"][sorted(frames["protein"])]
        whole = model.predict(cells, [gene])
        with pytest.warns(MissingFeatures, match=f"its own sequence, answered as {gene}"):
            alone = model.predict(cells, [name])
        assert np.allclose(alone.X, whole.X) and np.allclose(alone.obs.support, whole.obs.support)
        assert alone.obs.missing.iloc[0] == f"{name}: its own sequence, answered as {gene}"
        with warnings.catch_warnings():
            warnings.simplefilter("error", MissingFeatures)
            own = model.predict(cells, [name], features=frames)
        assert np.allclose(own.obs.support, whole.obs.support) and not own.obs.missing.iloc[0]
        assert not np.allclose(own.X, whole.X, atol=1e-6)
    with pytest.raises(BadAction, match="'J' is no residue"): model.predict(cells, ["TP53:p.J1H"])


def test_the_target_of_a_variant_is_its_gene(screen):
    cells, *_ = screen
    gene = cells.var_names[7]
    batch = encode_actions([Action.parse(f"{gene}:p.R2H"), Action.parse(gene)], cells.var_names)
    assert batch.target[:, 0].tolist() == [7, 7] and gene_of("CC(=O):p") == "CC(=O):p"


def test_a_split_keeps_the_variants_of_a_gene_on_one_side():
    cells = prepare(simulate(n_genes=40, n_perturbations=16, cells_per_perturbation=8, seed=0), n_genes=40)
    name = cells.obs.perturbation.astype(str)
    odd = np.arange(cells.n_obs) % 2 == 1
    variant = np.where(odd, name + ":p.R175H", name + ":p.R273H")
    cells.obs["perturbation"] = np.where(name == "control", name, variant)
    for kind in ("unseen_gene", "simulation"):
        made = split(cells, kind, seed=0)
        sides = [{gene_of(n) for n in part} for part in (made.train, made.val, made.test)]
        assert all(sides) and sum(map(len, sides)) == len(set.union(*sides)) == 16
    with pytest.raises(Leak, match="held out as unseen_gene"):
        check_split(replace(made, train=(*made.train, f"{gene_of(made.test[0])}:c.5G>A")))
