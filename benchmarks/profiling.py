"""Which kernels a function runs, and for how long, by torch.profiler. Never inside a clock."""

from __future__ import annotations

import bisect
import re
from collections.abc import Mapping
from typing import Any

import torch
from timing import Fn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

Kernels = list[tuple[str, float]]  # (name, milliseconds), in the order in which they ran

# First match wins: a cuDNN convolution is named "..._implicit_gemm_...", its layout change "nchwToNhwcKernel".
CLASSES = (
    ("layout", r"nchwToNhwc|nhwcToNchw|transpose|reorder"),
    ("norm", r"batch_?norm|bn_|welford"),
    ("conv", r"conv|fprop|dgrad|wgrad|implicit|cudnn"),
    ("matmul", r"gemm|gemv|cublas|nvjet|addmm|aten::(mm|bmm|mv|dot)"),
    ("optimiser", r"multi_tensor|foreach|update_kernel|puat_fast::(sgd_ema|adam)_"),
    ("copy", r"memcpy|memset|copy"),
    ("elementwise", r"elementwise|vectorized|aten::"),
)


def kernels(fns: Mapping[str, Fn], device: torch.device) -> dict[str, Kernels]:
    """Kernels of one call of each function; on a CPU, operators and their own time. Functions must be warmed up."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    labels = {f"bench::{name}": name for name in fns}
    with profile(activities=activities) as prof:
        for label, name in labels.items():
            with record_function(label):
                fns[name]()
                if on_gpu:
                    torch.cuda.synchronize(device)  # so that its kernels run before the next label
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = prof.events() or []
    begun = sorted(
        (e.time_range.start, labels[e.name]) for e in events if e.name in labels and e.device_type == DeviceType.CPU
    )
    # Labels, ours and the optimisers', also appear on the device's own time line: they are no kernels.
    ran = [e for e in events if e.device_type == wanted and not (e.name in labels or (on_gpu and _is_label(e)))]
    ran.sort(key=lambda e: e.time_range.start)
    found: dict[str, Kernels] = {name: [] for name in fns}
    for event in ran:
        index = bisect.bisect_right(begun, event.time_range.start, key=lambda item: item[0]) - 1
        if index >= 0:  # a kernel belongs to the last label that had begun
            us = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            found[begun[index][1]].append((event.name, us / 1e3))
    return found


def _is_label(event: Any) -> bool:
    return getattr(event, "is_user_annotation", False) or event.name.startswith("Optimizer.")


def longest(ran: Kernels) -> tuple[str, float]:
    """(name of the kernel with the largest total time, its share of all)."""
    total = by_name(ran)
    if not total:
        return "", 0.0
    name = max(total, key=total.__getitem__)
    return name, total[name] / (sum(total.values()) or 1.0)


def by_name(ran: Kernels) -> dict[str, float]:
    """Milliseconds per kernel name."""
    total: dict[str, float] = {}
    for name, ms in ran:
        total[name] = total.get(name, 0.0) + ms
    return total


def by_class(ran: Kernels) -> dict[str, float]:
    """Milliseconds per class of kernel (CLASSES), largest first."""
    total: dict[str, float] = {}
    for name, ms in ran:
        kind = next((kind for kind, pattern in CLASSES if re.search(pattern, name, re.IGNORECASE)), "other")
        total[kind] = total.get(kind, 0.0) + ms
    return dict(sorted(total.items(), key=lambda item: -item[1]))
