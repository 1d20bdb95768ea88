"""Scales of equalized channels: the least product of the two sums."""

import pytest
import torch

from mergequant.methods.equalize import channel_scales, relative_energy


def product(energy: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor) -> float:
    return float((energy / scale.square()).sum() * (columns * scale.square()).sum())


def test_scales_are_where_the_product_is_least() -> None:
    generator = torch.Generator().manual_seed(0)
    energy, columns = (torch.rand(40, generator=generator).double() ** 4 + 1e-3 for _ in range(2))
    scale = channel_scales(energy, columns)
    least = product(energy, columns, scale)
    assert least == pytest.approx(float((energy * columns).sqrt().sum().square()))
    for _ in range(100):
        other = scale * torch.exp(0.1 * torch.randn(40, generator=generator).double())
        assert product(energy, columns, other) > least
    # The input keeps its size.
    assert float((energy / scale.square()).sum()) == pytest.approx(float(energy.sum()))


def test_what_is_not_known_is_not_scaled() -> None:
    energy = torch.tensor([1.0, 0.0, 4.0, 1.0])
    columns = torch.tensor([1.0, 1.0, 0.0, 1e30])
    scale = channel_scales(energy, columns)
    assert scale[1] == scale[2] == 1 and scale[0] / scale[3] == pytest.approx(1024)
    assert (channel_scales(torch.zeros(3), torch.ones(3)) == 1).all()


def test_a_token_counts_by_its_shares() -> None:
    x = torch.tensor([[3.0, 4.0], [300.0, 400.0], [0.0, 0.0]])
    torch.testing.assert_close(relative_energy(x), 2 * torch.tensor([9.0, 16.0]).double() / 25)
