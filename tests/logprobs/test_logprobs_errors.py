"""Every wrong argument of log-probabilities raises one sentence: what was expected, and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import EMULATED
from mixce_kernels import fused_linear_token_logprobs, fused_token_logprobs
from support.refusals import assert_sentence

nan, inf = float("nan"), float("inf")
CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "zero": ({"temperature": 0.0}, ValueError, "expected temperature to be a positive finite number, got 0.0"),
    "negative": ({"temperature": -1}, ValueError, "expected temperature to be a positive finite number, got -1.0"),
    "nan": ({"temperature": nan}, ValueError, "positive finite number, got nan"),
    "infinite": ({"temperature": inf}, ValueError, "positive finite number, got inf"),
    "tiny": ({"temperature": 1e-310, "logit_scale": 1e3}, ValueError, "temperature that logits can be divided by, got"),
    "type": ({"temperature": "1"}, TypeError, "expected temperature to be a number, got str"),
    "integers": ({"temperature": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "a floating tensor, got a tensor of"),
    "shape": (
        {"temperature": torch.ones(2)}, ValueError,
        r"expected temperature to broadcast to targets of shape \[2, 3\], got shape \[2\]",
    ),
    "too_many": ({"temperature": torch.ones(1, 2, 3)}, ValueError, r"to broadcast .* got shape \[1, 2, 3\]"),
    "elsewhere": (
        {"temperature": torch.ones(2, 3, device="meta")}, ValueError, "expected temperature on cpu .*, got meta",
    ),
    "requires_grad": (
        {"temperature": torch.ones(2, 3, requires_grad=True)}, ValueError, "expected temperature without requires_grad",
    ),
    "entry": (
        {"temperature": torch.tensor([1.0, 0.0, 1.0]), "validate": True}, ValueError,
        "expected every entry of temperature to be positive and finite, got one that is not",
    ),
    "entry_nan": ({"temperature": torch.tensor(nan), "validate": True}, ValueError, "every entry of temperature"),
    "softcap": ({"softcap": 0.0}, ValueError, "expected softcap to be None or a positive finite number, got 0.0"),
    "logit_scale": ({"logit_scale": -1.0}, ValueError, "expected logit_scale to be a positive finite number, got -1.0"),
    "ignore_index": ({"ignore_index": 0.5}, TypeError, "expected ignore_index to be an int, got float"),
    "backend": ({"backend": "tpu"}, ValueError, "expected backend to be one of .*, got 'tpu'"),
    "above": ({"targets": torch.full((2, 3), 8)}, IndexError, r"expected targets in \[0, 8\) .* got 8 in row 0"),
    "below": ({"targets": torch.full((2, 3), -1), "validate": True}, IndexError, "got -1 in row 0"),
    "targets_shape": ({"targets": torch.zeros(3, 2).long()}, ValueError, r"expected targets of shape \[2, 3\]"),
    "targets_type": ({"targets": torch.zeros(2, 3)}, TypeError, "expected targets of int64, int32, got torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("of", ["logits", "hidden"])
@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments(name: str, of: str, backend: str, device: str) -> None:
    if (device != "cpu" and name == "elsewhere") or ((device != "cpu" or EMULATED) and name == "above"):
        pytest.skip("targets are not read on a GPU, and it has another name")
    keywords, error, sentence = CALLS[name]
    moved = {
        key: value.to(device) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
        for key, value in keywords.items()
    }
    moved = {"targets": torch.zeros(2, 3, dtype=torch.int64, device=device), "backend": backend} | moved
    function, tensors = fused_token_logprobs, [torch.zeros(2, 3, 8, device=device)]
    if of == "hidden":
        function = fused_linear_token_logprobs
        tensors = [torch.zeros(shape, device=device) for shape in ((2, 3, 4), (8, 4))]
    with pytest.raises(error, match=sentence) as raised:
        function(*tensors, **moved)
    assert_sentence(raised)


def test_no_group() -> None:
    tensors = torch.zeros(3, 4), torch.zeros(8, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected group with vocab_start=0, got None"):
        fused_linear_token_logprobs(*tensors, vocab_start=0)
    with pytest.raises(ValueError, match="expected max_chunk_bytes to be positive, got 0"):
        fused_linear_token_logprobs(*tensors, max_chunk_bytes=0)


def test_a_temperature_of_an_ignored_token_does_not_matter(backend: str, device: str) -> None:
    logits = torch.randn(3, 8, device=device, requires_grad=True)
    targets = torch.tensor([1, -100, 2], device=device)
    temperature = torch.tensor([1.0, 0.0, 2.0], device=device)
    found = fused_token_logprobs(
        logits, targets, temperature=temperature, return_entropy=True, validate=True, backend=backend
    )
    assert all(one[1] == 0 and one.isfinite().all() for one in found)
    (grad,) = torch.autograd.grad(sum(one.sum() for one in found), logits)
    assert not grad[1].any()
    assert grad.isfinite().all()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_temperature_that_is_not_positive_makes_its_row_nan(
    dtype: torch.dtype, softcap: float | None, backend: str, device: str
) -> None:
    """As a target out of range does on a GPU: no number that could be taken for a result, and no other row."""
    logits = torch.randn(5, 40, device=device).to(dtype).requires_grad_()
    targets = torch.arange(5, device=device)
    temperature = torch.tensor([1.0, 0.0, -1.0, nan, 2.0], device=device)
    found = fused_token_logprobs(
        logits, targets, temperature=temperature, softcap=softcap, return_entropy=True, backend=backend
    )
    (grad,) = torch.autograd.grad(sum(one.sum() for one in found), logits)
    expected = [False, True, True, True, False]
    assert all(one.isnan().tolist() == expected for one in found)
    assert grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == expected
