"""`puat-fast eval`."""

from __future__ import annotations

import argparse
import datetime
import errno
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

from puat_fast.config import ConfigError, option_types
from puat_fast.evaluation import compare
from puat_fast.evaluation.names import ACCEPTED, AttackSpec, parse_attacks, parse_precision
from puat_fast.runlog import ProgressLine
from puat_fast.terminal import (
    add_device,
    add_json,
    add_normalisation,
    add_verb,
    at_least,
    check_target,
    table,
    write_json,
)

DATASETS = get_args(option_types()["dataset"])
KEYS = """\
Several runs give one table. An evaluation that was killed goes on where it was, and what was measured before is not
measured again (--fresh does). In RUN/eval, or in NAME.eval beside a file NAME.* or a folder NAME of export, or in
--out, lie

  attacks/      the records, one for each attack, and for all that determines its numbers
  ATTACKS.json  what --json writes of one run
  ATTACKS.npz   example by example: label, N; by the name of each attack whether C is still right, N (of gpgd and usong
                draws x N); worst_case, N; aa.broken_by, N names, "" of what withstood (aa-Nit.broken_by)
  ATTACKS.png   some examples, broken ones first: before, after, difference x 10, and what C says

keys of the JSON file (of several runs: runs, a list of these):
  run, dataset  what was evaluated, and on what
  n, n_test     test images taken, and all of them
  seed, engine  of the attacks; eager, compiled or graph
  model         arch, method, preset, n_labelled, null: its file does not tell; weights: the start of their sha256
  attacks       name of each -> accuracy (0 to 1), wilson95: its 95 % interval [low, high], correct, n, seconds,
                eps, step_size (images are in [0, 1], of gpgd and usong the latent; null: it adapts), num_steps,
                precision of the search, measured: when (UTC), kept: whether it was taken from a record,
                warnings, where there are any: why not to trust it.
                aa also: after, its accuracy before and after each attack, broken_by, for each image what broke it
                ("clean": wrong before; null: nothing), attack_seconds.
                gpgd and usong also: generated_acc, accuracy on the AC-GAN's images before the attack, agreement and
                agreement_adv, part of them whose class its label head tells, before and after, draws of each label,
                worst_of_draws, part of the labels that are right in all draws, compat, start, antialias
  worst_case    accuracy, correct, n, wilson95 of the images that are right under all of clean, pgd-E and aa, where two
                or more were asked for
  paper         name of each attack -> mean, std (0 to 1) of the paper's tables III to VII; null: the paper has none
  notes         where these numbers are not of the paper's setting"""


def add(verbs: Any) -> None:
    """The verb `eval`."""
    text = "measure classifiers' accuracy under attacks"
    parser = add_verb(verbs, "eval", _eval, text, "RUN_OR_FILE [RUN_OR_FILE ...] [options]", KEYS)
    parser.add_argument(
        "paths", metavar="RUN_OR_FILE", type=Path, nargs="+",
        help="run directory, .safetensors file, or a torch file of our WRN's state dict",
    )  # fmt: skip
    attacks = "clean,pgd-2,pgd-4,pgd-8"
    parser.add_argument(
        "--attacks", default=attacks, metavar="NAMES", help=f"accepted: {ACCEPTED} (default: %(default)s)"
    )
    parser.add_argument("--n", type=at_least(1), metavar="N", help="first N test images (default: all)")
    parser.add_argument("--batch-size", type=at_least(1), default=256, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--precision", default="fp32", metavar="NAMES",
        help="in which the attacks search: fp32, tf32, bf16, or fp32,aa=bf16; what they find is judged in fp32 "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--engine", choices=("auto", "eager", "compiled", "graph"), default="auto",
        help="compiled: torch.compile, BatchNorm folded; graph: that, as CUDA graphs on a GPU; auto: compiled on a GPU "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--acgan", type=Path, metavar="RUN_OR_FILE", help="of gpgd and usong: made by --method acgan")
    parser.add_argument(
        "--uae-compat", choices=("none", "official-v1"), default="none",
        help="gpgd and usong as the official script has them, mistakes included (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--uae-start", choices=("ball", "image"),
        help="where gpgd and usong begin: in the ball around z, or at z clamped to [0,1] (default: --uae-compat's)",
    )  # fmt: skip
    parser.add_argument(
        "--uae-antialias",
        action="store_true",
        help="shrink the AC-GAN's images as torchvision >= 0.17, not by 2x2 means",
    )  # fmt: skip
    parser.add_argument("--dataset", choices=DATASETS, help="whose test images (default: those of the run's own)")
    parser.add_argument("--data-dir", metavar="TEXT", help="folder that holds the dataset's files (default: the run's)")
    add_normalisation(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for records and results (default: see below)")
    parser.add_argument(
        "--grid", type=Path, metavar="FILE.png", help="where the picture goes (default: to the results)"
    )
    parser.add_argument("--fresh", action="store_true", help="measure anew what was measured or begun before")
    add_device(parser)
    add_json(parser)


def _check(options: argparse.Namespace) -> list[AttackSpec]:
    """The attacks. Raises what is wrong with the options before torch is imported."""
    specs = parse_attacks(options.attacks)
    parse_precision(options.precision, specs)
    for target in (options.json, options.grid):
        check_target(target)
    if options.grid is not None and options.grid.suffix != ".png":
        raise ConfigError(f"grid: {options.grid} does not end in .png")
    if options.grid is not None and len(options.paths) > 1:
        raise ConfigError("grid: is for one run; the pictures of several lie beside their results")
    if options.grid is not None and all(spec.kind == "clean" for spec in specs):
        raise ConfigError("grid: shows what attacks change, and clean is none")
    if options.seed >= 2**63:
        raise ConfigError(f"seed: {options.seed}, accepted: 0 to 2**63 - 1")
    if (options.mean is None) != (options.std is None):
        raise ConfigError("mean, std: give both or none")
    if options.out is not None and options.out.is_file():
        raise ConfigError(f"out: {options.out} is a file, not a folder")
    for path in options.paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such run directory or file")
    return specs


def _eval(options: argparse.Namespace) -> int:
    specs = _check(options)
    several = len(options.paths) > 1
    labels = compare.labels_of([Path(os.path.abspath(path)).name for path in options.paths])  # "." and ".." too
    with _Progress() as progress:
        results = _evaluate(options, specs, labels if several else [""], progress)
    _show(results, labels)
    write_json(options.json, {"runs": results} if several else results[0])
    return 0


def _evaluate(
    options: argparse.Namespace, specs: Sequence[AttackSpec], labels: Sequence[str], progress: _Progress
) -> list[dict[str, Any]]:
    """The result of each path, written beside its records as soon as it is there."""
    from puat_fast.attacks import AttackWarning
    from puat_fast.evaluation.run import Options, evaluate_run, find

    results, subjects, name = [], [], _name(options, specs)
    for path, label in zip(options.paths, labels, strict=True):
        own = Options(
            n=options.n, batch_size=options.batch_size, seed=options.seed, device=options.device,
            engine=options.engine, precision=options.precision, dataset=options.dataset, data_dir=options.data_dir,
            mean=options.mean, std=options.std, acgan=options.acgan, compat=options.uae_compat,
            start=options.uae_start, antialias=options.uae_antialias,
            out=_out(options, path, label, progress), fresh=options.fresh,
        )  # fmt: skip
        subjects.append((find(path, own), own, label))  # all of them, before the first is measured
    for subject, own, label in subjects:
        progress.begin(label)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AttackWarning)  # shown below the table, of a kept record too
            found = evaluate_run(subject, [s.name for s in specs], own, progress=progress, tell=progress.tell)
        try:
            if own.out is not None:
                found.write(own.out, name, options.grid)
            elif options.grid is not None:
                found.draw(options.grid)
        except OSError as error:
            progress.tell(f"not kept: {error.filename}: {error.strerror}")
        results.append(found.result)
    return results


def _out(options: argparse.Namespace, path: Path, label: str, progress: _Progress) -> Path | None:
    """Where records and results of a path go; None where nothing can be written."""
    from puat_fast.checkpoint import MODEL_INFO_FILE

    inside = path.is_dir() and not (path / MODEL_INFO_FILE).exists()  # `export --force` replaces only what it wrote
    folder: Path = path / "eval" if inside else path.absolute().with_name(f"{path.absolute().stem}.eval")
    if options.out is not None:
        folder = options.out / label
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:  # somebody else's run
        progress.tell(f"nothing is kept of this evaluation (--out DIR would): {error.filename}: {error.strerror}")
        return None
    return folder


def _name(options: argparse.Namespace, specs: Sequence[AttackSpec]) -> str:
    # A quick look at a part of the images, or at other ones, does not overwrite the result on all of the run's own.
    precision = parse_precision(options.precision, specs)
    parts = [s.name if precision[s.name] == "fp32" else f"{s.name}-{precision[s.name]}" for s in specs]
    parts += [f"n{options.n}"] if options.n else []
    parts += [f"s{options.seed}"] if options.seed else []
    parts += [options.dataset] if options.dataset else []
    if any(s.latent for s in specs):
        parts += [options.uae_compat] if options.uae_compat != "none" else []
        parts += [options.uae_start] if options.uae_start else []
        parts += ["antialias"] if options.uae_antialias else []
    return "_".join(parts)


def _show(results: Sequence[dict[str, Any]], labels: Sequence[str]) -> None:
    """Tables, and what one should know of the numbers in them."""
    if len(results) > 1:
        n = sorted({result["n"] for result in results})
        title = f"accuracy % (95 % interval), n {', '.join(map(str, n))}"
        table(title, *compare.table_of_several(results, labels))
    for result, label in zip(results, labels, strict=True):
        if len(results) == 1:
            table(f"{result['run']} on {result['dataset']}", *compare.table_of_one(result))
        whose = f"{label}: " if len(results) > 1 else ""
        columns, rows = compare.latent_table(result)
        if rows:
            of = "generated images, and whether the AC-GAN's label head still tells their class"
            table(f"{whose}{of}", columns, rows)
        for note in compare.notes(result):
            print(f"{whose}{note}")


class _Progress:
    """Shows how far an evaluation is; called with the attack's name, images done, images in all, accuracy so far."""

    def __enter__(self) -> _Progress:
        from rich.console import Console

        self._line = ProgressLine(Console(stderr=True))
        self.begin("")
        return self

    def begin(self, label: str) -> None:
        """What follows is of this run."""
        self._label = f"{label}  " if label else ""
        self._clock: tuple[str, int, float] = ("", 0, 0.0)  # attack, images done when it began, when

    def tell(self, text: str) -> None:
        """A line that stays."""
        self._line.print(f"puat-fast: {self._label}{text}")

    def __call__(self, name: str, done: int, total: int, accuracy: float) -> None:
        if self._clock[0] != name or done < self._clock[1]:
            self._clock = (name, done, perf_counter())
        if not self._line.due():
            return
        parts = [f"{self._label}{name}", f"{done}/{total} images"]
        parts += [f"accuracy so far {100 * accuracy:.2f} %"] if done or accuracy else []
        _, first, start = self._clock
        if first < done < total:
            seconds = (perf_counter() - start) * (total - done) / (done - first)
            parts.append(f"{datetime.timedelta(seconds=round(seconds))} left")
        self._line.show("  ".join(parts))

    def __exit__(self, *error: object) -> None:
        self._line.close()
