"""Ops: tensors in, tensors out, each with a plain-torch reference. They know no networks."""

from puat_fast.ops._library import reference_only
from puat_fast.ops.pgd_step import pgd_step, pgd_step_
from puat_fast.ops.sgd_ema import adam_, sgd_ema_

__all__ = ["adam_", "pgd_step", "pgd_step_", "reference_only", "sgd_ema_"]
