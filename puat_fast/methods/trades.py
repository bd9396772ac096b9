"""TRADES and the two published variants of it that the paper's baselines build on (spec 2).

Only the loss is here; the baselines as methods of the engine are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from puat_fast import objectives as L
from puat_fast.attacks.pgd import ascend, attack_loss, gauss_start, uniform_start
from puat_fast.networks import Classifier
from puat_fast.networks.layers import eval_mode, frozen_running_stats
from puat_fast.noise import Noise


@dataclass(frozen=True)
class Version:
    """How one code base runs the inner maximisation and the outer forwards."""

    init: Literal["gauss", "uniform"]
    eps: float
    step_size: float
    attack_bn: Literal["eval", "train_frozen"]
    forwards: Literal["x,adv,x", "adv,x", "x,adv"]  # order, and number, of the train-mode forwards of the outer loss


VERSIONS = {
    "trades": Version("gauss", 0.031, 0.007, "eval", "x,adv,x"),  # three running-statistics updates
    "rst": Version("gauss", 0.031, 0.007, "eval", "adv,x"),
    "dm": Version("uniform", 8 / 255, 2 / 255, "train_frozen", "x,adv"),  # DM-Improves-AT: the recommended one
}


def trades_loss(
    C: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    beta: float,
    noise: Noise,
    version: str = "dm",
    label_smoothing: float = 0.0,
    num_steps: int = 10,
) -> Tensor:
    """CE_s(C(x), y) + beta mean_b KL(p_C(x) || p_C(x_adv)), x_adv by PGD on the same KL (Zhang et al. 2019).

    x: N x 3 x 32 x 32 in [0,1], y: N. C is in train mode before and after.
    """
    v = VERSIONS[version]
    start = gauss_start(x, noise) if v.init == "gauss" else uniform_start(x, v.eps, noise)
    with eval_mode(C) if v.attack_bn == "eval" else frozen_running_stats(C):
        inner = attack_loss("kl", y, C(x))
        x_adv = ascend(C, x, start, inner, eps=v.eps, step_size=v.step_size, num_steps=num_steps)
    if v.forwards == "adv,x":
        logits_adv = C(x_adv)
        return L.trades(C(x), logits_adv, y, beta, label_smoothing)
    logits = C(x)
    logits_adv = C(x_adv)
    if v.forwards == "x,adv":
        return L.trades(logits, logits_adv, y, beta, label_smoothing)
    return L.cross_entropy(logits, y, label_smoothing) + beta * L.kl_divergence(C(x), logits_adv)
