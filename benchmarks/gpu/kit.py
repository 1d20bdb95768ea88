"""What `benchmarks.gpu.first` needs on a GPU machine without network, in parts of a bounded size.

    python -m benchmarks.gpu.kit build OUT --model FOLDER --calibration FILE --text FILE
        [--blocks 5] [--vocabulary 16384] [--server FOLDER ...] [--limit 60]
    python -m benchmarks.gpu.kit unpack PART [PART ...] --to FOLDER

`build` runs where there are a compiler and a network: it makes this project's wheel, the first
BLOCKS blocks of a 16-bit model with the first VOCABULARY of its tokens, the same quantized on a CPU
with the options of `first.QUANTIZED`, its loss there, and enough of the texts. SERVER is a folder
of files that bring vLLM, one for each part; they are copied as they are, and what is ours fills the
parts up to LIMIT MiB. `unpack` needs nothing but Python; it prints the command that is to be run
next.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARCHIVE = "mergequant.tar.xz"
MIB = 2**20
TEXT_BYTES, CALIBRATION_BYTES = 200_000, 400_000  # of 16 windows of 1024 tokens; of 32 of 512


def make_wheel(folder: Path) -> None:
    """Build this project's wheel into `folder`, with the native kernels."""
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT])


def make_content(folder: Path, given: argparse.Namespace) -> None:
    """Make everything that is to be brought, under `folder`."""
    from benchmarks.gpu.cut_model import cut_model
    from benchmarks.gpu.first import COMMAND, QUANTIZED, WINDOWS

    cut_model(given.model, folder / "model", given.blocks, given.vocabulary)
    for source, name, size in (
        (given.text, "text", TEXT_BYTES),
        (given.calibration, "calibration", CALIBRATION_BYTES),
    ):
        begin = source.read_bytes()[:size].decode(errors="ignore")
        # The last line may be cut off in the middle: a JSON line would be none.
        lines = begin[: begin.rfind("\n") + 1] or begin
        (folder / f"{name}{source.suffix}").write_text(lines)
    make_wheel(folder)
    mergequant = COMMAND.format(python=sys.executable).split()
    checkpoint, calibration = folder / "checkpoint", next(folder.glob("calibration.*"))
    quantize = [*mergequant, "quantize", folder / "model", checkpoint, "--calibration", calibration]
    run([*quantize, "--device", "cpu", "--quiet", *QUANTIZED.split()])
    measure = [*mergequant, "perplexity", checkpoint, "--text", next(folder.glob("text.*"))]
    loss = run([*measure, "--engine", "transformers", "--json", *WINDOWS.split()])
    (folder / "cpu.json").write_text(loss)


def run(command: Sequence[object]) -> str:
    """Run a command; returns what it prints. What it prints as errors is shown."""
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


def build(given: argparse.Namespace) -> list[Path]:
    """Make the parts; returns their folders.

    Raises:
        SystemExit: what there is does not fit into the parts; nothing is left.
    """
    if given.out.exists():
        raise SystemExit(f"{given.out} exists: remove it, or choose another folder.")
    server: list[Path | None] = list(given.server) or [None]
    room = [given.limit * MIB - (size_of(x) if x else 0) for x in server]
    if min(room) < 0:
        raise SystemExit(
            f"{server[room.index(min(room))]} is larger than a part of {given.limit} MiB: "
            "split it, or give a larger --limit."
        )
    with tempfile.TemporaryDirectory() as scratch:
        content, archive = Path(scratch) / "content", Path(scratch) / ARCHIVE
        content.mkdir()
        make_content(content, given)
        with tarfile.open(archive, "w:xz", preset=6) as made:
            made.add(content, ".")
        if archive.stat().st_size > sum(room):
            raise SystemExit(
                f"{archive.stat().st_size / MIB:.0f} MiB of ours do not fit into the "
                f"{sum(room) / MIB:.0f} that {len(server)} parts of {given.limit} MiB leave: "
                "give fewer --blocks, or a smaller --vocabulary."
            )
        return list(write_parts(given.out, server, room, archive))


def write_parts(
    out: Path, server: Sequence[Path | None], room: Sequence[int], archive: Path
) -> Iterator[Path]:
    """Copy the server's folders and fill each up with a piece of the archive."""
    whole = hashlib.sha256(archive.read_bytes()).hexdigest()
    with archive.open("rb") as source:
        for number, (files, size) in enumerate(zip(server, room, strict=True), start=1):
            part = out / str(number)
            shutil.copytree(files, part) if files else part.mkdir(parents=True)
            (part / f"{ARCHIVE}.{number}").write_bytes(source.read(size))
            (part / f"{ARCHIVE}.sha256").write_text(whole)
            yield part


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def unpack(parts: Sequence[Path], target: Path) -> str:
    """Put our files under `target`; returns the next command.

    Raises:
        SystemExit: a part is missing, or a transfer broke one.
    """
    pieces = [piece for part in parts for piece in part.glob(f"{ARCHIVE}.[0-9]*")]
    pieces.sort(key=lambda piece: int(piece.suffix[1:]))
    data = b"".join(piece.read_bytes() for piece in pieces)
    wanted = {x.read_text() for part in parts for x in part.glob(f"{ARCHIVE}.sha256")}
    if wanted != {hashlib.sha256(data).hexdigest()}:
        raise SystemExit("A part is missing or damaged: give all of them, in one kit.")
    target.mkdir(parents=True, exist_ok=True)
    archive = target / ARCHIVE
    archive.write_bytes(data)
    with tarfile.open(archive) as packed:
        packed.extractall(target, filter="data")
    archive.unlink()
    named = {file.stem: file for file in target.iterdir()}
    files = " ".join(f"--{x} {named[x]}" for x in ("model", "checkpoint", "text", "calibration"))
    loss = json.loads((target / "cpu.json").read_text())["loss"]
    return f"python -m benchmarks.gpu.first {files}\n# loss on the CPU: {loss:.4f}"


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.kit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build")
    make.add_argument("out", type=Path)
    for name in ("model", "calibration", "text"):
        make.add_argument(f"--{name}", type=Path, required=True)
    make.add_argument("--blocks", type=int, default=5, help="of the model, from the first")
    make.add_argument("--vocabulary", type=int, default=16384, help="tokens of it, from the first")
    make.add_argument("--server", type=Path, nargs="+", default=[], help="a folder for each part")
    make.add_argument("--limit", type=int, default=60, help="MiB of a part")
    take = commands.add_parser("unpack")
    take.add_argument("parts", type=Path, nargs="+")
    take.add_argument("--to", type=Path, required=True)
    given = parser.parse_args(arguments)
    if given.command == "unpack":
        print(unpack(given.parts, given.to))
        return
    from mergequant.errors import InputError  # what unpacks has no mergequant

    try:
        parts = build(given)
    except (InputError, FileNotFoundError) as error:
        raise SystemExit(f"No kit was made: {error}") from error
    for part in parts:
        print(f"{part}: {size_of(part) / MIB:.1f} MiB")


if __name__ == "__main__":
    main()
