"""benchmarks/bench_loader.py: it runs, its numbers hang together, and a loader runs in its own time only."""

from __future__ import annotations

import subprocess

import pytest
from test_benchmarks import VERB, helpers, script  # noqa: F401  # helpers: a fixture


def test_loader_table(tmp_path):
    result = script("loader", tmp_path, "--n-disc", "1")
    rows = {(row["loader"], row["augment"], row["mode"]): row for row in result["rows"]}
    kinds = ["resident", "stream", "dali", "torch"]
    expected = {(k, a, m) for k in kinds for a in ("none", "crop+flip") for m in ("alone", "training")}
    assert rows.keys() == expected | {("none", a, "training") for a in ("none", "crop+flip")}
    for (kind, augment, mode), row in rows.items():
        if mode == "training":
            base = rows["none", augment, "training"]["median_ms"]
            assert row["slowdown"] == pytest.approx(row["median_ms"] / base)
            assert 0 <= row["wait_ms"] and row["wait_percent"] == pytest.approx(100 * row["wait_ms"] / row["median_ms"])
        if kind != "none":
            assert row["images"] == 5 * 8  # D: x_l, x_u, x_ud; C: x_l, x_u
            assert row["images_per_s"] == pytest.approx(40 / row["median_ms"] * 1e3)
            assert row["startup_s"] > 0


def test_a_dataset_and_one_loader(tmp_path):
    options = ("--dataset", "digits", "--loader", "resident", "--augment", "crop+flip")
    result = script("loader", tmp_path, *options)
    assert [row["loader"] for row in result["rows"]] == ["resident", "resident", "none"]
    assert "1437 images of 3 x 32 x 32, digits; batch 8 + 8, 0 D updates." in result["notes"]


@pytest.mark.parametrize(("options", "says"), [
    (["--loader", "tape"], "invalid choice: 'tape'"), (["--batch", "0"], "--batch: 0; accepted: >= 1"),
    (["--depth", "11"], "accepted: >= 0, 6 n + 4"), (["--dataset", "cifar10", "--data-dir", "/none"], "/none"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line(options, says):
    done = subprocess.run([*VERB, "loader", "--device", "cpu", *options], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr


def test_only_the_candidate_whose_turn_it_is_runs(helpers, monkeypatch):  # noqa: F811
    bench_loader, timing = helpers("bench_loader"), helpers("timing")
    parser = timing.parser("", "loader", 1, 0, "")
    monkeypatch.setattr("sys.argv", ["x", "--device", "cpu", "--tiny"])
    args = timing.parse(parser)
    vars(args).update(
        loader=["stream", "torch"], batch=8, n_disc=0, steps=1, images=64, dataset=None, depth=10, width=1
    )
    loaders, seen, make = {}, [], bench_loader.make

    def kept(kind, *rest):
        loaders[kind] = make(kind, *rest)
        return loaders[kind]

    def one(self, one=bench_loader.Candidate.one):
        one(self)
        seen.append({kind for kind, made in loaders.items() if getattr(made, "_n_disc", None) is not None})

    monkeypatch.setattr(bench_loader, "make", kept)
    bench_loader.bench("none", bench_loader.load(args), args, [])  # as it is: nothing fails
    monkeypatch.setattr(bench_loader.Candidate, "one", one)
    bench_loader.bench("none", bench_loader.load(args), args, [])
    assert all(len(running) <= 1 for running in seen) and {"stream"} in seen and {"torch"} in seen
    assert all(made._n_disc is None for kind, made in loaders.items() if kind != "resident")
