"""A model whose head is tied to its embedding, seen with a head of its own."""

from torch import Tensor

from mergequant.model.architecture import Architecture
from mergequant.model.reader import ModelReader


class UntiedReader(ModelReader):
    """A view of a model whose head is tied to its embedding, in which it is not.

    Args:
        reader: the source model.
    """

    def __init__(self, reader: ModelReader, architecture: Architecture) -> None:
        self._source = reader
        self._head = f"{architecture.head.name}.weight"
        self._embedding = f"{architecture.embedding.name}.weight"
        super().__init__(
            reader.folder,
            {**reader.config, "tie_word_embeddings": False},
            {**reader.headers, self._head: reader.headers[self._embedding]},
            reader.online,
        )

    def read(self, name: str) -> Tensor:
        """One tensor; the head's are the embedding's."""
        return self._source.read(self._embedding if name == self._head else name)

    def check_finite(self) -> None:
        """Raise InputError as the model itself does."""
        self._source.check_finite()
