"""torch.compile of the networks: each network's `core`, forward and backward, without graph breaks."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch

from puat_fast import info
from puat_fast.networks import Networks
from puat_fast.networks.layers import Compiled

OPTIONS: dict[str, Any] = {
    # Backward graphs hold no forward convolution, and inductor then gives up channels_last (pytorch#189239).
    "force_layout_optimization": True,
}
MODES_OF_A_NETWORK = 32
"""How many graphs one network may have: train and eval, with and without gradients, frozen, by batch size."""
_networks = itertools.count(1)  # that were compiled so far


@functools.cache
def why_not(device_type: str) -> str | None:
    """Why torch.compile cannot work on a device, found by a try, or None where it can."""
    reason = info.why_not_compile()
    if reason is None:
        try:
            torch.compile(torch.sin, fullgraph=True, dynamic=False, options=OPTIONS)(torch.ones(8, device=device_type))
        except Exception as error:  # of compilers, headers, drivers: whatever the toolchain lacks
            reason = " ".join(str(error).split())[:200]
    return reason


def compile_networks(nets: Networks) -> None:
    """Every network's core by torch.compile; it is compiled when it first runs, once for each way in which it is run.

    Shapes are static: a batch of another size is compiled anew. The generated code is cached on disk by torch, so that
    a second run of the same sizes starts in seconds.
    """
    for _, net in nets.items():
        compile_network(net)


def compile_network(net: Compiled, graphs: bool = False) -> None:
    """One network's core: see `compile_networks`.

    graphs: on a GPU, forward and backward of each batch size are CUDA graphs, recorded and replayed by torch itself.
    For attacks, where a network runs thousands of times in few ways; gradients are to be used before the next call.
    """
    config = torch._dynamo.config
    limit = MODES_OF_A_NETWORK * next(_networks)  # dynamo counts by function: all networks of the process together
    config.recompile_limit = max(config.recompile_limit, limit)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, limit)
    options = OPTIONS | ({"triton.cudagraphs": True} if graphs else {})
    net.compiled, net.replayed = torch.compile(net._core, fullgraph=True, dynamic=False, options=options), graphs
