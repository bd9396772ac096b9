"""How every benchmark here measures and what it writes: interleaved candidates, medians, one JSON and one table."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from puat_fast.files import atomic_write

Fn = Callable[[], Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Times:
    """Times of one candidate in milliseconds, over n rounds."""

    median: float
    p10: float
    p90: float
    n: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Times:
        p10, median, p90 = (float(v) for v in np.percentile(milliseconds, [10, 50, 90]))
        return cls(median, p10, p90, len(milliseconds))

    def row(self) -> Row:
        """The columns that every table has."""
        return {"median_ms": self.median, "p10_ms": self.p10, "p90_ms": self.p90, "n": self.n}


def measure(
    fns: Mapping[str, Fn],
    rounds: int,
    warmup: int,
    device: torch.device | str,
    *,
    flush_l2: bool = False,
    before: Mapping[str, Fn] | None = None,
) -> dict[str, Times]:
    """Time every function `rounds` times, interleaved (ABCABC...), after `warmup` such rounds outside the clock.

    Interleaved, so that clocks, heat and other load fall on all candidates alike. On a GPU the clock is a pair of
    CUDA events around each call, read after the last round; the host's launch gaps inside a call count. `flush_l2`
    writes over the L2 cache before each call, outside the clock: inputs then come from memory, and the host is ahead
    of the device, so that the launch latency of a single kernel is hidden. On a CPU the clock is perf_counter.
    `before`: what runs ahead of a candidate, outside the clock.
    """
    device = torch.device(device)
    for _ in range(warmup):
        for fn in fns.values():
            fn()
    gc.collect()
    timer = _time_on_gpu if device.type == "cuda" else _time_on_cpu
    samples = timer(fns, rounds, device, flush_l2, before or {})
    return {name: Times.of(values) for name, values in samples.items()}


def _time_on_cpu(
    fns: Mapping[str, Fn], rounds: int, device: torch.device, flush_l2: bool, before: Mapping[str, Fn]
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            before.get(name, _nothing)()
            start = time.perf_counter()
            fn()
            samples[name].append((time.perf_counter() - start) * 1e3)
    return samples


def _time_on_gpu(
    fns: Mapping[str, Fn], rounds: int, device: torch.device, flush_l2: bool, before: Mapping[str, Fn]
) -> dict[str, list[float]]:
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in fns}
    with torch.cuda.device(device):
        cache = None
        if flush_l2:
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            cache = torch.empty(2 * l2_bytes, dtype=torch.int8, device=device)
        torch.cuda.synchronize()
        for _ in range(rounds):
            for name, fn in fns.items():
                before.get(name, _nothing)()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                if cache is not None:
                    cache.zero_()
                start.record()
                fn()
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def _nothing() -> None:
    pass


# -- where it was measured ----------------------------------------------------------------------------------------


def environment(device: torch.device | str) -> dict[str, Any]:
    """Hardware, driver, versions, settings, command, commit and load: call it right after measuring."""
    device = torch.device(device)
    sha, dirty = _commit()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device.type,
        "cpu": {
            "name": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average_1min": round(os.getloadavg()[0], 2),
        },
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": _version("triton"),
            "puat-fast": _version("puat-fast"),
        },
        "settings": {
            "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
            "cudnn.benchmark": torch.backends.cudnn.benchmark,
            "cuda.matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        },
        "command": _command(),
        "git_sha": sha,
        "git_dirty": dirty,
    }


def _command() -> str:
    """What to type to measure this again: by the verb where it was typed so, else the script in the repository."""
    program = sys.argv[0]
    name = program.split() if program.startswith("puat-fast ") else ["python", f"benchmarks/{Path(program).name}"]
    return shlex.join([*name, *sys.argv[1:]])


def _gpu(device: torch.device) -> dict[str, Any]:
    p = torch.cuda.get_device_properties(device)
    facts = {"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "multiprocessors": p.multi_processor_count,
             "compute_capability": f"{p.major}.{p.minor}", "l2_mib": round(p.L2_cache_size / 2**20, 1)}  # fmt: skip
    # Read, never set: the clocks tell whether the card was throttled while it was measured.
    fields = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    text = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={device.index or 0}")
    values = [v.strip() for v in (text or "").split(",")]
    return facts | (dict(zip(fields.split(","), values, strict=True)) if len(values) == 5 else {})


def _commit() -> tuple[str | None, bool | None]:
    """Commit and whether the tree differs from it; a copied tree without .git names it by GIT_SHA."""
    tracked = _output("git", "ls-files", "--error-unmatch", Path(__file__).name)  # not installed somewhere below a tree
    sha = None if tracked is None else _output("git", "rev-parse", "HEAD")
    if sha is None:
        return os.environ.get("GIT_SHA"), None
    return sha, bool(_output("git", "status", "--porcelain", "--untracked-files=no"))


def _output(*command: str) -> str | None:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=folder)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


# -- what is written ----------------------------------------------------------------------------------------------


def write_results(
    out: Path,
    name: str,
    rows: Sequence[Row],
    environment: Mapping[str, Any],
    *,
    notes: Sequence[str] = (),
    summary: Mapping[str, Any] | None = None,
    tables: Mapping[str, Sequence[Row]] | None = None,
    copy: Path | None = None,
) -> None:
    """Write out/name.json (all of it) and out/name.md (notes, environment, summary, tables). A later call overwrites.

    tables: title -> rows of the Markdown's tables, which may choose among the columns; default: one of all rows.
    copy: a second place for the JSON. Call it after every group of rows: what a time limit cuts short is then there up
    to the last group.
    """
    out.mkdir(parents=True, exist_ok=True)
    summary = dict(summary or {})
    value = {"name": name, "notes": list(notes), "environment": dict(environment), "summary": summary}
    text = json.dumps(value | {"rows": list(rows)}, indent=1, allow_nan=False) + "\n"
    for file in (out / f"{name}.json", *([copy] if copy else [])):
        _replace(file, text)
    lines = [f"# {name}", "", *(f"- {note}" for note in notes), ""]
    lines += [*(f"- {key}: {inline(v)}" for key, v in {**environment, **summary}.items()), ""]
    for title, part in (tables or {"": rows}).items():
        lines += [*([f"## {title}", ""] if title else []), *table(part), ""]
    _replace(out / f"{name}.md", "\n".join(lines))


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown lines; the columns are the rows' keys in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([inline(row.get(c, "")) for c in columns] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def inline(value: Any) -> str:
    """A value as text of one line: four digits, mappings as `key value` pairs, None as nothing."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {inline(v)}" for k, v in value.items() if v is not None)
    return "" if value is None else str(value).replace("|", "\\|")


def _replace(path: Path, text: str) -> None:
    with atomic_write(path) as temp:
        temp.write_text(text, encoding="utf-8")


# -- what every script asks ---------------------------------------------------------------------------------------


KEYS = """\
keys of the JSON file, which is written as it grows:
  name, notes   of the benchmark; what its numbers mean
  environment   date, device, cpu, gpu, versions, settings, command, git_sha, git_dirty (tracked files changed)
  summary       what belongs to no single row
  rows          a list; every row has median_ms, p10_ms, p90_ms and n (timed rounds), and"""


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser(description: str | None, name: str, rounds: int, warmup: int, keys: str) -> argparse.ArgumentParser:
    """Arguments that all benchmarks share; description: the script's docstring, keys: those of its rows."""
    p = _Parser(
        prog=sys.argv[0] if sys.argv[0].startswith("puat-fast ") else None,
        description=description,
        epilog=f"{KEYS}\n{textwrap.indent(keys, ' ' * 4)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    p.add_argument("--tiny", action="store_true", help="a few small sizes, to prove that the script runs")
    p.add_argument("--rounds", type=int, default=rounds, help="timed rounds (default %(default)s)")
    p.add_argument("--warmup", type=int, default=warmup, help="rounds before the clock starts (default %(default)s)")
    p.add_argument("--threads", type=int, help="CPU threads of torch and of our kernels")
    p.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the results (default %(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="a second place for the JSON; keys below")
    p.add_argument("--name", default=name, help="file name of the results, without suffix (default %(default)s)")
    return p


def parse(p: argparse.ArgumentParser) -> argparse.Namespace:
    """Parsed arguments, checked and put into force. Exits with a message on a device that is not there."""
    args = p.parse_args()
    try:
        args.device = torch.device(args.device)
    except RuntimeError:
        p.error(f"--device: {args.device!r} is not one of cpu, cuda, cuda:N")
    if args.device.type == "cuda":
        args.device = torch.device("cuda", args.device.index or 0)  # set_device wants a number
        if args.device.index >= torch.cuda.device_count():
            p.error(f"--device: {args.device} asked for, torch sees {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(args.device)
    if args.rounds < 1 or args.warmup < 0:
        p.error(f"--rounds: {args.rounds}, --warmup: {args.warmup}; accepted: >= 1, >= 0")
    if args.json is not None and (args.json.is_dir() or not os.access(args.json.absolute().parent, os.W_OK)):
        p.error(f"--json: {args.json} cannot be written: a folder, or no such folder, or no right to write there")
    if args.threads:
        torch.set_num_threads(args.threads)
    return args
