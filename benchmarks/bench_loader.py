"""The loaders: images/s alone and under a training step, host memory, seconds to the first step.

A candidate is a loader with or without crop and flip of all images of C's batch, alone or in front of a training step
of a small classifier. A round is --steps steps of it, after some steps outside the clock; only the candidate whose turn
it is runs, so that nobody prefetches in another one's time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timing
import torch
import torch.nn.functional as F

from puat_fast.data import Augmentation, Loader, SemiSupervisedSampler, StepBatch, load_dataset, make_loader
from puat_fast.data.loaders import KINDS
from puat_fast.networks import Classifier

KEYS = """\
loader              resident, stream, dali, torch; `none`: the training step on one batch that stays
augment             crop+flip: of C's images, by the loader; none
mode                alone; training: in front of a training step, whose time is in median_ms; times are of one step
images, images_per_s
                    of a step; over the median
wait_ms             training: median time inside of next_step; on a GPU the host's, which may be ahead of the device
wait_percent        training: wait_ms over median_ms
slowdown            training: median_ms over that of `none`
startup_s           making the loader, and its first step; the first loader of a kind pays its imports
memory_mib          growth of the memory of this process and its workers, a shared page counted once"""
AUGMENTS = {"none": None, "crop+flip": Augmentation(4, True, 0.0, "image", 0)}
WARM = 6  # steps between start and clock: more than any loader prefetches

Data = tuple[np.ndarray, np.ndarray]


class Candidate:
    """A loader, made when its turn comes; --steps steps of it."""

    def __init__(self, loader: Loader | None, step: Callable[[StepBatch], None] | None, args: argparse.Namespace):
        self.loader, self.step, self.args = loader, step, args
        self.batch: StepBatch | None = None
        self.waits: list[float] = []

    def one(self) -> None:
        start = time.perf_counter()
        batch = self.batch if self.loader is None else self.loader.next_step(self.args.n_disc)
        self.waits.append((time.perf_counter() - start) * 1e3)
        if self.step is not None:
            assert batch is not None
            self.step(batch)

    def warm(self) -> None:
        for _ in range(WARM):
            self.one()
        del self.waits[-WARM:]

    def run(self) -> None:
        for _ in range(self.args.steps):
            self.one()


def load(args: argparse.Namespace) -> Data:
    """Images and labels: the dataset's training set, or random ones of CIFAR's shape."""
    if args.dataset is not None:
        train = load_dataset(args.dataset, args.data_dir).train
        return train.images, train.labels
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (args.images, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, args.images)


def make(kind: str, augment: str, data: Data, args: argparse.Namespace) -> Loader:
    """A tenth of the images has labels."""
    split = max(1, len(data[0]) // 10)
    sampler = SemiSupervisedSampler(np.arange(split), np.arange(split, len(data[0])), args.batch, 0)
    return make_loader(kind, *data, sampler, args.device, torch.float32, AUGMENTS[augment])


def training_step(args: argparse.Namespace) -> Callable[[StepBatch], None]:
    """Forward and backward of WRN-depth-width on C's labelled and unlabelled images, and SGD."""
    torch.manual_seed(0)
    C = Classifier(1000, args.depth, args.width).to(args.device, memory_format=torch.channels_last)
    sgd = torch.optim.SGD(C.parameters(), lr=0.01)

    def step(batch: StepBatch) -> None:
        assert batch.C.x_u is not None
        loss = F.cross_entropy(C(batch.C.x_l), batch.C.y_l) + C(batch.C.x_u).square().mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()

    return step


def memory_mib() -> float:
    """Proportional share of all pages of this process and of its workers; 0 where /proc does not tell."""
    total = 0
    for pid in ("self", *(worker.pid for worker in multiprocessing.active_children())):
        file = Path(f"/proc/{pid}/smaps_rollup")
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def start(kind: str, augment: str, data: Data, args: argparse.Namespace) -> tuple[Loader, timing.Row]:
    """A loader, and what it cost to have it."""
    before, began = memory_mib(), time.perf_counter()
    loader = make(kind, augment, data, args)
    loader.next_step(args.n_disc)
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    loader.next_step(args.n_disc)
    grown = memory_mib() - before
    loader.close()
    return loader, {"startup_s": seconds, "memory_mib": grown}


def bench(augment: str, data: Data, args: argparse.Namespace, notes: list[str]) -> list[timing.Row]:
    """Rows of all loaders, with or without augmentation; all of them are interleaved."""
    candidates: dict[tuple[str, str], Candidate] = {}
    costs: dict[str, timing.Row] = {"none": {}}
    step = training_step(args)
    for kind in args.loader:
        try:
            loader, costs[kind] = start(kind, augment, data, args)
        except ValueError as error:  # DALI is not installed
            notes.append(f"{kind}: not measured: {error}")
            continue
        candidates[kind, "alone"] = Candidate(loader, None, args)
        candidates[kind, "training"] = Candidate(loader, step, args)
    still = candidates["none", "training"] = Candidate(None, step, args)
    still.batch = make("resident", augment, data, args).next_step(args.n_disc)

    def turn(candidate: Candidate) -> None:
        for other in candidates.values():
            if other.loader is not None:
                other.loader.close()
        candidate.warm()

    try:
        times = timing.measure(
            {"/".join(key): c.run for key, c in candidates.items()}, args.rounds, args.warmup, args.device,
            before={"/".join(key): lambda c=c: turn(c) for key, c in candidates.items()},
        )  # fmt: skip
    finally:
        for c in candidates.values():
            if c.loader is not None:
                c.loader.close()
    base = times["none/training"].median
    rows = []
    for (kind, mode), c in candidates.items():
        t = times[f"{kind}/{mode}"]
        n = 0 if c.loader is None else c.loader.images_per_step(args.n_disc)
        per_step = timing.Times(*(value / args.steps for value in (t.median, t.p10, t.p90)), t.n)
        row = {"loader": kind, "augment": augment, "mode": mode, "images": n or None,
               "images_per_s": n / per_step.median * 1e3 if n else None, **per_step.row()}  # fmt: skip
        if mode == "training":
            wait = float(np.median(c.waits[-args.rounds * args.steps :]))
            row |= {"wait_ms": wait, "wait_percent": 100 * wait / per_step.median, "slowdown": t.median / base}
        rows.append(row | costs[kind])
    return rows


def main() -> None:
    parser = timing.parser(__doc__, "loader", rounds=5, warmup=1, keys=KEYS)
    parser.add_argument("--loader", choices=list(KINDS), nargs="+", default=list(KINDS))
    parser.add_argument("--augment", choices=list(AUGMENTS), nargs="+", default=list(AUGMENTS))
    parser.add_argument("--batch", type=int, default=256, help="labelled images, and as many unlabelled ones")
    parser.add_argument("--n-disc", type=int, default=0, help="D updates per step, each two batches (default 0: C's)")
    parser.add_argument("--steps", type=int, default=5, help="steps of a round (default %(default)s)")
    parser.add_argument("--images", type=int, default=50000, help="random ones (default %(default)s)")
    parser.add_argument("--dataset", help="a dataset's training images instead, with --data-dir where it has files")
    parser.add_argument("--data-dir")
    parser.add_argument("--depth", type=int, default=10, help="of the net that trains (default %(default)s)")
    parser.add_argument("--width", type=int, default=1, help="of the net that trains (default %(default)s)")
    args = timing.parse(parser)
    for name in ("batch", "steps", "images"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: {getattr(args, name)}; accepted: >= 1")
    if args.n_disc < 0 or args.depth % 6 != 4:
        parser.error(f"--n-disc: {args.n_disc}, --depth: {args.depth}; accepted: >= 0, 6 n + 4")
    if args.tiny:
        args.batch, args.images, args.steps = 8, 256, 2
    try:
        data = load(args)
    except (ValueError, OSError) as error:
        parser.error(f"--dataset: {error}")
    notes = [
        "Times are of one step, medians over rounds of --steps steps; loaders are interleaved round by round, and only "
        "the one whose turn it is runs.",
        f"training: WRN-{args.depth}-{args.width}, forward, backward and SGD on C's images; a loader is fast enough "
        "where slowdown is 1.",
        f"{len(data[0])} images of {' x '.join(map(str, data[0].shape[1:]))}, "
        f"{args.dataset or 'random'}; batch {args.batch} + {args.batch}, {args.n_disc} D updates.",
    ]
    rows: list[timing.Row] = []
    for augment in dict.fromkeys(args.augment):
        rows += bench(augment, data, args, notes)
        timing.write_results(args.out, args.name, rows, timing.environment(args.device), notes=notes, copy=args.json)
        print(f"augment {augment}: {len(rows)} rows", file=sys.stderr, flush=True)
    short = ("loader", "augment", "mode", "median_ms", "images_per_s", "wait_percent", "slowdown")
    print("\n".join(timing.table([{key: row.get(key) for key in short} for row in rows])))


if __name__ == "__main__":
    main()
