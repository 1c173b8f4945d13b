"""The benchmark end to end at sizes that say nothing about speed: files, checks and goals."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench_vocab import arguments, jobs_of
from harness import measure
from harness.allocators import CACHING, DEFAULT, WARM
from harness.contenders import plain_mixce
from harness.report import MACHINE, machine, read_csv, write_csv
from mixce_kernels.backends import cuda, triton
from mixce_kernels.weightings import PROBABILITY
from support.paths import BENCHMARKS
from vocab import worker
from vocab.check import Inputs
from vocab.contenders import COPY, READ, Contender, contenders, plain_cross_entropy
from vocab.goals import OURS, verdicts
from vocab.plan import Cell, cells, shapes
from vocab.programs import Program
from vocab.report import KEY, RESULTS, summary, table, with_peaks

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# Two that must be found out: the weight differentiated with the rest (the loss is right), and one that raises.
EXTRA = """
import torch
from vocab.contenders import Contender

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
    assert {("eager", mode), ("F.cross_entropy", mode), ("copy", "copy"), ("read", "read")} <= timed


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
    subprocess.run(
        [sys.executable, "-m", "vocab.plot", str(tmp_path / "bench.csv")], cwd=BENCHMARKS, check=True, timeout=120
    )
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
    expected = inputs.expected(eta, PROBABILITY)
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
    write_csv(tmp_path / "bench.csv", with_peaks(times, peaks), {}, (*KEY, *RESULTS))
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


def test_who_needs_a_gpu_gives_a_reason_on_the_cpu():
    left_out = contenders(CPU)[1]
    assert {"liger-kernel", "cut-cross-entropy"} <= set(left_out)
    for name, way in (("fused-triton", "interpreted"), ("fused-cuda", "emulated")):
        assert left_out[name] == f"on CPU tensors it would be {way}, and that time is no speed"
    if importlib.util.find_spec("liger_kernel") is None:
        assert left_out["liger-kernel"] == "it is not installed"


def test_a_loss_of_the_logits_type_may_be_rounded_to_it():
    inputs = Inputs(torch.bfloat16, 70, 777, CPU)
    expected = inputs.expected(1.0, PROBABILITY)
    loss = plain_cross_entropy(inputs.logits, inputs.masked_targets)
    assert expected.compare(loss.bfloat16()).wrong() is None
    assert "the loss is off" in expected.compare((loss * 1.05).bfloat16()).wrong()


# A GPU without one: its clock, its memory and its name are made up, and its tensors are the CPU's.


@pytest.fixture
def gpu(monkeypatch):
    """What the benchmark uses of torch.cuda, by a clock in ms that the tests advance; `log` has the calls in order."""
    gpu = SimpleNamespace(now=0.0, tick=0.0, log=[], allocated=0, peak=0, free=80 * 10**9)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            gpu.log.append("record")
            gpu.now += gpu.tick
            self.at = gpu.now

        def elapsed_time(self, later):
            assert gpu.log[-1] == "synchronize"
            return later.at - self.at

    class Flush:
        def zero_(self):
            gpu.log.append("flush")

    def inputs(dtype, rows, vocab, device=GPU):
        assert device == GPU
        made = Inputs(dtype, rows, vocab, CPU)
        made.device = GPU
        made.pristine.new_empty = lambda size, dtype: Flush()
        restore = made.restore
        made.restore = lambda: (gpu.log.append("restore"), restore())
        return made

    gpu.inputs = inputs
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: gpu.log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: gpu.log.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: gpu.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: gpu.peak)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu.free, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    return gpu


def timed_loss(gpu):
    """A loss that takes 2 ms, and 5 ms for its gradient."""

    class Timed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            gpu.log.append("forward")
            gpu.now += 2
            ctx.shape = logits.shape
            return logits.sum()

        @staticmethod
        def backward(ctx, grad_loss):
            gpu.log.append("backward")
            gpu.now += 5
            return grad_loss.expand(ctx.shape)

    return lambda logits, targets: Timed.apply(logits)


def test_events_time_each_part_on_a_gpu(gpu):
    loss = timed_loss(gpu)
    one = Contender("timed", "", {"forward": loss, "both": loss})
    programs = [Program(one, mode, loss) for mode in ("forward", "both")]
    *_, timings = measure.time_rounds(programs, gpu.inputs(torch.float32, 8, 50), 0.0, warm=False)
    assert [timing.parts for timing in timings] == [[[0.002] * 7], [[0.002] * 7, [0.005] * 7]]
    before, after = ["restore", "flush", "record"], ["record", "synchronize"]
    a_round = [*before, "forward", *after, *before, "forward", "record", "backward", *after]
    assert gpu.log == a_round * (measure.MIN_WARMUP_ROUNDS_GPU + 7)


def test_peak_memory_of_a_gpu_is_beyond_the_inputs(gpu):
    def loss(logits, targets):
        gpu.log.append("forward")
        gpu.peak = 350
        return logits.sum()

    gpu.allocated = 100
    program = Program(Contender("one", "", {}), "both", loss)
    assert measure.peak_growth(program, gpu.inputs(torch.float32, 8, 50)) == 250
    assert gpu.log == ["restore", "synchronize", "reset", "forward", "synchronize"]


def test_a_gpu_s_worker_reports_both_backends(gpu, monkeypatch):
    """The copy and each contender in each mode, one tick of the clock a part."""
    gpu.tick = 1.0
    losses = dict.fromkeys(("forward", "both", "inplace", "grad_in_forward_inplace"), plain_mixce)
    ours = [Contender(name, "MixCE", losses) for name in ("fused-triton", "fused-cuda")]
    monkeypatch.setattr(worker, "contenders", lambda device, extra_files: (ours, {}))
    monkeypatch.setattr(worker, "Inputs", gpu.inputs)
    cell = Cell("bfloat16", 40, 1003, torch.get_num_threads(), CACHING)
    job = {"device": "cuda", "modes": [*losses, "backward"], "contenders": [], "extra_files": [], "budget": 0.0}
    found = {}
    for peak in (False, True):
        output = io.StringIO()
        worker.VocabWorker({**job, "peak": peak}, output).run(cell)
        lines = map(json.loads, output.getvalue().splitlines())
        found[peak] = [line["result"] for line in lines if "result" in line]
    times = {(row["contender"], row["mode"]): row for row in with_peaks(found[False], found[True])}
    assert set(times) == {(COPY, COPY), (READ, READ)} | {
        (one.name, mode) for one in ours for mode in (*losses, "backward")
    }
    for name in ("fused-triton", "fused-cuda"):
        assert {times[name, mode]["status"] for mode in losses} == {"ok"}
        medians = {mode: times[name, mode]["median_ms"] for mode in ("forward", "backward", "both")}
        assert medians == pytest.approx({"forward": 1, "backward": 1, "both": 2})
        # The forward moves half of the copy's bytes in the same time, both directions three halves in twice of it.
        shares = [times[name, mode]["percent_of_copy"] for mode in ("forward", "backward", "both")]
        assert shares == pytest.approx([50, 100, 75])
        shares = [times[name, mode]["percent_of_read"] for mode in ("forward", "backward", "both")]
        assert shares == pytest.approx([100, 200, 150])
        assert times[name, "both"]["peak_bytes"] == 0


def test_a_gpu_s_shapes_fit_its_memory(gpu):
    table = shapes(GPU, False, [], [], 0)
    assert {rows for _, rows, _ in table} == {4096}
    assert {vocab for _, _, vocab in table} == {32000, 50257, 128256}
    gpu.free = 8 * 10**9
    assert shapes(GPU, False, [128256], ["bfloat16"], 0) == [("bfloat16", 2048, 128256)]
    planned = cells(GPU, table, [1, 4], [WARM, DEFAULT], False)
    assert planned == [Cell(*shape, 4, CACHING, weightings=shape == table[0]) for shape in table]
    peak_jobs, time_jobs = jobs_of(arguments(["--device=cuda"]), planned)
    assert [len(job.request["cells"]) for job in (*peak_jobs, *time_jobs)] == [len(table), len(table)]
    assert not any(name.startswith("MALLOC_") for name in time_jobs[0].environment)


def test_both_gpu_backends_take_part_on_cuda_tensors(monkeypatch):
    for backend in (cuda, triton):
        monkeypatch.setattr(backend, "unavailable", lambda logits: None if logits.is_cuda else "of CUDA tensors")
    with FakeTensorMode():
        able, left_out = contenders(GPU)
    assert {"fused-cuda", "fused-triton", "eager", "torch.compile", "F.cross_entropy"} <= {one.name for one in able}
    assert left_out["fused-cpu"].startswith("it runs on CPU tensors")


def test_a_gpu_s_csv_names_it(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    write_csv(tmp_path / "bench.csv", [measurement("fused-cuda", "forward", 1.0)], machine(GPU), (*KEY, *RESULTS))
    rows = read_csv(tmp_path / "bench.csv")
    assert (rows[0]["device"], rows[0]["cuda"]) == ("NVIDIA H100", "13.0")
    assert summary(rows, "").startswith("NVIDIA H100, ")
    assert "cuda 13.0" in summary(rows, "")
    assert verdicts(rows) == []
