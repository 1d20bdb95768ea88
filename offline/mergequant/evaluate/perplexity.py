"""Perplexity as published numbers take it, through vLLM or through the reference forward."""

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mergequant.calibration.sources import read_source
from mergequant.calibration.text import evaluation_windows, window_length
from mergequant.calibration.tokenizer import load_tokenizer, refuse_unknown_tokens
from mergequant.errors import InputError
from mergequant.evaluate.reference_forward import default_device, load_model
from mergequant.model.reader import Reader, is_mergequant, locate
from mergequant.model.settled_config import for_generation
from mergequant.model.shapes import widths
from mergequant_vllm.format import check_tensors, parse

Engine = Literal["vllm", "transformers"]
ENGINES: tuple[str, ...] = get_args(Engine)
DTYPES = ("float32", "bfloat16", "float16")
PUBLISHED_WINDOW = 2048
_TOKENS_A_BATCH = 4096
_STOP_SECONDS = 60.0  # vLLM's own limit of 5 kills an engine that ends slowly on a busy CPU
_NO_VLLM = (
    'Engine vllm is not installed: pip install "mergequant-vllm[cuda]" or [cpu], '
    "or use --engine transformers."
)


@dataclass(frozen=True)
class Perplexity:
    """Result of an evaluation.

    Attributes:
        loss: mean negative log-probability of a token, nats.
        perplexity: exp(loss).
        tokens: predicted tokens (each window's first is not).
    """

    perplexity: float
    loss: float
    tokens: int
    windows: int
    window_length: int
    engine: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


def perplexity(
    model: str | Path,
    text: str | Path,
    *,
    engine: Engine = "vllm",
    window: int = PUBLISHED_WINDOW,
    most_windows: int | None = None,
    dtype: str = "float32",
    tensor_parallel_size: int = 1,
    enforce_eager: bool = True,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of a 16-bit or mergequant model on a text.

    Args:
        model: folder or hub id.
        text: file or data set, see `mergequant.calibration.sources.read_source`.
        engine: `vllm` serves the model; `transformers` is the reference forward.
        window: tokens in a window; windows do not overlap, the tail is dropped.
        most_windows: use only the first so many.
        dtype: of everything that is not quantized.
        tensor_parallel_size: ranks; the reference forward reproduces their arithmetic.
        trust_remote_code: run code of the model's own that its tokenizer names.
    """
    refuse_unknown(engine, dtype)
    refuse_no_window(window, most_windows)
    reader = Reader(locate(model))
    folder = reader.folder
    if is_mergequant(reader.config):
        check_tensors(parse(reader.config["quantization_config"]), reader.headers)
    length = window_length(window, reader.config.get("max_position_embeddings"))
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    windows = text_windows(text, tokenizer, length, most_windows)
    refuse_unknown_tokens(windows, tokenizer, widths(reader.config)["vocabulary"])
    if engine == "vllm":
        with vllm_engine(
            folder,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            enforce_eager=enforce_eager,
            trust_remote_code=trust_remote_code,
            max_model_len=length + 1,
        ) as llm:
            logprobs = prompt_logprobs(llm, windows, progress)
    else:
        device = default_device()
        reference = load_model(folder, getattr(torch, dtype), tensor_parallel_size).to(device)
        logprobs = reference_logprobs(reference, windows.to(device), progress)
    loss = -float(logprobs.mean())
    return Perplexity(perplexity_of(loss), loss, logprobs.numel(), len(windows), length, engine)


def perplexity_of(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def refuse_unknown(engine: str, dtype: str) -> None:
    """Raise InputError unless there is such an engine and such a dtype."""
    for option, value, known in (("--engine", engine, ENGINES), ("--dtype", dtype, DTYPES)):
        if value not in known:
            raise InputError(f"{option} {value!r} is unknown: choose one of {', '.join(known)}.")


def refuse_no_window(window: int, most_windows: int | None) -> None:
    """Raise InputError unless windows of so many tokens, at most so many, predict a token."""
    if window < 2 or (most_windows is not None and most_windows < 1):
        raise InputError("A window needs 2 tokens and at least one window: raise --window(s).")


def text_windows(
    text: str | Path, tokenizer: PreTrainedTokenizerBase, length: int, most_windows: int | None
) -> Tensor:
    """A text as it is evaluated, a data set by its split `test`: token ids int64 [*, length]."""
    source = read_source(str(text), default_split="test")
    return evaluation_windows(source, tokenizer, length)[:most_windows]


def reference_logprobs(model: Any, windows: Tensor, progress: bool = False) -> Tensor:
    """Log-probability of each token of each window but the first: float64 [windows, length - 1]."""
    rows = []
    with tqdm(total=len(windows), desc="Perplexity", unit="window", disable=not progress) as bar:
        for batch in torch.split(windows, max(1, _TOKENS_A_BATCH // windows.shape[1])):
            rows.append(token_logprobs(reference_logits(model, batch), batch))
            bar.update(len(batch))
    return torch.cat(rows)


def reference_logits(model: Any, windows: Tensor) -> Tensor:
    """Token ids [windows, length] to float32 [windows, length, vocabulary]."""
    with torch.no_grad():
        logits: Tensor = model(windows, use_cache=False).logits
    return logits.to(torch.float32)


def token_logprobs(logits: Tensor, windows: Tensor) -> Tensor:
    """[windows, length, vocabulary] and [windows, length] to float64 [windows, length - 1]."""
    rows = []
    for window, scores in zip(windows, logits, strict=True):  # one at a time: vocabularies are wide
        own = scores[:-1].to(torch.float64).log_softmax(dim=-1)
        rows.append(own.gather(1, window[1:, None])[:, 0])
    return torch.stack(rows)


def require_vllm() -> None:
    """Raise InputError unless vLLM is installed; it is not imported, which takes seconds."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError(_NO_VLLM)


def vllm_engine(folder: Path, **arguments: Any) -> AbstractContextManager[Any]:
    """A context around an `LLM`, which is started at once and shut down when the context ends."""
    with _environment(_settings(folder, arguments)):
        try:
            from vllm import LLM
        except ImportError as error:
            raise InputError(_NO_VLLM) from error
        needed = for_generation(Reader(folder).config)
        return _closing(LLM(model=str(folder), hf_overrides=needed, **arguments))


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set those of `variables` that are not set, and unset them at the end."""
    missing = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _settings(folder: Path, arguments: dict[str, Any]) -> dict[str, str]:
    """Variables that vLLM reads as it starts an engine, for this model and context."""
    return {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for results
        "VLLM_CPU_KVCACHE_SPACE": str(_cache_gibibytes(folder, arguments)),
        # A window as long as the context needs room for the token that vLLM insists on generating.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    }


def _cache_gibibytes(folder: Path, arguments: dict[str, Any]) -> int:
    """KV cache for one full window in float32, with room to spare; whole GiB, as vLLM reads."""
    config = Reader(folder).config
    tokens = int(arguments.get("max_model_len") or config.get("max_position_embeddings") or 2048)
    per_token = 2 * 4 * int(config["num_hidden_layers"]) * widths(config)["keys"]
    return max(1, math.ceil(1.5 * tokens * per_token / 2**30))


@contextmanager
def _closing(llm: Any) -> Iterator[Any]:
    try:
        yield llm
    finally:
        _stop(llm.llm_engine.engine_core)


def _stop(core: Any) -> None:
    """Shut an engine's processes down and join the thread that receives their outputs.

    The thread frees the tensors of its last message as it ends. PyTorch takes the GIL for that in a
    destructor; were the interpreter finalizing, Python would end the thread there, which C++
    answers with std::terminate: an abort after the results are printed.
    """
    core.shutdown(timeout=_STOP_SECONDS)
    receiver = getattr(core, "output_queue_thread", None)  # an engine in this process has none
    if receiver is not None:
        receiver.join(_STOP_SECONDS)


def prompt_logprobs(llm: Any, windows: Tensor, progress: bool = False) -> Tensor:
    """Log-probability that a running `LLM` gives each token but the first of each window."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in windows.tolist()],
        SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0),
        use_tqdm=progress,
    )
    return torch.tensor([list(_own_logprobs(output)) for output in outputs], dtype=torch.float64)


def _own_logprobs(output: Any) -> Iterator[float]:
    """vLLM gives for each position the prompt token's own log-probability, None for the first."""
    for token, scores in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
        if scores is not None:
            yield scores[token].logprob
