"""Ops: tensors in, tensors out, each with a plain-torch reference. They know no networks."""

from puat_fast.ops._library import reference_only
from puat_fast.ops.cond_bn_relu_up import cond_bn_relu_up
from puat_fast.ops.pgd_step import pgd_step, pgd_step_

__all__ = ["cond_bn_relu_up", "pgd_step", "pgd_step_", "reference_only"]
