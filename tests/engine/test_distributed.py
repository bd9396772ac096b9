"""Two ranks on gloo: their gradients, states and runs. What they do is in rank_cases.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import NETS, PRESETS, SCRIPT, STOP_STEP, beginning, scenario, torchrun
from tiny_cases import equal_state, run_config, tiny_dataset

from puat_fast import checkpoint
from puat_fast.config import ConfigError
from puat_fast.engine import distributed
from puat_fast.engine import trainer as trainer_module
from puat_fast.engine.step import fast_paths
from puat_fast.engine.trainer import Trainer
from puat_fast.runlog import RunError, read_metrics

TINY = """--classifier.depth 10 --classifier.width 1 --gan.width 8 --gan.z_dim 8 --attack.num_steps 1
--val.final_images 4 --data.val_fraction 0 --pretrain.epochs 0 --schedule.epochs 1 --schedule.steps_per_epoch 2
--schedule.n_disc 1 --schedule.batch_size 4""".split()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: Any) -> list[dict[str, Any]]:
    """One update of each network, three steps, and the tools."""
    return scenario("engine", tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the runs, and what the ranks say of them."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, scenario("runs", folder)


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# -- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("net", NETS)
def test_the_gradient_is_the_mean_of_what_the_ranks_find_alone(ranks, net, mode):
    key = f"{net} {mode}"
    first, second = (found["alone"][key] for found in ranks)
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for found in ranks:
        assert_close(found["together"][key], [(a + b) / 2 for a, b in zip(first, second, strict=True)])


@pytest.mark.parametrize("net", NETS)
def test_without_batch_statistics_it_is_the_gradient_of_the_whole_batch(ranks, net):
    whole = ranks[0]["alone"][f"{net} whole"]
    assert any(gradient.abs().max() > 1e-6 for gradient in whole)
    assert_close(ranks[0]["together"][f"{net} frozen"], whole)


# -- state ----------------------------------------------------------------------------------------------------------


def test_weights_and_spectral_norms_stay_the_same_on_all_ranks(ranks):
    """After three steps in which the ranks saw other images and drew other noise; BatchNorm alone is local."""
    first, second = (found["networks"] for found in ranks)
    assert [name for name in first["D"] if name.endswith(".u")]
    differ = []
    for net, state in first.items():
        differ += [f"{net}.{name}" for name, value in state.items() if not torch.equal(value, second[net][name])]
    assert differ and {name.rpartition(".")[2] for name in differ} == {"running_mean", "running_var"}


def test_running_statistics_are_averaged(ranks):
    first, second = ([*found["networks"].values()] for found in ranks)
    names = [(k, name) for k, net in enumerate(first) for name in net if "running_" in name]
    assert len(names) == len(ranks[0]["bn"]) and equal_state(ranks[0]["bn"], ranks[1]["bn"])
    for (k, name), averaged in zip(names, ranks[0]["bn"], strict=True):
        torch.testing.assert_close(averaged, (first[k][name] + second[k][name]) / 2)


def test_ranks_share_out_the_batch_of_a_single_process_and_rank_0_has_its_noise(ranks, tmp_path):
    alone = beginning(Trainer(run_config(tmp_path / "run"), dataset=tiny_dataset()))
    assert equal_state(ranks[0]["noise"], alone["noise"])
    assert not equal_state(ranks[1]["noise"], alone["noise"])
    for k in range(2):
        first, second = (found["batch"][k] for found in ranks)
        assert len(first) == len(second) and sorted(first + second) == sorted(alone["batch"][k])


def test_tools(ranks):
    first, second = (found["tools"] for found in ranks)
    for found in (first, second):
        assert [tensor.tolist() for tensor in found["average"]] == [[[0.5] * 3] * 2, 5.0]
        assert found["gather"] == [{"rank": 0}, {"rank": 1}]
        assert found["any"] == [False, True, True, True]
        assert found["main"] == "of rank 0"
        assert found["mean"] == {"D/loss": 2.0}
        assert found["not finite"] == "NonFiniteError: D/loss is not finite in phase D at step 2 of the stage"
    assert first["failed"].startswith("ZeroDivisionError")
    assert second["failed"] == "RankError: rank 0 failed, its message says why"


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_rank_0_alone_writes_and_all_know_the_result(runs, preset):
    folder, (first, second) = runs  # in runs_scenario rank 1 has nothing to write with
    whole = folder / f"whole {preset}"
    assert equal_state(first[f"weights {preset}"], second[f"weights {preset}"])
    assert first["summaries"] == second["summaries"] and len(first["summaries"]) == 2 * len(PRESETS)
    assert [(r["stage"], r["epoch"]) for r in read_metrics(whole)] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    states = checkpoint.load(whole / "checkpoints" / "last.pt")["ranks"]
    assert equal_state(states[0]["bn"], states[1]["bn"])  # averaged at the end of an epoch
    assert len(states) == 2 and not equal_state(states[0]["noise"], states[1]["noise"])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(runs, preset):
    _, (first, second) = runs
    stopped = [found[f"stopped {preset}"] for found in (first, second)]
    assert stopped[0].startswith("KeyboardInterrupt: stopped by a signal to another rank, saved; --resume")
    assert stopped[1].startswith("KeyboardInterrupt: stopped by SIGTERM, saved; --resume")
    steps = STOP_STEP * (1 + PRESETS.index(preset))
    assert first[f"steps {preset}"] == second[f"steps {preset}"] == steps


@pytest.mark.parametrize("preset", PRESETS)
def test_stopped_and_resumed_is_never_having_stopped(runs, preset):
    folder, _ = runs
    whole, resumed = (folder / f"{name} {preset}" for name in ("whole", "stopped"))
    for name in ("last", "best"):
        a, b = (checkpoint.load(run / "checkpoints" / f"{name}.pt") for run in (whole, resumed))
        assert equal_state(a, b), name
    rows = [[row | {"seconds": 0, "images_per_s": 0} for row in read_metrics(run)] for run in (whole, resumed)]
    assert rows[0] == rows[1]


@pytest.mark.usefixtures("quick")
def test_another_number_of_processes_is_refused(runs):
    folder, _ = runs
    with pytest.raises(RunError, match=r"last\.pt: .* its run has 2 processes, this one 1; .* --nproc-per-node 2"):
        Trainer(run_config(folder / "whole paper"), resume="auto", dataset=tiny_dataset()).fit()


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(runs):
    _, (first, second) = runs
    assert first["lost"] == second["lost"]
    assert first["lost"].startswith("NonFiniteError: C/sup is not finite in phase C at step 1 ")


def test_a_rank_that_fails_leaves_no_other_waiting(tmp_path):
    done = torchrun(SCRIPT, "crash", str(tmp_path), cwd=tmp_path)
    assert done.returncode != 0
    assert "ZeroDivisionError: a mistake of rank 1" in done.stderr
    assert "RankError: another process of this run has ended" in done.stderr
    assert not list(tmp_path.glob("rank*.pt"))


@pytest.mark.slow
def test_torchrun_on_the_command_line(tmp_path):
    done = torchrun("-m", "puat_fast", "train", *TINY, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1") == done.stdout.count("attack  accuracy %") == 1
    names = {str(p.relative_to(tmp_path / "run")) for p in tmp_path.rglob("*") if p.is_file()}
    assert names == {"config.yaml", "env.json", "metrics.csv", "metrics.jsonl", "curves.png", "classifier.safetensors",
                     "checkpoints/last.pt", "checkpoints/best.pt", "samples/stage2-epoch001.png"}  # fmt: skip
    again = torchrun("-m", "puat_fast", "train", *TINY, "--out", "run", cwd=tmp_path)
    assert again.returncode != 0
    assert "puat-fast: error: run: holds a run already" in again.stderr
    assert "puat-fast: error: rank 1: another process of this run has ended" in again.stderr


@pytest.mark.parametrize(
    ("size", "ranks", "accepted"), [(5, 2, "multiples of 2 from 4 on"), (4, 3, "3 from 6"), (4, 4, "4 from 8")]
)
def test_batches_that_cannot_be_shared_out_are_refused(tmp_path, monkeypatch, size, ranks, accepted):
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    with pytest.raises(
        ConfigError, match=rf"schedule\.batch_size: {size} for {ranks} processes, accepted: .*{accepted}"
    ):
        Trainer(run_config(tmp_path / "run", schedule={"batch_size": size}), dataset=tiny_dataset())
    assert not list(tmp_path.iterdir())


def test_one_device_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert trainer_module.resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device: 'cuda:0' is one device for several processes"):
        trainer_module.resolve_device("cuda:0")


def test_each_process_has_the_device_of_its_number(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert trainer_module.resolve_device("auto") == trainer_module.resolve_device("cuda") == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="device: 'cuda:1' asked for, but torch sees 1 CUDA devices"):
        trainer_module.resolve_device("auto")


def test_a_step_of_several_processes_is_no_cuda_graph(monkeypatch):
    config, device = run_config(Path("run"), engine="compiled"), torch.device("cuda")
    assert fast_paths(config, device)[0].graph
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    fast, off = fast_paths(config, device)
    assert not fast.graph and "NCCL" in off["graph"]
