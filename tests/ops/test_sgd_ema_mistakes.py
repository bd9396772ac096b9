"""What sgd_ema_ and adam_ refuse, and in which words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from puat_fast.ops import adam_, sgd_ema_
from puat_fast.ops._layout import capsules
from puat_fast.ops._native import _C

each_op = pytest.mark.parametrize("op", ["sgd", "adam"])
SGD_LISTS = ("params", "grads", "momentum_buffers", "emas")
ADAM_LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs")
ZEROS = torch.zeros(2, 3)
SGD_MISTAKES = [
    ({"params": [ZEROS.bfloat16()]}, r"params\[0\]: expected dtype torch.float32 or torch.float64, got torch.bfloat16"),
    ({"params": [ZEROS, ZEROS]}, "grads: expected 2 entries, got 1"),
    ({"grads": [torch.zeros(3, 2)]}, r"grads\[0\]: expected torch.float32, shape \(2, 3\), .*got .*\(3, 2\)"),
    ({"grads": [ZEROS.double()]}, r"grads\[0\]: expected torch.float32, .*got torch.float64"),
    ({"grads": [torch.zeros(2, 3, device="meta")]}, r"grads\[0\]: expected .* on cpu .*on meta"),
    ({"momentum_buffers": [ZEROS[0]]}, r"momentum_buffers\[0\]: expected .*, got .*\(3,\)"),
    ({"emas": []}, "emas: expected 1 entries, got 0"),
    ({"emas": [ZEROS.bfloat16()]}, r"emas\[0\]: expected torch.float32"),
    ({"copies": [ZEROS]}, r"copies\[0\]: expected torch.bfloat16, .*got torch.float32"),
    ({"copies": []}, "copies: expected 1 entries, got 0"),
    ({"weight_decays": []}, "weight_decays: expected 1 entries, got 0"),
    ({"weight_decays": [-1.0]}, "weight_decays: expected finite numbers >= 0, got -1.0"),
    ({"lr": math.nan}, "lr: expected a finite number >= 0 .*, got nan"),
    ({"lr": torch.zeros(1)}, "lr: expected a 0-d tensor, torch.float32, on cpu, got 1-d"),
    ({"lr": torch.zeros((), dtype=torch.float64)}, "lr: expected a 0-d tensor, torch.float32, .*torch.float64"),
    ({"momentum": 1.5}, "momentum: expected a finite number >= 0 and <= 1, got 1.5"),
    ({"ema_decay": -0.5}, "ema_decay: .*got -0.5"),
    ({"ema_decay": None}, "ema_decay: expected a number or a tensor, as emas are given, got None"),
    ({"impl": "triton"}, "impl: expected 'auto' or 'reference', got 'triton'"),
]
ADAM_MISTAKES = [
    ({"params": [ZEROS.half()]}, r"params\[0\]: expected dtype"),
    ({"exp_avgs": [ZEROS[:1]]}, r"exp_avgs\[0\]: expected .*, got .*\(1, 3\)"),
    ({"exp_avg_sqs": []}, "exp_avg_sqs: expected 1 entries, got 0"),
    ({"steps": []}, "steps: expected 1 entries, got 0"),
    ({"steps": [torch.zeros(1)]}, r"steps\[0\]: expected a 0-d tensor, torch.float32, on cpu, got 1-d"),
    ({"steps": [torch.tensor(1)]}, r"steps\[0\]: expected a 0-d tensor, torch.float32, on cpu, got 0-d, torch.int64"),
    ({"lr": -1.0}, "lr: expected a finite number >= 0 .*, got -1.0"),
    ({"betas": (0.9, 1.0)}, r"betas\[1\]: expected a number below 1, got 1.0"),
    ({"betas": (-0.1, 0.9)}, "betas: expected finite numbers >= 0, got -0.1"),
    ({"betas": (0.9,)}, "betas: expected 2 entries, got 1"),
    ({"eps": math.inf}, "eps: expected finite numbers >= 0, got inf"),
    ({"impl": "fast"}, "impl: expected 'auto' or 'reference', got 'fast'"),
]


@pytest.mark.parametrize(("change", "message"), SGD_MISTAKES)
def test_mistakes_of_sgd_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {name: [torch.zeros(2, 3)] for name in SGD_LISTS}
    arguments |= {"lr": 0.1, "momentum": 0.9, "weight_decays": [0.0], "ema_decay": 0.5}
    with pytest.raises(ValueError, match=message):
        sgd_ema_(**(arguments | change))


@pytest.mark.parametrize(("change", "message"), ADAM_MISTAKES)
def test_mistakes_of_adam_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {name: [torch.zeros(2, 3)] for name in ADAM_LISTS}
    arguments |= {"steps": [torch.zeros(())], "lr": 0.1, "betas": (0.5, 0.9)}
    with pytest.raises(ValueError, match=message):
        adam_(**(arguments | change))


@pytest.mark.parametrize("name", ["grads", "momentum_buffers", "emas"])
def test_partial_overlap_is_refused(name: str) -> None:
    buffer = torch.rand(11)
    arguments: dict[str, Any] = {other: [torch.rand(10)] for other in SGD_LISTS}
    arguments |= {"params": [buffer[:10]], name: [buffer[1:]]}
    with pytest.raises(ValueError, match=rf"{name}\[0\]: expected memory apart from that of params\[0\]"):
        sgd_ema_(**arguments, lr=0.1, momentum=0.9, weight_decays=[0.0], ema_decay=0.5)


def extension_arguments(op: str) -> dict[str, Any]:
    def one() -> list[Tensor]:
        return [torch.zeros(3, 4)]

    copies = [torch.zeros(3, 4).bfloat16()]
    if op == "adam":
        lists = {"params": one(), "grads": one(), "exp_avgs": one(), "exp_avg_sqs": one(), "copies": copies}
        rest = {"steps": [torch.ones(())], "lr": torch.zeros(()), "beta1": 0.5, "beta2": 0.9, "eps": 1e-8}
        return lists | rest | {"threads": 1}
    lists = {"params": one(), "grads": one(), "momentum_buffers": one(), "emas": one(), "copies": copies}
    numbers = {name: torch.zeros(()) for name in ("lr", "momentum", "ema_decay")}
    return lists | {"weight_decays": [0.0]} | numbers | {"nesterov": True, "threads": 1}


def call_extension(op: str, arguments: dict[str, Any]) -> None:
    given = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value = capsules(value)[0]
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            value = capsules(*value)
        given[name] = value
    {"sgd": _C.sgd_ema_cpu, "adam": _C.adam_cpu}[op](**given)


BAD_IN_BOTH = [
    ("params", [torch.zeros(3, 4).double()], r"params\[0\]: expected float32, got float64"),
    ("params", [torch.zeros(3, 8)[:, ::2]], r"params\[0\]: expected a tensor without gaps or overlap, got strides"),
    ("params", [], r"expected 0 entries, one for each of params, got 1"),
    ("grads", [torch.zeros(3, 4)] * 2, r"grads: expected 1 entries, one for each of params, got 2"),
    ("grads", [torch.zeros(4, 3)], r"grads\[0\]: expected shape \(3, 4\) \(as params\[0\]\), got \(4, 3\)"),
    ("grads", [torch.zeros(4, 3).t()], r"grads\[0\]: expected strides \(4, 1\) .*, got \(1, 3\)"),
    ("grads", [torch.zeros(3, 4).bfloat16()], r"grads\[0\]: expected float32 .*, got bfloat16"),
    ("copies", [torch.zeros(3, 4)], r"copies\[0\]: expected bfloat16, got float32"),
    ("copies", [torch.zeros(4, 3).bfloat16()], r"copies\[0\]: expected shape"),
    ("copies", [torch.zeros(4, 3).t().bfloat16()], r"copies\[0\]: expected strides"),
    ("copies", [torch.zeros(3, 4).bfloat16()] * 2, "copies: expected 1 entries"),
    ("lr", torch.zeros(2), "lr: expected one element, got 2"),
    ("lr", torch.zeros(()).double(), "lr: expected float32, got float64"),
]
BAD_IN_SGD = [
    ("momentum_buffers", [], "momentum_buffers: expected 1 entries"),
    ("momentum_buffers", [torch.zeros(3, 5)], r"momentum_buffers\[0\]: expected shape"),
    ("emas", [torch.zeros(12)], r"emas\[0\]: expected shape"),
    ("emas", [torch.zeros(3, 4)] * 2, "emas: expected 1 entries"),
    ("weight_decays", [], "weight_decays: expected 1 entries"),
    ("momentum", torch.zeros(0), "momentum: expected one element, got 0"),
    ("ema_decay", torch.zeros(3), "ema_decay: expected one element, got 3"),
]
BAD_IN_ADAM = [
    ("exp_avgs", [torch.zeros(3, 4)] * 2, "exp_avgs: expected 1 entries"),
    ("exp_avg_sqs", [torch.zeros(4, 3).t()], r"exp_avg_sqs\[0\]: expected strides"),
    ("exp_avg_sqs", [], "exp_avg_sqs: expected 1 entries"),
    ("steps", [], "steps: expected 1 entries"),
    ("steps", [torch.zeros(3)], r"steps\[0\]: expected one element, got 3"),
]


@pytest.mark.parametrize(
    ("op", "name", "bad", "message"),
    [("sgd", *case) for case in BAD_IN_BOTH + BAD_IN_SGD] + [("adam", *case) for case in BAD_IN_BOTH + BAD_IN_ADAM],
)
def test_extension_trusts_nobody(op: str, name: str, bad: Any, message: str) -> None:
    arguments = extension_arguments(op)
    call_extension(op, arguments)
    with pytest.raises(ValueError, match=message):
        call_extension(op, arguments | {name: bad})


@each_op
def test_consumed_capsule_is_refused(op: str) -> None:
    consumed = capsules(torch.zeros(3, 4))
    torch.utils.dlpack.from_dlpack(consumed[0])
    with pytest.raises(ValueError, match=r"grads\[0\]: expected a DLPack capsule .*, got 'used_dltensor'"):
        call_extension(op, extension_arguments(op) | {"grads": consumed})
