"""What benchmarks/count_kernels.py computes and writes, on counts that are made up: nothing is compiled or run."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from gpu_kernels.counts import (
    BARS,
    OPTIONS,
    TARGETS,
    Case,
    Count,
    cases,
    compiled_cases,
    count_of,
    targets,
    verdicts,
)
from gpu_kernels.hot_loops import HotLoop
from gpu_kernels.machine_code import KINDS
from gpu_kernels.model import (
    CHIPS,
    Code,
    code_of,
    limits,
    modelled,
    most_instructions,
    not_of_memory_alone,
    plain_limits,
)
from gpu_kernels.registers import ARCHITECTURES, Registers, blocks_by_registers, held_rows, resource_usage
from gpu_kernels.tables import markdown, read_csv, write_csv, write_registers_csv
from support.paths import BENCHMARKS

A100, H100, B200 = CHIPS
FACTS = {"nvcc": "13.0", "commit": "0123abc"}
PLAIN = Count(
    backend="cuda",
    target="sm_90",
    dtype="bfloat16",
    rows=64,
    vocab=50257,
    option="",
    step="forward",
    kernels="forward_kernel",
    programs=128,
    unique_loaded_bytes=2.0,
    loaded_bytes=2.1,
    unique_stored_bytes=0.001,
    stored_bytes=0.001,
    vector_bytes=2.09,
    special_functions=1.03,
    instructions=7.5,
    warp_instructions=0.25,
)
GRADIENT = replace(
    PLAIN,
    step="grad_in_forward",
    unique_stored_bytes=2.0,
    stored_bytes=2.0,
    vector_bytes=4.08,
    special_functions=2.05,
    instructions=15.5,
    warp_instructions=0.5,
)


def loops_of(kernel: str, variant: str, part: str, instructions: int, backend: str = "cuda") -> list[HotLoop]:
    """A loop for 10 logits on every architecture: half of its instructions are FP32, and 12 are special functions."""
    fp32 = instructions // 2
    kinds = dict.fromkeys(KINDS, 0) | {"special": 12, "fp32": fp32, "integer": instructions - 12 - fp32}
    return [HotLoop(backend, target, kernel, "bfloat16", variant, part, 10, kinds) for target in TARGETS]


HELD, TWICE = "gradient, held in shared memory", "gradient, second read"
LOOPS = [
    *loops_of("forward_kernel", "", "statistics", 60),
    *loops_of("forward_kernel", "softcap", "statistics", 260),
    *loops_of("forward_kernel", "moments", "statistics", 100),
    *loops_of("forward_kernel", HELD, "statistics", 66),
    *loops_of("forward_kernel", HELD, "gradient", 62),
    *loops_of("forward_kernel", TWICE, "statistics", 64),
    *loops_of("forward_kernel", TWICE, "gradient", 62),
    *loops_of("forward_kernel", TWICE, "gradient aligned otherwise", 80),
    *loops_of("logits_grad_kernel", "", "gradient", 58),
    *loops_of("logits_grad_kernel", "", "gradient aligned otherwise", 78),
    *loops_of("logits_grad_kernel", "entropy", "gradient", 82),
    *loops_of("forward_kernel", "V = 50257", "statistics", 70, "triton"),
    *loops_of("forward_kernel", "softcap, V = 50257", "statistics", 400, "triton"),
    *loops_of("forward_kernel", "V = 50257, gradient", "whole row", 160, "triton"),
    *loops_of("forward_kernel", "V = 128256, gradient", "statistics", 72, "triton"),
    *loops_of("forward_kernel", "V = 128256, gradient", "gradient", 74, "triton"),
    *loops_of("logits_grad_kernel", "V = 50257", "gradient", 68, "triton"),
]
USAGE = """
arch = sm_80
 Function _ZN5mixce18logits_grad_kernelINS_4HalfELb1EEEvNS_9RowParamsENS_6LaunchE:
  REG:80 STACK:8 SHARED:0 LOCAL:16 CONSTANT[2]:8 CONSTANT[0]:544 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_100a
 Function _ZN5mixce14forward_kernelIdLb0ELb1ELNS_5Pass2E2EEEvNS_9RowParamsENS_13ForwardParamsENS_6LaunchE:
  REG:128 STACK:0 SHARED:64 LOCAL:0 CONSTANT[0]:544
 Function _ZN5mixce12merge_kernelINS_8BFloat16ELb0ELb0EEEvNS_9RowParamsENS_13ForwardParamsENS_6LaunchE:
  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:544
 Function _ZN5mixce17scale_rows_kernelIfEEvNS_9RowParamsENS_6LaunchE:
  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:544
 Function _ZN5mixce23localize_targets_kernelENS_9RowParamsENS_12LocalTargetsE:
  REG:20 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:544
"""


def test_counts_are_summed_over_launches_and_divided_by_logits():
    one = {
        "unique_loaded_bytes": 100,
        "global_loaded_bytes": 120,
        "unique_stored_bytes": 50,
        "global_stored_bytes": 60,
        "global_loads": {4: 2, 16: 7},
        "global_stores": {16: 3},
        "special_ops": 70,
        "instructions": 500,
        "warp_instructions": 20,
    }
    other = {**one, "global_loads": {8: 1}, "global_stores": {}}
    launches = [("_ZN5mixce14forward_kernelIfEEv", 8, one), ("merge_kernel", 2, other), ("merge_kernel", 2, other)]
    count = count_of(Case("cuda", "sm_90", rows=2, vocab=25), "forward", launches)
    assert count.kernels == "forward_kernel + 2 x merge_kernel"
    assert count.programs == 8
    assert count.unique_loaded_bytes == 6.0
    assert count.loaded_bytes == pytest.approx(7.2)
    assert count.vector_bytes == pytest.approx(16 * 10 / 50)
    assert count.vector_share == pytest.approx(160 / (360 + 180))
    assert count.instructions == 30.0


def test_each_bar_can_be_missed():
    met = [ok for _, _, ok in verdicts([PLAIN, GRADIENT])]
    assert len(met) == 12
    assert all(met)
    for figure, bad in (
        ("unique_loaded_bytes", 2.02),
        ("loaded_bytes", 2.13),
        ("stored_bytes", 0.02),
        ("vector_bytes", 2.0),
        ("special_functions", 1.09),
        ("instructions", 8.01),
    ):
        changed = replace(PLAIN, **{figure: bad})
        missed = {bar.figure for _, bar, ok in verdicts([changed]) if not ok}
        assert ("vector_share" if figure == "vector_bytes" else figure) in missed
    assert all(ok for _, _, ok in verdicts([replace(PLAIN, backend="triton", instructions=10.9)]))


def test_few_rows_and_rows_held_with_options_have_bars_of_their_own():
    few, held = replace(PLAIN, backend="triton", rows=8), replace(GRADIENT, backend="triton", option="softcap", rows=16)
    assert [bar.figure for _, bar, ok in verdicts([few]) if ok] == ["programs", "unique_loaded_bytes", "loaded_bytes"]
    assert [bar.figure for _, bar, ok in verdicts([replace(few, programs=127)]) if not ok] == ["programs"]
    for target in ("sm_90", "sm_100"):
        changed = replace(held, target=target)
        assert [bar.figure for _, bar, ok in verdicts([changed]) if ok] == ["loaded_bytes"]
        assert [ok for _, _, ok in verdicts([replace(changed, loaded_bytes=4.0)])] == [False]
    assert verdicts([replace(held, target="sm_80"), replace(held, option="z_loss")]) == []


def test_the_gradient_of_entropies_has_bars_of_its_own():
    forward = replace(PLAIN, option="entropy", instructions=13.9)
    assert all(ok for _, _, ok in verdicts([forward]))
    assert [bar.figure for _, bar, ok in verdicts([replace(forward, instructions=14.1)]) if not ok] == ["instructions"]
    assert verdicts([replace(forward, target="sm_80")]) == []


def test_only_the_plain_cases_are_held_to_bars():
    others = [
        replace(PLAIN, option="softcap"),
        replace(PLAIN, dtype="float32"),
        replace(PLAIN, target="sm_80"),
        replace(PLAIN, rows=16),
        replace(PLAIN, step="scale_rows"),
    ]
    assert verdicts(others) == []


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_cases_cover_the_bars_and_every_option(backend):
    found = cases(backend, "sm_90")
    assert {step for case in found for step in case.steps} == {*BARS, "scale_rows"}
    assert {case.vocab for case in found if not case.option and case.dtype == "bfloat16"} == {50257, 128256}
    assert {case.option for case in found} == set(OPTIONS)
    assert [case.steps for case in found if case.option == "entropy"] == [("forward", "backward")]
    assert {case.dtype for case in found} == {"bfloat16", "float32", "float16", "float64"}
    assert {case.target for case in compiled_cases(backend)} == set(ARCHITECTURES)
    few = [case for case in found if case.multiprocessors > case.rows]
    assert [(case.rows, case.vocab, case.multiprocessors, case.steps) for case in few] == [
        (8, 128256, 132, ("forward",))
    ]


def test_rows_that_triton_holds_with_options_are_counted_at_both_vocabularies():
    found = [case for target in targets("triton") for case in cases("triton", target)]
    for target in ("sm_90", "sm_100"):
        for vocab in (50257, 128256):
            options = {
                case.option
                for case in found
                if (case.target, case.vocab) == (target, vocab) and "grad_in_forward" in case.steps
            }
            assert options >= {"label_smoothing", "return_stats", "softcap"}
    assert targets("cuda") == ("sm_90", "sm_80")


def test_limits_by_hand():
    times = limits(H100, memory_bytes=2.0, code=Code(instructions=8.0, fp32=3.0, special=1.0))
    assert times.memory == pytest.approx(2 / (0.9 * 3.35), rel=1e-9)
    assert times.issue == pytest.approx(0.25e12 / (4 * 132 * 1.83e9))
    assert times.fp32 == pytest.approx(3e12 / (128 * 132 * 1.83e9))
    assert times.special == pytest.approx(1e12 / (16 * 132 * 1.83e9))
    assert (times.largest, times.time) == ("memory", times.memory)
    assert limits(B200, 2.0, Code(16.0, 3.0, 1.0)).largest == "issue"
    assert limits(B200, 1.0, Code(3.0, 1.0, 2.0)).largest == "special functions"
    # An A100 has half the lanes of the others.
    assert limits(A100, 0.0, Code(7.0, 4.0, 0.5)).largest == "FP32"
    assert limits(H100, 0.0, Code(7.0, 4.0, 0.5)).largest == "issue"


def test_issue_takes_as_long_as_memory_at_the_most_instructions():
    for chip in CHIPS:
        times = limits(chip, 2.0, Code(most_instructions(chip, 2.0), 0.0, 0.0))
        assert times.issue == pytest.approx(times.memory)
    assert most_instructions(H100, 2.0) == pytest.approx(20.5, abs=0.05)
    assert most_instructions(B200, 2.0) == pytest.approx(9.7, abs=0.05)


TWO_KERNELS = "forward_kernel + merge_kernel + logits_grad_kernel"


@pytest.mark.parametrize(
    ("changes", "instructions"),
    [
        ({}, 6.0),
        ({"option": "softcap"}, 26.0),
        ({"option": "return_stats"}, 10.0),
        ({"option": "label_smoothing"}, 10.0),
        ({"option": "z_loss"}, 6.0),
        ({"step": "backward"}, 5.8),
        ({"step": "backward", "option": "label_smoothing"}, 5.8),
        ({"step": "backward", "option": "gradient aligned otherwise"}, 7.8),
        ({"option": "entropy"}, 10.0),
        ({"step": "backward", "option": "entropy"}, 8.2),
        ({"step": "grad_in_forward"}, 6.6 + 6.2),
        ({"step": "grad_in_forward", "loaded_bytes": 4.0}, 6.4 + 6.2),
        ({"step": "grad_in_forward", "loaded_bytes": 6.0, "option": "gradient aligned otherwise"}, 6.4 + 8.0),
        # Few rows, or rows that nothing holds: two kernels.
        ({"step": "grad_in_forward", "kernels": TWO_KERNELS}, 6.0 + 5.8),
        ({"step": "grad_in_forward", "kernels": TWO_KERNELS, "option": "gradient aligned otherwise"}, 6.0 + 7.8),
        ({"backend": "triton"}, 7.0),
        ({"backend": "triton", "option": "eta tensor"}, 7.0),
        ({"backend": "triton", "option": "softcap"}, 40.0),
        ({"backend": "triton", "step": "backward", "option": "return_stats"}, 6.8),
        ({"backend": "triton", "step": "grad_in_forward"}, 16.0),
        ({"backend": "triton", "step": "grad_in_forward", "vocab": 128256}, 7.2 + 7.4),
    ],
)
def test_a_step_takes_the_hot_loops_of_its_kernels(changes, instructions):
    code = code_of(replace(PLAIN, **changes), LOOPS, "sm_100")
    assert code.instructions == pytest.approx(instructions)
    assert code.fp32 == pytest.approx(instructions / 2)


def test_a_pair_of_float32_takes_two_lanes():
    (single,) = loops_of("forward_kernel", "", "statistics", 60)[:1]
    pairs = replace(single, kinds=single.kinds | {"fp32": 10, "fp32x2": 10, "integer": 28})
    assert code_of(PLAIN, [pairs], single.target) == Code(instructions=6.0, fp32=3.0, special=1.2)


def test_a_step_whose_loops_are_unknown_is_an_error():
    with pytest.raises(AssertionError, match="no hot loop of"):
        code_of(replace(PLAIN, dtype="float32"), LOOPS, "sm_100")


def test_a_second_read_is_modelled_from_l2_and_from_memory():
    twice = replace(GRADIENT, target="sm_80", rows=128, vocab=128256, loaded_bytes=4.0)
    found = modelled([twice], LOOPS, "cuda")
    assert [one.chip for one in found] == [A100, A100]
    assert [one.memory_bytes for one in found] == [4.0, 6.0]
    assert modelled([twice], LOOPS, "triton") == []
    # Counted with clusters, it says nothing about the A100.
    assert [one.chip for one in modelled([GRADIENT], LOOPS, "cuda")] == [H100, B200]


def test_a_chip_has_the_machine_code_of_its_own_architecture():
    faster = [replace(loop, logits=20) if loop.target == "sm_100" else loop for loop in LOOPS]
    assert [one.code.instructions for one in modelled([PLAIN], faster, "cuda")] == [6.0, 6.0, 3.0]


def test_options_that_memory_does_not_limit_are_named():
    capped = replace(PLAIN, option="softcap")
    others = [PLAIN, replace(PLAIN, option="z_loss"), replace(capped, dtype="float64"), replace(capped, target="sm_80")]
    assert not_of_memory_alone([capped, *others], LOOPS, "cuda") == [capped]
    assert plain_limits(H100, capped, LOOPS).largest == "issue"
    assert plain_limits(H100, capped, LOOPS).time == pytest.approx(26e12 / (32 * 4 * 132 * 1.83e9))


def test_resource_usage_names_kernel_type_and_variant():
    """Of rows: others have neither."""
    grad, forward, merge, scale = resource_usage(USAGE)
    assert (grad.target, grad.kernel, grad.dtype, grad.variant) == ("sm_80", "logits_grad_kernel", "float16", "softcap")
    assert (grad.registers, grad.spilled_bytes) == (80, 24)
    assert forward.target == "sm_100"
    assert (forward.dtype, forward.variant) == ("float64", "moments, gradient, held in shared memory")
    assert (merge.dtype, merge.variant, merge.threads) == ("bfloat16", "", 32)
    assert (scale.dtype, scale.variant, scale.threads) == ("float32", "", 256)


@pytest.mark.parametrize(("registers", "threads", "blocks"), [(48, 256, 5), (80, 256, 3), (33, 256, 6), (255, 128, 2)])
def test_blocks_by_registers(registers, threads, blocks):
    assert blocks_by_registers(registers, threads) == blocks


def test_blocks_by_threads_and_shared_memory():
    small = Registers("cuda", "sm_90", "forward_kernel", "bfloat16", "", 256, 16, 0, 0)
    assert small.blocks == 8
    assert replace(small, target="sm_120").blocks == 6
    assert replace(small, shared_bytes=60_000).blocks == 3
    # An A100 holds the smaller row in one block; only clusters hold the larger.
    assert held_rows("sm_80", 50257, 2, 304).blocks == 1
    assert held_rows("sm_80", 128256, 2, 304).held_bytes == 0
    assert held_rows("sm_90", 128256, 2, 304).parts > 1


def test_files(tmp_path):
    counts = [PLAIN, replace(GRADIENT, instructions=17.0), replace(PLAIN, option="softcap", instructions=30.0)]
    counts += [replace(GRADIENT, target="sm_80", rows=128, vocab=128256, loaded_bytes=4.0)]
    counts += [replace(PLAIN, backend="triton", rows=8, programs=64)]
    write_csv(tmp_path / "kernels.csv", counts, FACTS)
    with (tmp_path / "kernels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert float(rows[0]["vector_share"]) == pytest.approx(PLAIN.vector_share, rel=1e-5)
    assert all(row["commit"] == "0123abc" for row in rows)
    assert read_csv(tmp_path / "kernels.csv") == counts

    kernels = list(resource_usage(USAGE))
    write_registers_csv(tmp_path / "registers.csv", kernels, FACTS)
    assert len((tmp_path / "registers.csv").read_text().splitlines()) == 1 + len(kernels)

    text = markdown(counts, kernels, LOOPS, [held_rows("sm_80", 128256, 2, 304)], FACTS)
    assert "11 of 12 bars met." in text
    assert "| forward, Triton | sm_90 | 8 | 50257 | programs | >= 128 | 64 **not met** |" in text
    assert text.count("**not met**") == 2
    assert "| softcap | 0 | 0 | 0 | 0 | 0 | +22.50 |" in text
    assert "24 in CUDA logits_grad_kernel, float16, softcap on sm_80" in text
    assert "No time was measured" in text
    assert "| forward_kernel, bfloat16, statistics | sm_90 | 10 | 6.00 | 1.20 | 3.00 | | | | | 1.80 | |" in text
    assert "| forward | B200 | 50257 | one | 0.278 | 0.171 | 0.086 | 0.274 | memory | 9.7 | 6.0 |" in text
    assert " | issue, 0.841 | issue, 0.742 |" in text
    assert "Limits of chips" not in markdown(counts, kernels, [], [], FACTS)
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_without_its_tools_the_command_says_so_in_a_sentence(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "count_kernels.py"), f"--out={tmp_path}"]
    environment = {**os.environ, "PTX_ON_CPU": str(tmp_path / "nowhere")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "PTX_ON_CPU" in done.stderr
    assert not list(tmp_path.iterdir())
