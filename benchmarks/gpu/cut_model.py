"""A 16-bit model made small enough to be brought anywhere: fewer blocks, fewer tokens."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TOKENIZER = "tokenizer.json"


def cut_model(model: Path, folder: Path, blocks: int, vocabulary: int) -> None:
    """Write the first blocks of a model, with the first tokens of its vocabulary, as a model.

    Args:
        model: folder of a 16-bit model.
        folder: to make.
        blocks: how many.
        vocabulary: how many tokens at most. Text is then cut into shorter ones, which the model
            knows as well.

    Raises:
        SystemExit: the model has fewer blocks, or its tokenizer cannot be cut; nothing is left.
    """
    from safetensors.torch import save_file

    from mergequant.quantizer.prepare import open_folder

    reader, architecture = open_folder(model)
    count, tokens = (int(reader.config[x]) for x in ("num_hidden_layers", "vocab_size"))
    if not 0 < blocks <= count:
        raise SystemExit(f"{model} has {count} blocks: give --blocks of 1 to {count}.")
    kept = min(vocabulary, tokens)
    tokenizer = json.loads((model / _TOKENIZER).read_text())
    if kept < tokens:
        tokenizer = cut_tokenizer(tokenizer, kept)
    config = {**reader.config, "num_hidden_layers": blocks, "vocab_size": kept}
    if config.get("layer_types"):  # an entry for each block
        config["layer_types"] = config["layer_types"][:blocks]
    left_out = tuple(f"{architecture.block.format(block=x)}." for x in range(blocks, count))
    names = [name for name in reader.headers if not name.startswith(left_out)]
    tensors = {name: reader.read(name) for name in names}
    for linear in (architecture.embedding, architecture.head):  # each has a row for each token
        if (name := f"{linear.name}.weight") in tensors:
            tensors[name] = tensors[name][:kept].clone()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for file in sorted(model.glob("*token*.json")):
        shutil.copy(file, folder)
    (folder / _TOKENIZER).write_text(json.dumps(tokenizer, ensure_ascii=False))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def cut_tokenizer(tokenizer: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Keep the first tokens of a byte-pair encoding, and the merges that make them.

    Args:
        tokenizer: content of a `tokenizer.json`.
        tokens: how many.

    Raises:
        SystemExit: it is no byte-pair encoding, or what must stay has larger numbers.
    """
    described = tokenizer["model"]
    if described.get("type") != "BPE":
        raise SystemExit(f"A {described.get('type')} tokenizer cannot be cut: leave --vocabulary.")
    vocabulary: dict[str, int] = described["vocab"]
    needed = [number for token, number in vocabulary.items() if len(token) == 1]
    needed += [added["id"] for added in tokenizer.get("added_tokens", ())]
    if max(needed, default=0) >= tokens:
        raise SystemExit(
            f"The tokenizer's characters and special tokens go up to number {max(needed)}: "
            f"give --vocabulary of at least {max(needed) + 1}."
        )
    kept = {token: number for token, number in vocabulary.items() if number < tokens}
    merges = [pair for pair in described["merges"] if _stays(pair, kept)]
    return {**tokenizer, "model": {**described, "vocab": kept, "merges": merges}}


def _stays(pair: str | list[str], kept: Mapping[str, int]) -> bool:
    """Whether both tokens of a merge are kept, and what it makes of them."""
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return left in kept and right in kept and left + right in kept
