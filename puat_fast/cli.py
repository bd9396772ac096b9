"""The command line: `puat-fast train | eval | generate | export | data | bench | info`.

torch is imported by what needs it, after all options are known to be good.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puat_fast import __version__, bench, data_verbs, eval_verb, export_verb, files, info
from puat_fast.config import Config, ConfigError
from puat_fast.options import ConfigParser, parse_options
from puat_fast.runlog import RunError
from puat_fast.terminal import (
    DEBUG,
    Formatter,
    Parser,
    add_device,
    add_json,
    add_verb,
    at_least,
    check_target,
    spelled,
    table,
    write_json,
)  # fmt: skip

TRAIN = "train a classifier; without options: the embedded digits"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: done. 1: failed (a run that cannot be started, a broken or missing file, a loss that is not finite).
    2: wrong options. 130: interrupted, and saved.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _train(argv[1:]) if argv[:1] == ["train"] else _run_verb(argv)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # --help, --version
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        return _fail(argv, str(stop) or "interrupted", 130)
    except BrokenPipeError:  # `puat-fast info | head`: the reader has left, so there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        code = _exit_code(error)
        if not code:
            raise
        if _out_of_memory(error):
            return _fail(argv, "out of memory; smaller networks or batches need less", code)
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        return _fail(argv, " ".join(text.split()), code)


def _exit_code(error: Exception) -> int:
    """1 for a failure, 2 for a wrong option, 0 for a mistake of ours, whose traceback is to be seen."""
    # A DataError is a ValueError, but the file is at fault, not the option that names it.
    late = _loaded("puat_fast.data.formats", "DataError") + _loaded("puat_fast.engine.trainer", "NonFiniteError")
    late += _loaded("puat_fast.engine.distributed", "RankError")
    if isinstance(error, (RunError, OSError, *late)) or _out_of_memory(error):
        return 1
    return 2 if isinstance(error, ValueError) else 0


def _out_of_memory(error: Exception) -> bool:
    # torch.OutOfMemoryError is CUDA's; the CPU allocator raises a plain RuntimeError
    kinds = _loaded("torch", "OutOfMemoryError")
    return isinstance(error, (MemoryError, *kinds)) or "can't allocate memory" in str(error)


def _loaded(module: str, name: str) -> tuple[type[Exception], ...]:
    # An error class of a module that is slow to import: it can only have been raised where that is loaded already.
    found = getattr(sys.modules.get(module), name, None)
    return () if found is None else (found,)


def _fail(argv: Sequence[str], message: str, code: int) -> int:
    if "--debug" in argv:
        traceback.print_exc()
    rank = int(os.environ.get("RANK", "0")) if os.environ.get("WORLD_SIZE", "1") != "1" else 0
    if rank and code == 130:  # all ranks stop together, and the first tells it
        return code
    whose = f"rank {rank}: " if rank else ""
    print(f"puat-fast: {'error: ' if code != 130 else ''}{whose}{message}", file=sys.stderr)
    return code


def _run_verb(argv: Sequence[str]) -> int:
    """Run any verb but train, which has a parser of its own; also --help, --version, and no verb."""
    parser = Parser(
        prog="puat-fast",
        description="Train image classifiers that withstand restricted and unrestricted adversarial examples (PUAT).",
        epilog="`puat-fast VERB --help` tells the options of a verb.\n"
        "Exit codes: 0 done, 1 failed, 2 wrong options, 130 interrupted and saved.",
    )
    parser.add_argument("--version", action="version", version=f"puat-fast {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True, title="verbs")
    verbs.add_parser("train", help=TRAIN)
    for add in (eval_verb.add, _add_generate, export_verb.add, data_verbs.add, _add_bench, _add_info):
        add(verbs)
    if argv[:1] != ["bench"]:  # whose options are its scripts'
        argv = spelled(argv, parser)
    options = parser.parse_args(argv)
    code: int = options.run(options)
    return code


# train


def _train_parser(defaults: Config) -> ConfigParser:
    parser = ConfigParser(
        defaults, prog="puat-fast train", usage="puat-fast train [--config FILE] [options]", description=TRAIN,
        formatter_class=Formatter,
        epilog="Every option is also a key of the YAML file; - and _ are alike in flags. Later wins: the preset with\n"
        "its sections for dataset and method, the YAML file, the flags. The defaults above are those of the preset,\n"
        "dataset and method that you named. Numbers may be written as fractions: 8/255.",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help=DEBUG)
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file of options")
    parser.add_argument(
        "--resume", metavar="auto|DIR", help="auto: continue the run at --out, if there is one; DIR: continue that run"
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help="get the dataset's published archive into --data-dir, if it is not there",
    )
    parser.add_argument("--print-config", action="store_true", help="print all options as YAML, and exit")
    return parser


def _train(argv: Sequence[str]) -> int:
    config, options = parse_options(spelled(argv, _train_parser(Config())), _train_parser)
    if options.print_config:
        print(files.dump_yaml(config.to_dict()), end="")
        return 0
    if config.dataset != "digits" and config.data_dir is None:
        raise ConfigError(f"data_dir: {config.dataset} needs --data-dir, the folder that holds its files or archive")
    from puat_fast.engine import distributed

    with distributed.process_group(config.device):
        if options.download:
            distributed.on_main(lambda: _fetch(config))
        result = _trainer(config, options.resume).fit()
        if not distributed.is_main():
            return 0
    if config.method != "acgan":
        rows = [[name, f"{100 * accuracy:.2f}"] for name, accuracy in result.summary.items()]
        table(f"{config.dataset} test images, teacher C'", ["attack", "accuracy %"], rows)
    grids = sorted((result.path / "samples").glob("*.png"), key=lambda grid: grid.stat().st_mtime)
    for file in (
        *grids[-1:],
        result.path / "curves.png",
        result.path / "classifier.safetensors",
        result.path / "acgan.safetensors",
    ):
        if file.exists():
            print(file)
    return 0


def _trainer(config: Config, resume: str | None) -> Any:
    if config.method == "acgan":
        from puat_fast.engine.acgan import AcganTrainer

        return AcganTrainer(config, resume)
    from puat_fast.engine.trainer import Trainer

    return Trainer(config, resume=resume)


def _fetch(config: Config) -> None:
    from puat_fast.data.download import fetch

    fetch(config.dataset, config.data_dir or ".")


# generate, bench, info


def _add_generate(verbs: Any) -> None:
    parser = add_verb(
        verbs, "generate", _generate, "show what G draws, and what C says of it", "RUN --grid FILE.png [options]"
    )
    parser.add_argument("path", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--grid", type=Path, required=True, metavar="FILE.png", help="where the picture goes")
    parser.add_argument(
        "--per-class", type=at_least(1), default=1, metavar="N", help="images of each class (default: %(default)s)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of z (default: %(default)s)")
    add_device(parser)


def _generate(options: argparse.Namespace) -> int:
    check_target(options.grid)
    if options.grid.suffix != ".png":
        raise ConfigError(f"grid: {options.grid} does not end in .png")
    if not options.path.is_dir():
        raise FileNotFoundError(f"{options.path}: no such run directory")
    from puat_fast.evaluation.generate import generate_run

    generate_run(options.path, options.grid, options.per_class, options.seed, options.device)
    print(options.grid)
    return 0


def _add_bench(verbs: Any) -> None:
    text = "measure how fast this machine is at what training does"
    parser = add_verb(verbs, "bench", _bench, text, "NAME [options of NAME]", bench.HELP)
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(bench.SCRIPTS)}: see below")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="those of NAME")


def _bench(options: argparse.Namespace) -> int:
    bench.run(options.name, [option for option in options.options if option != "--debug"])
    return 0


def _add_info(verbs: Any) -> None:
    text = "what was built and found, and why a fast path is off"
    add_json(add_verb(verbs, "info", _info, text, "[options]", info.KEYS))


def _info(options: argparse.Namespace) -> int:
    check_target(options.json)
    found = info.collect()
    paths = found["fast_paths"]
    print(files.dump_yaml({key: value for key, value in found.items() if key != "fast_paths"}), end="")
    rows = [[name, "on" if path["on"] else "off", path["why"]] for name, path in paths.items()]
    table("", ["fast path", "", "why"], rows)
    write_json(options.json, found)
    return 0
