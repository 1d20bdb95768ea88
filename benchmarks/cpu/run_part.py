"""Each part from its options to its files, in a process whose environment is prepared."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.common.record import save
from benchmarks.cpu import instruction_sets, machine
from benchmarks.cpu.linear import forms
from benchmarks.cpu.linear import measure as linear
from benchmarks.cpu.linear import table as linear_table
from benchmarks.cpu.linear.limits import Limits
from benchmarks.cpu.serve.variants import OURS

AMX_OFF = "-noamx"


def instruction_set_name(isa: str | None, kernel: str = "cpu-int4") -> str:
    """The instruction set that our kernels run; PyTorch's, in small letters, for other kernels.

    Raises:
        ValueError: our kernels do not run here; says why.
    """
    from mergequant_vllm.kernels import native_library as native

    if kernel != "cpu-int4":
        return isa or torch.backends.cpu.get_cpu_capability().lower()
    reason = native.refusal()
    if reason is not None:
        raise ValueError(f"The native kernels do not run here: {reason}.")
    return native.isa_name()


def file_name(part: str, isa: str, threads: int, *, amx: bool) -> str:
    """Name of a result's file, such as `linear-avx2-2t`."""
    return f"{part}-{isa}{'' if amx else AMX_OFF}-{threads}t"


def run_linear(options: argparse.Namespace, threads: int, command: str) -> None:
    """Part `linear`; what is measured so far is written after each shape."""
    isa, amx = instruction_set_name(options.isa, options.kernel), not options.no_amx
    instruction_sets.hide_newer(isa, amx=amx)
    torch.set_num_threads(threads)
    where, cache = machine.where(isa, threads, amx=amx), machine.cache_bytes()

    def progress(limits: Limits, rows: Sequence[Mapping[str, Any]]) -> None:
        text = linear_table.table(options.kernel, isa, limits, cache, rows)
        name = file_name("linear", isa, threads, amx=amx)
        records = [{"limits": vars(limits)}, *map(dict, rows)]
        save(name, command, records, text, where, options.results)
        print(linear_table.lines_of(rows[-len(options.tokens) :]), flush=True)

    with torch.no_grad():
        linear.run(linear.plan_of(options), isa, progress)
    print(f"{options.results / file_name('linear', isa, threads, amx=amx)}.md")


def run_forms(options: argparse.Namespace, threads: int, command: str) -> None:
    """Part `forms`; what is measured so far is written after each shape."""
    isa, amx = instruction_set_name(options.isa, options.kernel), not options.no_amx
    torch.set_num_threads(threads)
    where = machine.where(isa, threads, amx=amx)
    name = file_name("forms", isa, threads, amx=amx)

    def progress(rows: Sequence[Mapping[str, Any]]) -> None:
        text = forms.table(options.kernel, rows)
        save(name, command, list(map(dict, rows)), text, where, options.results)
        print(f"  {rows[-1]['title']} is measured", flush=True)

    with torch.no_grad():
        forms.run(linear.plan_of(options), progress)
    print(f"{options.results / name}.md")


def run_serve(options: argparse.Namespace, threads: int, command: str) -> None:
    """Part `serve`."""
    from benchmarks.cpu.serve import measure as serve
    from benchmarks.cpu.serve import table as serve_table

    isa, amx = instruction_set_name(options.isa), not options.no_amx
    where = machine.where(isa, threads, amx=amx)
    suffix = serve.ours_of(serve.variants_of(options)).removeprefix(OURS)
    name = file_name(f"serve{suffix}", isa, threads, amx=amx)
    log = options.results / "logs"

    def progress(rows: Sequence[Mapping[str, Any]]) -> None:
        text = serve_table.table(rows, options)
        save(name, command, list(map(dict, rows)), text, where, options.results)

    serve.run(options, isa, threads, log, progress)
    print(f"{options.results / name}.md")


def run_profile(options: argparse.Namespace, threads: int, command: str) -> None:
    """Part `profile`."""
    from benchmarks.cpu.profile import measure as profile
    from benchmarks.cpu.profile import table as profile_table

    isa, amx = instruction_set_name(options.isa), not options.no_amx
    instruction_sets.hide_newer(isa, amx=amx)
    where = machine.where(isa, threads, amx=amx)
    rows = profile.run(options)
    text = profile_table.table(rows)
    save(file_name("profile", isa, threads, amx=amx), command, rows, text, where, options.results)
    print(text)


def run_start(options: argparse.Namespace, threads: int, command: str) -> None:
    """Part `start`."""
    from benchmarks.cpu.start import measure as start
    from benchmarks.cpu.start import table as start_table

    isa, amx = instruction_set_name(options.isa), not options.no_amx
    where = machine.where(isa, threads, amx=amx)
    name = file_name("start", isa, threads, amx=amx)
    what = options.checkpoint.name if options.checkpoint else f"{options.model} at random"

    def progress(rows: Sequence[Mapping[str, Any]]) -> None:
        text = start_table.table(what, start.CACHE_GIBIBYTES, rows)
        save(name, command, list(map(dict, rows)), text, where, options.results)

    start.run(options, progress)
    print(f"{options.results / name}.md")


PARTS: dict[str, Callable[[argparse.Namespace, int, str], None]] = {
    "linear": run_linear,
    "forms": run_forms,
    "serve": run_serve,
    "profile": run_profile,
    "start": run_start,
}
