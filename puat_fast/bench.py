"""`puat-fast bench`: the scripts of benchmarks/, run in this process."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from puat_fast.config import ConfigError

SCRIPTS = {
    "step": "the training step: the official code's and ours, by preset, engine and precision",
    "ops": "every fused op against plain torch and torch.compile",
    "conv": "the networks' convolutions as they are run: TFLOP/s by shape, direction and precision",
    "loader": "the loaders: images/s alone and under a training step, memory, start-up",
    "attacks": "AutoAttack: pyautoattack's and ours on one classifier, time and accuracy by attack",
}
_NAMES = "\n".join(f"  {name:8}{what}" for name, what in SCRIPTS.items())
HELP = f"""\
names:
{_NAMES}

The options of each are told by `puat-fast bench NAME --help`, with the keys of the JSON that --json FILE writes.
All take --device, --tiny, --rounds, --warmup, --threads, --out, --name and --json."""


def folder() -> Path:
    """Where the scripts are: inside of the installed package, or beside it in the source tree. Raises ConfigError."""
    here = Path(__file__).parent
    for found in (here / "benchmarks", here.parent / "benchmarks"):
        if (found / "bench_step.py").exists():
            return found
    raise ConfigError(f"bench: the scripts are not in {here}; install puat-fast anew")


def run(name: str, arguments: Sequence[str]) -> None:
    """Do what `python benchmarks/bench_NAME.py ARGUMENTS` does. Raises ConfigError, and SystemExit as argparse does."""
    if name not in SCRIPTS:
        raise ConfigError(f"bench: {name!r} is not one of {', '.join(SCRIPTS)}")
    scripts, argv = str(folder()), sys.argv
    sys.path.insert(0, scripts)  # where they look for each other
    sys.argv = [f"puat-fast bench {name}", *arguments]
    try:
        importlib.import_module(f"bench_{name}").main()
    finally:
        sys.argv = argv
        sys.path.remove(scripts)
