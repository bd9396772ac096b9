"""The BatchNorm buffers of the teacher C'. Its parameters follow those of C in C's own updates: optim.SGD."""

from __future__ import annotations

import torch
from torch import Tensor

from puat_fast.networks import Classifier
from puat_fast.networks.layers import batch_norms

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@torch.no_grad()
def average_bn(C_ema: Classifier, C: Classifier, decay: float | Tensor) -> None:
    """`ema.bn=average`: the running statistics follow C's by the same moving average as the parameters."""
    for norm_ema, norm in zip(batch_norms(C_ema), batch_norms(C), strict=True):
        for name in ("running_mean", "running_var"):
            getattr(norm_ema, name).mul_(decay).add_((1 - decay) * getattr(norm, name))


@torch.no_grad()
def copy_bn(C_ema: Classifier, C: Classifier) -> None:
    """`ema.bn=copy`: the teacher's running statistics become those of C."""
    for norm_ema, norm in zip(batch_norms(C_ema), batch_norms(C), strict=True):
        for name in BUFFERS:
            getattr(norm_ema, name).copy_(getattr(norm, name))


def share_bn(C_ema: Classifier, C: Classifier) -> None:
    """`ema.bn=shared` (official-v1, a bug): from now on both networks hold the same buffer tensors (spec 5.3 b)."""
    for norm_ema, norm in zip(batch_norms(C_ema), batch_norms(C), strict=True):
        for name in BUFFERS:
            setattr(norm_ema, name, getattr(norm, name))


@torch.no_grad()
def unshare_bn(C_ema: Classifier) -> None:
    """Give the teacher buffers of its own again, with the same values: stage 2 starts so."""
    for norm_ema in batch_norms(C_ema):
        for name in BUFFERS:
            setattr(norm_ema, name, getattr(norm_ema, name).clone())


def bn_is_shared(C_ema: Classifier, C: Classifier) -> bool:
    """Whether share_bn is in force."""
    return next(batch_norms(C_ema)).running_mean is next(batch_norms(C)).running_mean
