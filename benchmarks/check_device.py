"""Say what was built and found, and fail where that is not what the named device needs: check_device.py cuda|cpu.

GPU tests skip themselves where there is no GPU: on a machine that is to accept GPU code, that must not pass.
"""

import sys

import torch

from puat_fast.ops._native import _C


def main() -> None:
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}; _C: {_C.build_info()}, {_C.cuda_status()}")
    if torch.device(sys.argv[1]).type == "cpu":
        return
    if not torch.cuda.is_available():
        sys.exit("torch finds no usable GPU")
    if not hasattr(_C, "pgd_step_cuda"):
        sys.exit("puat_fast._C is built without CUDA kernels")
    print(torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
