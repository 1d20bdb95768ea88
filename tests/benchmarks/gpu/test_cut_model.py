"""A model cut to fewer blocks and tokens is the same model in what it keeps."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.gpu.cut_model import cut_model, cut_tokenizer
from tests.tiny import TEXT, make_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model of three blocks whose tokenizer merges bytes: ids 0 and 1, 256 bytes, then merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT * 3], trainer)
    folder = make_model(tmp_path / "source", blocks=3)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(tokenizer.get_vocab_size())
    model.save_pretrained(folder)
    assert config["vocab_size"] < tokenizer.get_vocab_size() == 300
    return folder


def test_what_is_kept_is_as_it_was(source: Path, tmp_path: Path) -> None:
    cut_model(source, tmp_path / "cut", 2, 280)
    whole, cut = (load_file(x / "model.safetensors") for x in (source, tmp_path / "cut"))
    assert {name for name in whole if ".layers.2." not in name} == set(cut)
    for name, tensor in cut.items():
        rows = 280 if name in ("model.embed_tokens.weight", "lm_head.weight") else len(whole[name])
        assert torch.equal(tensor, whole[name][:rows]), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert (model.config.vocab_size, model.config.num_hidden_layers) == (280, 2)


def test_text_is_the_same_in_shorter_tokens(source: Path, tmp_path: Path) -> None:
    cut_model(source, tmp_path / "cut", 2, 280)
    before, after = (AutoTokenizer.from_pretrained(x) for x in (source, tmp_path / "cut"))
    text = "lazy foxes jump, \u00e9t\u00e9 \u4f60"  # with characters that no merge makes
    long, short = (x(text, add_special_tokens=False).input_ids for x in (before, after))
    assert max(long) >= 280 > max(short) and len(short) > len(long)
    assert after.decode(short) == before.decode(long) == text
    merged = json.loads((tmp_path / "cut" / "tokenizer.json").read_text())["model"]["merges"]
    assert len(merged) == 280 - 258


def test_a_vocabulary_that_is_small_enough_stays(source: Path, tmp_path: Path) -> None:
    cut_model(source, tmp_path / "cut", 3, 16384)
    (name,) = (x.name for x in source.glob("tokenizer.json"))
    assert json.loads((source / name).read_text()) == json.loads(
        (tmp_path / "cut" / name).read_text()
    )


def test_what_cannot_be_cut_is_refused_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="give --vocabulary of at least 258"):
        cut_model(source, tmp_path / "cut", 2, 257)
    with pytest.raises(SystemExit, match="has 3 blocks"):
        cut_model(source, tmp_path / "cut", 4, 280)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(SystemExit, match="A Unigram tokenizer cannot be cut"):
        cut_tokenizer({"model": {"type": "Unigram"}}, 5)
    special = {"id": 299, "content": "<x>"}
    described = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    with pytest.raises(SystemExit, match="at least 300"):
        cut_tokenizer({"model": described, "added_tokens": [special]}, 280)


def test_merges_are_read_in_both_forms() -> None:
    vocabulary = {"a": 0, "b": 1, "ab": 2, "aba": 3, "abab": 4}
    for merges in (["a b", "ab a", "ab ab"], [["a", "b"], ["ab", "a"], ["ab", "ab"]]):
        described = {"type": "BPE", "vocab": vocabulary, "merges": merges}
        cut = cut_tokenizer({"model": described, "version": "1.0"}, 4)
        assert cut["model"]["merges"] == merges[:2] and "abab" not in cut["model"]["vocab"]
        assert cut["version"] == "1.0"
