"""benchmarks/bench_attacks.py: it runs, and its numbers hang together."""

from __future__ import annotations

import subprocess

import pytest
from test_benchmarks import VERB, script

ATTACKS = ["apgd-ce", "apgd-t", "fab-t", "square"]


def test_attacks_table(tmp_path):
    pytest.importorskip("pyautoattack", reason="pyautoattack (extra `test`) is not installed")
    result = script("attacks", tmp_path)
    rows = {(row["attack"], row["subject"]): row for row in result["rows"]}
    assert list(rows) == [(a, s) for a in [*ATTACKS, "all"] for s in ("reference", "fp32", "bf16")]
    for (attack, subject), row in rows.items():
        base = rows[attack, "reference"]
        assert row["speedup"] == pytest.approx(base["median_ms"] / row["median_ms"])
        assert row["cpu_speedup"] == pytest.approx(base["cpu_s"] / row["cpu_s"])
        assert row["robust_acc"] == row["left"] / 6 and 0 <= row["agree"] <= 1
        if attack not in ("apgd-ce", "all"):
            assert row["attacked"] == rows[ATTACKS[ATTACKS.index(attack) - 1], subject]["left"]
        if attack == "all":
            assert row["attacked"] == 6 and row["left"] == rows["square", subject]["left"]
            assert row["cpu_s"] == pytest.approx(sum(rows[a, subject]["cpu_s"] for a in ATTACKS))
    assert (
        "WRN-10-1, 6 images, natural accuracy 100.0%, L-inf 8/255; 4 steps, 10 queries, 2 targets" in result["notes"][0]
    )


@pytest.mark.parametrize(("options", "says"), [
    ([], "--net: needed"), (["--net", "/none"], "/none"), (["--tiny", "--eps", "0"], "--eps: 0; accepted"),
    (["--tiny", "--n", "0"], "--n: 0; accepted: >= 1"), (["--tiny", "--attacks", "pgd"], "invalid choice: 'pgd'"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line(options, says):
    done = subprocess.run([*VERB, "attacks", "--device", "cpu", *options], capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
