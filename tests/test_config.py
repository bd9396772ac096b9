import math
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from puat_fast.config import Config, ConfigError, LossConfig, merge, number, option_types

KINDS = option_types()
PRESETS, DATASETS, METHODS = (get_args(KINDS[key]) for key in ("preset", "dataset", "method"))

# Spec 1.10, row by row: option -> (default, what official-v1 has instead, if that differs).
# Rows without an option, as those whose option is named in the row above, are left out.
CODE = {
    "loss.rae_weight_mode": ("additive", "lambda_times"),
    "loss.gamma": (0.03, dict.fromkeys(DATASETS, 0.03) | {"cifar10": 1.0, "imagenet32": 1.0}),
    "rae.source": ("mixed",),
    "loss.label_smoothing": (0.1,),
    "uae.project_eps": (8 / 255,),
    "attacker.clip": (0.1,),
    "consistency.reduce": ("mean",),
    "consistency.source": ("mixed",),
    "schedule.n_disc": (5,),
    "schedule.order": ("DGAC",),
    "uae.share_z": (False,),
    "rae.init": ("gauss",),
    "rae.bn": ("train_frozen", "train"),
    "pseudo.forward": ("reuse", "extra"),
    "augment.scope": ("image", "batch"),
    "optim.cycle_momentum": (True,),
    "optim.pct_start": (0.025,),
    "optim.decay_bn": (False,),
    "ema.reset_on_stage2": (True,),
    "ema.bn": ("copy", "shared"),
    "attacker.eval_after_first_epoch": (False, True),
    "schedule.epoch_multiplier": (2,),
    "pretrain.epochs": (100,),
    "pretrain.gan_start": (11,),
    "pretrain.exclude_validation": (True, False),
    "val.attack": ("cw-pgd-40",),
    "gan.width": (256, dict.fromkeys(DATASETS, 256) | {"tiny-imagenet": 512}),
    "gan.sn_per_class_lookup": (False, True),
}
# Bugs of the code that are told elsewhere: spec 1.5, 5.3 and, for N0 of the warm-up, 1.7.
BUGS = {
    "rae.accuracy_labels": ("y_m", "y_l"),
    "pseudo.relabel_labelled": (False, True),
    "ema.warmup_images": (
        None,
        dict.fromkeys(DATASETS, 73257) | dict.fromkeys(["cifar10", "cifar100"], 50000) | {"tiny-imagenet": 100000},
    ),
}
# Spec 1.8: what the datasets have of their own.
PAPERS = ("cifar10", "cifar100", "svhn", "tiny-imagenet", "imagenet32")
OF_DATASET: dict[str, tuple[Any, ...]] = {  # in the order of PAPERS
    "data.n_labelled": (4000, 10000, 1000, 1000, 1000),
    "data.val_fraction": (0.2, 0.2, 0.2, 0.2, 0.2),
    "data.mix_frac": (0.9, 0.6, 0.9, 0.6, 0.5),
    "loss.consistency_weight": (50, 500, 50, 50, 50),
    "loss.uae_weight": (10, 10, 10, 10, 10),
    "loss.rae_weight": (6, 10, 6, 6, 6),
    "augment.crop_pad": (4, 4, 0, 2, 2),
    "augment.flip": (True, True, False, True, True),
    "augment.rotate_deg": (0, 15, 0, 0, 0),
}
CIFAR10_STATS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
STATS = {  # spec 1.2: mean, std
    "cifar10": CIFAR10_STATS,
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": CIFAR10_STATS,
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "imagenet32": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def preset(name: str, **options: Any) -> Config:
    return Config.preset(name, **options)  # type: ignore[operator]


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as told:
        Config.from_dict(values)
    assert "\n" not in str(told.value)
    return str(told.value)


# presets


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_preset_is_valid_and_survives_yaml(name: str, dataset: str, method: str) -> None:
    config = preset(name, dataset=dataset, method=method)
    assert (config.preset, config.dataset, config.method) == (name, dataset, method)
    assert Config.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_every_row_of_the_spec_is_an_option() -> None:
    assert {*CODE, *BUGS, *OF_DATASET, "data.mean", "data.std"} <= set(KINDS)


@pytest.mark.parametrize("dataset", DATASETS)
def test_official_code_differs_from_the_paper_in_the_rows_of_the_spec(dataset: str) -> None:
    paper, code = preset("paper", dataset=dataset), preset("official-v1", dataset=dataset)
    rows = {key: row[-1][dataset] if isinstance(row[-1], dict) else row[-1] for key, row in (CODE | BUGS).items()}
    expected = {key: value for key, value in rows.items() if value != (CODE | BUGS)[key][0]}
    differing = {key: code.get(key) for key in KINDS if paper.get(key) != code.get(key)}
    assert differing == expected | {"preset": "official-v1"}


@pytest.mark.parametrize("dataset", PAPERS)  # digits has sizes of its own
def test_paper_preset_is_the_default_column_of_the_spec(dataset: str) -> None:
    config = preset("paper", dataset=dataset)
    assert {key: config.get(key) for key in CODE | BUGS} == {key: row[0] for key, row in (CODE | BUGS).items()}


@pytest.mark.parametrize("name", PRESETS)
def test_values_of_the_datasets(name: str) -> None:
    configs = [preset(name, dataset=dataset) for dataset in PAPERS]
    for key, values in OF_DATASET.items():
        assert (key, tuple(config.get(key) for config in configs)) == (key, values)
    for config in configs:
        assert (config.data.mean, config.data.std) == STATS[config.dataset]
        own = {key for key in KINDS if configs[0].get(key) != config.get(key)}
        code = {"loss.gamma", "ema.warmup_images", "gan.width"} if name == "official-v1" else set()
        assert own <= {"dataset", *OF_DATASET, "data.mean", "data.std", *code}


def test_the_defaults_are_the_papers_cifar10() -> None:
    assert Config.from_dict({"dataset": "cifar10"}) == preset("paper", dataset="cifar10")


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="preset: 'papr' is not one of paper, official-v1; did you mean paper"):
        preset("papr")
    with pytest.raises(ConfigError, match="dataset: 'mnist' is not one of digits, cifar10, cifar100"):
        preset("paper", dataset="mnist")


# from_dict


def test_keys_may_be_nested_dotted_or_a_dataclass() -> None:
    expected = Config.from_dict({"loss": {"gamma": 1}, "seed": 2})
    assert expected.loss.gamma == 1 and expected.seed == 2
    assert Config.from_dict({"loss.gamma": 1, "seed": 2}) == expected
    assert Config.from_dict({"loss": LossConfig(gamma=1), "seed": 2}) == expected


@pytest.mark.parametrize("nothing", [None, {}])
def test_an_empty_group_changes_nothing(nothing: Any) -> None:
    assert Config.from_dict({"loss": nothing}) == Config()
    assert preset("paper", dataset="cifar100", loss=nothing).loss.consistency_weight == 500


def test_merge_writes_over_what_is_there() -> None:
    values: dict[str, Any] = {"loss.gamma": 1, "seed": 1}
    merge(values, {"loss": {"gamma": 2, "uae_weight": 3}, "gan": None})
    assert values == {"loss.gamma": 2, "loss.uae_weight": 3, "seed": 1}


@pytest.mark.parametrize(
    "text, value", [("8/255", 8 / 255), ("0.5/2", 0.25), ("1e-4", 1e-4), (3, 3.0), ("-1/4", -0.25)]
)
def test_numbers_may_be_fractions(text: str | float, value: float) -> None:
    assert number(text) == value


def test_fractions_in_options() -> None:
    config = Config.from_dict({"attack.eps": "16/255", "uae.project_eps": "4/255", "data.mean": ["1/2", "1/4", 0.5]})
    assert (config.attack.eps, config.uae.project_eps, config.data.mean) == (16 / 255, 4 / 255, (0.5, 0.25, 0.5))
    assert all(type(value) is float for value in (config.attack.eps, *config.data.mean))


@pytest.mark.parametrize("values, says", [
    ({"los": {"gamma": 1}}, "los.gamma: no such option; did you mean loss.gamma?"),
    ({"loss": {"gama": 1}}, "loss.gama: no such option; did you mean loss.gamma?"),
    ({"sead": 1}, "sead: no such option; did you mean seed?"),
    ({"qqq": {}}, "qqq: no such option"),
    ({3: 4}, "3: no such option"),
    ({"loss.gamma": {"a": 1}}, "loss.gamma.a: no such option; did you mean loss.gamma?"),
    ({"loss": 3}, "loss: is a group of options, not 3"),
])  # fmt: skip
def test_unknown_keys(values: dict[str, Any], says: str) -> None:
    assert refused(values) == says


@pytest.mark.parametrize("key, value, accepted", [
    ("loss.gamma", True, "a number such as 0.1 or 8/255"), ("loss.gamma", "much", "a number such as 0.1 or 8/255"),
    ("attack.eps", "8/0", "a number such as 0.1 or 8/255"), ("attack.eps", "8/", "a number such as 0.1 or 8/255"),
    ("loss.gamma", None, "a number such as 0.1 or 8/255"), ("uae.project_eps", [1], "a number such as 0.1 or 8/255"),
    ("seed", "one", "an integer"), ("seed", True, "an integer"), ("seed", 1.5, "an integer"),
    ("schedule.steps_per_epoch", "x", "an integer"), ("augment.flip", 1, "true or false"),
    ("augment.flip", "false", "true or false"), ("device", 0, "a text"), ("out", 5, "a text"),
    ("data.mean", [1, 2], "a list of 3 numbers"), ("gan.betas", "0.5", "a list of 2 numbers"),
    ("rae.init", "gaus", "one of gauss, uniform; did you mean gauss?"),
    ("precision", None, "one of auto, bf16, tf32, fp32, fp64"), ("engine", "fast", "one of auto, eager, compiled"),
])  # fmt: skip
def test_wrong_types(key: str, value: Any, accepted: str) -> None:
    assert refused({key: value}) == f"{key}: {value!r} is not {accepted}"


# ranges

LIMITS = {  # lowest and highest accepted value
    "seed": (0, 2**31 - 1), "data.val_fraction": (0, 0.9), "augment.crop_pad": (0, 16), "augment.rotate_deg": (0, 180),
    "schedule.batch_size": (2, math.inf), "acgan.batch_size": (2, math.inf), "classifier.depth": (10, math.inf),
    **dict.fromkeys(
        ["data.mix_frac", "attack.eps", "attack.step_size", "uae.project_eps", "loss.label_smoothing",
         "pretrain.ema_decay", "pretrain.ema_decay_after", "optim.momentum", "optim.pct_start", "ema.decay",
         "val.step_size"], (0, 1),
    ),
    **dict.fromkeys(
        ["gan.lr", "acgan.lr", "attacker.clip", "attack.num_steps", "loss.uae_weight", "loss.rae_weight", "loss.gamma",
         "loss.consistency_weight", "schedule.adv_start", "schedule.adv_end", "pretrain.epochs",
         "pretrain.consistency_ramp", "optim.lr", "optim.weight_decay", "log.sample_every"],
        (0, math.inf),
    ),
    **dict.fromkeys(
        ["acgan.epochs", "acgan.z_dim", "acgan.width",
         "data.n_labelled", "classifier.width", "gan.width", "gan.z_dim", "schedule.epochs", "schedule.n_disc",
         "schedule.epoch_multiplier", "schedule.steps_per_epoch", "pretrain.gan_start", "ema.warmup_images",
         "val.every", "val.final_images", "log.interval", "log.checkpoint_every"], (1, math.inf),
    ),
}  # fmt: skip


def test_every_number_has_limits() -> None:
    numbers = {key for key, kind in KINDS.items() if {int, float} & {kind, *get_args(kind)}}
    assert numbers == {*LIMITS, "data.mean", "data.std", "gan.betas", "acgan.betas"}


@pytest.mark.parametrize("key", LIMITS)
def test_limits(key: str) -> None:
    low, high = LIMITS[key]
    accepted = f">= {low}" if high == math.inf else f"{low} to {high}"
    for value in (low, high if high < math.inf else low):
        assert Config.from_dict({key: value}).get(key) == value
    wrong = [low - 1, *([high + 1] if high < math.inf else [])]
    if float in {KINDS[key], *get_args(KINDS[key])}:
        wrong += [math.inf, math.nan]
    for value in wrong:
        assert refused({key: value}) == f"{key}: {float(value):g} is out of range, accepted: {accepted}"


@pytest.mark.parametrize("values, says", [
    ({"data.mean": [0, 0, math.nan]}, "data.mean: (0.0, 0.0, nan) is not accepted; accepted: three finite numbers"),
    ({"data.std": [1, 1, 0]}, "data.std: (1.0, 1.0, 0.0) is not accepted; accepted: three finite numbers above 0"),
    ({"classifier.depth": 12}, "classifier.depth: 12 is not accepted; accepted: 6 n + 4: 10, 16, 22, 28, ..."),
    ({"gan.betas": [0, 1]}, "gan.betas: (0.0, 1.0) is not accepted; accepted: two numbers from 0 to below 1"),
    ({"schedule.order": "DAC"}, "schedule.order: 'DAC' is not accepted; accepted: an order of the letters D, G, A, C"),
    ({"schedule.order": "DACG", "uae.share_z": True}, "uae.share_z: True is not accepted; accepted: false, or a"
     " schedule.order with G before A and C, not DACG"),
    ({"device": "gpu"}, "device: 'gpu' is not accepted; accepted: auto, cpu, cuda, cuda:N"),
    ({"device": "cpu:0"}, "device: 'cpu:0' is not accepted; accepted: auto, cpu, cuda, cuda:N"),
])  # fmt: skip
def test_combinations(values: dict[str, Any], says: str) -> None:
    assert refused(values) == says


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_devices(device: str) -> None:
    assert Config.from_dict({"device": device}).device == device


# files


def test_load(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(preset("official-v1", seed=3).to_dict()))
    assert Config.load(file) == preset("official-v1", seed=3)


@pytest.mark.parametrize("text, says", [("[1]", "must hold a mapping of options, holds list"), ("{", "not valid YAML")])
def test_load_of_what_is_no_config(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"config.yaml: {says}"):
        Config.load(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"none.yaml: cannot be read: No such file"):
        Config.load(tmp_path / "none.yaml")
