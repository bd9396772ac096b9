"""benchmarks/: the scripts run and write what they promise; FLOPs are counted right. No speed is asserted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_cases import tiny_batch, tiny_config, tiny_engine

from puat_fast.config import Config
from puat_fast.engine.step import Engine
from puat_fast.networks.discriminator import DownBlock
from puat_fast.networks.generator import CBNBlock
from puat_fast.noise import Noise
from puat_fast.testing import step_terms

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
TIMES = {"median_ms", "p10_ms", "p90_ms", "n"}


def script(name: str, out: Path, *arguments: str) -> dict[str, Any]:
    """Run a benchmark at its smallest on one thread; returns its JSON."""
    command = [sys.executable, BENCHMARKS / f"bench_{name}.py", "--device", "cpu", "--tiny", "--threads", "1"]
    options = ["--rounds", "2", "--warmup", "1", "--out", out, *arguments]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    assert {"name", "notes", "environment", "summary", "rows"} <= result.keys()
    environment = result["environment"]
    assert {"date", "device", "cpu", "gpu", "versions", "settings", "command", "git_sha"} <= environment.keys()
    assert {"python", "torch", "triton", "puat-fast"} <= environment["versions"].keys()
    assert environment["command"].startswith(f"python benchmarks/bench_{name}.py --device cpu --tiny")
    for row in result["rows"]:
        assert TIMES <= row.keys() and row["n"] == 2
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
    assert (out / f"{name}.md").read_text(encoding="utf-8").startswith(f"# {name}\n")
    return result


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """import_helper("timing"): a module of benchmarks/, as the scripts beside it import it."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def import_helper(name: str) -> ModuleType:
        return __import__(name)

    yield import_helper
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(BENCHMARKS)):
            del sys.modules[name]


def test_conv_table(tmp_path):
    rows = script("conv", tmp_path)["rows"]
    assert {row["direction"] for row in rows} == {"fprop", "dgrad", "wgrad"}
    assert len({(r["shape"], r["batch"], r["precision"], r["direction"]) for r in rows}) == len(rows) == 2 * 2 * 2 * 3
    for row in rows:
        assert row["tflops"] > 0 and row["percent_of_matmul"] > 0
        assert row["kernel"] and 0 < row["kernel_share"] <= 1
    # not all: at these sizes a stall of a busy machine, falling into another operator, makes that the longest
    assert sum("conv" in row["kernel"] for row in rows) > len(rows) / 2


def test_op_table(tmp_path):
    result = script("ops", tmp_path, "--no-compile")  # what compiling adds is a candidate, and half a minute
    assert result["summary"]["large_copy"]["gb_per_s"] > 0
    ops = sorted(path.stem for path in (ROOT / "puat_fast" / "ops").glob("[!_]*.py"))
    assert ops == sorted(path.stem for path in (BENCHMARKS / "op_cases").glob("[!_]*.py"))
    for op in ops:  # measured, or the reason why the CPU has no kernel to measure
        noted = any(note.startswith(f"{op}: the reference serves the CPU: ") for note in result["notes"])
        assert noted != any(row["op"] == op for row in result["rows"])
    rows = {row["candidate"]: row for row in result["rows"] if row["op"] == "pgd_step"}
    assert set(rows) == {"reference", "ours", "ours in place", "copy"}
    for row in rows.values():
        assert {"op", "what", "shape", "dtype", "layout", "gb_per_s", "percent_of_large_copy"} <= row.keys()
    assert rows["ours"]["max_abs_diff"] == 0
    assert re.match("WINS|LOSES|EVEN", rows["ours"]["verdict"])


def test_step_table(tmp_path):
    result = script("step", tmp_path, "--preset", "official-v1", "--plain-ops")
    baseline, row, plain = result["rows"]
    assert plain["engine"] == "ours, eager, plain ops" and plain["C/loss"] == pytest.approx(row["C/loss"], rel=0.1)
    assert (baseline["preset"], baseline["engine"]) == ("official code", "eager")
    assert baseline["speedup_over_eager"] == 1 and baseline["C/rae"] > 0 and baseline["C/uae"] > 0
    assert row["speedup_over_eager"] == pytest.approx(baseline["median_ms"] / row["median_ms"])
    assert row["preset"] == "official-v1" and row["engine"] == "ours, eager"
    phases = [row[f"{name}_ms"] for name in ("D", "G", "A", "C", "rest")]
    assert all(ms > 0 for ms in phases)
    assert 0 < row["necessary_tflop"] < row["executed_tflop"]
    assert {"images_per_s", "peak_memory_mib", "necessary_tflop_per_s", "percent_of_matmul", "C/loss"} <= row.keys()
    assert any("EAGER" in note and "verbatim" in note for note in result["notes"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_baseline_computes_what_our_engine_computes(helpers, dtype):
    """Three steps from equal weights and draws: in float64 the losses of preset official-v1, to rounding."""
    augment = {"crop_pad": 4, "flip": True, "rotate_deg": 15.0}
    config = tiny_config("official-v1", augment=augment, schedule={"n_disc": 2, "adv_start": 0, "adv_end": 1})
    engine = tiny_engine(config, Noise(7, dtype=dtype), steps_per_epoch=10)
    noise = Noise(7, dtype=dtype)
    noise.load_state_dict(engine.noise.state_dict())
    baseline = helpers("eager_baseline").Baseline(config, engine.nets, noise)
    for seed in range(3):
        batch, scalars = tiny_batch(n_disc=2, seed=seed, dtype=dtype), engine.scalars()
        actual, expected = baseline.step(batch, scalars), step_terms(engine, batch)
        assert actual.keys() == expected.keys() & actual.keys() and len(actual) == 8
        tolerance = {"rel": 1e-10, "abs": 1e-12} if dtype == torch.float64 else {"rel": 1e-3, "abs": 1e-4}
        assert actual == {name: pytest.approx(expected[name][-1], **tolerance) for name in actual}


def test_candidates_are_interleaved(helpers):
    order: list[str] = []
    fns = {name: lambda name=name: order.append(name) for name in "abc"}
    times = helpers("timing").measure(fns, rounds=3, warmup=2, device="cpu")
    assert order == ["a", "b", "c"] * 5
    assert list(times) == ["a", "b", "c"] and all(t.n == 3 for t in times.values())


def test_times_are_percentiles(helpers):
    t = helpers("timing").Times.of([float(v) for v in range(101)])
    assert (t.p10, t.median, t.p90, t.n) == (10, 50, 90, 101)


def test_verdict_tells_a_loss(helpers):
    bench_ops, times = helpers("bench_ops"), helpers("timing").Times

    def verdict(ours: float) -> str | None:
        rivals = {"reference": times(9, 8, 10, 5), "compiled": times(2.0, 1.9, 2.2, 5)}
        return bench_ops.verdict({**rivals, "ours": times(ours, ours, ours, 5)}, "")

    assert verdict(4.0) == "LOSES to compiled: 2.00x its time"
    assert verdict(1.0) == "WINS 2.00x over compiled"
    assert verdict(2.1) == "EVEN with compiled (0.95x)"


def test_kernels_belong_to_their_function(helpers):
    x = torch.randn(64, 64)
    ran = helpers("profiling").kernels({"product": lambda: x @ x, "sine": lambda: x.sin()}, torch.device("cpu"))
    assert "aten::mm" in dict(ran["product"]) and "aten::mm" not in dict(ran["sine"])
    assert "aten::sin" in dict(ran["sine"])


# -- FLOPs: performance.md 1 counted the official code at WRN-28-10, 256 + 256 -------------------------------------


def waste_as_the_official_code(engine: Engine) -> None:
    """Weight gradients that nobody reads, and C's labels for unlabelled rows that are then cut off."""
    for _, net in engine.nets.items():
        net.requires_grad_(True)
    engine.nets.C_ema.requires_grad_(False)

    engine.nets.training_only = lambda name: nullcontext()  # type: ignore[method-assign,assignment,return-value]
    method: Any = engine.method
    cut = method._real_for_d

    def real_for_d(b: Any) -> Any:
        n_u = int(len(b.y_l) * engine.config.data.mix_frac)
        method.C(b.x_ud[n_u:])
        return cut(b)

    method._real_for_d = real_for_d


def test_flops_of_the_official_step(helpers):
    flops = helpers("flops")
    counts = flops.count_step(Config.preset("official-v1", dataset="cifar10"), waste_as_the_official_code)
    tera = {phase: sum(kinds.values()) / 1e12 for phase, kinds in counts.items()}
    assert flops.total(counts) / 1e12 == pytest.approx(164.0, abs=0.05)
    expected = {"D": 54.8, "G": 4.2, "A": 11.5, "C": 93.5}
    assert tera == pytest.approx(expected, abs=0.06)
    c = {kind: value / 1e12 for kind, value in counts["C"].items()}
    assert c["wgrad"] == pytest.approx(10.74, abs=0.01)
    assert c["dgrad"] == pytest.approx(37.58, abs=0.01)


def test_flops_of_our_step(helpers):
    flops, config = helpers("flops"), Config.preset("official-v1", dataset="cifar10")
    assert flops.total(flops.count_step(config)) / 1e12 == pytest.approx(158.5, abs=0.05)
    assert flops.total(flops.count_necessary(config)) / 1e12 == pytest.approx(146.8, abs=0.1)


@pytest.mark.parametrize("first", [True, False])
def test_fewer_flops_same_discriminator_block(helpers, first):
    torch.manual_seed(0)
    block = DownBlock(3 if first else 5, 5, first).double().eval()  # eval: no power iteration between the two
    x = torch.randn(2, 3 if first else 5, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(helpers("flops").down_block(block, x), block(x), rtol=1e-11, atol=1e-11)


def test_fewer_flops_same_generator_block(helpers):
    torch.manual_seed(0)
    block = CBNBlock(4, 6, 3, upsample=True).double()
    h, y = torch.randn(2, 4, 4, 4, dtype=torch.float64), torch.tensor([0, 2])
    torch.testing.assert_close(helpers("flops").cbn_block(block, h, y), block(h, y), rtol=1e-11, atol=1e-11)


# -- the acceptance script ------------------------------------------------------------------------------------------

ACCEPTANCE = BENCHMARKS / "gpu_acceptance.sh"


def test_time_limits_sum_to_less_than_nine_minutes():
    limits = [int(n) for n in re.findall(r"^ *(?:stage|bench) \w+ (\d+)", ACCEPTANCE.read_text(encoding="utf-8"), re.M)]
    assert len(limits) == 6
    assert sum(limits) + 5 * len(limits) < 9 * 60  # 5 s: what a stage may take to die


def test_a_failing_stage_stops_no_other(tmp_path):
    command = ["bash", ACCEPTANCE, "--device", "cpu", "--tiny", "--out", tmp_path / "out"]
    done = subprocess.run(command, env={**os.environ, "PYTHON": "false"}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    lines = (tmp_path / "out" / "summary.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split()[:2] for line in lines] == [
        [name, "failed"] for name in ("build", "device", "tests", "conv", "ops", "step")
    ]
    assert lines[-1] in done.stdout
