"""C: the wide residual network with SiLU that is trained, and its teacher C' (spec 1.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puat_fast.networks.augment import Augment
from puat_fast.networks.layers import BatchNorm2d, Compiled, Conv2d, channels_last, conv2d

BN_MOMENTUM = 0.01


def _conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1, padding: int = 0) -> Conv2d:
    conv = Conv2d(channels_in, channels_out, kernel, stride=stride, padding=padding, bias=False)
    nn.init.normal_(conv.weight, std=(2 / (kernel * kernel * channels_out)) ** 0.5)
    return conv


class Block(nn.Module):
    """Pre-activation block: a = SiLU(BN0(h)); r = conv1(SiLU(BN1(conv0(a)))); then h + r, or shortcut(a) + r.

    A sum is passed on as its two terms: whoever normalises it takes it on the way.

    `fold_bn`, off by default: in eval mode BN1 is part of conv0's weight and bias, the same to rounding.
    """

    fold_bn = False

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.batchnorm_0 = BatchNorm2d(channels_in, momentum=BN_MOMENTUM)
        self.conv_0 = _conv(channels_in, channels_out, 3, stride, padding=1 if stride == 1 else 0)
        self.batchnorm_1 = BatchNorm2d(channels_out, momentum=BN_MOMENTUM)
        self.conv_1 = _conv(channels_out, channels_out, 3, padding=1)
        self.shortcut = _conv(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """h = x + residual, N x channels_in x H x W -> two terms, N x channels_out x H/stride x W/stride each."""
        # stride 2 pads right and bottom only: TensorFlow's "SAME"
        pad = (0, 0, 0, 0) if self.stride == 1 else (0, 1, 0, 1)
        a, h = self.batchnorm_0.silu(x, residual, pad, give_h=self.shortcut is None)
        r = self.conv_1(self._between(a))
        if self.shortcut is None:
            assert h is not None
            return h, r
        # of stride 2, but on the pixels that it reads: the padding would be copied away first
        return self.shortcut(a if self.stride == 1 else a[:, :, :-1:2, :-1:2]), r

    def _between(self, padded: Tensor) -> Tensor:
        """SiLU(BN1(conv0(padded)))."""
        if self.fold_bn and not self.training:
            weight, bias = self.batchnorm_1.folded_into(self.conv_0.weight)
            return F.silu(conv2d(padded, weight, bias, self.stride, 2 - self.stride))
        return self.batchnorm_1.silu(self.conv_0(padded))[0]


class Group(nn.Module):
    """A row of blocks; the first one changes width and resolution."""

    def __init__(self, num_blocks: int, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            Block(channels_in, channels_out, stride),
            *(Block(channels_out, channels_out, 1) for _ in range(num_blocks - 1)),
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The blocks, one after the other: from the terms of a sum to the terms of a sum."""
        h, r = x, residual
        for block in self.block:
            h, r = block(h, r)
        assert r is not None
        return h, r


class Classifier(Compiled):
    """WRN-depth-width: images in [0,1], N x 3 x 32 x 32 -> logits, N x K.

    In train mode `augment` is applied first; then (x - mean) / std. Parameter names are those of RobustBench's
    DMWideResNet. WRN-28-10 with K = 10 has 36,479,194 parameters.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        num_classes: int,
        depth: int = 28,
        width: int = 10,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        augment: Augment | None = None,
    ) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth: {depth} is not 6 n + 4")
        num_blocks, widths = (depth - 4) // 6, (16, 16 * width, 32 * width, 64 * width)
        self.augment = augment
        self.num_classes, self.depth, self.width = num_classes, depth, width
        self.normalisation = (tuple(mean), tuple(std))
        for name, values in zip(("mean", "std"), self.normalisation, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.init_conv = _conv(3, widths[0], 3, padding=1)
        self.layer = nn.Sequential(*(Group(num_blocks, widths[i], widths[i + 1], 1 if i == 0 else 2) for i in range(3)))
        self.batchnorm = BatchNorm2d(widths[3], momentum=BN_MOMENTUM)
        self.logits = nn.Linear(widths[3], num_classes)
        nn.init.zeros_(self.logits.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # from the numbers again: a float32 mean cast to float64 would be 1e-8 off
        for name, values in zip(("mean", "std"), self.normalisation, strict=True):
            setattr(self, name, getattr(self, name).new_tensor(values).view(1, 3, 1, 1))
        return self

    def features(self, x: Tensor) -> Tensor:
        """Pooled features before the last layer, N x 64 width, of images that are augmented already."""
        h, r = self.init_conv(channels_last((x - self.mean) / self.std, self.conv_dtype or x.dtype)), None
        for group in self.layer:
            h, r = group(h, r)
        return F.avg_pool2d(self.batchnorm.silu(h, r)[0], 8).flatten(1).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: images in [0,1], N x 3 x 32 x 32 -> logits, N x K, of x's dtype. Raises ValueError on another shape."""
        if x.shape[1:] != (3, 32, 32):
            raise ValueError(f"x: shape {tuple(x.shape)}, expected N x 3 x 32 x 32")
        if self.training and self.augment is not None:
            x = self.augment(x)
        return self.core(x)

    def _core(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))

    def set_fold_bn(self, on: bool) -> None:
        """Whether eval mode folds BatchNorm into the convolution before it, where there is one (`Block.fold_bn`)."""
        for module in self.modules():
            if isinstance(module, Block):
                module.fold_bn = on

    def set_bn_momentum(self, momentum: float | Tensor) -> None:
        """Momentum of every running statistic: 1.0 takes over the last batch's ("Haiku init", spec 1.2).

        A 0-d tensor is read in each forward: a compiled or captured one then sees it change.
        """
        for module in self.modules():
            if isinstance(module, BatchNorm2d):
                module.momentum = momentum  # type: ignore[assignment]  # torch's annotation knows numbers alone
