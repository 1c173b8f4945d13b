"""The benchmark with a linear head, end to end at sizes that say nothing about speed: files, checks and goals."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench_linear import arguments, linear_jobs
from harness.allocators import CACHING, DEFAULT, WARM
from harness.contenders import plain_mixce
from harness.report import MACHINE, read_csv, write_csv
from linear.check import LinearInputs
from linear.contenders import (
    EAGER,
    MATMULS,
    OURS,
    OURS_MATERIALISED,
    TILES,
    LinearContender,
    LinearProgram,
    check,
    linear_contenders,
    matmuls,
)
from linear.goals import linear_verdicts
from linear.plan import GOAL_SHAPES, HALF_SHAPE, PEAKS, SWEEP_VOCABULARIES, linear_cells, linear_shapes, peak_cells
from linear.report import KEY, RESULTS, without_wrong
from mixce_kernels.backends import triton
from support.paths import BENCHMARKS
from vocab.contenders import plain_cross_entropy

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NOWHERE: dict[str, list[int]] = {"rows": [], "hidden_size": [], "vocab": []}
# Two that must be found out: the gradient of the weight doubled (all else is right), and one that raises.
EXTRA = """
import torch
from harness.contenders import plain_mixce
from linear.contenders import LinearContender

def doubled(hidden, weight, targets):
    return plain_mixce(hidden @ (2 * weight - weight.detach()).T, targets)

def raising(hidden, weight, targets):
    raise RuntimeError("no such kernel")

CONTENDERS = [
    LinearContender("doubled", "a wrong gradient", doubled),
    LinearContender("raising", "nothing", raising),
]
"""
NAMES = (MATMULS, OURS, OURS_MATERIALISED, EAGER, "doubled", "raising")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder and the standard output of one small run, all of its processes included."""
    folder = tmp_path_factory.mktemp("bench_linear")
    extra = folder / "extra.py"
    extra.write_text(EXTRA)
    sizes = ["--rows=40", "--hidden-size=24", "--vocab=1003", "--memory-vocab=64,128,256", "--threads=1"]
    others = [f"--contenders={','.join(NAMES)}", f"--extra-contenders={extra}", "--allocator=warm", "--device=cpu"]
    command = [sys.executable, str(BENCHMARKS / "bench_linear.py"), *sizes, *others, f"--out={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_csv_has_every_column_and_a_number_in_each_timed_row(run):
    rows = read_csv(run[0] / "linear.csv")
    assert list(rows[0]) == [*KEY, *RESULTS, *MACHINE]
    timed = [row for row in rows if row["status"] == "ok" and row["allocator"] == WARM]
    right = (MATMULS, OURS, OURS_MATERIALISED, EAGER)
    assert {(row["contender"], row["mode"]) for row in timed if row["contender"] in right} == {
        (name, mode) for name in right for mode in ("forward", "both")
    }
    for row in timed:
        assert 0 < float(row["q20_ms"]) <= float(row["median_ms"]) <= float(row["q80_ms"])
        assert int(row["repetitions"]) >= 5
        flops = (6 if row["mode"] == "both" else 2) * 40 * 24 * 1003
        assert float(row["gflops"]) == pytest.approx(flops / float(row["median_ms"]) / 1e6, rel=1e-4)
        assert float(row["times_matmuls"]) > 0
        assert row["torch"] == torch.__version__
    errors = [row for row in timed if row["contender"] != MATMULS]
    for name in ("loss", "grad_hidden", "grad_weight"):
        assert all(float(row[f"{name}_error"]) <= float(row[f"{name}_allowed"]) for row in errors)


def test_wrong_contenders_are_named_and_not_timed(run):
    rows = [row for row in read_csv(run[0] / "linear.csv") if row["contender"] in ("doubled", "raising")]
    status = {(row["contender"], row["mode"]): row["status"] for row in rows}
    assert status["doubled", "both"].startswith("wrong: the gradient of weight is off by")
    assert status["doubled", "forward"] == "ok"
    assert status["raising", "both"] == "failed: RuntimeError: no such kernel"
    assert not any(row["median_ms"] for row in rows if row["status"] != "ok")
    for text in (run[1], (run[0] / "linear.md").read_text()):
        assert "wrong: the gradient of weight is off by" in text
        assert "no such kernel" in text


def test_peaks_are_those_of_right_contenders_over_every_vocabulary(run):
    peaks = [row for row in read_csv(run[0] / "linear.csv") if row["allocator"] == PEAKS]
    assert {row["contender"] for row in peaks} == {MATMULS, OURS, OURS_MATERIALISED, EAGER}
    assert {row["vocab"] for row in peaks if row["rows"] != "40"} == {"64", "128", "256"}
    wrong = {"dtype": "float32", "contender": "one", "status": "wrong"}
    assert without_wrong([{**wrong, "status": "ok"}, {**wrong, "contender": "two"}], [wrong]) == [
        {**wrong, "contender": "two"}
    ]


def test_plots_are_drawn_from_the_csv_alone(run, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "linear.csv").write_bytes((run[0] / "linear.csv").read_bytes())
    command = [sys.executable, "-m", "linear.plot", str(tmp_path / "linear.csv")]
    subprocess.run(command, cwd=BENCHMARKS, check=True, timeout=120)
    for name in ("linear_time.png", "linear_memory.png"):
        assert (run[0] / name).stat().st_size > 0
        assert (tmp_path / name).stat().st_size > 0


def small_inputs(dtype: torch.dtype = torch.float32, rows: int = 70) -> LinearInputs:
    return LinearInputs(dtype, rows, 48, 777, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [7, 70])
@pytest.mark.parametrize(("function", "eta"), [(plain_mixce, 0.5), (plain_cross_entropy, 1.0)])
def test_check_accepts_the_plain_formula_and_finds_small_errors(dtype, rows, function, eta):
    inputs = small_inputs(dtype, rows)
    expected = inputs.expected(eta, rounds_logits=True)
    loss = function(inputs.hidden @ inputs.weight.T, inputs.masked_targets)
    hidden, weight = torch.autograd.grad(loss, (inputs.hidden, inputs.weight))
    assert expected.compare(loss).wrong() is None
    assert expected.compare(loss, hidden, weight).wrong() is None
    assert "the loss is off" in expected.compare(loss * 1.05, hidden, weight).wrong()
    assert "the gradient of hidden is off" in expected.compare(loss, hidden * 1.05, weight).wrong()
    assert "the gradient of weight is off" in expected.compare(loss, hidden, weight * 1.05).wrong()
    assert "the gradient of weight is off" in expected.compare(loss, hidden, weight.roll(1, 0)).wrong()
    spoiled = weight.clone()
    spoiled[-1, 3] = torch.nan
    assert "the gradient of weight is off" in expected.compare(loss, hidden, spoiled).wrong()


def test_only_a_contender_whose_nature_it_is_may_round_its_logits():
    """With bfloat16 inputs, rounding the logits is what the strict rule finds."""
    inputs = small_inputs(torch.bfloat16)

    def rounds(hidden, weight, targets):
        return plain_mixce(hidden @ weight.T, targets)

    for allowed in (True, False):
        one = LinearContender("one", "", rounds, rounds_logits=allowed)
        found = check(LinearProgram(one, "both"), inputs)
        assert (found.wrong() is None) == allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_yardstick_is_three_products_of_everything(dtype, monkeypatch):
    """Over chunks, of which the last is ragged."""
    monkeypatch.setattr("linear.contenders.rows_per_chunk", lambda *_: 32)
    inputs = small_inputs(dtype)
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    grad_hidden, grad_weight = matmuls(hidden, weight, gradients=True)
    logits = hidden.double() @ weight.double().T
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for found, expected in ((grad_hidden, logits @ weight.double()), (grad_weight, logits.T @ hidden.double())):
        # In bfloat16 the logits may be rounded to be an operand.
        atol = 1e-3 if dtype == torch.float32 else 2**-8 * expected.abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=atol)
    (last,) = matmuls(hidden, weight, gradients=False)
    torch.testing.assert_close(last[:6].double(), logits[64:], rtol=1e-5, atol=1e-4)


def measurement(contender: str, **others: object) -> dict[str, object]:
    dtype, rows, hidden_size, vocab = GOAL_SHAPES[0]
    shape = {"dtype": dtype, "rows": rows, "hidden_size": hidden_size, "vocab": vocab, "threads": 2, "allocator": WARM}
    return {**shape, "contender": contender, "mode": "both", "status": "ok", "device": "cpu", **others}


def test_goals_are_computed_from_the_csv(tmp_path):
    errors = {"loss_error": 1e-7, "loss_allowed": 4e-7, "grad_weight_error": 3e-8, "grad_weight_allowed": 2e-8}
    results = [
        measurement(OURS, median_ms=110.0, times_matmuls=1.1, **errors),
        measurement(EAGER, median_ms=165.0, times_matmuls=1.65),
        measurement(OURS, mode="forward", median_ms=400.0, times_matmuls=4.0),
        measurement(OURS, allocator=PEAKS, peak_bytes=96 * 2**20),
        # Another shape: only comparisons with others are goals there.
        measurement(OURS, vocab=11, median_ms=20.0, times_matmuls=2.0),
        measurement(OURS_MATERIALISED, vocab=11, median_ms=8.0, times_matmuls=0.8),
        measurement(EAGER, vocab=11, median_ms=10.0, times_matmuls=1.0),
        measurement(OURS, dtype="bfloat16", median_ms=14.0, times_matmuls=2.0),
        measurement(OURS_MATERIALISED, dtype="bfloat16", median_ms=5.0, times_matmuls=2.0),
        measurement(EAGER, dtype="bfloat16", median_ms=10.0, times_matmuls=2.0),
    ]
    write_csv(tmp_path / "linear.csv", results, {"device": "cpu"}, (*KEY, *RESULTS))
    found = linear_verdicts(read_csv(tmp_path / "linear.csv"))
    assert [(pytest.approx(one.measured), one.met) for one in found] == [
        (96.0, False),
        (1.1, True),
        (2.5, False),
        (1.4, True),
        (1.5, True),
        (0.5, False),
        (10 / 14, False),
        (0.25, True),
        (1.5, False),
    ]
    write_csv(tmp_path / "linear.csv", results, {"device": "NVIDIA H100"}, (*KEY, *RESULTS))
    assert linear_verdicts(read_csv(tmp_path / "linear.csv")) == []


def test_the_default_run_is_of_the_goals_shapes_in_both_regimes():
    peak_jobs, time_jobs = linear_jobs(arguments(["--device=cpu", "--threads=2"]))
    found = [[(c["dtype"], c["rows"], c["hidden_size"], c["vocab"]) for c in job.request["cells"]] for job in time_jobs]
    assert found == [[*GOAL_SHAPES, HALF_SHAPE]] * 2
    assert [job.request["cells"][0]["allocator"] for job in time_jobs] == [WARM, DEFAULT]
    assert ["MALLOC_MMAP_MAX_" in job.environment for job in time_jobs] == [True, False]
    (peak_job,) = peak_jobs
    assert len(peak_job.request["cells"]) == 2 * len(SWEEP_VOCABULARIES) + len(GOAL_SHAPES) + 1


def test_a_quick_run_is_of_what_the_goals_need():
    peak_jobs, time_jobs = linear_jobs(arguments(["--device=cpu", "--threads=2", "--quick"]))
    cells = [cell for job in (*peak_jobs, *time_jobs) for cell in job.request["cells"]]
    assert len(cells) == 3 * (len(GOAL_SHAPES) + 1)
    assert not any(cell["all"] for cell in cells)
    assert {one.name for one in linear_contenders(CPU)[0] if one.of_goals} == {MATMULS, OURS, OURS_MATERIALISED, EAGER}


def test_a_gpu_s_shapes_fit_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10**9, 80 * 10**9))
    shapes = linear_shapes(GPU, False, NOWHERE, [])
    assert shapes == [("bfloat16", 8192, 4096, 32000), ("bfloat16", 8192, 4096, 128256)]
    cells = linear_cells(GPU, shapes, [4], [WARM, DEFAULT], False)
    assert {cell.allocator for cell in cells} == {CACHING}
    assert [cell.vocab for cell in peak_cells(cells, [], 4)] == [32000, 128256]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**10, 10**10))
    assert [n for _, n, _, _ in linear_shapes(GPU, False, NOWHERE, [])] == [4096, 1024]


def test_who_cannot_run_is_named_with_its_reason():
    able, left_out = linear_contenders(CPU)
    assert [one.name for one in able][:2] == [MATMULS, OURS]
    assert left_out[TILES] == "on CPU tensors it would be interpreted, and that time is no speed"
    assert "liger-kernel" in left_out
    named = {one.name.removesuffix("-compiled") for one in able} | set(left_out)
    assert {"cut-cross-entropy", "F.linear_cross_entropy"} <= named


def test_tiles_take_part_on_a_gpu(monkeypatch):
    monkeypatch.setattr(triton, "unavailable", lambda logits: None if logits.is_cuda else "of CUDA tensors")
    with FakeTensorMode():
        able, left_out = linear_contenders(GPU)
    assert [one.name for one in able][:4] == [MATMULS, OURS, TILES, OURS_MATERIALISED]
    assert "liger-kernel" in {*left_out, *(one.name for one in able)}


def test_too_few_rounds_are_refused(capsys):
    with pytest.raises(SystemExit):
        arguments(["--rounds=3"])
    assert "expected at least 5 --rounds, got 3" in capsys.readouterr().err
