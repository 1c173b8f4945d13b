"""`torch.compile` and `torch.library`: one graph, any size, no recompilation, and operators that are what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from torch import Tensor

from conftest import EMULATED, INTERPRETED
from mixce_kernels import MixCELoss, fused_linear_mixce_loss, fused_mixce_loss
from support.cases import MODES
from support.inputs import computed
from support.linear_cases import LINEAR_OPERATORS

EVERY_MODE = pytest.mark.parametrize("mode", MODES)
pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No graph of another test, and no filling of memory, which the compiler plans itself."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(rows: int = 6, vocab_size: int = 300, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Logits [rows, vocab_size] and targets, some of them ignored."""
    targets = torch.randint(vocab_size, (rows,), device=device)
    targets[1::3] = -100
    return torch.randn(rows, vocab_size, device=device), targets


def loss_and_grad(function: Any, logits: Tensor, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    """Of a copy of the logits."""
    copy = computed(logits.clone())
    loss = function(copy, *args, **keywords)
    return loss.detach(), *torch.autograd.grad(loss.sum() * 1.5, copy)


def assert_same(compiled: tuple[Tensor, ...], eager: tuple[Tensor, ...]) -> None:
    """The compiler may fuse what surrounds the operators: a rounding or two."""
    for got, expected in zip(compiled, eager, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(got.dtype).eps, atol=1e-9)


# Inductor compiles C++ for seconds a graph: each mode once.
@EVERY_MODE
@pytest.mark.parametrize(
    ("compiler", "reduction"), [("aot_eager", "none"), ("aot_eager", "mean"), ("inductor", "mean")]
)
def test_one_graph(kernels: str, device: str, mode: str, compiler: str, reduction: str) -> None:
    """Forward and backward with ignored rows and every option, in every mode."""
    logits, targets = inputs(device=device)
    keywords = {
        "reduction": reduction, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "logit_scale": 1.3,
        "token_weights": torch.rand(6, device=device), "backend": kernels, **MODES[mode],
    }  # fmt: skip
    compiled = torch.compile(fused_mixce_loss, fullgraph=True, backend=compiler)
    before = logits.clone()
    assert_same(
        loss_and_grad(compiled, logits, targets, 0.3, **keywords),
        loss_and_grad(fused_mixce_loss, logits, targets, 0.3, **keywords),
    )
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("plain", torch.bfloat16), ("inplace", torch.float32), ("inplace_grad_in_forward", torch.bfloat16)],
)
def test_through_a_layer(kernels: str, device: str, mode: str, dtype: torch.dtype) -> None:
    """A model's head and its loss compiled together, of a slice of the positions: eager's gradients."""
    hidden = torch.randn(2, 5, 16, device=device, dtype=dtype)
    targets = torch.tensor([[1, -100, 3, 4], [-100, 99, 0, 7]], device=device)
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 100).to(device, dtype)

    def head(states: Tensor) -> Tensor:
        return fused_mixce_loss(layer(states)[:, :-1], targets, 0.3, backend=kernels, **MODES[mode])

    parameters = tuple(layer.parameters())
    expected = torch.autograd.grad(head(hidden), parameters)
    got = torch.autograd.grad(torch.compile(head, fullgraph=True)(hidden), parameters)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=8 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps / 8)


@pytest.mark.parametrize("mode", ["plain", "grad_in_forward"])
def test_sizes_do_not_recompile(kernels: str, device: str, mode: str) -> None:
    """With dynamic shapes one graph serves every number of rows and every vocabulary."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_mixce_loss, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for rows, vocab_size in ((6, 300), (9, 300), (4, 77), (31, 1001)):
        logits, targets = inputs(rows, vocab_size, device)
        keywords = {"backend": kernels, **MODES[mode]}
        assert_same(
            loss_and_grad(compiled, logits, targets, 0.3, **keywords),
            loss_and_grad(fused_mixce_loss, logits, targets, 0.3, **keywords),
        )
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0]


def test_marked_dynamic_rows(kernels: str, device: str) -> None:
    """`mark_dynamic` holds: the number of rows is not specialised, in a batch of sequences neither."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(fused_mixce_loss, fullgraph=True, backend=counter)
    for batch, length in ((2, 5), (3, 5), (4, 9)):
        logits, targets = inputs(batch * length, 60, device)
        leaf = logits.view(batch, length, 60).clone().requires_grad_()
        targets = targets.view(batch, length)
        for dimension in (0, 1):
            torch._dynamo.mark_dynamic(leaf, dimension)
            torch._dynamo.mark_dynamic(targets, dimension)
        loss = compiled(leaf, targets, 0.3, backend=kernels)
        (grad,) = torch.autograd.grad(loss, leaf)
        eager = leaf.detach().clone().requires_grad_()
        expected = fused_mixce_loss(eager, targets, 0.3, backend=kernels)
        assert_same((loss.detach(), grad), (expected.detach(), *torch.autograd.grad(expected, eager)))
    assert counter.frame_count == 1


def test_eta_schedule_does_not_recompile(backend: str, device: str) -> None:
    """A tensor is data, whatever it holds."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_mixce_loss, fullgraph=True, backend=counter)
    logits, targets = inputs(device=device)
    for value in (0.0, 0.25, 0.7, 1.0):
        eta = torch.tensor(value, device=device)
        assert_same(
            loss_and_grad(compiled, logits, targets, eta, backend=backend),
            loss_and_grad(fused_mixce_loss, logits, targets, value, backend=backend),
        )
    assert counter.frame_count == 1


tried_natively = pytest.mark.skipif(bool(EMULATED), reason="the graphs do not depend on the backend")
# Each option as a number that is derived from another, which the graph has a use for, too.
NUMBERS: dict[str, Callable[[float], tuple[float, dict[str, float]]]] = {
    "eta": lambda number: (1 - 0.1 * number, {}),
    "logit_scale": lambda number: (1.0, {"logit_scale": 1 / number}),
    "label_smoothing": lambda number: (0.5, {"label_smoothing": number / 20}),
    "z_loss": lambda number: (0.5, {"z_loss": number / 10}),
    "softcap": lambda number: (0.5, {"softcap": 2 * number}),
    "num_items_in_batch": lambda number: (0.5, {"num_items_in_batch": number + 0.5}),
    "ignore_index": lambda number: (0.5, {"ignore_index": int(number) + 2}),
}


def losses_of_numbers(name: str, loss: Callable[..., Any], *, dynamic: bool | None, compiler: str) -> int:
    """Holds a compiled call to the eager one for eight numbers in turn; returns how often it was compiled."""
    logits, targets = inputs(vocab_size=12)
    targets = targets.clamp(min=0)

    def scaled(logits: Tensor, number: float) -> Tensor:
        eta, options = NUMBERS[name](number)
        return loss(logits, targets, eta, **options) * number**2

    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(scaled, dynamic=dynamic, fullgraph=True, backend=counter)
    for number in (1.0, 2.0, 3.0, 4.0, 5.5, 1.5, 6.0, 2.0):
        assert_same(loss_and_grad(compiled, logits, number), loss_and_grad(scaled, logits, number))
    return counter.frame_count


@tried_natively
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_those_of_the_call(name: str, dynamic: bool | None) -> None:
    """A number that changes from call to call, as a temperature does, never counts in a later one."""
    losses_of_numbers(name, fused_mixce_loss, dynamic=dynamic, compiler="aot_eager")


@tried_natively
@pytest.mark.parametrize("name", ["eta", "logit_scale", "label_smoothing"])
@pytest.mark.parametrize("again", [False, True])
def test_numbers_and_the_compiler_s_cache(name: str, again: bool) -> None:
    """What the compiler has stored of a number, in this process or in an earlier one, serves no other number."""
    losses_of_numbers(name, fused_mixce_loss, dynamic=True, compiler="inductor")


@tried_natively
@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_of_a_linear_loss(dynamic: bool | None) -> None:
    """The same for the loss from hidden states."""
    weight = torch.eye(12)
    for name in NUMBERS:
        torch._dynamo.reset()
        losses_of_numbers(
            name,
            lambda hidden, targets, eta, **options: fused_linear_mixce_loss(hidden, weight, targets, eta, **options),
            dynamic=dynamic,
            compiler="aot_eager",
        )


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("attribute", [False, True])
def test_eta_as_a_number_does_not_recompile(backend: str, attribute: bool, dynamic: bool | None) -> None:
    """An argument, or the attribute of a module, that changes at every step: data of at most two graphs."""
    logits, targets = inputs()
    module = MixCELoss(backend=backend)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        module if attribute else fused_mixce_loss, fullgraph=True, dynamic=dynamic, backend=counter
    )
    for step in range(12):
        module.eta = eta = 1 - step / 13
        keywords = {} if attribute else {"eta": eta, "backend": backend}
        assert_same(
            loss_and_grad(compiled, logits, targets, **keywords),
            loss_and_grad(fused_mixce_loss, logits, targets, eta, backend=backend),
        )
    assert counter.frame_count <= 2


def test_statistics(backend: str, device: str) -> None:
    """The named tuple comes out of the graph."""
    logits, targets = inputs(device=device)
    compiled = torch.compile(fused_mixce_loss, fullgraph=True, backend="aot_eager")
    loss, stats = compiled(logits, targets, 0.3, return_stats=True, backend=backend)
    expected_loss, expected = fused_mixce_loss(logits, targets, 0.3, return_stats=True, backend=backend)
    assert type(stats) is type(expected)
    torch.testing.assert_close((loss, *stats), (expected_loss, *expected), rtol=1e-6, atol=1e-6)


def test_module(kernels: str, device: str) -> None:
    """`MixCELoss` compiles as a module."""
    logits, targets = inputs(device=device)
    module = MixCELoss(torch.tensor(0.3, device=device), z_loss=1e-3, backend=kernels)
    assert_same(
        loss_and_grad(torch.compile(module, fullgraph=True, backend="aot_eager"), logits, targets),
        loss_and_grad(module, logits, targets),
    )


def test_without_gradient(kernels: str, device: str) -> None:
    """In evaluation."""
    logits, targets = inputs(device=device)
    compiled = torch.compile(fused_mixce_loss, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(logits, targets, 0.3, backend=kernels)
        torch.testing.assert_close(got, fused_mixce_loss(logits, targets, 0.3, backend=kernels))


def test_nothing_valid(backend: str, device: str) -> None:
    """Every token ignored: still 0, with a gradient of 0."""
    logits, targets = inputs(device=device)
    compiled = torch.compile(fused_mixce_loss, fullgraph=True, backend="aot_eager")
    loss, grad = loss_and_grad(compiled, logits, targets.fill_(-100), backend=backend)
    assert loss == 0
    assert (grad == 0).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPU tensors")
def test_bad_target_raises_from_a_graph() -> None:
    """The kernel itself checks on the CPU."""
    logits, targets = inputs()
    targets[2] = 300
    compiled = torch.compile(fused_mixce_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match="got 300 in row 2"):
        compiled(logits, targets, backend="cpu")


def _operator_arguments(
    name: str, dtype: torch.dtype, backend: str, device: str, eta: Tensor | None, with_weights: bool
) -> tuple[Any, ...]:
    """Arguments of an operator, with the state of a forward where it wants one."""
    logits = torch.randn(2, 4, 33, device=device).to(dtype)
    targets = torch.tensor([[0, 32, -100, 4], [5, 6, 7, -100]], device=device)
    scale = torch.rand(2, 4, device=device).to(torch.float64 if dtype == torch.float64 else torch.float32)
    options = (-100, 0.1, 1e-3, 20.0, 1.3)
    # TaiLr, of one parameter for all tokens, or of two for each.
    parameters = None if eta is None else torch.rand(2, 2, 4, device=device).to(scale.dtype)
    mixture = (eta, 0.3, 2, parameters, 0.5, 0.1)
    reduction = ("mean", scale, None, None) if with_weights else ("none", None, None, None)
    arguments = {
        "forward": (logits, targets, *mixture, *options, *reduction, True, with_weights, False, backend),
        "forward_with_grad": (logits, targets, *mixture, *options, *reduction, True, backend),
        "forward_with_grad_": (logits, targets, *mixture, *options, *reduction, True, backend),
        "scale_rows_": (logits, scale, targets, -100, backend),
    }
    if name in arguments:
        return arguments[name]
    _, token_scale, state, _, _ = torch.ops.mixce_kernels.forward(*arguments["forward"])
    upstream = (torch.tensor(1.5, device=device).to(scale.dtype), token_scale) if with_weights else (scale, None)
    mixed = mixture if name == "logits_grad" else ()
    return logits, targets, state, *upstream, *mixed, *options, backend


LOGPROB_OPERATORS = (
    "token_logprobs", "logprobs_grad", "logprobs_grad_", "linear_token_logprobs", "linear_logprobs_grad"
)  # fmt: skip
OPERATORS = ("forward", "logits_grad", "logits_grad_", "forward_with_grad", "forward_with_grad_", "scale_rows_")


def test_every_operator_is_tried() -> None:
    """One that is added must be added here; those of the linear loss are tried in test_linear_training.py.

    Those of log-probabilities are tried in logprobs/test_logprobs_autograd.py.
    """
    defined = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("mixce_kernels::")
    }
    assert defined == {*OPERATORS, *LINEAR_OPERATORS, *LOGPROB_OPERATORS}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("eta", [None, "column"])
@pytest.mark.parametrize("with_weights", [False, True])
def test_opcheck(kernels: str, device: str, name: str, dtype: torch.dtype, eta: str | None, with_weights: bool) -> None:
    """Schema, fake tensors, autograd registration, and a trace with dynamic shapes."""
    eta_tensor = None if eta is None else torch.rand(2, 1, device=device).expand(2, 4)
    arguments = _operator_arguments(name, dtype, kernels, device, eta_tensor, with_weights)
    operator = getattr(torch.ops.mixce_kernels, name).default
    torch.library.opcheck(operator, arguments)
    if not name.endswith("_"):
        logits, *rest = arguments
        torch.library.opcheck(operator, (logits.requires_grad_(), *rest))
