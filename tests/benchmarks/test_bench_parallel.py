"""The benchmark of the vocabulary-parallel loss, end to end at sizes that say nothing about speed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from bench_parallel import arguments, parallel_jobs
from harness.contenders import IGNORE_INDEX, plain_mixce
from harness.goals import verdicts_text
from harness.report import MACHINE, read_csv, write_csv
from parallel.check import ParallelInputs, columns_of
from parallel.contenders import (
    LOSS_PARALLEL,
    LOSS_PARALLEL_HALF,
    OURS,
    OURS_CE,
    OURS_SMOOTHED,
    THREE_ALL_REDUCES,
    parallel_contenders,
)
from parallel.goals import parallel_verdicts
from parallel.plan import DTYPES, RANKS, SHAPES, SMALL_CALL
from parallel.report import KEY, RESULTS, joined, parallel_summary
from support.paths import BENCHMARKS

ROWS, VOCAB = 40, 1003
# That must be found out: one whose gradient is doubled in the columns of rank 1 alone (all else is right), one that
# takes each rank's columns for the whole vocabulary, and one that raises.
EXTRA = """
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness.contenders import IGNORE_INDEX
from parallel.baseline import three_all_reduces
from parallel.contenders import ParallelContender

def doubled(logits, targets, place):
    if dist.get_rank() == 1:
        logits = torch.where(logits.isinf(), logits, 2 * logits - logits.detach())
    return three_all_reduces(logits, targets, place.group, place.vocab_start)

def alone(logits, targets, place):
    held = (targets - place.vocab_start).clamp(0, logits.shape[-1] - 1)
    return F.cross_entropy(logits, torch.where(targets == IGNORE_INDEX, targets, held), ignore_index=IGNORE_INDEX)

def raising(logits, targets, place):
    raise RuntimeError("no such kernel")

CONTENDERS = [
    ParallelContender("doubled", "a wrong gradient", doubled, eta=1.0),
    ParallelContender("alone", "a wrong loss", alone, eta=1.0),
    ParallelContender("raising", "nothing", raising),
]
"""
RIGHT = (OURS, OURS_CE, OURS_SMOOTHED, LOSS_PARALLEL, LOSS_PARALLEL_HALF, THREE_ALL_REDUCES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder and the standard output of one small run on two ranks, all of its processes included."""
    folder = tmp_path_factory.mktemp("bench_parallel")
    extra = folder / "extra.py"
    extra.write_text(EXTRA)
    sizes = [f"--rows={ROWS}", f"--vocab={VOCAB}", "--ranks=2", "--dtypes=bfloat16", "--rounds=5"]
    command = [sys.executable, str(BENCHMARKS / "bench_parallel.py"), *sizes, f"--extra-contenders={extra}"]
    done = subprocess.run([*command, f"--out={folder}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_csv_has_every_column_and_a_number_in_each_timed_row(run):
    rows = read_csv(run[0] / "parallel.csv")
    assert list(rows[0]) == [*KEY, *RESULTS, *MACHINE]
    timed = [row for row in rows if row["contender"] in RIGHT]
    assert {(row["contender"], row["mode"]) for row in timed} == {
        (name, mode) for name in RIGHT for mode in ("forward", "backward", "both")
    }
    for row in timed:
        assert row["status"] == "ok"
        assert 0 < float(row["q20_ms"]) <= float(row["median_ms"]) <= float(row["q80_ms"])
        assert int(row["repetitions"]) >= 5
        assert row["columns"] == "512"
        assert row["torch"] == torch.__version__
        if row["mode"] != "backward":
            assert float(row["loss_error"]) <= float(row["loss_allowed"])
            assert float(row["grad_error"]) <= float(row["grad_allowed"])
        if row["mode"] == "both":
            assert row["peak_bytes"]


def test_what_is_sent_is_counted(run):
    """To the byte: three numbers a token and a header of 12 bytes; gloo sends more, and never less."""
    rows = {(row["contender"], row["mode"]): row for row in read_csv(run[0] / "parallel.csv")}
    for name, collectives, sent in (
        (OURS, 1, 12 + 12 / ROWS),
        (OURS_CE, 1, 12 + 12 / ROWS),
        (OURS_SMOOTHED, 1, 16 + 12 / ROWS),
        (LOSS_PARALLEL, 3, 12),
        (LOSS_PARALLEL_HALF, 3, 10),
        (THREE_ALL_REDUCES, 3, 12),
    ):
        for mode in ("forward", "both"):
            row = rows[name, mode]
            assert int(row["collectives"]) == collectives
            assert float(row["sent_per_token"]) == pytest.approx(sent)
            if row["wire_per_token"]:
                # Of two ranks, each sends as much as its collectives take, by any algorithm.
                assert float(row["wire_per_token"]) >= 0.9 * sent
        assert float(rows[name, "backward"]["sent_per_token"]) == 0


def test_wrong_contenders_are_named_and_not_timed(run):
    rows = [row for row in read_csv(run[0] / "parallel.csv") if row["contender"] in ("doubled", "alone", "raising")]
    status = {(row["contender"], row["mode"]): row["status"] for row in rows}
    assert status["doubled", "both"].startswith("wrong: the gradient is off by")
    assert status["doubled", "both"].endswith("(rank 1)")
    assert status["doubled", "forward"] == "ok"
    assert status["alone", "forward"].startswith("wrong: the loss is off by")
    assert status["raising", "both"] == "failed: RuntimeError: no such kernel (rank 0)"
    assert not any(row["median_ms"] or row["peak_bytes"] for row in rows if row["status"] != "ok")
    for text in (run[1], (run[0] / "parallel.md").read_text()):
        assert "wrong: the gradient is off by" in text
        assert "no such kernel" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 3])
def test_check_holds_a_rank_s_columns_to_the_whole_vocabulary(dtype, rank):
    """Rank 3's last columns are padding."""
    inputs = ParallelInputs(dtype, 70, VOCAB, 4, rank)
    whole = inputs.few[inputs.index].float().requires_grad_()
    loss = plain_mixce(whole, inputs.masked_targets)
    (grad,) = torch.autograd.grad(loss, whole)
    columns = columns_of(VOCAB, 4)
    grad = F.pad(grad, (0, 4 * columns - VOCAB))[:, rank * columns : (rank + 1) * columns].to(dtype)
    expected = inputs.expected(0.5, 0.0, False)
    assert expected.compare(loss, grad).wrong() is None
    assert "the loss is off" in expected.compare(loss * 1.05).wrong()
    assert "the gradient is off" in expected.compare(loss, grad * 1.5).wrong()
    assert "the gradient is off" in expected.compare(loss, grad.roll(1, 1)).wrong()
    if rank == 3:
        spoiled = grad.clone()
        spoiled[0, -1] = 1.0
        assert "the gradient is off" in expected.compare(loss, spoiled).wrong()


def test_only_a_contender_whose_nature_it_is_may_round_its_log_probabilities():
    inputs = ParallelInputs(torch.bfloat16, 128, VOCAB, 1, 0)
    logits = inputs.few[inputs.index].requires_grad_()
    loss = F.cross_entropy(logits, inputs.masked_targets, ignore_index=IGNORE_INDEX)
    (grad,) = torch.autograd.grad(loss, logits)
    grad = F.pad(grad, (0, columns_of(VOCAB, 1) - VOCAB))
    assert inputs.expected(1.0, 0.0, True).compare(loss, grad).wrong() is None
    assert "the loss is off" in inputs.expected(1.0, 0.0, False).compare(loss, grad).wrong()


def test_every_rank_holds_as_many_columns():
    assert [columns_of(50257, ranks) for ranks in (1, 2, 4)] == [50304, 25216, 12672]
    assert columns_of(128256, 2) == 64128


def test_the_default_run_is_of_both_types_and_numbers_of_ranks():
    peak_jobs, time_jobs = parallel_jobs(arguments([]))
    cells = [[tuple(cell.values()) for cell in job.request["cells"]] for job in time_jobs]
    assert cells == [
        [*((dtype, *shape, ranks) for dtype in DTYPES for shape in SHAPES), (*SMALL_CALL, ranks)] for ranks in RANKS
    ]
    assert [job.request["cells"] for job in peak_jobs] == [job.request["cells"] for job in time_jobs]
    assert all(job.environment["OMP_NUM_THREADS"] == "1" for job in (*peak_jobs, *time_jobs))
    assert ["MALLOC_MMAP_MAX_" in job.environment for job in (*peak_jobs, *time_jobs)] == [False] * 2 + [True] * 2
    assert LOSS_PARALLEL_HALF not in [one.name for one in parallel_contenders(torch.float32)]


def measurement(contender: str, mode: str = "both", **others: object) -> dict[str, object]:
    rows, vocab = SHAPES[0]
    cell = {"dtype": "float32", "rows": rows, "vocab": vocab, "ranks": 2, "columns": columns_of(vocab, 2)}
    return {**cell, "contender": contender, "mode": mode, "status": "ok", **others}


def test_goals_are_computed_from_the_csv(tmp_path):
    errors = {"loss_error": 1e-7, "loss_allowed": 4e-7, "grad_error": 3e-8, "grad_allowed": 2e-8}
    results = [
        measurement(OURS, "forward", sent_per_token=17.0, collectives=2, wire_per_token=30.0),
        measurement(THREE_ALL_REDUCES, "forward", wire_per_token=20.0),
        measurement(OURS_SMOOTHED, "forward", sent_per_token=16.0, collectives=1),
        measurement(OURS, "backward", sent_per_token=0.0, collectives=0),
        measurement(OURS, median_ms=100.0, peak_bytes=1e6, peak_over_logits=0.01, **errors),
        measurement(OURS_CE, median_ms=80.0),
        measurement(LOSS_PARALLEL, median_ms=200.0),
        measurement(THREE_ALL_REDUCES, median_ms=40.0),
        measurement(OURS_CE, "backward", median_ms=30.0),
        measurement(THREE_ALL_REDUCES, "backward", median_ms=15.0),
        # Of other sizes the share of memory decides nothing.
        measurement(OURS, rows=8, peak_bytes=1e6, peak_over_logits=0.5),
    ]
    write_csv(tmp_path / "parallel.csv", results, {"device": "cpu"}, (*KEY, *RESULTS))
    found = parallel_verdicts(read_csv(tmp_path / "parallel.csv"))
    assert [(pytest.approx(one.measured), one.met) for one in found] == [
        (17.0, False),
        (16.0, True),
        (2.0, False),
        (0.0, True),
        (1.5, False),
        (0.01, True),
        (2.5, True),
        (0.5, False),
        (0.5, False),
        (0.25, True),
        (1.5, False),
    ]


def test_peaks_stand_beside_the_times_of_right_contenders():
    times = [measurement(OURS, median_ms=1.0), {**measurement("wrong"), "status": "wrong: by far"}]
    peaks = [measurement(name, peak_bytes=7, peak_over_logits=0.5) for name in (OURS, "wrong")]
    assert [one["peak_bytes"] for one in joined(times, peaks)] == [7, None]


def test_the_summary_is_the_one_of_the_csv():
    rows = read_csv(BENCHMARKS / "results" / "parallel.csv")
    goals = verdicts_text(parallel_verdicts(rows))
    assert (BENCHMARKS / "results" / "parallel.md").read_text() == parallel_summary(rows, goals)


def test_too_few_rounds_are_refused(capsys):
    with pytest.raises(SystemExit):
        arguments(["--rounds=3"])
    assert "expected at least 5 --rounds, got 3" in capsys.readouterr().err
