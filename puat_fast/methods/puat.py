"""PUAT: D, G, A and C trained together (spec 1.3, 1.5; numbers are the paper's equations).

In every function x_l, y_l are labelled images and labels, x_u unlabelled images, z latents; P is the projection into
the L-inf ball around G(z, y); p = softmax. Parameters of the other networks do not require gradients (the engine
sees to it), so that each update computes only the gradients that it uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor

from puat_fast import objectives as L
from puat_fast.attacks.pgd import ascend, attack_loss, gauss_start, uniform_start
from puat_fast.config import Config, FastConfig
from puat_fast.data.batch import DiscBatch, SemiBatch, StepBatch
from puat_fast.methods.phase import Phase, Report, Scalars
from puat_fast.networks import Networks
from puat_fast.networks.layers import eval_mode, fits_one_pass, frozen_running_stats, frozen_weights
from puat_fast.noise import Noise


class Puat:
    """The method of the paper; `config` decides wherever paper and official code differ (spec 1.10)."""

    needs_unlabelled: ClassVar[bool] = True
    early_stopping: ClassVar[bool] = True
    has_generator: ClassVar[bool] = True

    def __init__(self, config: Config, nets: Networks, noise: Noise, report: Report) -> None:
        self.config, self.noise, self.report = config, noise, report
        self.G, self.D, self.C, self.A, self.C_ema = nets.G, nets.D, nets.C, nets.A, nets.C_ema
        self.z_shared: Tensor | None = None  # the z of the G update, for uae.share_z
        self.batch_labels = False  # C's labels for all D updates of a step at once
        self.labels: list[Tensor] = []  # C's logits for the D updates to come
        self.stages: tuple[int, ...] = (1, 2) if config.pretrain.epochs else (2,)

    def use(self, fast: FastConfig) -> None:
        """Take the exact short cuts that `fast` names."""
        self.batch_labels = fast.batch_labels

    def phases(self, stage: int, epoch: int) -> list[Phase]:
        """Stage 1: C, from gan_start on also D and G; stage 2: all four, in `schedule.order`."""
        for net in (self.G, self.D, self.C, self.C_ema):
            net.train()
        frozen = self.config.attacker.eval_after_first_epoch and epoch > self.config.schedule.adv_start + 1
        self.A.train(not (frozen and stage == 2))
        all_phases = {
            "D": Phase("D", self.discriminator, repeat=self.config.schedule.n_disc),
            "G": Phase("G", self.generator),
            "A": Phase("A", self.attacker),
            "C": Phase("C", self.classifier if stage == 2 else self.classifier_pretrain),
        }
        letters = self.config.schedule.order
        if stage == 1:
            letters = letters.replace("A", "") if epoch >= self.config.pretrain.gan_start else "C"
        elif epoch < self.config.schedule.adv_start:
            letters = letters.replace("A", "")
        return [all_phases[letter] for letter in letters]

    # -- D: eqs 7, 8, 11 ----------------------------------------------------------------------------------------

    def discriminator(self, batch: StepBatch, s: Scalars, k: int) -> Iterator[Tensor]:
        """L_D = mean relu(1 - D(x_r,y_r)) + 1/2 mean relu(1 + D(x_g,y_l)) + 1/2 mean sum_k p relu(1 + D(x_u,k))."""
        b = batch.D[k]
        with torch.no_grad():
            logits_ud, logits_u = self._labels(batch, k)
            x_r, y_r = self._real_for_d(b, logits_ud)
            x_g, x_u = self.G(self._z(b), b.y_l), self._x_u(b)
        d_real, d_fake_g, d_fake_c = self.D.scores((x_r, y_r), (x_g, b.y_l), (x_u, None))
        real = L.hinge_real(d_real)
        fake = 0.5 * L.hinge_fake(d_fake_g) + 0.5 * L.hinge_fake_by_class(d_fake_c, logits_u)
        yield real + fake

        self._report(("D/real", d_real.mean()), ("D/fake_g", d_fake_g.mean()), ("D/fake_c", d_fake_c.mean()),
                     ("D/loss", real + fake))  # fmt: skip

    def _real_for_d(self, b: DiscBatch, logits_ud: Tensor) -> tuple[Tensor, Tensor]:
        """(x_r, y_r): labelled pairs, and a part f of other unlabelled images with C's hard labels."""
        n_l = len(b.y_l) - len(logits_ud)
        return torch.cat([b.x_l[:n_l], self._x_ud(b)]), torch.cat([b.y_l[:n_l], logits_ud.argmax(1)])

    def _x_ud(self, b: DiscBatch) -> Tensor:
        """The unlabelled images that D sees as real: int(B f) of them, none without unlabelled data."""
        n_u = int(len(b.y_l) * self.config.data.mix_frac)  # truncated, as the official code does (spec 5.2, 2)
        return b.x_l[:0] if b.x_ud is None else b.x_ud[:n_u]

    def _labels(self, batch: StepBatch, k: int) -> tuple[Tensor, Tensor]:
        """C's logits, in eval mode, of x_ud and x_u of D batch k.

        With `batch_labels` in one pass, of all D batches of the step when k is 0, where that many images fit one pass.
        C stays as it is while D is trained, and in eval mode no image sees another: one pass gives the same.
        """
        batches = batch.D[: self.config.schedule.n_disc]
        parts = [[self._x_ud(b), self._x_u(b)] for b in batches]
        total = sum(len(x) for part in parts for x in part)
        at_once = self.batch_labels and fits_one_pass(total, 16 * self.C.width, batch.D[k].x_l)
        if k == 0 or not at_once:
            images = [x for part in (parts if at_once else parts[k : k + 1]) for x in part]
            with eval_mode(self.C):
                if self.batch_labels:
                    self.labels = list(self.C(torch.cat(images)).split([len(x) for x in images]))
                else:
                    self.labels = [self.C(x) if len(x) else x.new_empty(0, self.C.num_classes) for x in images]
        logits_ud, logits_u = self.labels[:2]
        self.labels = self.labels[2:]
        return logits_ud, logits_u

    # -- G: eq 8 ------------------------------------------------------------------------------------------------

    def generator(self, batch: StepBatch, s: Scalars, k: int) -> Iterator[Tensor]:
        """L_G = -mean D(G(z,y_l), y_l), y_l of the last D batch."""
        b = batch.D[-1]
        self.z_shared = self._z(b)
        loss = L.generator_loss(self.D(self.G(self.z_shared, b.y_l), b.y_l))
        yield loss
        self._report(("G/loss", loss))

    # -- A: eq 14 -----------------------------------------------------------------------------------------------

    def attacker(self, batch: StepBatch, s: Scalars, k: int) -> Iterator[Tensor]:
        """L_A = -CE_0(C(P(G(A(z,y_l),y_l); G(z,y_l))), y_l), C in eval mode."""
        b = batch.D[-1]
        with eval_mode(self.C):
            loss = -L.cross_entropy(self.C(self._uae(self._z_uae(b), b.y_l)), b.y_l)
        yield loss
        self._report(("A/loss", loss))

    def _uae(self, z: Tensor, y: Tensor) -> Tensor:
        """x_uae = P(G(A(z,y),y); G(z,y)), G(z,y) detached; z_a goes through G first, each with its own statistics."""
        x_uae = self.G(self.A(z, y), y)
        with torch.no_grad():
            x_g = self.G(z, y)
        eps = self.config.uae.project_eps
        return x_uae if eps is None else L.project_linf(x_uae, x_g, eps)

    # -- C: eqs 12-17 -------------------------------------------------------------------------------------------

    def classifier(self, batch: StepBatch, s: Scalars, k: int) -> Iterator[Tensor]:
        """L_C = CE(C(x_l),y_l) + a MSE + r [lambda CE(C(x_uae),y_l) + w CE(C(x_rae),y_m) - gamma mean sum_k p D]."""
        if not s.adversarial:  # up to adv_start: the mean teacher alone, as in stage 1
            yield from self.classifier_pretrain(batch, s, k)
            return
        b, terms = batch.C, dict[str, Tensor]()
        yield self._uae_term(b, s, terms)
        clean, x_m, y_m = self._clean_terms(b, s, terms)
        yield clean
        terms["C/rae"] = torch.zeros_like(clean)
        if self.config.loss.rae_weight > 0:
            yield self._rae_term(b, x_m, y_m, s, terms)
        total = sum((value for name, value in terms.items() if not name.endswith("_acc")), torch.zeros_like(clean))
        self._report(*terms.items(), ("C/loss", total))

    def _uae_term(self, b: SemiBatch, s: Scalars, terms: dict[str, Tensor]) -> Tensor:
        """r lambda CE_ls(C(x_uae), y_l) (eq 16)."""
        with torch.no_grad():
            x_uae = self._uae(self._z_uae(b), b.y_l)
        logits = self.C(x_uae)
        uae = s.adv_ramp * self.config.loss.uae_weight * self._ce(logits, b.y_l)
        terms |= {"C/uae": uae, "C/uae_acc": L.accuracy(logits, b.y_l)}
        return uae

    def _clean_terms(self, b: SemiBatch, s: Scalars, terms: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """CE_ls(C(x_l), y_l) + a MSE - r gamma mean sum_k p D(x_u, k) (eqs 12, 13, 15); also the mixed batch."""
        logits_l = self.C(b.x_l)
        logits_u = logits_l if b.x_u is None else self.C(b.x_u)
        with torch.no_grad():
            d_u = self.D(self._x_u(b))
            x_m, y_m = self._mixed(b, logits_u)
        sup = self._ce(logits_l, b.y_l)
        con = self._consistency(s, b, logits_l, logits_u)
        fake = s.adv_ramp * self.config.loss.gamma * L.classifier_vs_discriminator(logits_u, d_u)
        terms |= {"C/sup": sup, "C/con": con, "C/fake": fake, "C/clean_acc": L.accuracy(logits_l, b.y_l)}
        return sup + con + fake, x_m, y_m

    def _rae_term(self, b: SemiBatch, x_m: Tensor, y_m: Tensor, s: Scalars, terms: dict[str, Tensor]) -> Tensor:
        """r w CE_ls(C(x_rae), y_m), w = beta or lambda beta (eq 17)."""
        loss, rae = self.config.loss, self.config.rae
        if rae.source == "labelled":
            x_m, y_m = b.x_l, b.y_l
        weight = loss.rae_weight * (loss.uae_weight if loss.rae_weight_mode == "lambda_times" else 1)
        logits = self.C(self._rae(x_m, y_m))
        value = s.adv_ramp * weight * self._ce(logits, y_m)
        y_report = b.y_l if rae.accuracy_labels == "y_l" else y_m
        terms |= {"C/rae": value, "C/rae_acc": L.accuracy(logits, y_report)}
        return value

    def classifier_pretrain(self, batch: StepBatch, s: Scalars, k: int) -> Iterator[Tensor]:
        """Stage 1: CE_ls(C(x_l), y_l) + a(t) MSE, the mean teacher; C(x_m) is a forward of its own."""
        b = batch.C
        logits_l = self.C(b.x_l)
        sup = self._ce(logits_l, b.y_l)
        con = torch.zeros_like(sup)
        if s.consistent:
            x_c = self._x_c(b)
            logits_teacher = self._teacher(x_c)
            logits_c = logits_l if b.x_u is None else self.C(x_c)
            con = s.consistency_weight * L.consistency(logits_c, logits_teacher, self.config.consistency.reduce)
        yield sup + con
        self._report(("C/sup", sup), ("C/con", con), ("C/loss", sup + con),
                     ("C/clean_acc", L.accuracy(logits_l, b.y_l)))  # fmt: skip

    def _mixed(self, b: SemiBatch, logits_u: Tensor) -> tuple[Tensor, Tensor]:
        """x_m, and y_m = [y_l[:n_l], argmax C(x_u)[n_l:]]; logits_u: those of C(x_u) at hand."""
        pseudo, x_u = self.config.pseudo, self._x_u(b)
        if pseudo.forward == "extra":  # another draw of the augmentation, another update of the running statistics
            logits_u = self.C(x_u)
        elif pseudo.forward == "eval":
            with eval_mode(self.C):
                logits_u = self.C(x_u)
        n_l = self._n_labelled(b)
        if b.x_u is None and not pseudo.relabel_labelled:
            return self._x_m(b), b.y_l
        return self._x_m(b), torch.cat([b.y_l[:n_l], logits_u.argmax(1)[n_l:]])

    def _consistency(self, s: Scalars, b: SemiBatch, logits_l: Tensor, logits_u: Tensor) -> Tensor:
        """a(t) MSE(p_C, p_C'), with C's logits from the forwards at hand."""
        n_l = self._n_labelled(b)
        mixed = self.config.consistency.source == "mixed"
        logits_c = torch.cat([logits_l[:n_l], logits_u[n_l:]]) if mixed else logits_u
        logits_teacher = self._teacher(self._x_c(b))
        if not s.consistent:
            return torch.zeros((), device=logits_c.device, dtype=logits_c.dtype)
        return s.consistency_weight * L.consistency(logits_c, logits_teacher, self.config.consistency.reduce)

    @torch.no_grad()
    def _teacher(self, x: Tensor) -> Tensor:
        """C'(x), C' in train mode: batch statistics, an augmentation of its own."""
        averaged = self.config.ema.bn == "average"  # then its running statistics are the engine's alone
        with frozen_running_stats(self.C_ema) if averaged else nullcontext():
            return self.C_ema(x)

    def _rae(self, x: Tensor, y: Tensor) -> Tensor:
        """x_rae: PGD on C from x, CE_0, with C's BatchNorm as `rae.bn` says."""
        a, rae = self.config.attack, self.config.rae
        start = gauss_start(x, self.noise) if rae.init == "gauss" else uniform_start(x, a.eps, self.noise)
        modes: dict[str, AbstractContextManager[None]] = {
            "train": nullcontext(), "train_frozen": frozen_running_stats(self.C), "eval": eval_mode(self.C)
        }  # fmt: skip
        loss = attack_loss("ce", y)
        with modes[rae.bn], frozen_weights(self.C):
            return ascend(self.C, x, start, loss, eps=a.eps, step_size=a.step_size, num_steps=a.num_steps)

    # -- shared -------------------------------------------------------------------------------------------------

    def _ce(self, logits: Tensor, y: Tensor) -> Tensor:
        """CE_ls, with the label smoothing of C's losses."""
        return L.cross_entropy(logits, y, self.config.loss.label_smoothing)

    def _x_u(self, b: SemiBatch) -> Tensor:
        """x_u; without unlabelled data x_u := x_l."""
        return b.x_l if b.x_u is None else b.x_u

    def _x_m(self, b: SemiBatch) -> Tensor:
        """x_m = [x_l[:n_l], x_u[n_l:]], n_l = B - int(B f)."""
        n_l = self._n_labelled(b)
        return torch.cat([b.x_l[:n_l], self._x_u(b)[n_l:]])

    def _x_c(self, b: SemiBatch) -> Tensor:
        """The images of the consistency term: x_m, or x_u, as `consistency.source` says."""
        return self._x_m(b) if self.config.consistency.source == "mixed" else self._x_u(b)

    def _n_labelled(self, b: SemiBatch) -> int:
        return len(b.y_l) - int(len(b.y_l) * self.config.data.mix_frac)

    def _z(self, b: SemiBatch) -> Tensor:
        return self.noise.normal("z", (len(b.y_l), self.config.gan.z_dim))

    def _z_uae(self, b: SemiBatch) -> Tensor:
        return self.z_shared if self.config.uae.share_z and self.z_shared is not None else self._z(b)

    def _report(self, *values: tuple[str, Tensor]) -> None:
        # sums after their terms: of several that are not finite the first is named
        for name, value in values:
            self.report(name, value.detach())
