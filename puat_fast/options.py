"""The options of `puat-fast train`: flags and YAML file, parsed and typed by jsonargparse from the fields of Config.

Config is the place of what jsonargparse does not know: the presets, the ranges, and how a mistake is told.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import re
import tokenize
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
import yaml
from jsonargparse.typing import register_type

from puat_fast import config as config_module
from puat_fast.config import Config, ConfigError, merge, number, read_yaml


class _Number:
    """Stands for float, which jsonargparse would not let be written as 8/255."""


def _read_number(value: Any) -> float:
    try:
        return number(value)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"Got value: {value}") from error  # jsonargparse's way to tell it, which `error` reads


register_type(_Number, float, _read_number, type_check=lambda value, _: type(value) is float)


class ConfigParser(jsonargparse.ArgumentParser):
    """A parser with a flag for every option of Config. Its errors are ConfigErrors, in one line."""

    def __init__(self, defaults: Config, **kwargs: Any) -> None:
        super().__init__(print_config=None, allow_abbrev=False, **kwargs)
        comments = _comments()
        group = self.add_argument_group("run")
        # The same types, but for the numbers: where the annotations say float, _Number is found.
        for name, hint in typing.get_type_hints(Config, localns={"float": _Number}).items():
            if dataclasses.is_dataclass(hint):
                cls = typing.cast(type, hint)
                inner = self.add_argument_group(f"{name}: {inspect.getdoc(cls)}".rstrip("."))
                for key, kind in typing.get_type_hints(cls, localns={"float": _Number}).items():
                    _add_flag(inner, f"{name}.{key}", kind, defaults, comments[f"{cls.__name__}.{key}"])
            else:
                _add_flag(group, name, hint, defaults, comments[f"Config.{name}"])

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises ConfigError, in Config's words where it finds the mistake too: they tell what is accepted."""
        text = " ".join(message.split())
        if found := re.match(r"""(?:Parser key|Option) ["'](?P<key>\S+)["'](?:.* value: (?P<value>.*))?""", text):
            value = found["value"]
            with contextlib.suppress(yaml.YAMLError):
                value = value and yaml.safe_load(value)
            Config.from_dict({found["key"]: value})
        raise ConfigError(text)


def parse_options(
    argv: Sequence[str], make_parser: Callable[[Config], ConfigParser]
) -> tuple[Config, jsonargparse.Namespace]:
    """The Config of a `train` command, and all that its parser found. Later wins: preset, YAML file, flags.

    `make_parser` makes the parser, with flags of its own: `config`, the YAML file, and `resume`: "auto" is the
    Trainer's, a run directory's config.yaml takes the place of the preset. Raises ConfigError.
    """
    asked = [token for token in argv if token not in ("-h", "--help")]  # help comes when its defaults are known
    flags = make_parser(Config()).parse_args(asked, defaults=False).as_dict()
    values: dict[str, Any] = {}
    if flags.get("config"):
        merge(values, read_yaml(flags["config"]))
    file = ConfigParser(Config()).parse_object(values, defaults=False)
    given = file.as_dict() | flags
    parser = make_parser(_base(given))
    options = parser.parse_args(argv, namespace=file)
    names = [field.name for field in dataclasses.fields(Config)]
    return Config.from_dict({name: options.as_dict()[name] for name in names}), options


def _base(given: dict[str, Any]) -> Config:
    """What holds where the user says nothing: the preset, or the options of the run that is continued."""
    resume = given.get("resume")
    if resume is None or resume == "auto":
        plain = Config()
        return Config.from_dict(
            Config.preset_values(*(given.get(key, plain.get(key)) for key in ("preset", "dataset", "method")))
        )
    if not Path(resume, "config.yaml").is_file():
        raise ConfigError(f"resume: {resume} holds no run; accepted: auto, or a run directory")
    out = str(given.get("out", resume))
    if Path(out) != Path(resume):
        raise ConfigError(f"out: {out} is not the run that --resume {resume} continues; leave out --out")
    return dataclasses.replace(Config.load(Path(resume, "config.yaml")), out=out)


def _add_flag(group: argparse._ArgumentGroup, key: str, hint: Any, defaults: Config, comment: str) -> None:
    default = defaults.get(key)
    text = f"{comment} (default: {_show(default)})".replace("%", "%%")
    flag = key if "." in key else key.replace("_", "-")
    group.add_argument(f"--{flag}", type=hint, default=default, metavar=_kind(hint), help=text)


@functools.cache
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
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return f"{_kind(arguments[0])}|null"
    if typing.get_origin(hint) is Literal:
        return "|".join(arguments)
    if typing.get_origin(hint) is tuple:
        return f"[{','.join(map(_kind, arguments))}]"
    return {bool: "true|false", int: "N", _Number: "X"}.get(hint, "TEXT")


def _show(value: Any) -> str:
    """A default, as the user would write it."""
    if isinstance(value, tuple):
        return f"[{','.join(map(_show, value))}]"
    if isinstance(value, float):
        return f"{255 * value:g}/255" if len(repr(value)) > 8 and (255 * value).is_integer() else f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
