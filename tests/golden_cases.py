"""Golden files of the official code (tests/golden/README.md), and the tiny networks they were computed with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puat_fast.config import Config
from puat_fast.data.batch import DiscBatch, SemiBatch
from puat_fast.engine.step import Engine
from puat_fast.networks import Networks
from puat_fast.testing import RecordedNoise, as_images, load_official, official_arrays

SHARED = Path(__file__).parents[2] / "shared" / "golden"
COPY = Path(__file__).parent / "golden"

# Conv biases that feed a train-mode BatchNorm have a true gradient of zero, which Adam turns into noise (spec 5.2, 5).
NOISE_BIASES = {
    "G": {f"blocks.{i}.{layer}.bias" for i in range(3) for layer in ("conv1", "conv2", "shortcut")},
    "A": {"blocks.0.conv1.bias", "blocks.1.conv1.bias"},
}


class Golden(Mapping[str, Mapping[str, np.ndarray]]):
    """The files by name; ../shared/golden where it is there, the copy in the repository else."""

    def __getitem__(self, name: str) -> Mapping[str, np.ndarray]:
        return _load((SHARED if SHARED.is_dir() else COPY) / f"{name}.npz")

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in COPY.glob("*.npz"))

    def __len__(self) -> int:
        return len(list(COPY.glob("*.npz")))


@cache
def _load(path: Path) -> Mapping[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def tiny_config(**overrides: Any) -> Config:
    """official-v1 with the sizes of 00_nets.npz: K = 3, WRN-10-1, G and D of width 8, z_dim 8."""
    values: dict[str, Any] = {
        "dataset": "cifar10",
        "data": {"mean": [0.49, 0.48, 0.45], "std": [0.2, 0.19, 0.21], "mix_frac": 0.7, "n_labelled": 30},
        "classifier": {"depth": 10, "width": 1},
        "gan": {"width": 8, "z_dim": 8},
        "loss": {"gamma": 0.03},
        "augment": {"crop_pad": 0, "flip": False},
        "schedule": {"batch_size": 6, "n_disc": 1},
    }
    from puat_fast.config import merge

    merge(values, overrides)
    return Config.preset("official-v1", **values)


def tiny_networks(config: Config, noise: RecordedNoise) -> Networks:
    """Networks with the golden weights; C' is a copy of C."""
    nets = Networks.build(config, 3, noise)
    arrays = Golden()["00_nets"]
    for name in ("C", "G", "D", "A"):
        load_official(getattr(nets, name), name, arrays, f"{name}.")
    nets.C_ema.load_state_dict(nets.C.state_dict())
    return nets


def tiny_engine(
    dtype: torch.dtype, draws: Mapping[str, list[np.ndarray]], engine: str = "eager", **overrides: Any
) -> Engine:
    """An engine on the tiny networks, official-v1, in stage 2 at its first step.

    engine "compiled": with every exact short cut, less torch.compile itself.
    """
    config = tiny_config(engine=engine, fast={"compile": False}, **overrides)
    noise = RecordedNoise(draws, dtype=dtype)
    built = Engine(config, tiny_networks(config, noise), noise, steps_per_epoch=196)
    built.begin_stage2()
    return built


def disc_batch(case: Mapping[str, np.ndarray], dtype: torch.dtype) -> DiscBatch:
    """x_l, y_l, x_u, x_u_d of a case (images that it lacks are None)."""

    def images(name: str) -> Any:
        return as_images(case[name], dtype) if name in case else None

    return DiscBatch(x_l=images("x_l"), y_l=torch.from_numpy(case["y_l"]), x_u=images("x_u"), x_ud=images("x_u_d"))


def semi_batch(case: Mapping[str, np.ndarray], dtype: torch.dtype) -> SemiBatch:
    """x_l, y_l, x_u of a case."""
    b = disc_batch(case, dtype)
    return SemiBatch(x_l=b.x_l, y_l=b.y_l, x_u=b.x_u)


def close(actual: Any, expected: Any, dtype: torch.dtype, rtol32: float = 1e-4, atol32: float = 1e-6) -> None:
    """assert_close at the tolerances of tests/golden/README.md: float64 1e-6 / 1e-9, float32 losses 1e-4."""
    actual = torch.as_tensor(actual).detach().double()
    expected = torch.as_tensor(np.asarray(expected)).double()
    rtol, atol = (1e-6, 1e-9) if dtype == torch.float64 else (rtol32, atol32)
    torch.testing.assert_close(actual, expected.reshape(actual.shape), rtol=rtol, atol=atol)


def arrays_of(net: str, case: Mapping[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """The recorded tensors under a prefix by our names, less the biases whose gradient is round-off."""
    skip = NOISE_BIASES.get(net, set())
    return {name: a for name, a in official_arrays(net, case, prefix).items() if name not in skip}
