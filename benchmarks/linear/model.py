"""A model of the linear loss's paths on GPUs, counted and not measured: `write_models.py` writes it.

Each launch takes the longer of its multiplications and its bytes, by the chips' published figures; launches follow one
another. bfloat16, loss and gradients of hidden states and weight, no bias, plain MixCE, reduction "mean".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_kernels.model import CHIPS, ISSUE_SLOTS, REACHABLE, WARP_SIZE, Chip
from mixce_kernels.linear.chunks import CHUNK_BYTES, rows_per_chunk
from mixce_kernels.linear.tiles_launch import Tiles, forward_config, grad_config

RESULT = Path(__file__).parents[1] / "results" / "linear_model.md"
# Operations a second of dense bfloat16 products with sums in float32, from data sheets.
TENSOR_RATES = {"A100-SXM 80 GB": 312e12, "H100-SXM": 989e12, "B200": 2250e12}
# Of that rate, what a matrix product can hope for, a BLAS's and a Triton kernel's alike.
TENSOR_REACHABLE = 0.7
HALF, SINGLE = 2, 4
N_ROWS, VOCAB_SIZE = 8192, 128256
DEPTHS = (768, 2048, 4096, 8192)
PATHS = ("chunks", "tiles", "materialised")
STEPS = ("forward", "forward + backward")
# Copies hidden states, ignored tokens' last, for the gradient by weight; PyTorch's kernel.
IN_ORDER = "hidden in order"
# Thread instructions for a logit beside those that grow with the depth: Pass 1, and Pass 2. Counted on sm_80.
TILE_INSTRUCTIONS = {"linear_forward": 27.1, "linear_grad_logits": 20.4}


@dataclass(frozen=True)
class Launch:
    """One kernel, or several alike: what it multiplies, what it moves, and what it issues in between."""

    name: str
    operations: float
    memory_bytes: float
    instructions: float = 0.0

    def seconds(self, chip: Chip) -> float:
        """Its larger limit on a chip. A tile's statistics wait for its product: they are added to it."""
        rate = TENSOR_REACHABLE * TENSOR_RATES[chip.name]
        issued = ISSUE_SLOTS * chip.multiprocessors * chip.clock
        return max(
            self.operations / rate + self.instructions / WARP_SIZE / issued,
            self.memory_bytes / (REACHABLE * chip.bandwidth),
        )


@dataclass(frozen=True)
class Modelled:
    """A step by one path."""

    launches: tuple[Launch, ...]
    held_bytes: float  # besides the inputs and the gradients handed over

    def seconds(self, chip: Chip) -> float:
        """All launches' times."""
        return sum(launch.seconds(chip) for launch in self.launches)

    @property
    def operations(self) -> float:
        """All launches'."""
        return sum(launch.operations for launch in self.launches)

    @property
    def memory_bytes(self) -> float:
        """All launches'."""
        return sum(launch.memory_bytes for launch in self.launches)


def modelled(path: str, step: str, n: int, v: int, d: int, arch: int = 90, multiprocessors: int = 132) -> Modelled:
    """A step by a path: hidden [n, d], weight [v, d]."""
    backward = step == STEPS[1]
    if path == "chunks":
        return _chunks(n, v, d, backward, arch)
    if path == "tiles":
        return _tiles(n, v, d, backward, arch, multiprocessors)
    return _materialised(n, v, d, backward)


def _chunks(n: int, v: int, d: int, backward: bool, arch: int) -> Modelled:
    rows = rows_per_chunk(n, v, SINGLE + HALF, CHUNK_BYTES["cuda"])
    n_chunks = -(-n // rows)
    product, logits = 2.0 * n * v * d, float(n * v)
    weights, hidden = float(n_chunks * v * d), float(n * d)
    # With a gradient a row of float32 is read again where no cluster holds it.
    reads = 2 if backward and arch < 90 else 1
    launches = [
        Launch("logits", product, HALF * (weights + hidden) + SINGLE * logits),
        Launch("row kernel", 0, SINGLE * logits * (reads + backward)),
    ]
    if backward:
        # The first chunk's gradient by weight is written, the others' are added: read and written.
        added = SINGLE * (2 * weights - v * d)
        launches += [
            Launch("conversion to half", 0, (SINGLE + HALF) * logits),
            Launch("gradient by hidden", product, HALF * (logits + weights) + SINGLE * hidden),
            Launch("gradient by weight", product, HALF * (logits + hidden) + added),
        ]
    held = float(rows * v * (SINGLE + (HALF if backward else 0)))
    return Modelled(tuple(launches), held + (SINGLE * (hidden + v * d) if backward else 0))


def _tiles(n: int, v: int, d: int, backward: bool, arch: int, multiprocessors: int) -> Modelled:
    forward = forward_config(n, v, HALF, arch=arch, multiprocessors=multiprocessors)
    product, logits, hidden = 2.0 * n * v * d, float(n * v), float(n * d)
    # A group of blocks of rows stays in L2 while the whole weight passes by.
    passes = -(-forward.n_row_blocks // forward.tiles.group)
    partials = 3.0 * SINGLE * n * forward.n_splits
    launches = [
        Launch(
            "statistics of tiles",
            product,
            HALF * (hidden + passes * v * d) + partials,
            TILE_INSTRUCTIONS["linear_forward"] * logits,
        ),
        Launch("merge", 0, partials),
    ]
    held = partials
    if backward:
        grad = grad_config(n, v, d, HALF, arch=arch, multiprocessors=multiprocessors)
        n_spans = -(-v // grad.span)
        launches += [
            Launch(IN_ORDER, 0, 2 * HALF * hidden),
            Launch(
                "gradient of tiles",
                product,
                HALF * (n_spans * hidden + v * d + logits),
                TILE_INSTRUCTIONS["linear_grad_logits"] * logits,
            ),
            Launch(
                "gradient by hidden",
                product,
                HALF * (logits + v * d) + SINGLE * (2 * n_spans - 1) * grad.n_splits * hidden,
            ),
            Launch("gradient by weight", product, HALF * (logits + n_spans * hidden) + SINGLE * v * d),
        ]
        scratch = HALF * float(grad.n_row_blocks * grad.tiles.block_n * grad.span)
        held += (
            scratch
            + HALF * hidden
            + SINGLE * (hidden + v * d)
            + (SINGLE * grad.n_splits * hidden if grad.n_splits > 1 else 0)
        )
    return Modelled(tuple(launches), held)


def _materialised(n: int, v: int, d: int, backward: bool) -> Modelled:
    """`fused_mixce_loss` of bfloat16 logits, whose gradient overwrites them."""
    product, logits, hidden = 2.0 * n * v * d, float(n * v), float(n * d)
    launches = [
        Launch("logits", product, HALF * (hidden + v * d + logits)),
        Launch("row kernels", 0, HALF * logits * (3 if backward else 1)),
    ]
    if backward:
        launches += [
            Launch("gradient by hidden", product, HALF * (logits + v * d + hidden)),
            Launch("gradient by weight", product, HALF * (logits + hidden + v * d)),
        ]
    return Modelled(tuple(launches), HALF * logits)


def least_share(chip: Chip, step: str, n: int, v: int, d: int) -> float | None:
    """Of the BLAS's rate, what the tiles' products need to take as long as the chunks; None where no rate is enough."""
    arch = int(chip.target[3:])
    chunks = modelled("chunks", step, n, v, d, arch).seconds(chip)
    tiles = modelled("tiles", step, n, v, d, arch, chip.multiprocessors)
    low, high = 0.0, 100.0
    for _ in range(60):
        share = (low + high) / 2
        slower = sum(
            Launch("", each.operations / share, each.memory_bytes, each.instructions).seconds(chip)
            for each in tiles.launches
        )
        low, high = (share, high) if slower > chunks else (low, share)
    return high if high < 99.0 else None


def read_by_programs(tiles: Tiles, block_out: int) -> dict[str, Callable[[int, int, int], tuple[float, float]]]:
    """Bytes of operands that a kernel's programs load, most of them from L2, and bytes that they store: of n, v, d."""

    def product(rows: int, columns: int, depth: int, block_rows: int, block_columns: int) -> float:
        n_tiles = -(-rows // block_rows) * -(-columns // block_columns)
        return float(HALF * n_tiles * depth * (block_rows + block_columns))

    return {
        "linear_forward": lambda n, v, d: (product(n, v, d, tiles.block_n, tiles.block_v), 0.0),
        "linear_grad_logits": lambda n, v, d: (product(n, v, d, tiles.block_n, tiles.block_v), float(HALF * n * v)),
        "linear_grad_hidden": lambda n, v, d: (product(n, d, v, tiles.block_n, block_out), float(SINGLE * n * d)),
        "linear_grad_weight": lambda n, v, d: (product(v, d, n, block_out, block_out), float(SINGLE * v * d)),
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, the first column to the left."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _times(chip: Chip, step: str) -> str:
    arch = int(chip.target[3:])
    rows = []
    for d in DEPTHS:
        seconds = [
            modelled(path, step, N_ROWS, VOCAB_SIZE, d, arch, chip.multiprocessors).seconds(chip) for path in PATHS
        ]
        share = least_share(chip, step, N_ROWS, VOCAB_SIZE, d)
        needed = "no rate is enough" if share is None else f"{share:.0%}"
        rows.append([str(d), *(f"{1e3 * each:.2f}" for each in seconds), needed])
    return table(["D", *(f"{path}, ms" for path in PATHS), "share"], rows)


def _work() -> str:
    rows = []
    for step in STEPS:
        for d in DEPTHS:
            row = [f"{step}, D = {d}"]
            for path in PATHS:
                found = modelled(path, step, N_ROWS, VOCAB_SIZE, d)
                per_logit = N_ROWS * VOCAB_SIZE
                row.append(
                    f"{found.operations / (per_logit * d):.0f} / {found.memory_bytes / per_logit:.1f} / "
                    f"{found.held_bytes / 2**20:.0f}"
                )
            rows.append(row)
    return table(["", *PATHS], rows)


WHAT_IT_IS = """\
**Nothing here was measured, and no GPU was there.** Operations and bytes of each launch, at the chips' published rates:
{tensor:.0%} of the dense bfloat16 rate for every matrix product, a BLAS's and a Triton kernel's alike, and {memory:.0%}
of the bandwidth. A launch takes the longer of the two; the statistics of a tile are issued after its product and add to
it. Left out: latency, launches, the bandwidth of L2 and of shared memory, and whether a kernel comes near such a rate
at all. N = {n}, V = {v}, bfloat16, plain MixCE, gradients of hidden states and weight.

`chunks` and `tiles` are the paths of `fused_linear_mixce_loss`; `materialised` is `torch.nn.functional.linear` with
`fused_mixce_loss(inplace_backward=True)`, whose logits are rounded to bfloat16, as those of the others are not."""
WORK = """\
Operations for each logit and element of depth / bytes of memory for each logit / MiB held besides the inputs and the
gradients handed over. The float32 gradients from which those are rounded are among what is held."""
SHARE = """\
The last column: the share of the BLAS's rate that the tiles' products must exceed to be the faster path."""


def markdown() -> str:
    """The whole report."""
    what = WHAT_IT_IS.format(tensor=TENSOR_REACHABLE, memory=REACHABLE, n=N_ROWS, v=VOCAB_SIZE)
    parts = [f"# A model of the linear loss on GPUs\n\n{what}", f"## Work\n\n{WORK}\n\n{_work()}"]
    for step in STEPS:
        parts.append(f"## {step.capitalize()}\n\n{SHARE}")
        parts += [f"### {chip.name}\n\n{_times(chip, step)}" for chip in CHIPS]
    return "\n\n".join(parts) + "\n"
