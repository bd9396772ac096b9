"""Ops: tensors in, tensors out, each with a plain-torch reference. They know no networks."""

from puat_fast.ops._library import reference_only
from puat_fast.ops.pgd_step import pgd_step, pgd_step_
from puat_fast.ops.spectral_norm import spectral_norm

__all__ = ["pgd_step", "pgd_step_", "reference_only", "spectral_norm"]
