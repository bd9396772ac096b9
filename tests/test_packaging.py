"""What pip builds and installs: the wheel's contents, and imports that do not depend on the working directory."""

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD_TOOLS = ("scikit-build-core", "pybind11", "pip")


def python(*arguments: object, **options: object) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [name for name in BUILD_TOOLS if not any(importlib.metadata.distributions(name=name))]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder]
    python("-m", "pip", "wheel", *options, ROOT, env=os.environ | {"PUAT_CUDA": "OFF"})
    (built,) = folder.glob("puat_fast-*.whl")
    return built


@pytest.fixture(scope="session")
def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_top_level_is_the_package_alone(names: set[str]) -> None:
    top = {name.split("/")[0] for name in names}
    version = importlib.metadata.version("puat-fast")
    assert top == {"puat_fast", f"puat_fast-{version}.dist-info"}


def test_everything_of_the_package_is_in(names: set[str]) -> None:
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "puat_fast").rglob("*.py")}
    presets = {p.relative_to(ROOT).as_posix() for p in (ROOT / "puat_fast" / "presets").glob("*.yaml")}
    kernels = {f"puat_fast/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "kernels").rglob("*.py")}
    scripts = {f"puat_fast/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "benchmarks").rglob("*.py")}
    assert presets and kernels
    paper = "puat_fast/evaluation/paper/tables_3_to_7.csv"
    assert package | presets | kernels | {"puat_fast/py.typed", paper} <= names
    assert scripts - {"puat_fast/benchmarks/check_device.py"} == {n for n in names if "/benchmarks/" in n}
    assert [name for name in names if name.startswith("puat_fast/_C.")]


def test_nothing_else_is_in(names: set[str]) -> None:
    suffixes = {Path(name).suffix for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert not suffixes & {".cpp", ".h", ".cu", ".cuh", ".pyc"}


def test_bench_runs_from_the_installed_package(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (  # -S: without the import hook of an editable install
        f"import sys; sys.path[:0] = {[str(tmp_path), *sys.path]!r}; from puat_fast import bench, cli;"
        "print(bench.folder()); sys.exit(cli.main(['bench', 'conv', '--device', 'cpu', '--tiny', '--rounds', '1']))"
    )
    out = python("-S", "-c", code, cwd=tmp_path)
    assert out.startswith(str(tmp_path / "puat_fast" / "benchmarks"))
    assert (tmp_path / "runs" / "bench" / "conv.json").exists()


def test_cpu_build_says_so(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (extension,) = (tmp_path / "puat_fast").glob("_C.*")
    code = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('puat_fast._C', sys.argv[1]);"
        "m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m);"
        "print(m.build_info()['cuda'], m.cuda_status(), hasattr(m, 'pgd_step_cuda'), 'torch' in sys.modules)"
    )
    assert python("-c", code, extension).strip() == "False (0, 'built without CUDA') False False"


def test_wrong_switch_is_named(wheel: Path, tmp_path: Path) -> None:
    options = ["--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path]
    command = [sys.executable, "-m", "pip", "wheel", *options, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PUAT_CUDA": "MAYBE"})
    assert done.returncode != 0
    assert "PUAT_CUDA: expected AUTO, ON or OFF, got 'MAYBE'" in done.stdout + done.stderr


@pytest.mark.parametrize("folder", [ROOT, ROOT.parent], ids=["in the source folder", "elsewhere"])
def test_imports_from_any_folder(folder: Path) -> None:
    code = "import puat_fast.ops, puat_fast.kernels; from puat_fast import _C; print(_C.build_info()['version'])"
    assert python("-c", code, cwd=folder).strip() == importlib.metadata.version("puat-fast")


def test_cure_is_named_where_the_extension_is_missing() -> None:
    # -S: without site-packages, so neither the installed package nor an editable install's import hook is there.
    code = (
        "import runpy, sys, types; package = sys.modules['puat_fast'] = types.ModuleType('puat_fast');"
        "package.__path__ = []; runpy.run_path(sys.argv[1])"
    )
    native = ROOT / "puat_fast" / "ops" / "_native.py"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, native], capture_output=True, text=True)
    assert (
        done.stderr.strip().splitlines()[-1].startswith("ImportError: puat_fast._C is not built: run `pip install .`")
    )
