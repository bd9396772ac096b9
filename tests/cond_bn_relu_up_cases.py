"""What the tests of cond_bn_relu_up share: operands, and the op's results and gradients in one list."""

import torch
from op_checks import assert_close
from torch import Tensor

from puat_fast.ops import cond_bn_relu_up

CLASSES = 3


def operands(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    """x, y, gain, bias, running_mean, running_var; a class or more has no image, another has several."""
    generator = torch.Generator().manual_seed(seed)
    n, c, _, _ = shape
    x = 2 * torch.randn(shape, generator=generator) + 3
    y = torch.randint(CLASSES - 1, (n,), generator=generator)
    gain, bias = (torch.randn(CLASSES, c, generator=generator) for _ in range(2))
    mean, var = 3 + torch.randn(c, generator=generator), 4 + torch.rand(c, generator=generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
    return [x, y.to(device), *(t.to(device, wide) for t in (gain, bias, mean, var))]


def doubled(args: list[Tensor]) -> list[Tensor]:
    """Copies of the operands in float64."""
    return [t.double() if t.is_floating_point() else t.clone() for t in args]


def above(out: Tensor, seed: int = 1) -> Tensor:
    """A gradient for the result, the same for every dtype but for rounding to bfloat16's numbers."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(out)


def forward_backward(args: list[Tensor], **options: object) -> list[Tensor]:
    """The result, the gradients of x, gain and bias, and the running statistics after."""
    x, y, gain, bias, mean, var = (t.detach().clone() for t in args)
    wanted = [t.requires_grad_() for t in (x, gain, bias)]
    out = cond_bn_relu_up(x, y, gain, bias, mean, var, **options)
    return [out.detach(), *torch.autograd.grad(out, wanted, above(out)), mean, var]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Scales: gradients sum over more than one rounding; bfloat16 rounds that of U's input too."""
    for a, e, scale in zip(actual[:4], expected[:4], (1, 4, 2, 2), strict=True):
        assert_close(a, e, dtype, scale)
    for a, e in zip(actual[4:], expected[4:], strict=True):
        assert_close(a, e, torch.float32)
