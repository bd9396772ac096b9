"""puat-fast: robust image classifiers by PUAT, fast.

    import puat_fast
    config = puat_fast.Config.preset("paper", dataset="cifar100", data_dir="~/data")
    run = puat_fast.Trainer(config).fit()
    model = puat_fast.load_classifier(run.path)   # images in [0,1], N x 3 x 32 x 32 -> logits
    puat_fast.attacks.pgd(model, x, y, eps=8/255, step_size=2/255, num_steps=20)

Importing this package is cheap: torch is imported when Trainer, load_classifier or attacks are first used.
"""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from puat_fast.config import Config, ConfigError

if TYPE_CHECKING:
    from puat_fast import attacks
    from puat_fast.checkpoint import load_classifier
    from puat_fast.engine.trainer import Trainer

# Torch's threads spin only briefly before they sleep: as fast on an idle machine, and not halted by a busy one. Read
# when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

try:
    __version__ = version("puat-fast")
except PackageNotFoundError:  # a source folder that was never installed
    __version__ = "0+not.installed"

__all__ = ["Config", "ConfigError", "Trainer", "__version__", "attacks", "load_classifier"]

_LAZY = {
    "Trainer": "puat_fast.engine.trainer",
    "load_classifier": "puat_fast.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name == "attacks":
        return importlib.import_module("puat_fast.attacks")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'puat_fast' has no attribute {name!r}")
