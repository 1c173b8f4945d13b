"""What is measured: the cells (shape, type, threads, allocator), and the sizes that suit a machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.allocators import CACHING, DEFAULT, WARM

VOCABULARIES = {
    32000: "Llama 2",
    50257: "GPT-2",
    65536: "2^16",
    128256: "Llama 3",
    151936: "Qwen",
    256000: "Gemma",
}
DTYPES = ("float32", "bfloat16")

# The shapes of the goals that the package sets itself on a CPU: about 200 MB of logits, far above every cache.
HEADLINES = (("float32", 1024, 50257), ("float32", 512, 128256), ("bfloat16", 2048, 50257))
# As many logits as make a call's own cost visible, and no more.
OVERHEAD = ("float32", 8, 1000)

CPU_BYTES = 200e6
GPU_ROWS = 4096
GPU_DEFAULT_VOCABULARIES = (32000, 50257, 128256)
# The plain formula holds the logits, their float32 copy, log-softmax, its gradient and that of the copy.
PLAIN_COPIES = 6


@dataclass(frozen=True)
class Cell:
    """One shape in one setting; all contenders of a cell take turns in one process."""

    dtype: str
    rows: int
    vocab: int
    threads: int
    allocator: str
    compiled: bool = True
    weightings: bool = False  # whether other weightings take part

    def __str__(self) -> str:
        return f"{self.dtype} {self.rows} x {self.vocab}, {self.threads} thread{'s' * (self.threads > 1)}"


def shapes(
    device: torch.device, full: bool, vocabs: list[int], dtypes: list[str], rows: int
) -> list[tuple[str, int, int]]:
    """(dtype, rows, vocab) of every table.

    Args:
        device: where the logits will be.
        full: all vocabularies in both types.
        vocabs: only these; empty for the default.
        dtypes: only these; empty for the default.
        rows: this many in every shape; 0 for what suits the device.
    """
    if not full and not vocabs and device.type == "cpu":
        chosen = list(HEADLINES)
    else:
        default = GPU_DEFAULT_VOCABULARIES if device.type == "cuda" and not full else tuple(VOCABULARIES)
        chosen = [
            (dtype, _rows(device, dtype, vocab), vocab) for dtype in dtypes or DTYPES for vocab in vocabs or default
        ]
    chosen = [shape for shape in chosen if not dtypes or shape[0] in dtypes]
    return [(dtype, rows or default_rows, vocab) for dtype, default_rows, vocab in chosen]


def cells(
    device: torch.device, table: list[tuple[str, int, int]], threads: list[int], allocators: list[str], full: bool
) -> list[Cell]:
    """The cells of these shapes, in the order of measurement."""
    if device.type == "cuda":
        return [Cell(*shape, threads[-1], CACHING, weightings=shape == table[0]) for shape in table]
    found = []
    if WARM in allocators:
        for count in threads:
            # Other weightings are measured once, with one thread.
            first = count == threads[0]
            found += [Cell(*shape, count, WARM, weightings=first and shape == HEADLINES[0]) for shape in table]
        found.append(Cell(*OVERHEAD, threads[0], WARM, compiled=False))
    if DEFAULT in allocators:
        # First touches cost every contender the same seconds: all shapes are for --full.
        few = table if full or WARM not in allocators else table[:1]
        found += [Cell(*shape, threads[-1], DEFAULT, compiled=full) for shape in few]
    return found


def _rows(device: torch.device, dtype: str, vocab: int) -> int:
    """A power of two of rows: about CPU_BYTES of logits, or GPU_ROWS as far as the plain formula fits."""
    for headline in HEADLINES:
        if device.type == "cpu" and (dtype, vocab) == (headline[0], headline[2]):
            return headline[1]
    size = torch.finfo(getattr(torch, dtype)).bits // 8
    if device.type == "cpu":
        most = CPU_BYTES / (size * vocab)
    else:
        free, _ = torch.cuda.mem_get_info(device)
        most = min(GPU_ROWS, 0.8 * free / (4 * PLAIN_COPIES * vocab))
    return int(2 ** round(_log2(most))) if device.type == "cpu" else int(2 ** int(_log2(most)))


def _log2(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float64).log2())
