"""The linear loss with a sharded weight on one to four ranks: the table, derivatives, collectives, and wrong calls."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from conftest import EMULATED, INTERPRETED
from mixce_kernels import MixCEStats, fused_linear_mixce_loss, linear_mixce_loss_reference
from mixce_kernels.linear import chunks
from mixce_kernels.linear.matmul import Products, products
from support.cases import BFLOAT16
from support.linear_cases import LINEAR, LinearCase, LinearInputs, build_linear, check_linear
from support.loss_checks import weight_of
from support.numerics import to_numpy
from support.oracle import np
from support.ranks import run_ranks, what_goes_wrong
from support.shards import PADDING, SPLITS, column_range, everyone

pytestmark = pytest.mark.slow

WORLD = 4
# The ranks have CPU tensors.
NAMES = [EMULATED] if EMULATED else ["reference", "cpu"]
JUNK = 1e4  # in padding


class Turn(NamedTuple):
    """A case of the table, and where it is tried."""

    case: LinearCase
    size: int  # of the group
    split: str
    is_padded: bool
    backends: list[str]


def _table() -> dict[str, Turn]:
    """By name; groups, splits and padding take turns."""
    small = [case for case in LINEAR if math.prod(case.plain.shape) <= 10_000]
    if EMULATED:
        # Emulated kernels are slow, and have been tried on the whole table by themselves.
        chosen = small[:: 24 if INTERPRETED else 6]
    else:
        # Also several tiles of the weight in a shard, and long sums over hidden numbers.
        large = [case for case in LINEAR if str(case) in ("n12_v6200_d40-float32", "n40_v515_d768-float32")]
        # Half of them, with each reduction: they take turns, too.
        chosen = [case for number, case in enumerate(small) if number % 4 in (0, 3)] + large
    table = {}
    for number, case in enumerate(chosen):
        size, split = 1 + (number + number // 4) % WORLD, list(SPLITS)[number % len(SPLITS)]
        is_padded = number // 2 % 2 == 1
        name = f"{number}-{case}-{case.plain.reduction}-{split}_on_{size}{'_padded' if is_padded else ''}"
        backends = [name for name in NAMES if name != "reference" or number % 3 == 1]
        table[name] = Turn(case, size, split, is_padded, backends)
    return table


TABLE = _table()


def shard_of(
    tensor: Tensor,  # [V, ...]
    split: str,
    is_padded: bool,
    group: dist.ProcessGroup,
) -> Tensor:
    """A rank's rows of a weight or bias, a leaf; with rows of junk after the end of the vocabulary."""
    begin, end = column_range(split, tensor.shape[0], group)
    shard = tensor.detach()[begin:end]
    if is_padded and end == tensor.shape[0]:
        shard = torch.cat((shard, shard.new_full((PADDING, *shard.shape[1:]), JUNK)))
    return shard.requires_grad_()


def joined(parts: list[Tensor], split: str, vocab_size: int) -> Tensor:
    """The rows of the whole from those of the ranks, whose padding must be 0."""
    numbers = SPLITS[split](vocab_size, len(parts))
    for part, number in zip(parts, numbers, strict=True):
        assert (part[number:] == 0).all(), "padding has a gradient"
    return torch.cat([part[:number] for part, number in zip(parts, numbers, strict=True)])


def assert_same_bits(values: list[Tensor], what: str) -> None:
    for rank, value in enumerate(values):
        assert torch.equal(value.nan_to_num(nan=1e30), values[0].nan_to_num(nan=1e30)), f"{what} of rank {rank} differs"


def as_in_one_process(group: dist.ProcessGroup, backend: str, turn: Turn) -> None:
    """Loss and gradients by the accuracy rule; the loss and the hidden states' gradient to the bit on every rank."""
    case, _, split, is_padded, _ = turn
    inputs = build_linear(case)
    vocab_size = inputs.weight.shape[0]
    leaves = [inputs.hidden, *(shard_of(one, split, is_padded, group) for one in inputs.leaves[1:])]
    keywords = dict(inputs.keywords, vocab_start=column_range(split, vocab_size, group)[0])
    if is_padded:
        keywords["vocab_size"] = vocab_size
    if "max_chunk_bytes" in keywords:
        keywords["max_chunk_bytes"] = max(keywords["max_chunk_bytes"] // group.size(), 1)
    bias = leaves[2] if len(leaves) > 2 else None
    tokens = inputs.tokens
    loss = fused_linear_mixce_loss(
        *leaves[:2], tokens.targets, tokens.eta, bias=bias, group=group, backend=backend, **keywords
    )
    found = everyone(group, (loss.detach(), *torch.autograd.grad(loss, leaves, tokens.upstream)))
    if group.rank() != group.size() - 1:
        return
    losses, hidden_grads, *shard_grads = zip(*found, strict=True)
    assert_same_bits(losses, "loss")
    assert_same_bits(hidden_grads, "grad_hidden")
    grads = [hidden_grads[0], *(joined(parts, split, vocab_size) for parts in shard_grads)]
    # The interpreter truncates where a device rounds to bfloat16.
    check_linear(inputs, losses[0], grads, 1 if INTERPRETED and case.plain.dtype == BFLOAT16 else 0)


def small_call(
    group: dist.ProcessGroup, split: str = "uneven", dtype: torch.dtype = torch.float32, is_padded: bool = False
) -> tuple[list[Tensor], list[Tensor], Tensor, dict[str, Any]]:
    """Whole leaves: hidden states [2, 4, 12], weight [50, 12], bias [50]; a rank's; targets; and what tells of it."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 4, 12), (50, 12), (50,))
    whole = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    targets = torch.randint(50, (2, 4), generator=generator)
    targets.view(-1)[1::3] = -100
    own = [whole[0].detach().clone().requires_grad_(), *(shard_of(one, split, is_padded, group) for one in whole[1:])]
    keywords = {"group": group, "vocab_start": column_range(split, 50, group)[0], "vocab_size": 50, "bias": own[2]}
    return whole, own, targets, keywords


def assert_all_close(got: Any, expected: Any, epsilons: int = 64) -> None:
    """As close as sums of some dozens of numbers in another order."""
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        bound = epsilons * torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=bound, atol=bound * max([1.0, *other.abs().flatten().tolist()]))


def check_linear_statistics(inputs: LinearInputs, stats: MixCEStats) -> None:
    """As close to the oracle's as those of one process."""
    expected, _ = inputs.oracle()
    for name, statistic in stats._asdict().items():
        want = getattr(expected, name)
        if name == "weight":
            want = weight_of(inputs.tokens, stats, want.dtype)
        assert statistic.shape == inputs.tokens.targets.shape
        assert not statistic.requires_grad
        if name == "correct":
            assert statistic.flatten().tolist() == want.tolist()
        else:
            error = np.abs(to_numpy(statistic.flatten(), want.dtype) - want).max(initial=0)
            assert error <= 2e-6 * max(np.abs(want).max(initial=0), 1), f"{name} is off by {error}"


def statistics(group: dist.ProcessGroup, backend: str) -> None:
    """With and without gradients, in chunks; the same on every rank."""
    for name in ("all-float32", "masked-float64"):
        inputs = build_linear(next(case for case in LINEAR if str(case) == name))
        vocab_size = inputs.weight.shape[0]
        keywords = dict(inputs.keywords, vocab_start=column_range("empty", vocab_size, group)[0], group=group)
        for with_grad in (False, True):
            weight, bias = (
                shard_of(one, "empty", False, group).detach().requires_grad_(with_grad)
                for one in (inputs.weight, inputs.bias)
            )
            _, stats = fused_linear_mixce_loss(
                inputs.hidden.detach(), weight, inputs.tokens.targets, inputs.tokens.eta, bias=bias, backend=backend,
                return_stats=True, **keywords,
            )  # fmt: skip
            assert isinstance(stats, MixCEStats)
            of_ranks = everyone(group, tuple(stats))
            for name, values in zip(stats._fields, zip(*of_ranks, strict=True), strict=True):
                assert_same_bits([one.double() for one in values], name)
            check_linear_statistics(inputs, stats)


def only_what_requires_a_gradient(group: dist.ProcessGroup, backend: str) -> None:
    for reduction in ("mean", "none"):
        for wanted in ((0,), (1,), (1, 2)):
            whole, own, targets, keywords = small_call(group)
            for i, (one, other) in enumerate(zip(whole, own, strict=True)):
                one.requires_grad_(i in wanted)
                other.requires_grad_(i in wanted)
            expected = linear_mixce_loss_reference(*whole[:2], targets, bias=whole[2], reduction=reduction)
            loss = fused_linear_mixce_loss(*own[:2], targets, backend=backend, reduction=reduction, **keywords)
            got = torch.autograd.grad(loss.sum(), [own[i] for i in wanted])
            got = [
                joined(everyone(group, one), "uneven", 50) if i > 0 else one for i, one in zip(wanted, got, strict=True)
            ]
            assert_all_close(got, torch.autograd.grad(expected.sum(), [whole[i] for i in wanted]))


def without_a_gradient_there_is_no_graph(group: dist.ProcessGroup, backend: str) -> None:
    _, own, targets, keywords = small_call(group)
    with torch.no_grad():
        loss = fused_linear_mixce_loss(*own[:2], targets, backend=backend, **keywords)
    assert not loss.requires_grad
    assert_all_close([loss], [fused_linear_mixce_loss(*own[:2], targets, backend=backend, **keywords).detach()])


def backward_twice(group: dist.ProcessGroup, backend: str) -> None:
    """The second one computes the gradients anew, and the ranks meet in it."""
    for reduction in ("sum", "none"):
        _, own, targets, keywords = small_call(group, "empty", is_padded=True)
        loss = fused_linear_mixce_loss(*own[:2], targets, backend=backend, reduction=reduction, **keywords).sum()
        first = torch.autograd.grad(3.0 * loss, own, retain_graph=True)
        second = torch.autograd.grad(-1.5 * loss, own)
        of_ranks = everyone(group, second[0])
        assert_same_bits(of_ranks, "grad_hidden")
        assert_all_close([-2.0 * one for one in second], first)


def backward_computes_the_chunks_of_forward(group: dist.ProcessGroup, backend: str) -> None:
    """With other chunks a BLAS rounds otherwise: probabilities would be of other logits than the sums."""
    rows: list[int] = []

    def counted(*args: Any) -> Products:
        made = products(*args)
        logits = made.logits
        made.logits = lambda hidden, out: (rows.append(len(hidden)), logits(hidden, out))
        return made

    for changes in ({}, {"vocab_size": None}):
        for dtype in (torch.float32, BFLOAT16):
            _, own, targets, keywords = small_call(group, "uneven", dtype)
            keywords.update(changes, reduction="none", max_chunk_bytes=500, backend=backend)
            with mock.patch.object(chunks, "products", counted):
                loss = fused_linear_mixce_loss(*own[:2], targets.abs() % 50, **keywords)
                forward = rows.copy()
                rows.clear()
                torch.autograd.grad(loss.sum(), own)
            of_ranks = everyone(group, (forward, rows.copy()))
            rows.clear()
            assert all(one == other == of_ranks[0][0] for one, other in of_ranks), (changes, dtype, of_ranks)
            assert sum(forward) == 8


def second_derivative(group: dist.ProcessGroup, backend: str) -> None:
    """Of the ranks' gradients along one direction, against the whole in one process, in float64."""
    for reduction in ("mean", "sum", "none"):
        for split in SPLITS:
            whole, own, targets, keywords = small_call(group, split, torch.float64)
            options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 9.0}
            generator = torch.Generator().manual_seed(2)
            directions = [torch.randn(one.shape, generator=generator, dtype=one.dtype) for one in whole]
            upstream = torch.randn((), generator=generator, dtype=torch.float64).requires_grad_()
            expected = linear_mixce_loss_reference(*whole[:2], targets, 0.3, bias=whole[2], **options)
            first = torch.autograd.grad(expected.sum() * upstream, whole, create_graph=True)
            want = torch.autograd.grad(first, [*whole, upstream], directions)

            own_directions = [directions[0], *(shard_of(one, split, False, group).detach() for one in directions[1:])]
            loss = fused_linear_mixce_loss(
                *own[:2], targets, 0.3, backend=backend, max_chunk_bytes=800, **options, **keywords
            )
            own_first = torch.autograd.grad(loss.sum() * upstream, own, create_graph=True)
            of_hidden, *of_shards, of_upstream = torch.autograd.grad(own_first, [*own, upstream], own_directions)
            got = [of_hidden, *(joined(everyone(group, one), split, 50) for one in of_shards), of_upstream]
            assert_all_close(got, want, 256)
            assert_all_close(own_first[:1], [first[0].detach()], 256)


def autocast(group: dist.ProcessGroup, backend: str) -> None:
    """bfloat16 products with a float32 weight; the hidden states' gradient is added up in float32, and rounded once."""
    whole, own, targets, keywords = small_call(group)
    hidden = own[0].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_linear_mixce_loss(hidden, own[1], targets, backend=backend, max_chunk_bytes=900, **keywords)
    got = torch.autograd.grad(loss, [hidden, *own[1:]])
    assert [one.dtype for one in (loss, *got)] == [torch.float32, BFLOAT16, torch.float32, torch.float32]
    rounded = [whole[0].detach().bfloat16().double(), whole[1].detach().bfloat16().double(), whole[2].detach().double()]
    for one in rounded:
        one.requires_grad_()
    expected = linear_mixce_loss_reference(*rounded[:2], targets, bias=rounded[2])
    want = torch.autograd.grad(expected, rounded)
    # One rounding to bfloat16 is half of its epsilon of 2^-7.
    torch.testing.assert_close(got[0].double(), want[0], rtol=2.0**-8 * 1.01, atol=1e-6)
    whole_grads = [joined(everyone(group, one), "uneven", 50).double() for one in got[1:]]
    for one, other in zip([loss.detach().double(), *whole_grads], [expected.detach(), *want[1:]], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


def compiled_equals_eager(group: dist.ProcessGroup, backend: str) -> None:
    torch.use_deterministic_algorithms(False)
    try:
        _, own, targets, keywords = small_call(group, is_padded=True)
        for reduction in ("mean", "none"):
            results = []
            compiled = torch.compile(fused_linear_mixce_loss, fullgraph=True, backend="aot_eager")
            for function in (compiled, fused_linear_mixce_loss):
                loss = function(
                    *own[:2], targets, 0.3, backend=backend, reduction=reduction, max_chunk_bytes=400, **keywords
                )
                results.append((loss.detach(), *torch.autograd.grad(loss.sum() * 1.5, own)))
            of_ranks = everyone(group, results[0][1])
            assert_same_bits(of_ranks, "grad_hidden")
            assert_all_close(*results)
    finally:
        torch.use_deterministic_algorithms(True)


def collectives_of(function: Callable[[], Any]) -> dict[str, int]:
    """The collectives that a function calls, those inside of operators too."""
    counts: Counter[str] = Counter()

    def counting(name: str, *args: Any, **keywords: Any) -> Any:
        counts["all_gather" if "all_gather" in name else name] += 1
        return originals[name](*args, **keywords)

    kinds = ("all_", "broadcast", "gather", "reduce", "scatter", "barrier", "send", "recv")
    originals = {name: value for name, value in vars(dist).items() if name.startswith(kinds) and callable(value)}
    with ExitStack() as stack:
        for name in originals:
            stack.enter_context(mock.patch.object(dist, name, partial(counting, name)))
        function()
    return counts


def collectives(group: dist.ProcessGroup, backend: str) -> None:
    """One all-gather a chunk, and one all-reduce of the hidden states' gradient, if that is wanted."""
    _, own, targets, keywords = small_call(group)
    targets = targets.abs() % 50
    # Two of eight rows a chunk.
    keywords["max_chunk_bytes"] = 2 * -(-50 // group.size()) * 4
    found: dict[str, Any] = {}

    def forward(reduction: str, **changes: Any) -> None:
        found["loss"] = fused_linear_mixce_loss(
            *own[:2], targets, backend=backend, reduction=reduction, **{**keywords, **changes}
        )

    def backward() -> None:  # of the last forward
        torch.autograd.grad(found["loss"].sum(), [one for one in own if one.requires_grad])

    forward("mean")  # the ranks of a group compare their first call
    assert collectives_of(lambda: forward("mean")) == {"all_gather": 4, "all_reduce": 1}
    assert collectives_of(backward) == {}
    assert collectives_of(lambda: forward("none")) == {"all_gather": 4}
    assert collectives_of(backward) == {"all_reduce": 1}
    assert collectives_of(lambda: forward("mean", max_chunk_bytes=None)) == {"all_gather": 1, "all_reduce": 1}
    assert collectives_of(lambda: forward("mean", check_group=False)) == {"all_gather": 4, "all_reduce": 1}
    # Without it the ranks tell each other what they hold.
    assert collectives_of(lambda: forward("mean", vocab_size=None))["all_gather"] > 4
    with torch.no_grad():
        assert collectives_of(lambda: forward("mean")) == {"all_gather": 4}
    own[0].requires_grad_(False)
    assert collectives_of(lambda: forward("mean")) == {"all_gather": 4}
    assert collectives_of(backward) == {}


def other_chunks_in_a_group_that_has_met(group: dist.ProcessGroup, backend: str) -> None:
    """Budgets at which some ranks' shards allow other chunks than before, and others' do not."""
    for changes in ({}, {"vocab_size": None}):
        _, own, targets, keywords = small_call(group, "uneven")
        losses = [
            fused_linear_mixce_loss(
                *own[:2], targets, backend=backend, **{**keywords, **changes}, max_chunk_bytes=budget
            ).detach()
            for budget in (None, 1, 90, 100, 110, 200, 300, 401, 402, 1000, 1001, 1001)
        ]
        assert_all_close(losses[1:], losses[:1] * (len(losses) - 1))


def raised(call: Callable[[], Any]) -> str:
    """What the call raises."""
    try:
        call()
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def assert_all_raise(group: dist.ProcessGroup, sentence: str, call: Callable[[], Any]) -> None:
    """Every rank raises this one sentence."""
    found = everyone(group, raised(call))
    assert len(set(found)) == 1, found
    assert re.fullmatch(sentence, found[0]), found[0]


# How the call of rank 1 differs, and what every rank says.
DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "eta": ({"eta": 0.25}, "the same eta .*got 0.5 on rank 0 and 0.25 on rank 1"),
    "eta_tensor": ({"eta": torch.tensor(0.5)}, "the same eta .*got 0.5 on rank 0 and a tensor on rank 1"),
    "ignore_index": ({"ignore_index": -1}, "the same ignore_index .*got -100 on rank 0 and -1 on rank 1"),
    "smoothing": ({"label_smoothing": 0.5}, "the same label_smoothing .*got 0 on rank 0 and 0.5 on rank 1"),
    "z_loss": ({"z_loss": 0.5}, "the same z_loss .*got 0 on rank 0 and 0.5 on rank 1"),
    "softcap": ({"softcap": 3.0}, "the same softcap .*got None on rank 0 and 3 on rank 1"),
    "logit_scale": ({"logit_scale": 2.0}, "the same logit_scale .*got 1 on rank 0 and 2 on rank 1"),
    "reduction": ({"reduction": "sum"}, "the same reduction .*got mean on rank 0 and sum on rank 1"),
    "stats": ({"return_stats": True}, "the same answer to return_stats .*got False on rank 0 and True on rank 1"),
    "token_weights": (
        {"token_weights": torch.ones(8)}, "the same token_weights .*got none on rank 0 and some on rank 1"
    ),
    "hidden_size": ({"hidden_size": 7}, "the same hidden size .*got 12 on rank 0 and 7 on rank 1"),
    "tokens": ({"tokens": 5}, "the same number of tokens .*got 8 on rank 0 and 5 on rank 1"),
    "dtype": ({"dtype": torch.float64}, "the same dtype .*got torch.float32 on rank 0 and torch.float64 on rank 1"),
    "gap": (
        {"columns": (13, 24)},
        r"shards that hold each column of the vocabulary \[0, 48\) once, got columns "
        r"\[0, 12\) on rank 0, \[13, 24\) on rank 1, \[24, 36\) on rank 2, \[36, 48\) on rank 3",
    ),
    "overlap": ({"columns": (11, 24)}, r"shards that hold each column .* got columns .*\[11, 24\) on rank 1, .*"),
    "short": ({"columns": (12, 12)}, r"shards that hold each column .* got columns .*\[12, 12\) on rank 1, .*"),
}  # fmt: skip
# Those that show in the one collective of a call, whose size they do not change.
SEEN_LATER = ("eta", "eta_tensor", "ignore_index", "z_loss", "logit_scale", "softcap", "gap", "overlap", "short")


def wide_call(of: dist.ProcessGroup, by: str, **changes: Any) -> Any:
    """Of 8 tokens and 48 columns, 12 a rank."""
    begin, end = changes.pop("columns", (12 * of.rank(), 12 * of.rank() + 12))
    hidden_size, tokens = changes.pop("hidden_size", 12), changes.pop("tokens", 8)
    dtype, eta = changes.pop("dtype", torch.float32), changes.pop("eta", 0.5)
    hidden = torch.ones(tokens, hidden_size, dtype=dtype, requires_grad=True)
    weight = torch.ones(end - begin, hidden_size, dtype=dtype, requires_grad=True)
    targets = changes.pop("targets", torch.arange(tokens))
    keywords = {"group": of, "vocab_start": begin, "vocab_size": 48, "backend": by, **changes}
    return fused_linear_mixce_loss(hidden, weight, targets, eta, **keywords)


def differing_calls(group: dist.ProcessGroup, backend: str) -> None:
    """ValueError on every rank at a group's first call, and what can be seen without asking, later, too."""
    for later in (False, True):
        for name, (changes, sentence) in DIFFERENCES.items():
            # At each call "reference" asks.
            if later and not (backend == "reference" or (backend == "cpu" and name in SEEN_LATER)):
                continue
            fresh = dist.new_group(list(range(group.size())))
            if later:
                wide_call(fresh, backend)
            own = changes if fresh.rank() == 1 else {}
            assert_all_raise(fresh, f"ValueError: expected .*{sentence}", partial(wide_call, fresh, backend, **own))
            # The group is none the worse for it.
            assert wide_call(fresh, backend).isfinite()


def differing_calls_of_unknown_size(group: dist.ProcessGroup, backend: str) -> None:
    """Without `vocab_size` the ranks tell each other their columns at each call, and all that differs shows."""
    fresh = dist.new_group(list(range(group.size())))
    wide_call(fresh, backend, vocab_size=None)
    for changes, sentence in DIFFERENCES.values():
        own = {"vocab_size": None, **(changes if fresh.rank() == 1 else {})}
        sentence = sentence.replace(r" \[0, 48\)", "")
        assert_all_raise(fresh, f"ValueError: expected .*{sentence}", partial(wide_call, fresh, backend, **own))
        assert wide_call(fresh, backend, vocab_size=None).isfinite()


def bad_targets(group: dist.ProcessGroup, backend: str) -> None:
    """IndexError on every rank, which names the row among all rows and not among those of a chunk."""
    targets = torch.arange(8)
    targets[2], targets[6] = -100, 48
    call = {"targets": targets, "max_chunk_bytes": 2 * 12 * 4}
    sentence = r"IndexError: expected targets in \[0, 48\) or ignore_index=-100, got 48 in row 6"
    for changes in ({}, {"vocab_size": None}, {"check_group": False}, {"reduction": "none"}, {"validate": True}):
        if not EMULATED or "validate" in changes:
            assert_all_raise(group, sentence, partial(wide_call, group, backend, **call, **changes))
            assert wide_call(group, backend).isfinite()
    if EMULATED:
        loss = wide_call(group, backend, reduction="none", **call)
        assert loss.isnan().tolist() == [row == 6 for row in range(8)]
    sentence = r"ValueError: expected every entry of eta in \[0, 1\], got one outside"
    assert_all_raise(group, sentence, partial(wide_call, group, backend, eta=torch.tensor(2.0), validate=True))


def wrong_arguments(group: dist.ProcessGroup, backend: str) -> None:
    """One sentence each, and no collective, in which other ranks might not be."""
    for changes, sentence in (
        ({"vocab_start": None}, "ValueError: expected vocab_start, the first of the rank's columns, with group.*None"),
        ({"group": None}, r"ValueError: expected group with vocab_start=\d+, got None .*"),
        ({"group": None, "vocab_start": None}, "ValueError: expected group with vocab_size=48, got None .*"),
        ({"vocab_start": 1.0}, "TypeError: expected vocab_start to be an int, got float"),
        ({"vocab_start": True}, "TypeError: expected vocab_start to be an int, got bool"),
        ({"vocab_size": "48"}, "TypeError: expected vocab_size to be an int, got str"),
        ({"vocab_size": 0}, "ValueError: expected vocab_size to be positive, got 0"),
        ({"group": 3}, "TypeError: expected group to be a ProcessGroup that this rank is in, or None, got int"),
        ({"path": "tiles", "backend": None}, "ValueError: expected path 'chunks' with a sharded weight, got 'tiles'"),
        ({"max_chunk_bytes": 0}, "ValueError: expected max_chunk_bytes to be positive, got 0"),
        ({"bias": torch.zeros(13)}, r"ValueError: expected bias of shape \[V\] = \[12\] .*got \[13\]"),
        ({"targets": torch.zeros(9).long()}, r"ValueError: expected targets of shape \[8\] .*got \[9\]"),
        ({"eta": 1.5}, r"ValueError: expected eta in \[0, 1\], got 1.5"),
    ):
        found: list[str] = []
        assert collectives_of(lambda: found.append(raised(partial(wide_call, group, backend, **changes)))) == {}  # noqa: B023
        assert re.fullmatch(sentence, found[0]), found[0]


# Each on so many ranks.
CHECKS: dict[Callable[[dist.ProcessGroup, str], None], int] = {
    statistics: 3,
    only_what_requires_a_gradient: 2,
    without_a_gradient_there_is_no_graph: 2,
    backward_twice: 3,
    backward_computes_the_chunks_of_forward: 3,
    second_derivative: 3,
    autocast: 2,
    compiled_equals_eager: 2,
    collectives: 2,
    other_chunks_in_a_group_that_has_met: 3,
    differing_calls: WORLD,
    differing_calls_of_unknown_size: WORLD,
    bad_targets: WORLD,
    wrong_arguments: 2,
}
# The reference has no chunks, and more collectives; its compilation is PyTorch's.
OF_KERNELS = (compiled_equals_eager, collectives, backward_computes_the_chunks_of_forward)
# Those in which an emulated kernel, which is slow, may do what others do not.
OF_EMULATIONS = (statistics, backward_twice, autocast, bad_targets)
RUNS = [
    (check, name)
    for check in (OF_EMULATIONS if EMULATED else CHECKS)
    for name in NAMES
    if name != "reference" or check not in OF_KERNELS
]


def try_all() -> dict[str, str]:
    """What went wrong on this rank, by name; empty where it went well."""
    groups = [dist.new_group(list(range(size))) for size in range(1, WORLD + 1)]
    calls = {
        f"{backend}-{name}": (turn.size, partial(as_in_one_process, backend=backend, turn=turn))
        for name, turn in TABLE.items()
        for backend in turn.backends
    }
    calls |= {
        f"{backend}-{check.__name__}": (CHECKS[check], partial(check, backend=backend)) for check, backend in RUNS
    }
    return what_goes_wrong(
        {name: partial(call, groups[size - 1]) for name, (size, call) in calls.items() if dist.get_rank() < size}
    )


@pytest.fixture(scope="module")
def wrong() -> list[dict[str, str]]:
    """What went wrong on each rank."""
    return run_ranks(try_all, WORLD, timeout=240.0)


@pytest.mark.parametrize(
    ("name", "backend_name"), [(name, backend) for name, turn in TABLE.items() for backend in turn.backends]
)
def test_as_in_one_process(name: str, backend_name: str, wrong: list[dict[str, str]]) -> None:
    """Loss and gradients by the accuracy rule, whatever the split; alike on each rank what every rank has."""
    text = "".join(of_rank[f"{backend_name}-{name}"] for of_rank in wrong[: TABLE[name].size])
    assert not text, text


@pytest.mark.parametrize(("check", "backend_name"), RUNS, ids=lambda one: getattr(one, "__name__", one))
def test_on_ranks(
    check: Callable[[dist.ProcessGroup, str], None], backend_name: str, wrong: list[dict[str, str]]
) -> None:
    """What the functions above find."""
    name = f"{backend_name}-{check.__name__}"
    text = "".join(of_rank[name] for of_rank in wrong[: CHECKS[check]])
    assert not text, text
