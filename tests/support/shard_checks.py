"""What the kernels of a split vocabulary must find, held to the oracle: of every backend, in one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mixce_kernels import MixCEStats, backends
from mixce_kernels.backends.results import Results
from mixce_kernels.backends.shards import Columns
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions
from mixce_kernels.weightings import PROBABILITY
from support.cases import BFLOAT16, DTYPES, FLOAT32, FLOAT64, Case
from support.inputs import build
from support.loss_checks import check, check_statistics
from support.numerics import accumulate_dtype
from support.oracle import Options, np, token_results
from support.shard_by_shard import shard_by_shard, split_columns
from support.shards import SPLITS
from support.weightings import WEIGHTINGS

EVERY = Options(label_smoothing=0.2, z_loss=1e-2, softcap=4.0, logit_scale=1.3, ignore_index=7)
OPTIONS = {
    "plain": Options(),
    "smoothing": Options(label_smoothing=0.1, logit_scale=0.7),
    "smoothing_1": Options(label_smoothing=1.0),
    "softcap": Options(softcap=6.0),
    "every": EVERY,
}
# Those that differ in the kernels, or in what they find in rare rows.
DISTINCT = ("plain", "smoothing_1", "every")
BASE = Case("shards", shape=(12, 259), reduction="none", upstream="per_token")
CASES = [
    BASE.at(name=f"shards_{name}", dtype=dtype, options=options, eta="per_token")
    for name, options in OPTIONS.items()
    for dtype in DTYPES
]
CASES += [
    BASE.at(name=f"shards_{kind}_{name}", kind=kind, options=options, dtype=FLOAT64 if name == "every" else FLOAT32)
    for kind in ("confident", "masked", "first_block_masked", "target_masked", "ties", "wide", "nonfinite_rows")
    for name, options in OPTIONS.items()
    if name in DISTINCT
]
CASES += [
    BASE.at(name="shards_shifted", kind="shifted"),
    BASE.at(name="shards_more_tokens_than_a_block", shape=(150, 9), target_dtype=torch.int32),
    BASE.at(name="shards_strided_eta", shape=(5, 3, 33), eta="column", layout="sliced", options=EVERY),
    BASE.at(name="shards_0d_eta", eta="0d_float64", dtype=BFLOAT16),
    BASE.at(name="shards_all_ignored", ignored="all"),
    BASE.at(name="shards_no_tokens", shape=(0, 9)),
    BASE.at(name="shards_one_column", shape=(4, 1), options=Options(label_smoothing=0.1)),
    BASE.at(name="shards_one_token", shape=(33,), eta="1"),
]
CASES += [
    BASE.at(name=f"shards_{name}", weighting=name, kind=kind, dtype=dtype, options=OPTIONS[options])
    for name in WEIGHTINGS
    if name != "custom"  # of no kernel
    for kind, dtype, options in (("random", FLOAT32, "plain"), ("confident", FLOAT32, "every"))
]
MIXTURE = Mixture(eta_value=0.3)
# For an emulation that compiles each kernel of a new type or option for long.
FEW = [
    (number, case)
    for number, case in enumerate(CASES)
    if case.dtype in (FLOAT32, FLOAT64) and case.options in [OPTIONS[name] for name in DISTINCT]
]


def check_case(number: int, case: Case, backend: str, extra_ulps: int = 0) -> None:
    """A case on 1 to 4 ranks, with and without padding; splits take turns."""
    ranks, padded, with_stats = 1 + number % 4, number % 2 == 1, number % 3 > 0
    columns = split_columns(list(SPLITS)[number // 2 % len(SPLITS)], case.shape[-1], ranks)
    inputs = build(case)
    eta = inputs.eta.expand(inputs.targets.shape) if isinstance(inputs.eta, torch.Tensor) else inputs.eta
    weighting = inputs.keywords.get("weighting", PROBABILITY)
    mixture = Mixture.of(eta, weighting, inputs.targets, accumulate_dtype(case.dtype))
    for stats in {with_stats or weighting.needs_sums, not with_stats or weighting.needs_sums}:
        results, grads = shard_by_shard(
            backend, columns, inputs.logits, inputs.targets, mixture, TokenOptions(*case.options), inputs.upstream,
            with_stats=stats, padded=padded, in_forward=number % 5 == 0,
        )  # fmt: skip
        check(inputs, inputs.oracle(), results.loss, torch.cat(grads, -1), extra_ulps)
        if stats:
            check_statistics(case, MixCEStats.of(results.stats, results.correct))


THREE = [Columns(0, 7), Columns(7, 8), Columns(15, 8)]


def check_rare_rows(backend: str) -> None:
    """A shard of -inf, rows without a finite logit, infinities, ties between ranks, a NaN in another rank's columns."""
    logits = torch.randn(10, 23, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([20, 3, 9, 4, 16, 0, 8, 2, 15, -100])
    logits[0, 7:15] = -torch.inf
    logits[1] = -torch.inf
    logits[2, 1] = torch.nan
    logits[3, 22] = torch.inf
    logits[4, 16] = -torch.inf
    logits[5, 1:] = -torch.inf
    logits[6, [8, 15]] = 9.0  # the first of the largest, before another rank's
    logits[7, [2, 1]] = 9.0  # the second, of one rank
    logits[8, [15, 14]] = 9.0  # the second, after another rank's
    logits[9] = torch.nan
    eta, upstream = torch.rand(10, 2)[:, 0], torch.linspace(-1, 2, 10)
    for dtype in (torch.float32, torch.float64):
        for options in (OPTIONS[name] for name in DISTINCT):
            if options.softcap is not None:
                # tanh makes a finite logit of an infinity.
                options = options._replace(ignore_index=-100, softcap=1e-3)
            values, upstream = logits.to(dtype), upstream.to(dtype)
            results, grads = shard_by_shard(
                backend,
                THREE,
                values,
                targets,
                Mixture(eta.to(dtype)),
                TokenOptions(*options),
                upstream,
                with_stats=True,
            )
            expected = token_results(values.double().numpy(), targets.numpy(), eta.double().numpy(), options)
            found = {"loss": results.loss, "grad": torch.cat(grads, -1), "nll": results.stats[0]}
            found |= {"q": results.stats[1], "weight": results.stats[2], "entropy": results.stats[4]}
            found |= {"collision": results.stats[5]}
            for name, one in found.items():
                exact = getattr(expected, name)
                exact = exact * upstream.double().numpy()[:, None] if name == "grad" else exact
                # A softcap of 1e-3 scales the gradient alike.
                np.testing.assert_allclose(one.double().numpy(), exact, rtol=2e-5, atol=2e-6, err_msg=name)
            assert results.correct.tolist() == expected.correct.tolist(), options


def check_targets_not_held_once(backend: str) -> None:
    """A target that no rank holds, or two: NaN in its row alone, or an error before anything is written."""
    logits = torch.randn(6, 23, generator=torch.Generator().manual_seed(0))
    twice = [Columns(0, 8), Columns(7, 8), Columns(15, 8)]
    beyond = torch.tensor([3, 23, -1, 2**33 + 5, -100, 22])
    for columns, targets, expected in (
        (THREE, beyond, [False, True, True, True, False, False]),
        (twice, torch.tensor([6, 7, 8, 7, -100, 0]), [False, True, False, True, False, False]),
    ):
        for with_stats in (False, True):

            def found(
                columns: list[Columns] = columns, targets: torch.Tensor = targets, with_stats: bool = with_stats
            ) -> tuple[Results, list[torch.Tensor]]:
                return shard_by_shard(
                    backend, columns, logits, targets, MIXTURE, TokenOptions(), torch.ones(6), with_stats=with_stats
                )

            if backends.get(backend).checks_targets:
                kind, sentence = (
                    (IndexError, "got 23 in row 1") if columns is THREE else (ValueError, "hold row 1's target")
                )
                with pytest.raises(kind, match=sentence):
                    found()
                continue
            results, grads = found()
            assert results.loss.isnan().tolist() == expected
            assert all(grad[:, 1].isnan().tolist() == expected for grad in grads)
            if with_stats:
                assert all(
                    row[:3].isnan().tolist() == [wrong] * 3
                    for row, wrong in zip(results.stats.T, expected, strict=True)
                )
                assert not (results.correct & torch.tensor(expected)).any()


def check_launches(backend: str, launched: Callable[[], list[str]]) -> None:
    """A rank launches six kernels; here its message is written twice, so that it is known before all meet.

    `launched` returns the names of the kernels since it was last called.
    """
    logits, targets, upstream = torch.randn(40, 300).bfloat16(), torch.arange(40), torch.ones(40)
    for with_stats in (False, True):
        launched()
        shard_by_shard(
            backend, [Columns(0, 300)], logits, targets, MIXTURE, TokenOptions(), upstream, with_stats=with_stats
        )
        names = launched()
        assert len(names) == 3 + 4 + 2, names


CHECKS = (check_rare_rows, check_targets_not_held_once)
