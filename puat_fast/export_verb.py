"""`puat-fast export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from puat_fast import terminal
from puat_fast.config import DatasetName

FORMATS = ("safetensors", "onnx", "robustbench")
NOTE = """\
formats:
  safetensors  weights, with what rebuilds the network in the metadata: the file that a run writes
  onnx         one file: images (N x 3 x 32 x 32, float, 0 to 1) to logits, mean and std in the graph, opset 18;
               needs pip install "puat-fast[onnx]"
  robustbench  a folder: classifier.pt, the state dict of RobustBench's DMWideResNet; model_info.json, with the
               accuracies of the run's eval/*.json; README.md, whose lines load it there

RUN_OR_FILE is what eval takes too: a run directory, a .safetensors file, a torch file that holds a state dict of our
WRN (RobustBench's and DMAT's names, in any wrapper), or a folder of --format robustbench. Code in a file is not run."""


def add(verbs: Any) -> None:
    """The verb `export`."""
    text = "write a classifier as safetensors, as ONNX, or for RobustBench"
    parser = terminal.add_verb(verbs, "export", _export, text, "RUN_OR_FILE --format NAME [options]", NOTE)
    parser.add_argument("path", metavar="RUN_OR_FILE", type=Path, help="run directory, file or folder, see below")
    parser.add_argument("--format", choices=FORMATS, required=True, help="see below")
    default = "RUN/export/classifier.FORMAT, or FILE.FORMAT; of robustbench the folder classifier-robustbench"
    parser.add_argument("--out", type=Path, metavar="PATH", help=f"where it goes (default: {default})")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    terminal.add_normalisation(parser)
    parser.add_argument("--dataset", choices=get_args(DatasetName), help="its name, where the file does not tell")


def _export(options: argparse.Namespace) -> int:
    if options.out is not None and not options.out.is_dir():
        terminal.check_target(options.out)
    if not options.path.exists():
        raise FileNotFoundError(f"{options.path}: no such run directory or file")
    from puat_fast.export import export

    told = {"mean": options.mean, "std": options.std, "dataset": options.dataset}
    print(export(options.path, options.format, options.out, force=options.force, **told))
    return 0
