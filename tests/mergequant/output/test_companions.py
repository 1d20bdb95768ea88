"""What travels with the weights, what stays, and that it is said."""

import json
import logging
from pathlib import Path

import pytest

from mergequant import InputError, quantize
from mergequant.evaluate.sample import BEGINNING, sample
from mergequant.output.companions import companions, left_behind
from tests.conftest import FEW
from tests.tiny import make_model

TAKEN = {
    "tekken.json": "t",
    "modules.json": "[]",
    "config_sentence_transformers.json": "{}",
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "preprocessor_config.json": "{}",
    "LICENSE": "mine",
    "NOTICE.txt": "note",
    "README.md": "# Source",
}
LEFT = {
    "modeling_own.py": "raise SystemExit",
    "optimizer.json": "{}",
    "tokenizer.py": "raise SystemExit",
}
CODE = {"1_Pooling/own.py": "raise SystemExit"}  # within what is taken
OWN_TOKENIZER = """\
from pathlib import Path

from transformers import PreTrainedTokenizerFast


class Own(PreTrainedTokenizerFast):
    def __init__(self, *arguments, name_or_path="", **settings):
        file = str(Path(name_or_path) / "tokenizer_own.json")
        super().__init__(tokenizer_file=file, bos_token="<s>", eos_token="</s>")
"""
REPLACED = {"training_args.bin": "pickle", "consolidated.pth": "pickle", ".gitattributes": "*"}


def test_everything_that_is_read_travels(
    tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_model(tmp_path / "source")
    own = {x.name for x in companions(source)}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= own
    for name, content in {**TAKEN, **LEFT, **REPLACED, **CODE}.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(content)
    (source / "NOTICE").symlink_to(tmp_path / "nowhere")
    assert left_behind(source) == sorted([*LEFT, "NOTICE"])
    with caplog.at_level(logging.INFO, "mergequant"):
        output = quantize(source, tmp_path / "out", [text], FEW, progress=False)
    said = "Not taken along: NOTICE, modeling_own.py, optimizer.json, tokenizer.py (code is copied"
    assert said in caplog.text
    for name, content in TAKEN.items():
        there = output / name.replace("README.md", "README.source.md")
        assert there.read_text() == content, name
    assert not any((output / name).exists() for name in (*LEFT, *REPLACED, *CODE, ".partial"))
    for name in own:
        assert (output / name).read_bytes() == (source / name).read_bytes()


def test_code_travels_only_where_it_is_trusted_and_is_named(
    tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A tokenizer of the model's own: refused, then run, copied, and named in log and card."""
    source = make_model(tmp_path / "source")
    (source / "own.py").write_text(OWN_TOKENIZER)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "pool.py").write_text("# of the model's own")
    file = source / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    file.write_text(json.dumps(config))
    (source / "tokenizer.json").rename(source / "tokenizer_own.json")
    with pytest.raises(InputError, match="give --trust-remote-code"):
        quantize(source, tmp_path / "out", [text], FEW, progress=False)
    output = quantize(source, tmp_path / "out", [text], FEW, trust_remote_code=True, progress=False)
    assert (output / "own.py").read_text() == OWN_TOKENIZER
    assert "Code of the source that was copied along: 1_Pooling/pool.py, own.py" in caplog.text
    assert (
        "It brings code of the source: 1_Pooling/pool.py, own.py."
        in (output / "README.md").read_text()
    )
    asked, _ = sample(output, trust_remote_code=True)
    assert asked == BEGINNING
