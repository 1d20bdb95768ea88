"""One decoder block in memory: run forwards, backwards, and up to what a linear reads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class _StopForwardError(Exception):
    """Ends a block's forward pass once the wanted input was seen."""


@dataclass(frozen=True)
class LinearGradient:
    """What a linear read, and the loss's gradients there.

    Attributes:
        x: [tokens, n], its input, as the server rotates it.
        by_input: [tokens, n], with respect to the input, through all linears that share it.
        by_output: [tokens, out], with respect to the output.
    """

    x: Tensor
    by_input: Tensor
    by_output: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> "LinearGradient":
        """Of an input and an output whose gradients were kept."""
        assert x.grad is not None and y.grad is not None
        parts = (x.detach(), x.grad, y.grad)
        return cls(*(part.reshape(-1, part.shape[-1]) for part in parts))


class Block:
    """One loaded block.

    Attributes:
        module: the `transformers` decoder layer, float32.
        source_tensors: its tensors as the source model has them, by name within the block.
        name: the block's in the whole model.
        number: which block, from 0.
        device: of its tensors.

    `residual_scale` multiplies what a linear that writes the residual adds to it.
    """

    def __init__(
        self,
        module: nn.Module,
        source_tensors: Mapping[str, Tensor],
        name: str,
        number: int,
        device: torch.device,
        arguments: Callable[[Tensor], Mapping[str, Any]],
        residual_scale: float = 1.0,
    ) -> None:
        self.module = module
        self.source_tensors = source_tensors
        self.name = name
        self.number = number
        self.device = device
        self._arguments = arguments
        self._residual_scale = residual_scale
        self._left_behind: dict[str, nn.Module] = {}

    def weight(self, linear: str) -> Tensor:
        """float32 [out, in] of a linear not yet quantized."""
        return self.module.get_parameter(f"{linear}.weight").detach()

    def name_of(self, linear: str) -> str:
        """A linear's name in the whole model."""
        return f"{self.name}.{linear}"

    def replace(self, name: str, module: nn.Module) -> None:
        """Put `module` in the place of a submodule."""
        parent, _, child = name.rpartition(".")
        setattr(self.module.get_submodule(parent), child, module)

    def forward(self, hidden: Tensor, *, gradient: bool = False) -> Tensor:
        """[windows, length, n] to the same; `gradient` records it for a backward pass."""
        with torch.set_grad_enabled(gradient):
            output = self.module(hidden, **self._arguments(hidden))
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first

    def forward_with_inputs(
        self, hidden: Tensor, linears: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The output of `forward`, and what each of `linears` reads on the way."""
        with self._hooked(linears) as seen:
            output = self.forward(hidden)
        return output, {name: x for name, (x, _) in seen.items()}

    @contextmanager
    def _hooked(
        self, linears: Sequence[str], keep_gradients: bool = False
    ) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Collect input and output of `linears` by name, for a pass within the context."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if keep_gradients:
                for tensor in (inputs[0], output):
                    tensor.retain_grad()
            seen[name] = inputs[0], output

        handles = [
            self.module.get_submodule(name).register_forward_hook(
                lambda _, inputs, output, name=name: keep(name, inputs, output)
            )
            for name in linears
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def backward(
        self, hidden: Tensor, gradient: Tensor, linears: Sequence[str]
    ) -> tuple[Tensor, dict[str, LinearGradient]]:
        """Carry a gradient from the block's output to its input.

        Args:
            hidden: the block's input, [windows, length, n].
            gradient: of the loss with respect to the output, likewise.
            linears: names within the block, not yet quantized.

        Returns:
            the gradient with respect to `hidden`, and what each of `linears` saw.
        """
        leaf = hidden.detach().requires_grad_()
        with self._hooked(linears, keep_gradients=True) as seen:
            torch.autograd.backward(self.forward(leaf, gradient=True), gradient)
        assert leaf.grad is not None
        return leaf.grad, {name: LinearGradient.of(*pair) for name, pair in seen.items()}

    def leave_behind(
        self, linears: Sequence[str], norm: str, batches: list[Tensor], known: Sequence[Tensor]
    ) -> None:
        """Go on from `norm`, whose input all of `linears` have done their part for.

        Each batch becomes what `norm` reads, and the part of the block that holds `linears` adds
        nothing any more: passes that come later do not compute it again.

        Args:
            linears: names within the block, all in one submodule whose output is added to the
                residual that `norm` reads.
            batches: hidden states at the block's input, replaced in place.
            known: what the last of `linears` reads of the first batches, as far as it is known.
        """
        (owner,) = {name.partition(".")[0] for name in linears}
        part = self.module.get_submodule(owner)
        outputs: list[Any] = []
        handle = part.register_forward_hook(lambda _, __, output: outputs.append(output))
        self._observe(norm, batches[0][:1, :1], lambda _: None)
        handle.remove()
        self.add_output(linears[-1], batches, known)
        hidden: list[Tensor] = []
        for index in range(len(known), len(batches)):
            self._observe(norm, batches[index], hidden.append)
            batches[index] = hidden.pop().reshape(batches[index].shape)
        self._left_behind[owner] = part
        self.replace(owner, _NothingToAdd(outputs[0]))

    def add_output(self, linear: str, batches: list[Tensor], inputs: Sequence[Tensor]) -> None:
        """Add what `linear`, which writes the residual, makes of its `inputs` to the first batches.

        Args:
            batches: hidden states [windows, length, n], replaced in place.
            inputs: [tokens, channels] each.
        """
        module = self.module.get_submodule(linear)
        with torch.no_grad():
            for index, x in enumerate(inputs):
                added = module(x).reshape(batches[index].shape) * self._residual_scale
                batches[index] = batches[index] + added

    def restore(self) -> None:
        """Put back what `leave_behind` took out."""
        for name, part in self._left_behind.items():
            self.replace(name, part)
        self._left_behind.clear()

    def observe(
        self, linear: str, batches: Sequence[Tensor], consume: Callable[[Tensor], object]
    ) -> None:
        """Call `consume` with the input [tokens, n] of `linear`, for each batch.

        The pass stops there: what comes later in the block is not computed. Where the server
        rotates the input, it is seen as it is before that.
        """
        for hidden in batches:
            self._observe(linear, hidden, lambda x: consume(x.reshape(-1, x.shape[-1])))

    def inputs_of(self, linear: str, batches: Sequence[Tensor]) -> list[Tensor]:
        """What `linear` reads of each batch, see `observe`: [tokens, n] each."""
        inputs: list[Tensor] = []
        self.observe(linear, batches, inputs.append)
        return inputs

    def _observe(self, name: str, hidden: Tensor, consume: Callable[[Tensor], object]) -> None:
        """Call `consume` with the input of submodule `name`, and stop there."""

        def stop_at(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            consume(inputs[0])
            raise _StopForwardError

        handle = self.module.get_submodule(name).register_forward_pre_hook(stop_at, prepend=True)
        try:
            self.forward(hidden)
        except _StopForwardError:
            return
        finally:
            handle.remove()


class _NothingToAdd(nn.Module):
    """A part of a block whose output is in the residual already, and which adds 0.

    Args:
        like: what the part returned: a tensor, or a tuple that begins with one.
    """

    zero: Tensor

    def __init__(self, like: Any) -> None:
        super().__init__()
        first = like[0] if isinstance(like, tuple) else like
        self.register_buffer("zero", first.new_zeros(()))
        self._rest = None if isinstance(like, Tensor) else (None,) * (len(like) - 1)

    def forward(self, *_: Any, **__: Any) -> Any:
        """0 in the form that the block expects."""
        return self.zero if self._rest is None else (self.zero, *self._rest)
