"""Configuration: every option of the engine, as data. Imports nothing of ours and no torch.

A Config is built in layers, later ones win: the defaults below (the paper's CIFAR-10 setting), the preset's
`all` section, its section for the dataset, its section for the method, then what the user set. Every field is a
command line flag (`--loss.gamma 0.1`) and a YAML key (`loss: {gamma: 0.1}`) of the same name. Numbers may be
written as fractions: `8/255`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import operator
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

PRESET_DIR = Path(__file__).parent / "presets"
DatasetName = Literal["digits", "cifar10", "cifar100", "svhn", "tiny-imagenet", "imagenet32", "folder"]
SearchPrecision = Literal["fp32", "tf32", "bf16"]  # of an attack's search, see attacks.precision


class ConfigError(ValueError):
    """A user's mistake in the configuration: names the key, the value and what is accepted."""


@dataclass(kw_only=True)
class DataConfig:
    """Labelled / unlabelled / validation split (spec 1.8)."""

    n_labelled: int = 4000  # number of labelled training images, a multiple of the number of classes
    val_fraction: float = 0.2  # part of the labelled images that is held out for early stopping
    mean: tuple[float, float, float] = (0.4914, 0.4822, 0.4465)  # normalisation inside C: (x - mean) / std
    std: tuple[float, float, float] = (0.2023, 0.1994, 0.2010)  # of the same formula, above 0
    mix_frac: float = 0.9  # f: part of the mixed batch and of D's real batch that is pseudo-labelled
    use_unlabelled: bool = True  # false: PUAT without unlabelled data (x_u := x_l)
    classes: Literal["paper", "all"] = "paper"  # of tiny-imagenet and imagenet32: the paper's 10, or all 200 and 1000
    extra_unlabelled: str | None = None  # file of more unlabelled images: DMAT's .npz or RST's .pickle; null: none


@dataclass(kw_only=True)
class ClassifierConfig:
    """C: WRN-depth-width with SiLU."""

    depth: int = 28  # 6 n + 4
    width: int = 10  # widening factor: 16, 32 and 64 channels times this


@dataclass(kw_only=True)
class GanConfig:
    """G and D, and the Adam that trains G, D and A."""

    width: int = 256  # channels of G and D
    z_dim: int = 256  # entries of the noise vector z
    lr: float = 1e-4  # learning rate of the Adam of G, D and A
    betas: tuple[float, float] = (0.0, 0.99)  # decay rates of that Adam's two moments, each 0 to below 1
    sn_per_class_lookup: bool = False  # official-v1: D(x, all) does K power iterations on the class embedding


@dataclass(kw_only=True)
class AttackerConfig:
    """A: z_a = z + clip * tanh(.)."""

    clip: float = 0.1  # how far an entry of z_a may be from that of z
    eval_after_first_epoch: bool = False  # official-v1 (bug): A stays in eval mode after epoch 1 of stage 2


@dataclass(kw_only=True)
class AttackConfig:
    """The L-inf PGD that makes the restricted adversarial examples (RAE) in training."""

    eps: float = 8 / 255  # radius of the L-inf ball; images are in [0, 1]
    step_size: float = 2 / 255  # length of a step, in the same unit
    num_steps: int = 10  # number of steps


@dataclass(kw_only=True)
class RaeConfig:
    """Restricted adversarial examples of the C update."""

    source: Literal["mixed", "labelled"] = "mixed"  # attacked batch: (x_m, y_m), or (x_l, y_l) as in eq 17
    init: Literal["gauss", "uniform"] = "gauss"  # x + 0.001 N(0,1), or x + U(-eps, eps) clipped to [0,1]
    bn: Literal["train_frozen", "train", "eval"] = "train_frozen"  # C's BatchNorm while the attack runs
    accuracy_labels: Literal["y_m", "y_l"] = "y_m"  # labels of the logged RAE accuracy (official-v1: y_l, a bug)


@dataclass(kw_only=True)
class UaeConfig:
    """Unrestricted adversarial examples G(A(z,y),y)."""

    project_eps: float | None = 8 / 255  # radius of the L-inf ball around G(z,y); null: no projection
    share_z: bool = False  # A and C reuse the z of the G update


@dataclass(kw_only=True)
class PseudoConfig:
    """Hard pseudo-labels of the mixed batch."""

    forward: Literal["reuse", "extra", "eval"] = "reuse"  # argmax of the C(x_u) at hand, of one more, or in eval mode
    relabel_labelled: bool = False  # official-v1: without unlabelled data, labelled images get predicted labels


@dataclass(kw_only=True)
class LossConfig:
    """Weights of the C loss (eqs 12-17)."""

    uae_weight: float = 10.0  # lambda: weight of the UAE term
    rae_weight: float = 6.0  # beta: weight of the RAE term
    rae_weight_mode: Literal["additive", "lambda_times"] = "additive"  # beta, or lambda * beta as in official-v1
    gamma: float = 0.03  # weight of the D term
    consistency_weight: float = 50.0  # alpha: weight of the consistency term
    label_smoothing: float = 0.1  # of C's losses; attacks use none


@dataclass(kw_only=True)
class ConsistencyConfig:
    """Mean-teacher consistency (eq 13)."""

    reduce: Literal["mean", "sum"] = "mean"  # over the classes
    source: Literal["mixed", "unlabelled"] = "mixed"  # images compared: the mixed batch x_m, or x_u


@dataclass(kw_only=True)
class AugmentConfig:
    """C's own augmentation."""

    crop_pad: int = 4  # pixels of zero padding before the random 32 x 32 crop; 0: no crop
    flip: bool = True  # mirror left and right with probability 1/2
    rotate_deg: float = 0.0  # rotate by an angle from [-rotate_deg, rotate_deg] degrees; 0: no rotation
    scope: Literal["image", "batch"] = "image"  # one draw per image, or one for the whole batch
    # classifier: anew in each train-mode forward of C, as the official code; loader: once per step, C's batch only
    where: Literal["classifier", "loader"] = "classifier"  # in each train-mode forward of C, or once per step


@dataclass(kw_only=True)
class AcganConfig:
    """The AC-GAN of `method: acgan`; its training was not published, the numbers are the official script's."""

    epochs: int = 100  # passes over the training images, all of them with their labels
    batch_size: int = 64  # real images per step, and as many generated ones
    lr: float = 2e-4  # learning rate of both Adams
    betas: tuple[float, float] = (0.5, 0.999)  # decay rates of their moments, each 0 to below 1
    z_dim: int = 100  # entries of the latent z
    width: int = 64  # channels of G before the image, and of D after its first convolution


@dataclass(kw_only=True)
class ScheduleConfig:
    """Stage 2, and what both stages share."""

    epochs: int = 100  # epochs of stage 2
    batch_size: int = 256  # labelled images per batch, over all processes; as many unlabelled ones
    n_disc: int = 5  # D updates per step
    order: str = "DGAC"  # order of the updates in a step (paper, Algorithm 1: DACG)
    epoch_multiplier: int = 2  # steps per epoch = epoch_multiplier * ceil(N / (2 batch_size))
    steps_per_epoch: int | None = None  # overrides the line above
    adv_start: float = 0.0  # r(t), the factor of the adversarial terms, is 0 up to this epoch of stage 2
    adv_end: float = 10.0  # from this epoch's end on r(t) is 1


@dataclass(kw_only=True)
class PretrainConfig:
    """Stage 1: mean teacher for C, from gan_start on also D and G."""

    epochs: int = 100  # epochs of stage 1; 0: none
    gan_start: int = 11  # first epoch in which D and G are trained
    consistency_ramp: float = 30.0  # epochs over which alpha ramps up
    ema_decay: float = 0.99  # teacher decay up to the end of the ramp
    ema_decay_after: float = 0.999  # teacher decay after it
    exclude_validation: bool = True  # official-v1 trains stage 1 on the validation images too


@dataclass(kw_only=True)
class OptimConfig:
    """SGD with Nesterov momentum for C, one-cycle per epoch (spec 1.7)."""

    lr: float = 0.2  # highest learning rate of the cycle
    momentum: float = 0.9  # used when cycle_momentum is false
    cycle_momentum: bool = True  # 0.95 - 0.85 - 0.95
    pct_start: float = 0.025  # part of the epochs in which the learning rate rises
    weight_decay: float = 5e-4  # added to the gradient as weight_decay * weight
    decay_bn: bool = False  # weight decay on BatchNorm gains and biases


@dataclass(kw_only=True)
class EmaConfig:
    """The teacher C', exponential moving average of C: the model that is evaluated and saved."""

    decay: float = 0.995  # stage 2
    reset_on_stage2: bool = True  # the warm-up (decay 0) runs again at the start of stage 2
    bn: Literal["copy", "shared", "average"] = "copy"  # C' BN buffers: copied at epoch end, aliased (a bug), averaged
    warmup_images: int | None = None  # N0 of the warm-up steps W = pct_start * epochs * E0; null: the real E


@dataclass(kw_only=True)
class ValConfig:
    """Early stopping by robust accuracy of C' on the validation images."""

    attack: Literal["cw-pgd-40", "ce-pgd-20"] = "cw-pgd-40"  # loss and number of steps of its PGD within 8/255
    step_size: float = 2 / 255  # length of its steps; images are in [0, 1]
    every: int = 1  # epochs between two validations in stage 2; the last epoch is always validated
    final_images: int | None = 1000  # test images of the accuracies printed at the end of a run; null: all


@dataclass(kw_only=True)
class LogConfig:
    """What a run writes, and how often."""

    interval: int = 10  # steps between two reads of the losses
    sample_every: int = 1  # epochs between two sample grids; 0: only at the end
    checkpoint_every: int = 1  # epochs between two checkpoints/last.pt


@dataclass(kw_only=True)
class FastConfig:
    """What `engine: compiled` does for speed alone. Each gives the same losses to rounding, and can be turned off."""

    skip_weight_grads: bool = True  # no weight gradient that nobody reads; the eager engine skips them too
    batch_disc: bool = True  # the three D forwards of a D update in one pass, each with its own sigma
    batch_labels: bool = True  # C's labels for all D updates of a step in one pass
    pool_conv: bool = True  # D: conv3x3 and average pool as one 4x4 convolution of stride 2
    commute: bool = True  # 1x1 convolutions after D's pooling and before G's upsampling
    fold_bn: bool = True  # C in eval mode: BatchNorm folded into the convolution before it
    compile: bool = True  # torch.compile of the networks
    graph: bool = True  # on a GPU: the whole step as one CUDA graph


@dataclass(kw_only=True)
class Config:
    """All options of a run."""

    preset: Literal["paper", "official-v1"] = "paper"  # values to start from: the paper's, or the official code's
    method: Literal["puat", "regular", "acgan"] = "puat"  # PUAT; C alone; or the AC-GAN that GPGD and USong need
    dataset: DatasetName = "digits"  # digits comes with the package; folder: any images in class folders
    data_dir: str | None = None  # folder that holds the dataset's files or archive
    out: str | None = None  # run directory; null: runs/<dataset>-<method>-<preset>-s<seed>
    seed: int = 1  # of the split, of the initial weights and of training
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    engine: Literal["auto", "eager", "compiled"] = "auto"  # how a step is run; auto: compiled on a GPU, else eager
    loader: Literal["auto", "resident", "stream", "dali", "torch"] = "auto"  # auto: resident, or stream if too large
    precision: Literal["auto", "bf16", "tf32", "fp32", "fp64"] = "auto"  # of convolutions; auto: bf16 on GPU, else fp32
    fast: FastConfig = field(default_factory=FastConfig)
    data: DataConfig = field(default_factory=DataConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    gan: GanConfig = field(default_factory=GanConfig)
    attacker: AttackerConfig = field(default_factory=AttackerConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    rae: RaeConfig = field(default_factory=RaeConfig)
    uae: UaeConfig = field(default_factory=UaeConfig)
    pseudo: PseudoConfig = field(default_factory=PseudoConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    acgan: AcganConfig = field(default_factory=AcganConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    val: ValConfig = field(default_factory=ValConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @classmethod
    def preset_values(cls, preset: str, dataset: str, method: str) -> dict[str, Any]:
        """What a preset sets for a dataset and a method, by dotted keys. Raises ConfigError."""
        values: dict[str, Any] = {"preset": preset, "dataset": dataset, "method": method}
        for key, value in values.items():
            _convert(value, option_types()[key], key)
        for name in ["paper"] if preset == "paper" else ["paper", preset]:  # official-v1 is written as a difference
            sections = yaml.safe_load((PRESET_DIR / f"{name}.yaml").read_text(encoding="utf-8"))
            both = sections["both"].get(f"{dataset} {method}", {})
            for section in (sections["all"], sections["datasets"][dataset], sections["methods"][method], both):
                merge(values, section)
        return values

    @classmethod
    def _from_preset(cls, name: str, **overrides: Any) -> Config:
        """A preset with overrides: `Config.preset("paper", dataset="cifar10", seed=2)`. Raises ConfigError."""
        values = cls.preset_values(name, overrides.get("dataset", "digits"), overrides.get("method", "puat"))
        merge(values, overrides)
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """A Config from nested dicts (as read from YAML) or dotted keys; refuses unknown keys. Raises ConfigError."""
        config, kinds, given = cls(), option_types(), dict[str, Any]()
        merge(given, values)
        for key, value in given.items():
            if key in _GROUPS:
                raise ConfigError(f"{key}: is a group of options, not {value!r}")
            if key not in kinds:
                raise ConfigError(f"{key}: no such option{_guess(key, kinds)}")
            group, _, name = key.rpartition(".")
            setattr(config.get(group) if group else config, name, _convert(value, kinds[key], key))
        config.validate()
        return config

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """A resolved config.yaml, as a run directory holds it. Raises ConfigError, FileNotFoundError."""
        try:
            return cls.from_dict(read_yaml(path))
        except ConfigError as error:
            raise ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dict of every option: what config.yaml holds."""
        return dataclasses.asdict(
            self, dict_factory=lambda pairs: {k: list(v) if isinstance(v, tuple) else v for k, v in pairs}
        )

    def validate(self) -> None:
        """Check ranges and combinations. Raises ConfigError naming key, value and what is accepted."""
        for (low, high), keys in _RANGES.items():
            for key in keys.split():
                value = self.get(key)
                if value is not None and not (low <= value <= high and math.isfinite(value)):
                    span = f">= {low}" if high == math.inf else f"{low} to {high}"
                    raise ConfigError(f"{key}: {value:g} is out of range, accepted: {span}")
        order = self.schedule.order
        for key, good, accepted in (
            ("data.mean", all(map(math.isfinite, self.data.mean)), "three finite numbers"),
            ("data.std", all(0 < v < math.inf for v in self.data.std), "three finite numbers above 0"),
            ("classifier.depth", self.classifier.depth % 6 == 4, "6 n + 4: 10, 16, 22, 28, ..."),
            ("gan.betas", all(0 <= beta < 1 for beta in self.gan.betas), "two numbers from 0 to below 1"),
            ("acgan.betas", all(0 <= beta < 1 for beta in self.acgan.betas), "two numbers from 0 to below 1"),
            ("schedule.order", sorted(order) == sorted("DGAC"), "an order of the letters D, G, A, C"),
            ("uae.share_z", not self.uae.share_z or order.find("G") < min(map(order.find, "AC")),
             f"false, or a schedule.order with G before A and C, not {order}"),
            ("device", re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", self.device), "auto, cpu, cuda, cuda:N"),
        ):  # fmt: skip
            if not good:
                raise ConfigError(f"{key}: {self.get(key)!r} is not accepted; accepted: {accepted}")

    def get(self, key: str) -> Any:
        """The value of a dotted key, e.g. `loss.gamma`."""
        return operator.attrgetter(key)(self)


# On the class the constructor `Config.preset("paper", ...)`; on instances the field that records the preset's name.
Config.preset = Config._from_preset  # type: ignore[assignment]

_GROUPS = [name for name, hint in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(hint)]
_RANGES = {
    (0, 2**31 - 1): "seed",
    (0, 1): "data.mix_frac attack.eps attack.step_size uae.project_eps loss.label_smoothing pretrain.ema_decay"
    " pretrain.ema_decay_after optim.momentum optim.pct_start ema.decay val.step_size",
    (0, 0.9): "data.val_fraction",
    (0, 16): "augment.crop_pad",
    (0, 180): "augment.rotate_deg",
    (0, math.inf): "acgan.lr gan.lr attacker.clip attack.num_steps loss.uae_weight loss.rae_weight loss.gamma"
    " loss.consistency_weight schedule.adv_start schedule.adv_end pretrain.epochs pretrain.consistency_ramp optim.lr"
    " optim.weight_decay log.sample_every",
    (1, math.inf): "acgan.epochs acgan.z_dim acgan.width"
    " data.n_labelled classifier.width gan.width gan.z_dim schedule.epochs schedule.n_disc"
    " schedule.epoch_multiplier schedule.steps_per_epoch pretrain.gan_start ema.warmup_images val.every"
    " val.final_images log.interval log.checkpoint_every",
    (2, math.inf): "schedule.batch_size acgan.batch_size",
    (10, math.inf): "classifier.depth",
}
_KINDS = {bool: "true or false", int: "an integer", float: "a number such as 0.1 or 8/255", str: "a text"}


def number(text: str | float) -> float:
    """A float from 0.1, '0.1' or '8/255'. Raises ValueError, TypeError, ZeroDivisionError."""
    if isinstance(text, bool):  # which float would take for 0 or 1
        raise ValueError(f"{text!r} is not a number")
    above, slash, below = str(text).partition("/")
    return float(above) / float(below) if slash else float(text)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises ConfigError naming the file."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping of options, holds {type(values).__name__}")
    return values


def merge(values: dict[str, Any], update: dict[str, Any], path: str = "") -> None:
    """Write nested or dotted keys of `update` over `values`, in place, as dotted keys.

    A group that holds nothing, as one of a YAML file whose lines are all comments, changes nothing.
    """
    for key, value in update.items():
        name = f"{path}{key}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if isinstance(value, dict) and value:
            merge(values, value, f"{name}.")
        elif value not in (None, {}) or name not in _GROUPS:
            values[name] = value


@functools.cache
def option_types() -> dict[str, Any]:
    """The type of every option, by its dotted key."""
    found = typing.get_type_hints(Config)
    for name in _GROUPS:
        found |= {f"{name}.{key}": hint for key, hint in typing.get_type_hints(found.pop(name)).items()}
    return found


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as type `hint`; numbers may be fractions. Raises ConfigError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _convert(value, arguments[0], name)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{name}: {value!r} is not one of {', '.join(arguments)}{_guess(str(value), arguments)}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(arguments):
            raise ConfigError(f"{name}: {value!r} is not a list of {len(arguments)} numbers")
        return tuple(_convert(v, h, name) for v, h in zip(value, arguments, strict=True))
    with contextlib.suppress(ValueError, TypeError, ZeroDivisionError):
        if hint is float:
            return number(value)
        if hint is int and isinstance(value, str):
            return int(value)
        if type(value) is hint:
            return value
    raise ConfigError(f"{name}: {value!r} is not {_KINDS[hint]}")


def _guess(value: str, accepted: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(value, list(accepted), n=1)
    return f"; did you mean {close[0]}?" if close else ""
