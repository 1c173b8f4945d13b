"""The CUDA kernels and launchers without a GPU: compiled for the CPU, and run by the tests that all backends share."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from support.cuda_on_cpu_build import build_package, needs_gcc
from support.paths import TESTS

EMULATED = os.environ.get("MIXCE_TEST_BACKEND") == "cuda"
emulated = pytest.mark.skipif(not EMULATED, reason="runs in the processes of test_cuda_backend_passes_the_shared_tests")
# What an order of threads can change: numbers. The other files try what surrounds the kernels.
KERNELS = (
    "backends/test_cuda_kernels_on_cpu.py",
    "loss/test_loss.py",
    "loss/test_edge_cases.py",
    "loss/test_stats.py",
)
LOGPROBS = ("logprobs/test_logprobs.py", "logprobs/test_batch_invariance.py")
FILES = (
    *KERNELS,
    "loss/test_inplace.py",
    "loss/test_reductions.py",
    "loss/test_modules.py",
    "loss/test_autograd.py",
    "loss/test_weightings.py",
    *LOGPROBS,
)
PARALLEL = (
    "parallel/test_shard_kernels.py",
    "parallel/test_vocab_parallel.py",
    "logprobs/test_logprobs_parallel.py",
    "gpu/test_gpu_parallel.py",
)
LINEAR = (
    "linear/test_linear.py",
    "linear/test_linear_autograd.py",
    "linear/test_linear_training.py",
    "logprobs/test_linear_logprobs.py",
    "gpu/test_gpu_linear.py",
)
# Not the settings of the process that these tests run in.
INHERITED = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "MIXCE_"))}

pytestmark = [needs_gcc, pytest.mark.slow]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pybind11")
    return build_package(tmp_path_factory.mktemp("cuda_on_cpu"))


# Devices differ in clusters (none on sm_80), shared memory (the least on sm_120) and the number of multiprocessors.
@pytest.mark.skipif(EMULATED, reason="this is one of its processes")
@pytest.mark.parametrize(
    ("order", "device", "files", "at_least"),
    [
        ("forward", "sm_90", FILES, 1400),
        ("reverse", "sm_120", KERNELS, 900),
        ("shuffled:7", "sm_100", KERNELS, 900),
        ("shuffled:8", "sm_80", (*KERNELS[:2], "loss/test_compile.py", *PARALLEL, *LINEAR), 1000),
    ],
    ids=("forward", "reverse", "shuffled", "without_clusters"),
)
def test_cuda_backend_passes_the_shared_tests(
    package: Path, order: str, device: str, files: tuple[str, ...], at_least: int
) -> None:
    environment = INHERITED | {
        "PYTHONPATH": str(package),
        "MIXCE_CPU_TENSORS": "1",
        "MIXCE_TEST_BACKEND": "cuda",
        "CUDA_ON_CPU_ORDER": order,
        "CUDA_ON_CPU_DEVICE": device,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *files]
    run = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None, run.stdout
    assert int(passed.group(1)) >= at_least, run.stdout


@emulated
def test_extension_is_the_emulated_one() -> None:
    from mixce_kernels import _C

    assert os.environ["PYTHONPATH"] in _C.__file__
    assert hasattr(ctypes.CDLL(_C.__file__), "cuda_on_cpu_register")
    archs = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "sm_120": 120}
    assert _C.cuda_device(0)[0] == archs[os.environ["CUDA_ON_CPU_DEVICE"]]


@emulated
def test_launches_are_for_the_code_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """PTX of sm_80 runs on a later device, and has no clusters there; code for none of its kind is a reason."""
    from mixce_kernels import fused_mixce_loss
    from mixce_kernels.backends import cuda

    device_arch = cuda._device(0).arch
    monkeypatch.setenv("CUDA_ON_CPU_CODE", "80")
    cuda._device.cache_clear()
    assert cuda._device(0).arch == 80
    monkeypatch.delenv("CUDA_ON_CPU_CODE")
    cuda._device.cache_clear()
    assert cuda._device(0).arch == device_arch
    monkeypatch.setenv("CUDA_ON_CPU_CODE", "0")
    with pytest.raises(
        RuntimeError, match=r"it was built for other compute capabilities \(MIXCE_CUDA_ARCHS\) than cuda"
    ):
        fused_mixce_loss(torch.zeros(1, 2), torch.tensor([0]), backend="cuda")


def guarded(values: Tensor, *, at_end: bool) -> Tensor:
    """A copy between two inaccessible pages, in touch with the first or, at its end, with the second one."""
    size = values.numel() * values.element_size()
    inside = max(-(-size // mmap.PAGESIZE), 1) * mmap.PAGESIZE
    memory = mmap.mmap(-1, inside + 2 * mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mprotect = ctypes.CDLL(None).mprotect
    mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for page in (begin, begin + mmap.PAGESIZE + inside):
        assert mprotect(page, mmap.PAGESIZE, 0) == 0
    offset = mmap.PAGESIZE + (inside - size if at_end else 0)
    flat = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset)
    return flat.copy_(values.reshape(-1)).view(values.shape)


@emulated
@pytest.mark.parametrize("at_end", [False, True], ids=["begins_at_a_page", "ends_at_a_page"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
# One logit, less than a vector, odd sizes around a step of a block, and a row of several blocks.
@pytest.mark.parametrize("vocab_size", [1, 3, 1000, 1023, 2049, 8191, 50257])
def test_kernels_stay_within_their_tensors(vocab_size: int, dtype: torch.dtype, at_end: bool) -> None:
    from mixce_kernels.backends import cuda
    from mixce_kernels.backends.results import ENTROPY_STATE_WIDTH, STATE_WIDTH, STATS_WIDTH, EntropyGrad, Results
    from mixce_kernels.mixture import Mixture
    from mixce_kernels.options import TokenOptions, accumulate_dtype
    from mixce_kernels.reduction import Reduction
    from mixce_kernels.weightings import KINDS, Entropy

    real = accumulate_dtype(dtype)
    options = TokenOptions(label_smoothing=0.1, softcap=20.0)
    logits = torch.randn(3, vocab_size).to(dtype)
    targets = torch.tensor([0, vocab_size - 1, -100])
    eta, grad_loss = torch.rand(3, dtype=real), torch.rand(3, dtype=real)
    parameters = torch.rand(2, 3, dtype=real) + 0.5
    token_scale, weights = torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.bfloat16)

    def outcome(put: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """All that the backend's functions write, with every tensor where `put` copies it."""
        x, y, etas, upstream, scale = (put(tensor) for tensor in (logits, targets, eta, grad_loss, token_scale))
        mixture = Mixture(etas, 0.0, KINDS.index(Entropy), put(parameters))
        reductions = Reduction("none", put(weights)), Reduction("mean", put(weights), put(torch.tensor([7])))
        nothing = torch.full((3,), torch.nan, dtype=real)
        # Two with weights: a number for all tokens, and one each.
        results, again = (
            Results(
                put(nothing[:1]) if reduction.sums else put(nothing),
                put(nothing.double()),
                put(nothing.expand(STATE_WIDTH, 3)),
                put(nothing.expand(STATS_WIDTH, 3)),
                put(torch.zeros(3, dtype=torch.bool)),
                put(nothing),
                put(nothing.expand(ENTROPY_STATE_WIDTH, 3)),
            )
            for reduction in reductions
        )
        grad, scaled, of_both = (put(torch.full_like(logits, torch.nan)) for _ in range(3))
        temperature, grad_entropy = put(eta + 0.5), put(grad_loss * 0.5)
        cuda.forward(x, y, mixture, options, reductions[0], results, None, None)
        cuda.logits_grad(x, y, results.state, upstream, results.token_scale, options, grad)
        cuda.forward(x, y, mixture, options, reductions[0], results, None, None, temperature, may_split=False)
        entropy = EntropyGrad(grad_entropy, results.entropy_state)
        cuda.logits_grad(x, y, results.state, upstream, None, options, of_both, temperature, entropy)
        cuda.forward(x, y, mixture, options, reductions[1], again, scale, scaled)
        cuda.scale_rows_(scaled, upstream, y, -100)
        return [tensor.clone() for tensor in (x, *results, *again, grad, scaled, of_both)]

    for inside, outside in zip(outcome(partial(guarded, at_end=at_end)), outcome(Tensor.clone), strict=True):
        assert not inside.isnan().any()
        torch.testing.assert_close(inside, outside)
