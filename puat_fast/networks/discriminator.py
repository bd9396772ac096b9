"""D: the projection discriminator with spectral norm (spec 1.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puat_fast.networks.layers import (
    Compiled,
    SNConv2d,
    SNEmbedding,
    SNLinear,
    channels_last,
    fits_one_pass,
    normalised_per_call,
    normalised_together,
)

Call = tuple[Tensor, Tensor | None]
"""The arguments of D(x, y), or of D(x, all) with None for y."""


class DownBlock(nn.Module):
    """avgpool2(conv3x3(ReLU(conv3x3(a)))) + shortcut, a = x in the first block, ReLU(x) in the others.

    Shortcut: the first block pools, then conv1x1; the others conv1x1, then pool (no ReLU before it).

    Same to rounding, and off by default: `pool_conv`, convolution and pool as one convolution; `commute`, every
    shortcut pools first.
    """

    pool_conv = False
    commute = False

    def __init__(self, channels_in: int, channels_out: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.conv1 = SNConv2d(channels_in, channels_out, 3, gain=2**0.5)
        self.conv2 = SNConv2d(channels_out, channels_out, 3, gain=2**0.5)
        self.shortcut = SNConv2d(channels_in, channels_out, 1, gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x: N x channels_in x H x W -> N x channels_out x H/2 x W/2."""
        r = self.conv1(x if self.first else F.relu(x))
        r = self.conv2.pooled(F.relu(r), as_one=self.pool_conv)
        if self.first or self.commute:
            return self.shortcut(F.avg_pool2d(x, 2)) + r
        return F.avg_pool2d(self.shortcut(x), 2) + r


class Discriminator(Compiled):
    """D(x, y) = linear(h) + <E_y, h>, h = sum over 2 x 2 of ReLU(blocks((x - 0.5) / 0.5)).

    `per_class_lookup` (official-v1): D(x, all) looks the embedding up K times and so makes K power iterations on it,
    each class using its own sigma; else one.

    `batched`, off by default: `scores` takes its calls in one pass, each with its own sigma; the same to rounding. On a
    CPU only where that pays.
    """

    batched = False

    def __init__(self, num_classes: int, width: int = 256, per_class_lookup: bool = False) -> None:
        super().__init__()
        self.num_classes, self.per_class_lookup = num_classes, per_class_lookup
        self.blocks = nn.Sequential(
            DownBlock(3, width, first=True), *(DownBlock(width, width, first=False) for _ in range(3))
        )
        self.linear = SNLinear(width, 1)
        self.embedding = SNEmbedding(num_classes, width)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """x: N x 3 x 32 x 32 in [0,1]; y: N class indices -> N x 1; y None -> N x K, D(x, k) for every class k."""
        one_by_one = self.embedding if y is None and self.per_class_lookup else None
        with normalised_together(self, lookups=one_by_one):
            h = self.core(x)
            score, E = self.linear(h), self.embedding.normalised_weight()
        if y is None:
            return score + h @ E.T
        return score + (F.embedding(y, E) * h).sum(1, keepdim=True)

    def scores(self, *calls: Call) -> list[Tensor]:
        """[D(x, y), ...] of several calls (x, y), y None for all classes, as if made one after the other."""
        images, width = sum(len(x) for x, _ in calls), self.linear.weight.shape[1]
        if not self.batched or len(calls) == 1 or not fits_one_pass(images, width, calls[0][0]):
            return [self(x, y) for x, y in calls]
        lookups = [self.num_classes if y is None and self.per_class_lookup else 1 for _, y in calls]
        sizes, E = [len(x) for x, _ in calls], self.embedding.weight
        with normalised_per_call(self, sizes, {self.embedding: lookups}) as sigmas:
            h = self.core(torch.cat([x for x, _ in calls]))
            score = self.linear(h)
        results = []
        parts = zip(calls, score.split(sizes), h.split(sizes), sigmas[self.embedding], strict=True)
        for (_, y), score_k, h_k, sigma in parts:
            projection = h_k @ E.T if y is None else (F.embedding(y, E) * h_k).sum(1, keepdim=True)
            results.append(score_k + projection / sigma)
        return results

    def _core(self, x: Tensor) -> Tensor:
        """h, N x width, in the dtype of the weights."""
        x = channels_last((x - 0.5) / 0.5, self.conv_dtype or x.dtype)
        return F.relu(self.blocks(x)).sum(dim=(2, 3), dtype=self.linear.weight.dtype)
