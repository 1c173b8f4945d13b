"""A model of the vocabulary-parallel loss on GPUs, counted and not measured.

`write_models.py` writes it. For 8 to 1024 ranks: bytes and collectives, the time of a step by
published rates, and memory beside the logits and their gradient; ours, and what one would use instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpu_kernels.model import CHIPS, REACHABLE, Chip
from linear.model import table
from parallel.links import (
    LINKS,
    NCCL_COMMIT,
    PER_NODE,
    Links,
    all_gather_seconds,
    all_reduce_seconds,
    gathered_bytes,
    in_two_levels_bytes,
    in_two_levels_seconds,
    reduced_bytes,
)

RESULT = Path(__file__).parents[1] / "results" / "parallel_model.md"
RANKS = (8, 16, 64, 256, 1024)
N_ROWS, VOCABULARIES = 8192, (128256, 262144)
HALF = 2  # bytes of a logit and of its gradient
# Seconds from the start of a small kernel to that of the next, as eager PyTorch's host issues them. An assumption:
# some 3 to 10 microseconds are usual, and a CUDA graph replays them in about a third of it.
LAUNCH = 4e-6
GATHER, REDUCE = "all-gather", "all-reduce"


@dataclass(frozen=True)
class Way:
    """A loss of logits in bfloat16 that are split over ranks, forward and backward together."""

    name: str
    sent: tuple[tuple[str, float], ...]  # the collectives, and the bytes a token that each takes from a rank
    launches: int  # besides the collectives
    logit_bytes: float  # moved in the memory of a rank, for each of its logits
    token_bytes: float  # moved, a token
    rank_bytes: float  # moved, a token and rank
    held_logit_bytes: float  # at the peak, beside the logits and their gradient
    held_token_bytes: float
    held_rank_bytes: float

    def memory_seconds(self, chip: Chip, ranks: int, vocab: int) -> float:
        """All that moves in the rank's memory."""
        per_token = self.logit_bytes * vocab / ranks + self.token_bytes + self.rank_bytes * ranks
        return N_ROWS * per_token / (REACHABLE * chip.bandwidth)

    def collective_seconds(self, links: Links, ranks: int) -> float:
        """All collectives, one after the other."""
        return sum(SECONDS[kind](links, N_ROWS * message, ranks) for kind, message in self.sent)

    def seconds(self, chip: Chip, ranks: int, vocab: int) -> float:
        """A forward and a backward."""
        links = next(one for one in LINKS if one.chip == chip.name)
        return self.memory_seconds(chip, ranks, vocab) + self.launches * LAUNCH + self.collective_seconds(links, ranks)

    def wire_bytes(self, ranks: int) -> float:
        """What a rank sends over the links, a token, by rings."""
        return sum(WIRE[kind](message, ranks) for kind, message in self.sent)

    def held_bytes(self, ranks: int, vocab: int) -> float:
        """Of a rank, at the peak."""
        per_token = self.held_logit_bytes * vocab / ranks + self.held_token_bytes + self.held_rank_bytes * ranks
        return N_ROWS * per_token


SECONDS: dict[str, Callable[[Links, float, int], float]] = {GATHER: all_gather_seconds, REDUCE: all_reduce_seconds}
WIRE: dict[str, Callable[[float, int], float]] = {GATHER: gathered_bytes, REDUCE: reduced_bytes}

# Counted by counts.py (torch 2.13.0): 7 kernels of ours, and autograd's gradient of 1.
OURS = Way("vocab_parallel_mixce_loss", ((GATHER, 12),), 7 + 1, 3 * HALF, 168, 12, 0, 36, 12)
# From the source: two Triton kernels, three fills and a reduction; another kernel in the backward, in place.
TRANSFORMER_ENGINE = Way("Transformer Engine", ((GATHER, 12),), 8, 3 * HALF, 100, 24, 0, 20, 12)
# From the source, were each compiled graph to read its operands and write its results once: float32 logits and their
# maximum (2 + 4 bytes a logit), exp in place (8), its sum (4), division (8); in the backward 8 in place, rounding 6.
MEGATRON_FUSED = Way("Megatron-LM, fused", ((REDUCE, 4), (REDUCE, 8)), 15, 40, 200, 0, 4, 40, 0)
MEGATRON = Way("Megatron-LM", ((REDUCE, 4),) * 3, 22 + 11, 38 + 14, 248, 0, 4, 37, 0)
LOSS_PARALLEL = Way(
    "PyTorch loss_parallel", ((REDUCE, 4), (REDUCE, 4), (REDUCE, 2)), 23 + 19, 32 + 18, 273, 0, 14, 12, 0
)
# From the source: the maximum (2 bytes a logit), exp to a float32 buffer (2 + 4), the gradient in it (8), rounding (6).
LIGER = Way("Liger", ((REDUCE, 4),) * 3, 12, 22, 200, 0, 4, 40, 0)
WAYS = (OURS, TRANSFORMER_ENGINE, MEGATRON_FUSED, MEGATRON, LOSS_PARALLEL, LIGER)

# Ways to bring the three numbers of each token together, by bytes a token that each collective takes from a rank.
MEETINGS: dict[str, tuple[tuple[str, float], ...]] = {
    "1 all-gather": ((GATHER, 12),),
    "2 all-reduces": ((REDUCE, 4), (REDUCE, 8)),
    "3 all-reduces": ((REDUCE, 4),) * 3,
}
TWO_LEVELS = "all-gathers in two levels"


def meeting_seconds(name: str, links: Links, ranks: int, tokens: int = N_ROWS) -> float:
    """The collectives of a meeting alone."""
    if name == TWO_LEVELS:
        return in_two_levels_seconds(links, 12.0 * tokens, ranks)
    return sum(SECONDS[kind](links, message * tokens, ranks) for kind, message in MEETINGS[name])


def meeting_bytes(name: str, ranks: int) -> float:
    """What a rank sends, a token."""
    if name == TWO_LEVELS:
        return in_two_levels_bytes(12.0, ranks)
    return sum(WIRE[kind](message, ranks) for kind, message in MEETINGS[name])


def loses_from(name: str, links: Links, tokens: int = N_ROWS) -> int | None:
    """The least power of two of ranks at which one all-gather takes longer than this meeting."""
    for exponent in range(1, 14):
        ranks = 2**exponent
        if meeting_seconds("1 all-gather", links, ranks, tokens) > meeting_seconds(name, links, ranks, tokens):
            return ranks
    return None


def _meetings() -> str:
    names = (*MEETINGS, TWO_LEVELS)
    rows = [[f"bytes, {name}", *(f"{meeting_bytes(name, ranks):.0f}" for ranks in RANKS)] for name in names]
    for links in LINKS:
        for name in names:
            microseconds = (f"{1e6 * meeting_seconds(name, links, ranks):.0f}" for ranks in RANKS)
            rows.append([f"us, {links.chip}, {name}", *microseconds])
    return table(["", *(f"{ranks} ranks" for ranks in RANKS)], rows)


def _loses() -> str:
    rows = []
    for links in LINKS:
        for tokens in (1024, N_ROWS, 65536):
            found = (loses_from(name, links, tokens) for name in ("2 all-reduces", "3 all-reduces"))
            rows.append([f"{links.chip}, {tokens} tokens", *("never" if one is None else str(one) for one in found)])
    return table(["", "2 all-reduces", "3 all-reduces"], rows)


def _parts(chip: Chip) -> str:
    links = next(one for one in LINKS if one.chip == chip.name)
    rows = []
    for vocab in VOCABULARIES:
        for ranks in RANKS:
            bandwidth = REACHABLE * chip.bandwidth
            kernels = N_ROWS * vocab / ranks * OURS.logit_bytes / bandwidth
            merge = N_ROWS * (OURS.token_bytes + OURS.rank_bytes * ranks) / bandwidth
            parts = (kernels, OURS.collective_seconds(links, ranks), OURS.launches * LAUNCH, merge)
            rows.append([f"V = {vocab}, {ranks} ranks", *(f"{1e6 * part:.0f}" for part in parts)])
    return table(["", "row kernels, us", "all-gather, us", "launches, us", "bytes of tokens, us"], rows)


def _steps(chip: Chip, vocab: int) -> str:
    rows = [[way.name, *(f"{1e3 * way.seconds(chip, ranks, vocab):.2f}" for ranks in RANKS)] for way in WAYS]
    return table(["ms", *(f"{ranks} ranks" for ranks in RANKS)], rows)


def _collectives() -> str:
    rows = []
    for way in WAYS:
        kinds = [kind for kind, _ in way.sent]
        rows.append(
            [
                way.name,
                f"{len(kinds)} {kinds[0]}{'s' * (len(kinds) > 1)}",
                f"{sum(message for _, message in way.sent):g}",
                *(f"{way.wire_bytes(ranks):.0f}" for ranks in RANKS),
                str(way.launches),
                f"{way.logit_bytes:g}",
            ]
        )
    sent = (f"sent, {ranks} ranks" for ranks in RANKS)
    return table(["", "a step", "bytes a token", *sent, "launches", "memory, bytes a logit"], rows)


def _memory(vocab: int) -> str:
    logits = [N_ROWS * vocab / ranks * HALF / 2**20 for ranks in RANKS]
    rows = [["logits (and as much for their gradient)", *(f"{each:.1f}" for each in logits)]]
    rows += [[way.name, *(f"{way.held_bytes(ranks, vocab) / 2**20:.1f}" for ranks in RANKS)] for way in WAYS]
    return table(["MiB of a rank", *(f"{ranks} ranks" for ranks in RANKS)], rows)


def key_figures() -> str:
    """The table of docs/vocab_parallel.md: an H100 and the first vocabulary."""
    chip, vocab = CHIPS[1], VOCABULARIES[0]
    links = LINKS[1]
    merge = [N_ROWS * (OURS.token_bytes + OURS.rank_bytes * k) / (REACHABLE * chip.bandwidth) for k in RANKS]
    kernels = [N_ROWS * vocab / k * OURS.logit_bytes / (REACHABLE * chip.bandwidth) for k in RANKS]
    rows = [
        ["bytes a token that a rank sends, all-gather", *(f"{meeting_bytes('1 all-gather', k):.0f}" for k in RANKS)],
        ["the same, three all-reduces", *(f"{meeting_bytes('3 all-reduces', k):.0f}" for k in RANKS)],
        ["all-gather, us", *(f"{1e6 * meeting_seconds('1 all-gather', links, k):.0f}" for k in RANKS)],
        ["two all-reduces, us", *(f"{1e6 * meeting_seconds('2 all-reduces', links, k):.0f}" for k in RANKS)],
        ["three all-reduces, us", *(f"{1e6 * meeting_seconds('3 all-reduces', links, k):.0f}" for k in RANKS)],
        ["row kernels, us", *(f"{1e6 * each:.0f}" for each in kernels)],
        ["launches + bytes of tokens, us", *(f"{1e6 * (OURS.launches * LAUNCH + m):.0f}" for m in merge)],
        *([f"{way.name}, ms", *(f"{1e3 * way.seconds(chip, k, vocab):.2f}" for k in RANKS)] for way in WAYS),
        ["logits of a rank, MiB", *(f"{N_ROWS * vocab / k * HALF / 2**20:.1f}" for k in RANKS)],
        *(
            [f"held beside them, {way.name}, MiB", *(f"{way.held_bytes(k, vocab) / 2**20:.1f}" for k in RANKS)]
            for way in (OURS, MEGATRON, LOSS_PARALLEL)
        ),
    ]
    return table(["", *(f"{ranks} ranks" for ranks in RANKS)], rows)


WHAT_IT_IS = """\
**Nothing here was measured, and no GPU was there.** N = {n} tokens, bfloat16 logits [N, V / ranks] on each rank, loss
and gradient, no label smoothing. {node} ranks are joined by NVLink, and nodes of {node} by a network. Times add up:

- kernels and operators at {memory:.0%} of the memory's published bandwidth, by the bytes that they move;
- {launch:.0f} us for each launch, in eager PyTorch: an **assumption** (3 to 10 us are usual). A CUDA graph would take
  about a third of that, and a large kernel hides the launches that follow it, as far as the host runs ahead;
- collectives by the model that NCCL itself chooses its algorithms by (`src/graph/tuning.cc` at {nccl}: latencies of a
  call and of a step), rings and for all-reduces trees, the fastest protocol; links by data sheets, one direction:
  NVLink {nvlink} GB/s, a node's network {network} GB/s (A100, H100, B200). Newer NCCL has all-gathers of logarithmic
  latency, and NVLink joins 72 B200 in some machines: both are left out.

Left out, too: that a rank waits for the slowest, autograd, and whether a kernel comes near such a rate at all."""
SOURCES = """\
Ours, `loss_parallel` and Megatron-LM's three all-reduces are counted by `benchmarks/parallel/counts.py` on one rank of
a group that sends nothing: operators and kernels, their operands and results, and the allocations at the peak.
`loss_parallel` is that of torch 2.13.0, on bfloat16 logits as they are: its log-probabilities are bfloat16, too, and
its third all-reduce is. Megatron-LM (`fused_cross_entropy.py` at 0cb4a9c, `cross_entropy.py` at 00611e6), Transformer
Engine (02965d2) and Liger (`vocab_parallel_cross_entropy.py` at 7121992) are counted by hand from their sources. That
version of Transformer Engine refuses groups of more than one rank (`assert False, "triton fused ce with tp is not fully
tested."`).

Bytes sent are those of rings: ranks - 1 messages in an all-gather, 2 (ranks - 1) / ranks of one in an all-reduce."""
MEETING = """\
Three numbers a token, by different collectives alone. In two levels: an all-gather within each node, whose numbers are
merged, and then one among the nodes."""
LOSES = """\
The least power of two of ranks at which the all-gather takes longer than this. On bytes, rings of all-reduces are ahead
of it from 3 ranks on: it sends ranks / 2 times as many."""
PARTS = "Forward and backward of `vocab_parallel_mixce_loss`. The table's columns add up to the next section's times."
STEPS = "Forward and backward, milliseconds."
HELD = """\
At the peak, beside the logits and their gradient: gathered numbers for ours, float32 or bfloat16 buffers of the logits'
size for others. Transformer Engine writes its gradient over the logits; so does ours with `inplace_backward=True`."""


def markdown() -> str:
    """The whole report."""
    what = WHAT_IT_IS.format(
        n=N_ROWS,
        node=PER_NODE,
        memory=REACHABLE,
        launch=1e6 * LAUNCH,
        nccl=NCCL_COMMIT,
        nvlink=", ".join(f"{one.nvlink / 1e9:.0f}" for one in LINKS),
        network=", ".join(f"{one.network / 1e9:.0f}" for one in LINKS),
    )
    parts = [
        f"# A model of the vocabulary-parallel loss on GPUs\n\n{what}",
        f"## Collectives, launches and bytes\n\n{SOURCES}\n\n{_collectives()}",
        f"## Ways to meet\n\n{MEETING}\n\n{_meetings()}",
        f"### From how many ranks on the all-gather loses\n\n{LOSES}\n\n{_loses()}",
        f"## What our time is made of\n\n{PARTS}",
        *(f"### {chip.name}\n\n{_parts(chip)}" for chip in CHIPS),
        f"## A step\n\n{STEPS}",
        *(f"### {chip.name}, V = {vocab}\n\n{_steps(chip, vocab)}" for chip in CHIPS for vocab in VOCABULARIES),
        f"## Memory\n\n{HELD}",
        *(f"### V = {vocab}\n\n{_memory(vocab)}" for vocab in VOCABULARIES),
    ]
    return "\n\n".join(parts) + "\n"
