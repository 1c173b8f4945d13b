"""The machine code (SASS) of kernels, as `cuobjdump -sass` prints it: its loops, and what an iteration of one executes.

Only functions of text: no tool is run here, so that every rule can be tried on a few lines written by hand.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

VECTOR_BYTES = 16
# Opcodes by what executes them; what is in no row is "other". A leading U, of an instruction on a warp's uniform
# registers, is dropped.
_OPCODES = {
    "special": "MUFU",
    "fp32": "FADD FMUL FFMA FHADD FHFMA",
    "fp32x2": "FADD2 FMUL2 FFMA2",
    "comparison": "FMNMX FMNMX3 FSETP FSEL FSET FCHK",
    "half": "HADD2 HMUL2 HFMA2 HMNMX2 VHMNMX HSETP2 HSET2",
    "fp64": "DADD DMUL DFMA DSETP",
    "integer": "IADD IADD3 IMAD LOP3 SHF SHL SHR LEA ISETP IMNMX VIMNMX VIMNMX3 VIADD VIADDMNMX SEL PRMT PLOP3 FLO "
    "POPC IABS SGXT BMSK BREV",
    "conversion": "F2F F2FP F2I I2F I2FP F2IP FRND I2I",
    "global": "LDG STG LDGSTS LD ST ATOM ATOMG RED REDG",
    "shared": "LDS STS LDSM STSM ATOMS",
    "move": "MOV R2UR S2R S2UR CS2R R2P P2R RPCMOV",
    "control": "BRA BRX JMP CALL RET EXIT BSSY BSYNC BREAK BREAKV WARPSYNC BAR DEPBAR LDGDEPBAR NOP YIELD MEMBAR "
    "ENDCOLLECTIVE ARRIVES ERRBAR CGAERRBAR CCTL UCGABAR_ARV UCGABAR_WAIT",
}
KINDS = (*_OPCODES, "other")
_KIND_OF = {opcode: kind for kind, opcodes in _OPCODES.items() for opcode in opcodes.split()}
# Arithmetic that only moves: ptxas spreads its moves over the units.
_MOVES = re.compile(r"IMAD\.MOV\b|HFMA2\S* U?R\d+, -RZ, RZ,")
# A half that becomes a float32 by an addition of zero.
_CONVERSIONS = re.compile(r"HADD2\.F32\b")
# Bytes of an access, by a suffix of its opcode; without one there are 4.
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}

_ARCHITECTURE = re.compile(r"\s*code for (sm_\d+)[af]?")
_FUNCTION = re.compile(r"\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?PT?\d?)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
# The last address of a branch is where it goes; predicates may come before it.
_TARGET = re.compile(r"(?:^|,\s*)0x([0-9a-f]+)$")


class Instruction(NamedTuple):
    """One line of the disassembly."""

    address: int
    predicate: str  # "" where it always executes, "!PT" where it never does
    opcode: str  # with its suffixes: LDG.E.128
    operands: str

    @property
    def kind(self) -> str:
        """One of KINDS."""
        text = f"{self.opcode} {self.operands}"
        if _MOVES.match(text):
            return "move"
        if _CONVERSIONS.match(text):
            return "conversion"
        name = self.opcode.partition(".")[0]
        return _KIND_OF.get(name) or _KIND_OF.get(name.removeprefix("U"), "other")

    @property
    def bytes(self) -> int:
        """Bytes of memory that a thread moves by it, 0 where it is no access or never executes."""
        if self.predicate == "!PT" or self.kind not in ("global", "shared"):
            return 0
        for suffix in self.opcode.split(".")[1:]:
            if suffix in _BYTES:
                return _BYTES[suffix]
        return 4

    def is_a(self, *names: str) -> bool:
        """Whether its opcode, without suffixes, is one of these."""
        return self.opcode.partition(".")[0] in names

    @property
    def target(self) -> int | None:
        """Where a branch goes; None for another instruction."""
        if not self.is_a("BRA", "JMP"):
            return None
        match = _TARGET.search(self.operands)
        return int(match[1], 16) if match else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        if not self.is_a("BRA", "JMP", "BRX", "EXIT", "RET"):
            return True
        # BRA.DIV goes only where a warp's threads are apart; a second predicate may stand before the target.
        return bool(self.predicate) or ".DIV" in self.opcode or bool(re.match(r"!?U?P\d", self.operands))


class Function(NamedTuple):
    """A kernel's code for one architecture."""

    target: str
    name: str  # mangled
    instructions: list[Instruction]


def functions(lines: Iterable[str], wanted: Container[str] | None = None) -> Iterator[Function]:
    """The functions in what `cuobjdump -sass` prints: those of these names, or all."""
    target, found = "", None
    for line in lines:
        if found is not None and (match := _INSTRUCTION.match(line)):
            found.instructions.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
        elif match := _FUNCTION.match(line):
            if found is not None:
                yield found
            found = Function(target, match[1], []) if wanted is None or match[1] in wanted else None
        elif match := _ARCHITECTURE.match(line):
            target = match[1]
    if found is not None:
        yield found


@dataclass(frozen=True)
class Execution:
    """The instructions that a thread executes one after another: of an iteration of a loop, or of a whole kernel."""

    instructions: tuple[Instruction, ...]

    @cached_property
    def kinds(self) -> Counter[str]:
        """How many there are of each kind."""
        return Counter(one.kind for one in self.instructions)

    def count(self, opcode: str) -> int:
        """How many have an opcode that begins so."""
        return sum(one.opcode.startswith(opcode) for one in self.instructions)

    @property
    def loaded(self) -> int:
        """Bytes from global memory, to registers or to shared memory."""
        return sum(one.bytes for one in self.instructions if one.is_a("LDG", "LDGSTS"))

    @property
    def copied(self) -> int:
        """Bytes from global memory to shared memory."""
        return sum(one.bytes for one in self.instructions if one.is_a("LDGSTS"))

    @property
    def read(self) -> int:
        """Bytes from shared memory."""
        return sum(one.bytes for one in self.instructions if one.is_a("LDS"))

    @property
    def stored(self) -> int:
        """Bytes to global memory."""
        return sum(one.bytes for one in self.instructions if one.is_a("STG"))

    @property
    def vectors_stored(self) -> int:
        """Bytes to global memory, 16 at a time."""
        return sum(one.bytes for one in self.instructions if one.is_a("STG") and one.bytes >= VECTOR_BYTES)


class ControlFlow:
    """The basic blocks of a function, and their loops.

    A loop is what lies between a block and a branch back to it. Of the ways through it, an iteration takes the one that
    copies as many bytes to shared memory as it reads there, then the one that moves the most bytes of global memory,
    then the shortest: what is done once a row is no part of it, and an inner loop neither.
    """

    def __init__(self, instructions: list[Instruction]) -> None:
        self.blocks = _blocks(instructions)
        starts = {block[0].address: i for i, block in enumerate(self.blocks)}
        self.successors = [
            [
                *([starts[block[-1].target]] if block[-1].target in starts else []),
                *([i + 1] if block[-1].goes_on and i + 1 < len(self.blocks) else []),
            ]
            for i, block in enumerate(self.blocks)
        ]
        self.order, self.back = self._walk()

    def loops(self) -> list[Execution]:
        """An iteration of each loop, without those that consist of nothing but inner loops."""
        bodies = {header: self._body(header) for header in {header for _, header in self.back}}
        found = []
        for header, body in sorted(bodies.items()):
            inner = set().union(*(bodies[other] for other in bodies if other != header and other in body))
            latches = {latch for latch, other in self.back if other == header}
            found.append(self._path(header, latches - inner, body - (inner - {header})))
        return [path for path in found if path is not None]

    def whole(self) -> Execution | None:
        """The path from the begin to an exit, by no loop; None where every path has one."""
        in_loops = set().union(*(self._body(header) for _, header in self.back))
        ends = {i for i, block in enumerate(self.blocks) if not self.successors[i] and block[-1].is_a("EXIT")}
        return self._path(0, ends, set(self.order) - in_loops)

    def _walk(self) -> tuple[list[int], list[tuple[int, int]]]:
        """The blocks, each after those that follow it, and the branches back to a block that led here."""
        order: list[int] = []
        back: list[tuple[int, int]] = []
        state = {0: "open"}
        stack = [(0, iter(self.successors[0]))] if self.blocks else []
        while stack:
            block, rest = stack[-1]
            following = next(rest, None)
            if following is None:
                state[block] = "done"
                order.append(block)
                stack.pop()
            elif following not in state:
                state[following] = "open"
                stack.append((following, iter(self.successors[following])))
            elif state[following] == "open":
                back.append((block, following))
        return order, back

    def _body(self, header: int) -> set[int]:
        """The blocks from which a branch back to the header is reached without it."""
        body, waiting = {header}, [latch for latch, other in self.back if other == header]
        while waiting:
            block = waiting.pop()
            if block not in body:
                body.add(block)
                waiting += [i for i, following in enumerate(self.successors) if block in following]
        return body

    def _path(self, first: int, last: set[int], blocks: set[int]) -> Execution | None:
        """The usual way from one block to one of the last, within these blocks."""
        # From each block on, by the bytes copied: bytes of global memory, instructions less than none, the next place.
        ways: dict[int, dict[int, tuple[int, int, tuple[int, int] | None]]] = {}
        for i in (i for i in self.order if i in blocks):
            own = Execution(tuple(self.blocks[i]))
            moved, size = own.loaded + own.stored, len(self.blocks[i])
            ways[i] = {own.copied: (moved, -size, None)} if i in last else {}
            for j in (j for j in self.successors[i] if (i, j) not in self.back):
                for copied, (moved_on, size_on, _) in ways.get(j, {}).items():
                    way = (moved + moved_on, size_on - size, (j, copied))
                    known = ways[i].get(own.copied + copied, way)
                    ways[i][own.copied + copied] = max(way, known, key=lambda one: one[:2])

        def along(copied: int) -> Execution:
            found: list[Instruction] = []
            place: tuple[int, int] | None = (first, copied)
            while place is not None:
                found += self.blocks[place[0]]
                place = ways[place[0]][place[1]][2]
            return Execution(tuple(found))

        paths = [along(copied) for copied in ways.get(first, {})]
        # The more the better where nothing is copied; else an iteration copies as much as it reads of earlier copies.
        return min(paths, key=lambda path: abs(path.copied - path.read), default=None)


def _blocks(instructions: Iterable[Instruction]) -> list[list[Instruction]]:
    """Basic blocks: they begin at targets of branches, and end with what does not always go on."""
    instructions = list(instructions)
    targets = {one.target for one in instructions}
    blocks: list[list[Instruction]] = []
    begin = True
    for one in instructions:
        if begin or one.address in targets:
            blocks.append([])
        blocks[-1].append(one)
        begin = one.target is not None or one.is_a("EXIT", "RET", "BRX")
    return blocks
