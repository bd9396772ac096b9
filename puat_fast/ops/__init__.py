"""Ops: tensors in, tensors out, each with a plain-torch reference. They know no networks."""

from puat_fast.ops._library import reference_only
from puat_fast.ops.bn_silu import BnSilu, bn_silu, update_running_stats
from puat_fast.ops.pgd_step import pgd_step, pgd_step_

__all__ = ["BnSilu", "bn_silu", "pgd_step", "pgd_step_", "reference_only", "update_running_stats"]
