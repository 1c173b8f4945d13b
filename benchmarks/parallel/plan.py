"""What is measured of the vocabulary-parallel loss: shapes, and numbers of ranks."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.check import columns_of

# Tokens and vocabularies: GPT-2's and Llama 3's.
SHAPES = ((1024, 50257), (512, 128256))
DTYPES = ("float32", "bfloat16")
RANKS = (2, 4)
# So few tokens that a call's own cost shows.
SMALL_CALL = ("float32", 128, 50257)


@dataclass(frozen=True)
class ParallelCell:
    """One shape on some ranks; all contenders of a cell take turns in the same processes."""

    dtype: str
    rows: int
    vocab: int
    ranks: int

    @property
    def columns(self) -> int:
        """Of a rank, those of the padding included."""
        return columns_of(self.vocab, self.ranks)

    def __str__(self) -> str:
        return f"{self.dtype} {self.rows} x {self.vocab}, {self.ranks} ranks"


def parallel_cells(dtypes: list[str], rows: list[int], vocabs: list[int], ranks: list[int]) -> list[ParallelCell]:
    """The cells, in the order of measurement; an empty list is the usual one."""
    shapes = [(n, v) for v in vocabs or [SHAPES[0][1]] for n in rows or [SHAPES[0][0]]] if rows or vocabs else SHAPES
    found = [ParallelCell(dtype, n, v, k) for k in ranks or RANKS for dtype in dtypes or DTYPES for n, v in shapes]
    if not (rows or vocabs) and SMALL_CALL[0] in (dtypes or DTYPES):
        found += [ParallelCell(*SMALL_CALL, k) for k in ranks or RANKS]
    return found
