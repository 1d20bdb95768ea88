"""What README and docs name is there: links, paths, commands; and README's example runs."""

import argparse
import ast
import importlib
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mergequant import Options
from mergequant.cli import app
from mergequant_vllm.format import CheckpointFormat, expected_tensors, parse
from tests.tiny import make_model, write_text

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
MOST_LINES = 130

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
INDENTED = re.compile(r"^ {4}((?:make|mergequant|pip|python|vllm) .*)$", re.MULTILINE)
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
PATH = re.compile(r"\w[\w.-]*(/[\w.-]*)*")
SUFFIXES = (".cpp", ".h", ".md", ".py", ".sh", ".toml")
SOURCES = ("benchmarks", "docs", "examples", "mergequant_vllm", "offline", "scripts", "tests")

# Enough for a run of seconds on a model of two narrow blocks.
SMALL = {
    "quantize": "--fast --quiet --statistics-samples 4 --gptq-samples 8 --sequence-length 64",
    "perplexity": "--window 64 --windows 2",
    "inspect": "",
}


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """Contents of a page's fenced code blocks."""
    for language, content in FENCED.findall(page.read_text()):
        if language in languages:
            yield content


def prose(page: Path) -> str:
    """A page without its fenced code blocks."""
    return FENCED.sub("", page.read_text())


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each command in the code blocks, fenced or indented, one list a command."""
    indented = "\n".join(INDENTED.findall(prose(page)))
    for content in (*blocks(page, "sh"), indented):
        for line in content.replace("\\\n", " ").splitlines():
            words = [*shlex.split(line, comments=True), "&&"]
            while "&&" in words:
                end = words.index("&&")
                if end:
                    yield words[:end]
                words = words[end + 1 :]


def commands_of(start: str) -> list[Any]:
    """Every command of the pages that begins so, as parameters of a test."""
    parameters = []
    for page in PAGES:
        for words in commands(page):
            if " ".join(words).startswith(start):
                parameters.append(pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}"))
    return parameters


def anchors(page: Path) -> set[str]:
    """Fragments that GitHub gives a page's headings."""
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in HEADING.findall(FENCED.sub("", page.read_text()))
    }


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, fragment = link.partition("#")
        target = page if not name else page.parent / name
        assert target.exists(), link
        assert not fragment or fragment in anchors(target), link


def paths(page: Path) -> Iterator[tuple[str, Path]]:
    """What looks like a path of this repository, and the folder that its heading names."""
    folder = ROOT
    for line in prose(page).splitlines():
        words = INLINE.findall(line)
        if line.startswith("#"):
            folder = ROOT
            if words and (ROOT / words[0]).is_dir():
                folder = ROOT / words[0]
        for word in words:
            if PATH.fullmatch(word) and ("/" in word or word.endswith(SUFFIXES)):
                yield word, folder


@pytest.mark.parametrize("name", ["layout.md", "method.md", "kernels.md", "format.md"])
def test_paths_exist(name: str) -> None:
    mentioned = list(paths(ROOT / "docs" / name))
    assert mentioned
    for word, folder in mentioned:
        if "/" in word:
            assert (ROOT / word).exists() or (folder / word).exists(), word
        else:  # a name alone is somewhere in the folder of its heading
            tops = (folder,) if folder != ROOT else (ROOT / top for top in SOURCES)
            there = (folder / word).exists() or any(any(top.rglob(word)) for top in tops)
            assert there, f"{word} in {folder}"


@pytest.mark.parametrize("words", commands_of("mergequant "))
def test_commands_parse(words: list[str]) -> None:
    """Each argument and flag is known, and has a value of its type."""
    group: Any = typer.main.get_command(app)
    command = group.commands[words[1]]
    with command.make_context(words[1], words[2:]) as context:
        if "ignore" in context.params:
            given = {x: y for x, y in context.params.items() if x in Options.model_fields}
            from mergequant.cli_flags import read_options

            read_options(given)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_exist(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    for words in (x.split() for x in INLINE.findall(prose(page)) if x.startswith("mergequant ")):
        if words[1].isupper():  # COMMAND stands for any
            continue
        flags = {flag for parameter in group.commands[words[1]].params for flag in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= flags | {"--help"}, words


class _ParsedError(Exception):
    """The arguments are understood."""


@pytest.mark.parametrize("words", commands_of("python -m benchmarks."))
def test_benchmarks_understand_their_commands(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, args: Any = None) -> None:
        read(self, args)
        raise _ParsedError

    module = words[2]
    spec = importlib.util.find_spec(module)
    assert spec is not None
    main = f"{module}.__main__" if spec.submodule_search_locations else module
    monkeypatch.setattr("sys.argv", ["benchmark", *words[3:]])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(_ParsedError):
        importlib.import_module(main).main()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_benchmarks_in_the_text_exist(page: Path) -> None:
    for module in re.findall(r"python -m (benchmarks[\w.]*\w)", page.read_text()):
        spec = importlib.util.find_spec(module)
        assert spec is not None, module
        if spec.submodule_search_locations:
            assert importlib.util.find_spec(f"{module}.__main__") is not None, module


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, id=f"{page.name}-{number}")
        for page in PAGES
        for number, code in enumerate(blocks(page, "python"))
    ],
)
def test_python_examples_compile_import_and_name_real_options(code: str) -> None:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            if node.module == "vllm":
                continue  # comes with an extra, and takes seconds to import
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), alias.name
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "Options":
            keywords = {x.arg: ast.literal_eval(x.value) for x in node.keywords}
            Options.model_validate(keywords)


def test_readmes_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny model, the server's part left out."""
    monkeypatch.chdir(tmp_path)
    model = make_model(tmp_path / "model")
    text = write_text(tmp_path / "text.txt")
    every = [words[1:] for words in commands(README) if words[0] == "mergequant"]
    wanted = [words for words in every if words[0] in SMALL]
    assert [words[0] for words in wanted] == ["quantize", "inspect", "perplexity"]
    instead = {wanted[0][1]: str(model)}
    instead |= {word: str(text) for words in wanted for word in words if word.endswith(".txt")}
    for words in wanted:
        arguments = [instead.get(word, word) for word in words] + SMALL[words[0]].split()
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (arguments, result.output, result.exception)
        assert words[0] != "perplexity" or "perplexity" in result.output


def test_the_formats_examples_are_valid() -> None:
    whole, mixed = (json.loads(x) for x in blocks(ROOT / "docs" / "format.md", "json"))
    uniform: CheckpointFormat = parse(whole)
    assert set(uniform.quantized) == {name for name, _ in uniform.entries()}
    checkpoint = parse({**whole, **mixed})
    assert checkpoint.quantized["model.layers.1.mlp.down_proj"].weight.bits == 8
    assert checkpoint.quantized["lm_head"].weight.bits == 8
    assert "model.layers.0.mlp.down_proj.weight" in expected_tensors(checkpoint)


def test_readme_is_short_and_names_the_two_commands() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    targets = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert re.search(rf"^ +make {target}\b", text, re.MULTILINE)
        assert f"\n{target}: " in targets


def test_nothing_speaks_of_how_it_was_developed() -> None:
    """Spelled in pieces, so that this file does not speak of it either."""
    anywhere = re.compile("/wo" + r"rk/|sha" + r"red/|(?<![\w\"])ses" + r"sion(?!\w)")
    pages = re.compile("this mach" + "ine|" + anywhere.pattern, re.IGNORECASE)
    documents = [*DOCUMENTS, *(ROOT / "benchmarks" / "results").rglob("*.md")]
    for file in documents:
        assert not pages.search(file.read_text()), file
    kinds = (".cpp", ".h", ".py", ".sh", ".toml", ".yml")
    files = [file for top in SOURCES for file in (ROOT / top).rglob("*") if file.suffix in kinds]
    for file in (*files, ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "setup.py"):
        assert not anywhere.search(file.read_text()), file
