"""Compares mixing ratios: each trains the same model on the same batches, and its samples are set beside human text.

Each seed draws windows of held-out text. Their first tokens are the prompts, the rest is what a human wrote there: the
samples of every eta continue the same prompts to the same length, and are compared with that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eta_report import conclusions, report, table
from eta_results import facts, read_csv, write_csv
from sample_quality import ORDERS, LanguageModel, held_out_qualities, sample, sample_qualities

DEFAULT_ETAS = (1.0, 0.9, 0.5, 0.1, 0.0)
# Arguments of the command line that stand on every line of the CSV.
SETTINGS = (
    "loss",
    "weighting",
    "steps",
    "batch_size",
    "block_size",
    "layers",
    "width",
    "heads",
    "lr",
    "dtype",
    "threads",
    "prompt_tokens",
    "samples",
)


def check_comparison(args: argparse.Namespace) -> None:
    """Fills in the etas and seeds that were not given, and ends the program where the arguments do not fit together."""
    args.compare = args.compare or list(DEFAULT_ETAS)
    args.seeds = args.seeds or [args.seed]
    if args.loss == "cross_entropy":
        raise SystemExit("expected a loss that knows eta with --compare, got --loss cross_entropy")
    for name, values in (("--compare", args.compare), ("--seeds", args.seeds)):
        if len(set(values)) < len(values):
            given = " ".join(f"{value:g}" for value in values)
            raise SystemExit(f"expected each number of {name} once, got {given}")
    longest = args.block_size - max(ORDERS)
    if not 1 <= args.prompt_tokens <= longest:
        raise SystemExit(
            f"expected --prompt-tokens from 1 to {longest}, so that a block of {args.block_size} tokens has room for "
            f"{max(ORDERS)} more, got {args.prompt_tokens}"
        )
    if args.samples < 1:
        raise SystemExit(f"expected --samples of 1 or more, got {args.samples}")


def compare(
    train_model: Callable[[float, int], LanguageModel],
    held_out: Tensor,
    text_facts: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Trains and measures every eta with every seed, and writes the results into args.out.

    Args:
        train_model: trains a new model with this eta and seed; for one seed, start and batches are always the same.
        held_out: tokens [M] that no training sees.
        text_facts: columns of the CSV about text and vocabulary.
        args: the command line.
    """
    # The last token of a window is the next one's first, so that every token but the first is predicted once.
    windows = held_out.unfold(0, args.block_size + 1, args.block_size).to(args.device)  # [W, T + 1]
    if args.samples > len(windows):
        raise SystemExit(
            f"expected --samples of at most {len(windows)}, the windows of {args.block_size} tokens in "
            f"{len(held_out)} held-out ones, got {args.samples}"
        )
    settings = {name: getattr(args, name) for name in SETTINGS}
    # Before the first training, so that the commit is the one whose code runs.
    common = {**text_facts, **settings, **facts(args.device)}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "compare_eta.csv"
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        chosen = choose(len(windows), args.samples, seed)
        human = windows[chosen, args.prompt_tokens : -1]  # [B, T - P]
        rows.append({"source": "human", "seed": seed, **sample_qualities(human)})
        for eta in args.compare:
            measured = measure(train_model(eta, seed), windows, chosen, seed, args)
            rows.append({"source": "model", "eta": eta, "seed": seed, **measured})
        # After each seed: a run that is cut short leaves whole seeds.
        write_csv(path, rows, common)
        written = report(path)
        print(f"\n{table(read_csv(path))}\n")
    print("\n".join(conclusions(read_csv(path))))
    print(f"\nwritten: {', '.join(map(str, written))}")


def choose(windows: int, count: int, seed: int) -> Tensor:
    """The numbers [count] of the windows from which a seed takes its prompts."""
    return torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:count]


def measure(
    model: LanguageModel, windows: Tensor, chosen: Tensor, seed: int, args: argparse.Namespace
) -> dict[str, float]:
    """The qualities of one trained model: of its predictions in all windows [W, T + 1], and of its samples.

    The samples follow the prompts of the chosen windows.
    """
    generator = torch.Generator(args.device).manual_seed(seed)
    prompts = windows[chosen, : args.prompt_tokens]
    with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        predicted = held_out_qualities(model, windows, args.batch_size)
        drawn, log_probs = sample(model, prompts, args.block_size - args.prompt_tokens, generator)
    own_perplexity = (-log_probs.double().mean()).exp().item()
    return {**predicted, "own_perplexity": own_perplexity, **sample_qualities(drawn)}
