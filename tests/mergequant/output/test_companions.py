"""What travels with the weights, what stays, and that it is said."""

import logging
from pathlib import Path

import pytest

from mergequant import quantize
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
    said = "Not taken along: NOTICE, modeling_own.py, optimizer.json, tokenizer.py (code is never"
    assert said in caplog.text
    for name, content in TAKEN.items():
        there = output / name.replace("README.md", "README.source.md")
        assert there.read_text() == content, name
    assert not any((output / name).exists() for name in (*LEFT, *REPLACED, *CODE, ".partial"))
    for name in own:
        assert (output / name).read_bytes() == (source / name).read_bytes()
