"""Tokenizers of the wrong class, of another model, and chat templates."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mergequant import Options, quantize
from mergequant.calibration.sources import Source
from mergequant.calibration.tokenizer import leading_tokens, load_tokenizer, written
from mergequant.errors import InputError
from mergequant.evaluate.perplexity import perplexity

CHAT = Source("chat", (({"role": "user", "content": "Who?"},), "plain"), "")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be edited."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def edit(model: Path, file: str, **fields: object) -> None:
    path = model / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "LlamaTokenizer", "GemmaTokenizer"])
def test_a_class_that_changes_texts_gives_way_to_the_file(
    model: Path, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    right = load_tokenizer(model)
    assert not caplog.text
    edit(model, "tokenizer_config.json", tokenizer_class=named)
    text = "a b  c\n"
    with contextlib.suppress(Exception):  # Gemma's class takes <unk> for granted
        wrong = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
        assert wrong != right(text)["input_ids"]  # what this is about
    mended = load_tokenizer(model)
    assert mended(text)["input_ids"] == right(text)["input_ids"]
    assert leading_tokens(mended) == leading_tokens(right)
    assert (mended.bos_token, mended.eos_token) == (right.bos_token, right.eos_token)
    assert "('a b c' does not come back)" in caplog.text and "tokenizer.json" in caplog.text


def test_a_tokenizer_that_folds_case_is_the_models_own(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(model, "tokenizer.json", normalizer={"type": "Lowercase"})
    assert load_tokenizer(model).decode(load_tokenizer(model)("ABC")["input_ids"]) == "<s>abc"
    assert not caplog.text


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}'])
def test_a_broken_tokenizer_is_refused_with_its_reason(model: Path, content: str) -> None:
    (model / "tokenizer.json").write_text(content)
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer that transformers can load \(\w+"):
        load_tokenizer(model)


def test_tokens_beyond_the_embedding_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["jumps"])
    tokenizer.save_pretrained(model)
    (text := tmp_path / "text.txt").write_text("fox jumps " * 200)
    wanted = r"token 258 \('jumps'\), and the model's embedding has only 258 rows"
    with pytest.raises(InputError, match=wanted):
        quantize(model, tmp_path / "out", [text], Options(), progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=wanted):
        perplexity(model, text, engine="transformers", window=32)


def test_conversations_are_written_by_the_models_template(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    with pytest.raises(InputError, match="has no chat template"):
        written(CHAT, tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert written(CHAT, tokenizer) == "<user>Who?plain"
    tokenizer.chat_template = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(InputError, match=r"refuses a conversation .*Roles must alternate"):
        written(CHAT, tokenizer)


def test_the_models_own_file_is_taken_beside_mistrals(model: Path) -> None:
    (model / "tekken.json").write_text("{}")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(model)
    assert written(CHAT, tokenizer) == "<user>Who?plain"
    assert tokenizer("a b")["input_ids"] == AutoTokenizer.from_pretrained(model)("a b")["input_ids"]


def test_a_model_is_quantized_on_conversations(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text(TEMPLATE)
    rows = [{"messages": [{"role": "user", "content": "The quick brown fox " * 9}]}] * 9
    (text := tmp_path / "chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = Options(sequence_length=32, statistics_samples=2, gptq_samples=2, compensation_rank=0)
    assert quantize(model, tmp_path / "out", [text], options, progress=False).is_dir()
