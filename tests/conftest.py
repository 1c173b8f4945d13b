"""What every test shares: the backends to try, and memory that shows when a kernel forgets to write it."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Or the helpers' assertions would say nothing but that they failed.
pytest.register_assert_rewrite("support")

from mixce_kernels import backends
from mixce_kernels.backends import native
from support.progress import Progress
from support.watched import Watched

# Interpreted and compiled kernels do not mix in one process: `TRITON_INTERPRET=1 pytest` tries that backend alone, on
# CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# `MIXCE_TEST_BACKEND=cuda MIXCE_CPU_TENSORS=1 pytest` tries that backend alone, on CPU tensors, under an emulation.
EMULATED = "triton" if INTERPRETED else os.environ.get("MIXCE_TEST_BACKEND")
if INTERPRETED:
    os.environ["MIXCE_CPU_TENSORS"] = "1"
# cuBLAS asks for it where algorithms must be deterministic, as they must in `poisoned_memory`.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _on_a_gpu(name: str) -> Any:
    marks = [pytest.mark.gpu, needs_gpu]
    if torch.cuda.is_available():
        reason = backends.get(name).unavailable(torch.empty(1, 1, device="cuda"))
        marks.append(pytest.mark.skipif(reason is not None, reason=f"backend {name!r} cannot serve: {reason}"))
    return pytest.param(name, marks=marks)


# Those that run on a GPU or, alone, under an emulation.
GPU_BACKENDS: list[Any] = [EMULATED] if EMULATED else [_on_a_gpu(name) for name in ("triton", "cuda")]
BACKENDS: list[Any] = [EMULATED] if EMULATED else ["reference", "cpu"]
if torch.cuda.is_available() and not EMULATED:
    BACKENDS += GPU_BACKENDS

if EMULATED == "cuda":
    # The emulation then knows of every access whether it is one to the call's own tensors.
    _emulation = ctypes.CDLL(native._C.__file__)
    Watched(
        lambda tensor: _emulation.cuda_on_cpu_register(
            ctypes.c_void_p(tensor.untyped_storage().data_ptr()), ctypes.c_size_t(tensor.untyped_storage().nbytes())
        ),
        lambda tensor: _emulation.cuda_on_cpu_unregister(ctypes.c_void_p(tensor.untyped_storage().data_ptr())),
    )


# The folders with tests of what is built on the losses.
BEYOND_THE_CORE = ("benchmarks", "docs", "integrations", "packaging")


def pytest_configure(config: pytest.Config) -> None:
    """One line of progress where pytest is quiet, as in `make test`."""
    if config.getoption("verbose") < 0 and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(config), "one-line-progress")


# The files that take minutes, so that no worker is left alone with one at the end.
LONGEST = ("triton_interpreter", "cuda_kernels_on_cpu", "triton_compiled", "oldest_releases", "packaging", "compile")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is beyond the core, puts long files first, and thins out what an interpreter takes minutes for."""
    for item in items:
        if item.path.parent.name in BEYOND_THE_CORE:
            item.add_marker(pytest.mark.slow)
    names = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else len(names))
    if INTERPRETED:
        items[:] = [item for item in items if not _is_spared(item)]


# How many parameters each test of these files has tried by now.
_tried: Counter[str] = Counter()


def _is_spared(item: pytest.Item) -> bool:
    """Whether an interpreter skips it: of the tests of decided cases, which others pass, every fourth is tried."""
    if item.path.name not in ("test_edge_cases.py", "test_inplace.py", "test_reductions.py", "test_weightings.py"):
        return False
    name = f"{item.path.name}:{getattr(item, 'originalname', item.name)}"
    _tried[name] += 1
    return _tried[name] % 4 != 1


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that this process can try."""
    return request.param


@pytest.fixture(params=[backend for backend in BACKENDS if backend != "reference"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Every backend but the plain one: those that own their operators and their memory."""
    return request.param


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where the backend under test runs."""
    names = {request.getfixturevalue(name) for name in ("backend", "kernels") if name in request.fixturenames}
    return "cuda" if names & {"triton", "cuda"} and not EMULATED else "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fills fresh tensors with NaN (integers with their largest value): an entry nobody writes shows. Seeds, too."""
    torch.manual_seed(0)
    monkeypatch.delenv("MIXCE_BACKEND", raising=False)
    monkeypatch.delenv("MIXCE_CPU_ISA", raising=False)
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filling


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for the test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL reports no usage where it takes this for continuous integration; and a bfloat16 run leaves no trace."""
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
