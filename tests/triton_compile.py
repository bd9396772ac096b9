"""Compiles what a Triton launcher launches, for a GPU that is not there, and reads what each kernel needs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one block may have
ARCHS = sorted(SHARED_MEMORY)


@dataclass(frozen=True)
class Compiled:
    """What one launch needs: bytes of stack and of local memory (spills), shared memory, registers a thread."""

    name: str
    stack: int
    local: int
    shared: int
    registers: int
    ptx: str


class _Driver:
    """Stands in for Triton's CUDA driver where there is none: it names the GPU to compile for."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.arch, self.target = arch, GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextmanager
def compiling(arch: int) -> Iterator[list[Compiled]]:
    """Inside, every launch, of CPU tensors, is compiled for sm_<arch> and noted in the list instead of being run."""
    import triton
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    done: list[Compiled] = []
    run, active = JITFunction.run, driver._active  # reset_active() would look for a GPU

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        done.append(_resources(self.__name__, kernel, triton))
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_Driver(arch))
    try:
        yield done
    finally:
        JITFunction.run = run
        driver._active = active


def _resources(name: str, kernel: Any, triton: ModuleType) -> Compiled:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = Path(next(path for file, path in kernel.metadata_group.items() if file.endswith(".cubin")))
    text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Compiled(name, used["STACK"], used["LOCAL"], kernel.metadata.shared, used["REG"], kernel.asm["ptx"])


def kernels_of(module: ModuleType) -> set[str]:
    """Names of the kernels, `..._kernel`, that a module of puat_fast.kernels defines."""
    return {
        name for name, value in vars(module).items() if name.endswith("_kernel") and value.__module__ == module.__name__
    }


def assert_fits(done: list[Compiled], arch: int) -> None:
    """No kernel spills registers, or asks for more shared memory than a block may have."""
    assert done
    for kernel in done:
        assert (kernel.stack, kernel.local) == (0, 0), kernel
        assert kernel.shared <= SHARED_MEMORY[arch], kernel
