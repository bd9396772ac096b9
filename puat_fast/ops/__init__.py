"""Ops: tensors in, tensors out, each with a plain-torch reference. They know no networks."""

from puat_fast.ops._library import reference_only
from puat_fast.ops.augment import augment
from puat_fast.ops.bn_silu import BnSilu, bn_silu, update_running_stats
from puat_fast.ops.cond_bn_relu_up import cond_bn_relu_up
from puat_fast.ops.hinge import hinge, hinge_by_class
from puat_fast.ops.pgd_step import pgd_step, pgd_step_
from puat_fast.ops.pgd_step_normalize import pgd_step_normalize
from puat_fast.ops.sgd_ema import adam_, sgd_ema_
from puat_fast.ops.smooth_ce import cw_margin, smooth_ce
from puat_fast.ops.softmax_mse import softmax_mse
from puat_fast.ops.spectral_norm import spectral_norm, spectral_sigmas

__all__ = [
    "BnSilu",
    "adam_",
    "augment",
    "bn_silu",
    "cond_bn_relu_up",
    "cw_margin",
    "hinge",
    "hinge_by_class",
    "pgd_step",
    "pgd_step_",
    "pgd_step_normalize",
    "reference_only",
    "sgd_ema_",
    "smooth_ce",
    "softmax_mse",
    "spectral_norm",
    "spectral_sigmas",
    "update_running_stats",
]
