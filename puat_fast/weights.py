"""State dicts of our WRN, as others save them: where in a file they are, and of which network they are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from puat_fast.config import Config, DatasetName
from puat_fast.networks.classifier import Classifier

Triple = tuple[float, float, float]

ROBUSTBENCH: dict[str, tuple[Triple, Triple]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
"""mean and std of RobustBench's DMWideResNet, and DMAT's, whose svhn has 0.5 throughout."""

_FIRST = "init_conv.weight"


@dataclass(frozen=True)
class Weights:
    """A state dict under our names, the WRN-depth-width that it is of, and mean and std where it holds them."""

    depth: int
    width: int
    num_classes: int
    state: dict[str, Tensor]
    mean: Triple | None = None
    std: Triple | None = None


def recognise(content: Any) -> Weights:
    """The weights in what a file holds: a state dict, bare or under any key of a dict, behind any prefix.

    RobustBench's key is `state_dict`; DMAT's `model_state_dict` holds the averaged weights, which it evaluates, and is
    taken before its `unaveraged_model_state_dict`. Several others are refused, as the choice is not ours. A prefix
    (`module.`, `module.0.`, `model.`) is whatever stands before `init_conv.weight`. Depth, width and number of classes
    come from the shapes, and every tensor is checked. Raises ValueError, naming the first key that is missing,
    unexpected or of another shape.
    """
    state = _unprefixed(_find(content))
    mean, std = (_triple_of(state, name) for name in ("mean", "std"))
    depth, width, num_classes = _sizes(state)
    with torch.device("meta"):
        expected = Classifier(num_classes, depth, width).state_dict()
    for name in expected:
        if name.endswith("num_batches_tracked"):  # nobody reads it, and averaged weights may lack it
            state.setdefault(name, torch.tensor(0))
    _check(state, expected, f"WRN-{depth}-{width} of {num_classes} classes")
    return Weights(depth, width, num_classes, state, mean, std)


def triple(name: str, values: Sequence[float]) -> Triple:
    """mean or std as three floats. Raises ValueError."""
    try:
        a, b, c = map(float, values)
    except (TypeError, ValueError):
        a = b = c = math.nan
    if not all(map(math.isfinite, (a, b, c))) or (name == "std" and min(a, b, c) <= 0):
        above = ", each above 0" if name == "std" else ""
        raise ValueError(f"{name}: {values!r} is not a list of 3 numbers{above}")
    return a, b, c


def usual_constants() -> str:
    """The mean and std that are in use, by dataset, as one line."""
    rows: dict[tuple[Triple, Triple], list[str]] = {}
    for dataset in get_args(DatasetName):
        data = Config.from_dict(Config.preset_values("paper", dataset, "puat")).data
        rows.setdefault((data.mean, data.std), []).append(dataset)
    for dataset, both in ROBUSTBENCH.items():
        rows.setdefault(both, []).append(f"{dataset} in RobustBench and DMAT")
    return "; ".join(f"{', '.join(names)}: {_text(mean)} and {_text(std)}" for (mean, std), names in rows.items())


def _text(values: Triple) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _find(content: Any) -> dict[str, Tensor]:
    """The one state dict with an `init_conv.weight` in it."""
    found = dict(_candidates(content))
    if not found:
        keys = [str(key) for key in content] if isinstance(content, Mapping) else [type(content).__name__]
        seen = ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
        raise ValueError(f"no {_FIRST} in it, so it is no state dict of a DMWideResNet; it holds: {seen or 'nothing'}")
    if "model_state_dict" in found:
        found.pop("unaveraged_model_state_dict", None)
    if len(found) > 1:
        names = ", ".join(name or "its own keys" for name in found)
        raise ValueError(f"several state dicts in it: {names}; save the one to be used alone")
    return next(iter(found.values()))


def _candidates(content: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What may be meant: the content itself, under the name "", and the dicts in it."""
    if not isinstance(content, Mapping):
        return
    for name, value in (("", content), *((str(key), value) for key, value in content.items())):
        if isinstance(value, Mapping):
            tensors = {str(key): tensor for key, tensor in value.items() if isinstance(tensor, Tensor)}
            if any(key.endswith(_FIRST) for key in tensors):
                yield name, tensors


def _unprefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefixes = [key.removesuffix(_FIRST) for key in tensors if key.endswith(_FIRST)]
    if len(prefixes) > 1:
        raise ValueError(f"several networks in it: {', '.join(prefixes)}; save the one to be used alone")
    names = {key: key.removeprefix(prefixes[0]) for key in tensors if key != "n_averaged"}  # of torch's AveragedModel
    outside = [key for key in names if not key.startswith(prefixes[0])]
    if outside:  # as of a layer before the network, that normalises: what the network sees would not be known
        raise ValueError(f"unexpected {outside[0]}, beside a network whose keys start with {prefixes[0]}")
    return {name: tensors[key] for key, name in names.items()}


def _triple_of(state: dict[str, Tensor], name: str) -> Triple | None:
    """Takes a buffer `mean` or `std` out of the state dict: some versions of DMWideResNet save them."""
    if name not in state:
        return None
    # seven digits are what float32 holds: 0.4914 again, and not 0.49140000343
    return triple(name, [float(f"{value:.7g}") for value in state.pop(name).flatten().tolist()])


def _sizes(state: dict[str, Tensor]) -> tuple[int, int, int]:
    """depth, width, number of classes."""
    blocks = {match[1] for key in state if (match := re.match(r"layer\.0\.block\.(\d+)\.", key))}
    last = state.get("logits.weight")
    if not blocks or last is None:
        raise ValueError(f"missing {'layer.0.block.0.conv_0.weight' if not blocks else 'logits.weight'}")
    if last.dim() != 2 or 0 in last.shape or last.shape[1] % 64:
        raise ValueError(f"logits.weight: shape {tuple(last.shape)}, expected K x 64 width")
    return 6 * len(blocks) + 4, last.shape[1] // 64, last.shape[0]


def _check(state: dict[str, Tensor], expected: dict[str, Tensor], network: str) -> None:
    for name, like in expected.items():
        if name not in state:
            raise ValueError(f"missing {name}, of {network}")
        tensor = state[name]
        if tensor.shape != like.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(like.shape)}, of {network}")
        if tensor.is_floating_point() != like.is_floating_point():
            raise ValueError(f"{name}: {tensor.dtype}, expected {like.dtype}")
    for name in state:
        if name not in expected:
            raise ValueError(f"unexpected {name}, not of {network}")
