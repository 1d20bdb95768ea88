"""Rotations are orthogonal, mix evenly, and equal their slow forms."""

import math

import pytest
import torch
from torch import Tensor

from mergequant.methods.rotate import (
    Orthogonal,
    graded,
    group_count,
    hadamard,
    hadamard_block,
    orthogonal,
    rotate_reader,
    rotate_writer,
)
from mergequant_vllm.kernels.hadamard import reference

EPS = torch.finfo(torch.float64).eps
SIZES = (1, 2, 3, 24, 32, 64, 80, 96, 127, 128, 129, 768)


def rounding_bound(size: int) -> float:
    """Of a product with an orthogonal matrix, relative to the vector: a sum of `size` terms in any
    order, and entries that are each a few roundings off."""
    return (size + 16) * EPS


def correlated(rows: int, columns: int) -> Tensor:
    """Channels that share a mean and a few directions, and one that is 50 times the others."""
    generator = torch.Generator().manual_seed(columns)
    shared = torch.randn(rows, 4, dtype=torch.float64, generator=generator)
    mixing = torch.randn(4, columns, dtype=torch.float64, generator=generator)
    own = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    x = shared @ mixing + 0.3 * own + 1.0
    x[:, columns // 3] *= 50
    return x


@pytest.mark.parametrize("size", SIZES)
def test_rotations_are_orthogonal_and_reach_every_channel(size: int) -> None:
    matrix = orthogonal(size, seed=1).matrix()
    identity = torch.eye(size, dtype=torch.float64)
    assert (matrix @ matrix.T - identity).abs().max() <= 2 * rounding_bound(size)
    assert matrix.abs().max() <= math.sqrt(2 / size) * (1 + 8 * EPS) or size == 1
    assert matrix.abs().min() > 0.01 / size


@pytest.mark.parametrize("size", SIZES)
def test_factors_equal_the_matrix(size: int) -> None:
    rotation = orthogonal(size, seed=2)
    x = correlated(7, 3 * size)
    blocks = torch.block_diag(*[rotation.matrix()] * 3)
    bound = 2 * rounding_bound(size) * x.norm(dim=1).max()
    assert (rotation.rotate(x) - x @ blocks).abs().max() <= bound
    assert (rotate_writer(x.T, rotation) - blocks.T @ x.T).abs().max() <= bound
    assert (rotate_writer(x[0], rotation) - x[0] @ blocks).abs().max() <= bound


def test_factors_need_not_be_symmetric() -> None:
    """Hadamard's and Hartley's are; a learned rotation is not."""
    factors = tuple(torch.linalg.qr(correlated(size, size)).Q for size in (3, 4, 5))
    rotation = Orthogonal(signs=orthogonal(60, seed=3).signs, factors=factors)
    x = correlated(7, 60)
    bound = 2 * rounding_bound(60) * x.norm(dim=1).max()
    assert (rotation.rotate(x) - x @ rotation.matrix()).abs().max() <= bound


@pytest.mark.parametrize(("size", "groups"), [(576, 3), (4096, 4), (256, 4), (325, 5), (130, 2)])
def test_a_graded_rotation_mixes_channels_of_a_group_evenly(size: int, groups: int) -> None:
    assert group_count(size) == groups
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    rotation, each = graded(order, seed=1), size // groups
    matrix, x = rotation.matrix(), correlated(7, 2 * size)
    identity = torch.eye(size, dtype=torch.float64)
    assert (matrix @ matrix.T - identity).abs().max() <= 2 * rounding_bound(size)
    bound = 2 * rounding_bound(size) * x.norm(dim=1).max()
    assert (rotation.rotate(x) - x @ torch.block_diag(matrix, matrix)).abs().max() <= bound
    within = torch.block_diag(*[torch.ones(each, each)] * groups).bool()
    assert (matrix[order][~within] == 0).all()
    assert matrix[order][within].abs().max() <= math.sqrt(2 / each) * (1 + 8 * EPS)
    assert matrix[order][within].abs().min() > 0.01 / each


@pytest.mark.parametrize("size", [64, 96, 127, 191])
def test_few_channels_are_one_group(size: int) -> None:
    assert group_count(size) == 1


@pytest.mark.parametrize("grade", [False, True])
def test_what_is_rotated_stays_on_its_device(grade: bool) -> None:
    rotation = graded(torch.arange(192), seed=0) if grade else orthogonal(192, seed=0)
    assert rotation.rotate(torch.empty(2, 3, 192, device="meta")).device.type == "meta"


def test_seeds_make_rotations() -> None:
    one, same, other = (orthogonal(96, seed).signs for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("size", [96, 128, 768])
def test_a_common_mean_does_not_gather_in_one_channel(size: int) -> None:
    """Embeddings have a mean; Sylvester's first column alone would add it up to sqrt(n) times."""
    rotated = orthogonal(size, seed=0).rotate(torch.ones(size))
    assert rotated.abs().max() < 0.55 * math.sqrt(size)
    assert torch.ones(size, dtype=torch.float64).norm() == pytest.approx(float(rotated.norm()))


@pytest.mark.parametrize("block", [2, 4, 32, 128])
def test_offline_and_online_hadamard_are_each_others_inverse(block: int) -> None:
    weight, x = correlated(5, 3 * block), correlated(9, 3 * block)
    rotated = rotate_reader(weight, hadamard(block))
    bound = 2 * rounding_bound(block) * weight.norm(dim=1).max()
    assert (rotated - reference.rotate_by_matrix(weight, block)).abs().max() <= bound
    y = reference.rotate(x, block) @ rotated.T
    error = (y - x @ weight.T).abs().max()
    assert error <= 4 * rounding_bound(3 * block) * x.norm(dim=1).max() * weight.norm(dim=1).max()


def test_hadamard_blocks() -> None:
    widths = {11008: 128, 14336: 128, 352: 32, 172: 4, 27: 1, 11008 // 8: 32, 11008 // 4: 64}
    assert {width: hadamard_block(width) for width in widths} == widths
    assert hadamard_block(11008, most=64) == 64
    with pytest.raises(ValueError, match="at least one channel"):
        hadamard_block(0)
