"""Log-probabilities of a vocabulary split over one to four ranks: the table, hidden states, DTensors, wrong calls."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from conftest import EMULATED, INTERPRETED
from mixce_kernels import fused_linear_token_logprobs, fused_token_logprobs, vocab_parallel_token_logprobs
from mixce_kernels.parallel import backend as shard_backend
from support.cases import BFLOAT16
from support.inputs import computed
from support.logprob_cases import ALL, Found, LogprobCase, build_logprobs, check_found, differentiated
from support.ranks import run_ranks
from support.shards import SPLITS, column_range, everyone, padded

pytestmark = pytest.mark.slow

NAMES = [EMULATED] if EMULATED else ["reference", "cpu"]
SMALL = [one for one in ALL if math.prod(one.case.shape) <= 35_000]
CASES = SMALL[:: 24 if INTERPRETED else 8] if EMULATED else SMALL


def in_shards(number: int, group: dist.ProcessGroup, one: LogprobCase, backend: str) -> None:
    """A case on the ranks of a group, in each of the splits, with and without padding; the last rank looks at it."""
    inputs = build_logprobs(one)
    vocab_size = one.case.shape[-1]
    begin, end = column_range(list(SPLITS)[number % len(SPLITS)], vocab_size, group)
    shard = inputs.logits.detach()[..., begin:end]
    keywords: dict[str, Any] = {"group": group, "vocab_start": begin}
    if number % 2 == 1:
        shard, keywords["vocab_size"] = padded(shard, end, vocab_size), vocab_size
    inputs = inputs._replace(logits=computed(shard))
    with mock.patch.object(shard_backend, "all_gather", side_effect=shard_backend.all_gather) as gathered:
        result = vocab_parallel_token_logprobs(
            inputs.logits, inputs.targets, backend=backend, **keywords, **inputs.keywords
        )
    assert gathered.call_count == (backend != "reference")
    found = differentiated(result, inputs)
    width = min(shard.shape[-1], max(vocab_size - begin, 0))
    assert (found.grad[..., width:] == 0).all(), "padding has a gradient"
    results = [one.detach() for one in found[:2] if one is not None]
    all_found = everyone(group, (*results, found.grad[..., :width]))
    for other in all_found:
        torch.testing.assert_close(other[:-1], all_found[0][:-1], rtol=0, atol=0, equal_nan=True)
    if group.rank() == group.size() - 1:
        truncation = 1 if INTERPRETED and one.case.dtype == BFLOAT16 else 0
        whole = torch.cat([parts[-1] for parts in all_found], -1)
        check_found(build_logprobs(one), Found(found.logprobs, found.entropy, whole), truncation)


def try_all(backend: str) -> dict[str, str]:
    """What went wrong, by the case's name; groups of 1 to 4 ranks take turns."""
    groups = [dist.new_group(list(range(size))) for size in range(1, dist.get_world_size() + 1)]
    wrong = {}
    for number, one in enumerate(CASES):
        size = 1 + (number + number // 4) % len(groups)
        if dist.get_rank() < size:
            try:
                in_shards(number, groups[size - 1], one, backend)
            except AssertionError as error:
                wrong[str(one)] = f"{size} ranks: {error}"
    return wrong


@pytest.mark.parametrize("backend", NAMES)
def test_as_in_one_process(backend: str) -> None:
    """Every small case; results are the same on each rank, bit for bit, and cost one collective."""
    wrong = {name: text for found in run_ranks(try_all, 4, backend, timeout=240.0) for name, text in found.items()}
    assert not wrong


def hidden_states(backend: str) -> list[str]:
    """The weight's rows, as shards of a group and as DTensors: results and gradients as in one process."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    generator = torch.Generator().manual_seed(3)
    wrong = []
    for dtype, softcap in ((torch.float64, None), (torch.float32, 4.0), (torch.bfloat16, None)):
        hidden, weight, bias = (
            torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 5, 16), (37, 16), (37,))
        )
        targets = torch.randint(37, (3, 5), generator=generator)
        targets[0, 1] = -100
        temperature = torch.rand(3, 5, generator=generator) + 0.5
        upstream = [torch.randn(3, 5, generator=generator) for _ in range(2)]
        keywords: dict[str, Any] = {"softcap": softcap, "return_entropy": True, "max_chunk_bytes": 4 * 37 * 8}

        def outcome(
            hidden: Tensor,
            weight: Tensor,
            bias: Tensor,
            targets: Tensor,
            keywords: dict[str, Any] = keywords,
            upstream: list[Tensor] = upstream,
            **others: Any,
        ) -> list[Tensor]:
            leaves = [one.detach().requires_grad_() for one in (hidden, weight, bias)]
            found = fused_linear_token_logprobs(
                leaves[0], leaves[1], targets, bias=leaves[2], backend=backend, **keywords, **others
            )
            found = [one.full_tensor() if isinstance(one, DTensor) else one for one in found]
            total = sum((one * grad).sum() for one, grad in zip(found, upstream, strict=True))
            grads = torch.autograd.grad(total, leaves)
            return [one.detach() for one in (*found, *grads)]

        expected = outcome(hidden, weight, bias, targets, temperature=temperature)
        start = -(-37 // size) * rank
        rows = slice(start, min(start + -(-37 // size), 37))
        parts = outcome(
            hidden, weight[rows], bias[rows], targets, temperature=temperature, group=group, vocab_start=start
        )
        distributed = outcome(
            distribute_tensor(hidden, mesh, [Replicate()]), distribute_tensor(weight, mesh, [Shard(0)]),
            distribute_tensor(bias, mesh, [Shard(0)]), distribute_tensor(targets, mesh, [Replicate()]),
            temperature=distribute_tensor(temperature, mesh, [Replicate()]),
        )  # fmt: skip
        distributed = [one.to_local() if isinstance(one, DTensor) else one for one in distributed]
        expected[3:] = [one[rows] for one in expected[3:]]
        rtol = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
        for name, found in (("shards", parts), ("DTensors", distributed)):
            try:
                torch.testing.assert_close(found[:2], expected[:2], rtol=2e-5, atol=2e-5)
                torch.testing.assert_close(found[2:], expected[2:], rtol=rtol, atol=rtol)
            except AssertionError as error:
                wrong.append(f"{name} {dtype}: {error}")
    return wrong


@pytest.mark.skipif(INTERPRETED, reason="the kernels have been tried with ranks above, and interpreted are slow")
@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_hidden_states(ranks: int, backend: str) -> None:
    assert run_ranks(hidden_states, ranks, backend, timeout=120.0) == [[]] * ranks


def dtensors(backend: str) -> None:
    """Logits sharded by the vocabulary, by the tokens, and by both; temperature of one number a token or of fewer."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for placements in ((Shard(0), Replicate()), (Replicate(), Shard(2)), (Shard(1), Shard(2)), (Shard(0), Shard(2))):
        values = torch.randn(4, 6, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        targets = torch.arange(24).reshape(4, 6) % 21
        targets[2, 3] = -100
        for shape in ((4, 6), (4, 1), ()):
            temperature = torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.5
            leaf = values.clone().requires_grad_()
            expected = fused_token_logprobs(
                leaf, targets, temperature=temperature, return_entropy=True, backend="reference"
            )
            (grad,) = torch.autograd.grad(expected[0].sum() + 2 * expected[1].sum(), leaf)
            logits = distribute_tensor(values, mesh, placements).requires_grad_()
            found = fused_token_logprobs(
                logits, targets, temperature=temperature, return_entropy=True, validate=True, backend=backend
            )
            assert all(isinstance(one, DTensor) for one in found)
            assert found[0].placements == tuple(one if one != Shard(2) else Replicate() for one in placements)
            torch.testing.assert_close([one.full_tensor() for one in found], list(expected), rtol=1e-9, atol=1e-9)
            (found_grad,) = torch.autograd.grad(found[0].sum() + 2 * found[1].sum(), logits)
            torch.testing.assert_close(found_grad.full_tensor(), grad, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(INTERPRETED, reason="the kernels have been tried with ranks above, and interpreted are slow")
@pytest.mark.parametrize("backend", NAMES)
def test_dtensors(backend: str) -> None:
    run_ranks(dtensors, 4, backend, timeout=120.0)


def wrong_calls(backend: str) -> dict[str, str]:
    """What each call raises here."""
    rank, group = dist.get_rank(), dist.group.WORLD
    shard, targets = torch.randn(3, 8) + rank, torch.tensor([1, 9, 15])
    base: dict[str, Any] = {"group": group, "vocab_start": 8 * rank, "backend": backend}
    calls: dict[str, dict[str, Any]] = {
        "temperature": {"temperature": 1.0 + rank},
        "kind": {"temperature": torch.ones(3) if rank else 1.0},
        "columns": {"vocab_start": 0},
        "target": {"targets": torch.tensor([1, 16, 3])},
        "entry": {"temperature": torch.tensor([1.0, -1.0, 1.0]), "validate": True},
    }
    found = {}
    for name, changes in calls.items():
        # Groups whose ranks have not met yet.
        given = base | {"group": dist.new_group([0, 1]), "targets": targets} | changes
        try:
            vocab_parallel_token_logprobs(shard, **given)
            found[name] = "nothing"
        except (ValueError, IndexError) as error:
            found[name] = str(error)
    return found


SENTENCES = {
    "temperature": "expected the same logit_scale (of a temperature that is a number, divided by it) on every rank",
    "kind": "expected the same temperature on every rank of the group, got None on rank 0 and a tensor on rank 1",
    "columns": "expected shards that hold each column of the vocabulary once",
    "target": "expected targets in [0, 16) or ignore_index=-100, got 16 in row 1",
    "entry": "expected every entry of temperature to be positive and finite",
}


@pytest.mark.skipif(EMULATED is not None, reason="what ranks compare is no kernel's")
@pytest.mark.parametrize("backend", NAMES)
def test_ranks_whose_calls_do_not_fit(backend: str) -> None:
    """The same sentence on every rank."""
    for found in run_ranks(wrong_calls, 2, backend, timeout=120.0):
        for name, sentence in SENTENCES.items():
            assert found[name].startswith(sentence), (name, found[name])
