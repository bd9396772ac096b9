"""What was built and found on this machine, and why a fast path is off. Imports torch only when asked."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

from puat_fast import __version__

KEYS = """\
keys of the JSON file:
  version       of puat-fast
  python        version of the interpreter
  platform      operating system and machine
  cpu           name: of the processor, count: number of cores this process may use
  torch         version, cuda: version torch was built with or null, devices: names of the GPUs, threads: on the CPU
  numpy         version
  native        of the compiled extension puat_fast._C: available, reason it is not or null, build: how it was built
  triton, dali, tensorboard
                version found, or null
  fast_paths    name of each -> on: true or false, why"""


def collect() -> dict[str, Any]:
    """What was built and found, as plain values; `KEYS` documents them."""
    import numpy
    import torch

    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    native = _native()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"name": _cpu_name(), "count": len(os.sched_getaffinity(0))},
        "torch": {
            "version": str(torch.__version__),
            "cuda": torch.version.cuda,
            "devices": devices,
            "threads": torch.get_num_threads(),
        },
        "numpy": numpy.__version__,
        "native": native,
        "triton": _version_of("triton"),
        "dali": _dali_version(),
        "tensorboard": _version_of("tensorboard"),
        "fast_paths": _fast_paths(native, cuda, torch.version.cuda),
    }


def _native() -> dict[str, Any]:
    try:
        from puat_fast.ops import _native
    except ImportError as error:  # not built, or built for another Python: the fast path is off, no more
        return {"available": False, "reason": " ".join(str(error).split()), "build": {}}
    status = dict(zip(("cuda_devices", "cuda_reason"), _native._C.cuda_status(), strict=True))
    return {"available": True, "reason": None, "build": {**_native._C.build_info(), **status}}


def _fast_paths(native: dict[str, Any], cuda: bool, torch_cuda: str | None) -> dict[str, Any]:
    gpu = "" if cuda else "torch is built without CUDA" if torch_cuda is None else "torch finds no usable GPU"
    unbuilt = "" if native["available"] else native["reason"]
    no_dali = "" if _dali_version() else 'DALI is not installed: pip install "puat-fast[dali]"'
    no_triton = "" if _version_of("triton") else "Triton is not installed"
    no_compile = why_not_compile() or ""
    cuda_kernels = gpu or unbuilt or native["build"]["cuda_reason"]
    return {
        "C++ kernels": _path(unbuilt, "puat_fast._C is built"),
        "CUDA kernels": _path(cuda_kernels, "built with CUDA, and there is a GPU"),
        "Triton kernels": _path(gpu or no_triton, "Triton is installed, and there is a GPU"),
        "torch.compile": _path(no_compile, "there is a C++ compiler; part of --engine compiled"),
        "CUDA graph of a step": _path(gpu, "there is a GPU; part of --engine compiled"),
        "DALI loader": _path(no_dali, "DALI is installed; --loader dali"),
    }


def why_not_compile() -> str | None:
    """Why torch.compile cannot work here, or None where it can: on a GPU too it needs a C++ compiler."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:  # torch has a class of its own for it, in a module of no stable name
        return f"no C++ compiler: {' '.join(str(error).split())[:120]}"
    return None


def _path(why_off: str, why_on: str) -> dict[str, Any]:
    return {"on": not why_off, "why": why_off or why_on}


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _dali_version() -> str | None:
    # The distribution's name tells the CUDA version: nvidia-dali-cuda120, nvidia-dali-cuda130.
    owners = importlib.metadata.packages_distributions().get("nvidia", [])
    return next((_version_of(name) for name in owners if name.startswith("nvidia-dali")), None)


def _cpu_name() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
