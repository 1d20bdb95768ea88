"""The command `mergequant`: arguments to options, results to text or JSON, faults to a sentence."""

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mergequant.cli_flags import BASE_FLAGS, at_price, over_recipe, with_option_flags
from mergequant.errors import InputError

app = typer.Typer(
    help="INT4 weights and static per-channel INT4 activations for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that the model brings."),
]


@app.callback()
def _every_command() -> None:
    """INT4 weights and static per-channel INT4 activations for vLLM."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("mergequant").setLevel(logging.INFO)


@app.command()
@with_option_flags()
def quantize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or hub id of the 16-bit model.")],
    output: Annotated[
        Path, typer.Argument(help="Folder to make, or one whose run was interrupted.")
    ],
    calibration: Annotated[
        list[str],
        typer.Option(
            help="Text: .txt, .jsonl, .csv, .parquet, rows with 'text' or 'messages', a data set's "
            "name. Repeatable."
        ),
    ],
    fast: Annotated[bool, typer.Option("--fast", help="Nothing is trained.")] = False,
    best: Annotated[
        bool, typer.Option("--best", help="8 bits where they save most: 5 on average.")
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="w4a4, w4a8, w8a8, w8a8_static, w3a4 or a YAML file; other flags count over it."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    trust_remote_code: Trust = False,
    no_sample: Annotated[bool, typer.Option("--no-sample", help="Ask it nothing at the end.")] = (
        False
    ),
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
    **flags: Any,
) -> None:
    """Quantize a model; writes a folder that `vllm serve` takes as it is."""
    options = at_price(over_recipe(context, flags, recipe), fast=fast, best=best)
    from mergequant.model.reader import at_revision
    from mergequant.quantizer.run import quantize as run

    model = at_revision(model, revision)
    progress, code = not quiet, trust_remote_code
    run(model, output, calibration, options, progress=progress, trust_remote_code=code)
    from mergequant.evaluate.checkpoint_contents import sizes

    typer.echo(f"{output} is ready: {sizes(output, model)}.")
    trust = " --trust-remote-code" if any(output.rglob("*.py")) else ""
    typer.echo(f"Serve it: vllm serve {output}{trust}")
    typer.echo(f"Measure what is left: mergequant evaluate {model} {output} --text FILE")
    if not no_sample:
        _echo_sample(output, code)


def _echo_sample(output: Path, trust_remote_code: bool) -> None:
    """Print what the checkpoint says to a question, if there is memory for the whole model."""
    from mergequant.evaluate.sample import sample, sample_bytes
    from mergequant.quantizer.memory.available import free_host_bytes

    free = free_host_bytes()
    try:
        if free is None or sample_bytes(output) > free:
            return
        asked, said = sample(output, trust_remote_code=trust_remote_code)
    except Exception as error:  # the checkpoint is there: whatever this is, the run did not fail
        typer.echo(f"It was not asked anything ({type(error).__name__}: {error}).", err=True)
        return
    typer.echo(f"Asked {asked!r}, it answers {said!r}.")


@app.command()
def perplexity(
    model: Annotated[str, typer.Argument(help="Folder or hub id, 16-bit or quantized.")],
    text: Annotated[
        str, typer.Option(help="Text: a file as for --calibration, or a data set's name.")
    ],
    engine: Annotated[str, typer.Option(help="vllm, or transformers: the reference.")] = "vllm",
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Use only the first so many.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    tensor_parallel_size: Annotated[int, typer.Option(help="Ranks.")] = 1,
    enforce_eager: Annotated[bool, typer.Option(help="vLLM without torch.compile.")] = True,
    trust_remote_code: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity on a text, in windows that do not overlap, as published numbers take it."""
    from transformers.utils.logging import disable_progress_bar

    from mergequant.evaluate.perplexity import perplexity as run

    disable_progress_bar()  # ours says more
    result = run(
        model,
        text,
        engine=engine,  # type: ignore[arg-type]  # it checks
        window=window,
        most_windows=windows,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        enforce_eager=enforce_eager,
        trust_remote_code=trust_remote_code,
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
def evaluate(
    base: Annotated[str, typer.Argument(help="Folder or hub id of the 16-bit model.")],
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of what was made of it.")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text for perplexity, as for --calibration. Repeatable."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks: piqa,arc_easy,...")] = "",
    task_folder: Annotated[Path | None, typer.Option(help="Folder of task files.")] = None,
    engine: Annotated[str, typer.Option(help="vllm, or transformers: the reference.")] = "vllm",
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Use only the first so many.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    at_least: Annotated[
        float | None, typer.Option(help="Fail unless so much is left of every figure: 0.95.")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How much of a model is left: both measured alike, and written into the model card."""
    from mergequant.evaluate.compare import compare, refuse_below, refuse_no_fraction
    from mergequant.output.model_card import evaluation_table

    refuse_no_fraction(at_least)
    figures = compare(
        base,
        checkpoint,
        text or (),
        tasks=[task for task in tasks.split(",") if task],
        task_folder=task_folder,
        engine=engine,  # type: ignore[arg-type]  # it checks
        window=window,
        most_windows=windows,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        progress=not as_json,
    )
    if as_json:
        typer.echo(json.dumps([figure.as_json() for figure in figures], indent=2))
    else:
        typer.echo(evaluation_table([figure.as_row() for figure in figures]))
    if at_least is not None:
        refuse_below(figures, at_least)


@app.command()
@with_option_flags(*BASE_FLAGS)
def ablate(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the 16-bit model.")],
    output: Annotated[
        Path, typer.Argument(help="Folder for tables and plots; or one to be continued.")
    ],
    calibration: Annotated[list[str], typer.Option(help="Text to calibrate on. Repeatable.")],
    text: Annotated[list[str], typer.Option(help="Text to evaluate on. Repeatable.")],
    paper: Annotated[
        list[str] | None,
        typer.Option(help="table1, table4, table5, table7 (all these), outliertune."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks: piqa,arc_easy,...")] = "",
    task_folder: Annotated[Path | None, typer.Option(help="Folder of task files.")] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Draw the paper's figures.")] = False,
    engine: Annotated[str, typer.Option(help="vllm, or transformers: the reference.")] = "vllm",
    window: Annotated[int, typer.Option(help="Tokens in an evaluation window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Use only the first so many.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep each row's checkpoint.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="Nothing is trained.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
    **flags: Any,
) -> None:
    """The paper's tables for a model: the method step by step, against its baselines."""
    base = at_price(flags, fast=fast, best=False)
    from mergequant.ablation import ablate as run

    ablation = run(
        model,
        output,
        calibration,
        text,
        paper=paper or (),
        tasks=[task for task in tasks.split(",") if task],
        task_folder=task_folder,
        plots=plots,
        engine=engine,
        window=window,
        most_windows=windows,
        base=base,
        keep=keep,
        progress=not quiet,
    )
    typer.echo(ablation.markdown)
    for key, reason in ablation.failed.items():
        typer.echo(f"{key} failed: {reason}", err=True)
    if ablation.failed:
        raise typer.Exit(1)


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of a checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a checkpoint stores, linear by linear."""
    from mergequant.evaluate.checkpoint_contents import as_table, inspect_checkpoint

    contents = inspect_checkpoint(checkpoint)
    if as_json:
        _print_json(contents.as_dict())
    else:
        typer.echo(as_table(contents))


@app.command()
def report(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of a checkpoint.")],
    page: Annotated[
        Path | None, typer.Option(help="File to write; by default report.html in the folder.")
    ] = None,
) -> None:
    """A page about the run: losses by layer, clip ratios, bits, time."""
    from mergequant.evaluate.report import write_report

    typer.echo(write_report(checkpoint, page))


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")],
    name: Annotated[str, typer.Argument(help="ORG/NAME on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="If it is made anew.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Upload a checkpoint to the Hugging Face hub."""
    from mergequant.output.push import files_to_push
    from mergequant.output.push import push as run

    if dry_run:
        for file in files_to_push(checkpoint):
            size = file.stat().st_size / 1e6
            typer.echo(f"{size:10.1f} MB  {file.relative_to(checkpoint)}")
        return
    typer.echo(run(checkpoint, name, private=private))


@app.command()
def architectures(
    model_type: Annotated[
        str | None, typer.Argument(help="As config.json names it; without: all in short.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Which model types are known, and how each of their linears will be served."""
    from mergequant.model.architectures import ARCHITECTURES, find
    from mergequant.model.overview import as_records, details, overview

    known = ARCHITECTURES if model_type is None else {model_type: find(model_type)}
    if as_json:
        _print_json(as_records(known))
    elif model_type is None:
        typer.echo(overview(known))
    else:
        typer.echo(details(known[model_type]))


@app.command()
def doctor() -> None:
    """Which kernels would serve a checkpoint here, and why."""
    from mergequant_vllm.doctor import report

    typer.echo(report())


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
