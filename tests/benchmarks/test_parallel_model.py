"""What benchmarks/parallel/model.py computes and writes: its arithmetic by hand, and the counts that it rests on."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from gpu_kernels.model import CHIPS, REACHABLE
from mixce_kernels.options import TokenOptions
from parallel import model as parallel_model
from parallel.counts import count_options
from parallel.links import (
    LINKS,
    all_gather_seconds,
    all_reduce_seconds,
    gathered_bytes,
    in_two_levels_bytes,
    in_two_levels_seconds,
    reduced_bytes,
)
from parallel.model import (
    LAUNCH,
    LIGER,
    LOSS_PARALLEL,
    MEGATRON,
    MEGATRON_FUSED,
    N_ROWS,
    OURS,
    RANKS,
    WAYS,
    Way,
    key_figures,
    loses_from,
    markdown,
    meeting_seconds,
)
from support.paths import BENCHMARKS, ROOT

A100, H100, B200 = CHIPS
OF_H100 = LINKS[1]


def test_bytes_of_rings() -> None:
    """A rank passes on every message but its neighbour's; an all-reduce scatters, and gathers what it has reduced."""
    assert gathered_bytes(12, 8) == 84
    assert reduced_bytes(12, 8) == 21
    assert gathered_bytes(12, 2) == reduced_bytes(12, 2)
    assert all(gathered_bytes(12, k) > reduced_bytes(12, k) for k in (3, 4, 8, 1024))
    # 7 of the node's own, and 3 of the other nodes.
    assert in_two_levels_bytes(12, 32) == 12 * (7 + 3)


def test_latencies_by_hand() -> None:
    """A message of nothing: LL's call and steps; over a network, its steps within a node take 1.8 times as long."""
    assert all_gather_seconds(OF_H100, 0, 8) == pytest.approx(3.6e-6 + 7 * 0.47e-6)
    assert all_gather_seconds(OF_H100, 0, 16) == pytest.approx(3.6e-6 + 14 * 1.8 * 0.47e-6 + 2.7e-6)
    # By a ring in a node of two, by a tree over 128 nodes.
    assert all_reduce_seconds(OF_H100, 0, 2) == pytest.approx(3.6e-6 + 2 * 0.47e-6)
    assert all_reduce_seconds(OF_H100, 0, 1024) == pytest.approx(4.4e-6 + 2 * (7 * 1.8 * 0.52e-6 + 7 * 5e-6))
    assert in_two_levels_seconds(OF_H100, 1e5, 8) == all_gather_seconds(OF_H100, 1e5, 8)


def test_bandwidth_is_the_narrowest_link_s() -> None:
    """A message so large that latency does not count goes by the protocol that wastes nothing."""
    message = 1e12
    assert all_gather_seconds(OF_H100, message, 8) == pytest.approx(7 * message / 450e9, rel=1e-4)
    assert all_gather_seconds(OF_H100, message, 16) == pytest.approx(15 * message / 400e9, rel=1e-4)
    assert all_reduce_seconds(OF_H100, message, 8) == pytest.approx(2 * 7 / 8 * message / 450e9, rel=1e-4)


def test_a_step_is_its_parts() -> None:
    way = Way("", (("all-gather", 12),), 10, 6, 100, 20, 1, 2, 3)
    ranks, vocab = 8, 80000
    moved = N_ROWS * (6 * vocab / ranks + 100 + 20 * ranks)
    expected = moved / (REACHABLE * H100.bandwidth) + 10 * LAUNCH + all_gather_seconds(OF_H100, 12 * N_ROWS, ranks)
    assert way.seconds(H100, ranks, vocab) == pytest.approx(expected)
    assert way.wire_bytes(ranks) == 84
    assert way.held_bytes(ranks, vocab) == N_ROWS * (vocab / ranks + 2 + 3 * ranks)


def test_the_all_gather_wins_in_a_node_and_loses_among_many() -> None:
    for links in LINKS:
        for other in ("2 all-reduces", "3 all-reduces"):
            assert meeting_seconds("1 all-gather", links, 8) < meeting_seconds(other, links, 8)
            assert meeting_seconds("1 all-gather", links, 1024) > 5 * meeting_seconds(other, links, 1024)
            found = loses_from(other, links)
            assert found is not None
            assert meeting_seconds("1 all-gather", links, found) > meeting_seconds(other, links, found)
            assert meeting_seconds("1 all-gather", links, found // 2) <= meeting_seconds(other, links, found // 2)
    # And its launches take longer than its row kernels, from 256 ranks on.
    row_kernels = dataclasses.replace(OURS, token_bytes=0, rank_bytes=0)
    assert all(OURS.launches * LAUNCH < row_kernels.memory_seconds(H100, ranks, 128256) for ranks in (8, 16, 64))
    assert OURS.launches * LAUNCH > row_kernels.memory_seconds(H100, 256, 128256)


def test_the_model_is_near_what_liger_published() -> None:
    """Milliseconds of 8192 x 131072 bfloat16 logits on one H100, by Liger's benchmark of its loss and Megatron-LM's."""
    for way, published in ((LIGER, 7.96), (MEGATRON_FUSED, 18.2), (MEGATRON, 21.2)):
        modelled = 1e3 * (way.memory_seconds(H100, 1, 131072) + way.launches * LAUNCH)
        assert 0.75 < modelled / published < 1.02


@pytest.fixture(scope="module")
def counts() -> dict[tuple[str, str], dict[str, float]]:
    """What parallel/counts.py prints."""
    command = [sys.executable, "-m", "parallel.counts"]
    done = subprocess.run(
        command,
        cwd=BENCHMARKS,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "KINETO_LOG_LEVEL": "6"},
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(one["loss"], one["step"]): one for one in found}


@pytest.mark.parametrize("way", [OURS, LOSS_PARALLEL, MEGATRON], ids=lambda way: way.name)
def test_the_model_rests_on_counts(way: Way, counts: dict[tuple[str, str], dict[str, float]]) -> None:
    """Another version of torch, or of the merging, may launch a few more; a passage over the logits is never missed."""
    name = "three-all-reduces" if way is MEGATRON else way.name.removeprefix("PyTorch ")
    steps = [counts[name, step] for step in ("forward", "backward")]
    assert sum(one["launches"] for one in steps) == pytest.approx(way.launches, rel=0.1)
    assert sum(one["logit_bytes"] for one in steps) == pytest.approx(way.logit_bytes)
    assert sum(one["token_bytes"] for one in steps) == pytest.approx(way.token_bytes, rel=0.1)
    assert sum(one["rank_bytes"] for one in steps) == pytest.approx(way.rank_bytes, rel=0.1)
    # The header's 12 bytes are a share of 1024 tokens' here.
    assert steps[0]["sent"] == pytest.approx([sent for _, sent in way.sent], abs=0.02)
    assert steps[1]["sent"] == []
    for name, held in (("logit", way.held_logit_bytes), ("token", way.held_token_bytes), ("rank", way.held_rank_bytes)):
        # Of what grows with the tokens alone, more in the backward is no more of memory: the logits' is there, too.
        assert max(one[f"held_{name}_bytes"] for one in steps[: 1 if name == "token" else 2]) == pytest.approx(
            held, rel=0.1, abs=0.1
        )


@pytest.mark.parametrize("with_stats", [False, True], ids=["", "statistics"])
@pytest.mark.parametrize(
    "options",
    [
        TokenOptions(),
        TokenOptions(label_smoothing=0.1, z_loss=1e-3, logit_scale=0.7),
        TokenOptions(softcap=30.0),
        TokenOptions(7, 0.1, 1e-3, 30.0, 0.7),
    ],
    ids=["plain", "smoothing", "softcap", "every"],
)
def test_launches_of_a_step(options: TokenOptions, with_stats: bool) -> None:
    """Five of a forward and two of a backward, and one collective; with a softcap statistics take a second look."""
    steps = count_options(options, with_stats=with_stats)
    assert steps["forward"].launches == 5 + (with_stats and options.softcap is not None)
    assert steps["backward"].launches == 2
    assert len(steps["forward"].sent) == 1
    assert steps["backward"].sent == []


def test_the_report_and_the_documentation_are_the_model_s() -> None:
    assert parallel_model.RESULT.read_text() == markdown()
    assert "Nothing here was measured" in markdown()
    assert all(chip.name in markdown() for chip in CHIPS)
    assert all(way.name in markdown() for way in WAYS)
    assert all(f"{ranks} ranks" in markdown() for ranks in RANKS)
    assert key_figures() in (ROOT / "docs" / "vocab_parallel.md").read_text()
