"""An input with static steps, once they are chosen: codes, and what goes into the weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mergequant.methods.migrate import migrate_weight
from mergequant.methods.reconstruct import Reconstruction, fold_columns
from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.norm_round.reference import static_codes
from mergequant_vllm.rounding import largest_code, smallest_code


@dataclass(frozen=True)
class StaticInput:
    """The input of linears that are handed x / step, by their norm or by v or up.

    Attributes:
        bits: width of an activation code.
        step: float64 [n], what migrates into the weights.
        shift: float64 [n], what the code 0 stands for, as `offset` or the norm's bias are stored;
            None: 0.
        columns: of the linears; None: the channels as they are.
        offset: float32 [K], added before rounding; None: 0.
        report: fields of the report.
        norm_tensors: the folded norm as it is to be stored, by name within the block.
    """

    bits: int
    step: Tensor
    shift: Tensor | None
    columns: Reconstruction | None
    offset: Tensor | None
    report: Mapping[str, Any]
    norm_tensors: Mapping[str, Tensor]
    is_served: bool = True

    def dequantized(self, x: Tensor) -> Tensor:
        """Codes of x [..., n], whose norm is folded: float32 [..., K]."""
        codes = static_codes(
            x, self.bits, CodeLayout.FLOAT32, index=self._index, offset=self.offset
        )
        return self._without_padding(codes)

    def unrounded(self, x: Tensor) -> Tensor:
        """Codes of x [..., n] before they are rounded and clamped: float32 [..., K]."""
        columns = x if self._index is None else x.index_select(-1, self._index)
        columns = columns if self.offset is None else columns + self.offset
        return self._without_padding(columns)

    def relaxed(self, x: Tensor) -> Tensor:
        """Codes of x [..., n] before they are rounded, clamped: float32 [..., K]."""
        return self.unrounded(x).clamp(smallest_code(self.bits), largest_code(self.bits))

    def folded_weight(self, weight: Tensor) -> Tensor:
        """W times the steps, columns reconstructed: [out, n] to [out, K]."""
        if self.columns is None:
            return migrate_weight(weight, self.step)
        return fold_columns(weight, self.step, self.columns)

    def output_offset(self, weight: Tensor) -> Tensor | None:
        """W z: [out, n] to float32 [out]; None without zero points."""
        if self.shift is None:
            return None
        return (weight.to(torch.float64) @ self.shift).to(torch.float32)

    def stored(self) -> dict[str, Tensor]:
        """`input_index` and `input_offset` where there are any."""
        tensors = {}
        if self._index is not None:
            tensors["input_index"] = self._index.cpu()
        if self.offset is not None:
            tensors["input_offset"] = self.offset.cpu().clone()
        return tensors

    @cached_property
    def _index(self) -> Tensor | None:
        return None if self.columns is None else self.columns.index.to(torch.int32)

    @cached_property
    def _real(self) -> Tensor | None:
        """1 for each column but those of padding, float32 [K]; None where there are none."""
        if self.columns is None or self.columns.padding == 0:
            return None
        return (self.columns.share != 0).to(torch.float32)

    def _without_padding(self, codes: Tensor) -> Tensor:
        """Padding reads channel 0 and must learn nothing from it: its weight stays 0."""
        return codes if self._real is None else codes * self._real
