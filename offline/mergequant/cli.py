"""The command `mergequant`: arguments to options, results to text or JSON, faults to a sentence."""

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from mergequant.errors import InputError

app = typer.Typer(
    help="INT4 weights and static per-channel INT4 activations for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _every_command() -> None:
    """INT4 weights and static per-channel INT4 activations for vLLM."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("mergequant").setLevel(logging.INFO)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the 16-bit model.")],
    output: Annotated[
        Path, typer.Argument(help="Folder to make, or one whose run was interrupted.")
    ],
    calibration: Annotated[
        list[str],
        typer.Option(help="Text: .txt, .jsonl with 'text', or a data set's name. Repeatable."),
    ],
    activations: Annotated[
        str, typer.Option(help="static (steps folded into the norms) or dynamic (baseline).")
    ] = "static",
    rotation: Annotated[str, typer.Option(help="none, offline or online.")] = "none",
    hadamard_block: Annotated[
        int, typer.Option(help="Largest block of the online rotation.")
    ] = 128,
    static_bits: Annotated[int, typer.Option(help="Bits of norm-fed activations: 4 or 8.")] = 4,
    dynamic_bits: Annotated[int, typer.Option(help="Bits of o's and down's: 4 or 8.")] = 4,
    reconstruction: Annotated[str, typer.Option(help="none, prune or pad.")] = "none",
    alpha: Annotated[float, typer.Option(help="Threshold of a strong channel (Eq. 6).")] = 5.0,
    split_by: Annotated[str, typer.Option(help="step or folded.")] = "step",
    staggered: Annotated[bool, typer.Option(help="Copies round at different offsets.")] = False,
    max_extra_channels: Annotated[float, typer.Option(help="Growth allowed to pad.")] = 0.125,
    weights: Annotated[str, typer.Option(help="gptq or rtn (round to nearest).")] = "gptq",
    weight_bits: Annotated[int, typer.Option(help="3, 4 or 8.")] = 4,
    group_size: Annotated[int | None, typer.Option(help="Channels that share a step.")] = None,
    asymmetric: Annotated[bool, typer.Option(help="Weights with zero points.")] = False,
    weight_search: Annotated[str, typer.Option(help="Weight steps: minmax or mse.")] = "minmax",
    clipping: Annotated[str, typer.Option(help="none, channel or adaptive.")] = "adaptive",
    statistics_samples: Annotated[int, typer.Option(help="Windows for steps and clips.")] = 32,
    gptq_samples: Annotated[int, typer.Option(help="Windows for GPTQ.")] = 256,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    damping: Annotated[float, typer.Option(help="Fraction of the Hessian's diagonal.")] = 0.01,
    gptq_block: Annotated[int, typer.Option(help="Columns that GPTQ updates at once.")] = 128,
    lowest_clip: Annotated[float, typer.Option(help="Smallest clip ratio tried.")] = 0.4,
    clip_points: Annotated[int, typer.Option(help="Clip ratios tried.")] = 13,
    seed: Annotated[int, typer.Option(help="Picks the calibration windows.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Quantize a model; writes a folder that `vllm serve` takes as it is."""
    from mergequant.options import Options
    from mergequant.pipeline import quantize as run

    try:
        options = Options.model_validate(
            {
                "activations": activations,
                "rotation": rotation,
                "hadamard_block": hadamard_block,
                "static_bits": static_bits,
                "dynamic_bits": dynamic_bits,
                "reconstruction": reconstruction,
                "alpha": alpha,
                "split_by": split_by,
                "staggered": staggered,
                "max_extra_channels": max_extra_channels,
                "weights": weights,
                "weight_bits": weight_bits,
                "group_size": group_size,
                "asymmetric": asymmetric,
                "weight_search": weight_search,
                "clipping": clipping,
                "statistics_samples": statistics_samples,
                "gptq_samples": gptq_samples,
                "sequence_length": sequence_length,
                "damping": damping,
                "gptq_block": gptq_block,
                "lowest_clip": lowest_clip,
                "clip_points": clip_points,
                "seed": seed,
                "device": device,
            }
        )
    except ValidationError as error:
        fault = error.errors()[0]
        option = "--" + str(fault["loc"][0]).replace("_", "-")
        raise InputError(f"{option} is wrong: {fault['msg']}.") from error
    run(model, output, calibration, options, progress=not quiet)
    typer.echo(f"{output} is ready: vllm serve {output}")


@app.command()
def perplexity(
    model: Annotated[str, typer.Argument(help="Folder or hub id, 16-bit or quantized.")],
    text: Annotated[str, typer.Option(help="Text: .txt, .jsonl, or a data set's name.")],
    engine: Annotated[str, typer.Option(help="vllm, or transformers: the reference.")] = "vllm",
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Use only the first so many.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    tensor_parallel_size: Annotated[int, typer.Option(help="Ranks.")] = 1,
    enforce_eager: Annotated[bool, typer.Option(help="vLLM without torch.compile.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity on a text, in windows that do not overlap, as published numbers take it."""
    _one_of("--engine", engine, ("vllm", "transformers"))
    _one_of("--dtype", dtype, ("float32", "bfloat16", "float16"))
    from transformers.utils.logging import disable_progress_bar

    from mergequant.evaluate import perplexity as run

    disable_progress_bar()  # ours says more
    result = run(
        model,
        text,
        engine=engine,  # type: ignore[arg-type]  # checked above
        window=window,
        most_windows=windows,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        enforce_eager=enforce_eager,
        progress=not as_json,
    )
    if as_json:
        _print_json(result.as_dict())
    else:
        typer.echo(
            f"perplexity {result.perplexity:.4f} (loss {result.loss:.4f} nats a token; "
            f"{result.windows} windows of {result.window_length} tokens; {result.engine})"
        )


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of a checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a checkpoint stores, linear by linear."""
    from mergequant.summary import as_table, inspect_checkpoint

    summary = inspect_checkpoint(checkpoint)
    if as_json:
        _print_json(summary.as_dict())
    else:
        typer.echo(as_table(summary))


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{option} {value!r} is unknown: choose one of {', '.join(known)}.")


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2))


def main() -> None:
    """Entry point: an error of the user's input is one sentence and exit status 1."""
    # Before torch loads OpenMP: threads that spin at every barrier make calibration ten times
    # slower as soon as another process wants a core; sleeping ones cost nothing measurable.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # As Ctrl-C does: leave through the context managers, which keep whole blocks and nothing else.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except ValueError as error:
        from mergequant_vllm.format import FormatError

        if not isinstance(error, InputError | FormatError):
            raise
        sys.exit(f"mergequant: {error}")


if __name__ == "__main__":
    main()
