"""Configuration: every option of the engine, as data. Imports nothing of ours and no torch.

A Config is built in layers, later ones win: the defaults below (the paper's CIFAR-10 setting), the preset's
`all` section, its section for the dataset, its section for the method, then what the user set. Every field is a
command line flag (`--loss.gamma 0.1`) and a YAML key (`loss: {gamma: 0.1}`) of the same name. Numbers may be
written as fractions: `8/255`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

PRESET_DIR = Path(__file__).parent / "presets"
DATASETS = ("digits", "cifar10", "cifar100")
METHODS = ("puat", "regular")
PRESETS = ("paper", "official-v1")


class ConfigError(ValueError):
    """A user's mistake in the configuration: names the key, the value and what is accepted."""


@dataclass(kw_only=True)
class DataConfig:
    """Labelled / unlabelled / validation split (spec 1.8)."""

    n_labelled: int = 4000  # number of labelled training images, a multiple of the number of classes
    val_fraction: float = 0.2  # part of the labelled images that is held out for early stopping
    mean: tuple[float, float, float] = (0.4914, 0.4822, 0.4465)  # normalisation inside C: (x - mean) / std
    std: tuple[float, float, float] = (0.2023, 0.1994, 0.2010)
    mix_frac: float = 0.9  # f: part of the mixed batch and of D's real batch that is pseudo-labelled
    use_unlabelled: bool = True  # false: PUAT without unlabelled data (x_u := x_l)


@dataclass(kw_only=True)
class ClassifierConfig:
    """C: WRN-depth-width with SiLU."""

    depth: int = 28  # 6 n + 4
    width: int = 10


@dataclass(kw_only=True)
class GanConfig:
    """G and D, and the Adam that trains G, D and A."""

    width: int = 256  # channels of G and D
    z_dim: int = 256
    lr: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.99)
    sn_per_class_lookup: bool = False  # official-v1: D(x, all) does K power iterations on the class embedding


@dataclass(kw_only=True)
class AttackerConfig:
    """A: z_a = z + clip * tanh(.)."""

    clip: float = 0.1
    eval_after_first_epoch: bool = False  # official-v1 (bug): A stays in eval mode after epoch 1 of stage 2


@dataclass(kw_only=True)
class AttackConfig:
    """The L-inf PGD that makes the restricted adversarial examples (RAE) in training."""

    eps: float = 8 / 255
    step_size: float = 2 / 255
    num_steps: int = 10


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
    consistency_weight: float = 50.0  # alpha
    label_smoothing: float = 0.1  # of C's losses; attacks use none


@dataclass(kw_only=True)
class ConsistencyConfig:
    """Mean-teacher consistency (eq 13)."""

    reduce: Literal["mean", "sum"] = "mean"  # over the classes
    source: Literal["mixed", "unlabelled"] = "mixed"


@dataclass(kw_only=True)
class AugmentConfig:
    """C's own augmentation, drawn anew in each of its train-mode forwards."""

    crop_pad: int = 4
    flip: bool = True
    rotate_deg: float = 0.0
    scope: Literal["image", "batch"] = "image"  # one draw per image, or one for the whole batch


@dataclass(kw_only=True)
class ScheduleConfig:
    """Stage 2, and what both stages share."""

    epochs: int = 100
    batch_size: int = 256  # labelled images per batch; as many unlabelled ones
    n_disc: int = 5  # D updates per step
    order: str = "DGAC"  # order of the updates in a step (paper, Algorithm 1: DACG)
    epoch_multiplier: int = 2  # steps per epoch = epoch_multiplier * ceil(N / (2 batch_size))
    steps_per_epoch: int | None = None  # overrides the line above
    adv_start: float = 0.0  # r(t) ramps from epoch adv_start to adv_end
    adv_end: float = 10.0


@dataclass(kw_only=True)
class PretrainConfig:
    """Stage 1: mean teacher for C, from gan_start on also D and G."""

    epochs: int = 100
    gan_start: int = 11  # first epoch in which D and G are trained
    consistency_ramp: float = 30.0  # epochs over which alpha ramps up
    ema_decay: float = 0.99  # teacher decay up to the end of the ramp
    ema_decay_after: float = 0.999
    exclude_validation: bool = True  # official-v1 trains stage 1 on the validation images too


@dataclass(kw_only=True)
class OptimConfig:
    """SGD with Nesterov momentum for C, one-cycle per epoch (spec 1.7)."""

    lr: float = 0.2
    momentum: float = 0.9  # used when cycle_momentum is false
    cycle_momentum: bool = True  # 0.95 - 0.85 - 0.95
    pct_start: float = 0.025
    weight_decay: float = 5e-4
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

    attack: Literal["cw-pgd-40", "ce-pgd-20"] = "cw-pgd-40"
    step_size: float = 2 / 255
    every: int = 1  # epochs between two validations in stage 2; the last epoch is always validated
    final_images: int | None = 1000  # test images of the accuracies printed at the end of a run; null: all


@dataclass(kw_only=True)
class LogConfig:
    """What a run writes, and how often."""

    interval: int = 10  # steps between two reads of the losses
    sample_every: int = 1  # epochs between two sample grids; 0: only at the end
    checkpoint_every: int = 1  # epochs between two checkpoints/last.pt


@dataclass(kw_only=True)
class Config:
    """All options of a run."""

    preset: Literal["paper", "official-v1"] = "paper"
    method: Literal["puat", "regular"] = "puat"
    dataset: Literal["digits", "cifar10", "cifar100"] = "digits"
    data_dir: str | None = None  # folder that holds the dataset's files or archive
    out: str | None = None  # run directory; null: runs/<dataset>-<method>-<preset>-s<seed>
    seed: int = 1  # of the split, of the initial weights and of training
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    precision: Literal["fp32", "fp64"] = "fp32"
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
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    val: ValConfig = field(default_factory=ValConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @classmethod
    def preset_values(cls, preset: str, dataset: str, method: str) -> dict[str, Any]:
        """What a preset sets for a dataset and a method, as a nested dict. Raises ConfigError."""
        for name, value, accepted in (
            ("preset", preset, PRESETS), ("dataset", dataset, DATASETS), ("method", method, METHODS)
        ):  # fmt: skip
            if value not in accepted:
                raise ConfigError(f"{name}: {value!r} is not one of {', '.join(accepted)}{_guess(value, accepted)}")
        values: dict[str, Any] = {"preset": preset, "dataset": dataset, "method": method}
        names = ["paper"] if preset == "paper" else ["paper", preset]  # official-v1 is written as a difference
        for name in names:
            sections = yaml.safe_load((PRESET_DIR / f"{name}.yaml").read_text(encoding="utf-8"))
            for section in (sections.get("all"), sections["datasets"].get(dataset), sections["methods"].get(method)):
                merge(values, section or {})
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
        config = _build(cls, values, "")
        config.validate()
        return config

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """A resolved config.yaml, as a run directory holds it. Raises ConfigError, FileNotFoundError."""
        return cls.from_dict(read_yaml(path))

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dict of every option: what config.yaml holds."""
        return {k: list(v) if isinstance(v, tuple) else _plain(v) for k, v in dataclasses.asdict(self).items()}

    def validate(self) -> None:
        """Check ranges and combinations. Raises ConfigError naming key, value and what is accepted."""
        for key, low, high in _RANGES:
            value = self.get(key)
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                raise ConfigError(f"{key}: {value:g} is out of range, accepted: {_span(low, high)}")
        if (self.classifier.depth - 4) % 6:
            raise ConfigError(f"classifier.depth: {self.classifier.depth} is not 6 n + 4 (10, 16, 22, 28, ...)")
        if sorted(self.schedule.order) != sorted("DGAC"):
            raise ConfigError(f"schedule.order: {self.schedule.order!r} is not an order of the letters D, G, A, C")
        for key in ("data.mean", "data.std"):
            if not all(math.isfinite(v) for v in self.get(key)) or (key == "data.std" and min(self.get(key)) <= 0):
                raise ConfigError(f"{key}: {self.get(key)} must be three finite numbers, std above 0")
        if self.uae.share_z and self.schedule.order.index("G") > min(map(self.schedule.order.index, "AC")):
            raise ConfigError(f"uae.share_z: needs G before A and C in schedule.order, not {self.schedule.order!r}")
        device, _, index = self.device.partition(":")
        if device not in ("auto", "cpu", "cuda") or (index and (device != "cuda" or not index.isdigit())):
            raise ConfigError(f"device: {self.device!r} is not one of auto, cpu, cuda, cuda:N")

    def get(self, key: str) -> Any:
        """The value of a dotted key, e.g. `loss.gamma`."""
        value: Any = self
        for part in key.split("."):
            value = getattr(value, part)
        return value


# `Config.preset` is both the field that records the preset and the constructor `Config.preset("paper", ...)`:
# the field lives on instances, the constructor on the class.
Config.preset = Config._from_preset  # type: ignore[assignment]

_INF = math.inf
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("seed", 0, 2**31 - 1),
    ("data.n_labelled", 1, _INF), ("data.val_fraction", 0, 0.9), ("data.mix_frac", 0, 1),
    ("classifier.depth", 10, _INF), ("classifier.width", 1, _INF),
    ("gan.width", 1, _INF), ("gan.z_dim", 1, _INF), ("gan.lr", 0, _INF),
    ("attacker.clip", 0, _INF),
    ("attack.eps", 0, 1), ("attack.step_size", 0, 1), ("attack.num_steps", 0, _INF),
    ("uae.project_eps", 0, 1),
    ("loss.uae_weight", 0, _INF), ("loss.rae_weight", 0, _INF), ("loss.gamma", 0, _INF),
    ("loss.consistency_weight", 0, _INF), ("loss.label_smoothing", 0, 1),
    ("augment.crop_pad", 0, 16), ("augment.rotate_deg", 0, 180),
    ("schedule.epochs", 1, _INF), ("schedule.batch_size", 2, _INF), ("schedule.n_disc", 1, _INF),
    ("schedule.epoch_multiplier", 1, _INF), ("schedule.steps_per_epoch", 1, _INF),
    ("schedule.adv_start", 0, _INF), ("schedule.adv_end", 0, _INF),
    ("pretrain.epochs", 0, _INF), ("pretrain.gan_start", 1, _INF), ("pretrain.consistency_ramp", 0, _INF),
    ("pretrain.ema_decay", 0, 1), ("pretrain.ema_decay_after", 0, 1),
    ("optim.lr", 0, _INF), ("optim.momentum", 0, 1), ("optim.pct_start", 0, 1), ("optim.weight_decay", 0, _INF),
    ("ema.decay", 0, 1), ("ema.warmup_images", 1, _INF),
    ("val.step_size", 0, 1), ("val.every", 1, _INF),
    ("log.interval", 1, _INF), ("log.sample_every", 0, _INF), ("log.checkpoint_every", 1, _INF),
)  # fmt: skip


def number(text: str | float) -> float:
    """A float from 0.1, '0.1' or '8/255'. Raises ValueError."""
    if isinstance(text, str) and "/" in text:
        above, _, below = text.partition("/")
        if float(below) == 0:
            raise ValueError(f"{text!r} divides by zero")
        return float(above) / float(below)
    return float(text)


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


def merge(values: dict[str, Any], update: dict[str, Any]) -> None:
    """Write nested or dotted keys of `update` over `values`, in place."""
    for key, value in update.items():
        head, _, rest = key.partition(".") if isinstance(key, str) else (key, "", "")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if rest or isinstance(value, dict):
            child = values.setdefault(head, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{key}: {head} is a single value, not a group")
            merge(child, {rest: value} if rest else value)
        else:
            values[head] = value


def _build(cls: type, values: dict[str, Any], path: str) -> Any:
    nested: dict[str, Any] = {}
    merge(nested, values)
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in nested.items():
        name = f"{path}{key}"
        if key not in hints:
            raise ConfigError(f"{name}: no such option{_guess(str(key), hints)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{name}: is a group of options, not {value!r}")
            arguments[key] = _build(typing.cast(type, hints[key]), value, f"{name}.")
        else:
            arguments[key] = _convert(value, hints[key], name)
    return cls(**arguments)


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
    try:
        if hint is bool and not isinstance(value, bool):
            raise ValueError
        if hint is int and (isinstance(value, bool) or int(value) != float(value)):
            raise ValueError
        if hint is float and isinstance(value, bool):
            raise ValueError
        if hint is str and not isinstance(value, str):
            raise ValueError
        converted = number(value) if hint is float else hint(value)
    except (ValueError, TypeError, OverflowError):
        kind = {bool: "true or false", int: "a whole number", float: "a number such as 0.1 or 8/255", str: "a text"}
        raise ConfigError(f"{name}: {value!r} is not {kind[hint]}") from None
    return converted


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}
    return value


def _guess(value: str, accepted: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(value, list(accepted), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _span(low: float, high: float) -> str:
    return f">= {low:g}" if high == _INF else f"{low:g} to {high:g}"
