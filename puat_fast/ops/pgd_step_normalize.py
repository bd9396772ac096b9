"""pgd_step_normalize: pgd_step in L-inf, and the network's next input made of it in the same pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from puat_fast.ops._layout import capsules, check_dtype, check_like, stream_of
from puat_fast.ops._library import Impl, register, takes_reference
from puat_fast.ops._native import _C
from puat_fast.ops.pgd_step import _reference as _step
from puat_fast.ops.pgd_step import check_step

_COLOURS = 3
_INPUT_DTYPES = (torch.bfloat16, torch.float32)


def pgd_step_normalize(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    eps: float,
    step_size: float,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype = torch.bfloat16,
    channels: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """One PGD step, and the classifier's input of its result: what lies between two backward passes of an attack.

        x_adv = clip(min(max(x + step_size * sign(grad), x0 - eps), x0 + eps), 0, 1)
        c_in  = (x_adv - mean) / std, channels_last, zeros in channels 3 and up

    Source: `pgd_step`, norm "linf"; the normalisation is that of `networks.classifier`. Why zero channels: a first
    convolution of 8 input channels, whose weights of the added ones are zeros, runs on tensor cores as it stands.

    grad is the gradient with respect to x, or with respect to c_in itself: std > 0, so both have the same signs. An
    iteration is then C forward and backward on c_in, and one launch:

        (grad,) = torch.autograd.grad(loss(C(c_in)), [c_in])
        x_adv, c_in = pgd_step_normalize(x_adv, grad, x0, eps, step_size, mean, std, channels=8)

    float32 arithmetic, c_in rounded once, at the end; sign and NaN as in `pgd_step`. The kernel's results equal the
    reference's bit for bit. float64, and tensors whose rows of pixels have gaps (crops), take the reference.

    Args:
        x: current point; float32 or float64, N x 3 x H x W.
        grad: N x 3 x H x W, or N x channels x H x W with channels 3 and up left unread; dtype of x or `dtype`.
        x0: centre of the ball; shape and dtype of x.
        eps: L-inf radius, in units of x; finite, >= 0.
        step_size: finite, >= 0.
        mean: 3 numbers. Numbers and not tensors: a captured graph holds them, and no kernel waits to read them.
        std: 3 numbers > 0.
        dtype: of c_in: bfloat16 or float32; float64 where x is.
        channels: of c_in: 3 (also for None) or more.
        impl: "auto", or "reference" for plain torch.

    Returns:
        (x_adv, c_in): x_adv like x, with the strides of torch.empty_like(x); c_in N x channels x H x W. New tensors. No
        gradient flows: the inputs count as detached.

    Raises:
        ValueError: a shape, dtype or device other than the above; eps or step_size negative or not finite; mean or std
            not 3 finite numbers, std not > 0; channels < 3; impl unknown.
    """
    channels = _COLOURS if channels is None else channels
    mean, std = [float(value) for value in mean], [float(value) for value in std]
    _check(x, grad, x0, mean, std, dtype, channels)
    check_step(eps, step_size)
    x, grad, x0 = x.detach(), grad.detach(), x0.detach()
    if takes_reference(impl):
        return _reference(x, grad, x0, eps, step_size, mean, std, dtype, channels)
    result: tuple[Tensor, Tensor] = torch.ops.puat_fast.pgd_step_normalize(
        x, grad, x0, eps, step_size, mean, std, dtype, channels
    )
    return result


def _reference(
    x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float,
    mean: list[float], std: list[float], dtype: torch.dtype, channels: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x_adv, c_in = _pgd_step_normalize_fake(x, grad, x0, eps, step_size, mean, std, dtype, channels)
    x_adv.copy_(_step(x, grad[:, :_COLOURS].to(x.dtype), x0, eps, step_size))
    c_in[:, _COLOURS:] = 0
    c_in[:, :_COLOURS] = (x_adv - _per_channel(mean, x)) / _per_channel(std, x)
    return x_adv, c_in


def _per_channel(values: list[float], like: Tensor) -> Tensor:
    """3 x 1 x 1, filled on the device: no copy from the host, and no scalar, by which CUDA would not divide exactly."""
    return torch.stack([like.new_full((), value) for value in values]).view(_COLOURS, 1, 1)


def _check(
    x: Tensor, grad: Tensor, x0: Tensor, mean: list[float], std: list[float], dtype: torch.dtype, channels: int
) -> None:
    check_dtype("x", x, torch.float32, torch.float64)
    if x.ndim != 4 or x.shape[1] != _COLOURS:
        raise ValueError(f"x: expected N x 3 x H x W, got {tuple(x.shape)}")
    check_like(x, x0=x0)
    accepted = (*_INPUT_DTYPES, torch.float64) if x.dtype == torch.float64 else _INPUT_DTYPES
    if dtype not in accepted:
        raise ValueError(f"dtype: expected {' or '.join(map(str, accepted))}, got {dtype}")
    if channels < _COLOURS:
        raise ValueError(f"channels: expected 3 or more, got {channels}")
    check_dtype("grad", grad, x.dtype, dtype)
    n, _, h, w = x.shape
    shapes = [(n, c, h, w) for c in sorted({_COLOURS, channels})]
    if tuple(grad.shape) not in shapes:
        raise ValueError(f"grad: expected shape {' or '.join(map(str, shapes))}, got {tuple(grad.shape)}")
    if grad.device != x.device:
        raise ValueError(f"grad: expected device {x.device} (as x), got {grad.device}")
    for name, values, least in (("mean", mean, -math.inf), ("std", std, 0.0)):
        if len(values) != _COLOURS or not all(math.isfinite(value) and value > least for value in values):
            raise ValueError(f"{name}: expected 3 finite numbers{' > 0' if name == 'std' else ''}, got {values}")


def _pgd_step_normalize(
    x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float,
    mean: list[float], std: list[float], dtype: torch.dtype, channels: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kernel = getattr(_C, f"pgd_step_normalize_{x.device.type}", None)  # CUDA's may not be built
    if kernel is None or x.dtype != torch.float32 or not all(map(_rows_follow, (x, grad, x0))):
        return _reference(x, grad, x0, eps, step_size, mean, std, dtype, channels)
    x_adv, c_in = _pgd_step_normalize_fake(x, grad, x0, eps, step_size, mean, std, dtype, channels)
    last = stream_of(x) if x.is_cuda else torch.get_num_threads()
    kernel(*capsules(x_adv, c_in, x, grad, x0), eps, step_size, mean, std, last)
    return x_adv, c_in


def _rows_follow(t: Tensor) -> bool:
    """The pixels of an image stand at one distance from each other, also where a row ends."""
    return t.shape[2] <= 1 or t.shape[3] <= 1 or t.stride(2) == t.shape[3] * t.stride(3)


def _pgd_step_normalize_fake(
    x: Tensor, grad: Tensor, x0: Tensor, eps: float, step_size: float,
    mean: list[float], std: list[float], dtype: torch.dtype, channels: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, _, h, w = x.shape
    c_in = torch.empty((n, channels, h, w), dtype=dtype, device=x.device, memory_format=torch.channels_last)
    return torch.empty_like(x), c_in


register(
    "pgd_step_normalize(Tensor x, Tensor grad, Tensor x0, float eps, float step_size, float[] mean, float[] std, "
    "ScalarType dtype, int channels) -> (Tensor, Tensor)",
    cpu=_pgd_step_normalize,
    cuda=_pgd_step_normalize,
    fake=_pgd_step_normalize_fake,
)
