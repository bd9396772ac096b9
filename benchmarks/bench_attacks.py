"""AutoAttack: pyautoattack on the net in plain torch, as one loads it elsewhere, and ours on the same weights.

Every subject runs the standard version, attack by attack on the images that withstood its own earlier ones; subjects
take turns after each attack. A round is the whole of it. The reference's net is the re-stated official classifier, its
weights requiring gradients, as `load_model` gives them. pyautoattack must be installed: pip install "puat-fast[test]".
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import eager_baseline
import timing
import torch
from torch import Tensor, nn

from puat_fast import checkpoint
from puat_fast.attacks.autoattack import STANDARD, AttackWarning, autoattack
from puat_fast.config import Config
from puat_fast.data import load_dataset
from puat_fast.engine import compiling
from puat_fast.networks import Classifier
from puat_fast.noise import Noise

KEYS = """\
attack, subject     one of the four, or all; reference (pyautoattack), or ours by the precision of the search
attacked, left      images when the attack began and those that withstood it
robust_acc          left over all images
agree               part of all images of which the reference says the same, whether they withstood
attack_ms_per_image
                    median over the images attacked
cpu_s               processor time of the last round
speedup             the reference's median over this one's; of each attack on its own survivors
cpu_speedup         the same by cpu_s: with one thread it holds on a busy machine too"""
SUBJECTS = ("reference", "fp32", "bf16")

Attack = Callable[[str, Tensor, Tensor], Tensor]
"""(name, x, y) -> x_adv."""


@dataclass
class Subject:
    """One who attacks; what has withstood so far, and milliseconds and accuracies by attack."""

    model: nn.Module
    attack: Attack
    warm_up: Attack
    robust: Tensor
    times: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    flags: dict[str, Tensor] = field(default_factory=dict)

    def milliseconds(self, name: str) -> list[float]:
        """Of each round."""
        return [sum(t) for t in zip(*self.times.values(), strict=True)] if name == "all" else self.times[name]

    def run(self, name: str, x: Tensor, y: Tensor) -> None:
        rows = self.robust.nonzero().flatten()
        sync(x.device)
        start, cpu = time.perf_counter(), time.process_time()
        if len(rows):
            x_adv = self.attack(name, x[rows], y[rows])
            self.robust[rows] = right(self.model, x_adv, y[rows])
        sync(x.device)
        self.times.setdefault(name, []).append((time.perf_counter() - start) * 1e3)
        self.cpu[name] = time.process_time() - cpu
        self.counts[name] = len(rows), int(self.robust.sum())
        self.flags[name] = self.robust.clone()


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether the model is right, image by image."""
    return torch.cat([model(part).argmax(1) for part in x.split(250)]) == y


def plain(C: Classifier) -> nn.Module:
    """The same weights in plain torch, channels first, as other people's code has them."""
    arch = {"classifier": {"depth": C.depth, "width": C.width}}
    mean, std = (list(values) for values in C.normalisation)
    config = Config.preset("paper", dataset="digits", data={"mean": mean, "std": std}, **arch)
    device = next(C.parameters()).device
    net = eager_baseline.WideResNet(C.num_classes, config, Noise(0, device))
    net.load_state_dict(C.state_dict())
    return net.to(device).eval()


def reference(net: nn.Module, args: argparse.Namespace) -> Attack:
    """pyautoattack's, batch by batch."""
    from pyautoattack.autoattack import AutoAttack

    suite = AutoAttack(net, norm="Linf", eps=args.eps, seed=args.seed, device=str(args.device))
    attacks = {"apgd-ce": suite.apgd, "apgd-t": suite.apgd_targeted, "fab-t": suite.fab, "square": suite.square}
    for attack in attacks.values():
        attack.n_restarts, attack.seed = 1, args.seed
        attack.n_target_classes, attack.n_iter = args.targets, args.steps
    suite.apgd.loss, suite.square.n_queries, suite.fab.targeted = "ce", args.queries, True

    def attack(name: str, x: Tensor, y: Tensor) -> Tensor:
        parts = zip(x.split(args.reference_batch), y.split(args.reference_batch), strict=True)
        return torch.cat([attacks[name].perturb(a, b).detach() for a, b in parts])

    return attack


def ours(net: nn.Module, precision: str, args: argparse.Namespace) -> Attack:
    def attack(name: str, x: Tensor, y: Tensor) -> Tensor:
        found = autoattack(
            net, x, y, args.eps, attacks=[name], iterations=args.steps, num_queries=args.queries, seed=args.seed,
            num_targets=args.targets, batch_size=args.batch, precision=precision,
        )  # fmt: skip
        return found.x_adv

    return attack


def subjects(C: Classifier, x: Tensor, y: Tensor, args: argparse.Namespace) -> dict[str, Subject]:
    """By name; each begins with the images that it gets right."""
    net = plain(C)
    if args.engine == "compiled":
        C.set_fold_bn(True)
        compiling.compile_network(C)
    few = argparse.Namespace(**{**vars(args), "steps": 2, "queries": 10, "targets": 2})
    found = {}
    for name in args.subjects:
        model = net if name == "reference" else C
        attacks = [reference(net, a) if name == "reference" else ours(C, name, a) for a in (args, few)]
        found[name] = Subject(model, *attacks, right(model, x, y))
    return found


def rows(found: dict[str, Subject], n: int, args: argparse.Namespace) -> list[timing.Row]:
    base, table = found.get("reference"), []
    for name in (*args.attacks, "all"):
        first, last = (args.attacks[0], args.attacks[-1]) if name == "all" else (name, name)
        for label, subject in found.items():
            times = timing.Times.of(subject.milliseconds(name))
            attacked, left = subject.counts[first][0], subject.counts[last][1]
            row: timing.Row = {
                "attack": name, "subject": label, "attacked": attacked, "left": left, "robust_acc": left / n,
                "attack_ms_per_image": times.median / max(attacked, 1),
                "cpu_s": sum(subject.cpu.values()) if name == "all" else subject.cpu[name], **times.row(),
            }  # fmt: skip
            if base is not None:
                row["agree"] = (subject.flags[last] == base.flags[last]).double().mean().item()
                row["speedup"] = timing.Times.of(base.milliseconds(name)).median / times.median
            table.append(row)
    cpu = {row["attack"]: row["cpu_s"] for row in table if row["subject"] == "reference"}
    for row in table if base is not None else ():
        row["cpu_speedup"] = cpu[row["attack"]] / row["cpu_s"]
    return table


def load(args: argparse.Namespace) -> tuple[Classifier, Tensor, Tensor]:
    """The classifier, --n images of its dataset, the test images first, and their labels."""
    if args.net is None:
        torch.manual_seed(0)
        C, name = Classifier(10, 10, 1).eval().requires_grad_(False), "digits"
    else:
        C, name = checkpoint.load_classifier(args.net), args.dataset or checkpoint.about(args.net).dataset
    data = load_dataset(name, args.data_dir)
    sets = (data.test, data.train)
    x = torch.cat([torch.tensor(part.images) for part in sets])[: args.n].float().div(255).to(args.device)
    y = torch.cat([torch.tensor(part.labels) for part in sets])[: args.n].to(args.device)
    C.to(args.device)
    if args.net is None:  # untrained: it is right about what it says
        with torch.no_grad():
            y = C(x).argmax(1)
    return C, x, y


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("n", "steps", "queries", "targets", "batch", "reference_batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(args, name)}; accepted: >= 1")
    if not 0 < args.eps <= 255:
        parser.error(f"--eps: {args.eps:g}; accepted: 0 < eps <= 255, in 1/255")
    if args.net is None and not args.tiny:
        parser.error("--net: needed, a run directory or a classifier file; with --tiny an untrained one is taken")
    if args.tiny:
        args.n, args.steps, args.queries, args.targets, args.batch = 6, 4, 10, 2, 4
    args.eps /= 255


def options() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = timing.parser(__doc__, "attacks", rounds=1, warmup=1, keys=KEYS)
    parser.add_argument("--net", type=Path, metavar="RUN_OR_FILE", help="whose classifier is attacked")
    parser.add_argument("--dataset", help="where the file does not tell")
    parser.add_argument("--data-dir")
    parser.add_argument("--n", type=int, default=100, help="images (default %(default)s)")
    parser.add_argument("--eps", type=float, default=8, help="L-inf radius in 1/255 (default %(default)s)")
    parser.add_argument("--attacks", choices=STANDARD, nargs="+", default=list(STANDARD))
    parser.add_argument("--subjects", choices=SUBJECTS, nargs="+", default=list(SUBJECTS))
    parser.add_argument("--engine", choices=("eager", "compiled"), default="eager", help="ours (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="of ours (default %(default)s)")
    parser.add_argument("--reference-batch", type=int, default=250, help="(default %(default)s, its own)")
    parser.add_argument("--steps", type=int, default=100, help="of APGD and FAB (default %(default)s)")
    parser.add_argument("--queries", type=int, default=5000, help="of Square (default %(default)s)")
    parser.add_argument("--targets", type=int, default=9, help="of APGD-T and FAB-T (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    return parser, timing.parse(parser)


def main() -> None:
    parser, args = options()
    check(parser, args)
    try:
        C, x, y = load(args)
    except (ValueError, OSError, checkpoint.CheckpointError) as error:
        parser.error(str(error))
    warnings.simplefilter("ignore", AttackWarning)
    found = subjects(C, x, y, args)
    natural = {name: subject.robust.clone() for name, subject in found.items()}
    for _ in range(args.warmup):  # compiles, and touches everything once
        for subject in found.values():
            for attack in args.attacks:
                subject.warm_up(attack, x[: args.batch], y[: args.batch])
    for _ in range(args.rounds):
        for name, subject in found.items():
            subject.robust = natural[name].clone()
        for attack in args.attacks:
            for name, subject in found.items():
                subject.run(attack, x, y)
                told = f"{subject.counts[attack]} images, {subject.times[attack][-1] / 1e3:.1f} s"
                print(f"{attack} {name}: {told}", file=sys.stderr, flush=True)
    clean = next(iter(natural.values())).double().mean().item()
    notes = [
        f"WRN-{C.depth}-{C.width}, {len(x)} images, natural accuracy {clean:.1%}, L-inf {args.eps * 255:g}/255; "
        f"{args.steps} steps, {args.queries} queries, {args.targets} targets; batch {args.batch}, the reference's "
        f"{args.reference_batch}; engine of ours: {args.engine}. What bf16 finds is judged in fp32.",
        "Times are of whole attacks, in turns within one process; rounds: n.",
    ]
    table = rows(found, len(x), args)
    timing.write_results(args.out, args.name, table, timing.environment(args.device), notes=notes, copy=args.json)
    short = ("attack", "subject", "attacked", "left", "robust_acc", "agree", "median_ms", "speedup", "cpu_speedup")
    print("\n".join(timing.table([{key: row.get(key) for key in short} for row in table])))


if __name__ == "__main__":
    main()
