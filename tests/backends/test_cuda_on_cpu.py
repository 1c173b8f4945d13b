"""The emulation of CUDA on the CPU finds what is wrong with a kernel: each planted fault is caught, its twin passes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from support.cuda_on_cpu_build import EMULATION, compile_program, needs_gcc

pytestmark = needs_gcc
ORDERS = ("forward", "reverse", "shuffled:7")
TWINS = ("correct", "faulty", "correct again")

# What ends the launch, whatever the order of threads, and a part of what is said of it.
REPORTED = {
    "early_exit": ("LaunchFailure", "divergent barrier: a thread "),
    "barrier_in_branch": ("LaunchFailure", "divergent barrier: a thread is in __syncthreads at planted_faults.cuh:"),
    "barrier_for_one_lane": ("LaunchFailure", "deadlock: 0 threads have exited, 2 wait in __syncthreads at planted"),
    "lane_not_in_mask": ("LaunchFailure", "the mask 0xffff lacks the lane "),
    "source_not_in_mask": ("LaunchFailure", "the mask 0xffff lacks the lane that is read, "),
    "exited_lane": ("LaunchFailure", "deadlock: 32 threads have exited, 32 wait in __shfl_xor_sync at planted"),
    "mixed_warp_operations": (
        "LaunchFailure",
        "deadlock: 0 threads have exited, 32 wait in __shfl_xor_sync at planted",
    ),
    "missing_last_cluster_barrier": ("IllegalAddress", "is in shared memory of a block that has exited, rank "),
    "no_such_rank": ("IllegalAddress", "in_cluster: no block of rank "),
    "cluster_wait_alone": ("LaunchFailure", "waits without having arrived"),
    "cluster_arrive_twice": ("LaunchFailure", "arrives a second time without a wait between"),
    "load_out_of_range": ("IllegalAddress", "load_streaming: address 0x"),
    "store_out_of_range": ("IllegalAddress", "store_streaming: address 0x"),
    "load_misaligned": ("MisalignedAddress", "load_streaming: misaligned address 0x"),
    "store_misaligned": ("MisalignedAddress", "store_streaming: misaligned address 0x"),
    "copy_misaligned": ("MisalignedAddress", "copy_async: misaligned address 0x"),
    "dereference_out_of_range": ("IllegalAddress", " is out of range"),
    "dereference_misaligned": ("MisalignedAddress", "misaligned address at planted_faults.cuh:"),
    "shared_out_of_range": ("IllegalAddress", "is out of range of shared memory"),
    "array_out_of_bounds": ("IllegalAddress", "index out of bounds at planted_faults.cuh:"),
    "stack_overflow": ("IllegalAddress", "stack overflow"),
    "trap": ("LaunchFailure", ""),
}
# What a GPU refuses to launch.
REFUSED = {
    "shared_memory_not_asked_for": ("InvalidValue", "50176 bytes of dynamic shared memory, 49152 are allowed"),
    "too_much_shared_memory_asked_for": ("InvalidValue", "233472 bytes of dynamic shared memory, sm_90 has 232448"),
    "too_many_threads": ("InvalidConfiguration", "a block of 1025 threads"),
    "no_blocks": ("InvalidConfiguration", "a grid of 0 x 1 x 1 blocks"),
    "large_cluster": ("InvalidClusterSize", "a cluster of 16 blocks"),
    "indivisible_grid": ("InvalidClusterSize", "the cluster does not divide the grid"),
}
# What no GPU reports: results are wrong.
SILENT = (
    "missing_barrier",
    "missing_first_cluster_barrier",
    "missing_copy_wait",
    "short_copy_wait",
    "unwritten_shared",
)


class Report(NamedTuple):
    """What became of a launch."""

    error: str
    wrong: int
    digest: str
    text: str


Reports = dict[tuple[str, str], Report]


def run(program: Path, *arguments: str, order: str = "forward", device: str = "sm_90", stdin: bytes = b"") -> bytes:
    environment = os.environ | {"CUDA_ON_CPU_ORDER": order, "CUDA_ON_CPU_DEVICE": device}
    command = [str(program), *arguments]
    return subprocess.run(command, input=stdin, env=environment, stdout=subprocess.PIPE, check=True, timeout=120).stdout


def run_all(program: Path, order: str = "forward", device: str = "sm_90") -> Reports:
    reports = {}
    for line in run(program, order=order, device=device).decode().splitlines():
        name, twin, error, wrong, digest, text = line.split("\t")
        reports[name, twin] = Report(error.removeprefix("cudaError"), int(wrong), digest, text)
    return reports


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cuda_on_cpu") / "planted_faults"
    compile_program(EMULATION / "planted_faults.cu", output)
    return output


@pytest.fixture(scope="module")
def reports(program: Path) -> dict[str, Reports]:
    """By the order of threads."""
    return {order: run_all(program, order) for order in ORDERS}


def test_every_fault_is_known(reports: dict[str, Reports]) -> None:
    names = [*REPORTED, *REFUSED, *SILENT]
    for of_order in reports.values():
        assert set(of_order) == {(name, twin) for name in names for twin in TWINS}


@pytest.mark.parametrize("name", [*REPORTED, *REFUSED, *SILENT])
def test_correct_twin_passes(reports: dict[str, Reports], name: str) -> None:
    """Also after its faulty twin."""
    for order in ORDERS:
        for twin in ("correct", "correct again"):
            report = reports[order][name, twin]
            assert (report.error, report.wrong) == ("cudaSuccess", 0), (order, report)


@pytest.mark.parametrize("name", REPORTED)
def test_fault_ends_the_launch(reports: dict[str, Reports], name: str) -> None:
    error, words = REPORTED[name]
    for order in ORDERS:
        report = reports[order][name, "faulty"]
        assert report.error == error, report
        assert words in report.text
        assert f"; kernel void {name}<true>(float const*, float*), block (" in report.text
        assert "), thread (" in report.text


@pytest.mark.parametrize("name", REFUSED)
def test_launch_is_refused(reports: dict[str, Reports], name: str) -> None:
    error, words = REFUSED[name]
    report = reports["forward"][name, "faulty"]
    assert report.error == error, report
    assert words in report.text


@pytest.mark.parametrize("name", SILENT)
def test_silent_fault_makes_results_wrong(reports: dict[str, Reports], name: str) -> None:
    for order in ORDERS:
        report = reports[order][name, "faulty"]
        assert report.error == "cudaSuccess", report
        assert report.wrong > 0, order


@pytest.mark.parametrize("name", ["missing_barrier", "missing_first_cluster_barrier"])
def test_missing_barrier_makes_results_depend_on_the_order(reports: dict[str, Reports], name: str) -> None:
    assert len({reports[order][name, "faulty"].digest for order in ORDERS}) == len(ORDERS)
    assert len({reports[order][name, "correct"].digest for order in ORDERS}) == 1


def test_no_clusters_before_sm_90(program: Path) -> None:
    reports = run_all(program, device="sm_80")
    report = reports["missing_last_cluster_barrier", "correct"]
    assert report.error == "NotSupported"
    assert report.text == "sm_80 has no thread-block clusters"
    assert reports["missing_barrier", "correct"].error == "cudaSuccess"


def test_unknown_settings_are_refused(program: Path) -> None:
    assert "not forward, reverse or shuffled:SEED" in run_all(program, order="random")["trap", "correct"].text
    assert "not sm_80, sm_90, sm_100 or sm_120" in run_all(program, device="sm_70")["trap", "correct"].text


def test_several_os_threads_launch_at_once(program: Path) -> None:
    run(program, "at_once")


def test_fibers_of_other_architectures(reports: dict[str, Reports], tmp_path: Path) -> None:
    output = tmp_path / "planted_faults"
    compile_program(EMULATION / "planted_faults.cu", output, "-DCUDA_ON_CPU_UCONTEXT")
    for key, report in run_all(output).items():
        assert report[:3] == reports["forward"][key][:3], key


def test_conversions_and_approximations(program: Path) -> None:
    """Against torch: sixteen-bit floats bit for bit, and approximate instructions close to their error bounds."""
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31, (20000,), generator=generator, dtype=torch.int64).to(torch.int32)
    ties = torch.arange(0, 2**31, 2**12, dtype=torch.int64).to(torch.int32)[:-8192:5]
    usual = torch.randn(20000, generator=generator) * 30
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.9, 65520.0, 6e-8, 1e-40, -126.0, 128.0])
    numbers = torch.cat([any_bits.view(torch.float32), ties.view(torch.float32), usual, special, special.flip(0)])
    first, second = pairs = numbers[: len(numbers) // 2 * 2].view(-1, 2).T

    output = bytearray(run(program, "convert", stdin=pairs.T.contiguous().numpy().tobytes()))
    words = torch.frombuffer(output, dtype=torch.int32).view(-1, 10)
    floats = words.view(torch.float32)
    for column, dtype in enumerate((torch.bfloat16, torch.float16)):
        torch.testing.assert_close(
            words[:, column].contiguous().view(dtype).view(-1, 2).T, pairs.to(dtype), rtol=0, atol=0, equal_nan=True
        )
        maximum = torch.fmax(first.to(dtype), second.to(dtype))
        both = torch.stack([maximum, maximum])
        packed = words[:, 2 + column].contiguous().view(dtype).view(-1, 2).T
        torch.testing.assert_close(packed, both, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(floats[:, 4:6].T, pairs.half().float(), rtol=0, atol=0, equal_nan=True)

    smallest = torch.finfo(torch.float32).smallest_normal
    flushed = torch.where(pairs.abs() < smallest, pairs * 0, pairs).double()
    for columns, exact, bound in ((slice(6, 8), flushed.exp2(), 2**-22), (slice(8, 10), 1 / flushed, 2**-23)):
        approximate = floats[:, columns].T.double()
        ordinary = (exact.abs() >= smallest * 1.001) & (exact.abs() < 3e38)
        error = (approximate / exact - 1)[ordinary].abs()
        assert bound / 2 < error.max() <= bound
        assert torch.equal(approximate[~ordinary].isnan(), exact[~ordinary].isnan())
        assert not approximate[exact.abs() < smallest * 0.999].any()
        assert approximate[exact.isinf()].isinf().all()
    assert (floats[:, 6:8].T[flushed == 0] == 1).all()
