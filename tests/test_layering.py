"""Imports go one way, by reading the source: the quantizer knows the contract, not the reverse."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERVER = ROOT / "mergequant_vllm"
QUANTIZER = ROOT / "offline" / "mergequant"

# What the quantizer may know of the server's package.
SHARED = ("format", "format.targets", "packing", "rounding", "kernels.codes")
SHARED += ("kernels.linear.constant", "kernels.linear.reference", "kernels.linear.spans")
SHARED += ("kernels.norm_round.reference", "kernels.token_quant.reference")
SHARED += ("kernels.hadamard.reference",)
# What calibration multiplies by, where it runs: exact, and several times faster.
SHARED += ("kernels.hadamard.cpu", "kernels.linear.cpu.int4", "kernels.linear.spec")
SHARED += ("kernels.norm_round.cpu", "kernels.token_quant.cpu")
# `mergequant doctor` prints it.
SHARED += ("doctor",)
# Modules that may import vLLM as they are imported.
TOUCHES_VLLM = {
    SERVER / name
    for name in ("compile_cache.py", "config.py", "embedding.py", "linear.py", "parameters.py")
}


def imports(file: Path, *, top_level: bool = False) -> Iterator[str]:
    """Modules that a file imports, dotted; only those of its own top level if asked."""
    tree = ast.parse(file.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            known = [name for name in modules if _is_module(name)]
            yield from known or [node.module]


def _is_module(name: str) -> bool:
    """Whether a dotted name is a file of this project, and not something defined in one."""
    path = Path(*name.split("."))
    return any((root / path).with_suffix(".py").is_file() for root in (ROOT, ROOT / "offline"))


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


@pytest.mark.parametrize("file", files(SERVER), ids=lambda file: str(file.relative_to(ROOT)))
def test_the_server_never_imports_the_quantizer(file: Path) -> None:
    assert not [name for name in imports(file) if name.split(".")[0] == "mergequant"]


@pytest.mark.parametrize("file", files(SERVER), ids=lambda file: str(file.relative_to(ROOT)))
def test_vllm_and_triton_are_imported_in_few_files_or_inside_functions(file: Path) -> None:
    names = [] if file in TOUCHES_VLLM else list(imports(file, top_level=True))
    if file.name != "program.py":  # only Triton programs need Triton, and only when launched
        assert not [name for name in names if name.split(".")[0] in ("vllm", "triton")]
        assert not [name for name in names if "program" in name.split(".")]


@pytest.mark.parametrize("file", files(QUANTIZER), ids=lambda file: str(file.relative_to(ROOT)))
def test_the_quantizer_knows_only_the_contract_and_its_arithmetic(file: Path) -> None:
    allowed = {"mergequant_vllm", *(f"mergequant_vllm.{name}" for name in SHARED)}
    used = {name for name in imports(file) if name.split(".")[0] == "mergequant_vllm"}
    assert used <= allowed


@pytest.mark.parametrize("file", files(QUANTIZER / "methods"), ids=lambda file: file.name)
def test_methods_are_pure_of_everything_but_torch_and_references(file: Path) -> None:
    standard = {"abc", "collections.abc", "dataclasses", "itertools", "math", "typing"}
    allowed = standard | {f"mergequant_vllm.{name}" for name in SHARED}
    for name in imports(file):
        assert name.split(".")[0] == "torch" or name in allowed, name


# The quantizer's folders and files, floor by floor: each imports from floors below its own.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "options", "methods"),
    ("recipe",),
    ("calibration", "model", "cli_flags"),
    ("layers", "output"),
    ("quantizer", "evaluate"),
    ("ablation",),
    ("transformers_hook",),
    ("cli", "__init__"),
)
# Who may look at `Options`: what reads them, and what resolves them into the steps' own plans.
RESOLVES_OPTIONS = {
    "cli_flags.py",
    "recipe.py",
    "__init__.py",
    "output/fingerprint.py",
    "output/checkpoint_plan.py",
}
RESOLVES_OPTIONS |= {
    f"quantizer/{name}.py"
    for name in (
        "choose_reconstruction",
        "choose_bits",
        "measure_channels",
        "choose_rotation",
        "columns",
        "decide",
        "decision",
        "forms",
        "in_memory",
        "left_out",
        "pilot_walk",
        "prepare",
        "resolve",
        "run",
    )
}
RESOLVES_OPTIONS |= {"quantizer/resolve.py", "quantizer/run.py", "quantizer/memory/needed.py"}


def room(file: Path) -> str:
    """The quantizer's folder that a file is in, or the file itself."""
    return file.relative_to(QUANTIZER).parts[0].removesuffix(".py")


def test_every_room_of_the_quantizer_has_a_floor() -> None:
    assert {room(file) for file in files(QUANTIZER)} == {x for floor in FLOORS for x in floor}


@pytest.mark.parametrize("file", files(QUANTIZER), ids=lambda file: str(file.relative_to(ROOT)))
def test_the_quantizers_rooms_import_from_the_floors_below(file: Path) -> None:
    own = next(number for number, floor in enumerate(FLOORS) if room(file) in floor)
    below = {name for floor in FLOORS[:own] for name in floor} | {room(file)}
    # A name that the package hands out is none of its modules.
    used = {x.split(".")[1] for x in imports(file) if x.startswith("mergequant.")}
    assert used <= below | ({"cli_flags"} if room(file) == "cli" else set())


@pytest.mark.parametrize("file", files(QUANTIZER), ids=lambda file: str(file.relative_to(ROOT)))
def test_no_step_below_the_plan_looks_at_options(file: Path) -> None:
    name = str(file.relative_to(QUANTIZER))
    if name not in RESOLVES_OPTIONS and room(file) != "ablation":
        assert "mergequant.options" not in set(imports(file))


@pytest.mark.parametrize("file", files(SERVER), ids=lambda file: str(file.relative_to(ROOT)))
def test_the_server_spells_out_dtypes(file: Path) -> None:
    """vLLM loads models under the model's default dtype: float32 is not what is left out."""
    factories = {"empty", "full", "ones", "rand", "randn", "tensor", "zeros"}
    for node in ast.walk(ast.parse(file.read_text())):
        made = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func
        if made and made.attr in factories and ast.unparse(made.value) == "torch":
            names = {keyword.arg for keyword in node.keywords}
            assert "dtype" in names, f"{file.name}:{node.lineno}"


def test_importing_the_plugin_touches_neither_vllm_nor_torch() -> None:
    code = "import mergequant_vllm, sys; print({'vllm', 'torch'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
