"""`puat-fast data prepare | verify | info`."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any, get_args

from puat_fast import files, terminal
from puat_fast.config import Config, ConfigError, DatasetName

VERIFY_KEYS = """\
keys of the JSON file:
  dataset, data_dir, good   what was verified, and whether all is well
  files                     list of file, state (ok, missing, truncated, altered, broken; unknown: no checksum of it is
                            published), detail

Exit code 0 where all is well, else 1. A re-encoded copy, as of a mirror in JPEG, is altered: it can be trained on all
the same, and its results are not those of the dataset of that name."""
PREPARE_NOTE = """\
Writes puat-NAME-HASH.npy, N x 3 x 32 x 32 uint8, training images first, and puat-NAME.json with classes, labels, filter
and the sha256 of every file that was read. `train`, `eval` and `data info` take these where --data-dir holds them; the
images are mapped into memory, not read."""


def add(verbs: Any) -> None:
    """The verb `data`."""
    text = "prepare, verify or describe a dataset"
    parser = verbs.add_parser("data", help=text, description=text, usage="puat-fast data prepare|verify|info [options]")
    actions = parser.add_subparsers(metavar="ACTION", required=True, title="actions")
    from puat_fast.data.describe import KEYS

    prepare = _add(actions, "prepare", _prepare, "convert to one file that is mapped into memory", PREPARE_NOTE)
    prepare.add_argument("--out", metavar="DIR", help="where the files go (default: --data-dir)")
    prepare.add_argument(
        "--download", action="store_true", help="get the published archives first, resumed and verified"
    )
    verify = _add(actions, "verify", _verify, "name every missing, truncated or altered file", VERIFY_KEYS)
    terminal.add_json(verify)
    info = _add(actions, "info", _info, "counts, split sizes, mean and standard deviation, a picture", KEYS)
    info.add_argument(
        "--n-labelled", type=terminal.at_least(1), metavar="N", help="labelled images (default: preset's)"
    )
    info.add_argument(
        "--seed", type=terminal.at_least(0), default=1, metavar="N", help="of the split (default: %(default)s)"
    )
    info.add_argument("--grid", type=Path, metavar="FILE.png", help="draw the first images of each class")
    info.add_argument(
        "--per-class", type=terminal.at_least(1), default=10, metavar="N", help="images in it (default: %(default)s)"
    )
    terminal.add_json(info)


def _add(actions: Any, name: str, run: Any, text: str, epilog: str) -> argparse.ArgumentParser:
    parser = terminal.add_verb(actions, name, run, text, "[options]", epilog)
    parser.usage = f"puat-fast data {name} --dataset NAME --data-dir DIR [options]"
    parser.add_argument("--dataset", choices=get_args(DatasetName), required=True)
    parser.add_argument("--data-dir", metavar="DIR", help="folder that holds the dataset's files or archive")
    classes = "of tiny-imagenet and imagenet32: the paper's 10 classes, or all (default: %(default)s)"
    parser.add_argument("--classes", choices=("paper", "all"), default="paper", help=classes)
    return parser


def _prepare(options: argparse.Namespace) -> int:
    from puat_fast.data.formats import prepared, read_dataset
    from puat_fast.data.formats.images import RESIZE

    if options.dataset == "digits":
        raise ConfigError("dataset: digits is embedded, there is nothing to prepare")
    if options.data_dir is None:
        raise ConfigError("data_dir: tell the folder that holds the dataset's files, by --data-dir")
    if options.download:
        from puat_fast.data.download import fetch

        fetch(options.dataset, options.data_dir)
    sources: list[prepared.Source] = []

    def note(path: str, content: bytes) -> None:
        sources.append(prepared.Source(path, len(content), hashlib.sha256(content).hexdigest()))

    dataset = read_dataset(options.dataset, options.data_dir, options.classes, note)
    folder = Path(options.out or options.data_dir).expanduser()
    filter_ = {"classes": options.classes, "resize": RESIZE}
    file = prepared.write(dataset, folder if not folder.is_file() else folder.parent, options.classes, filter_, sources)
    print(f"{len(dataset.train)} training and {len(dataset.test)} test images, {dataset.num_classes} classes")
    print(file.parent / prepared.read_json(file)["images"])
    print(file)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from puat_fast.data.verify import verify

    terminal.check_target(options.json)
    findings = verify(options.dataset, options.data_dir, options.classes)
    good = all(finding.good for finding in findings)
    for finding in findings:  # no table: paths are to be copied whole
        print(f"{finding.state:9} {finding.file}" + (f": {finding.detail}" if finding.detail else ""))
    rows = [vars(finding) for finding in findings]
    result = {"dataset": options.dataset, "data_dir": options.data_dir, "good": good, "files": rows}
    terminal.write_json(options.json, result)
    return 0 if good else 1


def _info(options: argparse.Namespace) -> int:
    from puat_fast.data.describe import describe, grid_images
    from puat_fast.data.formats import load_dataset

    for target in (options.json, options.grid):
        terminal.check_target(target)
    if options.grid is not None and options.grid.suffix != ".png":
        raise ConfigError(f"grid: {options.grid} does not end in .png")
    values = Config.preset_values("paper", options.dataset, "puat") | {"seed": options.seed}
    values["data.classes"] = options.classes
    if options.n_labelled is not None:
        values["data.n_labelled"] = options.n_labelled
    dataset = load_dataset(options.dataset, options.data_dir, options.classes)
    found = describe(dataset, Config.from_dict(values))
    counts = zip(found["class_names"], found["train"]["per_class"], found["test"]["per_class"], strict=True)
    plain = {key: value for key, value in found.items() if key != "class_names"}
    plain |= {part: found[part]["images"] for part in ("train", "test")}
    plain |= {part: " ".join(f"{value:.4f}" for value in found[part]) for part in ("mean", "std")}
    plain["configured"] = {part: " ".join(map(str, values)) for part, values in found["configured"].items()}
    print(files.dump_yaml(plain), end="")
    terminal.table("", ["class", "training images", "test images"], [[name, str(a), str(b)] for name, a, b in counts])
    if options.grid is not None:
        from puat_fast import plots

        images = grid_images(dataset.train, dataset.num_classes, options.per_class)
        rows = [plots.ImageRow(label=name, images=x) for name, x in zip(dataset.class_names, images, strict=True)]
        plots.save_grid(options.grid, rows, f"{dataset.name}: training images")
        print(options.grid)
    terminal.write_json(options.json, found)
    return 0
