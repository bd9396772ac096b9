"""G: the class-conditional residual generator (spec 1.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from puat_fast.networks.layers import BatchNorm2d, Compiled, ConditionalBatchNorm2d, Conv2d, channels_last
from puat_fast.ops._upsample import upsample2


class CBNBlock(nn.Module):
    """conv3x3(ReLU(CBN2(conv3x3(U(ReLU(CBN1(h))))))) + conv1x1(U(h)), U = bilinear x2 or nothing.

    The biases of conv1 and of the shortcut feed a BatchNorm of G or A: their true gradient is zero (spec 5.2, 5).

    `commute`, off by default: U(conv1x1(h)) for the shortcut, a quarter of the FLOPs, the same to rounding.
    """

    commute = False

    def __init__(self, channels_in: int, channels_out: int, num_classes: int, upsample: bool) -> None:
        super().__init__()
        self.upsample = upsample
        self.cbn1 = ConditionalBatchNorm2d(num_classes, channels_in)
        self.conv1 = Conv2d(channels_in, channels_out, 3, padding=1)
        self.cbn2 = ConditionalBatchNorm2d(num_classes, channels_out)
        self.conv2 = Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = Conv2d(channels_in, channels_out, 1)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        """h: N x channels_in x H x W, y: N class indices."""
        r = self.conv1(self.cbn1.relu_up(h, y, self.upsample))
        r = self.conv2(self.cbn2.relu_up(r, y, upsample=False))
        return (self._up(self.shortcut(h)) if self.commute else self.shortcut(self._up(h))) + r

    def _up(self, h: Tensor) -> Tensor:
        return upsample2(h) if self.upsample else h


class Generator(Compiled):
    """G(z, y): z N x z_dim, y N -> images in [0,1], N x 3 x 32 x 32.

    Linear -> width x 4 x 4, three up-blocks, BN, ReLU, conv1x1, tanh * 0.5 + 0.5.
    """

    def __init__(self, num_classes: int, z_dim: int = 256, width: int = 256) -> None:
        super().__init__()
        self.num_classes, self.z_dim = num_classes, z_dim
        self.linear = nn.Linear(z_dim, 16 * width)
        self.blocks = nn.ModuleList(CBNBlock(width, width, num_classes, upsample=True) for _ in range(3))
        self.bn = BatchNorm2d(width)
        self.to_rgb = Conv2d(width, 3, 1)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.xavier_uniform_(self.to_rgb.weight)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """z: N x z_dim, y: N class indices -> N x 3 x 32 x 32 in [0,1], of z's dtype."""
        return self.core(z, y)

    def _core(self, z: Tensor, y: Tensor) -> Tensor:
        h = channels_last(self.linear(z).unflatten(1, (-1, 4, 4)), self.conv_dtype or z.dtype)
        for block in self.blocks:
            h = block(h, y)
        return self.to_rgb(F.relu(self.bn(h))).to(z.dtype).tanh() * 0.5 + 0.5
