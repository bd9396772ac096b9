"""GPGD and USong from both of their starts, on trained runs: latent_starts.py ACGAN RUN... [options], see --help.

A Markdown table: C's accuracy, and how often the AC-GAN's label head tells the class, on Gen(z, y), on the images at
the start, and after the attack. With --picture also the images themselves, with C's verdicts, of the first run.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from puat_fast import checkpoint, plots
from puat_fast.attacks import LatentExamples, gpgd, usong
from puat_fast.attacks.acgan import told_class
from puat_fast.attacks.acgan_file import AcGan, load_acgan
from puat_fast.data.formats import load_dataset
from puat_fast.evaluation.names import AttackSpec, parse_attack
from puat_fast.noise import Noise

ATTACKS, STARTS = ("gpgd-0.01", "gpgd-0.1", "usong"), ("ball", "image")
BATCH = 256  # as `puat-fast eval`, so that the draws are the same


def attack(C: nn.Module, gan: AcGan, y: Tensor, spec: AttackSpec, start: str, noise: Noise, steps: int):
    """LatentExamples of one batch."""
    search = partial(gpgd, C, gan.G) if spec.kind == "gpgd" else partial(usong, C, gan.G, gan.D)
    return search(y, eps=spec.eps, step_size=spec.step_size, num_steps=steps, start=start, noise=noise)


@torch.no_grad()
def judged(C: nn.Module, gan: AcGan, y: Tensor, images: Tensor, generated: Tensor) -> Tensor:
    """(accuracy of C, agreement of the label head), as counts."""
    return torch.stack([(C(images).argmax(1) == y).sum(), (told_class(gan.D(generated)[1]) == y).sum()])


def measure(C: nn.Module, gan: AcGan, labels: Tensor, spec: AttackSpec, start: str) -> tuple[str, ...]:
    """Cells "accuracy / agreement" in percent: before, at the start, after."""
    y_all, counts = labels.repeat_interleave(spec.draws), torch.zeros(3, 2)
    noises = Noise(0), Noise(0)
    for y in y_all.split(BATCH):
        first, last = (attack(C, gan, y, spec, start, n, s) for n, s in zip(noises, (0, spec.num_steps), strict=True))
        shown: list[tuple[Tensor, Tensor]] = [(first.x_nat, first.generated_nat)]
        shown += [(found.x_adv, found.generated_adv) for found in (first, last)]
        counts += torch.stack([judged(C, gan, y, *images) for images in shown])
    return tuple(f"{right:.3g} / {told:.3g} %" for right, told in (100 * counts / len(y_all)).tolist())


def picture(C: nn.Module, gan: AcGan, path: Path) -> None:
    """One image of each class: as generated, and after the attacks."""
    y = torch.arange(gan.G.num_classes)[:10]

    def row(label: str, images: Tensor) -> plots.ImageRow:
        with torch.no_grad():
            captions, good = plots.verdicts(y.tolist(), C(images).argmax(1).tolist())
        return plots.ImageRow(label=label, images=images.numpy(), captions=captions, good=good)

    def found(name: str, start: str) -> LatentExamples:
        spec = parse_attack(name)
        return attack(C, gan, y, spec, start, Noise(1), spec.num_steps)

    rows = [row("Gen(z,y)", found("gpgd-0.1", "ball").x_nat)]
    rows += [row(name, found(name, "ball").x_adv) for name in ("gpgd-0.1", "usong")]
    rows.append(row("usong, image start", found("usong", "image").x_adv))
    plots.save_grid(path, rows, "an AC-GAN's digits, and the verdicts of C'")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("acgan", type=Path, help="run directory of `puat-fast train --method acgan`")
    parser.add_argument("runs", type=Path, nargs="+", help="run directories of classifiers of the same dataset")
    parser.add_argument("-n", type=int, default=100, help="first test labels to take (%(default)s)")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="%(default)s")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--picture", type=Path, help="PNG to write")
    options = parser.parse_args()
    gan = load_acgan(options.acgan, torch.device("cpu"))
    labels = torch.tensor(load_dataset(gan.dataset, options.data_dir).test.labels)[: options.n]
    print("| run | attack | start | before | at the start | after |\n|---|---|---|---|---|---|", flush=True)
    for run in options.runs:
        C = checkpoint.load_classifier(run, torch.device("cpu")).eval()
        if options.picture is not None and run == options.runs[0]:
            picture(C, gan, options.picture)
        for spec in map(parse_attack, options.attacks.split(",")):
            for start in STARTS:
                print(
                    "|",
                    " | ".join([run.name, spec.name, start, *measure(C, gan, labels, spec, start)]),
                    "|",
                    flush=True,
                )


if __name__ == "__main__":
    main()
