"""A whole run: data, steps, validation, checkpoints, pictures. The steps themselves are engine/step.py's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puat_fast import checkpoint, plots
from puat_fast.attacks import accuracy
from puat_fast.attacks.pgd import pgd
from puat_fast.config import Config, ConfigError
from puat_fast.data.formats import Dataset, load_dataset
from puat_fast.data.loaders import Augmentation, Loader, make_loader
from puat_fast.data.sampler import BatchSampler, LabelledSampler, SemiSupervisedSampler, ShardedSampler
from puat_fast.data.splits import Split, training_set
from puat_fast.engine import distributed, precision
from puat_fast.engine.samples import sample_rows
from puat_fast.engine.signals import StopSignal
from puat_fast.engine.stats import NonFiniteError
from puat_fast.engine.step import Engine
from puat_fast.methods import METHODS
from puat_fast.networks import Networks
from puat_fast.networks.layers import batch_norms
from puat_fast.noise import Noise
from puat_fast.runlog import MutedRunLog, RunError, RunLog

__all__ = ["Loader", "NonFiniteError", "Run", "Trainer"]

# Streams of one seed must not repeat each other: these tell them apart.
NOISE_STREAM, SAMPLER_STREAM, VALIDATION_STREAM, AUGMENT_STREAM = 1, 2, 3, 4


@dataclass
class Best:
    """The best validation so far: ties go to the later epoch (spec 1.9)."""

    robust_acc: float = -1.0
    epoch: int = 0


@dataclass(frozen=True)
class Run:
    """What fit() returns. summary: accuracies of C' on test images: clean, pgd-8."""

    path: Path
    summary: dict[str, float]


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; of several processes each has its own. Raises ConfigError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.world_size() > 1 and name != "cpu":
        if name != "cuda":
            raise ConfigError(f"device: {name!r} is one device for several processes, accepted: auto, cpu, cuda")
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is not one of auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {name!r} asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def run_path(config: Config) -> Path:
    """The run directory: `out`, or runs/<dataset>-<method>-<preset>-s<seed>."""
    name = f"{config.dataset}-{config.method}-{config.preset}-s{config.seed}"
    return Path(config.out).expanduser() if config.out else Path("runs") / name


class Trainer:
    """Trains by `config` and fills a run directory (README, "What a run writes").

    resume: continue the run in the run directory, if there is one ("auto", or its path). The other arguments replace
    parts of the trainer, for tests and experiments: see puat_fast.testing. Raises ConfigError, DataError, RunError.

    Within `distributed.process_group` all ranks make the same calls. Each trains on its part of every batch of
    `schedule.batch_size`; rank 0 alone validates and writes, and what it finds is the same on all.
    """

    def __init__(
        self,
        config: Config,
        resume: str | None = None,
        *,
        dataset: Dataset | None = None,
        loader: Loader | None = None,
        noise: Noise | None = None,
        networks: Callable[[Networks], None] | None = None,
        on_step: Callable[[Mapping[str, list[Tensor]]], None] | None = None,
    ) -> None:
        if config.method not in METHODS:
            raise ConfigError(f"method: {config.method} is trained by puat_fast.engine.acgan.AcganTrainer")
        self.config = config
        _check_batch(config)
        self.device, self.dtype = resolve_device(config.device), precision.dtype(config.precision)
        if distributed.world_size() > 1 and self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if dataset is None:
            dataset = load_dataset(config.dataset, config.data_dir, config.data.classes)
        self.dataset = dataset
        self.train, self.split = training_set(dataset, config.data, config.seed)
        _check_split(self.split, config)
        if noise is None:
            noise = Noise(stream(config.seed, NOISE_STREAM, distributed.rank()), self.device, self.dtype)
        self.nets = Networks.build(config, self.dataset.num_classes, noise)
        if networks is not None:
            networks(self.nets)
        self.engine = Engine(config, self.nets, noise, steps_per_epoch(config, self.split))
        self.engine.on_step = on_step
        self.given_loader, self.best = loader, Best()
        self.loader = self._make_loader()
        self.val = _tensors(self.train.images, self.train.labels, self.split.validation)
        self.test = _tensors(self.dataset.test.images, self.dataset.test.labels, None)
        path = Path(resume) if resume not in (None, "auto") and config.out is None else run_path(config)
        main = distributed.is_main()
        self.log = RunLog(path, config, resume=resume is not None) if main else MutedRunLog(path, config)
        self.path = self.log.path
        self.engine.say = self.log.message

    # -- the run ------------------------------------------------------------------------------------------------

    def fit(self) -> Run:
        """Train to the end, or from where the run stood; returns the run directory and the final accuracies.

        Ctrl-C and SIGTERM save after the current step and raise KeyboardInterrupt. Raises NonFiniteError naming phase,
        term and step; the last good checkpoint is kept.
        """
        self._resume()
        engine, E = self.engine, self.engine.steps_per_epoch
        total = sum(self._epochs(stage) * E for stage in engine.method.stages)
        done = engine.step_in_stage + (self._epochs(1) * E if engine.stage == 2 and 1 in engine.method.stages else 0)
        with self.log:
            self.log.message(f"{engine.description}; loader: {self.loader.kind}")
            self.log.start(total, done)
            if not len(self.val[1]):
                self.log.message("no validation images: the last epoch is kept, there is no early stopping")
            try:
                with StopSignal() as stop:
                    if engine.stage == 1:
                        self._run_stage(stop)
                        engine.begin_stage2()
                        self.loader.close()
                        self.loader = self._make_loader()
                    self._run_stage(stop)
            finally:
                self.loader.close()
            return self._finish()

    def _run_stage(self, stop: StopSignal) -> None:
        engine, E = self.engine, self.engine.steps_per_epoch
        while engine.step_in_stage < engine.epochs * E:
            self._step()
            if engine.step_in_stage % E == 0:
                self._end_epoch()
            if distributed.any_rank(bool(stop.name)):
                self._save("last")
                how = stop.name or "a signal to another rank"
                raise KeyboardInterrupt(f"stopped by {how}, saved; --resume {self.path} continues")

    def _epochs(self, stage: int) -> int:
        return self.config.pretrain.epochs if stage == 1 else self.config.schedule.epochs

    def _step(self) -> None:
        engine, E = self.engine, self.engine.steps_per_epoch
        n_disc, epoch = engine.num_disc_batches(), engine.epoch
        engine.step(self.loader.next_step(n_disc))
        step = (engine.step_in_stage - 1) % E + 1
        losses = engine.stats.read() if step % self.config.log.interval == 0 or step == E else None
        images = distributed.world_size() * self.loader.images_per_step(n_disc)
        self.log.step(stage=engine.stage, epoch=epoch, epochs=engine.epochs, step=step, steps=E,
                      images=images, losses=losses)  # fmt: skip

    def _end_epoch(self) -> None:
        """Teacher's statistics, validation, metrics row, checkpoints, pictures."""
        engine, c, epoch = self.engine, self.config, self.engine.epoch - 1
        distributed.average_(running_statistics(self.nets))
        engine.end_epoch()
        last = engine.step_in_stage == engine.epochs * engine.steps_per_epoch
        row: dict[str, Any] = {"stage": engine.stage, "epoch": epoch, "step": engine.step_in_stage}
        s = engine.last_scalars
        row |= {"lr": s.lr, "momentum": s.momentum, "ema_decay": s.ema_decay, "adv_ramp": s.adv_ramp}
        row |= {"consistency_weight": s.consistency_weight} | engine.stats.read()
        engine.stats.reset()
        row["test_clean_acc"] = self._accuracy(self.test)
        if engine.stage == 2 and len(self.val[1]) and (epoch % c.val.every == 0 or last):
            row["val_clean_acc"] = self._accuracy(self.val)
            row["val_robust_acc"] = self._accuracy(self.val, robust=True)
        is_best = engine.stage == 2 and self._is_best(row.get("val_robust_acc"), epoch)
        row["best"] = int(is_best)
        self.log.epoch(row)
        if is_best:
            self._save("best")
            if distributed.is_main():
                self._save_classifier(epoch, row.get("val_robust_acc"))
        if epoch % c.log.checkpoint_every == 0 or last:
            self._save("last")
        if not distributed.is_main():
            return
        if engine.method.has_generator and (last or (c.log.sample_every and epoch % c.log.sample_every == 0)):
            self._save_samples(f"stage{engine.stage}-epoch{epoch:03d}.png", epoch)
        plots.save_curves(self.path / "curves.png", self.log.rows)

    def _is_best(self, robust_acc: float | None, epoch: int) -> bool:
        """Methods without early stopping, and runs without validation images, keep the last epoch."""
        keeps_last = not self.engine.method.early_stopping or not len(self.val[1])
        if not keeps_last and (robust_acc is None or robust_acc < self.best.robust_acc):
            return False
        self.best = Best(-1.0 if robust_acc is None else robust_acc, epoch)
        return True

    def _finish(self) -> Run:
        """Measure the best classifier on test images."""
        n = self.config.val.final_images
        summary = distributed.on_main(lambda: self._final_accuracies(n))
        self.log.message(
            f"teacher of epoch {self.best.epoch} on {len(self.test[1][:n])} test images: natural accuracy "
            f"{100 * summary['clean']:.2f} %, PGD-8/255 robust accuracy {100 * summary['pgd-8']:.2f} %"
        )
        return Run(self.path, summary)

    def _final_accuracies(self, n: int | None) -> dict[str, float]:
        """Of the classifier that the run has written, on the first n test images."""
        C = checkpoint.load_classifier(self.path, self.device).to(self.dtype)
        images, labels = (t[:n] for t in self.test)
        pgd8 = {"eps": 8 / 255, "step_size": 1 / 255, "num_steps": 20}  # Table IX
        return {
            "clean": accuracy.correct(C, images, labels, dtype=self.dtype).double().mean().item(),
            "pgd-8": accuracy.correct(C, images, labels, _pgd(**pgd8), dtype=self.dtype).double().mean().item(),
        }

    # -- parts --------------------------------------------------------------------------------------------------

    def _make_loader(self) -> Loader:
        """The loader of the engine's stage: stage 1 may train on the validation images too (spec 1.6)."""
        if self.given_loader is not None:
            return self.given_loader
        c, stage = self.config, self.engine.stage
        everything = stage == 1 and not c.pretrain.exclude_validation
        labelled = self.split.labelled_all if everything else self.split.labelled
        seed = stream(c.seed, SAMPLER_STREAM + 10 * stage)
        sampler: BatchSampler | ShardedSampler
        if not self.engine.method.needs_unlabelled:
            sampler = LabelledSampler(labelled, c.schedule.batch_size, seed)
        else:
            unlabelled = self.split.unlabelled if c.data.use_unlabelled else self.split.unlabelled[:0]
            sampler = SemiSupervisedSampler(labelled, unlabelled, c.schedule.batch_size, seed)
        if distributed.world_size() > 1:
            sampler = ShardedSampler(sampler, distributed.rank(), distributed.world_size())
        images, labels = self.train.images, self.train.labels
        return make_loader(c.loader, images, labels, sampler, self.device, self.dtype, self._augmentation(stage))

    def _augmentation(self, stage: int) -> Augmentation | None:
        """What the loader does to C's images, by draws of this rank's own; None: C augments, or nobody does."""
        a = self.config.augment
        if a.where == "classifier" or not (a.crop_pad or a.flip or a.rotate_deg):
            return None
        seed = stream(self.config.seed, AUGMENT_STREAM + 10 * stage, distributed.rank())
        return Augmentation(a.crop_pad, a.flip, a.rotate_deg, a.scope, seed)

    def _accuracy(self, data: tuple[Tensor, Tensor], robust: bool = False) -> float:
        """Accuracy of C', under the validation attack if `robust`."""
        attack = None
        if robust:
            loss, num_steps = {"cw-pgd-40": ("cw", 40), "ce-pgd-20": ("ce", 20)}[self.config.val.attack]
            attack = _pgd(eps=8 / 255, step_size=self.config.val.step_size, num_steps=num_steps, loss=loss)
        seed = stream(self.config.seed, VALIDATION_STREAM)
        return distributed.on_main(
            lambda: accuracy.correct(self.nets.C_ema, *data, attack, seed=seed, dtype=self.dtype).double().mean().item()
        )

    def _save_samples(self, name: str, epoch: int) -> None:
        rows = sample_rows(self.nets, self.config, *self.test, with_uae=self.engine.stage == 2)
        title = f"{self.config.dataset}, stage {self.engine.stage}, epoch {epoch}: verdicts of C'"
        plots.save_grid(self.path / "samples" / name, rows, title)

    def _save_classifier(self, epoch: int, robust_acc: float | None) -> None:
        c, file = self.config, self.path / checkpoint.CLASSIFIER_FILE
        facts = {"method": c.method, "preset": c.preset, "epoch": epoch, "val_robust_acc": robust_acc}
        checkpoint.save_classifier(file, self.nets.C_ema, c.dataset, self.dataset.class_names, facts)

    def _save(self, name: str) -> None:
        self.engine.check_finite()  # never a checkpoint of a run that is lost
        ranks = distributed.all_gather(self._rank_state())
        if not distributed.is_main():
            return
        state = {
            "engine": self.engine.state_dict(),
            "ranks": ranks,
            "loader": self.loader.state_dict(),
            "best": {"robust_acc": self.best.robust_acc, "epoch": self.best.epoch},
            "rows": len(self.log.rows),
        }
        checkpoint.save(self.path / "checkpoints" / f"{name}.pt", state)

    def _rank_state(self) -> dict[str, Any]:
        """What differs between ranks, on the CPU: draws, losses, and within an epoch the BatchNorm statistics."""
        return {
            "noise": self.engine.noise.state_dict(),
            "stats": {name: row.cpu() for name, row in self.engine.stats.state_dict().items()},
            "bn": [tensor.cpu() for tensor in running_statistics(self.nets)],
        }

    def _resume(self) -> None:
        file = self.path / "checkpoints" / "last.pt"
        state = distributed.on_main(lambda: self._read(file))
        if state is None:
            return
        try:
            own = _of_this_rank(state["ranks"])
            self.engine.load_state_dict(state["engine"] | {"noise": own["noise"], "stats": own["stats"]})
            for tensor, value in zip(running_statistics(self.nets), own["bn"], strict=True):
                tensor.copy_(value)
            self.loader = self._make_loader()
            self.loader.load_state_dict(state["loader"])
            self.best, rows = Best(**state["best"]), state["rows"]
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise checkpoint.CheckpointError(f"{file}: of another configuration or other data: {reason}") from error
        self.log.rewind(rows)
        self.log.message(f"resuming at stage {self.engine.stage}, step {self.engine.step_in_stage} of the stage")

    def _read(self, file: Path) -> dict[str, Any] | None:
        """The checkpoint to go on from; None: there is nothing to go on from."""
        if file.exists():
            return checkpoint.load(file)
        if self.log.rows:
            raise RunError(f"{file}: is missing, so the run cannot be continued; choose another --out")
        return None


def steps_per_epoch(config: Config, split: Split) -> int:
    """E = epoch_multiplier * ceil(N / (2 batch_size)), N = labelled + unlabelled images (spec 1.6)."""
    s = config.schedule
    if s.steps_per_epoch is not None:
        return s.steps_per_epoch
    N = len(split.labelled_all) + (len(split.unlabelled) if config.data.use_unlabelled else 0)
    return s.epoch_multiplier * math.ceil(N / (2 * s.batch_size))


def running_statistics(nets: Networks) -> list[Tensor]:
    """Running means and variances of every BatchNorm, which differ between ranks within an epoch."""
    norms = [norm for _, net in nets.items() for norm in batch_norms(net)]
    return [getattr(norm, name) for norm in norms for name in ("running_mean", "running_var")]


def _of_this_rank(states: list[dict[str, Any]]) -> dict[str, Any]:
    n = distributed.world_size()
    if len(states) != n:
        cure = f"torchrun --nproc-per-node {len(states)}"
        raise ValueError(f"its run has {len(states)} processes, this one {n}; continue it with {cure}")
    return states[distributed.rank()]


def _check_batch(config: Config) -> None:
    """Every process needs as many images, and BatchNorm at least two. Raises ConfigError."""
    size, n = config.schedule.batch_size, distributed.world_size()
    if size % n or size < 2 * n:
        raise ConfigError(f"schedule.batch_size: {size} for {n} processes, accepted: multiples of {n} from {2 * n} on")


def _check_split(split: Split, config: Config) -> None:
    """Labels without which nothing can be trained. Raises ConfigError."""
    if METHODS[config.method].needs_unlabelled and config.data.use_unlabelled and not len(split.unlabelled):
        raise ConfigError(
            f"data.n_labelled: {config.data.n_labelled} leaves no unlabelled image; "
            "set data.use_unlabelled false to train without"
        )


def stream(seed: int, number: int, part: int = 0) -> int:
    """A seed of its own for each stream of draws of a run, and for each part of it, as a rank."""
    # A zero at the end changes nothing: rank 0 has the stream of a run of one process.
    return int(np.random.SeedSequence([seed, number, part]).generate_state(1)[0])


def _tensors(images: np.ndarray, labels: np.ndarray, index: np.ndarray | None) -> tuple[Tensor, Tensor]:
    if index is not None:
        images, labels = images[index], labels[index]
    return torch.tensor(images), torch.tensor(labels)


def _pgd(**settings: Any) -> accuracy.Attack:
    return lambda model, x, y, noise: pgd(model, x, y, noise=noise, **settings)
