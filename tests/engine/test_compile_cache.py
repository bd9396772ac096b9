"""The generated code is kept on disk: a second run of the same sizes compiles nothing anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, torch
from torch._dynamo.utils import counters
from puat_fast.engine.compiling import compile_network
from puat_fast.networks.layers import Compiled

class Net(Compiled):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(3))

    def _core(self, x):
        return (self.w * x).sin()

net = Net()
compile_network(net)
net.core(torch.ones(2, 3)).sum().backward()
print(json.dumps(dict(counters["inductor"])))
"""


def counters(cache: Path) -> dict[str, int]:
    """What inductor counted in a process of its own."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, cwd=cache)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_second_run_takes_the_code_of_the_first(tmp_path: Path) -> None:
    first, second = counters(tmp_path), counters(tmp_path)
    assert first.get("fxgraph_cache_miss", 0) >= 2 and not first.get("fxgraph_cache_hit")
    assert second.get("fxgraph_cache_hit", 0) >= 2 and not second.get("fxgraph_cache_miss")
