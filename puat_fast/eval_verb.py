"""`puat-fast eval`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from puat_fast.config import option_types
from puat_fast.evaluation.compare import wilson_interval
from puat_fast.evaluation.names import ACCEPTED, AttackSpec, parse_attacks
from puat_fast.runlog import ProgressLine
from puat_fast.terminal import add_device, add_json, add_verb, at_least, check_target, table, write_json

DATASETS = get_args(option_types()["dataset"])
KEYS = """\
keys of the JSON file:
  run, dataset  what was evaluated, and on what
  n, seed       number of test images, seed of the attacks
  attacks       name of each -> accuracy (0 to 1), wilson95: its 95 % interval [low, high], correct, n, seconds,
                eps, step_size (images are in [0, 1], of gpgd and usong the latent; null: it adapts), num_steps.
                aa also: after, its accuracy before and after each attack, broken_by, for each image what broke it
                ("clean": wrong before; null: nothing), attack_seconds, warnings.
                gpgd and usong also: generated_acc, accuracy on the AC-GAN's images before the attack, agreement and
                agreement_adv, part of them whose class its label head tells, before and after, draws of each label,
                compat"""


def add(verbs: Any) -> None:
    """The verb `eval`."""
    parser = add_verb(
        verbs, "eval", _eval, "measure a classifier's accuracy under attacks", "RUN_OR_FILE [options]", KEYS
    )
    parser.add_argument("path", metavar="RUN_OR_FILE", type=Path, help="run directory, or a .safetensors file")
    attacks = "clean,pgd-2,pgd-4,pgd-8"
    parser.add_argument(
        "--attacks", default=attacks, metavar="NAMES", help=f"accepted: {ACCEPTED} (default: %(default)s)"
    )
    parser.add_argument("--n", type=at_least(1), metavar="N", help="first N test images (default: all)")
    parser.add_argument("--batch-size", type=at_least(1), default=256, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--engine", choices=("auto", "eager", "compiled"), default="auto",
        help="compiled: torch.compile, BatchNorm folded; auto: compiled on a GPU (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--acgan", type=Path, metavar="RUN_OR_FILE", help="of gpgd and usong: made by --method acgan")
    parser.add_argument(
        "--uae-compat", choices=("none", "official-v1"), default="none",
        help="gpgd and usong as the official script has them, mistakes included (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--dataset", choices=DATASETS, help="other test images than the run's own")
    parser.add_argument("--data-dir", metavar="TEXT", help="folder that holds the dataset's files (default: the run's)")
    add_device(parser)
    add_json(parser)


def _eval(options: argparse.Namespace) -> int:
    attacks = parse_attacks(options.attacks)
    check_target(options.json)
    if not options.path.exists():
        raise FileNotFoundError(f"{options.path}: no such run directory or file")
    from puat_fast.evaluation.evaluate import evaluate_run

    with _Progress() as progress:
        result = evaluate_run(
            options.path, [attack.name for attack in attacks], n=options.n, batch_size=options.batch_size,
            seed=options.seed, device=options.device, dataset=options.dataset, data_dir=options.data_dir,
            progress=progress, engine=options.engine, acgan=options.acgan, compat=options.uae_compat,
        )  # fmt: skip
    rows = []
    for name, found in result["attacks"].items():
        low, high = found["wilson95"] = wilson_interval(found["correct"], found["n"])
        interval = f"{100 * low:.2f} - {100 * high:.2f}"
        rows.append([name, f"{100 * found['accuracy']:.2f}", interval, str(found["n"]), f"{found['seconds']:.1f}"])
    table(f"{result['run']} on {result['dataset']}", ["attack", "accuracy %", "95 % interval", "n", "seconds"], rows)
    _latent_table(result["attacks"])
    write_json(options.json, result)
    if options.path.is_dir():
        try:
            write_json(_eval_file(options, attacks), result)
        except OSError as error:  # somebody else's run
            print(f"puat-fast: not kept in the run: {error.filename}: {error.strerror}", file=sys.stderr)
    return 0


def _latent_table(attacks: dict[str, dict[str, Any]]) -> None:
    """Beside each accuracy on generated images what puts it into proportion."""
    shown = ("accuracy", "generated_acc", "agreement", "agreement_adv")
    latent = {name: found for name, found in attacks.items() if "generated_acc" in found}
    rows = [[name, *(f"{100 * found[key]:.2f}" for key in shown)] for name, found in latent.items()]
    if rows:
        columns = ["", "accuracy %", "before the attack %", "label head agrees %", "and after %"]
        table("generated images, and whether the AC-GAN's label head still tells their class", columns, rows)


def _eval_file(options: argparse.Namespace, attacks: Sequence[AttackSpec]) -> Path:
    # A quick look at a part of the images, or at other ones, does not overwrite the result on all of the run's own.
    parts = [attack.name for attack in attacks]
    parts += [f"n{options.n}"] if options.n else []
    parts += [options.dataset] if options.dataset else []
    folder: Path = options.path / "eval"
    folder.mkdir(exist_ok=True)
    return folder / ("_".join(parts) + ".json")


class _Progress:
    """Shows how far an evaluation is; called with the attack's name, images done, images in all, accuracy so far."""

    def __enter__(self) -> _Progress:
        from rich.console import Console

        self._line = ProgressLine(Console(stderr=True))
        return self

    def __call__(self, name: str, done: int, total: int, accuracy: float) -> None:
        if self._line.due():
            self._line.show(f"{name}  {done}/{total} images  accuracy {100 * accuracy:.2f} %")

    def __exit__(self, *error: object) -> None:
        self._line.close()
