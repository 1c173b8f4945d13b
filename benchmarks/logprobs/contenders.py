"""Who takes part in the benchmark of log-probabilities, and what each of them computes.

A contender of LOGITS has functions (logits [N, V], targets [N]), one of HIDDEN has functions (hidden [N, D], weight
[V, D], targets [N]). They return the log-probabilities [N] and, but for the modes of log-probabilities alone, the
entropies [N], by mode:

    forward            both results without a graph
    both               both results, and the gradient through both of them
    inplace            the same, the gradient written over the logits
    logprobs_forward   log-probabilities alone, without a graph
    logprobs_both      log-probabilities alone, and the gradient through them

MixCE with its statistics stands beside them, as in bench_vocab.py: its pass over the logits makes the same sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.check import Errors
from harness.contenders import IGNORE_INDEX, add_installed, from_file
from logprobs.check import LogprobErrors, LogprobInputs, Oracle, plain_results
from logprobs.plan import HIDDEN, LOGITS
from mixce_kernels import backends, fused_linear_token_logprobs, fused_token_logprobs
from mixce_kernels.integrations.versions import require
from vocab.contenders import Contender, why_not, with_stats
from vocab.programs import Program
from vocab.programs import check as check_loss

MODE_TITLES = {
    "forward": "forward",
    "both": "forward + backward",
    "inplace": "in place",
    "logprobs_forward": "log-probabilities alone, forward",
    "logprobs_both": "log-probabilities alone, forward + backward",
}
MODES = tuple(MODE_TITLES)
ALONE = ("logprobs_forward", "logprobs_both")
WITHOUT_GRADIENT = ("forward", "logprobs_forward")

TokenFunction = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class LogprobContender:
    """A name for tables, what is computed and how it is checked.

    Attributes:
        level: LOGITS or HIDDEN.
        functions: the function of each mode.
        compiled: its first call of a shape compiles.
        rounds: it rounds logits or log-probabilities to the inputs' type; the other contenders' are float32.
        unshifted: it adds up logits as they are, and not what they are less than their row's largest.
    """

    name: str
    computes: str
    level: str
    functions: Mapping[str, TokenFunction]
    compiled: bool = False
    rounds: bool = False
    unshifted: bool = False


@dataclass(frozen=True)
class LogprobProgram:
    """One contender in one mode, to be called again and again."""

    contender: LogprobContender
    mode: str

    def steps(self, inputs: LogprobInputs, targets: Tensor, results: list[Tensor]) -> list[Callable[[], None]]:
        """The call's parts; they leave log-probabilities, entropies and gradients in `results`."""
        function, leaves = self.contender.functions[self.mode], inputs.leaves

        def forward_alone() -> None:
            with torch.no_grad():
                results.extend(function(*(one.detach() for one in leaves), targets))

        def both() -> None:
            found = function(*leaves, targets)
            # The upstream gradients of a result are of its type.
            given = [upstream.to(one.dtype) for one, upstream in zip(found, inputs.upstreams, strict=False)]
            results.extend((*found, *torch.autograd.grad(found, leaves, given)))

        return [forward_alone if self.mode in WITHOUT_GRADIENT else both]


AnyContender = LogprobContender | Contender
AnyProgram = LogprobProgram | Program


def check(program: AnyProgram, inputs: Any, oracle: Oracle) -> LogprobErrors | Errors:
    """Runs the program once at full size, and compares its results with the oracle's; a loss is held to its own."""
    if isinstance(program, Program):
        return check_loss(program, inputs)
    inputs.restore()
    results: list[Tensor] = []
    for step in program.steps(inputs, inputs.targets, results):
        step()
    one = program.contender
    return oracle.compare(results, 1 if program.mode in ALONE else 2, rounds=one.rounds, unshifted=one.unshifted)


def error_fields(errors: object) -> dict[str, float]:
    """The columns of what `check` returns; of a loss, its gradient's."""
    found: dict[str, tuple[float, float]] = {}
    if isinstance(errors, Errors):
        found["grad_logits"] = (errors.grad, errors.grad_allowed)
    elif isinstance(errors, LogprobErrors):
        found = errors.found
    return {f"{name}_{what}": pair[i] for name, pair in found.items() for i, what in enumerate(("error", "allowed"))}


def programs_of(contenders: Iterable[AnyContender], modes: Iterable[str]) -> list[AnyProgram]:
    """The contenders in those of the modes that they have."""
    wanted = tuple(modes)
    found: list[AnyProgram] = []
    for one in contenders:
        if isinstance(one, Contender):
            found += [Program(one, mode, loss) for mode, loss in one.losses.items() if mode in wanted]
        else:
            found += [LogprobProgram(one, mode) for mode in one.functions if mode in wanted]
    return found


def level_of(contender: AnyContender) -> str:
    """What a contender's results are computed from."""
    return LOGITS if isinstance(contender, Contender) else contender.level


def logprob_contenders(
    device: torch.device, extra_files: Iterable[Path] = ()
) -> tuple[list[AnyContender], dict[str, str]]:
    """All that can run on `device`, of both levels, ours first, and why the others cannot.

    Args:
        device: where the inputs will be.
        extra_files: Python files that define `CONTENDERS`, a list of `LogprobContender`.
    """
    left_out = {f"fused-{name}": reason for name in backends.NAMES if (reason := why_not(name, device)) is not None}
    ours = [name for name in backends.NAMES if f"fused-{name}" not in left_out]
    able: list[AnyContender] = [_fused(name) for name in ours]
    able += [with_stats(name) for name in ours[:1]]
    able += [
        LogprobContender(
            "eager",
            "log_softmax().gather() and -(p * log_p).sum(-1) of logits.float()",
            LOGITS,
            {
                "forward": _eager,
                "both": _eager,
                "logprobs_forward": partial(_eager, count=1),
                "logprobs_both": partial(_eager, count=1),
            },
        ),
        LogprobContender(
            "torch.compile", "the formulas of eager under torch.compile", LOGITS, _forward_and_both(_compiled),
            compiled=True,
        ),
        LogprobContender(
            "fused-linear", "fused_linear_token_logprobs", HIDDEN, _forward_and_both(_fused_linear)
        ),
        LogprobContender(
            "eager-linear", "F.linear and the formulas of eager", HIDDEN, _forward_and_both(_eager_linear), rounds=True
        ),
    ]  # fmt: skip
    add_installed({"trl": _trl}, device, able, left_out)
    for path in extra_files:
        able += from_file(path)
    return able, left_out


def _fused(backend: str) -> LogprobContender:
    both = {"return_entropy": True}
    options: dict[str, dict[str, bool]] = {
        "forward": both,
        "both": both,
        "inplace": {**both, "inplace_backward": True},
        "logprobs_forward": {},
        "logprobs_both": {},
    }
    functions = {mode: partial(_fused_results, backend, chosen) for mode, chosen in options.items()}
    return LogprobContender(f"fused-{backend}", f"fused_token_logprobs(backend={backend!r})", LOGITS, functions)


def _fused_results(backend: str, options: dict[str, bool], logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    found = fused_token_logprobs(logits, targets, ignore_index=IGNORE_INDEX, backend=backend, **options)
    return found if isinstance(found, tuple) else (found,)


def _fused_linear(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    found = fused_linear_token_logprobs(hidden, weight, targets, ignore_index=IGNORE_INDEX, return_entropy=True)
    assert isinstance(found, tuple)
    return found


def _eager(logits: Tensor, targets: Tensor, count: int = 2) -> tuple[Tensor, ...]:
    return plain_results(logits.float(), targets, count)


def _eager_linear(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return _eager(F.linear(hidden, weight), targets)


def _compiled(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return _compile_eager()(logits, targets)


@functools.cache
def _compile_eager() -> TokenFunction:
    # Not before the first call: the compiler's import takes seconds.
    return torch.compile(_eager, dynamic=False)


def _trl(name: str, device: torch.device) -> list[LogprobContender]:
    version = require(name, "1.16", "2").__version__
    return [
        LogprobContender(
            "trl", f"selective_log_softmax_and_entropy of TRL {version}, in the logits' type", LOGITS,
            _forward_and_both(_trl_logits), rounds=True,
        ),
        LogprobContender(
            "trl-linear", f"ChunkedLogProbFunction of TRL {version}, as its GRPOTrainer calls it", HIDDEN,
            _forward_and_both(_trl_linear), rounds=True, unshifted=True,
        ),
    ]  # fmt: skip


# TRL's modules are imported by the first call: they take seconds.


def _trl_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    found: tuple[Tensor, ...] = selective_log_softmax_and_entropy(logits, targets)
    return found


def _trl_linear(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    bias, temperature, chunk_size, softcap, logit_scale = None, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0
    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, ("entropy",)
    )
    return logprobs, entropy


def _forward_and_both(function: TokenFunction) -> dict[str, TokenFunction]:
    return {"forward": function, "both": function}
