"""One step of a method: phases (loss -> backward -> optimiser); the teacher follows in C's.

Engine holds all state that training changes and nothing else: networks, optimisers, noise, counters. It knows no
data, no files and no validation; those are the Trainer's.

`engine: eager` runs the step as it is written, and is the truth. `engine: compiled` runs the same function with
networks that take exact short cuts and are compiled, and on a GPU as one captured graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from puat_fast.config import Config, FastConfig
from puat_fast.data.batch import StepBatch
from puat_fast.engine import compiling, distributed, ema, optim, precision, schedules
from puat_fast.engine.capture import CaptureError, CudaRecorder, DeviceScalars, StepGraphs, Terms
from puat_fast.engine.stats import NonFiniteError, Stats
from puat_fast.methods import METHODS, Method, Phase, Scalars
from puat_fast.networks import Networks
from puat_fast.networks.classifier import BN_MOMENTUM
from puat_fast.noise import Noise


def resolve_engine(asked: str, device: torch.device) -> str:
    """`auto` is compiled on a GPU, else eager."""
    return asked if asked != "auto" else "compiled" if device.type == "cuda" else "eager"


def fast_paths(config: Config, device: torch.device) -> tuple[FastConfig, dict[str, str]]:
    """The fast paths in force, and why those are off that were asked for and cannot be had."""
    if resolve_engine(config.engine, device) == "eager":
        none = dict.fromkeys((f.name for f in fields(FastConfig)), False)
        return FastConfig(**none | {"skip_weight_grads": True}), {}
    asked, off = config.fast, dict[str, str]()
    if asked.compile and (reason := compiling.why_not(device.type)) is not None:
        off["compile"] = reason
    if asked.graph and device.type != "cuda":
        off["graph"] = f"CUDA graphs are of GPUs, the device is {device.type}"
    elif asked.graph and distributed.world_size() > 1:
        off["graph"] = "NCCL inside a captured step was never run"
    return replace(asked, **dict.fromkeys(off, False)), off


class Engine:
    """Runs steps of `config.method` on networks.

    stage 1 = pretraining, 2 = training; epoch counts from 1 in each stage; step counts the steps done in the stage.
    steps_per_epoch is E of spec 1.6.
    """

    def __init__(self, config: Config, nets: Networks, noise: Noise, steps_per_epoch: int) -> None:
        self.config, self.nets, self.noise, self.steps_per_epoch = config, nets, noise, steps_per_epoch
        self.stats = Stats()
        self.on_step: Callable[[Terms], None] | None = None  # see puat_fast.testing
        self.say: Callable[[str], None] = lambda text: None  # who hears why a fast path was given up
        self._terms: Terms = {}
        self.method: Method = METHODS[config.method](config, nets, noise, self._report)
        self.optimizers = optim.optimizers(nets, config)
        self.stage, self.step_in_stage = self.method.stages[0], 0
        self.last_scalars: Scalars  # of the latest step
        self.fast, self.off = fast_paths(config, noise.device)
        self.device_scalars: DeviceScalars | None = None
        self.graphs: StepGraphs | None = None
        self._use_fast_paths()

    def _use_fast_paths(self) -> None:
        self.nets.use(self.fast, precision.conv_dtype(self.config.precision, self.noise.device))
        self.method.use(self.fast)
        if self.fast.compile:
            compiling.compile_networks(self.nets)
        if self.fast.compile or self.fast.graph:
            self.device_scalars = DeviceScalars(self.noise.device, self.noise.dtype)
        if self.fast.graph:
            self.graphs = StepGraphs(CudaRecorder(self.noise.device, self.noise.generator))

    @property
    def description(self) -> str:
        """How steps are run, and why a fast path is off: one line."""
        name = resolve_engine(self.config.engine, self.noise.device)
        on = [f.name for f in fields(self.fast) if getattr(self.fast, f.name)] if name == "compiled" else []
        parts = [f"engine: {name}", precision.name(self.config.precision, self.noise.device), *on]
        return "; ".join([", ".join(parts), *(f"{path} off: {why}" for path, why in self.off.items())])

    @property
    def epoch(self) -> int:
        """1-based epoch that the next step belongs to."""
        return self.step_in_stage // self.steps_per_epoch + 1

    @property
    def epochs(self) -> int:
        """Number of epochs of the current stage."""
        return self.config.pretrain.epochs if self.stage == 1 else self.config.schedule.epochs

    def next_phases(self) -> list[Phase]:
        """The phases of the next step; sets the networks' modes."""
        return self.method.phases(self.stage, self.epoch)

    def num_disc_batches(self) -> int:
        """How many D batches the next step consumes."""
        return next((phase.repeat for phase in self.next_phases() if phase.net == "D"), 0)

    def step(self, batch: StepBatch) -> None:
        """Run all phases on one StepBatch; C's optimiser updates the teacher, which nobody reads after that."""
        s, phases = self.scalars(), self.next_phases()
        self.last_scalars, self._terms = s, {}
        for group in self.optimizers["C"].param_groups:
            group["lr"], group["momentum"], group["ema_decay"] = s.lr, s.momentum, s.ema_decay
        if self.device_scalars is None:
            self.stats.step = self.step_in_stage + 1
            terms = self._run(phases, batch, s)
        else:
            self.device_scalars.write(s, self.step_in_stage + 1)
            self.stats.step = self.device_scalars.step
            terms = self._run_fast(phases, batch, self.device_scalars)
        self.step_in_stage += 1
        if self.on_step is not None:
            self.on_step(terms)

    def _run(self, phases: list[Phase], batch: StepBatch, s: Scalars) -> Terms:
        """The step: everything in it stays on the device, and nothing waits for it."""
        precision.allow_tf32(self.config.precision, self.noise.device)
        self.nets.C.set_bn_momentum(s.bn_momentum)
        for phase in phases:
            for k in range(phase.repeat):
                self._update(phase, batch, s, k)
        if self.config.ema.bn == "average":
            ema.average_bn(self.nets.C_ema, self.nets.C, s.ema_decay)
        return self._terms

    def _run_fast(self, phases: list[Phase], batch: StepBatch, s: DeviceScalars) -> Terms:
        optimizer = self.optimizers["C"]
        assert isinstance(optimizer, optim.SGD)
        optimizer.on_device = s.lr, s.momentum, s.ema_decay
        if self.graphs is None:
            return self._run(phases, batch, s)
        kind = (  # all that decides what a step does, but for numbers that are read on the device
            self.stage, tuple((phase.net, phase.repeat) for phase in phases), s.adversarial, s.consistent,
            self.nets.A.training, ema.bn_is_shared(self.nets.C_ema, self.nets.C), self.on_step is None,
        )  # fmt: skip
        try:
            return self.graphs(kind, batch, lambda static: self._run(phases, static, s))
        except CaptureError as error:  # nothing of the step has run
            self.graphs, self.off["graph"] = None, str(error)
            self.say(f"CUDA graph off: {error}")
            self.stats.discard()
            self._terms = {}
            return self._run(phases, batch, s)

    def _report(self, name: str, value: Tensor) -> None:
        self.stats.report(name, value)
        if self.on_step is not None:
            self._terms.setdefault(name, []).append(value)

    def _update(self, phase: Phase, batch: StepBatch, s: Scalars, k: int) -> None:
        optimizer = self.optimizers[phase.net]
        optimizer.zero_grad()
        with self.nets.training_only(phase.net):
            for part in phase.loss(batch, s, k):
                part.backward()
        distributed.all_reduce_gradients(getattr(self.nets, phase.net).parameters())
        optimizer.step()
        self.stats.flush()

    def scalars(self) -> Scalars:
        """Everything that depends on time, for the next step (spec 1.4, 1.7)."""
        c, E, t, epoch = self.config, self.steps_per_epoch, self.step_in_stage + 1, self.epoch
        lr = schedules.learning_rate(epoch, self.epochs, c.optim.lr, c.optim.pct_start)
        momentum = c.optim.momentum
        if c.optim.cycle_momentum:
            momentum = schedules.momentum(epoch, self.epochs, c.optim.pct_start)
        adv_ramp, con_ramp = 0.0, schedules.sigmoid_ramp(t, 1, 1 + E * c.pretrain.consistency_ramp)
        if self.stage == 2:
            adv_ramp = schedules.sigmoid_ramp(t, 1 + E * c.schedule.adv_start, 1 + E * c.schedule.adv_end)
            con_ramp = 1.0
        return Scalars(
            lr=lr,
            momentum=momentum,
            bn_momentum=1.0 if t == 1 else BN_MOMENTUM,
            ema_decay=self._ema_decay(t),
            adv_ramp=adv_ramp,
            consistency_weight=c.loss.consistency_weight * con_ramp,
        )

    def _ema_decay(self, t: int) -> float:
        c = self.config
        if self.stage == 1:
            early = self.epoch <= c.pretrain.consistency_ramp
            tau = c.pretrain.ema_decay if early else c.pretrain.ema_decay_after
        else:
            tau = c.ema.decay
            if self.method.stages[0] == 1 and not c.ema.reset_on_stage2:
                return tau
        E0 = self.steps_per_epoch
        if c.ema.warmup_images is not None:  # the official code's own count of steps per epoch (spec 1.7)
            E0 = math.floor(c.ema.warmup_images / (2 * c.schedule.batch_size)) + 1
        return schedules.ema_decay(t, c.optim.pct_start * self.epochs * E0, tau)

    def end_epoch(self) -> None:
        """Hand C's running statistics to the teacher, as `ema.bn` says."""
        if self.config.ema.bn == "copy":
            ema.copy_bn(self.nets.C_ema, self.nets.C)
        elif self.config.ema.bn == "shared":
            ema.share_bn(self.nets.C_ema, self.nets.C)

    def begin_stage2(self) -> None:
        """C, C', G, D and the Adam states of G and D go on; a new SGD for C; A, untouched so far, starts now."""
        self.stage, self.step_in_stage = 2, 0
        self.optimizers["C"] = optim.sgd(self.nets.C, self.nets.C_ema, self.config.optim)
        ema.unshare_bn(self.nets.C_ema)

    def check_finite(self) -> None:
        """Raises NonFiniteError naming the loss term or the network that is not finite."""
        self.stats.read()
        for name, net in self.nets.items():
            if not torch.stack([p.isfinite().all() for p in net.parameters()]).all():
                raise NonFiniteError(f"weights of {name} are not finite after step {self.step_in_stage} of the stage")

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as tensors and plain values."""
        return {
            "stage": self.stage,
            "step_in_stage": self.step_in_stage,
            "steps_per_epoch": self.steps_per_epoch,
            "bn_shared": ema.bn_is_shared(self.nets.C_ema, self.nets.C),
            "networks": {name: net.state_dict() for name, net in self.nets.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "noise": self.noise.state_dict(),
            "stats": self.stats.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`: the same numbers, bit for bit on one device."""
        self.stage, self.step_in_stage = state["stage"], state["step_in_stage"]
        ema.unshare_bn(self.nets.C_ema)
        for name, net in self.nets.items():
            net.load_state_dict(state["networks"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if state["bn_shared"]:
            ema.share_bn(self.nets.C_ema, self.nets.C)
        self.noise.load_state_dict(state["noise"])
        if self.graphs is not None:
            self.graphs.reset()  # the optimisers' states are other tensors now
        self.stats.load_state_dict(state["stats"], self.noise.device)
