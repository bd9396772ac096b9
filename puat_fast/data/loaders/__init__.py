"""Loaders: each offers `next_step(n_disc) -> StepBatch`, and all of them the same batches, bit for bit (base.py).

No code here: in this module the name `torch` is that of the loader, once it is imported.
"""

from puat_fast.data.loaders.base import BaseLoader, Loader
from puat_fast.data.loaders.make import KINDS, choose, make_loader
from puat_fast.data.loaders.plan import Augmentation

__all__ = ["KINDS", "Augmentation", "BaseLoader", "Loader", "choose", "make_loader"]
