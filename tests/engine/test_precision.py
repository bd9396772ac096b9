"""`precision`: what is float32 and what bfloat16 in a step on the CPU, the memory layout, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_cases import PRESETS, batch_for, both_stages, compiled, new_engine, run_steps, whole_config
from tiny_cases import run_config, tiny_dataset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from puat_fast.config import Config, ConfigError
from puat_fast.engine import precision
from puat_fast.engine.step import Engine
from puat_fast.engine.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ATTACKER = 16, 32  # channels of A, whose convolutions are float32 always


class Convolutions(TorchDispatchMode):
    """(dtype, shape, strides) of the input and of the weight of each convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.seen.append((args[0].detach(), args[1].detach()))
        return func(*args, **(kwargs or {}))


def settings(engine: str, **overrides: Any) -> Config:
    config = whole_config(schedule={"adv_start": 0}, **overrides)
    return compiled(config) if engine == "compiled" else config


def convolutions_of(engine: Engine) -> list[tuple[Tensor, Tensor]]:
    with Convolutions() as convolutions:
        engine.step(batch_for(engine, 0))
    return convolutions.seen


def is_channels_last(t: Tensor) -> bool:
    """Also of a part of an image: C's shortcuts of stride 2 leave out the row and the column of the padding."""
    return t.is_contiguous(memory_format=torch.channels_last) or t.stride(1) == 1


@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize(("name", "dtype"), [("bf16", BF16), ("fp32", F32), ("fp64", F64), ("auto", F32)])
def test_convolutions(name: str, dtype: torch.dtype, engine: str) -> None:
    """In the dtype, of inputs and of weights; A's are those of its 4 x 4 images."""
    seen = convolutions_of(new_engine(settings(engine, precision=name)))
    of_a = [pair for pair in seen if pair[0].shape[2:] == (4, 4) and set(pair[1].shape[:2]) <= set(ATTACKER)]
    others = [pair for pair in seen if not any(pair is a for a in of_a)]
    assert len(of_a) >= 6 and len(others) > 100
    assert {t.dtype for pair in others for t in pair} == {dtype}
    assert {t.dtype for pair in of_a for t in pair} == {F64 if name == "fp64" else F32}


@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_convolutions_are_channels_last(name: str, engine: str) -> None:
    """Every weight, and every input but images and the first map of G and of A, which come from a loader or a layer."""
    given = set[tuple[int, ...]]()
    for x, weight in convolutions_of(new_engine(settings(engine, precision=name))):
        assert is_channels_last(weight), weight.shape
        if not is_channels_last(x):
            given.add(tuple(x.shape[1:]))
    assert given <= {(3, 32, 32), (3, 16, 16), (8, 4, 4), (8, 8, 8), (16, 4, 4)}, given


@pytest.mark.parametrize("preset", PRESETS)
def test_a_bf16_step_is_near_the_fp32_one(preset: str) -> None:
    """Two steps: losses finite and within a few percent; from then on PGD and Adam follow signs."""
    exact, rounded = (
        new_engine(compiled(whole_config(preset, precision=name, schedule={"adv_start": 0})), stage=1)
        for name in ("fp32", "bf16")
    )
    expected, actual = both_stages(exact, (2, 2)), both_stages(rounded, (2, 2))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            if not name.endswith("_acc"):
                assert ours[name] == pytest.approx(values, rel=0.1, abs=0.02), name
    assert actual != expected


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_what_stays_float32(engine: str) -> None:
    """Masters, gradients, states, statistics, logits, scores, images and losses."""
    ours = new_engine(settings(engine, precision="bf16"))
    seen: dict[str, set[torch.dtype]] = {}

    def note(name: str) -> Any:
        return lambda module, inputs, output: seen.setdefault(name, set()).update(
            t.dtype for t in tree_leaves((inputs, output)) if isinstance(t, Tensor) and t.is_floating_point()
        )

    for name, net in ours.nets.items():
        net.register_forward_hook(note(name))
    ours.on_step = lambda terms: seen.setdefault("terms", set()).update(v.dtype for t in terms.values() for v in t)
    ours.step(batch_for(ours, 0))
    assert set(seen) == {"C", "C_ema", "G", "D", "A", "terms"} and all(dtypes == {F32} for dtypes in seen.values())
    tensors = tree_leaves([ours.state_dict(), [p.grad for _, net in ours.nets.items() for p in net.parameters()]])
    found = {t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()}
    assert found == {F32, F64}  # float64: the sums of Stats
    assert all(t.dtype == F32 for t in tree_leaves(ours.state_dict()["optimizers"]) if isinstance(t, Tensor))


def test_fp64_is_float64_throughout(tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", precision="fp64", pretrain={"epochs": 0})
    trainer = Trainer(config, dataset=tiny_dataset())
    trainer._step()
    floats = [t for _, net in trainer.nets.items() for t in net.state_dict().values() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {F64} and trainer.engine.noise.dtype == F64


def test_tf32_is_of_gpus() -> None:
    with pytest.raises(ConfigError, match="precision: tf32 is of GPUs; accepted on the CPU: auto, fp32, bf16, fp64"):
        new_engine(whole_config(precision="tf32"))


@pytest.mark.parametrize(
    ("asked", "device", "found"),
    [
        ("auto", CPU, "fp32"),
        ("auto", CUDA, "bf16"),
        ("tf32", CUDA, "tf32"),
        ("bf16", CPU, "bf16"),
        ("fp64", CUDA, "fp64"),
    ],
)
def test_names(asked: str, device: torch.device, found: str) -> None:
    assert precision.name(asked, device) == found


@pytest.fixture
def tf32() -> Iterator[None]:
    """torch's switches, given back as they were."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    yield
    cudnn.allow_tf32, matmul.allow_tf32 = before


@pytest.mark.parametrize("asked", ["auto", "bf16", "tf32", "fp32", "fp64"])
def test_tf32_is_allowed_where_it_is_asked_for(asked: str, tf32: None) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn.allow_tf32 = matmul.allow_tf32 = asked != "tf32"
    precision.allow_tf32(asked, CUDA)
    assert cudnn.allow_tf32 == matmul.allow_tf32 == (asked == "tf32")
    assert precision.conv_dtype(asked, CUDA) == (BF16 if asked in ("auto", "bf16") else None)


def test_the_cpu_leaves_tf32_alone(tf32: None) -> None:
    torch.backends.cudnn.allow_tf32 = True
    run_steps(new_engine(whole_config(method="regular")), 1)
    assert torch.backends.cudnn.allow_tf32
