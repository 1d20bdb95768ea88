"""The embedding of a model with a head of its own: its rows are looked up, never multiplied."""

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod


class LookupMethod(UnquantizedEmbeddingMethod):
    """vLLM's, without the copy of the table that it makes on a CPU for products with it.

    That is as large as the table: 1 GiB at 128,256 rows of 2048 channels in float32.
    """

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Leave the table as it is."""
