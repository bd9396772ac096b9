"""spectral_sigmas: what several calls of spectral_norm divide by, all at once. Its iterations are spectral_norm's."""

from __future__ import annotations

import importlib
from itertools import chain

import pytest
import torch
from op_checks import (
    NO_CUDA,
    assert_close,
    assert_same_bits,
    check_captured,
    check_compiles,
    check_gradients,
    check_repeats,
    each_device,
)
from torch import Tensor
from torch.nn import functional as F

from puat_fast.ops import reference_only, spectral_norm, spectral_sigmas

module = importlib.import_module("puat_fast.ops.spectral_norm")
F32, F64 = torch.float32, torch.float64
SHAPES = [(1, 1), (1, 70), (37, 1), (5, 3, 3, 3), (37, 5, 3, 3), (13, 11, 1, 1), (64, 64), (4, 33), (3, 2, 5)]
ITERATIONS = [1, 3, 2, 1, 3, 0, 12, 5, 2]

Layers = tuple[list[Tensor], list[Tensor], list[Tensor]]


def layers(shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = F32, device: str = "cpu") -> Layers:
    """Weights, 4-dimensional ones channels_last, us and vs."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    weights = [w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w for w in weights]
    us = [F.normalize(torch.randn(w.shape[0], generator=generator), dim=0) for w in weights]
    vs = [F.normalize(torch.randn(w[0].numel(), generator=generator), dim=0) for w in weights]
    groups = ([t.to(device, dtype) for t in group] for group in (weights, us, vs))
    return tuple(groups)  # type: ignore[return-value]


def copies(groups: Layers, dtype: torch.dtype) -> Layers:
    return tuple([t.detach().to(dtype, copy=True) for t in group] for group in groups)  # type: ignore[return-value]


def everything(groups: Layers, iterations: list[int], **options: str) -> list[list[Tensor]]:
    """Sigmas, gradients of a fixed sum of them, and u and v afterwards."""
    weights, us, vs = copies(groups, groups[0][0].dtype)
    weights = [w.requires_grad_() for w in weights]
    sigmas = spectral_sigmas(weights, us, vs, iterations=iterations, **options)  # type: ignore[arg-type]
    loss = sum((torch.linspace(0.5, 1.5, len(s), dtype=s.dtype, device=s.device) * s).sum() for s in sigmas)
    return [[s.detach() for s in sigmas], list(torch.autograd.grad(loss, weights)), us, vs]


@each_device
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_what_calls_of_spectral_norm_divide_by(dtype: torch.dtype, device: str) -> None:
    """One iteration for each call; u and v end where they do; n = 0 gives the sigma of eval mode."""
    groups = layers(dtype=dtype, device=device)
    ours, theirs = copies(groups, dtype), copies(groups, dtype)
    sigmas = spectral_sigmas(*ours, iterations=ITERATIONS)
    assert [tuple(s.shape) for s in sigmas] == [(max(n, 1),) for n in ITERATIONS]
    for i, (n, sigma) in enumerate(zip(ITERATIONS, sigmas, strict=True)):
        layer = [group[i : i + 1] for group in theirs]
        for k in range(max(n, 1)):
            (divided,) = spectral_norm(*layer, iterations=[min(n, 1)])
            assert_close(divided * sigma[k], layer[0][0], dtype, scale=8)
        for ours_i, theirs_i in zip(ours, theirs, strict=True):
            assert_close(ours_i[i], theirs_i[i], dtype, scale=8)


@each_device
def test_row_k_of_a_lookup_is_divided_by_sigma_k(device: str) -> None:
    groups, again = layers([(4, 33)], device=device), layers([(4, 33)], device=device)
    (sigma,) = spectral_sigmas(*groups, iterations=[4])
    (rows,) = spectral_norm(*again, iterations=[4], per_row=[True])
    assert_close(rows * sigma[:, None], groups[0][0], F32, scale=8)


@each_device
def test_agrees_with_float64(device: str) -> None:
    groups = layers(device=device)
    actual, expected = everything(groups, ITERATIONS), everything(copies(groups, F64), ITERATIONS, impl="reference")
    for ours, theirs in zip(actual, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == F32
            assert_close(a, b, F32, scale=8)


@each_device
def test_float64_and_reference_only_are_the_reference(device: str) -> None:
    groups, single = layers(dtype=F64, device=device), layers(device=device)
    expected = everything(groups, ITERATIONS, impl="reference"), everything(single, ITERATIONS, impl="reference")
    with reference_only():
        inside = everything(single, ITERATIONS)
    for ours, theirs in ((everything(groups, ITERATIONS), expected[0]), (inside, expected[1])):
        for a, b in zip(chain(*ours), chain(*theirs), strict=True):
            assert_same_bits(a, b)


def fused(*args: list[Tensor], iterations: list[int]) -> list[Tensor]:
    return module._Sigmas.apply(*args[0], *module._traces(*args, iterations))


@pytest.mark.parametrize("function", [spectral_sigmas, fused], ids=["reference", "fused"])
def test_gradcheck(function) -> None:
    weights, us, vs = layers([(4, 2, 2, 3), (3, 5)], F64)  # with iterations, u and v are no constants of W
    check_gradients(
        lambda *ws: tuple(function(list(ws), us, vs, iterations=[0, 0])), [w.requires_grad_() for w in weights]
    )


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_gradient_with_iterations_is_the_formula(dtype: torch.dtype) -> None:
    """dW = sum_k g_k u_k v_k^T, with the u and v of iteration k as constants."""
    weights, us, vs = layers([(5, 3, 3, 3)], dtype)
    flat, u, expected = weights[0].flatten(1), us[0].clone(), torch.zeros(5, 27, dtype=dtype)
    for g in (2.0, -3.0, 0.5):
        v = F.normalize(flat.T @ u, dim=0)
        u = F.normalize(flat @ v, dim=0)
        expected += g * torch.outer(u, v)
    (sigma,) = spectral_sigmas([weights[0].requires_grad_()], us, vs, iterations=[3])
    sigma.backward(torch.tensor([2.0, -3.0, 0.5], dtype=dtype))
    assert_close(weights[0].grad, expected.view(5, 3, 3, 3), dtype, scale=8)  # type: ignore[arg-type]


@each_device
def test_gradients_have_the_layout_of_their_weight(device: str) -> None:
    groups = layers(device=device)
    _, grads, _, _ = everything(groups, ITERATIONS)
    assert [g.stride() for g in grads] == [torch.empty_like(w).stride() for w in groups[0]]


@each_device
def test_only_asked_gradients(device: str) -> None:
    weights, us, vs = layers([(3, 4), (5, 6)], device=device)
    weights[1].requires_grad_()
    _, second = spectral_sigmas(weights, us, vs, iterations=[2, 2])
    assert second.requires_grad
    second.sum().backward()
    assert weights[0].grad is None and weights[1].grad is not None


@each_device
def test_no_iteration_leaves_u_and_v(device: str) -> None:
    weights, us, vs = layers([(5, 7)], device=device)
    before = us[0].clone(), vs[0].clone()
    (sigma,) = spectral_sigmas(weights, us, vs, iterations=[0])
    assert torch.equal(us[0], before[0]) and torch.equal(vs[0], before[1])
    assert_close(sigma, (us[0] @ weights[0] @ vs[0]).view(1), F32, scale=8)


@each_device
def test_more_layers_than_a_launch_takes(device: str) -> None:
    groups = layers([(3, 4 + i % 5) for i in range(module._MAX_LAYERS + 3)], device=device)
    iterations = [i % 3 for i in range(len(groups[0]))]
    actual = everything(groups, iterations)
    for ours, theirs in zip(actual, everything(copies(groups, F64), iterations), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, F32, scale=8)


def test_no_layers() -> None:
    assert list(spectral_sigmas([], [], [], iterations=[])) == []


def test_double_backward_is_refused() -> None:
    weights, us, vs = layers([(3, 4)])
    (sigma,) = spectral_sigmas([weights[0].requires_grad_()], us, vs, iterations=[1])
    (grad,) = torch.autograd.grad((sigma**2).sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@each_device
def test_compiles_without_graph_break(device: str) -> None:
    weights, us, vs = layers([(5, 3, 3, 3), (4, 6)], device=device)

    def call(*tensors: Tensor) -> list[Tensor]:
        return spectral_sigmas(tensors[:2], tensors[2:4], tensors[4:], iterations=[3, 2])

    check_compiles(call, [*(w.requires_grad_() for w in weights), *us, *vs])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [torch.zeros(2, 3).half()] * 2}, r"weights\[0\]: expected dtype .*float32.*, got torch.float16"),
        ({"weights": [torch.zeros(2, 3), torch.zeros(3)]}, r"weights\[1\]: expected out x ... elements, got .*\(3,\)"),
        ({"us": [torch.zeros(2), torch.zeros(3)]}, r"us\[1\]: expected shape \(2,\), got \(3,\)"),
        ({"vs": [torch.zeros(3)]}, r"vs: expected 2 of them, one for each weight, got 1"),
        ({"vs": [torch.zeros(3), torch.zeros(3, device="meta")]}, r"vs\[1\]: expected device cpu, got meta"),
        ({"iterations": [1]}, r"iterations: expected 2 of them"),
        ({"iterations": [1, -1]}, r"iterations\[1\]: expected >= 0, got -1"),
        ({"impl": "triton"}, "impl: expected 'auto' or 'reference', got 'triton'"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    arguments = {"weights": [torch.zeros(2, 3) for _ in range(2)], "us": [torch.zeros(2) for _ in range(2)],
                 "vs": [torch.zeros(3) for _ in range(2)], "iterations": [1, 1]}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        spectral_sigmas(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.gpu
@NO_CUDA
class TestCuda:
    def test_captured_graph(self) -> None:
        def inputs(seed: int) -> list[Tensor]:
            torch.manual_seed(seed)
            weights, us, vs = layers(device="cuda")
            return [*(w + torch.randn_like(w) for w in weights), *us, *vs]

        def call(*tensors: Tensor) -> list[Tensor]:
            n = len(SHAPES)
            return spectral_sigmas(tensors[:n], tensors[n : 2 * n], tensors[2 * n :], iterations=ITERATIONS)

        check_captured(call, inputs)

    def test_hundred_repeats(self) -> None:
        groups = layers(device="cuda")
        check_repeats(lambda: list(chain(*everything(groups, ITERATIONS))))
