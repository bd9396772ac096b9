"""Layers that the four networks share: normalisations with state, and spectral norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puat_fast.ops import bn_silu, cond_bn_relu_up, spectral_norm
from puat_fast.ops.bn_silu import Pad


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose running statistics can be left alone in train mode.

    With `update_stats` false, train mode normalises by the batch's own statistics and changes no buffer.
    """

    update_stats = True

    def forward(self, x: Tensor) -> Tensor:
        """x: N x channels x H x W."""
        if self.training and not self.update_stats:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return super().forward(x)

    def silu(self, x: Tensor, residual: Tensor | None = None, pad: Pad = (0, 0, 0, 0)) -> tuple[Tensor, Tensor]:
        """(pad(SiLU(BN(h))), h) for h = x + residual, in few passes over memory; pad as in `bn_silu`."""
        assert self.momentum is not None and self.num_batches_tracked is not None
        frozen = self.training and not self.update_stats
        running = (None, None) if frozen else (self.running_mean, self.running_var)
        if self.training and not frozen:
            self.num_batches_tracked.add_(1)
        result = bn_silu(
            x, self.weight, self.bias, *running, training=self.training, momentum=self.momentum, eps=self.eps,
            residual=residual, pad=pad,
        )  # fmt: skip
        return result.out, result.h


class ConditionalBatchNorm2d(nn.Module):
    """CBN: gain_y[c] * xhat + bias_y[c], with one gain and bias per class and channel (spec 1.2)."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.bn = BatchNorm2d(channels, affine=False)
        self.gain = nn.Parameter(torch.ones(num_classes, channels))
        self.bias = nn.Parameter(torch.zeros(num_classes, channels))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x: N x channels x H x W, y: N class indices."""
        return F.embedding(y, self.gain)[:, :, None, None] * self.bn(x) + F.embedding(y, self.bias)[:, :, None, None]

    def relu_up(self, x: Tensor, y: Tensor, upsample: bool) -> Tensor:
        """U(ReLU(self(x, y))) in one op, U = bilinear x2 with `upsample`, else nothing."""
        bn, update = self.bn, self.bn.training and self.bn.update_stats
        assert bn.running_mean is not None and bn.running_var is not None and bn.momentum is not None
        if update and bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
        return cond_bn_relu_up(
            x, y, self.gain, self.bias, bn.running_mean, bn.running_var, training=bn.training, momentum=bn.momentum,
            eps=bn.eps, stats="update" if update else "leave", upsample=upsample,
        )  # fmt: skip


class SpectralNorm(nn.Module):
    """Base of layers that use W / sigma, sigma = u^T W v, W flattened to (out, rest).

    In train mode every forward first makes one power iteration, v = W^T u, u = W v (normalised, eps 1e-12), also under
    no_grad; u and v are constants in backward, sigma is differentiated through W. (Miyato et al. 2018; spec 1.2.)
    """

    weight: nn.Parameter
    u: Tensor
    v: Tensor
    _ready: Tensor | None = None

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))
        rest = self.weight[0].numel()
        self.register_buffer("u", F.normalize(torch.randn(shape[0]), dim=0, eps=1e-12))
        self.register_buffer("v", F.normalize(torch.randn(rest), dim=0, eps=1e-12))

    def normalised_weight(self) -> Tensor:
        """W / sigma, of W's shape; in train mode u and v advance by one power iteration.

        Inside `normalised_together` the iteration is done, and its result given.
        """
        return _normalised([self])[0] if self._ready is None else self._ready


def _normalised(layers: Sequence[SpectralNorm], lookups: SpectralNorm | None = None) -> list[Tensor]:
    iterations = [(len(layer.u) if layer is lookups else 1) if layer.training else 0 for layer in layers]
    return spectral_norm(
        [layer.weight for layer in layers],
        [layer.u for layer in layers],
        [layer.v for layer in layers],
        iterations=iterations,
        per_row=[layer is lookups for layer in layers],
    )


@contextmanager
def normalised_together(module: nn.Module, lookups: SpectralNorm | None = None) -> Iterator[None]:
    """Inside, all layers with spectral norm in `module` use weights normalised in one call, one iteration for them all.

    lookups: a layer whose K rows are looked up one by one, each after an iteration of its own, so that row k has the
    sigma after k + 1 iterations; in eval mode it is as the others.
    """
    layers = [m for m in module.modules() if isinstance(m, SpectralNorm)]
    for layer, weight in zip(layers, _normalised(layers, lookups), strict=True):
        layer._ready = weight
    try:
        yield
    finally:
        for layer in layers:
            layer._ready = None


class SNConv2d(SpectralNorm):
    """k x k convolution (stride 1, padding k // 2, bias) with spectral norm."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, gain: float) -> None:
        super().__init__(channels_out, channels_in, kernel, kernel)
        nn.init.xavier_uniform_(self.weight, gain)
        bound = 1 / (channels_in * kernel * kernel) ** 0.5
        self.bias = nn.Parameter(torch.empty(channels_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """x: N x channels_in x H x W -> N x channels_out x H x W."""
        return F.conv2d(x, self.normalised_weight(), self.bias, padding=self.weight.shape[-1] // 2)


class SNLinear(SpectralNorm):
    """Linear layer with bias and spectral norm."""

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__(features_out, features_in)
        nn.init.xavier_uniform_(self.weight)
        bound = 1 / features_in**0.5
        self.bias = nn.Parameter(torch.empty(features_out).uniform_(-bound, bound))

    def forward(self, h: Tensor) -> Tensor:
        """h: N x features_in -> N x features_out."""
        return F.linear(h, self.normalised_weight(), self.bias)


class SNEmbedding(SpectralNorm):
    """Table of class embeddings, K x features, with spectral norm over the whole table."""

    def __init__(self, num_classes: int, features: int) -> None:
        super().__init__(num_classes, features)
        nn.init.xavier_uniform_(self.weight)


def batch_norms(module: nn.Module) -> Iterator[BatchNorm2d]:
    """Every BatchNorm2d of a network, in the order of `modules()`."""
    return (m for m in module.modules() if isinstance(m, BatchNorm2d))


@contextmanager
def frozen_running_stats(module: nn.Module) -> Iterator[None]:
    """Inside, train-mode forwards use batch statistics and leave the running ones alone."""
    before = [(norm, norm.update_stats) for norm in batch_norms(module)]
    for norm, _ in before:
        norm.update_stats = False
    try:
        yield
    finally:
        for norm, update_stats in before:
            norm.update_stats = update_stats


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Inside, the network is in eval mode; afterwards each of its modules in the mode it had."""
    before = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in before:
            m.training = training
