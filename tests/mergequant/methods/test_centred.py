"""A LayerNorm's bias takes the middles of its channels in, exactly but for the stored rounding."""

import torch

from mergequant.methods.migrate import centred, fold_norm


def test_the_function_stays_and_the_middle_is_what_the_stored_bias_takes_away() -> None:
    generator = torch.Generator().manual_seed(0)
    gain, bias, shift = (torch.randn(16, generator=generator, dtype=torch.float64) for _ in "123")
    step = torch.rand(16, generator=generator, dtype=torch.float64) + 0.1
    normed = torch.randn(50, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, 16, generator=generator, dtype=torch.float64)
    folded, taken = centred(fold_norm(gain, bias, step), 5 * shift)
    assert folded.bias is not None
    stored = folded.bias
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(stored.to(dtype).to(torch.float64), stored)
    codes = normed * folded.weight + stored  # not yet rounded
    found = codes @ (weight * folded.step).T + weight @ taken
    expected = (normed * gain + bias) @ weight.T
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)
    # What the rounding moves: half a unit in the last of 8 significant bits.
    assert bool(((taken - 5 * shift).abs() <= 2.0**-8 * (stored * folded.step).abs()).all())
