"""What benchmarks/gpu_kernels reads in machine code, on a few lines written by hand: no tool is run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from gpu_kernels.hot_loops import HotLoop, disassembled, grown, hot_loops, read_hot_loops_csv, write_hot_loops_csv
from gpu_kernels.machine_code import KINDS, ControlFlow, Execution, Function, Instruction, functions


def assembled(lines: str, name: str = "forward_kernel", target: str = "sm_90") -> str:
    """What cuobjdump prints of a function: a label at the begin of a line becomes the address of its instruction."""
    found = [re.fullmatch(r"(?:(\w+): )?(.+)", line.strip()).groups() for line in lines.strip().splitlines()]
    labels = {label: f"0x{16 * i:x}" for i, (label, _) in enumerate(found) if label}
    text = [f"\tcode for {target}", f"\t\tFunction : {name}", '\t.headerflags @"EF_CUDA_SM90"']
    for i, (_, words) in enumerate(found):
        for label, address in labels.items():
            words = re.sub(rf"\b{label}\b", address, words)
        text += [f"        /*{16 * i:04x}*/ {words:>40} ;  /* 0x0123456789abcdef */", " " * 50 + "/* 0x00fe */"]
    return "\n".join(text)


def function(lines: str) -> Function:
    """The function of these lines."""
    (found,) = functions(assembled(lines).splitlines())
    return found


def iterations(lines: str) -> list[Execution]:
    """Its loops."""
    return ControlFlow(function(lines).instructions).loops()


def opcodes(execution: Execution) -> list[str]:
    """The opcodes in the order in which they are executed."""
    return [one.opcode for one in execution.instructions]


LOOP = """
    S2R R0, SR_TID.X
    @P0 BRA END
    HEAD: LDG.E.NA.128 R4, desc[UR6][R2.64+0x1000]
    IMAD.U32 R8, R4, 0x10000, RZ
    @!P2 FMUL R21, R21, R28
    MUFU.EX2 R8, R8
    @P2 BRA HEAD
    END: EXIT
    TRAP: BRA TRAP
"""


def test_a_loop_is_between_a_branch_back_and_its_target() -> None:
    (iteration,) = iterations(LOOP)
    assert opcodes(iteration) == ["LDG.E.NA.128", "IMAD.U32", "FMUL", "MUFU.EX2", "BRA"]
    assert dict(iteration.kinds) == {"global": 1, "integer": 1, "fp32": 1, "special": 1, "control": 1}
    assert (iteration.loaded, iteration.stored) == (16, 0)
    assert iteration.count("MUFU.EX2") == 1


def test_code_without_a_loop_has_none() -> None:
    straight = "MOV R1, R2\n@P0 BRA END\nSTG.E.EF.128 desc[UR6][R2.64], R4\nSTG.E.U16 [R2.64], R4\nEND: EXIT"
    assert iterations(straight) == []
    whole = ControlFlow(function(straight).instructions).whole()
    assert opcodes(whole) == ["MOV", "BRA", "STG.E.EF.128", "STG.E.U16", "EXIT"]
    assert (whole.stored, whole.vectors_stored) == (18, 16)
    assert ControlFlow([]).whole() is None


def test_a_branch_back_from_code_that_was_moved_out_of_the_way_is_no_loop() -> None:
    assert iterations("BRA.DIV UR4, AWAY\nSHFL.BFLY PT, R1, R2, 0x1\nHERE: EXIT\nAWAY: MOV R1, R2\nBRA HERE") == []


def test_an_iteration_stays_together_where_a_warp_might_be_apart() -> None:
    (iteration,) = iterations("""
        HEAD: LDG.E R1, [R2.64]
        BRA.DIV UR4, AWAY
        NEXT: FADD R1, R1, R1
        @P0 BRA HEAD
        EXIT
        AWAY: MOV R1, R2
        BRA NEXT
    """)
    assert opcodes(iteration) == ["LDG.E", "BRA.DIV", "FADD", "BRA"]


def test_of_two_branches_back_an_iteration_takes_the_shorter_way() -> None:
    (iteration,) = iterations("""
        HEAD: LDG.E R1, [R2.64]
        @P1 BRA AWAY
        @P0 BRA HEAD
        EXIT
        AWAY: MOV R1, R2
        MOV R1, R2
        BRA HEAD
    """)
    assert opcodes(iteration) == ["LDG.E", "BRA", "BRA"]


def test_an_inner_loop_is_no_part_of_the_outer() -> None:
    outer, inner = iterations("""
        HEAD: LDG.E.128 R4, [R2.64]
        @P3 BRA AFTER
        INNER: IADD3 R1, R1, 0x1, RZ
        LDG.E R9, [R8.64]
        @P1 BRA INNER
        AFTER: MUFU.EX2 R4, R4
        @P0 BRA HEAD
        EXIT
    """)
    assert opcodes(outer) == ["LDG.E.128", "BRA", "MUFU.EX2", "BRA"]
    assert opcodes(inner) == ["IADD3", "LDG.E", "BRA"]


def test_an_outer_loop_that_always_takes_its_inner_one_has_no_way_of_its_own() -> None:
    (inner,) = iterations("HEAD: MOV R1, R2\nINNER: FADD R1, R1, R2\n@P1 BRA INNER\n@P0 BRA HEAD\nEXIT")
    assert opcodes(inner) == ["FADD", "BRA"]


def test_of_two_ways_an_iteration_moves_the_most_bytes_and_is_the_shortest() -> None:
    (iteration,) = iterations("""
        HEAD: LDG.E.128 R4, [R2.64]
        @P0 BRA STORE
        FADD R1, R1, R1
        FADD R1, R1, R1
        BRA NEXT
        STORE: STG.E.64 [R2.64], R4
        @P1 BRA NEXT
        FMUL R3, R3, R3
        NEXT: ISETP.NE.AND P2, PT, R1, RZ, PT
        @P2 BRA HEAD
        EXIT
    """)
    assert opcodes(iteration) == ["LDG.E.128", "BRA", "STG.E.64", "BRA", "ISETP.NE.AND", "BRA"]


def test_an_iteration_copies_as_much_as_it_reads_of_earlier_copies() -> None:
    """What is copied at the row's end, here 48 bytes, is no part of it, and an access that never executes no bytes."""
    (iteration,) = iterations("""
        HEAD: ISETP.GT.AND P0, PT, R12, RZ, PT
        @P0 BRA GROUP
        LDGSTS.E.BYPASS.128 [R21], desc[UR6][R12.64]
        LDGSTS.E.BYPASS.128 [R21+0x1000], desc[UR6][R12.64]
        LDGSTS.E.BYPASS.128 [R21+0x2000], desc[UR6][R12.64]
        BRA USE
        GROUP: @!PT LDS RZ, [RZ]
        LDGSTS.E.BYPASS.128 [R31], desc[UR6][R2.64]
        IADD3 R31, R31, 0x4000, RZ
        IADD3 R31, R31, 0x4000, RZ
        USE: LDS.128 R12, [R30]
        MUFU.EX2 R12, R12
        @P1 BRA HEAD
        EXIT
    """)
    assert (iteration.copied, iteration.read, iteration.loaded) == (16, 16, 16)
    assert opcodes(iteration).count("IADD3") == 2
    assert iteration.kinds["shared"] == 2


def test_branches_with_a_predicate_or_two_may_go_on() -> None:
    (iteration,) = iterations(
        "HEAD: LDG.E R1, [R2.64]\n@P0 BRA P5, END\nBRA P4, END\nBRA !UP1, END\nBRA HEAD\nEND: EXIT"
    )
    assert opcodes(iteration) == ["LDG.E", "BRA", "BRA", "BRA", "BRA"]
    assert len(iterations("HEAD: LDG.E R1, [R2.64]\nBRA P4, HEAD\nEXIT")) == 1
    assert iterations("HEAD: LDG.E R1, [R2.64]\nBRA END\nBRA HEAD\nEND: EXIT") == []


@pytest.mark.parametrize(
    ("text", "kind", "size"),
    [
        ("MUFU.EX2 R1, R2", "special", 0),
        ("FADD R1, -R2, R3", "fp32", 0),
        ("FHADD.BF16 R1, R2.H0_H0, R3", "fp32", 0),
        ("FFMA2 R2, R4.F32x2.HI_LO, R6.F32, R8.F32x2.HI_LO", "fp32x2", 0),
        ("FSETP.GEU.AND P2, PT, R20, R31, PT", "comparison", 0),
        ("VHMNMX.BF16_V2 R1, R2, R3, R4, !PT", "half", 0),
        ("HADD2.F32 R1, -RZ, R2.H0_H0", "conversion", 0),
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", "conversion", 0),
        ("DSETP.LT.AND P2, PT, RZ, UR4, PT", "fp64", 0),
        ("IMAD.U32 R1, R2, 0x10000, RZ", "integer", 0),
        ("UIADD3 UR4, UR4, -0x4, URZ", "integer", 0),
        ("IMAD.MOV.U32 R1, RZ, RZ, R2", "move", 0),
        ("HFMA2.MMA R1, -RZ, RZ, 0, 0", "move", 0),
        ("HFMA2 R1, R2, R3, R4", "half", 0),
        ("UMOV UR4, URZ", "move", 0),
        ("LDG.E.NA.128 R4, desc[UR6][R2.64+0x1000]", "global", 16),
        ("STG.E.U16 desc[UR6][R2.64], R4", "global", 2),
        ("LDG.E.ENL2.256 R4, R8, [R2.64]", "global", 32),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R21], [R12.64]", "global", 16),
        ("LDS R4, [R2]", "shared", 4),
        ("@!PT LDS RZ, [RZ]", "shared", 0),
        ("BSYNC B0", "control", 0),
        ("LDC.64 R2, c[0x0][0x210]", "other", 0),
    ],
)
def test_kinds_and_bytes(text: str, kind: str, size: int) -> None:
    (one,) = function(text).instructions
    assert isinstance(one, Instruction)
    assert (one.kind, one.bytes) == (kind, size)


def test_functions_are_told_apart_by_name_and_architecture() -> None:
    text = (
        assembled(LOOP, "one") + "\n\n" + assembled("EXIT", "two", "sm_100a") + "\n" + assembled(LOOP, "two", "sm_120")
    )
    found = list(functions(text.splitlines()))
    assert [(one.target, one.name, len(one.instructions)) for one in found] == [
        ("sm_90", "one", 9),
        ("sm_100", "two", 1),
        ("sm_120", "two", 9),
    ]
    assert list(functions(text.splitlines(), {"one"})) == found[:1]
    assert list(functions([])) == []


ROW = """
    STATISTICS: LDG.E.128 R4, [R2.64]
    LDG.E.128 R8, [R2.64+0x1000]
    MUFU.EX2 R4, R4
    @P0 BRA STATISTICS
    REST: LDG.E.128 R4, [R2.64]
    MUFU.EX2 R4, R4
    @P1 BRA REST
    ZEROS: STG.E.128 [R2.64], RZ
    @P2 BRA ZEROS
    ALIGNED: LDG.E.128 R4, [R2.64]
    MUFU.EX2 R4, R4
    STG.E.128 [R2.64], R4
    @P3 BRA ALIGNED
    OTHERWISE: LDG.E.128 R4, [R2.64]
    LDG.E.128 R8, [R2.64]
    MUFU.EX2 R4, R4
    STG.E.128 [R2.64], R4
    @P4 BRA OTHERWISE
    LANES: MUFU.EX2 R1, R1
    @P5 BRA LANES
    EXIT
"""


def test_hot_loops_are_named_by_what_they_move() -> None:
    """Of the two loops of statistics it is the one that takes more at once; zeros and lanes have no logits."""
    found = list(hot_loops(function(ROW), "cuda", "bfloat16", "softcap"))
    assert [(one.part, one.logits, one.instructions) for one in found] == [
        ("statistics", 16, 4),
        ("gradient", 8, 4),
        ("gradient aligned otherwise", 8, 5),
    ]
    assert found[0].key == ("cuda", "sm_90", "forward_kernel", "bfloat16", "softcap", "statistics")
    assert found[0].per_logit == 0.25
    assert [one.logits for one in hot_loops(function(ROW), "cuda", "float32", "")] == [8, 4, 4]


def test_an_unrolled_row_is_one_hot_loop() -> None:
    lines = "LDG.E.128 R4, [R2.64]\nMUFU.EX2 R4, R4\nSTG.E.128 [R2.64], R4\n@P0 STG.E.U16 [R2.64], R4\nEXIT"
    (whole,) = hot_loops(function(lines), "triton", "bfloat16", "V = 50257, gradient")
    assert (whole.part, whole.logits, whole.instructions) == ("whole row", 8, 5)


def test_loops_that_rotate_a_row_in_registers_are_two_hot_loops() -> None:
    """Pass 1 over the steps left beside blocks takes less, and the loop over zeros has no exponentials."""
    lines = """
        zeros: STG.E.128 [R2.64], RZ
        @P0 BRA zeros
        first: MUFU.EX2 R4, R4
        MUFU.EX2 R5, R5
        FADD R4, R4, R5
        @P0 BRA first
        left: MUFU.EX2 R4, R4
        @P0 BRA left
        second: MUFU.EX2 R4, R4
        MUFU.EX2 R5, R5
        STG.E.128 [R2.64], R4
        STG.E.128 [R6.64], R4
        @P0 BRA second
        EXIT
    """
    found = list(hot_loops(function(lines), "triton", "bfloat16", "softcap, V = 50257, gradient"))
    assert [(one.part, one.logits, one.instructions) for one in found] == [("gradient", 16, 5), ("statistics", 16, 4)]


def loop(**changes: object) -> HotLoop:
    """100 instructions for 20 logits."""
    kinds = dict.fromkeys(KINDS, 0) | {"special": 20, "fp32": 80}
    return replace(HotLoop("cuda", "sm_90", "forward_kernel", "bfloat16", "", "statistics", 20, kinds), **changes)


def test_a_loop_that_grows_by_more_than_a_twentieth_is_named() -> None:
    within, beyond = ({**loop().kinds, "fp32": number} for number in (85, 86))
    other = loop(target="sm_80", variant="softcap")
    assert grown([loop(), other], [loop(kinds=within), other]) == []
    assert grown([loop(), other], [loop(kinds=beyond), other]) == [
        "cuda, sm_90, forward_kernel, bfloat16, statistics: was 5.00 instructions a logit, is 5.30"
    ]
    # The same instructions for fewer logits.
    assert len(grown([loop()], [loop(logits=16)])) == 1


def test_a_loop_that_is_not_found_or_not_on_record_is_named() -> None:
    assert grown([loop()], []) == [
        "cuda, sm_90, forward_kernel, bfloat16, statistics: was 5.00 instructions a logit, is not there"
    ]
    assert grown([], [loop()]) == [
        "cuda, sm_90, forward_kernel, bfloat16, statistics: is 5.00 instructions a logit, was not there"
    ]


def test_the_file_keeps_all_of_a_loop(tmp_path: Path) -> None:
    loops = [loop(), loop(variant="gradient, second read", part="gradient", logits=32)]
    write_hot_loops_csv(tmp_path / "hot_loops.csv", loops, {"nvcc": "13.0"})
    assert read_hot_loops_csv(tmp_path / "hot_loops.csv") == loops
    assert (tmp_path / "hot_loops.csv").read_text().splitlines()[1].endswith(",5.000,13.0")


def test_a_file_that_cannot_be_disassembled_is_named() -> None:
    with pytest.raises(RuntimeError, match="false could not read the machine code in kernel"):
        list(disassembled("false", Path("kernel")))
