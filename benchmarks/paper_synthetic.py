"""The paper's synthetic experiment: bigram models trained with MixCE, held against the matrix that made their data.

    python benchmarks/paper_synthetic.py               n = 20, every eta and seed; some minutes on two idle cores
    python benchmarks/paper_synthetic.py --full        n = 50, 100, 500 and 1000 too: more than a day
    python benchmarks/paper_synthetic.py --vocab 50 --seeds 7,42
    python benchmarks/paper_synthetic.py --help        other sizes, other etas

As Zhang et al., "MixCE", ACL 2023 (arXiv 2305.16958) describe it, and as their code (bloomberg/MixCE-acl2023,
synthetic.py) runs it: a random transition matrix over n symbols, rows from a Dirichlet distribution of 0.5, half of the
entries 0; 50,000 sequences sampled from it to train on, 5,000 held out; embedding, linear layer, ReLU, dropout, head;
Adam, batches of 1000 sequences, at most 50 epochs; metrics of the epoch with the least held-out loss.

What is ours: tokens are packed without padding and the loss is `fused_linear_mixce_loss`, summed over the tokens of a
sequence and averaged over sequences. True matrices and initial weights are those that the authors' code draws for a
seed; sequences, order and dropout have streams of their own, the same ones for every eta. The held-out loss has the
eta of training. Dropout's probability is 6554 / 65536. Of the paper's objectives only MixCE is here, with maximum
likelihood as its eta = 1: those that need the true probabilities or samples of the model are not.

Each run takes one process of one thread. Finished runs stand in the CSV and are not run again: what was interrupted
goes on with the same command. Writes paper_synthetic.csv, paper_synthetic.md and a plot.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import harness.results
from harness.jobs import integers, words
from synthetic.pool import run_all
from synthetic.report import (
    COLUMNS,
    ETAS,
    KEY,
    PAPER_SIZES,
    SEEDS,
    SIZES,
    VOCABULARIES,
    synthetic_summary,
    synthetic_table,
)
from synthetic.train import Setting

HERE = Path(__file__).resolve().parent


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help=f"n = {', '.join(map(str, VOCABULARIES))}")
    parser.add_argument("--vocab", type=integers, default=[], help="numbers of symbols n, as 20,50")
    parser.add_argument("--eta", type=numbers, default=list(ETAS), help=f"default: {','.join(map(str, ETAS))}")
    parser.add_argument("--seeds", type=integers, default=list(SEEDS), help=f"default: {','.join(map(str, SEEDS))}")
    parser.add_argument("--sequences", type=int, default=PAPER_SIZES["sequences"], help="to train on")
    parser.add_argument("--held-out", type=int, default=PAPER_SIZES["held_out"], help="to select the epoch on")
    parser.add_argument("--max-length", type=int, default=PAPER_SIZES["max_length"], help="of a sequence, with EOS")
    parser.add_argument("--epochs", type=int, default=PAPER_SIZES["max_epochs"], help="at most")
    parser.add_argument("--workers", type=int, default=torch.get_num_threads(), help="processes; default: all cores")
    parser.add_argument("--anew", action="store_true", help="run again what stands in the CSV, and nothing else stays")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="folder for the CSV, the summary and the plot"
    )
    chosen = parser.parse_args(given)
    if chosen.full and chosen.vocab:
        parser.error("expected one of --full and --vocab, got both")
    chosen.vocab = chosen.vocab or list(VOCABULARIES if chosen.full else VOCABULARIES[:1])
    least = {"vocab": 2, "sequences": 1, "held_out": 1, "max_length": 1, "epochs": 1, "workers": 1, "seeds": 0}
    for name, bound in least.items():
        value = getattr(chosen, name)
        for number in value if isinstance(value, list) else [value]:
            if number < bound:
                parser.error(f"expected --{name.replace('_', '-')} of at least {bound}, got {number}")
    for name in ("eta", "seeds"):
        if not getattr(chosen, name):
            parser.error(f"expected at least one number in --{name}, got none")
    for seed in chosen.seeds:
        if seed >= 2**32:
            parser.error(f"expected --seeds below 2**32, got {seed}")
    for eta in chosen.eta:
        if not 0 <= eta <= 1:
            parser.error(f"expected --eta in [0, 1], got {eta}")
    return chosen


def numbers(text: str) -> list[float]:
    """The numbers of a command line's list."""
    return [float(word) for word in words(text)]


def settings(args: argparse.Namespace) -> list[Setting]:
    """The runs, in their order: a vocabulary's first seed with all etas first."""
    sizes = (args.sequences, args.held_out, args.max_length, args.epochs)
    return [
        Setting(n, eta, seed, *sizes)
        for n in dict.fromkeys(args.vocab)
        for seed in dict.fromkeys(args.seeds)
        for eta in dict.fromkeys(args.eta)
    ]


class Results(harness.results.Results):
    """The CSV, in the order of vocabulary, eta and seed."""

    def __init__(self, path: Path, sizes: dict[str, int], anew: bool = False) -> None:
        super().__init__(path, COLUMNS, sizes, lambda row: tuple(float(row[name]) for name in KEY), anew)


def main(given: list[str] | None = None) -> int:
    """Runs what is missing; 1 if a run failed."""
    args = arguments(given)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "paper_synthetic.csv"
    wanted = settings(args)
    sizes = {name: getattr(wanted[0], name) for name in SIZES}
    results = Results(path, sizes, args.anew)
    to_run = [setting for setting in wanted if not results.has(setting)]
    print(f"{len(wanted) - len(to_run)} of {len(wanted)} runs stand in {path}")
    complete = run_all(to_run, args.workers, results.add)
    if not results.rows:
        raise SystemExit("expected at least one result, got none")

    print(synthetic_table(results.rows))
    summary = args.out / "paper_synthetic.md"
    summary.write_text(synthetic_summary(results.rows))
    print(f"written: {path}, {summary}")
    try:
        from synthetic.plot import synthetic_plot

        print(f"written: {synthetic_plot(path)}")
    except ImportError as error:
        print(f"no plot: {error}")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
