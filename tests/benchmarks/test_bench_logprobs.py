"""The benchmark of log-probabilities, end to end at sizes that say nothing about speed: files, checks and goals."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from bench_logprobs import arguments, logprob_jobs
from harness.allocators import CACHING, WARM
from harness.report import MACHINE, read_csv, write_csv
from logprobs.check import HiddenInputs, LogitsInputs, Oracle, plain_results
from logprobs.contenders import (
    ALONE,
    MODES,
    WITHOUT_GRADIENT,
    LogprobContender,
    LogprobProgram,
    check,
    level_of,
    logprob_contenders,
    programs_of,
)
from logprobs.goals import logprob_verdicts
from logprobs.plan import GOAL_SHAPE, HIDDEN, LOGITS, Sizes, logprob_cells
from logprobs.report import ERROR_NAMES, KEY, RESULTS, logprob_summary, logprob_table, with_peaks
from support.paths import BENCHMARKS

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# Two that must be found out: the entropy's gradient is left out (all else is right), and one that raises.
EXTRA = """
import torch
from logprobs.check import plain_results
from logprobs.contenders import LogprobContender

def detached(logits, targets):
    logprobs, entropy = plain_results(logits.float(), targets)
    return logprobs, entropy.detach() + 0 * logprobs

def raising(hidden, weight, targets):
    raise RuntimeError("no such kernel")

CONTENDERS = [
    LogprobContender("detached", "a wrong gradient", "logits", {"forward": detached, "both": detached}),
    LogprobContender("raising", "nothing", "hidden", {"forward": raising}),
]
"""
WRONG = ("detached", "raising")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder and the standard output of one small run, all of its processes included."""
    folder = tmp_path_factory.mktemp("bench_logprobs")
    extra = folder / "extra.py"
    extra.write_text(EXTRA)
    names = [one.name for one in logprob_contenders(CPU, [extra])[0] if not one.compiled]
    sizes = ["--rows=40", "--hidden-size=24", "--vocab=1003", "--threads=1", "--budget=0.01"]
    others = [f"--contenders={','.join(names)}", f"--extra-contenders={extra}", "--device=cpu", f"--out={folder}"]
    command = [sys.executable, str(BENCHMARKS / "bench_logprobs.py"), *sizes, *others]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def rows_of(run, level, dtype):
    rows = read_csv(run[0] / "logprobs.csv")
    return [row for row in rows if (row["level"], row["dtype"]) == (level, dtype)]


def test_csv_has_every_column_and_a_number_in_each_timed_row(run):
    rows = read_csv(run[0] / "logprobs.csv")
    assert list(rows[0]) == [*KEY, *RESULTS, *MACHINE]
    timed = [row for row in rows if row["median_ms"]]
    assert {(row["level"], row["dtype"]) for row in timed} == {
        (LOGITS, "float32"), (HIDDEN, "float32"), (HIDDEN, "bfloat16"),
    }  # fmt: skip
    for row in timed:
        assert row["allocator"] == WARM
        assert 0 < float(row["q20_ms"]) <= float(row["median_ms"]) <= float(row["q80_ms"])
        assert int(row["repetitions"]) >= 5
        assert row["torch"] == torch.__version__


def test_every_contender_is_timed_in_each_of_its_modes(run):
    expected = {(LOGITS, name, name) for name in ("copy", "read")}
    for program in programs_of(logprob_contenders(CPU)[0], MODES):
        if not program.contender.compiled:
            expected.add((level_of(program.contender), program.contender.name, program.mode))
    timed = [row for level in (LOGITS, HIDDEN) for row in rows_of(run, level, "float32") if row["median_ms"]]
    found = {(row["level"], row["contender"], row["mode"]) for row in timed if row["contender"] not in WRONG}
    assert found == expected
    assert (LOGITS, "eager", "logprobs_both") in found
    assert all(float(row["times_copy"]) > 0 for row in timed if row["level"] == LOGITS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("level", "leaves"), [(LOGITS, ("logits",)), (HIDDEN, ("hidden", "weight"))])
def test_errors_of_each_result_and_gradient_are_in_the_csv(run, level, leaves, dtype):
    rows = [row for row in rows_of(run, level, dtype) if row["contender"] not in ("copy", "read", *WRONG)]
    assert rows
    for row in rows:
        expected = {"logprobs"} if row["mode"] in ALONE else {"logprobs", "entropy"}
        if row["mode"] not in WITHOUT_GRADIENT:
            expected |= {f"grad_{leaf}" for leaf in leaves}
        if row["contender"].endswith("-stats"):
            expected = {"grad_logits"}
        assert {name for name in ERROR_NAMES if row[f"{name}_error"]} == expected
        assert all(float(row[f"{name}_error"]) <= float(row[f"{name}_allowed"]) for name in expected)


def test_wrong_contenders_are_named_and_not_timed(run):
    status = {(row["contender"], row["mode"]): row for row in rows_of(run, LOGITS, "float32")}
    status |= {(row["contender"], row["mode"]): row for row in rows_of(run, HIDDEN, "float32")}
    assert status["detached", "both"]["status"].startswith("wrong: grad_logits is off by")
    assert status["detached", "forward"]["status"] == "ok"
    assert status["raising", "forward"]["status"] == "failed: RuntimeError: no such kernel"
    assert not any(row["median_ms"] or row["peak_bytes"] for row in status.values() if row["status"] != "ok")
    for text in (run[1], (run[0] / "logprobs.md").read_text()):
        assert "wrong: grad_logits is off by" in text
        assert "no such kernel" in text


def test_tables_hold_every_measurement(run):
    rows = read_csv(run[0] / "logprobs.csv")
    text, markdown = logprob_table(rows), logprob_summary(rows, "")
    for row in rows:
        assert row["contender"] in text
        assert row["contender"] in markdown
    for title in ("from logits, bfloat16 40 x 1003, 1 thread", "from hidden states, float32 40 x 24 x 1003, 1 thread"):
        assert title in text
        assert title in markdown


def inputs_of(level, dtype, rows=70):
    if level == LOGITS:
        return LogitsInputs(dtype, rows, 777, CPU)
    return HiddenInputs(dtype, rows, 48, 777, CPU)


def plain_program(level, mode="both"):
    def function(*tensors):
        *leaves, targets = tensors
        logits = leaves[0] if level == LOGITS else leaves[0] @ leaves[1].T
        return plain_results(logits.float(), targets, 1 if mode in ALONE else 2)

    return LogprobProgram(LogprobContender("one", "", level, {mode: function}, rounds=level == HIDDEN), mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [7, 70])
@pytest.mark.parametrize("mode", ["both", "logprobs_both", "forward"])
@pytest.mark.parametrize("level", [LOGITS, HIDDEN])
def test_check_accepts_the_plain_formula_and_finds_small_errors(level, mode, rows, dtype):
    inputs, program = inputs_of(level, dtype, rows), plain_program(level, mode)
    oracle = Oracle(inputs)
    assert check(program, inputs, oracle).wrong() is None
    results = []
    for step in program.steps(inputs, inputs.targets, results):
        step()
    count = 1 if mode in ALONE else 2
    names = [*("logprobs", "entropy")[:count], *(f"grad_{name}" for name in inputs.leaf_names)]
    for i, name in enumerate(names[: len(results)]):
        # A whole row is another's, one value is not a number, or all are off by some.
        spoiled = results[i].detach().clone()
        spoiled[-1] = torch.nan
        for wrong in (results[i] * 1.1, results[i].roll(1, 0), spoiled):
            others = [*results[:i], wrong, *results[i + 1 :]]
            assert f"wrong: {name} is off" in oracle.compare(others, count, rounds=level == HIDDEN).wrong()


def test_only_a_contender_whose_nature_it_is_may_round():
    """In float32 nobody is allowed more for it."""
    inputs = inputs_of(LOGITS, torch.bfloat16)
    oracle = Oracle(inputs)
    results = plain_results(inputs.pristine, inputs.targets)
    assert oracle.compare(results, 2, rounds=True).wrong() is None
    assert "wrong: logprobs is off" in oracle.compare(results, 2).wrong()
    single = inputs_of(LOGITS, torch.float32)
    rounded = plain_results(single.pristine.bfloat16(), single.targets)
    assert "wrong: logprobs is off" in Oracle(single).compare(rounded, 2, rounds=True).wrong()


def test_a_result_too_few_is_refused():
    inputs = inputs_of(LOGITS, torch.float32)
    with pytest.raises(ValueError, match="expected logprobs, entropy and no or all gradients, got 1 tensors"):
        Oracle(inputs).compare(plain_results(inputs.pristine, inputs.targets, 1), 2)


def measurement(contender, mode, median_ms=None, **others):
    dtype, rows, vocab = GOAL_SHAPE
    key = {"level": LOGITS, "dtype": dtype, "rows": rows, "hidden_size": None, "vocab": vocab, "threads": 1}
    return {
        **key,
        "allocator": WARM,
        "contender": contender,
        "mode": mode,
        "status": "ok",
        "median_ms": median_ms,
    } | others


def test_goals_are_computed_from_the_csv(tmp_path):
    times = [
        measurement("fused-cpu", "forward", 12.0),
        measurement("fused-cpu-stats", "forward", 10.0),
        measurement("fused-cpu", "both", 20.0),
        measurement("eager", "both", 90.0),
        # Other shapes, types and levels decide nothing.
        measurement("fused-cpu", "forward", 12.0, rows=8),
        measurement("fused-cpu-stats", "forward", 1.0, rows=8),
        measurement("fused-cpu", "both", 12.0, level=HIDDEN, hidden_size=768),
        measurement("eager", "both", 12.0, level=HIDDEN, hidden_size=768),
    ]
    peaks = [
        measurement("fused-cpu", "forward", peak_bytes=4096),
        measurement("fused-cpu", "both", peak_bytes=4 * 1024 * 50257 // 10),
    ]
    write_csv(tmp_path / "logprobs.csv", with_peaks(times, peaks), {}, (*KEY, *RESULTS))
    found = [(one.measured, one.met) for one in logprob_verdicts(read_csv(tmp_path / "logprobs.csv"))]
    assert [met for _, met in found] == [False, True, True, False]
    assert [value for value, _ in found] == pytest.approx([1.2, 4.5, 4096 / (4 * 1024 * 50257), 0.1], rel=1e-4)


def test_the_default_run_is_of_the_goals_shape_and_both_levels():
    peak_jobs, time_jobs = logprob_jobs(arguments(["--device=cpu"]))
    names = ("level", "dtype", "rows", "hidden_size", "vocab", "timed")
    cells = [tuple(cell[name] for name in names) for job in time_jobs for cell in job.request["cells"]]
    timed = [
        (LOGITS, "float32", 1024, None, 50257),
        *((HIDDEN, dtype, 256, 768, 50257) for dtype in ("float32", "bfloat16")),
    ]
    assert sorted(cells, key=str) == sorted(
        [*((*shape, True) for shape in timed), (LOGITS, "bfloat16", 64, None, 50257, False)], key=str
    )
    for cell in (cell for job in time_jobs for cell in job.request["cells"]):
        assert cell["threads"] == (1 if cell["level"] == LOGITS else torch.get_num_threads())
        assert cell["allocator"] == WARM
    peaks = [tuple(cell[name] for name in names[:5]) for job in peak_jobs for cell in job.request["cells"]]
    assert sorted(peaks, key=str) == sorted(timed, key=str)


def test_types_that_are_named_are_timed():
    (cell,) = logprob_cells(CPU, [LOGITS], Sizes(["bfloat16"], 0, 0, 0), [2], [WARM])
    assert (cell.rows, cell.threads, cell.timed) == (1024, 2, True)


def test_a_gpu_s_shapes_fit_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10**9, 80 * 10**9))
    cells = logprob_cells(GPU, [LOGITS, HIDDEN], Sizes([], 0, 0, 0), [4], [WARM])
    assert [(cell.level, cell.dtype, cell.rows, cell.hidden_size, cell.vocab) for cell in cells] == [
        (LOGITS, "float32", 4096, None, 50257),
        (LOGITS, "bfloat16", 4096, None, 50257),
        (HIDDEN, "float32", 8192, 4096, 32000),
        (HIDDEN, "bfloat16", 8192, 4096, 32000),
    ]
    assert all(cell.allocator == CACHING and cell.timed for cell in cells)


def test_a_trl_that_is_missing_is_left_out_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    able, left_out = logprob_contenders(CPU)
    assert left_out["trl"] == ("expected trl >= 1.16, < 2, which is not installed: pip install 'mixce_kernels[trl]'")
    assert not any(one.name.startswith("trl") for one in able)
    assert {"fused-linear", "eager-linear", "eager", "torch.compile"} <= {one.name for one in able}


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs the extra 'trl'")
def test_trl_takes_part_where_it_is_installed():
    able, left_out = logprob_contenders(CPU)
    assert "trl" not in left_out
    assert {level_of(one) for one in able if one.name.startswith("trl")} == {LOGITS, HIDDEN}


def test_a_level_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        arguments(["--levels=losses"])
    assert "expected --levels to be of logits,hidden, got losses" in capsys.readouterr().err
