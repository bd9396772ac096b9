"""Layers that the four networks share: normalisations with state, and spectral norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puat_fast.ops import bn_silu, cond_bn_relu_up, spectral_norm, spectral_sigmas
from puat_fast.ops.bn_silu import Pad


class Compiled(nn.Module):
    """Base of the four networks: `core` is the part of forward that may be compiled, from tensors to a tensor.

    What draws random numbers or advances a power iteration stays outside of it.
    """

    conv_dtype: torch.dtype | None = None
    """dtype of convolutions and activations; None: that of the weights. Logits, scores and images are float32."""
    _core: Callable[..., Tensor]
    compiled: Callable[..., Tensor] | None = None
    """torch.compile of `_core`, where the engine has compiled the network."""
    replayed = False
    """Whether `compiled` replays CUDA graphs: each call overwrites what the last one, and its backward, gave."""

    def core(self, *inputs: Tensor) -> Tensor:
        """`_core(*inputs)`, compiled or not."""
        if self.compiled is None:
            return self._core(*inputs)
        if self.replayed:
            torch.compiler.cudagraph_mark_step_begin()
            return self.compiled(*inputs).clone()
        return self.compiled(*inputs)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> Tensor:
    """F.conv2d in the dtype of x: weight and bias, float32 masters, are rounded to it, their gradients are theirs."""
    return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), stride, padding)


class Conv2d(nn.Conv2d):
    """nn.Conv2d that works in the dtype of its input: see `conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        """x: N x channels_in x H x W -> N x channels_out x H/stride x W/stride, of x's dtype."""
        assert isinstance(self.padding, tuple)
        return conv2d(x, self.weight, self.bias, self.stride[0], self.padding[0])


MAPPED_ANEW = 32 * 2**20
"""Bytes above which glibc takes a block from the system anew at each allocation, page by page."""


def fits_one_pass(images: int, channels: int, x: Tensor) -> bool:
    """Whether one pass over so many images beats several: on a CPU not where its maps are `MAPPED_ANEW`.

    channels: of the largest map, of 32 x 32 pixels; x: gives device and dtype. On a GPU always.
    """
    return x.device.type != "cpu" or images * channels * 32 * 32 * x.element_size() <= MAPPED_ANEW


def channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the layout in which convolutions run, and in their dtype: what enters a network comes in neither."""
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose running statistics can be left alone in train mode.

    With `update_stats` false, train mode normalises by the batch's own statistics and changes no buffer. `momentum` may
    be a 0-d tensor where `silu` is used: what is captured or compiled then sees it change.
    """

    update_stats = True

    def forward(self, x: Tensor) -> Tensor:
        """x: N x channels x H x W."""
        if self.training and not self.update_stats:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return super().forward(x)

    def silu(
        self, x: Tensor, residual: Tensor | None = None, pad: Pad = (0, 0, 0, 0), give_h: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(pad(SiLU(BN(h))), h if `give_h`) for h = x + residual, in few passes over memory; pad as in `bn_silu`."""
        assert self.momentum is not None and self.num_batches_tracked is not None
        frozen = self.training and not self.update_stats
        running = (None, None) if frozen else (self.running_mean, self.running_var)
        if self.training and not frozen:
            self.num_batches_tracked.add_(1)
        result = bn_silu(
            x, self.weight, self.bias, *running, training=self.training, momentum=self.momentum, eps=self.eps,
            residual=residual, pad=pad, give_h=give_h,
        )  # fmt: skip
        return result.out, result.h

    def folded_into(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(weight, bias) of the convolution that, in eval mode, is this layer after one with `weight` and no bias.

        weight: channels x ... -> gain / sqrt(var + eps) * weight, beta - mean * gain / sqrt(var + eps).
        """
        assert self.running_var is not None and self.running_mean is not None
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return weight * scale.view(-1, 1, 1, 1), self.bias - self.running_mean * scale


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


class Ready(NamedTuple):
    """What a layer with spectral norm works with: y = factor * (weight applied to x) + bias."""

    weight: Tensor
    factor: Tensor | None = None  # 1 / sigma for each image, N; None: the weight is W / sigma already


class SpectralNorm(nn.Module):
    """Base of layers that use W / sigma, sigma = u^T W v, W flattened to (out, rest).

    In train mode every forward first makes one power iteration, v = W^T u, u = W v (normalised, eps 1e-12), also under
    no_grad; u and v are constants in backward, sigma is differentiated through W. (Miyato et al. 2018; spec 1.2.)
    """

    weight: nn.Parameter
    u: Tensor
    v: Tensor
    _ready: Ready | None = None

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
        return self._given().weight

    def _given(self) -> Ready:
        return Ready(_normalised([self])[0]) if self._ready is None else self._ready


def spectral_layers(module: nn.Module) -> list[SpectralNorm]:
    """Every layer with spectral norm of a network, in the order of `modules()`."""
    return [m for m in module.modules() if isinstance(m, SpectralNorm)]


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
    layers = spectral_layers(module)
    with _given_ready(layers, [Ready(weight) for weight in _normalised(layers, lookups)]):
        yield


@contextmanager
def normalised_per_call(
    module: nn.Module, sizes: Sequence[int], lookups: Mapping[SpectralNorm, Sequence[int]]
) -> Iterator[dict[SpectralNorm, list[Tensor]]]:
    """Inside, one forward of `module` on the images of several calls is what these calls would give one by one.

    The weights stay as they are, and the part of call k, sizes[k] images, is divided by the sigma that call k would
    have had: one power iteration for each call. lookups: layers that make lookups[layer][k] iterations in call k; these
    apply no sigma by themselves. Yields {layer: [sigmas of call k, ...]} of those.
    """
    layers = spectral_layers(module)
    counts = [list(lookups.get(layer, [1] * len(sizes))) for layer in layers]
    sigmas = spectral_sigmas(
        [layer.weight for layer in layers],
        [layer.u for layer in layers],
        [layer.v for layer in layers],
        iterations=[sum(n) if layer.training else 0 for layer, n in zip(layers, counts, strict=True)],
    )
    of_call = [
        list(sigma.split(n)) if layer.training else [sigma] * len(n)
        for layer, sigma, n in zip(layers, sigmas, counts, strict=True)
    ]
    own = [i for i, layer in enumerate(layers) if layer not in lookups]
    per_image = torch.cat(  # own layers x images: one row for each layer
        [torch.stack([of_call[i][k][0] for i in own]).reciprocal()[:, None].expand(-1, n) for k, n in enumerate(sizes)],
        dim=1,
    )
    ready = [Ready(layers[i].weight, factor) for i, factor in zip(own, per_image, strict=True)]
    with _given_ready([layers[i] for i in own], ready):
        yield {layer: of_call[i] for i, layer in enumerate(layers) if layer in lookups}


@contextmanager
def _given_ready(layers: Sequence[SpectralNorm], ready: Sequence[Ready]) -> Iterator[None]:
    for layer, given in zip(layers, ready, strict=True):
        layer._ready = given
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
        given = self._given()
        return self._convolved(x, given.weight, given.factor, stride=1, padding=self.weight.shape[-1] // 2)

    def pooled(self, x: Tensor, as_one: bool) -> Tensor:
        """avgpool2(self(x)) of a 3 x 3 layer, N x channels_out x H/2 x W/2.

        as_one: by one 4 x 4 convolution of stride 2, whose weight is a quarter of the sum of four shifts of W: half the
        FLOPs, the same to rounding (performance.md 1.1, row 5).
        """
        if not as_one:
            return F.avg_pool2d(self(x), 2)
        given = self._given()
        w4 = F.avg_pool2d(given.weight, 2, stride=1, padding=1)
        return self._convolved(x, w4, given.factor, stride=2, padding=1)

    def _convolved(self, x: Tensor, weight: Tensor, factor: Tensor | None, stride: int, padding: int) -> Tensor:
        if factor is None:
            return conv2d(x, weight, self.bias, stride, padding)
        y = conv2d(x, weight, None, stride, padding)
        return (y * factor.view(-1, 1, 1, 1) + self.bias.view(-1, 1, 1)).to(y.dtype)


class SNLinear(SpectralNorm):
    """Linear layer with bias and spectral norm."""

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__(features_out, features_in)
        nn.init.xavier_uniform_(self.weight)
        bound = 1 / features_in**0.5
        self.bias = nn.Parameter(torch.empty(features_out).uniform_(-bound, bound))

    def forward(self, h: Tensor) -> Tensor:
        """h: N x features_in -> N x features_out."""
        weight, factor = self._given()
        if factor is None:
            return F.linear(h, weight, self.bias)
        return F.linear(h, weight) * factor[:, None] + self.bias


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


@contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Inside, a network runs as it is written: for batches of many sizes, each of which would be compiled anew."""
    before = [(m, m.compiled) for m in module.modules() if isinstance(m, Compiled)]
    for m, _ in before:
        m.compiled = None
    try:
        yield
    finally:
        for m, compiled in before:
            m.compiled = compiled


@contextmanager
def frozen_weights(module: nn.Module) -> Iterator[None]:
    """Inside, no parameter of the network requires a gradient, and so a compiled backward computes none."""
    before = [(p, p.requires_grad) for p in module.parameters()]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for p, requires_grad in before:
            p.requires_grad_(requires_grad)
