"""The seam through which a test drives training: recorded batches and draws in, every loss term out.

`Trainer` (and `Engine`, the part of it that does the steps) take everything random or external as arguments:

    recorder = StepRecorder()
    trainer = Trainer(
        config,                                   # e.g. Config.preset("official-v1", dataset="cifar10", ...)
        dataset=dataset,                          # optional: a puat_fast.data.formats.Dataset instead of files
        loader=RecordedLoader(step_batches),      # StepBatches, one per step, instead of the resident loader
        noise=RecordedNoise({"z": [...], "rae": [...]}),
        networks=initial_weights,                 # e.g. the function below
        on_step=recorder,                         # called after every step with its terms
    )
    trainer.fit()
    recorder.steps[0]["D/loss"]                   # list of floats, one per D update of the step

    def initial_weights(nets):
        for name in "CGDA":
            load_official(getattr(nets, name), name, arrays, f"{name}.")
        nets.C_ema.load_state_dict(nets.C.state_dict())     # the teacher starts as a copy of C

RecordedNoise's dtype is that of the networks, `config.precision` that of the images: for float64 give both. Stage 2
alone: `pretrain.epochs` 0. Without data, files or validation, drive the engine itself:

    noise = RecordedNoise(draws, dtype=torch.float64)
    nets = Networks.build(config, num_classes, noise)
    engine = Engine(config, nets, noise, steps_per_epoch=E)
    for epoch in range(epochs):
        for batch in batches_of_epoch:
            terms = step_terms(engine, batch)
        engine.end_epoch()                        # teacher BN hand-over
    engine.begin_stage2()                         # between the stages

Order of the draws in one step, by name. D phase, per update: one `z` (B x z_dim). G: one `z`. A: one `z`. C: in
stage 2 one `z` for the UAEs, then one `rae` (of x_m's shape: the N(0,1) of the PGD start, or U[0,1) with
`rae.init=uniform`); in stage 1 none (the official code draws a z there and never uses it: leave it out of the
recording). C's augmentation draws under `augment/...`; switch it off (`augment: {crop_pad: 0, flip: false}`) to
compare with recordings that have none. StepBatch order: n_disc DiscBatches, then the C batch (data/batch.py).

Terms: `D/loss D/real D/fake_g D/fake_c` (real, fake_g, fake_c are means of D's outputs), `G/loss`, `A/loss` (the
negative cross-entropy), `C/loss C/sup C/con C/fake C/uae C/rae C/clean_acc C/uae_acc C/rae_acc`, weights and ramps
included. `C/loss` is the whole objective; the official log's "loss" is `C/loss - C/fake`. Where that log writes 0 for
`C/uae`, `C/rae` or `C/fake`, the term is absent here.

What the official code calls its settings: num_adv_epochs = pretrain.epochs / schedule.epochs; len(dataloader) =
schedule.steps_per_epoch; batch_size = 2 schedule.batch_size; gan_start + 1 = pretrain.gan_start; adv_ramp_start, _end =
schedule.adv_start, adv_end; consistency_ramp_up = pretrain.consistency_ramp; tau, tau_after of pretraining =
pretrain.ema_decay, ema_decay_after; tau_after of stage 2 = ema.decay; beta, beta2, beta1 = loss.uae_weight, rae_weight,
gamma; consistency_cost = loss.consistency_weight; unsup_fraction_for_d and consistency_unsup_frac = data.mix_frac;
num_samples = ema.warmup_images; 8 g_nfilter = gan.width.

What to know when comparing with a recording: z has len(y_l) rows; the z of the official pictures at an epoch's end is
not ours. Batch-scope augmentation draws, per train-mode forward of C or C' and in this order, `augment/top`, `/left` =
(offset + 0.5) / (2 pad + 1) and `/flip`, each of shape 1 x 1. Validation draws from a stream of its own; a recorded
start v in [-1, 1) is replayed by `pgd(..., loss="cw", noise=RecordedNoise({"rae": [(v + 1) / 2]}))`. Compare many steps
in float64: in float32 D's `linear.bias` has a gradient of zero while no hinge saturates, of which Adam makes steps of
lr from round-off, so that D's outputs and `G/loss` drift.

`official_name` and `load_official` map the official code's parameter names to this project's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from puat_fast.data.batch import StepBatch
from puat_fast.engine.step import Engine
from puat_fast.noise import Noise

_BLOCK_NAMES = (
    (r"\.c1\.", ".conv1."), (r"\.c2\.", ".conv2."), (r"\.c_sc\.", ".shortcut."),
    (r"\.b([12])\.weights\.weight$", r".cbn\1.gain"), (r"\.b([12])\.biases\.weight$", r".cbn\1.bias"),
    (r"\.b([12])\.", r".cbn\1.bn."),
    (r"\.weight_orig$", ".weight"), (r"\.weight_u$", ".u"), (r"\.weight_v$", ".v"),
)  # fmt: skip
_TOP_NAMES = {
    "C": ((r"^1\.", ""),),
    "G": ((r"^l1\.", "linear."), (r"^b7\.", "bn."), (r"^conv7\.", "to_rgb.")),
    "A": ((r"^l1\.", "linear_in."), (r"^l4\.", "linear_out.")),
    "D": ((r"^l7\.", "linear."), (r"^l_y\.", "embedding.")),
}


def official_name(net: str, name: str) -> str:
    """This project's name of an official parameter or buffer; net is C, G, D or A.

    `official_name("G", "block2.b1.weights.weight") == "blocks.0.cbn1.gain"`.
    """
    first = 1 if net == "D" else 2  # D's blocks are counted from 1, G's and A's from 2
    for pattern, replacement in (*_TOP_NAMES[net], *(() if net == "C" else _BLOCK_NAMES)):
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^block(\d)\.", lambda m: f"blocks.{int(m[1]) - first}.", name)


def official_arrays(net: str, arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """The arrays under `prefix`, by this project's names, as tensors of their own dtype."""
    names = [name for name in arrays if name.startswith(prefix)]
    return {official_name(net, name[len(prefix) :]): torch.from_numpy(np.array(arrays[name])) for name in names}


def load_official(module: nn.Module, net: str, arrays: Mapping[str, np.ndarray], prefix: str) -> None:
    """Load all weights and buffers of a network from official arrays. Raises RuntimeError on a missing name."""
    module.load_state_dict(official_arrays(net, arrays, prefix))


class RecordedNoise(Noise):
    """Replays recorded draws by name, each list in order. Raises LookupError when one is used up or misshapen."""

    def __init__(
        self,
        draws: Mapping[str, Iterable[np.ndarray | Tensor]],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(0, device, dtype)
        self.draws: dict[str, Iterator[np.ndarray | Tensor]] = {name: iter(list(rows)) for name, rows in draws.items()}

    def _next(self, name: str, shape: Sequence[int]) -> Tensor:
        draw = next(self.draws.get(name, iter(())), None)
        if draw is None:
            raise LookupError(f"no recorded draw is left under the name {name!r}")
        tensor = torch.as_tensor(draw).to(self.device, self.dtype)
        if tensor.shape != torch.Size(shape):
            raise LookupError(f"recorded draw {name!r} has shape {tuple(tensor.shape)}, the step asks {tuple(shape)}")
        return tensor

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """The next recorded draw of this name."""
        return self._next(name, shape)

    uniform = normal


class RecordedLoader:
    """Hands out recorded StepBatches, one per step. Raises LookupError when they are used up."""

    kind = "recorded"

    def __init__(self, batches: Iterable[StepBatch]) -> None:
        self.batches = iter(batches)

    def next_step(self, n_disc: int) -> StepBatch:
        """The next recorded StepBatch."""
        batch = next(self.batches, None)
        if batch is None:
            raise LookupError("no recorded StepBatch is left")
        if len(batch.D) < n_disc:
            raise LookupError(f"recorded StepBatch has {len(batch.D)} D batches, the step asks {n_disc}")
        return batch

    def images_per_step(self, n_disc: int) -> int:
        """Unknown for recordings: 0."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """Recordings cannot be resumed: empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def close(self) -> None:
        """Nothing runs beside."""


class StepRecorder:
    """An `on_step` that keeps every term of every step: `steps[i][name]` = floats in the order of the updates."""

    def __init__(self) -> None:
        self.steps: list[dict[str, list[float]]] = []

    def __call__(self, terms: Mapping[str, list[Tensor]]) -> None:
        """Keep the terms of one step."""
        self.steps.append({name: [float(v) for v in values] for name, values in terms.items()})


def step_terms(engine: Engine, batch: StepBatch) -> dict[str, list[float]]:
    """Run one step of an engine and return its terms."""
    recorder = StepRecorder()
    engine.on_step = recorder
    try:
        engine.step(batch)
    finally:
        engine.on_step = None
    return recorder.steps[0]


def as_images(images: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images -> u / 255 in the given dtype."""
    return torch.from_numpy(images).to(dtype).div(255)
