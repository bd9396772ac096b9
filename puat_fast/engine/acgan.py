"""Training of the AC-GAN whose latent space GPGD and USong search: `train --method acgan` (spec 3).

Neither the paper's weights nor how long it was trained are published, but losses and Adam are. Here it learns from all
training images with their labels: it is a tool of the evaluation, and no classifier is trained on what it makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from puat_fast import checkpoint, plots
from puat_fast import objectives as L
from puat_fast.attacks.acgan import AcDiscriminator, AcGenerator, shrink, told_class
from puat_fast.attacks.acgan_file import ACGAN_FILE, AcGan, save_acgan
from puat_fast.config import Config, ConfigError
from puat_fast.data.formats import Dataset, load_dataset
from puat_fast.data.loaders import make_loader
from puat_fast.data.sampler import LabelledSampler
from puat_fast.engine import distributed
from puat_fast.engine.signals import StopSignal
from puat_fast.engine.stats import NonFiniteError
from puat_fast.engine.trainer import Run, resolve_device, run_path, stream
from puat_fast.networks.layers import eval_mode
from puat_fast.runlog import RunLog

ACGAN_STREAM = 5
SWAP_EVERY = 25  # steps; in one of so many, real images are to look generated and the other way round
PER_CLASS = 10  # pictures of each class


class AcganTrainer:
    """Trains G and D of an AC-GAN by `config.acgan` and fills a run directory; eager, in float32, on one device.

    D: BCE(validity, t_real) + NLL(label, y) on real images, BCE(validity, t_fake) + NLL(label, K) on generated ones of
    random labels. G: BCE(validity, 1) + NLL(label, y). Targets are ten draws, t_real U(0.7, 1.2) clipped to 1 (above it
    the BCE has no lower bound), t_fake U(0, 0.3), taken in turn, and changed places in every 25th step. Real images are
    enlarged to 64 x 64, bilinear. All draws of a step follow from the seed and its number.

    resume: as Trainer's. Raises ConfigError, DataError, RunError.
    """

    def __init__(self, config: Config, resume: str | None = None, *, dataset: Dataset | None = None) -> None:
        if distributed.world_size() > 1:
            raise ConfigError("method: acgan trains on one device; start it without torchrun")
        self.config, self.device = config, resolve_device(config.device)
        if dataset is None:
            dataset = load_dataset(config.dataset, config.data_dir, config.data.classes)
        self.dataset, a, K = dataset, config.acgan, dataset.num_classes
        with _draws(config.seed, 0, self.device):
            self.G = AcGenerator(K, a.z_dim, a.width).to(self.device)
            self.D = AcDiscriminator(K, a.width).to(self.device)
            self.targets = torch.stack([0.7 + 0.5 * torch.rand(10), 0.3 * torch.rand(10)]).clamp_max(1).tolist()
        self.optimisers = [torch.optim.Adam(net.parameters(), a.lr, a.betas) for net in (self.G, self.D)]
        train = dataset.train
        self.steps_per_epoch = -(-len(train) // a.batch_size)
        sampler = LabelledSampler(np.arange(len(train)), a.batch_size, stream(config.seed, ACGAN_STREAM))
        self.loader = make_loader(config.loader, train.images, train.labels, sampler, self.device)
        self.step = 0
        self.sums: dict[str, Tensor] = {}
        path = Path(resume) if resume not in (None, "auto") and config.out is None else run_path(config)
        self.log = RunLog(path, config, resume=resume is not None)
        self.path = self.log.path

    def fit(self) -> Run:
        """Train to the end, or from where the run stood. Ctrl-C and SIGTERM save and raise KeyboardInterrupt.

        Run.summary: label_agreement, the part of generated images whose class D's label head tells.
        """
        self._resume()
        E, epochs = self.steps_per_epoch, self.config.acgan.epochs
        with self.log:
            self.log.start(epochs * E, self.step)
            try:
                with StopSignal() as stop:
                    while self.step < epochs * E:
                        self._step()
                        if self.step % E == 0:
                            self._end_epoch()
                        if stop.name:
                            self._save()
                            raise KeyboardInterrupt(f"stopped by {stop.name}, saved; --resume {self.path} continues")
            finally:
                self.loader.close()
            agreement = self.label_agreement()
            self.log.message(f"D's label head agrees with {100 * agreement:.1f} % of generated images")
            return Run(self.path, {"label_agreement": agreement})

    def _step(self) -> None:
        """One update of D, one of G."""
        batch = self.loader.next_step(0).C
        self.step += 1
        with _draws(self.config.seed, self.step, self.device):
            self.update(batch.x_l, batch.y_l)
        E = self.steps_per_epoch
        step = (self.step - 1) % E + 1
        losses = self._means() if step % self.config.log.interval == 0 or step == E else None
        self.log.step(stage=1, epoch=(self.step - 1) // E + 1, epochs=self.config.acgan.epochs, step=step, steps=E,
                      images=len(batch.x_l), losses=losses)  # fmt: skip

    def update(self, x: Tensor, y: Tensor) -> None:
        """x: N x 3 x 32 x 32 in [0,1], y: N labels -> the networks after one Adam step each."""
        G, D, K, n = self.G, self.D, self.dataset.num_classes, len(x)
        adam_G, adam_D = self.optimisers
        real, fake = (targets[self.step % 10] for targets in self.targets)
        if self.step % SWAP_EVERY == 0:
            real, fake = fake, real
        x = F.interpolate(x, size=(64, 64), mode="bilinear", align_corners=False)
        y_fake = torch.randint(K, (n,), device=self.device)
        x_fake = G(torch.randn(n, G.z_dim, device=self.device), y_fake)

        (on_real, label_real), (on_fake, label_fake) = D(x), D(x_fake.detach())
        loss_D = L.acgan(on_real, label_real, real, y) + L.acgan(on_fake, label_fake, fake, torch.full_like(y, K))
        adam_D.zero_grad()
        loss_D.backward()
        adam_D.step()

        D.requires_grad_(False)  # its weights' gradients are nobody's here
        validity, label = D(x_fake)
        loss_G = L.acgan(validity, label, 1.0, y_fake)
        adam_G.zero_grad()
        loss_G.backward()
        adam_G.step()
        D.requires_grad_(True)
        for name, value in (
            ("D/loss", loss_D),
            ("G/loss", loss_G),
            ("G/label_acc", (told_class(label) == y_fake).float().mean()),
        ):
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def label_agreement(self, n: int = 1000) -> float:
        """The part of n generated images, all classes in turn, whose class D's label head tells; both in eval mode.

        Among the K classes: that an image is generated, class K, is D's business to tell, and not asked here.
        """
        with _draws(self.config.seed, 0, self.device), torch.no_grad(), eval_mode(self.G), eval_mode(self.D):
            y = torch.arange(n, device=self.device) % self.dataset.num_classes
            z = torch.randn(n, self.G.z_dim, device=self.device)
            pairs = zip(z.split(100), y.split(100), strict=True)
            right = [told_class(self.D(self.G(z, y))[1]) == y for z, y in pairs]
            return torch.cat(right).double().mean().item()

    def _means(self) -> dict[str, float]:
        """Of the epoch so far. Raises NonFiniteError."""
        count = (self.step - 1) % self.steps_per_epoch + 1
        means = {name: value.item() / count for name, value in self.sums.items()}
        bad = next((name for name, value in means.items() if not np.isfinite(value)), None)
        if bad is not None:
            raise NonFiniteError(f"{bad} is not finite by step {self.step}; {self.path} keeps the last good checkpoint")
        return means

    def _end_epoch(self) -> None:
        epoch = self.step // self.steps_per_epoch
        row: dict[str, Any] = {"stage": 1, "epoch": epoch, "step": self.step} | self._means()
        self.sums.clear()
        self.log.epoch(row)
        self._save()
        every = self.config.log.sample_every
        if epoch == self.config.acgan.epochs or (every and epoch % every == 0):
            self._save_samples(epoch)

    def _save(self) -> None:
        names = self.dataset.class_names
        save_acgan(self.path / ACGAN_FILE, AcGan(self.G, self.D, self.dataset.name, names))
        engine = {
            "G": self.G.state_dict(), "D": self.D.state_dict(), "step": self.step, "sums": self.sums,
            "adam_G": self.optimisers[0].state_dict(), "adam_D": self.optimisers[1].state_dict(),
        }  # fmt: skip
        state = {"engine": engine, "loader": self.loader.state_dict(), "rows": len(self.log.rows)}
        checkpoint.save(self.path / "checkpoints" / "last.pt", state)

    def _resume(self) -> None:
        file = self.path / "checkpoints" / "last.pt"
        if not file.exists():
            return
        state = checkpoint.load(file)
        try:
            engine = state["engine"]
            self.G.load_state_dict(engine["G"]), self.D.load_state_dict(engine["D"])
            for optimiser, name in zip(self.optimisers, ("adam_G", "adam_D"), strict=True):
                optimiser.load_state_dict(engine[name])
            self.loader.load_state_dict(state["loader"])
            self.step, rows = engine["step"], state["rows"]
            self.sums = {name: value.to(self.device) for name, value in engine["sums"].items()}
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise checkpoint.CheckpointError(f"{file}: of another configuration or other data: {reason}") from error
        self.log.rewind(rows)
        self.log.message(f"resuming at step {self.step}")

    def _save_samples(self, epoch: int) -> None:
        rows = []
        with _draws(self.config.seed, 0, self.device), torch.no_grad(), eval_mode(self.G):
            for k, name in enumerate(self.dataset.class_names):
                y = torch.full((PER_CLASS,), k, device=self.device)
                images = shrink(self.G(torch.randn(PER_CLASS, self.G.z_dim, device=self.device), y))
                rows.append(plots.ImageRow(label=name, images=images.cpu().numpy()))
        title = f"{self.config.dataset}, AC-GAN, epoch {epoch}"
        plots.save_grid(self.path / "samples" / f"epoch{epoch:03d}.png", rows, title)


@contextmanager
def _draws(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's global generators, dropout's too, are those of this step; afterwards they are as before."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(stream(seed, ACGAN_STREAM, step))
        yield
