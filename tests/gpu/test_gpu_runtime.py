"""What torch.cuda adds to the kernels on an NVIDIA GPU: graphs, streams, devices, and no synchronisation with the host.

Under an emulation (conftest.py) the same functions run on CPU tensors, with `StandIn` for what they use of torch.cuda:
it knows of no concurrency, replays a graph by running its step again, and finds synchronisations by their operators.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_gpu import inputs, loss_and_grad
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from conftest import EMULATED, GPU_BACKENDS, INTERPRETED, needs_gpu
from mixce_kernels import backends, fused_mixce_loss
from mixce_kernels.backends import cuda, native, triton
from support.cases import BFLOAT16, FLOAT32, MODES
from support.inputs import computed

pytestmark = pytest.mark.skipif(INTERPRETED, reason="an interpreter knows neither graphs nor streams")

EVERY_MODE = pytest.mark.parametrize("mode", MODES)
BOTH_DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
# Rows that several blocks share, and rows of one block each.
SHAPES = pytest.mark.parametrize("shape", [(6, 50_257), (200, 2_049)], ids=str)
# PyTorch's words where a synchronisation is an error.
SYNCHRONISES = "synchronizing CUDA operation"
# Of the GPU's clock, about a second: longer than everything that runs beside it.
SPIN_CYCLES = 2 * 10**9


class StandIn:
    """A stream, an event or a guard of a GPU that does everything at once."""

    def __init__(self, *_: object, **__: object) -> None:
        self.cuda_stream = 0

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, _stream: object) -> None: ...

    def synchronize(self) -> None: ...

    def record(self) -> None: ...

    def query(self) -> bool:
        return False


# Operators that wait for a GPU's results, by their names in a profile.
SYNCHRONISING = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal"}


class SyncDebugMode:
    """`torch.cuda.set_sync_debug_mode`, from a profile: "default" after "error" raises if anything synchronised."""

    def __init__(self) -> None:
        self._profile: profile | None = None

    def __call__(self, mode: str) -> None:
        if mode == "error":
            self._profile = profile(activities=[ProfilerActivity.CPU])
            self._profile.__enter__()
        elif self._profile is not None:
            self._profile.__exit__(None, None, None)
            names = {event.name for event in self._profile.events()}
            self._profile = None
            assert any(name.startswith("aten::") for name in names), "the profile saw nothing"
            if names & SYNCHRONISING:
                raise RuntimeError(f"called a {SYNCHRONISES}: {', '.join(sorted(names & SYNCHRONISING))}")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under an emulation, what these tests use of torch.cuda."""
    if not EMULATED:
        return
    for name in ("Stream", "Event", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, StandIn)
    for name in ("synchronize", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", SyncDebugMode())


@pytest.fixture(params=GPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The backends of a GPU."""
    return request.param


def assert_same_bits(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """NaNs included: there are none."""
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def captured(step: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """The step as a CUDA graph: what replays it, and the tensors that a replay fills."""
    if EMULATED:
        outputs = tuple(tensor.clone() for tensor in step())

        def replay() -> None:
            for output, new in zip(outputs, step(), strict=True):
                output.copy_(new)

        return replay, outputs
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()  # compiles and loads the kernels, which a capture cannot
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        outputs = step()
    return graph.replay, outputs


@pytest.mark.parametrize("mode", ["forward", *MODES])
@BOTH_DTYPES
@SHAPES
def test_graph_replays_with_changed_inputs(
    backend: str, device: str, mode: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Logits, targets, eta, weights and divisor are read anew by each replay: the bits of an eager call."""
    values, targets = inputs(*shape, device, dtype)
    eta, n_items = torch.tensor(0.3, device=device), torch.tensor(5.0, device=device)
    weights = torch.rand(shape[0], device=device)
    memory = torch.empty_like(values)
    keywords = {"token_weights": weights, "num_items_in_batch": n_items, "label_smoothing": 0.1, "backend": backend}

    def step() -> tuple[Tensor, ...]:
        memory.copy_(values)
        if mode == "forward":
            loss, stats = fused_mixce_loss(memory, targets, eta, return_stats=True, **keywords)
            return loss, *stats
        logits = computed(memory)
        loss = fused_mixce_loss(logits, targets, eta, **MODES[mode], **keywords)
        return loss.detach(), *torch.autograd.grad(loss, logits)

    replay, outputs = captured(step)
    seen = []
    changes = [
        lambda: None,
        lambda: eta.fill_(0.9),
        lambda: values.copy_(values.flip(0)),
        lambda: targets.copy_(targets.roll(1)),
        lambda: weights.mul_(2),
        lambda: n_items.fill_(3.0),
    ]
    for change in changes:
        change()
        replay()
        replay()
        got = tuple(tensor.clone() for tensor in outputs)
        assert_same_bits(got, step())
        assert got[0].isfinite()
        seen.append(got[0].item())
    assert len(set(seen)) == len(changes)


@contextlib.contextmanager
def without_synchronisation() -> Iterator[None]:
    """Makes an error of every operation that waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def divisors(device: str) -> dict[str, Any]:
    """Reductions with what they divide by."""
    return {
        "none": {"reduction": "none"},
        "sum": {"reduction": "sum"},
        "mean": {},
        "int": {"num_items_in_batch": 7},
        "cpu_tensor": {"num_items_in_batch": torch.tensor(7)},
        "device_tensor": {"num_items_in_batch": torch.tensor([7], device=device)},
    }


@EVERY_MODE
@BOTH_DTYPES
@SHAPES
@pytest.mark.parametrize("divisor", divisors("cpu"))
@pytest.mark.parametrize("extras", ["default", "every_tensor"])
def test_nothing_synchronises(
    backend: str, device: str, mode: str, dtype: torch.dtype, shape: tuple[int, int], divisor: str, extras: str
) -> None:
    """Forward and backward of every mode and reduction leave the host free, with a target out of range too."""
    values, targets = inputs(*shape, device, dtype)
    targets[0] = -1
    eta: float | Tensor = 0.3
    keywords: dict[str, Any] = {"backend": backend, **MODES[mode], **divisors(device)[divisor]}
    if extras == "every_tensor":
        eta = torch.rand(shape[0], device=device)
        keywords |= {"token_weights": torch.rand(shape[0], device=device), "return_stats": True, "softcap": 9.0}

    def call() -> None:
        logits = computed(values.clone())
        loss = fused_mixce_loss(logits, targets, eta, **keywords)
        loss = loss[0] if extras == "every_tensor" else loss
        (loss * 0.5).sum().backward()

    call()  # compiles and loads the kernels
    with without_synchronisation():
        call()


def test_validation_synchronises(backend: str, device: str) -> None:
    """`validate=True` reads targets and eta; and the test above could fail."""
    values, targets = inputs(4, 1000, device, FLOAT32)
    fused_mixce_loss(values, targets, backend=backend, validate=True)
    with pytest.raises(RuntimeError, match=SYNCHRONISES), without_synchronisation():
        fused_mixce_loss(values, targets, backend=backend, validate=True)
    with pytest.raises(ValueError, match="expected every entry of eta in"):
        fused_mixce_loss(values, targets, torch.tensor(1.5, device=device), backend=backend, validate=True)
    targets[2] = 1000
    with pytest.raises(IndexError, match="got 1000 in row 2"):
        fused_mixce_loss(values, targets, backend=backend, validate=True)


@EVERY_MODE
@SHAPES
def test_kernels_run_on_the_current_stream(backend: str, device: str, mode: str, shape: tuple[int, int]) -> None:
    """Results are there when the current stream has finished, while the default stream is still busy."""
    values, targets = inputs(*shape, device, BFLOAT16)
    keywords = {"reduction": "mean", "backend": backend, **MODES[mode]}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Compiles and loads the kernels, and leaves the stream memory that needs no more asking for.
        expected = tuple(tensor.cpu() for tensor in loss_and_grad(values, targets, 0.3, **keywords))
    torch.cuda.synchronize()
    torch.cuda._sleep(SPIN_CYCLES)
    idle = torch.cuda.Event()
    idle.record()
    with torch.cuda.stream(side):
        results = loss_and_grad(values, targets, 0.3, **keywords)
        got = tuple(tensor.cpu() for tensor in results)  # waits for this stream alone
    assert not idle.query(), "expected the default stream to be busy for longer"
    assert_same_bits(got, expected)
    torch.cuda.synchronize()


@EVERY_MODE
@SHAPES
def test_a_stream_that_waits_sees_the_logits(backend: str, device: str, mode: str, shape: tuple[int, int]) -> None:
    """Logits that another stream writes late, and results that a third one reads, in the order of `wait_stream`."""
    values, targets = inputs(*shape, device, BFLOAT16)
    keywords = {"reduction": "mean", "backend": backend, **MODES[mode]}
    expected = loss_and_grad(values, targets, 0.3, **keywords)
    logits = torch.zeros_like(values)
    writer, reader = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(writer):
        torch.cuda._sleep(SPIN_CYCLES // 10)
        logits.copy_(values)
    reader.wait_stream(writer)
    with torch.cuda.stream(reader):
        results = loss_and_grad(logits, targets, 0.3, **keywords)
    torch.cuda.current_stream().wait_stream(reader)
    assert_same_bits(tuple(tensor.clone() for tensor in results), expected)


@EVERY_MODE
def test_backward_from_another_stream(backend: str, device: str, mode: str) -> None:
    """Autograd runs it on the stream of its forward, and the caller's stream waits for it."""
    values, targets = inputs(6, 50_257, device, BFLOAT16)
    keywords = {"backend": backend, **MODES[mode]}
    logits = computed(values.clone())
    (expected,) = torch.autograd.grad(fused_mixce_loss(logits, targets, 0.3, **keywords), logits)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        logits = computed(values.clone())
        loss = fused_mixce_loss(logits, targets, 0.3, **keywords)
        torch.cuda._sleep(SPIN_CYCLES // 10)
    torch.cuda.current_stream().wait_stream(side)
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.equal(grad, expected)


@EVERY_MODE
@BOTH_DTYPES
def test_same_bits_on_streams_side_by_side(backend: str, device: str, mode: str, dtype: torch.dtype) -> None:
    """Calls that share the GPU do not share memory."""
    values, targets = inputs(6, 50_257, device, dtype)
    keywords = {"backend": backend, **MODES[mode]}
    expected = loss_and_grad(values, targets, 0.3, **keywords)
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams * 4:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(loss_and_grad(values, targets, 0.3, **keywords))
    torch.cuda.synchronize()
    for got in results:
        assert_same_bits(got, expected)


@pytest.fixture
def other_device(device: str) -> str:
    """A device that is not the current one."""
    if EMULATED:
        return device
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return "cuda:1"


@EVERY_MODE
@BOTH_DTYPES
@SHAPES
def test_logits_on_another_device(
    backend: str, device: str, other_device: str, mode: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """The kernels run where the logits are, on that device's stream, and the current device stays."""
    values, targets = inputs(*shape, device, dtype)
    keywords = {"backend": backend, **MODES[mode]}
    expected = loss_and_grad(values, targets, 0.3, **keywords)
    loss, grad = loss_and_grad(values.to(other_device), targets.to(other_device), 0.3, **keywords)
    assert str(loss.device) == str(grad.device) == other_device
    assert torch.cuda.current_device() == 0
    # Another model of GPU may add up in another order.
    torch.testing.assert_close(loss.cpu(), expected[0].cpu(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(grad.cpu(), expected[1].cpu(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    again = loss_and_grad(values, targets, 0.3, **keywords)
    assert_same_bits(again, expected)


@pytest.mark.parametrize(
    ("unable", "expected"), [((), "cuda"), (("cuda",), "triton"), (("cuda", "triton"), "reference")]
)
def test_preference(monkeypatch: pytest.MonkeyPatch, unable: tuple[str, ...], expected: str) -> None:
    """For CUDA tensors, by who can serve them; this needs no GPU."""
    for name, module in (("cuda", cuda), ("triton", triton)):
        reason = "it cannot" if name in unable else None
        monkeypatch.setattr(module, "unavailable", lambda _logits, reason=reason: reason)
    assert backends.resolve(None, SimpleNamespace(device=torch.device("cuda", 0))) == expected


@pytest.mark.gpu
@needs_gpu
def test_cuda_tensors_get_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a name: `cuda` where the extension has it and the GPU is new enough, else `triton`."""
    values, targets = inputs(4, 1000, "cuda", FLOAT32)
    best = "cuda" if native.HAS_CUDA and torch.cuda.get_device_capability() >= (8, 0) else "triton"
    assert backends.resolve(None, values) == best
    assert backends.resolve(None, values.cpu()) in ("cpu", "reference")
    assert_same_bits(loss_and_grad(values, targets), loss_and_grad(values, targets, backend=best))
    monkeypatch.setenv("MIXCE_BACKEND", "triton")
    assert backends.resolve(None, values) == "triton"
