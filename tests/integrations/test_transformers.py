"""`MixCEForCausalLMLoss` in models of Transformers: values and gradients of the oracle, and every error."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

from mixce_kernels import mixce_loss_reference
from mixce_kernels.integrations import TokenMetrics
from mixce_kernels.integrations.transformers import MixCEForCausalLMLoss, with_linear_mixce_loss
from mixce_kernels.weightings import Entropy, Power
from support.causal_models import (
    CONFIGS,
    VOCAB_SIZE,
    WHOLE_GRAPHS,
    assert_close,
    batch_of,
    gradients_of,
    model_of,
    transformers,
)

ETA = 0.3
# Loss and reference are float64 sums of the same terms.
TOLERANCE = {"rtol": 1e-12, "atol": 0.0}


def oracle(logits: Tensor, labels: Tensor, eta: float | Tensor = ETA, **options: Any) -> Any:
    """The plain formula, with logits sliced as the textbook does it."""
    return mixce_loss_reference(logits[..., :-1, :], labels[..., 1:], eta, **options)


def random_logits(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (3 * torch.randn(3, 9, VOCAB_SIZE, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


def takes_loss_arguments(model: Any) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)


@pytest.mark.parametrize("num_items", [None, 31])
def test_token_weights_are_factors_of_positions(num_items: int | None) -> None:
    logits, (_, labels) = random_logits(), batch_of()
    weights = torch.rand(labels.shape, dtype=torch.float64)
    loss = MixCEForCausalLMLoss(ETA)(logits, labels, num_items_in_batch=num_items, token_weights=weights)
    expected = oracle(logits, labels, num_items_in_batch=num_items, token_weights=weights[:, :-1])
    torch.testing.assert_close(loss, expected)
    gradients = (torch.autograd.grad(one, logits)[0] for one in (loss, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("num_items", [None, 31, torch.tensor(31)])
@pytest.mark.parametrize("name", CONFIGS)
def test_model_trains_with_it(name: str, num_items: Any) -> None:
    tokens, labels = batch_of()
    model = model_of(name, torch.float64)
    expected = oracle(model(tokens).logits, labels, num_items_in_batch=num_items)
    expected.backward()
    gradients = gradients_of(model)

    model.loss_function = MixCEForCausalLMLoss(ETA)
    keywords = {} if num_items is None else {"num_items_in_batch": num_items}
    if keywords and not takes_loss_arguments(model):
        pytest.skip("this release of the model hands no num_items_in_batch on")
    outputs = model(tokens, labels=labels, **keywords)
    torch.testing.assert_close(outputs.loss, expected.detach(), **TOLERANCE)
    outputs.loss.backward()
    assert_close(gradients_of(model), gradients)


@pytest.mark.parametrize(
    "weighting",
    [Power(0.5), Power(torch.rand(3, 1) + 0.5), Entropy(), lambda stats: stats.q.sqrt()],
    ids=["number", "tensor", "entropy", "function"],
)
def test_weightings(weighting: Any) -> None:
    """As an option, by assignment, and in a model that has no logits."""
    tokens, labels = batch_of(rows=3)
    model = model_of("llama", torch.float64)
    expected = oracle(model(tokens).logits, labels, weighting=weighting)
    expected.backward()
    gradients = gradients_of(model)
    assigned, linear_assigned = MixCEForCausalLMLoss(ETA), with_linear_mixce_loss(model, ETA)
    assigned.weighting = linear_assigned.mixce_loss.weighting = weighting
    for loss in (MixCEForCausalLMLoss(ETA, weighting=weighting), assigned):
        model.loss_function = loss
        outputs = model(tokens, labels=labels)
        torch.testing.assert_close(outputs.loss, expected.detach(), **TOLERANCE)
        model.zero_grad()
        outputs.loss.backward()
        assert_close(gradients_of(model), gradients)
    for linear in (with_linear_mixce_loss(model, ETA, weighting=weighting), linear_assigned):
        torch.testing.assert_close(linear(tokens, labels=labels).loss, expected.detach(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_eta_one_is_the_model_s_own_loss(name: str) -> None:
    tokens, labels = batch_of()
    model = model_of(name)
    expected = model(tokens, labels=labels).loss
    model.loss_function = MixCEForCausalLMLoss(1.0)
    # Sums of 20 float32 terms.
    torch.testing.assert_close(model(tokens, labels=labels).loss, expected, rtol=1e-6, atol=0.0)


class LargeTensors(TorchDispatchMode):
    """The storages of at least `numel` elements that operators return, and their dtypes."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.found: dict[int, Tensor] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, Tensor) and one.numel() >= self.numel:
                # Kept alive, so that no two have the same address.
                self.found.setdefault(one.untyped_storage().data_ptr(), one)
        return result


@pytest.mark.parametrize(("inplace", "allowed"), [(False, 2), (True, 1)])
def test_half_precision_logits_are_never_copied(inplace: bool, allowed: int) -> None:
    """Beside the logits of the head there is their gradient and nothing else; Transformers' own loss has float32."""
    tokens, labels = batch_of(ignored=False)
    numel = labels.numel() * VOCAB_SIZE
    # No parameter is as large.
    model = model_of("llama", torch.bfloat16)
    with LargeTensors(numel) as own:
        model(tokens, labels=labels).loss.backward()
    assert torch.float32 in {tensor.dtype for tensor in own.found.values()}

    model.loss_function = MixCEForCausalLMLoss(ETA, inplace_backward=inplace)
    with LargeTensors(numel) as large:
        loss = model(tokens, labels=labels).loss
        assert loss.dtype == torch.float32
        loss.backward()
    assert {tensor.dtype for tensor in large.found.values()} == {torch.bfloat16}
    assert len(large.found) <= allowed


def test_options_are_those_of_the_function() -> None:
    logits, (_, labels) = random_logits(), batch_of()
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "logit_scale": 0.7}
    loss = MixCEForCausalLMLoss(ETA, **options, grad_in_forward=True)
    torch.testing.assert_close(loss(logits, labels), oracle(logits, labels, **options), **TOLERANCE)
    assert loss.options.grad_in_forward


def test_arguments_of_a_call() -> None:
    logits, (_, labels) = random_logits(), batch_of()
    loss = MixCEForCausalLMLoss(ETA)
    expected = oracle(logits, labels)
    assert torch.equal(loss(logits, labels, VOCAB_SIZE), loss(logits=logits, labels=labels, vocab_size=VOCAB_SIZE))
    torch.testing.assert_close(loss(logits, labels), expected, **TOLERANCE)
    # What models hand on besides.
    torch.testing.assert_close(loss(logits, labels, VOCAB_SIZE, cu_seq_lens_q=None, use_cache=False), expected)

    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    torch.testing.assert_close(loss(logits, None, VOCAB_SIZE, shift_labels=shifted), expected, **TOLERANCE)
    torch.testing.assert_close(loss(logits, labels, VOCAB_SIZE, shift_labels=shifted), expected, **TOLERANCE)

    other = torch.where(labels == -100, 7, labels.masked_fill(labels == 7, 8))
    expected = oracle(logits, other, ignore_index=7)
    torch.testing.assert_close(loss(logits, other, ignore_index=7), expected, **TOLERANCE)
    torch.testing.assert_close(MixCEForCausalLMLoss(ETA, ignore_index=7)(logits, other), expected, **TOLERANCE)

    # nn.DataParallel hands each replica a tensor with one element.
    for num_items in (31, 31.0, torch.tensor(31), torch.tensor([31]), torch.tensor([[31]])):
        torch.testing.assert_close(
            loss(logits, labels, num_items_in_batch=num_items),
            oracle(logits, labels, num_items_in_batch=31),
            **TOLERANCE,
        )
    # Flattened tokens, whose labels the caller has shifted within their sequences.
    flat = loss(logits.flatten(0, 1), None, VOCAB_SIZE, shift_labels=shifted.flatten())
    torch.testing.assert_close(flat, oracle(logits, labels), **TOLERANCE)


def test_outputs_of_a_model_stand_for_their_logits() -> None:
    logits, (_, labels) = random_logits(), batch_of()
    loss = MixCEForCausalLMLoss(ETA)
    expected = loss(logits, labels)
    outputs = transformers.modeling_outputs.CausalLMOutput(logits=logits)
    for given in (outputs, outputs.to_tuple(), {"logits": logits}, SimpleNamespace(logits=logits)):
        assert torch.equal(loss(given, labels), expected)
    # A model that computed its own loss all the same.
    outputs = transformers.modeling_outputs.CausalLMOutput(loss=expected.detach(), logits=logits)
    assert torch.equal(loss(outputs, labels), expected)


def test_no_valid_label_gives_zero_with_a_gradient() -> None:
    logits, (_, labels) = random_logits(), batch_of()
    loss = MixCEForCausalLMLoss(ETA)(logits, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_eta_is_scheduled_by_assignment_and_in_place() -> None:
    logits, (_, labels) = random_logits(), batch_of()
    loss = MixCEForCausalLMLoss(1.0)
    for eta in (0.0, torch.tensor(0.7, dtype=torch.float64), torch.rand(3, 9, dtype=torch.float64)):
        loss.eta = eta
        of_targets = eta[:, :-1] if isinstance(eta, Tensor) and eta.dim() else eta
        torch.testing.assert_close(loss(logits, labels), oracle(logits, labels, of_targets), **TOLERANCE)
    eta = torch.tensor(0.5, dtype=torch.float64)
    loss.eta = eta
    before = loss(logits, labels)
    eta.fill_(0.25)
    assert loss(logits, labels) < before


def test_metrics_come_from_the_same_pass() -> None:
    logits, (_, labels) = random_logits(), batch_of()
    metrics = TokenMetrics()
    loss = MixCEForCausalLMLoss(ETA, metrics=metrics)
    assert torch.equal(loss(logits, labels), MixCEForCausalLMLoss(ETA)(logits, labels))
    log_p = logits.detach()[:, :-1].log_softmax(-1)
    valid = labels[:, 1:] != -100
    nll = -log_p.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0][valid]
    expected = {
        "nll": nll.mean(),
        "perplexity": nll.mean().exp(),
        "q": (-nll).exp().mean(),
        "weight": (ETA + (1 - ETA) * (-nll).exp()).mean(),
        "entropy": -(log_p * log_p.exp()).sum(-1)[valid].mean(),
        "accuracy": (log_p.argmax(-1) == labels[:, 1:])[valid].double().mean(),
        "tokens": valid.sum(),
    }
    computed = metrics.compute()
    assert computed.keys() == expected.keys()
    for name, value in expected.items():
        assert computed[name] == pytest.approx(value.item(), rel=1e-12), name


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_without_a_graph_break(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    eta = torch.tensor(0.3, dtype=torch.float64)
    loss = MixCEForCausalLMLoss(eta)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda logits, labels: loss(logits, labels, vocab_size=VOCAB_SIZE),
        fullgraph=True,
        dynamic=dynamic,
        backend=counter,
    )
    logits, (_, labels) = random_logits(), batch_of()
    compilations = []
    for value in (0.3, 0.9, 0.0):
        eta.fill_(value)
        result = compiled(logits, labels)
        torch.testing.assert_close(result, oracle(logits, labels, value), **TOLERANCE)
        gradient = torch.autograd.grad(result, logits)[0]
        expected = torch.autograd.grad(oracle(logits, labels, value), logits)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-15)
        compilations.append(counter.frame_count)
    # The first one may be traced twice.
    assert compilations[0] == compilations[-1] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_compiled_models(name: str) -> None:
    torch._dynamo.reset()
    tokens, labels = batch_of()
    model = model_of(name, torch.float64)
    model.loss_function = MixCEForCausalLMLoss(ETA)
    expected = model(tokens, labels=labels).loss
    expected.backward()
    gradients = gradients_of(model)
    loss = torch.compile(model, fullgraph=WHOLE_GRAPHS, backend="aot_eager")(tokens, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-6, atol=0.0)
    assert_close(gradients_of(model), gradients)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    tokens, labels = batch_of()
    model = model_of("llama", torch.float64)
    model.loss_function = MixCEForCausalLMLoss(ETA, metrics=TokenMetrics())
    model(tokens, labels=labels).loss.backward()
    gradients = gradients_of(model)
    once = model.loss_function.metrics.compute()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model(tokens, labels=labels, use_cache=False).loss.backward()
    assert_close(gradients_of(model), gradients)
    assert model.loss_function.metrics.compute() == pytest.approx(once, rel=1e-6)


def shapes(logits: tuple[int, ...], labels: tuple[int, ...], **more: Any) -> tuple[Any, ...]:
    return torch.zeros(logits), torch.zeros(labels, dtype=torch.int64), more


WHOLE = torch.zeros(3, 9, VOCAB_SIZE)
TOKENS = torch.zeros(3, 9, dtype=torch.int64)
ERRORS: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "logits shifted already": (
        shapes((3, 8, 61), (3, 9)),
        ValueError,
        r"expected labels of shape \[3, 8\] for logits of shape \[3, 8, 61\], got \[3, 9\]: pass logits and labels as "
        r"they are, they are shifted here \(or shifted ones as shift_labels\)",
    ),
    "labels shifted already": (
        shapes((3, 9, 61), (3, 8)),
        ValueError,
        r"got \[3, 8\]: pass logits and labels as they are, they are shifted here",
    ),
    "both shifted already": (
        (WHOLE[:, :-1], TOKENS[:, 1:], {}),
        ValueError,
        "expected logits and labels that are not shifted yet, got views without the last position and without the",
    ),
    "other batch": (
        shapes((3, 9, 61), (2, 9)),
        ValueError,
        r"expected labels of shape \[3, 9\] for logits of shape \[3, 9, 61\], got \[2, 9\]$",
    ),
    "labels with a dimension too many": (shapes((3, 9, 61), (3, 9, 1)), ValueError, r"got \[3, 9, 1\]$"),
    "flattened logits": (shapes((27, 61), (3, 9)), ValueError, r"expected labels of shape \[27\] .* got \[3, 9\]$"),
    "flattened": (
        shapes((27, 61), (27,)),
        ValueError,
        r"expected labels of shape \[B, T\], got \[27\]: flattened ones would be shifted across sequences",
    ),
    "shift_labels of another shape": (
        shapes((3, 9, 61), (3, 9), shift_labels=TOKENS[:, 1:]),
        ValueError,
        r"expected shift_labels of shape \[3, 9\] for logits of shape \[3, 9, 61\], got \[3, 8\]$",
    ),
    "no labels": ((WHOLE, None, {}), TypeError, "expected labels to be a tensor, got NoneType"),
    "labels as a list": ((WHOLE, [1, 2], {}), TypeError, "expected labels to be a tensor, got list"),
    "floating labels": ((WHOLE, TOKENS.float(), {}), TypeError, "expected labels of int64, int32, got torch.float32"),
    "labels of bytes": ((WHOLE, TOKENS.byte(), {}), TypeError, "expected labels of int64, int32, got torch.uint8"),
    "other vocabulary": (
        shapes((3, 9, 61), (3, 9), vocab_size=60),
        ValueError,
        r"expected logits of shape \[..., T, 60\], got \[3, 9, 61\]",
    ),
    "outputs without logits": (
        (SimpleNamespace(logits=None), TOKENS, {}),
        TypeError,
        "expected logits, or a model's outputs with logits, got SimpleNamespace without",
    ),
    "no outputs": (((), TOKENS, {}), TypeError, "got tuple without"),
    "label out of range": ((WHOLE, TOKENS + VOCAB_SIZE, {}), IndexError, r"expected targets in \[0, 61\)"),
    "negative count": (
        (WHOLE, TOKENS, {"num_items_in_batch": -1}),
        ValueError,
        "expected num_items_in_batch to be finite and not negative, got -1",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    (logits, labels, more), kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        MixCEForCausalLMLoss(ETA)(logits, labels, **more)


def test_errors_of_options() -> None:
    with pytest.raises(ValueError, match=r"expected eta in \[0, 1\], got 1.5"):
        MixCEForCausalLMLoss(1.5)
    with pytest.raises(ValueError, match=r"expected softcap to be None or a positive finite number, got -1\.0"):
        MixCEForCausalLMLoss(softcap=-1)
    with pytest.raises(TypeError, match="expected metrics to be a TokenMetrics or None, got int"):
        MixCEForCausalLMLoss(metrics=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (WHOLE, TOKENS),
        (WHOLE[:, 1:], TOKENS[:, 1:]),
        (WHOLE[:, :-1], TOKENS[:, :-1]),
        (WHOLE[:1, :-1].expand(3, -1, -1), TOKENS[:, 1:]),
        (WHOLE[:, 2:], TOKENS[:, 2:]),
        (WHOLE[:0], TOKENS[:0]),
        (WHOLE[:, :0], TOKENS[:, :0]),
        (WHOLE[:, :1], TOKENS[:, :1]),
        (WHOLE[1:, :-1].contiguous(), TOKENS[:-1, :-1]),
        (WHOLE[:, :-1].contiguous(), TOKENS[:, :-1].contiguous()),
    ],
)
def test_views_that_are_not_shifted_are_taken(logits: Tensor, labels: Tensor) -> None:
    assert MixCEForCausalLMLoss(ETA)(logits, labels).isfinite()
