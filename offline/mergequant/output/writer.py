"""The checkpoint's folder, written block by block: it can be killed and continued."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mergequant.errors import DiskError, InputError
from mergequant.model.reader import CONFIG, ModelReader
from mergequant.model.weight_files import INDEX, read_header
from mergequant.output.companions import README, copied_code, copy_companions
from mergequant.output.durable_files import write_durably, write_json, writing
from mergequant.output.fingerprint import Fingerprint
from mergequant.output.model_card import CalibrationLoss, model_card
from mergequant.output.run_figures import CARD_FOLDER, draw_for_card
from mergequant.output.unfinished_run import FOLDER, UnfinishedRun
from mergequant.recipe import FILE as RECIPE
from mergequant_vllm.format import StoredTensor, parse

REPORT = "quantization_report.jsonl"

logger = logging.getLogger("mergequant")


class Writer:
    """A checkpoint in the making, in a hidden folder of its own; it comes out whole or not at all.

    A folder inside the output works where that is a mount or a link; `config.json` comes out last.
    Use as a context manager: if no block is finished when it is left, or an InputError ends a run
    that continued none, all that was made is removed; else the finished blocks are kept, and
    `begin` with the same fingerprint finds them.

    Attributes:
        finished: how many blocks, from the first, need not be made; 0 before `begin`.
    """

    def __init__(self, output: Path, shards: int) -> None:
        self.output = output
        self.finished = 0
        self._unfinished = UnfinishedRun(output, shards)
        self._made: list[Path] = []
        self._begun = False
        self._complete = False
        if output.exists() and not output.is_dir():
            raise InputError(f"Output {output} is a file: choose another name.")
        self._refuse_files()

    def _refuse_files(self) -> None:
        if self.output.is_dir():
            own = {FOLDER, *self._unfinished.published()}
            if any(path.name not in own for path in self.output.iterdir()):
                raise InputError(
                    f"Output folder {self.output} is not empty: choose another or remove it."
                )

    def __enter__(self) -> "Writer":
        self._made = [path for path in (self.output, *self.output.parents) if not path.exists()]
        try:
            self._unfinished.acquire()
        except OSError as error:
            self._remove_made()
            raise InputError(
                f"{self.output} cannot be written ({error}): choose another."
            ) from error
        try:
            self._refuse_files()  # another run may have ended since
        except InputError:
            self._leave()
            raise
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        at_fault = isinstance(error, InputError) and not isinstance(error, DiskError)
        if at_fault and self._begun and not self.finished:
            self._unfinished.discard()  # the same input would end there again
        finished = self._leave()
        if finished and not at_fault:
            logger.warning(
                "%d of %d blocks are finished: run the same command again to continue, or remove "
                "%s to give up.",
                finished,
                self._unfinished.shards - 1,
                self._unfinished.folder,
            )

    def _leave(self) -> int:
        """Clean up what holds no finished block; returns how many blocks are left there."""
        left = 0 if self._complete else self._unfinished.finished()
        if not left:
            self._unfinished.remove()
            self._remove_made()
        self._unfinished.release()
        return left

    def _remove_made(self) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def begin(self, fingerprint: Fingerprint) -> None:
        """Continue the run of this fingerprint that the output holds, or begin it.

        Raises:
            InputError: the output holds finished blocks of a run that was begun otherwise.
        """
        self._unfinished.refuse_another(fingerprint)
        self._unfinished.take_back()
        self.finished = self._unfinished.resume(fingerprint)
        self._begun = True

    def decision(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `remember` kept; empty if nothing was decided yet."""
        return self._unfinished.decision()

    def remember(self, decision: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep what was decided before the first block for a run that continues this one."""
        self._unfinished.remember(decision, tensors)

    def write_block(
        self, number: int, tensors: Mapping[str, Tensor], report: Sequence[dict[str, Any]]
    ) -> None:
        """Write block `number`, counted from 0, and its lines of the report: it is finished."""
        self.write_shard(number, tensors)
        self._unfinished.write_record(number, report)

    def read_block(self, number: int) -> dict[str, Tensor]:
        """The tensors of finished block `number`, by full name."""
        return load_file(self._unfinished.shard(number))

    def write_shard(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write shard `number`, counted from 0, atomically."""
        whole = dict(_in_memory_of_their_own(tensors))

        def write(path: Path) -> None:
            save_file(whole, path, metadata={"format": "pt"})
            path.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read

        write_durably(self._unfinished.shard(number), write)

    def headers(self) -> dict[str, StoredTensor]:
        """Shape and dtype of each tensor that was written, as the files of all shards say."""
        return {name: entry for file in self._shards() for name, entry in read_header(file).items()}

    def _shards(self) -> list[Path]:
        return [self._unfinished.shard(number) for number in range(self._unfinished.shards)]

    def finish(
        self,
        source: ModelReader,
        quantization_config: Mapping[str, Any],
        recipe: str = "",
        seen: CalibrationLoss | None = None,
        *,
        code: bool = False,
    ) -> None:
        """Write the report, index and config, copy the tokenizer, and move all into place.

        Args:
            source: the model as it was quantized; what it says of itself is copied.
            quantization_config: the contract.
            recipe: YAML of the options.
            seen: loss on calibration text, if it was measured.
            code: copy the source's `*.py` along.
        """
        with writing(self.output):
            self._finish(source, quantization_config, recipe, seen, code)
        self._complete = True

    def _finish(
        self,
        source: ModelReader,
        quantization_config: Mapping[str, Any],
        recipe: str,
        seen: CalibrationLoss | None,
        code: bool,
    ) -> None:
        folder = self._unfinished.folder
        records = (self._unfinished.record(number) for number in range(self._unfinished.shards - 1))
        lines = [line for record in records for line in record.report]
        (folder / REPORT).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        write_json(folder / INDEX, _index(self._shards()))
        copied = list(copy_companions(source.folder, folder, code=code))
        (folder / RECIPE).write_text(recipe)
        figures = draw_for_card(lines, folder)
        contract, programs = parse(quantization_config), copied_code(folder)
        card = model_card(source.folder, contract, seen, figures, programs)
        (folder / README).write_text(card)
        write_json(folder / CONFIG, {**source.config, "quantization_config": quantization_config})
        # config.json makes the folder look finished: it is the last.
        shards = [file.name for file in self._shards()]
        drawn = [CARD_FOLDER] if figures else []
        self._unfinished.publish([*shards, REPORT, INDEX, *copied, *drawn, RECIPE, README, CONFIG])


def _in_memory_of_their_own(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Contiguous, on the CPU; linears behind one norm may share tensors, safetensors may not."""
    memories = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        memory = whole.untyped_storage().data_ptr()
        yield name, whole.clone() if memory in memories else whole
        memories.add(memory)


def _index(shards: Sequence[Path]) -> dict[str, Any]:
    """Content of `model.safetensors.index.json`, as the files' headers say."""
    weight_map = {name: file.name for file in shards for name in read_header(file)}
    size = 0
    for file in shards:
        with file.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        size += file.stat().st_size - 8 - header
    return {"metadata": {"total_size": size}, "weight_map": weight_map}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
