"""One trained classifier under several attacks, each with its record, and the files that come of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puat_fast import _C, __version__, checkpoint, files, kernels, networks
from puat_fast.attacks.acgan_file import AcGan
from puat_fast.attacks.gpgd import Compat, Start
from puat_fast.attacks.precision import check_precision
from puat_fast.config import Config, ConfigError, SearchPrecision
from puat_fast.data.formats import load_dataset
from puat_fast.engine import compiling
from puat_fast.engine.signals import StopSignal
from puat_fast.engine.step import resolve_engine
from puat_fast.engine.trainer import resolve_device
from puat_fast.evaluation import evaluate, latent, tally
from puat_fast.evaluation.compare import paper_cell, paper_notes, wilson_interval
from puat_fast.evaluation.names import AttackSpec, parse_attack, parse_precision
from puat_fast.evaluation.picture import Examples, save_picture
from puat_fast.evaluation.record import Record, State, Store, digest
from puat_fast.evaluation.tally import Progress, counts


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a classifier is evaluated.

    Args:
        n: the first n test images; None: all
        dataset, data_dir: None: the run's own
        mean, std: of the classifier's input, where its file does not tell
        engine: eager | compiled (torch.compile, BatchNorm folded; the same to rounding) | graph (compiled, on a GPU,
            and replayed as CUDA graphs) | auto, compiled on a GPU
        precision: of the attacks' searches, see `names.parse_precision`
        acgan: run directory or file of the AC-GAN that gpgd and usong search
        compat, start, antialias: of these two, see `attacks.gpgd`
        out: folder of the records, in its folder `attacks`; None: none are kept
        fresh: measure anew what there is a record of
    """

    n: int | None = None
    batch_size: int = 256
    seed: int = 0
    device: str = "auto"
    engine: str = "auto"
    precision: str = "fp32"
    dataset: str | None = None
    data_dir: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    acgan: Path | None = None
    compat: Compat = "none"
    start: Start | None = None
    antialias: bool = False
    out: Path | None = None
    fresh: bool = False


@dataclass(frozen=True)
class Subject:
    """What is known of a classifier before its weights are read."""

    path: Path
    about: checkpoint.ClassifierInfo
    dataset: str
    data_dir: str | None
    classes: str
    config: Config | None

    @property
    def model(self) -> dict[str, Any]:
        """method, arch, preset, n_labelled; None where nobody knows."""
        facts = self.about.facts
        told = {key: facts.get(key) for key in ("method", "preset", "n_labelled")}
        if self.config is not None:
            told = {"method": self.config.method, "preset": self.config.preset,
                    "n_labelled": self.config.data.n_labelled}  # fmt: skip
        return {"arch": f"WRN-{self.about.depth}-{self.about.width}", **told}


@dataclass(frozen=True)
class Evaluation:
    """What came of it: result, as `--json` writes it; verdicts, as the .npz holds them; examples of each attack."""

    result: dict[str, Any]
    verdicts: dict[str, np.ndarray]
    examples: dict[str, Examples]
    class_names: Sequence[str]

    def write(self, folder: Path, name: str, grid: Path | None = None) -> None:
        """<name>.json, .npz, and .png (or `grid`) in a folder. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / f"{name}.json", self.result)
        with files.atomic_write(folder / f"{name}.npz") as beside, open(beside, "wb") as file:
            np.savez_compressed(file, **self.verdicts)  # type: ignore[arg-type]
        self.draw(grid or folder / f"{name}.png")

    def draw(self, grid: Path) -> None:
        """The picture of the examples; none without an attack. Raises OSError."""
        title = f"{self.result['run']}, {self.result['dataset']}: what C says"
        save_picture(grid, self.examples, self.class_names, title)


def find(path: Path, options: Options) -> Subject:
    """What a run directory or file is of, and the images to take. Raises CheckpointError, ConfigError."""
    path = path.expanduser()
    about = checkpoint.about(path)
    config_file = path / "config.yaml"
    config = Config.load(config_file) if config_file.exists() else None
    dataset = options.dataset or about.dataset
    if dataset is None:
        raise ConfigError(f"dataset: {path} does not tell what it was trained on; name it by --dataset")
    data_dir = options.data_dir or (config.data_dir if config else None)
    # of a file the number of classes tells, if not the paper's, then all
    paper = about.num_classes == 10 or dataset not in ("tiny-imagenet", "imagenet32")
    classes = config.data.classes if config else "paper" if paper else "all"
    return Subject(path, about, dataset, data_dir, classes, config)


def evaluate_run(
    path: Path | str | Subject,
    attacks: Sequence[str],
    options: Options = Options(),
    *,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Evaluate a classifier, of a run directory or a file, on test images.

    With `options.out`, an attack that was measured before is taken from its record, and one that was interrupted goes
    on where it was; SIGINT and SIGTERM keep what is done and raise KeyboardInterrupt. tell: gets a line for whatever
    the user should know. `eval --help` tells the keys of the result. Raises ConfigError, DataError, CheckpointError.
    """
    specs = [parse_attack(name) for name in attacks]
    subject = path if isinstance(path, Subject) else find(Path(path), options)
    bench = _Bench(subject, specs, options)
    store = Store(None if options.out is None else options.out / "attacks", options.fresh, tell)
    states, results = {}, {}
    with _Stop() as stop:
        for spec in specs:
            record = store.open(spec.name, bench.key(spec))
            kept = record.complete
            if not kept:
                _measure(bench, spec, record, stop, progress)
            assert record.state is not None
            states[spec.name] = record.state
            results[spec.name] = bench.summary(spec, record.state) | {"measured": record.measured, "kept": kept}
    return bench.evaluation(results, states)


class _Stop(StopSignal):
    """Says that it waits: a batch may take minutes."""

    def _receive(self, number: int, frame: FrameType | None) -> None:
        super()._receive(number, frame)
        # by the system itself: a print may stand in the middle of another one
        os.write(2, b"puat-fast: stopping once this batch is saved; a second time, at once\n")


def _measure(bench: _Bench, spec: AttackSpec, record: Record, stop: StopSignal, progress: Progress | None) -> None:
    def save(state: State) -> None:
        record.save(state, now=bool(stop.name))
        _leave_if(stop, record)

    record.save(bench.measure(spec, record.state, save, progress), complete=True)
    _leave_if(stop, record)


def _leave_if(stop: StopSignal, record: Record) -> None:
    if stop.name:
        told = "and saved; the same command, without --fresh, goes on" if record.on_disk else "and nothing was saved"
        raise KeyboardInterrupt(f"interrupted, {told}")


class _Bench:
    """A classifier, its test images, and how each attack runs on them."""

    def __init__(self, subject: Subject, specs: Sequence[AttackSpec], options: Options) -> None:
        self.subject, self.options = subject, options
        self.precision: Mapping[str, SearchPrecision] = parse_precision(options.precision, specs)
        self.device = resolve_device(options.device)
        for precision in self.precision.values():
            check_precision(precision, self.device)
        self.C = checkpoint.load_classifier(subject.path, self.device, mean=options.mean, std=options.std)
        self.acgan: AcGan | None = None
        if any(spec.latent for spec in specs):
            self.acgan = latent.load_acgan_for(options.acgan, self.device, self.C.num_classes)
        self.images, self.labels, self.n_test, self.class_names = _test_images(subject, options.n)
        parts = [_code(), __version__, torch.__version__, self.device.type, self.C, self.images, self.labels]
        self.engine = resolve_engine(options.engine, self.device)
        if self.engine == "graph" and self.device.type != "cuda":
            raise ConfigError(f"engine: graph is of GPUs, the device is {self.device}; accepted there: eager, compiled")
        if self.engine != "eager" and compiling.why_not(self.device.type) is not None:
            self.engine = "eager"
        self._model_key = digest(*parts, self.engine, options.seed, options.batch_size)
        self._how: dict[str, Any] = {"compat": options.compat, "start": options.start, "antialias": options.antialias}
        self._acgan_key = digest(self.acgan.G, self.acgan.D, self._how) if self.acgan else ""
        if self.engine != "eager":
            self.C.set_fold_bn(True)
            compiling.compile_network(self.C, graphs=self.engine == "graph")

    def key(self, spec: AttackSpec) -> str:
        """Of the record: all that determines the numbers."""
        of_acgan = self._acgan_key if spec.latent else ""
        return digest(self._model_key, asdict(spec), self.precision[spec.name], of_acgan)

    def measure(
        self, spec: AttackSpec, saved: State | None, save: Callable[[State], None], progress: Progress | None
    ) -> State:
        o = self.options
        settings: dict[str, Any] = {
            "batch_size": o.batch_size, "seed": o.seed, "precision": self.precision[spec.name], "progress": progress,
            "saved": saved, "save": save,
        }  # fmt: skip
        if spec.latent:
            assert self.acgan is not None
            return latent.measure(self.C, self.acgan, self.labels, spec, **self._how, **settings)
        return evaluate.measure(self.C, self.images, self.labels, spec, **settings)

    def summary(self, spec: AttackSpec, state: State) -> dict[str, Any]:
        """Of one attack, with its interval."""
        found = (latent if spec.latent else evaluate).summary(spec, state, self.precision[spec.name])
        found |= self._how if spec.latent else {}
        return found | {"wilson95": wilson_interval(found["correct"], found["n"])}

    def evaluation(self, results: dict[str, Any], states: Mapping[str, State]) -> Evaluation:
        """All of it together; states by attack, in order."""
        s, classes = self.subject, self.C.num_classes
        model = self.subject.model | {"weights": checkpoint.fingerprint(self.C)}
        result = {
            "run": str(s.path), "dataset": s.dataset, "n": len(self.labels), "n_test": self.n_test,
            "seed": self.options.seed, "engine": self.engine, "model": model, "attacks": results,
        }  # fmt: skip
        own = s.about.dataset in (None, s.dataset)  # the paper tests on the dataset that was trained on
        result["paper"] = {name: paper_cell(s.dataset, model["method"], name, classes) if own else None
                           for name in results}  # fmt: skip
        specs = [parse_attack(name) for name in results]
        verdicts = verdicts_of(self.labels, specs, states)
        if "worst_case" in verdicts:
            worst = counts(torch.from_numpy(verdicts["worst_case"]))
            result["worst_case"] = worst | {"wilson95": wilson_interval(worst["correct"], worst["n"])}
        result["notes"] = paper_notes(result)
        examples = {name: Examples(state["examples"]) for name, state in states.items()}
        return Evaluation(result, verdicts, examples, self.class_names)


def _sources() -> list[Path]:
    """The files that the numbers come from: attacks, networks, ops with their kernels, and what counts the verdicts."""
    root = Path(networks.__file__).parents[1]
    folders = [root / "attacks", root / "networks", root / "ops", *map(Path, kernels.__path__)]
    found = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    found += [root / "noise.py", root / "objectives.py"]
    return [*found, *(Path(str(module.__file__)) for module in (evaluate, latent, tally, _C))]


def _code() -> str:
    """sha256 of these: while they are worked on, the version stays."""
    return digest([hashlib.sha256(file.read_bytes()).hexdigest() for file in _sources()])


def _test_images(subject: Subject, n: int | None) -> tuple[Tensor, Tensor, int, Sequence[str]]:
    data = load_dataset(subject.dataset, subject.data_dir, subject.classes)
    if data.num_classes != subject.about.num_classes:
        raise ConfigError(
            f"dataset: {data.name} has {data.num_classes} classes, the classifier {subject.about.num_classes}"
        )
    images, labels = torch.tensor(data.test.images[:n]), torch.tensor(data.test.labels[:n])
    return images, labels, len(data.test), data.class_names


def verdicts_of(labels: Tensor, specs: Sequence[AttackSpec], states: Mapping[str, State]) -> dict[str, np.ndarray]:
    """Example by example: `label`, and by the name of each attack whether the classifier is still right.

    Of gpgd and usong draws x N. `aa.broken_by`, of aa-Nit alike: names, "" of what withstood. `worst_case`: right under
    all attacks on the images, where there are two or more.
    """
    found: dict[str, np.ndarray] = {"label": labels.numpy()}
    for spec in specs:
        state = states[spec.name]
        right = state["columns"]["right"].numpy()
        found[spec.name] = right.reshape(-1, spec.draws).T if spec.latent else right
        if spec.kind == "aa":
            found[f"{spec.name}.broken_by"] = np.array([name or "" for name in state["found"]["broken_by"]])
    of_images = [found[spec.name] for spec in specs if not spec.latent]
    if len(of_images) > 1:
        found["worst_case"] = np.logical_and.reduce(of_images)
    return found
