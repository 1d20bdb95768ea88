"""A model's head on one window: the loss of next tokens, some rows of the vocabulary at a time.

Logits of a window at once would be more than all else that is in memory: 2048 tokens of 152,000
rows are 1.2 GB.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mergequant.model.architecture import Architecture, factor

_ROWS = 8192  # of the head, in float32 at once


@dataclass(frozen=True)
class Head:
    """What a model makes of its last norm's output.

    Attributes:
        table: [vocabulary, n].
        bias: [vocabulary], or None.
        scale: of the logits.
        cap: c in c tanh(logits / c), or None.
    """

    table: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        config: Mapping[str, Any],
        table: Tensor,
        bias: Tensor | None,
    ) -> "Head":
        """The head of a model of this configuration."""
        scales = architecture.scales
        scale = factor(scales.logits_times, config) / factor(scales.logits, config)
        cap = None if scales.logits_cap is None else config.get(scales.logits_cap)
        return cls(table, bias, scale, cap)

    def logits(self, x: Tensor, rows: slice) -> Tensor:
        """Of `rows` of the vocabulary: float32 [t, n] to [t, rows]."""
        bias = None if self.bias is None else self.bias[rows].to(torch.float32)
        return self.scaled(F.linear(x, self.table[rows].to(torch.float32), bias))

    def scaled(self, products: Tensor) -> Tensor:
        """Logits of products with the table, biases added."""
        logits = products * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def next_token_losses(normed: Tensor, head: Head, ids: Tensor) -> Tensor:
    """-log p of each next token: float32 [t - 1].

    Args:
        normed: float32 [t, n], what the head reads.
        ids: int64 [t], the tokens.
    """
    x, following = normed[:-1], ids[1:]
    products = (x * head.table[following].to(torch.float32)).sum(dim=-1)
    if head.bias is not None:
        products = products + head.bias[following].to(torch.float32)
    own = head.scaled(products)
    total = torch.full_like(own, -torch.inf)
    for start in range(0, len(head.table), _ROWS):
        logits = head.logits(x, slice(start, start + _ROWS))
        total = torch.logaddexp(total, logits.logsumexp(dim=-1))
    return total - own
