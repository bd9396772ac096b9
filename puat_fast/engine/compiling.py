"""torch.compile of the networks: each network's `core`, forward and backward, without graph breaks."""

from __future__ import annotations

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
"""How many graphs one function may have: train and eval, with and without gradients, frozen, by batch size."""


why_not = info.why_not_compile


def compile_networks(nets: Networks) -> None:
    """Every network's core by torch.compile; it is compiled when it first runs, once for each way in which it is run.

    Shapes are static: a batch of another size is compiled anew. The generated code is cached on disk by torch, so that
    a second run of the same sizes starts at once.
    """
    for _, net in nets.items():
        compile_network(net)


def compile_network(net: Compiled) -> None:
    """One network's core: see `compile_networks`."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MODES_OF_A_NETWORK)
    net.compiled = torch.compile(net._core, fullgraph=True, dynamic=False, options=OPTIONS)
