"""Every wrong argument raises one sentence: what was expected, and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import EMULATED
from mixce_kernels import MixCELoss, fused_mixce_loss, mixce_loss_reference
from mixce_kernels.weightings import Band, Entropy, Focal, Power, TaiLr
from support.refusals import OPTIONS, Quantized, assert_sentence

nan = float("nan")
inf = float("inf")


def logits(dtype: torch.dtype = torch.float32, *shape: int) -> Tensor:
    """Some logits, [2, 3, 8] unless told otherwise."""
    return torch.zeros(shape or (2, 3, 8), dtype=dtype)


def targets(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Good targets, [2, 3] unless told otherwise."""
    return torch.zeros(shape or (2, 3), dtype=dtype)


META = torch.zeros(2, 3, device="meta")

# Parameters as tensors are checked with the call, and a function's result once it is there.
WEIGHTINGS: dict[str, tuple[Any, type[Exception], str]] = {
    "integer": (Power(torch.tensor(1)), TypeError, "expected alpha to be a number or a floating tensor.*torch.int64"),
    "requires_grad": (Power(torch.tensor(1.0, requires_grad=True)), ValueError, "expected alpha without requires_grad"),
    "elsewhere": (Power(META), ValueError, "expected alpha on cpu with the logits, got meta"),
    "shape": (TaiLr(0.5, torch.zeros(2)), ValueError, r"expected floor to broadcast.*\[2, 3\], got shape \[2\]"),
    "entry": (Power(torch.tensor(-1.0)), ValueError, "every entry of alpha to be finite and not negative, got one"),
    "entry_nan": (Entropy(1.0, torch.tensor(nan)), ValueError, "every entry of scale to be positive and finite, got"),
    "entry_above": (TaiLr(torch.full((3,), 1.5)), ValueError, r"every entry of gamma to be in \[0, 1\], got one"),
    "result_list": (lambda stats: [1.0], TypeError, "weighting's result to be a tensor of torch.float32, got list"),
    "result_dtype": (lambda stats: stats.q.double(), TypeError, "of torch.float32, got a tensor of torch.float64"),
    "result_bool": (lambda stats: stats.q > 0.5, TypeError, "tensor of torch.float32, got a tensor of torch.bool"),
    "result_shape": (lambda stats: stats.q[0], ValueError, r"result of targets' shape \[2, 3\], got \[3\]"),
    "result_scalar": (lambda stats: stats.q.mean(), ValueError, r"result of targets' shape \[2, 3\], got \[\]"),
    "result_elsewhere": (lambda stats: stats.q.to("meta"), ValueError, "weighting's result on cpu, got meta"),
    "result_requires_grad": (
        lambda stats: torch.ones(2, 3, requires_grad=True), ValueError, "result without requires_grad, got one with"
    ),
    "result_negative": (lambda stats: -stats.q, ValueError, "result to be nowhere negative, got a negative entry"),
}  # fmt: skip
# Positional arguments, keywords, error, and the sentence.
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "logits_type": (([1.0], targets()), {}, TypeError, "expected logits to be a tensor, got list"),
    "targets_type": ((logits(), [1]), {}, TypeError, "expected targets to be a tensor, got list"),
    "logits_integer": ((logits(torch.int64), targets()), {}, TypeError, "expected logits of float32.*got torch.int64"),
    "logits_complex": ((logits(torch.complex64), targets()), {}, TypeError, "got torch.complex64"),
    "targets_float": ((logits(), targets(dtype=torch.float32)), {}, TypeError, "expected targets of int64, int32, got"),
    "targets_int16": ((logits(), targets(dtype=torch.int16)), {}, TypeError, "got torch.int16"),
    "targets_bool": ((logits(), targets(dtype=torch.bool)), {}, TypeError, "got torch.bool"),
    "targets_short": ((logits(), targets(2, 2)), {}, ValueError, r"expected targets of shape \[2, 3\].*got \[2, 2\]"),
    "targets_flat": ((logits(), targets(6)), {}, ValueError, r"expected targets of shape \[2, 3\].*got \[6\]"),
    "targets_as_probabilities": ((logits(), targets(2, 3, 8)), {}, ValueError, r"got \[2, 3, 8\]"),
    "targets_column": ((logits(), targets(2, 3, 1)), {}, ValueError, r"got \[2, 3, 1\]"),
    "no_vocabulary": ((logits(torch.float32, 2, 3, 0), targets()), {}, ValueError, r"V >= 1, got \[2, 3, 0\]"),
    "logits_scalar": ((torch.tensor(1.0), torch.tensor(0)), {}, ValueError, r"V >= 1, got \[\]"),
    "targets_elsewhere": (
        (logits(), targets().to("meta")), {}, ValueError, "expected targets on cpu with the logits, got meta"
    ),
    "eta_string": ((logits(), targets(), "half"), {}, TypeError, "expected eta to be a number, got str"),
    "eta_none": ((logits(), targets(), None), {}, TypeError, "expected eta to be a number, got NoneType"),
    "eta_negative": ((logits(), targets(), -0.1), {}, ValueError, r"expected eta in \[0, 1\], got -0.1"),
    "eta_above": ((logits(), targets(), 1.5), {}, ValueError, r"expected eta in \[0, 1\], got 1.5"),
    "eta_nan": ((logits(), targets(), nan), {}, ValueError, r"expected eta in \[0, 1\], got nan"),
    "eta_inf": ((logits(), targets(), inf), {}, ValueError, r"expected eta in \[0, 1\], got inf"),
    "eta_integer_tensor": ((logits(), targets(), torch.tensor(1)), {}, TypeError, "expected eta to be.*torch.int64"),
    "eta_requires_grad": (
        (logits(), targets(), torch.tensor(0.5, requires_grad=True)), {}, ValueError, "eta without requires_grad"
    ),
    "eta_elsewhere": ((logits(), targets(), META), {}, ValueError, "expected eta on cpu with the logits, got meta"),
    "eta_shape": ((logits(), targets(), torch.zeros(2)), {}, ValueError, r"broadcast.*\[2, 3\], got shape \[2\]"),
    "eta_larger": ((logits(), targets(), torch.zeros(4, 2, 3)), {}, ValueError, r"got shape \[4, 2, 3\]"),
    "eta_validated": (
        (logits(), targets(), torch.tensor(2.0)), {"validate": True}, ValueError, r"every entry of eta in \[0, 1\], got"
    ),
    "eta_validated_nan": (
        (logits(), targets(), torch.tensor(nan)), {"validate": True}, ValueError, r"every entry of eta in \[0, 1\], got"
    ),
    "eta_above_by_more_than_a_rounding": (
        (logits(), targets(), 1.00001), {}, ValueError, r"expected eta in \[0, 1\], got 1.00001"
    ),
    "eta_too_large": ((logits(), targets(), 10**400), {}, ValueError, "eta to be a number that a float holds, got 10"),
    "weights_require_grad": (
        (logits(), targets()), {"token_weights": torch.ones(2, 3, requires_grad=True)}, ValueError,
        "token_weights without requires_grad",
    ),
    "num_items_requires_grad": (
        (logits(), targets()), {"num_items_in_batch": torch.ones((), requires_grad=True)}, ValueError,
        "num_items_in_batch without requires_grad",
    ),
    "logits_quantized": (
        (Quantized(torch.zeros(2, 3, 8)), targets()), {}, TypeError,
        "logits that holds its numbers as torch.float32, got Quantized of torch.int8",
    ),
    "weights_type": (
        (logits(), targets()), {"token_weights": [1.0]}, TypeError, "token_weights to be a floating tensor, got list"
    ),
    "weights_integer": (
        (logits(), targets()), {"token_weights": targets()}, TypeError, "floating tensor, got a tensor of torch.int64"
    ),
    "weights_shape": (
        (logits(), targets()), {"token_weights": torch.ones(3)}, ValueError, r"targets' shape \[2, 3\], got \[3\]"
    ),
    "weights_elsewhere": (
        (logits(), targets()), {"token_weights": META}, ValueError, "expected token_weights on cpu.*got meta"
    ),
    "num_items_with_sum": (
        (logits(), targets()), {"num_items_in_batch": 3, "reduction": "sum"}, ValueError, "'mean' alone, got.*'sum'"
    ),
    "num_items_with_none": (
        (logits(), targets()), {"num_items_in_batch": 3, "reduction": "none"}, ValueError, "'mean' alone, got.*'none'"
    ),
    "num_items_vector": (
        (logits(), targets()), {"num_items_in_batch": torch.ones(2)}, ValueError, r"one element, got.*\[2\]"
    ),
    "num_items_negative": (
        (logits(), targets()), {"num_items_in_batch": -1}, ValueError, "finite and not negative, got -1"
    ),
    "num_items_nan": ((logits(), targets()), {"num_items_in_batch": nan}, ValueError, "not negative, got nan"),
    **{
        f"weighting_{name}": ((logits(), targets()), {"weighting": weighting, "validate": True}, error, sentence)
        for name, (weighting, error, sentence) in WEIGHTINGS.items()
    },
    "num_items_string": ((logits(), targets()), {"num_items_in_batch": "3"}, TypeError, "to be a number, got str"),
}  # fmt: skip

# Those that the constructor of MixCELoss checks too.


@pytest.mark.parametrize("function", [fused_mixce_loss, mixce_loss_reference], ids=lambda function: function.__name__)
@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments(name: str, function: Callable[..., Tensor]) -> None:
    """The function and its reference raise the same."""
    arguments, keywords, error, sentence = CALLS[name]
    with pytest.raises(error, match=sentence) as caught:
        function(*arguments, **keywords)
    assert_sentence(caught)


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_options(name: str) -> None:
    """The functions raise, and the module does already when it is made."""
    keywords, error, sentence = OPTIONS[name]
    for call in (
        lambda: fused_mixce_loss(logits(), targets(), **keywords),
        lambda: mixce_loss_reference(logits(), targets(), **keywords),
        lambda: MixCELoss(**keywords),
    ):
        with pytest.raises(error, match=sentence) as caught:
            call()
        assert_sentence(caught)


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: Power(-0.1), ValueError, "expected alpha to be finite and not negative, got -0.1"),
        (lambda: Power(nan), ValueError, "expected alpha to be finite and not negative, got nan"),
        (lambda: Power(inf), ValueError, "expected alpha to be finite and not negative, got inf"),
        (lambda: Power("1"), TypeError, "expected alpha to be a number, got str"),
        (lambda: Power(None), TypeError, "expected alpha to be a number, got NoneType"),
        (lambda: TaiLr(1.1), ValueError, r"expected gamma to be in \[0, 1\], got 1.1"),
        (lambda: TaiLr(-0.1), ValueError, r"expected gamma to be in \[0, 1\], got -0.1"),
        (lambda: TaiLr(0.5, 2), ValueError, r"expected floor to be in \[0, 1\], got 2"),
        (lambda: Band(-0.1, 0.5), ValueError, r"expected low to be in \[0, 1\], got -0.1"),
        (lambda: Band(0.1, nan), ValueError, r"expected high to be in \[0, 1\], got nan"),
        (lambda: Band(0.6, 0.5), ValueError, "expected low <= high, got low=0.6 and high=0.5"),
        (lambda: Focal(-1), ValueError, "expected gamma to be finite and not negative, got -1"),
        (lambda: Entropy(-1), ValueError, "expected alpha to be finite and not negative, got -1"),
        (lambda: Entropy(1, 0), ValueError, "expected scale to be positive and finite, got 0"),
        (lambda: Entropy(1, inf), ValueError, "expected scale to be positive and finite, got inf"),
    ],
)
def test_parameters_of_weightings(make: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    """Numbers are checked when a weighting is made."""
    with pytest.raises(error, match=sentence) as caught:
        make()
    assert_sentence(caught)


@pytest.mark.parametrize(("eta", "end"), [(-3.2e-16, 0.0), (-1e-6, 0.0), (1 + 1e-9, 1.0), (1 + 1e-6, 1.0)])
@pytest.mark.parametrize("function", [fused_mixce_loss, mixce_loss_reference], ids=lambda function: function.__name__)
def test_a_schedule_s_last_step(function: Callable[..., Tensor], eta: float, end: float) -> None:
    """A number that misses the range by a rounding is its end, as an argument, in a module, and under validation."""
    values = torch.randn(2, 3, 8), targets()
    expected = function(*values, end)
    assert torch.equal(function(*values, eta), expected)
    torch.testing.assert_close(function(*values, torch.tensor(eta), validate=True), expected)
    assert MixCELoss(eta).eta == end
    module = MixCELoss()
    module.eta = eta
    torch.testing.assert_close(module(*values), expected)


@pytest.mark.parametrize("eta", [-0.1, 1.1, nan])
def test_module_checks_eta(eta: float) -> None:
    """When it is made, and again when it is called: it may have been assigned."""
    with pytest.raises(ValueError, match=r"expected eta in \[0, 1\], got"):
        MixCELoss(eta)
    module = MixCELoss()
    module.eta = eta
    with pytest.raises(ValueError, match=r"expected eta in \[0, 1\], got"):
        module(logits(), targets())


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """By argument or by the environment."""
    with pytest.raises(ValueError, match=r"expected backend to be one of reference, cpu, triton, cuda.*got 'gpu'"):
        fused_mixce_loss(logits(), targets(), backend="gpu")
    monkeypatch.setenv("MIXCE_BACKEND", "tpu")
    with pytest.raises(ValueError, match="got 'tpu'"):
        fused_mixce_loss(logits(), targets())


def test_backend_that_cannot_serve() -> None:
    """It says why; nothing falls back silently."""
    meta = logits().to("meta"), targets().to("meta")
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot serve this call: it runs on CPU tensors.*on meta"):
        fused_mixce_loss(*meta, backend="cpu")
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot serve this call: it runs on CUDA.*on meta"):
        fused_mixce_loss(*meta, backend="triton")
    for backend in () if EMULATED else ("triton", "cuda"):
        with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot serve this call: "):
            fused_mixce_loss(logits(), targets(), backend=backend)


def test_environment_names_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """`MIXCE_BACKEND` counts where no backend is named, and an argument wins over it."""
    values = torch.randn(2, 3, 8), targets()
    reference = fused_mixce_loss(*values, backend="reference")
    monkeypatch.setenv("MIXCE_BACKEND", "reference")
    assert torch.equal(fused_mixce_loss(*values), reference)
    monkeypatch.setenv("MIXCE_BACKEND", "nonsense")
    assert torch.equal(fused_mixce_loss(*values, backend="reference"), reference)


def test_expanded_logits_cannot_be_overwritten(kernels: str, device: str) -> None:
    """Rows that share memory have no place for two gradients; without a gradient to write they are fine."""
    expanded = torch.randn(1, 8, device=device).expand(4, 8)
    positions = torch.zeros(4, dtype=torch.int64, device=device)
    for mode in ({"inplace_backward": True}, {"inplace_backward": True, "grad_in_forward": True}):
        fused_mixce_loss(expanded, positions, backend=kernels, **mode)
        with pytest.raises(ValueError, match=r"expected logits whose rows do not share memory.*got expanded logits"):
            fused_mixce_loss(expanded.detach().requires_grad_(), positions, backend=kernels, **mode)


def test_overlapping_windows_cannot_be_overwritten(kernels: str, device: str) -> None:
    """Rows that share a part of their memory neither."""
    windows = torch.randn(20, device=device).as_strided((4, 8), (2, 1)).requires_grad_()
    positions = torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="expected logits whose rows do not share memory"):
        fused_mixce_loss(windows, positions, backend=kernels, inplace_backward=True)


def test_an_equal_float_is_no_class_index() -> None:
    """Also after a call with the int, whose check is remembered."""
    logits, targets = torch.randn(2, 5), torch.tensor([1, 2])
    fused_mixce_loss(logits, targets, ignore_index=-7)
    with pytest.raises(TypeError, match="expected ignore_index to be an int, got float"):
        fused_mixce_loss(logits, targets, ignore_index=-7.0)
