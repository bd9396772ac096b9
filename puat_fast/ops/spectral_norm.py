"""spectral_norm: W / sigma for all layers of a network at once, after a step of power iteration on each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from puat_fast.ops._layout import capsules, check_dtype, dense_alike, stream_of
from puat_fast.ops._library import Impl, register, takes_reference
from puat_fast.ops._native import _C

_MAX_LAYERS = 32  # kMaxLayers of csrc/spectral_norm.h: what one launch takes


def spectral_norm(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    iterations: Sequence[int],
    per_row: Sequence[bool] | None = None,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> list[Tensor]:
    """W / sigma for each layer, sigma an estimate of W's largest singular value that improves from call to call.

        n times: v <- W^T u / |W^T u|, u <- W v / |W v|        (|.| at least 1e-12)
        sigma = u^T W v

    W counts as the matrix (out, rest) of its logical shape, also where it is channels_last. u and v are updated in
    place, under no_grad too, and are constants in backward, which flows through W alone:

        dW = g / sigma - (<g, W> / sigma^2) u v^T

    with the u, v and sigma of this call, whatever later calls have made of u and v.

    With per_row (official-v1 looks an embedding of K rows up row by row, one iteration each), n = K and row k of the
    result is W_k / sigma_k, sigma_k that after k + 1 iterations; then row i of the gradient is
    dW_i = g_i / sigma_i - sum_k (<g_k, W_k> / sigma_k^2) u^(k)_i v^(k).

    Source: Miyato et al. 2018 (arXiv:1802.05957), algorithm 1, as torch.nn.utils.spectral_norm has it.

    On a GPU all layers share one launch for the iterations, one for the division and one for backward, where W is
    float32 and contiguous or channels_last, u and v contiguous. Nothing is summed in an order that could vary. On the
    CPU plain torch serves: matrix-vector products, which BLAS runs as fast as memory allows. So does it for float64 and
    for other layouts.

    Args:
        weights: one tensor for each layer, each layer once; float32 or float64, out x ..., at least 2 dimensions.
        us: vectors of out elements, like the weights in dtype and device; updated in place.
        vs: vectors of the other dimensions' product, in the order of the logical shape; updated in place.
        iterations: n for each layer; 0 leaves u and v alone (eval mode).
        per_row: for each layer, whether row k is to have the sigma after k + 1 iterations; then n must be the number
            of rows, or 0, where all rows share one sigma. None: no layer.
        dtype: of the results; the weights' own (None), or torch.bfloat16, rounded once.
        impl: "auto", or "reference" for plain torch.

    Returns:
        New tensors like the weights, with the strides of torch.empty_like(weight). Differentiable once in the weights.

    Raises:
        ValueError: lists of unequal length; a dtype, shape or device other than the above; per_row with another number
            of iterations; on a GPU, vectors that share memory; impl unknown.
    """
    per_row = [False] * len(weights) if per_row is None else per_row
    _check(weights, us, vs, iterations, per_row, dtype)
    if takes_reference(impl) or any(weight.dtype == torch.float64 for weight in weights):
        layers = zip(weights, us, vs, iterations, per_row, strict=True)
        return [_reference(*layer).to(dtype or layer[0].dtype) for layer in layers]
    results: list[Tensor] = []
    for first in range(0, len(weights), _MAX_LAYERS):
        part = slice(first, first + _MAX_LAYERS)
        results += _fused(weights[part], us[part], vs[part], iterations[part], per_row[part], dtype)
    return results


def spectral_sigmas(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    iterations: Sequence[int],
    impl: Impl = "auto",
) -> list[Tensor]:
    """The sigma after each of several power iterations: what calls of `spectral_norm`, one iteration each, divide by.

        n times: v <- W^T u / |W^T u|, u <- W v / |W v|, sigma_k = u^T W v        (|.| at least 1e-12)

    So that a convolution with W itself serves several calls at once: the part of call k is divided by sigma_k later.
    u and v are updated in place and constants in backward: dW = sum_k g_k u_k v_k^T.

    Source, arguments, kernels and errors as `spectral_norm`.

    Returns:
        For each layer a vector of max(n, 1) values; of the u and v as they are where n is 0. Differentiable once.
    """
    _check(weights, us, vs, iterations, [False] * len(weights), None)
    if takes_reference(impl) or any(weight.dtype == torch.float64 for weight in weights):
        return [
            torch.stack([torch.dot(u_k, weight.flatten(1) @ v_k) for u_k, v_k in _steps(weight, u, v, n)])
            for weight, u, v, n in zip(weights, us, vs, iterations, strict=True)
        ]
    results: list[Tensor] = []
    for first in range(0, len(weights), _MAX_LAYERS):
        part = slice(first, first + _MAX_LAYERS)
        results += _Sigmas.apply(*weights[part], *_traces(weights[part], us[part], vs[part], iterations[part]))  # type: ignore[no-untyped-call]
    return results


def _fused(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    iterations: Sequence[int],
    per_row: Sequence[bool],
    dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    return _Normalise.apply(per_row, dtype, *weights, *_traces(weights, us, vs, iterations))  # type: ignore[no-untyped-call]


def _traces(
    weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], iterations: Sequence[int]
) -> tuple[Tensor, ...]:
    with torch.no_grad():
        trace = torch.ops.puat_fast.spectral_norm_iterate(weights, us, vs, iterations)
    return trace.split([_trace_size(weight, n) for weight, n in zip(weights, iterations, strict=True)])


class _Sigmas(torch.autograd.Function):
    """The last column of each trace, as a function of W."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        half = len(tensors) // 2
        pairs = zip(tensors[half:], tensors[:half], strict=True)
        return tuple(_split_trace(trace, weight, per_row=True)[2].clone() for trace, weight in pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        half = len(ctx.saved_tensors) // 2
        grad_weights: list[Tensor | None] = [None] * half
        for i, (grad, weight, trace) in enumerate(
            zip(grads, ctx.saved_tensors[:half], ctx.saved_tensors[half:], strict=True)
        ):
            if ctx.needs_input_grad[i]:
                v, u, _ = _split_trace(trace, weight, per_row=True)
                grad_weights[i] = torch.empty_like(weight).copy_(((u.T * grad) @ v).view(weight.shape))
        return *grad_weights, *[None] * half


class _Normalise(torch.autograd.Function):
    """W / sigma. The iterations stand outside: they change u and v, which a compiled Function must not."""

    @staticmethod
    def forward(ctx: Any, per_row: Sequence[bool], dtype: torch.dtype | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.per_row = per_row
        ctx.save_for_backward(*tensors)
        weights, traces = tensors[: len(per_row)], tensors[len(per_row) :]
        return tuple(torch.ops.puat_fast.spectral_norm_scale(weights, traces, per_row, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n = len(ctx.per_row)
        wanted = [i for i in range(n) if ctx.needs_input_grad[2 + i]]
        weights, traces = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        lists = [[items[i] for i in wanted] for items in (grads, weights, traces, ctx.per_row)]
        grad_weights: list[Tensor | None] = [None] * n
        for i, grad_weight in zip(wanted, torch.ops.puat_fast.spectral_norm_backward(*lists), strict=True):
            grad_weights[i] = grad_weight
        return None, None, *grad_weights, *[None] * n


def _check(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    iterations: Sequence[int],
    per_row: Sequence[bool],
    dtype: torch.dtype | None,
) -> None:
    for name, items in (("us", us), ("vs", vs), ("iterations", iterations), ("per_row", per_row)):
        if len(items) != len(weights):
            raise ValueError(f"{name}: expected {len(weights)} of them, one for each weight, got {len(items)}")
    for i, weight in enumerate(weights):
        check_dtype(f"weights[{i}]", weight, torch.float32, torch.float64)
        if weight.dim() < 2 or weight.numel() == 0:
            raise ValueError(f"weights[{i}]: expected out x ... elements, got shape {tuple(weight.shape)}")
        rows, columns = weight.shape[0], _columns(weight)
        for name, tensor, shape in (
            (f"weights[{i}]", weight, tuple(weight.shape)),
            (f"us[{i}]", us[i], (rows,)),
            (f"vs[{i}]", vs[i], (columns,)),
        ):
            for what, expected, got in (
                ("shape", shape, tuple(tensor.shape)),
                ("dtype", weights[0].dtype, tensor.dtype),
                ("device", weights[0].device, tensor.device),
            ):
                if expected != got:
                    raise ValueError(f"{name}: expected {what} {expected}, got {got}")
        if iterations[i] < 0:
            raise ValueError(f"iterations[{i}]: expected >= 0, got {iterations[i]}")
        if per_row[i] and iterations[i] not in (0, rows):
            raise ValueError(f"iterations[{i}]: expected 0 or {rows} (per_row), got {iterations[i]}")
        if dtype not in (None, weight.dtype, torch.bfloat16):
            raise ValueError(f"dtype: expected None, {weight.dtype} or torch.bfloat16, got {dtype}")


# -- plain torch ----------------------------------------------------------------------------------------------------


def _reference(weight: Tensor, u: Tensor, v: Tensor, n: int, per_row: bool) -> Tensor:
    flat, steps = weight.flatten(1), _steps(weight, u, v, n)
    if not per_row:
        u, v = steps[-1]
        return weight / torch.dot(u, flat @ v)
    sigma = torch.stack([torch.dot(u, flat @ v) for u, v in steps])
    return weight / sigma.view(-1, *[1] * (weight.dim() - 1))


def _steps(weight: Tensor, u: Tensor, v: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        return _power_iterations(weight.flatten(1), u, v, n)


def _power_iterations(flat: Tensor, u: Tensor, v: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
    """Copies of (u, v) after each iteration, in which `u` and `v` advance; of the two as they are if there is none."""
    steps = []
    for _ in range(n):
        v.copy_(F.normalize(flat.T @ u, dim=0, eps=1e-12))
        u.copy_(F.normalize(flat @ v, dim=0, eps=1e-12))
        steps.append((u.clone(), v.clone()))
    return steps or [(u.clone(), v.clone())]


# -- the registered ops ---------------------------------------------------------------------------------------------
#
# A layer's trace has a row for each iteration, one if there was none: v, u, sigma, in logical order.


def _columns(weight: Tensor) -> int:
    return math.prod(weight.shape[1:])


def _trace_size(weight: Tensor, n: int) -> int:
    return max(n, 1) * (_columns(weight) + weight.shape[0] + 1)


def _split_trace(trace: Tensor, weight: Tensor, per_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    """v (n x columns), u (n x rows) and sigma (n) of the iterations whose sigma is in use: all, or the last."""
    columns, rows = _columns(weight), weight.shape[0]
    steps = trace.view(-1, columns + rows + 1)[0 if per_row else -1 :]
    return steps[:, :columns], steps[:, columns:-1], steps[:, -1]


def _iterate_reference(weights: list[Tensor], us: list[Tensor], vs: list[Tensor], iterations: list[int]) -> Tensor:
    parts = []
    for weight, u, v, n in zip(weights, us, vs, iterations, strict=True):
        flat = weight.flatten(1)
        for u_n, v_n in _power_iterations(flat, u, v, n):
            parts += [v_n, u_n, torch.dot(u_n, flat @ v_n).view(1)]
    _mark_changed(us, vs, iterations)
    return torch.cat(parts)


def _scale_reference(
    weights: list[Tensor], traces: list[Tensor], per_row: list[bool], dtype: torch.dtype | None
) -> list[Tensor]:
    results = _scale_fake(weights, traces, per_row, dtype)
    for result, weight, trace, rowwise in zip(results, weights, traces, per_row, strict=True):
        _, _, sigma = _split_trace(trace, weight, rowwise)
        torch.div(weight, sigma.view(-1, *[1] * (weight.dim() - 1)), out=result)
    return results


def _backward_reference(
    grads: list[Tensor], weights: list[Tensor], traces: list[Tensor], per_row: list[bool]
) -> list[Tensor]:
    grad_weights = _backward_fake(grads, weights, traces, per_row)
    for out, grad, weight, trace, rowwise in zip(grad_weights, grads, weights, traces, per_row, strict=True):
        v, u, sigma = _split_trace(trace, weight, rowwise)
        g = grad.to(weight.dtype).flatten(1)
        dots = torch.linalg.vecdot(g, weight.flatten(1))
        dots = dots if len(sigma) == len(dots) else dots.sum(0, keepdim=True)
        flat = (g / sigma[:, None]).addmm_((u * (dots / sigma**2)[:, None]).T, v, alpha=-1)
        out.copy_(flat.view_as(out))
    return grad_weights


def _mark_changed(us: list[Tensor], vs: list[Tensor], iterations: list[int]) -> None:
    for u, v, n in zip(us, vs, iterations, strict=True):
        if n and not u.is_inference():
            torch.autograd.graph.increment_version((u, v))


def _in_kernel_layout(weight: Tensor) -> bool:
    """Rows one after another, each without gaps: contiguous, or channels_last."""
    return weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))


def _kernel_takes(weights: list[Tensor], vectors: list[Tensor]) -> bool:
    return (
        hasattr(_C, "spectral_norm_iterate_cuda")
        and all(weight.dtype == torch.float32 and _in_kernel_layout(weight) for weight in weights)
        and all(vector.is_contiguous() for vector in vectors)
    )


def _iterate_cuda(weights: list[Tensor], us: list[Tensor], vs: list[Tensor], iterations: list[int]) -> Tensor:
    if not _kernel_takes(weights, us + vs):
        return _iterate_reference(weights, us, vs, iterations)
    trace = _iterate_fake(weights, us, vs, iterations)
    workspace = torch.empty_like(trace)
    _C.spectral_norm_iterate_cuda(
        *capsules(trace, workspace), capsules(*weights), capsules(*us), capsules(*vs), iterations, stream_of(trace)
    )
    _mark_changed(us, vs, iterations)
    return trace


def _scale_cuda(
    weights: list[Tensor], traces: list[Tensor], per_row: list[bool], dtype: torch.dtype | None
) -> list[Tensor]:
    if not _kernel_takes(weights, traces):
        return _scale_reference(weights, traces, per_row, dtype)
    results = _scale_fake(weights, traces, per_row, dtype)
    if results:
        _C.spectral_norm_scale_cuda(
            capsules(*results), capsules(*weights), capsules(*traces), per_row, stream_of(results[0])
        )
    return results


def _backward_cuda(
    grads: list[Tensor], weights: list[Tensor], traces: list[Tensor], per_row: list[bool]
) -> list[Tensor]:
    if not _kernel_takes(weights, traces):
        return _backward_reference(grads, weights, traces, per_row)
    grad_weights = _backward_fake(grads, weights, traces, per_row)
    if grad_weights:
        grads = [g if dense_alike(w, g) else torch.empty_like(w, dtype=g.dtype).copy_(g)
                 for g, w in zip(grads, weights, strict=True)]  # fmt: skip
        dots = torch.empty(sum(w.shape[0] for w in weights), dtype=torch.float32, device=weights[0].device)
        lists = [capsules(*tensors) for tensors in (grad_weights, grads, weights, traces)]
        _C.spectral_norm_backward_cuda(*capsules(dots), *lists, per_row, stream_of(dots))
    return grad_weights


def _iterate_fake(weights: list[Tensor], us: list[Tensor], vs: list[Tensor], iterations: list[int]) -> Tensor:
    return weights[0].new_empty(sum(_trace_size(w, n) for w, n in zip(weights, iterations, strict=True)))


def _scale_fake(
    weights: list[Tensor], traces: list[Tensor], per_row: list[bool], dtype: torch.dtype | None
) -> list[Tensor]:
    return [torch.empty_like(weight, dtype=dtype) for weight in weights]


def _backward_fake(
    grads: list[Tensor], weights: list[Tensor], traces: list[Tensor], per_row: list[bool]
) -> list[Tensor]:
    return [torch.empty_like(weight) for weight in weights]


register(
    "spectral_norm_iterate(Tensor[] weights, Tensor(a!)[] us, Tensor(b!)[] vs, int[] iterations) -> Tensor",
    cpu=_iterate_reference,
    cuda=_iterate_cuda,
    fake=_iterate_fake,
)
register(
    "spectral_norm_scale(Tensor[] weights, Tensor[] traces, bool[] per_row, ScalarType? dtype) -> Tensor[]",
    cpu=_scale_reference,
    cuda=_scale_cuda,
    fake=_scale_fake,
)
register(
    "spectral_norm_backward(Tensor[] grads, Tensor[] weights, Tensor[] traces, bool[] per_row) -> Tensor[]",
    cpu=_backward_reference,
    cuda=_backward_cuda,
    fake=_backward_fake,
)
