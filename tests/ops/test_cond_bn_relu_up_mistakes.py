import math

import pytest
import torch

from puat_fast.ops import cond_bn_relu_up

ZEROS, TABLE = torch.zeros(3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 3, 2, 2).half()}, "x: expected dtype torch.float32 or .*, got torch.float16"),
        ({"x": torch.zeros(4, 3, 2)}, r"x: expected shape N x C x H x W, .*, got \(4, 3, 2\)"),
        ({"x": torch.zeros(4, 3, 0, 2)}, r"x: expected shape N x C x H x W, .*, got \(4, 3, 0, 2\)"),
        ({"x": torch.zeros(1, 3, 1, 1)}, r"x: expected more than 1 value per channel when training, got .*\(1, 3, 1"),
        ({"x": torch.zeros(4, 3, 2, 2).double()}, "gain: expected dtype torch.float64, got torch.float32"),
        ({"x": torch.zeros(4, 3, 2, 2, device="meta")}, r"y: expected device meta \(as x\), got cpu"),
        ({"y": torch.zeros(3, dtype=torch.int64)}, r"y: expected shape \(4,\), got \(3,\)"),
        ({"y": torch.zeros(4, dtype=torch.int32)}, "y: expected dtype torch.int64, got torch.int32"),
        ({"y": torch.zeros(4, dtype=torch.int64, device="meta")}, r"y: expected device cpu \(as x\), got meta"),
        ({"gain": torch.zeros(3)}, r"gain: expected shape K x 3, K > 0, got \(3,\)"),
        ({"gain": torch.zeros(0, 3)}, r"gain: expected shape K x 3, K > 0, got \(0, 3\)"),
        ({"gain": torch.zeros(2, 4)}, r"gain: expected shape \(2, 3\), got \(2, 4\)"),
        ({"gain": TABLE.bfloat16()}, "gain: expected dtype torch.float32, got torch.bfloat16"),
        ({"gain": TABLE.to("meta")}, r"gain: expected device cpu \(as x\), got meta"),
        ({"bias": torch.zeros(3, 3)}, r"bias: expected shape \(2, 3\), got \(3, 3\)"),
        ({"bias": TABLE.double()}, "bias: expected dtype torch.float32, got torch.float64"),
        ({"bias": TABLE.to("meta")}, r"bias: expected device cpu \(as x\), got meta"),
        ({"running_mean": torch.zeros(4)}, r"running_mean: expected shape \(3,\), got \(4,\)"),
        ({"running_mean": ZEROS.bfloat16()}, "running_mean: expected dtype torch.float32, got torch.bfloat16"),
        ({"running_mean": ZEROS.to("meta")}, r"running_mean: expected device cpu \(as x\), got meta"),
        ({"running_var": torch.zeros(1, 3)}, r"running_var: expected shape \(3,\), got \(1, 3\)"),
        ({"running_var": ZEROS.double()}, "running_var: expected dtype torch.float32, got torch.float64"),
        ({"running_var": ZEROS.to("meta")}, r"running_var: expected device cpu \(as x\), got meta"),
        ({"running_mean": torch.zeros(6)[::2]}, r"running_mean: expected a contiguous tensor, got strides \(2,\)"),
        ({"running_var": torch.zeros(6)[::2]}, r"running_var: expected a contiguous tensor, got strides \(2,\)"),
        ({"momentum": 1.5}, r"momentum: expected a number in \[0, 1\], got 1.5"),
        ({"momentum": math.nan}, "momentum: .*got nan"),
        ({"momentum": ZEROS}, "momentum: expected a 0-d floating tensor, got 1-d torch.float32"),
        ({"momentum": torch.tensor(1)}, "momentum: expected a 0-d floating tensor, got 0-d torch.int64"),
        ({"momentum": torch.tensor(1.0, device="meta")}, r"momentum: expected device cpu \(as x\), got meta"),
        ({"eps": 0.0}, "eps: expected a finite number > 0, got 0.0"),
        ({"eps": math.inf}, "eps: .*got inf"),
        ({"stats": "defer"}, "stats: expected 'update' or 'leave', got 'defer'"),
        ({"impl": "triton"}, "impl: expected 'auto' or 'reference', got 'triton'"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    arguments = {
        "x": torch.zeros(4, 3, 2, 2), "y": torch.zeros(4, dtype=torch.int64), "gain": TABLE, "bias": TABLE,
        "running_mean": ZEROS, "running_var": ZEROS, "training": True, "upsample": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        cond_bn_relu_up(**(arguments | change))
