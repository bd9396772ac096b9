"""RobustBench's DMWideResNet in plain torch, from its description (spec 1.2): it cannot be installed here."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.batchnorm_0, self.batchnorm_1 = nn.BatchNorm2d(channels_in), nn.BatchNorm2d(channels_out)
        self.conv_0 = nn.Conv2d(channels_in, channels_out, 3, stride, bias=False)
        self.conv_1 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        if channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
        self.act, self.pad = activation(), (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.batchnorm_0(x))
        r = self.conv_1(self.act(self.batchnorm_1(self.conv_0(F.pad(a, self.pad)))))
        return r + (self.shortcut(a) if hasattr(self, "shortcut") else x)


class _Group(nn.Module):
    def __init__(self, blocks: list[_Block]) -> None:
        super().__init__()
        self.block = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class DMWideResNet(nn.Module):
    """persistent: mean and std are part of the state dict, as in some versions of RobustBench."""

    persistent = False

    def __init__(
        self, num_classes: int = 10, depth: int = 28, width: int = 10, activation_fn: type[nn.Module] = nn.ReLU,
        mean: Any = (0.4914, 0.4822, 0.4465), std: Any = (0.2471, 0.2435, 0.2616),
    ) -> None:  # fmt: skip
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=self.persistent)
        self.init_conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        groups, channels = [], 16
        for i in range(3):
            blocks = []
            for j in range((depth - 4) // 6):
                out = 16 * width * 2**i
                blocks.append(_Block(channels, out, 2 if i and not j else 1, activation_fn))
                channels = out
            groups.append(_Group(blocks))
        self.layer = nn.Sequential(*groups)
        self.batchnorm, self.act = nn.BatchNorm2d(channels), activation_fn()
        self.logits = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.init_conv((x - self.mean) / self.std))
        return self.logits(F.avg_pool2d(self.act(self.batchnorm(x)), 8).flatten(1))
