"""The benchmark end to end at sizes that say nothing about speed: files, checks and goals."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

from check import Inputs  # noqa: E402
from contenders import contenders, plain_cross_entropy, plain_mixce  # noqa: E402
from goals import OURS, verdicts  # noqa: E402
from report import KEY, MACHINE, RESULTS, read_csv, summary, table, with_peaks, write_csv  # noqa: E402

CPU = torch.device("cpu")
# Two that must be found out: the weight differentiated with the rest (the loss is right), and one that raises.
EXTRA = """
import torch
from contenders import Contender

def undetached(logits, targets):
    valid = targets != -100
    index = torch.where(valid, targets, 0).unsqueeze(-1)
    nll = -torch.log_softmax(logits.float(), -1).gather(-1, index).squeeze(-1)
    return ((0.5 + 0.5 * torch.exp(-nll)) * nll * valid).sum() / valid.sum()

def raising(logits, targets):
    raise RuntimeError("no such kernel")

CONTENDERS = [
    Contender("undetached", "a wrong gradient", {"forward": undetached, "both": undetached}),
    Contender("raising", "nothing", {"forward": raising}),
]
"""


def benchmark(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The benchmark's command, run to its end, with its files in `folder`."""
    fixed = ["--device=cpu", "--threads=1", "--budget=0.01", f"--out={folder}"]
    command = [sys.executable, str(BENCHMARKS / "bench_vocab.py"), *fixed, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder and the standard output of one small run, all of its processes included."""
    folder = tmp_path_factory.mktemp("benchmark")
    extra = folder / "extra.py"
    extra.write_text(EXTRA)
    names = [one.name for one in contenders(CPU, [extra])[0] if not one.compiled]
    sizes = ["--vocab=1003", "--rows=40", "--dtypes=float32,bfloat16"]
    done = benchmark(folder, *sizes, f"--extra-contenders={extra}", f"--contenders={','.join(names)}")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_csv_has_every_column_and_a_number_in_each_timed_row(run):
    rows = read_csv(run[0] / "bench.csv")
    assert list(rows[0]) == [*KEY, *RESULTS, *MACHINE]
    timed = [row for row in rows if row["status"] == "ok"]
    assert {row["allocator"] for row in timed} == {"warm", "default"}
    assert {row["dtype"] for row in timed} == {"float32", "bfloat16"}
    for row in timed:
        assert 0 < float(row["q20_ms"]) <= float(row["median_ms"]) <= float(row["q80_ms"])
        assert int(row["repetitions"]) >= 7
        bytes_per_second = float(row["traffic_bytes"]) / (float(row["median_ms"]) / 1e3)
        assert float(row["gbps"]) == pytest.approx(bytes_per_second / 1e9, rel=1e-4)
        assert row["cpu"]
        assert row["torch"] == torch.__version__


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
def test_every_baseline_is_timed(run, mode):
    timed = {(row["contender"], row["mode"]) for row in read_csv(run[0] / "bench.csv") if row["status"] == "ok"}
    assert {("eager", mode), ("F.cross_entropy", mode), ("copy", "copy")} <= timed


def test_ours_is_timed_in_every_mode(run):
    if OURS not in {one.name for one in contenders(CPU)[0]}:
        pytest.skip("the native extension is not installed")
    modes = {row["mode"] for row in read_csv(run[0] / "bench.csv") if row["contender"] == OURS and row["median_ms"]}
    assert modes == {"forward", "backward", "both", "inplace", "grad_in_forward", "grad_in_forward_inplace"}


def test_a_wrong_contender_is_reported_and_not_timed(run):
    rows = [row for row in read_csv(run[0] / "bench.csv") if row["contender"] in ("undetached", "raising")]
    wrong = [row for row in rows if row["mode"] == "both"]
    failed = [row for row in rows if row["contender"] == "raising"]
    assert wrong
    assert failed
    assert all(row["status"].startswith("wrong: the gradient is off by") for row in wrong)
    assert all(row["status"] == "failed: RuntimeError: no such kernel" for row in failed)
    assert not any(row["median_ms"] for row in [*wrong, *failed])
    # Its loss is right, and so its forward is timed.
    assert all(row["median_ms"] for row in rows if row["contender"] == "undetached" and row["mode"] == "forward")
    assert not [row for row in rows if row["mode"] == "backward"]
    for text in (run[1], (run[0] / "summary.md").read_text()):
        assert "wrong: the gradient is off by" in text
        assert "no such kernel" in text


def test_plots_are_drawn_from_the_csv_alone(run, tmp_path):
    pytest.importorskip("matplotlib")
    assert (run[0] / "time.png").stat().st_size > 0
    (tmp_path / "bench.csv").write_bytes((run[0] / "bench.csv").read_bytes())
    subprocess.run([sys.executable, str(BENCHMARKS / "plot.py"), str(tmp_path / "bench.csv")], check=True, timeout=120)
    assert (tmp_path / "time.png").stat().st_size > 0


def test_the_report_names_both_allocators_and_what_is_computed(run):
    assert "allocator warm: malloc keeps freed memory (MALLOC_MMAP_MAX_=0" in run[1]
    assert "allocator default: malloc untouched" in run[1]
    assert "F.cross_entropy: cross-entropy alone" in run[1]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks come from Linux's /proc")
def test_peak_memory_is_measured(tmp_path):
    """The plain formula in float32 holds at least log-softmax and its gradient beyond the logits, in both at once."""
    sizes = ["--vocab=32003", "--rows=128", "--dtypes=float32"]
    assert benchmark(tmp_path, *sizes, "--modes=both", "--allocator=default", "--contenders=eager").returncode == 0
    (peak,) = (float(r["peak_over_logits"]) for r in read_csv(tmp_path / "bench.csv") if r["contender"] == "eager")
    assert 2 <= peak <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [7, 70])
@pytest.mark.parametrize(("function", "eta"), [(plain_mixce, 0.5), (plain_cross_entropy, 1.0)])
def test_check_accepts_the_plain_formula_and_finds_small_errors(dtype, rows, function, eta):
    inputs = Inputs(dtype, rows, 777, CPU)
    expected = inputs.expected(eta)
    loss = function(inputs.logits, inputs.masked_targets)
    (grad,) = torch.autograd.grad(loss, inputs.logits)
    assert expected.compare(loss, grad).wrong() is None
    assert "the loss is off" in expected.compare(loss * (1 + 1e-4), grad).wrong()
    assert "the gradient is off" in expected.compare(loss, grad * 1.05).wrong()
    assert "the gradient is off" in expected.compare(loss, grad.roll(1, 0)).wrong()
    spoiled = grad.clone()
    spoiled[-1, 3] = torch.nan
    assert "the gradient is off" in expected.compare(loss, spoiled).wrong()


def measurement(contender, mode, median_ms, **others):
    key = {"dtype": "float32", "rows": 1024, "vocab": 50257, "threads": 1, "allocator": "warm"}
    return {**key, "contender": contender, "mode": mode, "status": "ok", "median_ms": median_ms, **others}


def test_goals_are_computed_from_the_csv(tmp_path):
    times = [
        measurement(OURS, "forward", 7.0),
        measurement("torch.compile", "forward", 10.0),
        measurement(OURS, "both", 10.0),
        measurement("torch.compile", "both", 23.0),
        measurement("eager", "both", 21.0),
        measurement(OURS, "inplace", 10.0, allocator="default"),
        measurement("eager", "both", 61.0, allocator="default"),
        measurement(OURS, "grad_in_forward_inplace", 5.0, times_copy=1.5),
    ]
    peaks = [measurement(OURS, "forward", None, peak_bytes=1000), measurement(OURS, "both", None, peak_bytes=4e8)]
    write_csv(tmp_path / "bench.csv", with_peaks(times, peaks), {})
    found = [(one.measured, one.met) for one in verdicts(read_csv(tmp_path / "bench.csv"))]
    logits_bytes = 4 * 1024 * 50257
    assert [met for _, met in found] == [False, False, True, True, True, False]
    assert [value for value, _ in found] == pytest.approx(
        [0.7, 2.1, 1.5, 6.1, 1000 / logits_bytes, 4e8 / logits_bytes], rel=1e-4
    )


def test_tables_hold_every_measurement(run):
    rows = read_csv(run[0] / "bench.csv")
    text, markdown = table(rows), summary(rows, "")
    for row in rows:
        assert row["contender"] in text
        assert row["contender"] in markdown
    assert "bfloat16 40 x 1003, 1 thread, allocator warm" in text


def test_a_mode_that_does_not_exist_is_refused(tmp_path):
    done = benchmark(tmp_path, "--modes=sideways")
    assert done.returncode == 2
    assert "got sideways" in done.stderr


def test_liger_and_cut_cross_entropy_give_a_reason_on_the_cpu():
    left_out = contenders(CPU)[1]
    assert {"liger-kernel", "cut-cross-entropy", "fused-triton"} <= set(left_out)
    if importlib.util.find_spec("liger_kernel") is None:
        assert left_out["liger-kernel"] == "it is not installed"
