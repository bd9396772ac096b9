"""What the ranks of tests/engine/test_distributed.py do: `torchrun ... rank_cases.py SCENARIO FOLDER`.

Each rank leaves what it found in FOLDER/rank<r>.pt; the tests compare.
"""

from __future__ import annotations

import copy
import faulthandler
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_cases import parameters, quicken, run_config, run_phase, tiny_batch, tiny_config, tiny_dataset, tiny_engine
from torch import Tensor

from puat_fast import files
from puat_fast.data.batch import DiscBatch, SemiBatch, StepBatch
from puat_fast.engine import distributed
from puat_fast.engine.stats import Stats
from puat_fast.engine.step import Engine
from puat_fast.engine.trainer import Trainer, running_statistics
from puat_fast.networks import Networks
from puat_fast.noise import Noise
from puat_fast.testing import RecordedNoise

NETS = ["D", "G", "A", "C"]
PRESETS = ["paper", "official-v1"]
SCRIPT = str(Path(__file__).resolve())
STOP_STEP = 8  # of twelve: within an epoch of stage 2
SECONDS = 300  # after which a rank that hangs ends itself


def torchrun(*command: str, cwd: Path, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Run ranks on this machine, with one thread each, at a port that is free."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [sys.executable, *launcher, *command], cwd=cwd, env=environment, capture_output=True, text=True
    )


def scenario(name: str, folder: Path) -> list[dict[str, Any]]:
    """Run a scenario on two ranks; what each of them found."""
    done = torchrun(SCRIPT, name, str(folder), cwd=folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


# -- one update ---------------------------------------------------------------------------------------------------


def gradients(net: str, batch: StepBatch, noise: Noise, frozen: bool) -> list[Tensor]:
    """Those that the optimiser of a network sees. frozen: all networks in eval mode, so that images do not meet."""
    engine = tiny_engine(tiny_config(), noise)
    for _, other in engine.nets.items():
        if frozen:
            other.eval().train = lambda mode=True: None
    run_phase(engine, net, batch)
    return [p.grad.clone() for p in getattr(engine.nets, net).parameters() if p.grad is not None]


def whole_batch() -> StepBatch:
    """Eight labelled and eight unlabelled images."""
    a, b = (tiny_batch(seed=seed, dtype=torch.float64) for seed in (0, 1))

    def both(x: SemiBatch, y: SemiBatch) -> list[Tensor]:
        return [torch.cat([getattr(x, name), getattr(y, name)]) for name in vars(x)]

    return StepBatch(D=[DiscBatch(*both(a.D[0], b.D[0]))], C=SemiBatch(*both(a.C, b.C)))


def part(batch: StepBatch, rank: int) -> StepBatch:
    """What a sampler in parts gives a rank."""

    def half(x: SemiBatch) -> list[Tensor]:
        return [tensor[rank::2] for tensor in vars(x).values()]

    return StepBatch(D=[DiscBatch(*half(batch.D[0]))], C=SemiBatch(*half(batch.C)))


def draws(rank: int | None = None) -> RecordedNoise:
    """The draws of an update on the whole batch, or a rank's part of them."""
    g, rows = torch.Generator().manual_seed(5), slice(rank, None, None if rank is None else 2)
    shapes = {"z": (8, 8), "rae": (8, 3, 32, 32)}
    return RecordedNoise(
        {name: [torch.randn(shape, generator=g, dtype=torch.float64)[rows]] for name, shape in shapes.items()},
        dtype=torch.float64,
    )


def updates(alone: bool) -> dict[str, list[Tensor]]:
    """Gradients of one update of each network: in train mode, and frozen; alone also of the whole batch."""
    rank, found = int(os.environ["RANK"]), {}
    for net in NETS:
        mine = part(whole_batch(), rank)
        found[f"{net} train"] = gradients(net, mine, Noise(7 + rank, dtype=torch.float64), frozen=False)
        found[f"{net} frozen"] = gradients(net, mine, draws(rank), frozen=True)
        if alone:
            found[f"{net} whole"] = gradients(net, whole_batch(), draws(), frozen=True)
    return found


# -- some steps, and the tools --------------------------------------------------------------------------------------


def step_thrice(rank: int) -> Engine:
    """An engine after steps on other images with other draws than those of the other rank."""
    engine = tiny_engine(tiny_config(), Noise(7 + rank))
    for step in range(3):
        engine.step(tiny_batch(seed=10 * step + rank))
    return engine


def tools() -> dict[str, Any]:
    """Every function of the module, where ranks differ."""
    rank = distributed.rank()
    tensors = [torch.full((2, 3), float(rank)), torch.tensor(10.0 * rank).expand(())]
    distributed.average_(tensors)
    stats = Stats()
    stats.report("D/loss", torch.tensor(1.0 + 2 * rank))
    found = {
        "average": [tensor.clone() for tensor in tensors],
        "gather": distributed.all_gather({"rank": rank}),
        "any": [distributed.any_rank(flag) for flag in (False, rank == 0, rank == 1, True)],
        "main": distributed.on_main(lambda: f"of rank {rank}"),
        "mean": stats.read(),
        "failed": failure(lambda: distributed.on_main(lambda: 1 // 0)),
    }
    for step, bad in ((3, rank == 0), (2, rank == 1)):
        stats.step = step
        stats.report("D/loss", torch.tensor(float("nan") if bad else 1.0))
    found["not finite"] = failure(stats.read)
    return found


def beginning(trainer: Trainer) -> dict[str, Any]:
    """Where a trainer's draws begin."""
    batch = next(trainer.loader.sampler)
    return {"noise": trainer.engine.noise.state_dict(), "batch": [batch.labelled.tolist(), batch.unlabelled.tolist()]}


def failure(action: Any) -> str:
    """How an action fails."""
    try:
        action()
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "not at all"


def engine_scenario(folder: Path) -> dict[str, Any]:
    """Alone first, then as two ranks."""
    found: dict[str, Any] = {"alone": updates(alone=True)}
    with distributed.process_group("cpu"):
        found |= {"together": updates(alone=False), "tools": tools()}
        engine = step_thrice(distributed.rank())
        found["networks"] = copy.deepcopy({name: net.state_dict() for name, net in engine.nets.items()})
        distributed.average_(running_statistics(engine.nets))
        found["bn"] = running_statistics(engine.nets)
        found |= beginning(Trainer(run_config(folder / "run"), dataset=tiny_dataset()))
    return found


# -- runs -----------------------------------------------------------------------------------------------------------


def runs_scenario(folder: Path) -> dict[str, Any]:
    """Whole runs; runs that a signal to rank 1 stops, and that go on; a run with a NaN on rank 1."""
    steps: list[str] = []

    def stop(terms: Any) -> None:
        steps.append("one")
        if len(steps) % STOP_STEP == 0 and distributed.rank() == 1:
            signal.raise_signal(signal.SIGTERM)

    def spoil(nets: Networks) -> None:
        if distributed.rank() == 1:
            nets.C.logits.weight.data[0, 0] = float("nan")

    def train(name: str, preset: str = "paper", **arguments: Any) -> Trainer:
        trainer = Trainer(run_config(folder / f"{name} {preset}", preset), dataset=tiny_dataset(), **arguments)
        found["summaries"].append(trainer.fit().summary)
        return trainer

    found: dict[str, Any] = {"summaries": []}
    with pytest.MonkeyPatch.context() as patch, distributed.process_group("cpu"):
        quicken(patch)
        if not distributed.is_main():  # has nothing to write with
            patch.setattr(files, "atomic_write", None)
            patch.setattr(Path, "mkdir", None)
        for preset in PRESETS:
            whole = train("whole", preset)
            found[f"weights {preset}"] = {name: parameters(net) for name, net in whole.nets.items()}
            found[f"stopped {preset}"] = failure(lambda preset=preset: train("stopped", preset, on_step=stop))
            found[f"steps {preset}"] = len(steps)
            train("stopped", preset, resume="auto")
        found["lost"] = failure(lambda: train("lost", networks=spoil))
    return found


def crash_scenario(folder: Path) -> dict[str, Any]:
    """Rank 1 ends in the second step, while rank 0 waits for its gradients."""

    def crash(terms: Any) -> None:
        if distributed.rank() == 1:
            raise ZeroDivisionError("a mistake of rank 1")

    with pytest.MonkeyPatch.context() as patch, distributed.process_group("cpu"):
        quicken(patch)
        Trainer(run_config(folder / "run"), dataset=tiny_dataset(), on_step=crash).fit()
    return {}


def main(argv: Sequence[str]) -> None:
    """Run a scenario and leave what it found."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    name, folder = argv[0], Path(argv[1])
    found = {"engine": engine_scenario, "runs": runs_scenario, "crash": crash_scenario}[name](folder)
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(sys.argv[1:])
