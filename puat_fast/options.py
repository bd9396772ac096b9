"""The fields of Config as command line flags: their names and help texts, and what is given, resolved to a Config.

argparse names the flags, and keeps their texts; Config converts, checks and suggests, for flags, YAML and Python
alike. (jsonargparse would convert and check a second time, by other rules: no 8/255, no suggestions, and defaults of
its own between the preset's and the user's.)
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import io
import tokenize
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from puat_fast import config as config_module
from puat_fast.config import Config, ConfigError, merge, read_yaml


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of Config; what the user gives is a list of (dotted key, text) in `given`."""
    comments = _comments()
    _add_flags(parser.add_argument_group("run"), Config, "", comments)
    for name, group in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(group):
            title = f"{name}: {inspect.getdoc(group)}".rstrip(".")
            _add_flags(parser.add_argument_group(title), typing.cast(type, group), f"{name}.", comments)


def resolve_config(given: Sequence[tuple[str, str]], file: Path | None = None, resume: str | None = None) -> Config:
    """The Config of a `train` command: preset, then the YAML file, then the flags. Raises ConfigError.

    Args:
        given: dotted keys and texts of the flags, in the order given
        file: YAML file of options
        resume: "auto" is the Trainer's; a run directory: its config.yaml takes the place of the preset
    """
    user: dict[str, Any] = {} if file is None else read_yaml(file)
    for key, text in given:
        merge(user, {key: _read(key, text)})
    if resume is not None and resume != "auto":
        run = Path(resume)
        if not (run / "config.yaml").is_file():
            raise ConfigError(f"resume: {resume} holds no run; accepted: auto, or a run directory")
        if Path(user.setdefault("out", resume)) != run:
            raise ConfigError(f"out: {user['out']} is not the run that --resume {resume} continues; leave out --out")
        values = read_yaml(run / "config.yaml")
    else:
        plain = Config()
        values = Config.preset_values(*(user.get(key, getattr(plain, key)) for key in ("preset", "dataset", "method")))
    merge(values, user)
    return Config.from_dict(values)


def _add_flags(parser: argparse._ArgumentGroup, cls: type, prefix: str, comments: dict[str, str]) -> None:
    default = cls()
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            continue
        key = prefix + name
        text = f"{comments.get(f'{cls.__name__}.{name}', '')} (default: {_show(getattr(default, name))})".strip()
        # Values stay texts here, beside their keys: what they must be is Config's to say.
        parser.add_argument(
            f"--{key if prefix else key.replace('_', '-')}", dest="given", action="append", default=[],
            type=functools.partial(_pair, key), metavar=_kind(hint), help=text.replace("%", "%%"),
        )  # fmt: skip


def _comments() -> dict[str, str]:
    """The comment beside each field of each class of config.py: {"LossConfig.gamma": "weight of the D term"}."""
    source = inspect.getsource(config_module)
    lines = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return {
        f"{cls.name}.{item.target.id}": lines.get(item.lineno, "")
        for cls in ast.parse(source).body if isinstance(cls, ast.ClassDef)
        for item in cls.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }  # fmt: skip


def _kind(hint: Any) -> str:
    """What an option takes, for --help."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is types.UnionType:
        return f"{_kind(arguments[0])}|null"
    if typing.get_origin(hint) is Literal:
        return "|".join(arguments)
    if typing.get_origin(hint) is tuple:
        return ",".join(_kind(argument) for argument in arguments)
    return {bool: "true|false", int: "N", float: "X"}.get(hint, "TEXT")


def _pair(key: str, text: str) -> tuple[str, str]:
    return key, text


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_show, value))
    if isinstance(value, float):
        return f"{255 * value:g}/255" if len(repr(value)) > 8 and (255 * value).is_integer() else f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _read(key: str, text: str) -> Any:
    """The value that a flag's text stands for, as YAML would read it; texts stay as they are."""
    cls: Any = Config
    *groups, name = key.split(".")
    for group in groups:
        cls = typing.get_type_hints(cls)[group]
    kind = _kind(typing.get_type_hints(cls)[name])
    if kind.endswith("|null") and text == "null":
        return None
    if "," in kind and not text.startswith("["):
        text = f"[{text}]"
    try:
        return yaml.safe_load(text) if kind.startswith(("X", "N", "true|false")) else text
    except yaml.YAMLError:
        raise ConfigError(f"{key}: {text!r} cannot be read") from None
