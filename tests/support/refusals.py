"""What every loss refuses, and the form of the sentence that says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mixce_kernels.weightings import Power

nan = float("nan")
inf = float("inf")


class Quantized(Tensor):
    """A tensor that stands for float32 numbers and holds others, as those of torchao do."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Quantized:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32, requires_grad=False)

    def __init__(self, values: Tensor) -> None:
        self.held = values.to(torch.int8)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> Quantized:
        return Quantized(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{function} is not implemented")


OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "reduction": ({"reduction": "average"}, ValueError, "expected reduction 'none', 'mean' or 'sum', got 'average'"),
    "reduction_none": ({"reduction": None}, ValueError, "expected reduction 'none', 'mean' or 'sum', got None"),
    "ignore_index": ({"ignore_index": 0.5}, TypeError, "expected ignore_index to be an int, got float"),
    "ignore_index_large": (
        {"ignore_index": 2**63},
        ValueError,
        "ignore_index to be an int of 64 bits, got 92233720368",
    ),
    "ignore_index_small": (
        {"ignore_index": -(2**63) - 1},
        ValueError,
        "ignore_index to be an int of 64 bits, got -922",
    ),
    "z_loss_too_large": ({"z_loss": 10**400}, ValueError, "z_loss to be a number that a float holds, got 1000"),
    "ignore_index_none": ({"ignore_index": None}, TypeError, "expected ignore_index to be an int, got NoneType"),
    "smoothing_negative": ({"label_smoothing": -0.1}, ValueError, r"label_smoothing in \[0, 1\], got -0.1"),
    "smoothing_above": ({"label_smoothing": 1.1}, ValueError, r"label_smoothing in \[0, 1\], got 1.1"),
    "smoothing_nan": ({"label_smoothing": nan}, ValueError, r"label_smoothing in \[0, 1\], got nan"),
    "smoothing_type": ({"label_smoothing": "0"}, TypeError, "expected label_smoothing to be a number, got str"),
    "weighting_string": ({"weighting": "dft"}, TypeError, "weighting to be one of mixce_kernels.weightings.*, got str"),
    "weighting_none": ({"weighting": None}, TypeError, "weightings or a function of MixCEStats, got NoneType"),
    "weighting_class": ({"weighting": Power}, TypeError, "weighting to be an instance, got the class Power"),
    "z_loss_negative": ({"z_loss": -1e-4}, ValueError, "z_loss to be finite and not negative, got -0.0001"),
    "z_loss_inf": ({"z_loss": inf}, ValueError, "z_loss to be finite and not negative, got inf"),
    "z_loss_nan": ({"z_loss": nan}, ValueError, "z_loss to be finite and not negative, got nan"),
    "z_loss_tensor": ({"z_loss": torch.tensor(0.1)}, TypeError, "expected z_loss to be a number, got a tensor of"),
    "softcap_zero": ({"softcap": 0.0}, ValueError, "softcap to be None or a positive finite number, got 0.0"),
    "softcap_negative": ({"softcap": -30}, ValueError, "softcap to be None or a positive finite number, got -30"),
    "softcap_nan": ({"softcap": nan}, ValueError, "softcap to be None or a positive finite number, got nan"),
    "softcap_inf": ({"softcap": inf}, ValueError, "softcap to be None or a positive finite number, got inf"),
    "softcap_type": ({"softcap": "30"}, TypeError, "expected softcap to be a number, got str"),
    "scale_zero": ({"logit_scale": 0}, ValueError, "logit_scale to be a positive finite number, got 0"),
    "scale_negative": ({"logit_scale": -1.0}, ValueError, "logit_scale to be a positive finite number, got -1.0"),
    "scale_nan": ({"logit_scale": nan}, ValueError, "logit_scale to be a positive finite number, got nan"),
    "scale_inf": ({"logit_scale": inf}, ValueError, "logit_scale to be a positive finite number, got inf"),
    "scale_type": ({"logit_scale": None}, TypeError, "expected logit_scale to be a number, got NoneType"),
}


def assert_sentence(error: pytest.ExceptionInfo[Exception]) -> None:
    """One line that says what was expected and what came."""
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("expected ")
    assert ", got " in message
