"""ChemBERTa and Nucleotide Transformer, as transformers makes and reads them: tiny checkpoints with
random weights, in the file layout of the published ones."""
import itertools
import json

import numpy as np
import pytest

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'biojepa[language]'"
)
import torch

from biojepa.featurizers import FeatureTable
from biojepa.nucleotides import embed_texts, language_features, load_language

SIZE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
DRUGS = {"aspirin": "CC(=O)Oc1ccccc1C(=O)O", "caffeine": "Cn1c(=O)c2c(ncn2C)n(C)c1=O", "ethanol": "CCO"}
RNAS = {"A": "ACGTACGTACGTAC", "B": "GGGCCCATATATNACG" * 30, "C": "TTTTTTACGACG"}


def save(folder, model, tokenizer, **texts):
    "config.json and model.safetensors by transformers; the tokenizer's files as published."
    folder.mkdir()
    torch.manual_seed(0)
    model().save_pretrained(folder)
    for name, text in texts.items(): (folder / name.replace("_", ".", 1)).write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({k: v for k, v in tokenizer.items() if k.endswith("_token")})
    )
    return folder


@pytest.fixture(scope="module")
def chemberta(tmp_path_factory):
    "DeepChem/ChemBERTa-77M-MLM: RobertaForMaskedLM, byte pairs in vocab.json and merges.txt."
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = {t: i for i, t in enumerate([*marks, *"()=#-+[]123cnosCNOSFHPBrlI@/\\.", "cc", "CC"])}
    config = transformers.RobertaConfig(
        vocab_size=len(vocab), max_position_embeddings=32, type_vocab_size=1, pad_token_id=1, **SIZE
    )
    tokenizer = dict(
        tokenizer_class="RobertaTokenizer",
        model_max_length=30,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
    return save(
        tmp_path_factory.mktemp("models") / "ChemBERTa",
        lambda: transformers.RobertaForMaskedLM(config),
        tokenizer,
        vocab_json=json.dumps(vocab),
        merges_txt="#version: 0.2\nc c\nC C\n",
    )


@pytest.fixture(scope="module")
def nucleotide_transformer(tmp_path_factory):
    "InstaDeepAI/nucleotide-transformer-500m-human-ref: EsmForMaskedLM, words of six in vocab.txt."
    words = ["".join(w) for w in itertools.product("ATCG", repeat=6)]
    vocab = ["<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "<bos>", *words, *"ATCGN"]
    config = transformers.EsmConfig(
        vocab_size=len(vocab),
        max_position_embeddings=34,
        position_embedding_type="absolute",
        emb_layer_norm_before=False,
        token_dropout=True,
        pad_token_id=1,
        mask_token_id=2,
        **SIZE,
    )
    tokenizer = dict(
        tokenizer_class="EsmTokenizer",
        model_max_length=32,
        cls_token="<cls>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        eos_token=None,
        bos_token=None,
    )
    return save(
        tmp_path_factory.mktemp("models") / "NT",
        lambda: transformers.EsmForMaskedLM(config),
        tokenizer,
        vocab_txt="\n".join(vocab),
    )


@pytest.mark.parametrize("name, texts", [("chemberta", DRUGS), ("nucleotide_transformer", RNAS)])
def test_a_checkpoint_in_the_published_layout_is_read(name, texts, request):
    folder = request.getfixturevalue(name)
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= {
        p.name for p in folder.iterdir()
    }
    model = load_language(folder)
    found = embed_texts(texts, model, cache=None, progress=False)
    assert all(v.shape == (16,) and np.isfinite(v).all() for v in found.values())
    alone = embed_texts({"x": texts[min(texts)]}, load_language(folder), cache=None, progress=False)
    assert np.allclose(alone["x"], found[min(texts)], atol=1e-5)
    for a, b in itertools.combinations(found.values(), 2): assert not np.allclose(a, b, atol=1e-4)
    frames = language_features(texts, model, name, cache=None, progress=False)
    table = FeatureTable(frames).fit(list(texts))
    assert np.isfinite(table.transform(list(texts))[0]).all()


def test_a_structure_is_its_byte_pairs_and_dna_its_words_of_six(chemberta, nucleotide_transformer):
    smiles = load_language(chemberta).tokenizer
    assert smiles.tokenize("CCOcc") == ["CC", "O", "cc"]
    dna = load_language(nucleotide_transformer).tokenizer
    assert dna.tokenize("ACGTACGGG") == ["ACGTAC", "G", "G", "G"]
    assert dna.tokenize("ACGTANACGTAC") == [*"ACGTAN", "ACGTAC"]


def test_the_mean_is_that_of_the_model_itself(chemberta):
    model = load_language(chemberta)
    ids = model.tokenizer("CCO", return_tensors="pt")
    with torch.no_grad(): x = model.model(**ids).last_hidden_state[0, 1:-1].mean(0)
    found = embed_texts({"ethanol": "CCO"}, model, cache=None, progress=False)["ethanol"]
    assert np.allclose(found, x, atol=1e-5)


def test_long_dna_goes_by_windows_that_fit(nucleotide_transformer):
    model = load_language(nucleotide_transformer)
    long = "ACGTAC" * 200
    lengths = []
    forward = model.model.forward
    def watched(input_ids, **kwargs):
        lengths.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **kwargs)
    model.model.forward = watched
    found = embed_texts({"long": long}, model, cache=None, progress=False)
    assert max(lengths) <= 32 and len(found["long"]) == 16
