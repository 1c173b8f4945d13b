"""What the ranks of a vocab-parallel loss tell each other, and what they say when their calls do not fit together."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from conftest import EMULATED, INTERPRETED
from mixce_kernels import fused_mixce_loss, mixce_loss_reference, vocab_parallel_mixce_loss
from mixce_kernels.weightings import Power
from support.allocations import allocated_bytes
from support.inputs import computed
from support.ranks import RankError, run_ranks

CommDebugMode = pytest.importorskip("torch.distributed.tensor.debug", reason="needs NumPy").CommDebugMode

BACKEND = EMULATED or "cpu"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INTERPRETED, reason="test_vocab_parallel.py has tried the kernels; the rest is the same"),
]
RANKS = 3
WIDTH = 5  # columns of a rank
TOKENS = 6
VOCAB_SIZE = RANKS * WIDTH


def tokens() -> tuple[Tensor, Tensor]:
    """Logits of the whole vocabulary and targets, the same on every rank; one token is ignored."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(VOCAB_SIZE, (TOKENS,), generator=generator)
    targets[1] = -100
    return torch.randn(TOKENS, VOCAB_SIZE, generator=generator), targets


def own(logits: Tensor) -> Tensor:
    """The rank's columns, a leaf."""
    begin = dist.get_rank() * WIDTH
    return logits[:, begin : begin + WIDTH].clone().requires_grad_()


def loss_of(group: dist.ProcessGroup | None = None, **changes: Any) -> Any:
    """The loss of `tokens`, with some arguments changed."""
    logits, targets = tokens()
    arguments: dict[str, Any] = {
        "logits_shard": own(logits), "targets": targets, "eta": 0.3, "group": group,
        "vocab_start": dist.get_rank() * WIDTH, "backend": BACKEND,
    }  # fmt: skip
    return vocab_parallel_mixce_loss(**(arguments | changes))


def outcome(call: Callable[[], Any]) -> tuple[str, str]:
    """The type of the error and its sentence, or ("", "")."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


# What rank 1 does otherwise than the others, whether the ranks' messages are of the same size all the same, and what
# all of them say.
FAULTS: dict[str, tuple[dict[str, Any], bool, str]] = {
    "gap": ({"vocab_start": 6}, True, r"hold each column of the vocabulary once, got columns \[0, 5\) on rank 0, \[6,"),
    "overlap": ({"vocab_start": 4}, True, r"once, got columns \[0, 5\) on rank 0, \[4, 9\) on rank 1, \[10, 15\) on"),
    "negative": ({"vocab_start": -5}, True, r"got columns \[0, 5\) on rank 0, \[-5, 0\) on rank 1"),
    "narrow": ({"logits_shard": torch.zeros(TOKENS, 4)}, True, r"got columns \[0, 5\) on rank 0, \[5, 9\) on rank 1"),
    "eta": ({"eta": 0.5}, True, "the same eta on every rank of the group, got 0.3 on rank 0 and 0.5 on rank 1"),
    "eta_tensor": ({"eta": torch.tensor(0.3)}, True, "the same eta .* got 0.3 on rank 0 and a tensor on rank 1"),
    "weighting": ({"weighting": Power(2.0)}, True, "same weighting .* got Probability on rank 0 and Power on rank 1"),
    "ignore_index": ({"ignore_index": 7}, True, "the same ignore_index .* got -100 on rank 0 and 7 on rank 1"),
    "z_loss": ({"z_loss": 1e-3}, True, "the same z_loss .* got 0 on rank 0 and 0.001 on rank 1"),
    "softcap": ({"softcap": 30.0}, True, "the same softcap .* got None on rank 0 and 30 on rank 1"),
    "logit_scale": ({"logit_scale": 2.0}, True, "the same logit_scale .* got 1 on rank 0 and 2 on rank 1"),
    "reduction": ({"reduction": "sum"}, True, "the same reduction .* got mean on rank 0 and sum on rank 1"),
    "weights": ({"token_weights": torch.ones(TOKENS)}, True, "same token_weights .* got none on rank 0 and some on"),
    "vocab_size": ({"vocab_size": 15}, True, "the same vocab_size .* got None on rank 0 and 15 on rank 1"),
    "half": ({"logits_shard": torch.zeros(TOKENS, WIDTH).half()}, True, "same dtype .*torch.float16 on rank 1"),
    "smoothing": ({"label_smoothing": 0.1}, False, "the same label_smoothing .* got 0 on rank 0 and 0.1 on rank 1"),
    "stats": ({"return_stats": True}, False, "answer to return_stats .* got False on rank 0 and True on rank 1"),
    "double": ({"logits_shard": torch.zeros(TOKENS, WIDTH).double()}, False, "same dtype .*torch.float64 on rank 1"),
    "tokens": (
        {"logits_shard": torch.zeros(2, WIDTH), "targets": torch.zeros(2).long()}, False,
        "same number of tokens .* got 6 on rank 0 and 2 on rank 1",
    ),
}  # fmt: skip


def try_faults() -> dict[str, list[tuple[str, str]]]:
    """What this rank says to each fault: at a group's first call, and where the messages allow it, at a later one."""
    said = {}
    for name, (changes, same_size, _) in FAULTS.items():
        group = dist.new_group()
        mine = changes if dist.get_rank() == 1 else {}
        heard = [outcome(lambda group=group, mine=mine: loss_of(group, **mine))]
        assert outcome(lambda group=group: loss_of(group)) == ("", "")
        if same_size and BACKEND == "cpu":
            heard.append(outcome(lambda group=group, mine=mine: loss_of(group, **mine)))
            assert outcome(lambda group=group: loss_of(group)) == ("", "")
        said[name] = heard
    return said


@pytest.fixture(scope="module")
def faults() -> list[dict[str, list[tuple[str, str]]]]:
    return run_ranks(try_faults, RANKS)


@pytest.mark.parametrize("name", FAULTS)
def test_every_rank_says_what_does_not_fit(name: str, faults: list[dict[str, list[tuple[str, str]]]]) -> None:
    """At once, in the same sentence, and the group is as good as before."""
    for said in faults:
        assert said[name] == faults[0][name]
        for kind, sentence in said[name]:
            assert kind == "ValueError"
            assert re.search(FAULTS[name][2], sentence), sentence


def try_calls() -> dict[str, Any]:
    """Everything else about a group's calls, each by a name."""
    return {name: run() for name, run in CALLS.items()}


def _errors() -> dict[str, tuple[str, str]]:
    logits, targets = tokens()
    whole = logits.requires_grad_()
    bad = targets.clone()
    bad[4] = VOCAB_SIZE
    elsewhere = targets.clone()
    elsewhere[2] = dist.get_rank() * WIDTH
    others = dist.new_group([0, 1])
    errors = {
        "bad_target": lambda: loss_of(targets=bad),
        "bad_target_of_a_padded_vocabulary": lambda: loss_of(targets=bad, vocab_size=VOCAB_SIZE),
        "bad_target_reference": lambda: loss_of(targets=bad, backend="reference"),
        "bad_target_validated": lambda: loss_of(targets=bad, validate=True),
        "bad_target_one_process": lambda: fused_mixce_loss(whole, bad, backend="cpu" if not EMULATED else "reference"),
        "bad_eta_validated": lambda: loss_of(eta=torch.tensor(2.0), validate=True),
        "not_in_the_group": lambda: loss_of(others) if dist.get_rank() == 2 else None,
        "group": lambda: loss_of("world"),
        "start": lambda: loss_of(vocab_start=1.0),
        "size": lambda: loss_of(vocab_size=0),
        "scalar": lambda: loss_of(logits_shard=torch.tensor(1.0)),
        "shape": lambda: loss_of(targets=targets[1:]),
    }
    if BACKEND == "cpu":
        errors["other_targets"] = lambda: loss_of(targets=elsewhere)
    return {name: outcome(call) for name, call in errors.items()}


COLLECTIVES = re.compile(r"^c10d::")


def _collectives(call: Callable[[], Any]) -> tuple[Any, list[tuple[str, int]]]:
    """What a call returns, and its collectives with the bytes that this rank gives to each."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        result = call()
    found = []
    for event in profiler.events():
        if COLLECTIVES.match(event.name):
            # The largest tensor of an all-gather is what comes out.
            sizes = [torch.Size(shape).numel() for shape in event.input_shapes if shape]
            found.append((event.name, 4 * min(sizes)))
    return result, found


def _communication() -> dict[str, Any]:
    """Collectives of a first call, of later ones with each option, and of a backward."""
    group = dist.new_group()
    unchecked = dist.new_group()
    found: dict[str, Any] = {"first": _collectives(lambda: loss_of(group))[1]}
    for name, options in (
        ("plain", {}), ("smoothing", {"label_smoothing": 0.1}), ("stats", {"return_stats": True}),
        ("both", {"label_smoothing": 0.1, "return_stats": True}), ("cap", {"softcap": 3.0, "z_loss": 1e-3}),
    ):  # fmt: skip
        loss, found[name] = _collectives(lambda options=options: loss_of(group, **options))
        loss = loss[0] if isinstance(loss, tuple) else loss
        found[f"{name}_backward"] = _collectives(loss.backward)[1]
    found["unchecked"] = _collectives(lambda: loss_of(unchecked, check_group=False))[1]
    with CommDebugMode() as mode:
        loss_of(group).backward()
    found["comm_debug"] = mode.get_total_counts()
    return found


def _memory() -> tuple[list[int], list[int]]:
    """Allocations of a forward and of a backward, largest first, of shards of 16 x 40000 logits."""
    shard = torch.randn(16, 40_000, requires_grad=True)
    targets = torch.randint(3 * 40_000, (16,), generator=torch.Generator().manual_seed(0))

    def forward() -> Tensor:
        return vocab_parallel_mixce_loss(
            shard, targets, group=None, vocab_start=dist.get_rank() * 40_000, label_smoothing=0.1, backend=BACKEND
        )

    sizes = allocated_bytes(forward)
    loss = forward()
    return sizes, allocated_bytes(lambda: torch.autograd.grad(loss, shard, retain_graph=True))


def _unchecked() -> bool:
    """Shards in the order of their ranks reversed, without a check: the same loss."""
    logits, targets = tokens()
    begin = (RANKS - 1 - dist.get_rank()) * WIDTH
    shard = logits[:, begin : begin + WIDTH]
    loss = loss_of(
        logits_shard=shard, vocab_start=begin, check_group=False, label_smoothing=0.2, targets=targets, vocab_size=None
    )
    expected = mixce_loss_reference(logits, targets, 0.3, label_smoothing=0.2)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    return True


def _inplace() -> bool:
    """The gradient lies where the logits were; what was saved of them raises instead of being garbage."""
    leaf = own(tokens()[0])
    shard = leaf * 1.0
    squares = shard.square().sum()
    loss = loss_of(logits_shard=shard, inplace_backward=True)
    expected = torch.autograd.grad(loss_of(logits_shard=leaf), leaf)[0]
    (grad,) = torch.autograd.grad(loss, shard, retain_graph=True)
    assert grad.data_ptr() == shard.data_ptr()
    torch.testing.assert_close(grad, expected)
    assert "modified by an inplace operation" in outcome(lambda: torch.autograd.grad(squares, leaf))[1]
    return True


def _compiled() -> bool:
    """One graph, for any number of tokens; every option, and a weighting of the caller's."""
    logits, targets = tokens()
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "return_stats": True}
    options["weighting"] = lambda stats: stats.q.sqrt()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    group, begin = dist.group.WORLD, dist.get_rank() * WIDTH

    def head(shard: Tensor, targets: Tensor) -> Any:
        return vocab_parallel_mixce_loss(
            shard * 2, targets, 0.3, group=group, vocab_start=begin, backend=BACKEND, **options
        )

    compiled = torch.compile(head, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for count in (TOKENS, TOKENS - 2, 3):
        leaf = own(logits[:count])
        results = []
        for function in (head, compiled):
            loss, stats = function(leaf, targets[:count].clone())
            results.append((loss, *stats, *torch.autograd.grad(loss, leaf)))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0], compilations
    return True


def _second_derivatives() -> bool:
    """Of every reduction, option and mode, as one process finds them."""
    logits, targets = tokens()
    logits = logits.double()
    begin = dist.get_rank() * WIDTH
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for backend in (BACKEND, "reference"):
        for mode in ({}, {"grad_in_forward": True}, {"inplace_backward": True}):
            for reduction, options in (
                ("mean", {}), ("none", {"label_smoothing": 0.2, "z_loss": 0.05}), ("sum", {"softcap": 2.0}),
            ):  # fmt: skip
                whole = logits.clone().requires_grad_()
                upstream = torch.linspace(0.5, 2, TOKENS, dtype=torch.float64)[: TOKENS if reduction == "none" else 1]
                upstream = upstream.reshape(() if reduction != "none" else (-1,)).clone().requires_grad_()
                shard = computed(own(logits).detach())
                found = []
                for leaf, loss in (
                    (whole, mixce_loss_reference(whole, targets, 0.3, reduction=reduction, **options)),
                    (shard, loss_of(logits_shard=shard, reduction=reduction, backend=backend, **options, **mode)),
                ):
                    (grad,) = torch.autograd.grad(loss, leaf, upstream, create_graph=True)
                    part = direction if leaf is whole else direction[:, begin : begin + WIDTH]
                    # The product counts once: the shard's part of it is this rank's.
                    second, by_upstream = torch.autograd.grad(grad, (leaf, upstream), part)
                    if leaf is whole:
                        grad, second = (one[:, begin : begin + WIDTH] for one in (grad, second))
                    found.append((grad, second, by_upstream))
                torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    return True


def _nothing_to_do() -> bool:
    """No tokens, and only ignored ones: 0, connected to the graph."""
    for count in (0, 4):
        shard = torch.randn(count, WIDTH, requires_grad=True)
        loss = loss_of(logits_shard=shard, targets=torch.full((count,), -100))
        loss.backward()
        assert loss == 0
        assert (shard.grad == 0).all()
    return True


CALLS: dict[str, Callable[[], Any]] = {
    "errors": _errors,
    "communication": _communication,
    "memory": _memory,
    "unchecked": _unchecked,
    "inplace": _inplace,
    "compiled": _compiled,
    "second_derivatives": _second_derivatives,
    "nothing_to_do": _nothing_to_do,
}


@pytest.fixture(scope="module")
def calls() -> list[dict[str, Any]]:
    return run_ranks(try_calls, RANKS, timeout=120.0)


def test_errors(calls: list[dict[str, Any]]) -> None:
    """On every rank alike; a bad target in the words of one process."""
    for found in calls:
        errors = found["errors"]
        one_process = errors["bad_target_one_process"]
        assert one_process[0] == "IndexError"
        for name in ("bad_target", "bad_target_of_a_padded_vocabulary", "bad_target_reference", "bad_target_validated"):
            if BACKEND == "cpu" or name in ("bad_target_reference", "bad_target_validated"):
                assert errors[name] == one_process, name
            else:
                assert errors[name] == ("", "")
        assert errors["bad_eta_validated"][0] == "ValueError"
        assert re.search(r"group to be a ProcessGroup that this rank is in, or None, got str", errors["group"][1])
        assert errors["start"] == ("TypeError", "expected vocab_start to be an int, got float")
        assert errors["size"] == ("ValueError", "expected vocab_size to be positive, got 0")
        assert errors["scalar"] == ("ValueError", "expected logits_shard of shape [..., columns], got []")
        assert errors["shape"][0] == "ValueError"
        assert "expected targets of shape [6] for logits_shard" in errors["shape"][1]
        if BACKEND == "cpu":
            assert "expected every rank to have the same targets and columns of its own" in errors["other_targets"][1]
    assert calls[2]["errors"]["not_in_the_group"][0] == "TypeError"


def test_one_collective_of_a_few_bytes_a_token(calls: list[dict[str, Any]]) -> None:
    """12 bytes a token, 4 more for label smoothing, 8 for statistics, and 12 a call; a backward says nothing."""
    for found in calls:
        told = found["communication"]
        assert len(told["first"]) == 2
        for name, numbers in (("plain", 3), ("cap", 3), ("smoothing", 4), ("stats", 5), ("both", 6), ("unchecked", 3)):
            assert len(told[name]) == 1, told[name]
            assert told[name][0][1] == 4 * (numbers * TOKENS + 3), told[name]
            assert told.get(f"{name}_backward", []) == []
        assert told["comm_debug"] == 1


def test_memory(calls: list[dict[str, Any]]) -> None:
    """Nothing of the shard's size but the gradient."""
    if EMULATED:
        pytest.skip("an emulation allocates as it likes")
    for found in calls:
        forward, backward = found["memory"]
        assert forward[0] < 16 * 40_000
        assert backward[0] == 16 * 40_000 * 4
        assert backward[1] < 16 * 40_000


@pytest.mark.parametrize("name", ["unchecked", "inplace", "compiled", "second_derivatives", "nothing_to_do"])
def test_calls(name: str, calls: list[dict[str, Any]]) -> None:
    """What the functions of these names say."""
    assert all(found[name] for found in calls)


def die_alone() -> None:
    """Rank 1 ends while the others wait for it."""
    loss_of()
    if dist.get_rank() == 1:
        os._exit(3)
    loss_of()


def test_a_rank_that_dies_is_torch_distributed_s_error() -> None:
    """Nothing of ours comes between."""
    with pytest.raises(RankError, match=r"(?s)rank 1 ended with exit code 3.*all_gather.*RuntimeError: .*gloo"):
        run_ranks(die_alone, RANKS)


def test_without_a_process_group() -> None:
    """A sentence instead of an AttributeError."""
    with pytest.raises(RuntimeError, match=r"expected torch.distributed to be initialised"):
        vocab_parallel_mixce_loss(torch.zeros(2, 3), torch.zeros(2).long(), group=None, vocab_start=0)
