"""What the tests of bn_silu share: operands, the formula in elementary operations, and the comparison with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_checks import assert_close
from torch import Tensor

from puat_fast.ops import bn_silu

PADS = [(0, 0, 0, 0), (0, 1, 0, 1), (1, 1, 1, 1), (2, 0, 1, 3)]
# One channel, odd primes, a masked column block, full column blocks, one pixel, one row, more than one chunk.
SHAPES = [(2, 1, 1, 1), (3, 5, 7, 11), (4, 17, 3, 2), (2, 160, 3, 5), (6, 16, 1, 1), (1, 3, 1, 13), (2, 16, 13, 11)]

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def operands(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, mean: float = 1.0
) -> dict[str, Tensor]:
    """x, residual (channels_last), weight, bias, running_mean, running_var."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    channels = shape[1]
    x, residual = randn(*shape) * 2 + mean, randn(*shape)
    vectors = {
        "weight": 1 + 0.5 * randn(channels), "bias": randn(channels),
        "running_mean": mean + randn(channels), "running_var": randn(channels) ** 2 + 0.5,
    }  # fmt: skip
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    images = {"x": x, "residual": residual}
    return {name: t.to(device, dtype).contiguous(memory_format=torch.channels_last) for name, t in images.items()} | {
        name: t.to(device, wide) for name, t in vectors.items()
    }


def formula(
    h: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor | None, running_var: Tensor | None, *,
    training: bool, momentum: float = 0.01, eps: float = 1e-5, groups: int = 1, pad: tuple[int, ...] = (0, 0, 0, 0),
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """(out, statistics) by elementary operations, group by group: shares no code with the op."""
    n, channels, height, width = h.shape
    left, right, top, bottom = pad
    out = h.new_zeros(n, channels, height + top + bottom, width + left + right)
    means, variances = [], []
    for start in range(0, n, n // groups):
        images = slice(start, start + n // groups)
        values = h[images].transpose(0, 1).reshape(channels, -1)
        count = values.shape[1]
        mean, var = running_mean, running_var
        if training:
            mean = values.sum(1) / count
            var = ((values - mean[:, None]) ** 2).sum(1) / count
            means.append(mean.detach())
            variances.append(var.detach() * count / (count - 1))
            if running_mean is not None:
                running_mean = (1 - momentum) * running_mean + momentum * means[-1]
                running_var = (1 - momentum) * running_var + momentum * variances[-1]
        xhat = (h[images] - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + eps) ** 0.5
        y = xhat * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
        out[images, :, top : top + height, left : left + width] = y / (1 + torch.exp(-y))
    statistics = [torch.stack(means), torch.stack(variances)] if training else []
    return out, statistics + [t for t in (running_mean, running_var) if t is not None]


def compare(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], *, use: str = "out and h", with_residual: bool = True,
    frozen: bool = False, scale: float = 16.0, **options: Any,
) -> None:  # fmt: skip
    """The op, in dtype, against the formula in float64: results, statistics and gradients."""
    given = operands(shape, dtype, device)
    running = [given.pop("running_mean"), given.pop("running_var")]
    if frozen:
        running = [None, None]
    residual = given.pop("residual")
    leaves = [t.requires_grad_() for t in (*given.values(), *([residual] if with_residual else []))]
    result = bn_silu(*given.values(), *running, residual=residual if with_residual else None, **options)
    above = [operands(tuple(t.shape), dtype, device, seed=9)["residual"] for t in (result.out, result.h)]
    used = [name in use for name in ("out", "h")]
    taken = [[t for t, u in zip(pair, used, strict=True) if u] for pair in (result[:2], above)]
    grads = torch.autograd.grad(*[taken[0], leaves, taken[1]], allow_unused=True)
    statistics = [t for t in (result.mean, result.var, *running) if t is not None]

    # h is rounded once; all else is computed from what it then is
    exact = given["x"].double() + (residual.double() if with_residual else 0)
    assert_close(result.h.detach(), exact.detach(), dtype)
    before = operands(shape, dtype, device)
    running = [None, None] if frozen else [before["running_mean"].double(), before["running_var"].double()]
    wide = [t.detach().double().requires_grad_() for t in (result.h, given["weight"], given["bias"])]
    out, expected_statistics = formula(*wide, *running, **options)
    loss = sum((t * g.double()).sum() for t, g, u in zip((out, wide[0]), above, used, strict=True) if u)
    expected = list(torch.autograd.grad(loss, wide, allow_unused=True))
    expected += expected[:1] if with_residual else []

    assert [t.dtype for t in (result.out, result.h)] == [dtype, dtype]
    if dtype != torch.float64:
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in result[:2])
    pairs = [(result.out.detach(), out.detach()), *zip(statistics, expected_statistics, strict=True)]
    for actual, wanted in [*pairs, *zip(grads, expected, strict=True)]:
        assert (actual is None) == (wanted is None)
        if actual is not None:
            assert_close(actual, wanted, actual.dtype, scale if actual.dtype == torch.float32 else 2.0)
