"""Every wrong argument of the linear loss raises one sentence: what was expected, and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import EMULATED
from mixce_kernels import LinearMixCELoss, fused_linear_mixce_loss, linear_mixce_loss_reference
from support.refusals import OPTIONS, Quantized, assert_sentence

HIDDEN, WEIGHT, BIAS = torch.zeros(2, 3, 8), torch.zeros(50, 8), torch.zeros(50)
TARGETS = torch.zeros(2, 3, dtype=torch.int64)

# What differs from a good call, error, and the sentence.
CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "hidden_type": ({"hidden": [1.0]}, TypeError, "expected hidden to be a tensor, got list"),
    "weight_type": ({"weight": None}, TypeError, "expected weight to be a tensor, got NoneType"),
    "bias_type": ({"bias": 0.0}, TypeError, "expected bias to be a tensor, got float"),
    "targets_type": ({"targets": [1]}, TypeError, "expected targets to be a tensor, got list"),
    "hidden_integer": ({"hidden": HIDDEN.long()}, TypeError, "expected hidden of float32.*got torch.int64"),
    "weight_integer": ({"weight": WEIGHT.int()}, TypeError, "expected weight of float32.*got torch.int32"),
    "bias_integer": ({"bias": BIAS.long()}, TypeError, "expected bias of float32.*got torch.int64"),
    "weight_dtype": (
        {"weight": WEIGHT.bfloat16()}, TypeError,
        r"expected weight of hidden's torch.float32 \(or autocast and no float64\), got torch.bfloat16",
    ),
    "hidden_dtype": (
        {"hidden": HIDDEN.bfloat16()}, TypeError, "expected weight of hidden's torch.bfloat16.*got torch.float32"
    ),
    "bias_dtype": ({"bias": BIAS.double()}, TypeError, "expected bias of hidden's torch.float32.*got torch.float64"),
    "hidden_scalar": ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden of shape \[..., D\] with D >= 1, got \[\]"),
    "hidden_empty": ({"hidden": HIDDEN[..., :0]}, ValueError, r"D >= 1, got \[2, 3, 0\]"),
    "weight_hidden_size": (
        {"weight": torch.zeros(50, 9)}, ValueError,
        r"weight of shape \[V, D\] = \[V, 8\] for hidden of shape \[2, 3, 8\], got \[50, 9\]",
    ),
    "weight_transposed": ({"weight": WEIGHT.t()}, ValueError, r"\[V, 8\].*got \[8, 50\]"),
    "weight_flat": ({"weight": WEIGHT[0]}, ValueError, r"\[V, 8\].*got \[8\]"),
    "no_vocabulary": ({"weight": WEIGHT[:0]}, ValueError, r"\[V, 8\].*got \[0, 8\]"),
    "bias_vocabulary": (
        {"bias": BIAS[1:]}, ValueError, r"bias of shape \[V\] = \[50\] for weight of shape \[50, 8\], got \[49\]"
    ),
    "bias_column": ({"bias": BIAS.unsqueeze(1)}, ValueError, r"bias of shape \[V\] = \[50\].*got \[50, 1\]"),
    "targets_short": (
        {"targets": TARGETS[:, :2]}, ValueError,
        r"targets of shape \[2, 3\] for hidden of shape \[2, 3, 8\], got \[2, 2\]",
    ),
    "targets_float": ({"targets": TARGETS.float()}, TypeError, "expected targets of int64, int32, got torch.float32"),
    "weight_elsewhere": (
        {"weight": WEIGHT.to("meta")}, ValueError, "expected weight on cpu with the hidden states, got meta"
    ),
    "bias_elsewhere": ({"bias": BIAS.to("meta")}, ValueError, "expected bias on cpu with the hidden states, got meta"),
    "targets_elsewhere": ({"targets": TARGETS.to("meta")}, ValueError, "expected targets on cpu.*got meta"),
    "eta_above": ({"eta": 1.5}, ValueError, r"expected eta in \[0, 1\], got 1.5"),
    "eta_shape": ({"eta": torch.zeros(2)}, ValueError, r"broadcast.*\[2, 3\], got shape \[2\]"),
    "weights_shape": ({"token_weights": torch.ones(3)}, ValueError, r"targets' shape \[2, 3\], got \[3\]"),
    "num_items_with_sum": ({"num_items_in_batch": 3, "reduction": "sum"}, ValueError, "'mean' alone, got.*'sum'"),
    "weight_quantized": (
        {"weight": Quantized(WEIGHT)}, TypeError,
        "weight that holds its numbers as torch.float32, got Quantized of torch.int8",
    ),
    "weights_require_grad": (
        {"token_weights": torch.ones(2, 3, requires_grad=True)}, ValueError, "token_weights without requires_grad"
    ),
    "chunk_large": ({"max_chunk_bytes": 2**63}, ValueError, "max_chunk_bytes to be an int of 64 bits, got 92233720368"),
    "chunk_zero": ({"max_chunk_bytes": 0}, ValueError, "expected max_chunk_bytes to be positive, got 0"),
    "chunk_negative": ({"max_chunk_bytes": -1}, ValueError, "expected max_chunk_bytes to be positive, got -1"),
    "chunk_float": ({"max_chunk_bytes": 1e6}, TypeError, "max_chunk_bytes to be None or an int, got float"),
    "chunk_bool": ({"max_chunk_bytes": True}, TypeError, "max_chunk_bytes to be None or an int, got bool"),
    "path": ({"path": "rows"}, ValueError, "expected path 'chunks' or 'tiles', got 'rows'"),
}  # fmt: skip
MODULE_TOO = ("chunk_large", "chunk_zero", "chunk_negative", "chunk_float", "chunk_bool", "path")


def call(function: Any, **changes: Any) -> Any:
    """A good call but for the changes."""
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **changes}
    return function(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments)


@pytest.mark.parametrize("function", [fused_linear_mixce_loss, linear_mixce_loss_reference], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments(name: str, function: Any) -> None:
    """The function and its reference raise the same."""
    changes, error, sentence = CALLS[name]
    with pytest.raises(error, match=sentence) as caught:
        call(function, **changes)
    assert_sentence(caught)


@pytest.mark.parametrize("name", MODULE_TOO)
def test_the_module_checks_when_it_is_made(name: str) -> None:
    changes, error, sentence = CALLS[name]
    with pytest.raises(error, match=sentence):
        LinearMixCELoss(**changes)


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_options(name: str) -> None:
    """Those that both losses have."""
    keywords, error, sentence = OPTIONS[name]
    for attempt in (
        lambda: call(fused_linear_mixce_loss, **keywords),
        lambda: call(linear_mixce_loss_reference, **keywords),
        lambda: LinearMixCELoss(**keywords),
    ):
        with pytest.raises(error, match=sentence) as caught:
            attempt()
        assert_sentence(caught)


def test_the_path_and_the_backend_fit_together() -> None:
    for function in (fused_linear_mixce_loss, LinearMixCELoss):
        attempt = {"path": "tiles", "backend": "cpu"}
        with pytest.raises(ValueError, match="expected backend 'triton' or None with path='tiles', got 'cpu'"):
            function(**attempt) if function is LinearMixCELoss else call(function, **attempt)


def test_backend_that_cannot_serve() -> None:
    """It says why; nothing falls back silently."""
    meta = {"hidden": HIDDEN.to("meta"), "weight": WEIGHT.to("meta"), "targets": TARGETS.to("meta")}
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot serve this call: it runs on CPU tensors.*on meta"):
        call(fused_linear_mixce_loss, backend="cpu", **meta)
    with pytest.raises(RuntimeError, match=r"path 'tiles' cannot serve this call: .*on meta"):
        call(fused_linear_mixce_loss, path="tiles", **meta)
    if not EMULATED:
        with pytest.raises(RuntimeError, match="path 'tiles' cannot serve this call: it runs on CUDA"):
            call(fused_linear_mixce_loss, path="tiles")
        with pytest.raises(RuntimeError, match="backend 'triton' cannot serve this call: "):
            call(fused_linear_mixce_loss, backend="triton")


def test_values_are_checked_where_asked() -> None:
    """Targets on the CPU always, a tensor eta with `validate`."""
    targets = TARGETS.clone()
    targets[1, 1] = 50
    with pytest.raises(IndexError, match=r"expected targets in \[0, 50\) or ignore_index=-100, got 50 in row 4"):
        call(fused_linear_mixce_loss, targets=targets, validate=EMULATED is not None)
    with pytest.raises(ValueError, match=r"every entry of eta in \[0, 1\], got one outside"):
        call(fused_linear_mixce_loss, eta=torch.tensor(2.0), validate=True)
