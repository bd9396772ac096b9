"""What bench_step.py writes: a row per subject with all that is known, tables that choose from it, and a chart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from step_subjects import PHASES, EngineSubject, Subject, max_loss_diff
from timing import Row, Times

from puat_fast.engine.stats import NonFiniteError
from puat_fast.files import atomic_write

KEYS = """\
subject             what was timed; preset, engine, precision; captured: the whole step as one CUDA graph;
                    off: the short cut that it does without, or null; description: how our engine runs, and what is off
images_per_s        labelled and unlabelled images of the C update
speedup_over_eager, speedup_over_verbatim
                    the official code's median over this one, where that was timed
max_loss_diff       largest |loss - ours| / max(|ours|, 0.01) of the first steps, ours: the preset's eager fp32 engine;
                    null: not compared or not finite. first_loss_diff: of the first step alone, before differences
                    have grown. losses: of the first steps, by name, a value per update
D_ms, G_ms, A_ms, C_ms, rest_ms
                    medians per phase; null in a captured step, which shows none, and of the official code
executed_tflop, necessary_tflop
                    of a step as it is run, and with every exact short cut (2 per multiply-add of convolutions and
                    matrix products); tflop_per_s: necessary ones
percent_of_matmul   tflop_per_s over matmul_tflop_per_s, that of a large product timed between the steps
launches            kernels of a step on a GPU, operators on a CPU; profile: with --profile, of that step kernel_ms,
                    percent_of_median_step, ms_by_class of kernel, longest_ms by name
peak_mib            GPU: what this subject allocates; CPU: the process's resident set so far
compile_s           first steps, in which code is compiled and captured, less as many steady ones;
                    graphs: how many were compiled, and how many came from the cache on disk
full_ms, slowdown   of a leave-one-out row: all short cuts taken, in the same rounds; median over that
not_finite          the term that became infinite or not a number, if one did: then the times are worth nothing"""

MAIN = ("subject", "precision", "median_ms", "p10_ms", "p90_ms", "images_per_s", "speedup_over_eager",
        "speedup_over_verbatim", "first_loss_diff", "max_loss_diff", "not_finite")  # fmt: skip
PHASE = ("subject", "precision", *(f"{name}_ms" for name in PHASES), "median_ms")
RESOURCES = ("subject", "precision", "executed_tflop", "necessary_tflop", "tflop_per_s", "percent_of_matmul",
             "launches", "peak_mib", "compile_s", "graphs")  # fmt: skip
LEFT_OUT = ("subject", "precision", "off", "median_ms", "full_ms", "slowdown", "max_loss_diff", "executed_tflop",
            "compile_s")  # fmt: skip


def row(
    subject: Subject, times: Mapping[str, Times], ceiling: float, references: Mapping[str, Any], rounds: int
) -> Row:
    """All that is known of a subject; times: by name, of all subjects of the same rounds."""
    t = times[subject.name]
    seconds = t.median / 1e3
    rate = subject.necessary / seconds
    ours = isinstance(subject, EngineSubject)
    found: Row = {
        "subject": subject.name, "preset": subject.config.preset, "engine": subject.kind,
        "precision": subject.precision, "captured": subject.captured, **t.row(),
        "images_per_s": 2 * subject.config.schedule.batch_size / seconds,
        **{f"{name}_ms": ms for name, ms in subject.phases(rounds).items()},
        "executed_tflop": subject.executed if ours else None, "necessary_tflop": subject.necessary,
        "tflop_per_s": rate, "percent_of_matmul": 100 * rate / ceiling, "matmul_tflop_per_s": ceiling,
        "peak_mib": subject.peak_mib, "losses": subject.losses,
    }  # fmt: skip
    for name in ("eager", "verbatim"):
        if f"official code, {name}" in times:
            found[f"speedup_over_{name}"] = times[f"official code, {name}"].median / t.median
    if subject.losses and subject.config.preset in references:
        reference = references[subject.config.preset]
        found["first_loss_diff"] = max_loss_diff(subject.losses[:1], reference)
        found["max_loss_diff"] = max_loss_diff(subject.losses, reference)
    if isinstance(subject, EngineSubject):
        found |= {"off": subject.off or None, "description": subject.engine.description}
        if subject.first_seconds is not None and subject.kind == "compiled":
            found["compile_s"] = max(0.0, subject.first_seconds - len(subject.losses) * seconds)
            found["graphs"] = ", ".join(f"{n} {how}" for how, n in subject.graphs.items() if n)
        try:
            subject.engine.stats.read()
        except NonFiniteError as error:
            found["not_finite"] = str(error)
    return _finite(found)


def _finite(value: Any) -> Any:
    """The same without infinities and NaN, which JSON does not have: None instead."""
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tables(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Title -> rows of the Markdown: the answer, the phases, the resources, and each short cut left out."""
    whole, left_out = [r for r in rows if not r.get("off")], [r for r in rows if r.get("off")]
    phases = [r for r in whole if any(f"{name}_ms" in r for name in PHASES)]
    chosen = {"Steps": (whole, MAIN), "Phases": (phases, PHASE), "Resources": (whole, RESOURCES),
              "Each short cut left out": (left_out, LEFT_OUT)}  # fmt: skip
    found = {title: _columns(part, names) for title, (part, names) in chosen.items() if part}
    profiled = [r for r in whole if "profile" in r]
    if profiled:
        found["Kernel time of a profiled step, ms"] = [
            {"subject": r["subject"], "precision": r["precision"], **r["profile"]["ms_by_class"],
             "all": r["profile"]["kernel_ms"], "percent_of_median_step": r["profile"]["percent_of_median_step"]}
            for r in profiled
        ]  # fmt: skip
    return found


def _columns(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The named columns, without those in which no row has anything to say."""
    names = [name for name in names if any(row.get(name) not in (None, "") for row in rows)]
    return [{name: row.get(name) for name in names} for row in rows]


COLOURS = {"D": "#4477aa", "G": "#66ccee", "A": "#228833", "C": "#ee6677", "rest": "#ccbb44", "step": "#777777"}


def chart(path: Path, rows: Sequence[Row], title: str) -> None:
    """A bar per subject, stacked by phase where phases are known, with its milliseconds and its speed-up."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.42 * len(rows)), layout="constrained")
    longest = max(row["median_ms"] for row in rows)
    used: dict[str, Any] = {}
    for y, row in enumerate(rows):
        parts = {name: row[f"{name}_ms"] for name in PHASES if f"{name}_ms" in row} or {"step": row["median_ms"]}
        left, scale = 0.0, row["median_ms"] / sum(parts.values())  # the medians of parts do not add up to the whole's
        for name, ms in parts.items():
            used[name] = axes.barh(y, ms * scale, left=left, height=0.7, color=COLOURS[name])
            left += ms * scale
        faster = [f"{row[key]:.2f} x {key.removeprefix('speedup_over_')}" for key in
                  ("speedup_over_eager", "speedup_over_verbatim") if row.get(key)]  # fmt: skip
        label = f"{row['median_ms']:.4g} ms" + (f"  ({', '.join(faster)})" if faster else "")
        axes.text(left + 0.01 * longest, y, label, va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{row['subject']}, {row['precision']}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * longest)
    axes.set_xlabel("ms per step, median (in brackets: speed-up over the official code)", fontsize=9)
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    labels = {"step": "whole step", "rest": "the rest"}
    order = [name for name in COLOURS if name in used]
    handles, texts = [used[name] for name in order], [labels.get(name, name) for name in order]
    figure.legend(handles, texts, fontsize=8, ncols=len(order), loc="outside lower center", frameon=False)
    with atomic_write(path) as temp:
        figure.savefig(temp, dpi=120, format="png")
    pyplot.close(figure)
