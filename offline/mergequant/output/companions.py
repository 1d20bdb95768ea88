"""What travels with the weights: files of the source that a server, a client or a lawyer reads."""

import logging
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

README, SOURCE_README = "README.md", "README.source.md"
# Names and patterns of files and folders, see `fnmatch`.
TAKEN = (
    "generation_config.json",
    "tokenizer*",
    "tekken.json",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
    "*processor_config.json",
    # Of embedding models: what is done with hidden states.
    "modules.json",
    "*sentence*.json",
    "[0-9]*_[A-Z]*",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
    README,
)
# Weights and what belongs to them, which the checkpoint has its own of.
REPLACED = ("*.safetensors", "*.index.json", "config.json", "*.bin", "*.pth", "*.pt", "*.gguf")
_OF_NO_USE = (".*", "__pycache__")
CODE = ".py"  # is copied only where it is trusted: a server would run it

logger = logging.getLogger("mergequant")


def companions(folder: Path, *, code: bool = False) -> list[Path]:
    """The files and folders of a source model that its checkpoint takes along.

    Args:
        code: its `*.py` are among them.
    """
    taken, others = ((*TAKEN, f"*{CODE}"), REPLACED) if code else (TAKEN, (*REPLACED, f"*{CODE}"))
    named = (x for x in folder.iterdir() if _matches(x, taken) and not _matches(x, others))
    return sorted(x for x in named if x.is_file() or x.is_dir())  # a link may lead nowhere


def left_behind(folder: Path, *, code: bool = False) -> list[str]:
    """Names of what is in a source model and neither replaced nor taken along."""
    taken = {x.name for x in companions(folder, code=code)}
    rest = (x for x in folder.iterdir() if not _matches(x, (*REPLACED, *_OF_NO_USE)))
    return sorted(x.name for x in rest if x.name not in taken)


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def copied_code(folder: Path) -> list[str]:
    """Paths of the `*.py` in a folder, from there, those in its folders among them."""
    return sorted(str(x.relative_to(folder)) for x in folder.rglob(f"*{CODE}"))


def copy_companions(source: Path, folder: Path, *, code: bool = False) -> Iterator[str]:
    """Copy what travels along into `folder`; yields its name there. What stays is logged.

    Args:
        code: copy `*.py` as well, and name them in the log.
    """
    unwanted = shutil.ignore_patterns(*_OF_NO_USE, *(() if code else (f"*{CODE}",)))
    for path in companions(source, code=code):
        name = SOURCE_README if path.name == README else path.name
        if path.is_dir():
            shutil.copytree(path, folder / name, dirs_exist_ok=True, ignore=unwanted)
        else:
            shutil.copyfile(path, folder / name)
        yield name
    programs = copied_code(folder) if code else []
    if programs:
        logger.warning("Code of the source that was copied along: %s", ", ".join(programs))
    if stays := left_behind(source, code=code):
        lost = any(name.endswith(CODE) for name in stays)
        remedy = " (code is copied only with --trust-remote-code: a server would run it)"
        logger.info("Not taken along: %s%s", ", ".join(stays), remedy if lost else "")
