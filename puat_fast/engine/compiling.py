"""torch.compile of the networks: each network's `core`, forward and backward, without graph breaks."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from puat_fast.networks import Networks

OPTIONS: dict[str, Any] = {
    # Backward graphs hold no forward convolution, and inductor then gives up channels_last (pytorch#189239).
    "force_layout_optimization": True,
}
MODES_OF_A_NETWORK = 32
"""How many graphs one network may have: train and eval, with and without gradients, frozen, by batch size."""
_engines = itertools.count(1)


def why_not() -> str | None:
    """Why torch.compile cannot work here, or None where it can."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:  # torch has a class of its own for it, in a module of no stable name
        return f"no C++ compiler: {' '.join(str(error).split())[:120]}"
    return None


def compile_networks(nets: Networks) -> None:
    """Every network's core by torch.compile; it is compiled when it first runs, once for each way in which it is run.

    Shapes are static: a batch of another size is compiled anew. The generated code is cached on disk by torch, so that
    a second run of the same sizes starts at once.
    """
    config = torch._dynamo.config
    limit = MODES_OF_A_NETWORK * next(_engines)  # dynamo counts by function: those of all engines of the process
    config.recompile_limit = max(config.recompile_limit, limit)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, limit)
    for _, net in nets.items():
        net.compiled = torch.compile(net._core, fullgraph=True, dynamic=False, options=OPTIONS)  # type: ignore[assignment,arg-type]
