"""The loss of next tokens at a model's head, some rows of the vocabulary at a time.

Logits of a window at once would be more than all else that is in memory: 2048 tokens of 152,000
rows are 1.2 GB.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 8192  # of the head, in float32 at once


def next_token_losses(normed: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """-log p of each next token: float32 [t - 1].

    Args:
        normed: float32 [t, n], what the head reads.
        table: [vocabulary, n], its weight.
        ids: int64 [t], the tokens.
    """
    x, following = normed[:-1], ids[1:]
    own = (x * table[following].to(torch.float32)).sum(dim=-1)
    total = torch.full_like(own, -torch.inf)
    for rows in torch.split(table, _ROWS):
        logits = F.linear(x, rows.to(torch.float32))
        total = torch.logaddexp(total, logits.logsumexp(dim=-1))
    return total - own
