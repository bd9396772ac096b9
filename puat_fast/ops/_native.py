"""The compiled extension `_C`, also where the source folder hides the installed package.

With the repository root as working directory, `python -m pytest` and `python -c` import `puat_fast` from the source
folder, which holds neither `_C` nor `kernels`: both come into being when the package is installed. So the installed
package's folder is appended to the search path of ours. What the source folder has is still found there first, and an
editable install, which resolves both by itself, is left alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from types import ModuleType

import puat_fast

CURE = "puat_fast._C is not built: run `pip install .` (or `pip install -e .`) in the repository root"


def _append_installed_package() -> None:
    try:
        installed = importlib.metadata.distribution("puat-fast")
    except importlib.metadata.PackageNotFoundError:
        return
    for file in installed.files or []:
        if file.parent.name == "puat_fast" and file.name.startswith("_C."):
            puat_fast.__path__.append(str(installed.locate_file(file.parent)))


def _load_extension() -> ModuleType:
    if importlib.util.find_spec("puat_fast._C") is None:
        _append_installed_package()
    try:
        return importlib.import_module("puat_fast._C")
    except ModuleNotFoundError as error:
        raise ImportError(CURE) from error


_C = _load_extension()
