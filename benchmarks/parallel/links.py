"""A model, not a measurement, of collectives among GPUs: latency by NCCL's own model, bytes by data sheets.

NCCL chooses its algorithms and protocols by estimates that it computes from constants of its source,
`src/graph/tuning.cc` of NCCL_COMMIT: microseconds of a call and of a step. Later versions have constants of their own,
and more algorithms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

NCCL_COMMIT = "01afd20"
PER_NODE = 8  # ranks joined by NVLink


@dataclass(frozen=True)
class Links:
    """Bytes a second, in one direction."""

    chip: str  # of gpu_kernels.model.CHIPS
    nvlink: float  # of a GPU
    network: float  # of a node's adapters together


# NVLink: half of the data sheets' 600, 900 and 1800 GB/s, which count both directions. Network: eight adapters of
# 200 Gb/s (DGX A100) or of 400 Gb/s (DGX H100, DGX B200).
LINKS = (
    Links("A100-SXM 80 GB", 300e9, 200e9),
    Links("H100-SXM", 450e9, 400e9),
    Links("B200", 900e9, 400e9),
)


@dataclass(frozen=True)
class Protocol:
    """Seconds of a call and of a step within a node and between nodes, and the share of a link that is payload."""

    call: float
    inside: float
    between: float
    share_inside: float
    share_between: float


# LL, LL128 and Simple. LL is for small messages: half of its bytes are flags, and NCCL expects less than that of it.
RING = (
    Protocol(3.6e-6, 0.47e-6, 2.7e-6, 1 / 4, 1 / 4),
    Protocol(10.0e-6, 1.9e-6, 4.0e-6, 0.92, 0.92),
    Protocol(8.4e-6, 3.4e-6, 9.6e-6, 1.0, 1.0),
)
TREE = (
    Protocol(4.4e-6, 0.52e-6, 5.0e-6, 0.9 / 3.8, 0.9 / 3.8),
    Protocol(4.4e-6, 1.2e-6, 8.5e-6, 0.9 * 7 / 9, 0.9 * 0.915),
    Protocol(0.0, 28e-6, 50e-6, 0.9, 0.9),
)
# A step within a node takes longer where LL's other steps are between nodes.
LL_INSIDE = 1.8


def gathered_bytes(message: float, ranks: int) -> float:
    """What a rank sends in a ring's all-gather of such messages: its own, and those of all ranks but its neighbour."""
    return (ranks - 1) * message


def reduced_bytes(message: float, ranks: int) -> float:
    """What a rank sends in a ring's all-reduce."""
    return 2 * (ranks - 1) / ranks * message


def all_gather_seconds(links: Links, message: float, ranks: int) -> float:
    """By a ring, with the protocol that is the fastest."""
    nodes = _nodes(ranks)
    return min(
        protocol.call
        + (ranks - nodes) * _inside(protocol, nodes)
        + (nodes - 1) * protocol.between
        + gathered_bytes(message, ranks) / _bandwidth(links, nodes, protocol)
        for protocol in RING
    )


def all_reduce_seconds(links: Links, message: float, ranks: int) -> float:
    """By a ring or by a tree over nodes, with the protocol that is the fastest."""
    nodes = _nodes(ranks)
    by_ring = min(
        protocol.call
        + 2 * (ranks - nodes) * _inside(protocol, nodes)
        + 2 * (nodes - 1) * protocol.between
        + reduced_bytes(message, ranks) / _bandwidth(links, nodes, protocol)
        for protocol in RING
    )
    by_tree = min(
        protocol.call
        + 2 * ((ranks / nodes - 1) * _inside(protocol, nodes) + math.log2(nodes) * protocol.between)
        + 2 * message / _bandwidth(links, nodes, protocol)
        for protocol in TREE
    )
    return min(by_ring, by_tree)


def in_two_levels_seconds(links: Links, message: float, ranks: int) -> float:
    """All-gathers within the nodes, whose results are merged to one message each, and then among the nodes."""
    nodes = _nodes(ranks)
    if nodes == 1:
        return all_gather_seconds(links, message, ranks)
    # A rank of each node takes part in each of the groups among nodes, which share the nodes' adapters.
    per_rank = Links(links.chip, links.network / PER_NODE, links.network / PER_NODE)
    among = min(
        protocol.call
        + (nodes - 1) * protocol.between
        + gathered_bytes(message, nodes) / _bandwidth(per_rank, nodes, protocol)
        for protocol in RING
    )
    return all_gather_seconds(links, message, PER_NODE) + among


def in_two_levels_bytes(message: float, ranks: int) -> float:
    """What a rank sends in both of them."""
    nodes = _nodes(ranks)
    return gathered_bytes(message, ranks // nodes) + gathered_bytes(message, nodes)


def _nodes(ranks: int) -> int:
    return max(ranks // PER_NODE, 1)


def _inside(protocol: Protocol, nodes: int) -> float:
    return protocol.inside * (LL_INSIDE if nodes > 1 and protocol in (RING[0], TREE[0]) else 1.0)


def _bandwidth(links: Links, nodes: int, protocol: Protocol) -> float:
    if nodes == 1:
        return links.nvlink * protocol.share_inside
    # A ring enters and leaves each node once, by all of its adapters.
    return min(links.nvlink, links.network) * protocol.share_between
