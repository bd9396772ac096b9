"""The oracle: pyautoattack's attacks, with the settings of its standard version."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

NORMS = {"linf": "Linf", "l2": "L2"}


def reference(name: str, net: nn.Module, x: Tensor, y: Tensor, *, eps: float, norm: str, **options: Any) -> Tensor:
    """x_adv of pyautoattack's attack; options: its attributes, such as n_restarts, seed, n_queries."""
    library = pytest.importorskip("pyautoattack.autoattack", reason="pyautoattack (extra `test`) is not installed")
    suite = library.AutoAttack(net, norm=NORMS[norm], eps=eps, seed=0)
    attack = {"apgd-ce": suite.apgd, "apgd-t": suite.apgd_targeted, "square": suite.square, "fab-t": suite.fab}[name]
    attack.targeted = name == "fab-t"
    for option, value in ({"seed": 0} | options).items():
        setattr(attack, option, value)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return attack.perturb(x, y).detach()


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Of the net on these images, in eval mode."""
    with torch.no_grad():
        return (net(x).argmax(1) == y).double().mean().item()


def distance(a: Tensor, b: Tensor, norm: str) -> Tensor:
    """|a - b| image by image, in float64."""
    delta = (a.double() - b.double()).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
