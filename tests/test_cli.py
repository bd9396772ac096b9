import dataclasses
import json
import re
import subprocess
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from puat_fast import cli
from puat_fast.config import Config
from puat_fast.runlog import RunError


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


class Trained:
    """Stands for the Trainer: remembers what it got, and does what the test wants."""

    def __init__(self, path: Path) -> None:
        self.config: Config | None = None
        self.resume: str | None = None
        self.path = path
        self.summary = {"clean": 0.91234, "pgd-8": 0.5}
        self.act: Callable[[], None] = lambda: None

    def __call__(self, config: Config, resume: str | None = None) -> "Trained":
        self.config, self.resume = config, resume
        return self

    def fit(self) -> "Trained":
        self.act()
        return self


class NonFiniteError(RuntimeError):
    pass


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trained:
    trained = Trained(tmp_path / "run")
    fake(monkeypatch, "puat_fast.engine.trainer", Trainer=trained, NonFiniteError=NonFiniteError)
    return trained


def trained_config(trainer: Trained, *argv: str) -> Config:
    assert cli.main(["train", *argv]) == 0
    assert trainer.config is not None
    return trainer.config


def error_of(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    assert cli.main(argv) == code
    err = capsys.readouterr().err
    assert err.startswith("puat-fast: ") and err.count("\n") == 1, err
    return err


# options


def test_defaults_are_the_presets(trainer: Trained) -> None:
    assert trained_config(trainer) == Config.preset("paper")


@pytest.mark.parametrize("asked", [True, False])
def test_downloads_only_when_asked(trainer: Trained, monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    from puat_fast.data import download

    fetched: list[tuple[str, str]] = []
    monkeypatch.setattr(download, "fetch", lambda *what: fetched.append(what))
    config = trained_config(trainer, "--dataset", "svhn", "--data-dir", "d", *["--download"] * asked)
    assert fetched == [("svhn", "d")] * asked
    assert config == Config.preset("paper", dataset="svhn", data_dir="d")  # no option of the run


def test_later_wins_preset_yaml_flags(trainer: Trained, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("dataset: cifar100\nloss: {rae_weight: 3, gamma: 0.5}\naugment.flip: false\n")
    config = trained_config(trainer, "--loss.rae_weight", "4", "--config", str(file), "--data-dir", "/data")
    expected = Config.preset(
        "paper", dataset="cifar100", data_dir="/data", loss={"rae_weight": 4, "gamma": 0.5}, augment={"flip": False}
    )
    assert config == expected
    assert config.loss.consistency_weight == 500  # of the preset's section for cifar100, which the YAML file names


def test_preset_dataset_and_method_of_the_flags_beat_those_of_the_file(trainer: Trained, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("{preset: paper, dataset: cifar100, method: puat}")
    argv = ("-c", str(file), "--preset=official-v1", "--dataset", "cifar10", "--method", "regular", "--data-dir", "d")
    expected = Config.preset("official-v1", dataset="cifar10", method="regular", data_dir="d")
    assert trained_config(trainer, *argv) == expected


@pytest.mark.parametrize("flag, text, key, value", [
    ("--attack.eps", "8/255", "attack.eps", 8 / 255), ("--loss.rae-weight", "6", "loss.rae_weight", 6.0),
    ("--gan.lr", "1e-4", "gan.lr", 1e-4), ("--uae.project_eps", "null", "uae.project_eps", None),
    ("--augment.flip", "false", "augment.flip", False), ("--data_dir", "123", "data_dir", "123"),
    ("--out", "null", "out", None), ("--out", "no", "out", "no"), ("--schedule.steps-per-epoch", "7",
    "schedule.steps_per_epoch", 7), ("--gan.betas", "[0.5,0.9]", "gan.betas", (0.5, 0.9)),
    ("--data.mean", "[1/2, 0.5, 0.5]", "data.mean", (0.5, 0.5, 0.5)), ("--rae.init", "uniform", "rae.init", "uniform"),
])  # fmt: skip
def test_texts_become_values(trainer: Trained, flag: str, text: str, key: str, value: Any) -> None:
    assert trained_config(trainer, flag, text).get(key) == value
    assert trained_config(trainer, f"{flag}={text}").get(key) == value


@pytest.mark.parametrize("argv, says", [
    (["--los.gamma", "1"], "--los.gamma: no such option; did you mean --loss.gamma?"),
    (["--eps", "1"], "--eps: no such option; did you mean --attack.eps?"),
    (["--data-dri=x"], "--data-dri: no such option; did you mean --data-dir?"),
    (["--preset", "papr"], "preset: 'papr' is not one of paper, official-v1; did you mean paper?"),
    (["--rae.init", "gaus"], "rae.init: 'gaus' is not one of gauss, uniform; did you mean gauss?"),
    (["--loss.gamma", "much"], "loss.gamma: 'much' is not a number such as 0.1 or 8/255"),
    (["--loss.gamma", "[1"], "loss.gamma: '[1' is not a number"),
    (["--augment.flip", "3"], "augment.flip: 3 is not true or false"),
    (["--attack.eps", "8/0"], "attack.eps: '8/0' is not a number"),
    (["--attack.eps", "8"], "attack.eps: 8 is out of range"),
    (["--loss.gamma"], "--loss.gamma: expected one argument"),
    (["--config", "/no/such.yaml"], "/no/such.yaml: cannot be read"),
    (["--dataset", "cifar10"], "data_dir: cifar10 needs --data-dir"),
    (["--resume", "/no/run"], "resume: /no/run holds no run; accepted: auto, or a run directory"),
    (["extra"], "unrecognized arguments: extra"),
])  # fmt: skip
def test_wrong_options_are_told_in_one_line(
    trainer: Trained, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    assert says in error_of(capsys, "train", *argv)
    assert trainer.config is None


def test_unknown_key_in_the_yaml_file(trainer: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.yaml").write_text("loss: {gama: 1}")
    says = error_of(capsys, "train", "--config", str(tmp_path / "my.yaml"))
    assert "loss.gama: no such option; did you mean loss.gamma?" in says


@pytest.mark.parametrize("text, says", [
    ("resume: auto", "resume: no such option"), ("config: x", "config: no such option"),
    ("loss: 3", "loss: is a group of options, not 3"), ("attack: {eps: true}", "attack.eps: True is not a number"),
    ("out: 5", "out: 5 is not a text"), ("gan: {betas: [1]}", "gan.betas: [1] is not a list of 2 numbers"),
    ("schedule: {steps_per_epoch: x}", "schedule.steps_per_epoch: 'x' is not an integer"),
    ("{preset: papr}", "preset: 'papr' is not one of paper, official-v1; did you mean paper?"),
])  # fmt: skip
def test_wrong_values_in_the_yaml_file(
    trainer: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    (tmp_path / "my.yaml").write_text(text)
    assert says in error_of(capsys, "train", "--config", str(tmp_path / "my.yaml"))
    assert trainer.config is None


def test_fractions_nulls_and_empty_groups_in_the_yaml_file(trainer: Trained, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("attack: {eps: 4/255}\nuae: {project_eps: null}\nloss:\n  # gamma: 1\ndata.std: [1/2, 1, 1.5]\n")
    config = trained_config(trainer, "--dataset", "cifar100", "--data-dir", "d", "-c", str(file))
    assert (config.attack.eps, config.uae.project_eps, config.data.std) == (4 / 255, None, (0.5, 1.0, 1.5))
    assert config.loss == Config.preset("paper", dataset="cifar100").loss


def test_verb_is_needed_and_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert "VERB" in error_of(capsys)
    assert "'trian'" in error_of(capsys, "trian")


def test_print_config_is_what_train_would_use(capsys: pytest.CaptureFixture[str], trainer: Trained) -> None:
    argv = ["--dataset", "cifar100", "--seed", "3", "--print-config"]
    assert cli.main(["train", *argv]) == 0
    printed = Config.from_dict(yaml.safe_load(capsys.readouterr().out))
    assert printed == Config.preset("paper", dataset="cifar100", seed=3)
    assert trainer.config is None


def test_every_option_is_in_the_help_with_its_comment(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for name, hint in typing.get_type_hints(Config).items():
        inner = [f"{name}.{field.name}" for field in dataclasses.fields(hint)] if dataclasses.is_dataclass(hint) else []
        for key in inner or [name.replace("_", "-")]:
            told = re.search(rf"--{re.escape(key)} \S+ (.+?) \(default: ", words)
            assert told and "--" not in told[1], f"{key}: no comment beside it"
    assert "weight of the D term (default: 0.03)" in words
    assert "loss: Weights of the C loss" in words
    assert "--attack.eps X" in words and "(default: 8/255)" in words
    assert "--rae.source mixed|labelled" in words
    assert cli.main(["train", "--help", "--dataset=cifar100"]) == 0
    assert "consistency term (default: 500)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("argv, code", [
    (["--help"], 0), (["train", "--help"], 0), (["eval", "--help"], 0), (["info", "--help"], 0), (["--version"], 0),
    (["train", "--print-config"], 0), (["train", "--loss.gama", "1"], 2), (["train", "--preset", "x"], 2),
    (["train", "--attack.eps", "x"], 2), (["eval", "runs/a", "--attacks", "x"], 2), ([], 2),
    (["bench", "--help"], 0), (["bench"], 2), (["bench", "nothing"], 2),
    (["export", "--help"], 0), (["export", "runs/a", "--format", "x"], 2),
    (["export", "/no/run", "--format", "onnx"], 1),
])  # fmt: skip
def test_help_and_errors_come_without_torch(argv: list[str], code: int) -> None:
    script = "import sys; from puat_fast.cli import main; code = main(); print('torch' in sys.modules); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (code, "False"), done.stderr


# resume


def test_resume_auto_is_the_trainers(trainer: Trained) -> None:
    assert trained_config(trainer, "--resume", "auto", "--out", "a").out == "a"
    assert trainer.resume == "auto"


def test_resume_of_a_directory_takes_its_options(
    trainer: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    kept = Config.preset("official-v1", dataset="cifar10", data_dir="d", loss={"gamma": 0.7}, out="where/it/was")
    (run / "config.yaml").write_text(yaml.safe_dump(kept.to_dict()))
    config = trained_config(trainer, "--resume", str(run), "--log.interval", "3")
    expected = dataclasses.replace(kept, out=str(run), log=dataclasses.replace(kept.log, interval=3))
    assert config == expected
    assert trainer.resume == str(run)
    assert trained_config(trainer, "--resume", str(run), "--out", f"{run}/").out == f"{run}/"
    assert "leave out --out" in error_of(capsys, "train", "--resume", str(run), "--out", "other")


# how train ends


def test_train_shows_accuracies_and_files(trainer: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    (trainer.path / "samples").mkdir(parents=True)
    for name in ("samples/stage2-003.png", "curves.png", "classifier.safetensors"):
        (trainer.path / name).touch()
    assert cli.main(["train"]) == 0
    out = capsys.readouterr().out
    assert "91.23" in out and "pgd-8" in out and "50.00" in out
    assert [Path(line).name for line in out.splitlines()[-3:]] == [
        "stage2-003.png", "curves.png", "classifier.safetensors",
    ]  # fmt: skip


class DataError(ValueError):
    pass


@pytest.mark.parametrize("error, code, says", [
    (RunError("runs/a: holds a run already"), 1, "error: runs/a: holds a run already"),
    (NonFiniteError("phase C, term sup,\nstep 7"), 1, "error: phase C, term sup, step 7"),
    (FileNotFoundError(2, "No such file or directory", "x.npz"), 1, "error: x.npz: No such file or directory"),
    (DataError("data_batch_1: truncated"), 1, "error: data_batch_1: truncated"),
    (ValueError("n_labelled: 3 is not a multiple of 10"), 2, "error: n_labelled: 3 is not a multiple of 10"),
    (KeyboardInterrupt("interrupted, saved; --resume auto goes on"), 130, "interrupted, saved; --resume auto goes on"),
    (KeyboardInterrupt(), 130, "interrupted"),
])  # fmt: skip
def test_exit_codes(
    trainer: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    error: BaseException, code: int, says: str,
) -> None:  # fmt: skip
    def fail() -> None:
        raise error

    fake(monkeypatch, "puat_fast.data.formats", DataError=DataError)
    trainer.act = fail
    assert error_of(capsys, "train", code=code) == f"puat-fast: {says}\n"
    assert cli.main(["train", "--debug"]) == code
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith(f"puat-fast: {says}\n")


def test_mistakes_of_ours_are_not_hidden(trainer: Trained) -> None:
    def fail() -> None:
        raise RuntimeError("shapes do not match")

    trainer.act = fail
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main(["train"])


# generate, info


def test_generate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got: list[Any] = []
    fake(monkeypatch, "puat_fast.evaluation.generate", generate_run=lambda *given: got.extend(given))
    grid = tmp_path / "grid.png"
    assert cli.main(["generate", str(tmp_path), "--grid", str(grid), "--per-class", "3"]) == 0
    assert got == [tmp_path, grid, 3, 0, "auto"]
    assert capsys.readouterr().out == f"{grid}\n"
    assert "--grid" in error_of(capsys, "generate", str(tmp_path))
    assert "does not end in .png" in error_of(capsys, "generate", str(tmp_path), "--grid", str(tmp_path / "a.jpg"))
    assert "no such run" in error_of(capsys, "generate", "/no/run", "--grid", str(grid), code=1)


def test_info_shows_and_writes_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json", str(tmp_path / "info.json")]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "info.json").read_text())
    for key in found:
        assert key == "fast_paths" or f"{key}:" in out
    for name, path in found["fast_paths"].items():
        assert name in out and path["why"] and isinstance(path["on"], bool)


def test_reader_of_a_pipe_may_leave() -> None:
    script = "import sys; from puat_fast.cli import main; sys.exit(main())"
    command = f"{sys.executable} -c '{script}' train --print-config | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
