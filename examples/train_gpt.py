"""Trains a small GPT on real text with the MixCE loss and a byte-level BPE vocabulary made from that text.

    pip install "mixce_kernels[examples]"
    python examples/train_gpt.py --eta 0.5
    python examples/train_gpt.py --loss cross_entropy         # the baseline: the same as --eta 1
    python examples/train_gpt.py --eta 0 --weighting 'Power(alpha=0.5)'    # another function of q in the loss
    python examples/train_gpt.py --text book.txt --device cuda --dtype bfloat16
    python examples/train_gpt.py --compare 1 0.9 0.5 0 --seeds 0 1 2    # samples of several etas beside human text

The default text is the English documentation inside every Python: the language reference of `pydoc_data.topics` and,
because that alone supports fewer than 10,000 BPE entries, the docstrings of the standard library's modules.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from tqdm import tqdm

from documentation import python_documentation
from mixce_kernels import MixCELoss
from mixce_kernels.weightings import PROBABILITY, Weighting, parse

LOSSES = ("fused", "reference", "cross_entropy")
HELD_OUT_SHARE = 0.05
EVALUATED_TOKENS = 8192  # at most: an evaluation costs as much as a few training steps


def tokenize(text: str, vocab_size: int) -> tuple[Tensor, int]:
    """The text's tokens [M] and the size of its BPE vocabulary: `vocab_size`, or less where merges occur only once."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=vocab_size, min_frequency=2, show_progress=False)
    return torch.tensor(tokenizer.encode(text).ids), tokenizer.get_vocab_size()


class Corpus(NamedTuple):
    """A text's tokens: those of the training, and those that are held out."""

    characters: int
    train_tokens: Tensor  # [M]
    held_out: Tensor  # [H]
    vocab_size: int


class Block(nn.Module):
    """A pre-norm transformer block: causal self-attention, then a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor, past: list[Tensor] | None = None) -> Tensor:  # [B, T, D] -> [B, T, D]
        """`past` holds the keys and values of earlier positions; those of `hidden` are added to it."""
        qkv = self.qkv(self.attention_norm(hidden))
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(
            2, 0, 3, 1, 4
        )  # each [B, heads, T, D / heads]
        if past is not None:
            key, value = (
                torch.cat((*old, new), 2) for old, new in zip((past[:1], past[1:]), (key, value), strict=True)
            )
            past[:] = key, value
        assert query.shape[2] in (1, key.shape[2])
        # A single position comes after all others; several are the first ones.
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1)
        hidden = hidden + self.projection(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(hidden)


class GPT(nn.Module):
    """A decoder-only transformer whose head is its token embedding."""

    def __init__(self, vocab_size: int, block_size: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, cache: list[list[Tensor]] | None = None) -> Tensor:  # [B, T] -> logits [B, T, V]
        """With a cache, empty at first, which keeps keys and values, tokens follow those of earlier calls."""
        start = cache[0][0].shape[2] if cache else 0
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        hidden = self.tokens(tokens) + self.positions(positions)
        if cache is not None and not cache:
            cache += [[] for _ in self.blocks]
        for layer, block in enumerate(self.blocks):
            hidden = block(hidden, None if cache is None else cache[layer])
        return F.linear(self.norm(hidden), self.tokens.weight)


def make_criterion(loss: str, eta: float, weighting: Weighting = PROBABILITY) -> Callable[[Tensor, Tensor], Any]:
    """The training loss by name: logits [B, T, V] and targets [B, T] to a scalar."""
    if loss == "fused":
        # Only the loss reads the logits, so their gradient may overwrite them. The upstream gradient is 1, so this can
        # happen in the forward: one read, one write, and no second [B, T, V] tensor.
        return MixCELoss(eta, weighting=weighting, grad_in_forward=True, inplace_backward=True)
    if loss == "reference":
        return MixCELoss(eta, weighting=weighting, backend="reference")
    return lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def title(args: argparse.Namespace) -> str:
    if args.loss == "cross_entropy":
        return "cross-entropy"
    name = "MixCE" if args.weighting == PROBABILITY else f"{args.weighting!r}"
    return f"{args.loss} {name}, eta = {args.eta:g}"


class Record(NamedTuple):
    """A step of the curve; the perplexity only where it was evaluated."""

    step: int
    loss: float
    perplexity: float | None


def train(model: nn.Module, train_tokens: Tensor, held_out: Tensor, args: argparse.Namespace) -> list[Record]:
    """Trains the model on random blocks of train_tokens [M]; returns the curve, one record a step."""
    criterion = make_criterion(args.loss, args.eta, args.weighting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    warmup = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
    )
    # On the CPU, so that every loss and device sees the same batches.
    generator = torch.Generator().manual_seed(args.seed)
    eval_every = max(1, args.steps // 10)
    losses: list[Tensor] = []
    perplexities: dict[int, float] = {}
    progress = tqdm(range(1, args.steps + 1), desc=title(args), unit="step")
    for step in progress:
        starts = torch.randint(len(train_tokens) - args.block_size, (args.batch_size, 1), generator=generator)
        batch = train_tokens[starts + torch.arange(args.block_size + 1)].to(args.device)  # [B, T + 1]
        # The tokens are shifted: a slice of the logits would cost a [B, T, V] gradient in backward.
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = model(batch[:, :-1])
        loss = criterion(logits, batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        if step % eval_every == 0 or step in (1, args.steps):
            perplexities[step] = evaluate(model, held_out, args)
            recent = torch.stack(losses[-eval_every:]).mean().item()
            progress.write(
                f"step {step:5d}  training loss {recent:7.4f}  held-out perplexity {perplexities[step]:9.2f}"
            )
    return [Record(step, loss.item(), perplexities.get(step)) for step, loss in enumerate(losses, 1)]


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Tensor, args: argparse.Namespace) -> float:
    """The perplexity of held_out [M], in blocks: exp of the mean forward cross-entropy, for any training loss."""
    blocks = (len(held_out) - 1) // args.block_size
    inputs, targets = (held_out[i : i + blocks * args.block_size].view(blocks, -1) for i in (0, 1))
    total = 0.0
    for rows, row_targets in zip(inputs.split(args.batch_size), targets.split(args.batch_size), strict=True):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = model(rows.to(args.device))
        row_targets = row_targets.to(args.device)
        total += F.cross_entropy(logits.float().flatten(0, 1), row_targets.flatten(), reduction="sum").item()
    return math.exp(total / targets.numel())


def save_curve(curve: list[Record], heading: str, out: Path) -> None:
    """Writes curve.csv and curve.png into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "curve.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Record._fields)
        writer.writerows(curve)
    evaluated = [record for record in curve if record.perplexity is not None]
    figure, (loss_axes, perplexity_axes) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.suptitle(heading)
    loss_axes.plot([record.step for record in curve], [record.loss for record in curve])
    loss_axes.set(xlabel="step", ylabel="training loss")
    perplexity_axes.plot([record.step for record in evaluated], [record.perplexity for record in evaluated], "o-")
    perplexity_axes.set(xlabel="step", ylabel="held-out perplexity", yscale="log")
    figure.savefig(out / "curve.png", dpi=120)
    plt.close(figure)


def mixing_ratio(text: str) -> float:
    eta = float(text)
    if not 0.0 <= eta <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], got {text}")
    return eta


def weighting(text: str) -> Weighting:
    try:
        return parse(text)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--eta", type=mixing_ratio, default=0.5, help="mixing ratio: 1 is cross-entropy, 0 its reverse")
    parser.add_argument("--loss", choices=LOSSES, default="fused", help="cross_entropy knows no eta")
    parser.add_argument(
        "--weighting", type=weighting, default=PROBABILITY, help="in the place of q, such as 'Power(alpha=0.5)'"
    )
    parser.add_argument("--text", type=Path, help="a UTF-8 text file; without one, Python's own documentation")
    parser.add_argument("--vocab-size", type=int, default=16384, help="BPE entries, as far as the text supports them")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=128, help="tokens of a training sequence")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    parser.add_argument("--out", type=Path, default=Path("build/train_gpt"), help="folder for tables and plots")
    parser.add_argument("--held-out-tokens", type=int, default=EVALUATED_TOKENS, help="at most; the text's end")
    comparison = parser.add_argument_group("comparison of etas", "writes compare_eta.csv, .md and .png, and no curve")
    comparison.add_argument(
        "--compare", type=mixing_ratio, nargs="*", metavar="ETA", help="the etas; after no number 1 0.9 0.5 0.1 0"
    )
    comparison.add_argument("--seeds", type=int, nargs="+", help="without any, that of --seed")
    comparison.add_argument("--prompt-tokens", type=int, default=32, help="of held-out text before each sample")
    comparison.add_argument("--samples", type=int, default=60, help="sequences, each to the end of a block")
    args = parser.parse_args(argv)
    if args.loss == "cross_entropy" and args.weighting != PROBABILITY:
        parser.error("expected a loss that knows weightings with --weighting, got --loss cross_entropy")
    return args


def load_corpus(args: argparse.Namespace) -> Corpus:
    text = args.text.read_text(encoding="utf-8") if args.text else python_documentation()
    tokens, vocab_size = tokenize(text, args.vocab_size)
    held_out_count = min(args.held_out_tokens, int(HELD_OUT_SHARE * len(tokens)))
    if held_out_count <= args.block_size:
        raise SystemExit(
            f"expected over {args.block_size} held-out tokens, got {held_out_count}: a text of {len(tokens)} tokens "
            f"allows {int(HELD_OUT_SHARE * len(tokens))}, --held-out-tokens {args.held_out_tokens}"
        )
    return Corpus(len(text), tokens[:-held_out_count], tokens[-held_out_count:], vocab_size)


def new_model(corpus: Corpus, args: argparse.Namespace) -> GPT:
    """A model of random weights, and of a seed's own."""
    torch.manual_seed(args.seed)
    return GPT(corpus.vocab_size, args.block_size, args.layers, args.width, args.heads).to(args.device)


def train_once(args: argparse.Namespace) -> None:
    """One training, and its curve."""
    corpus = load_corpus(args)
    model = new_model(corpus, args)
    announce(corpus, model)
    curve = train(model, corpus.train_tokens, corpus.held_out[:EVALUATED_TOKENS], args)
    save_curve(curve, f"{title(args)}, vocabulary of {corpus.vocab_size:,}", args.out)
    print(f"held-out perplexity {curve[-1].perplexity:.2f}; curve in {args.out}/curve.csv and curve.png")


def compare_etas(args: argparse.Namespace) -> None:
    """A training for each eta and seed, their samples beside human text."""
    # Imported here, because a training alone needs none of it.
    from compare_eta import check_comparison, compare

    check_comparison(args)
    corpus = load_corpus(args)
    announce(corpus, new_model(corpus, args))

    def train_model(eta: float, seed: int) -> GPT:
        of_one = argparse.Namespace(**{**vars(args), "eta": eta, "seed": seed})
        model = new_model(corpus, of_one)
        train(model, corpus.train_tokens, corpus.held_out[:EVALUATED_TOKENS], of_one)
        return model

    text_facts = {
        "text": args.text.name if args.text else "Python's documentation",
        "train_tokens": len(corpus.train_tokens),
        "held_out_tokens": len(corpus.held_out),
        "vocab_size": corpus.vocab_size,
    }
    compare(train_model, corpus.held_out, text_facts, args)


def announce(corpus: Corpus, model: nn.Module) -> None:
    parameters = sum(weight.numel() for weight in model.parameters())
    print(
        f"{corpus.characters:,} characters, {len(corpus.train_tokens):,} training and {len(corpus.held_out):,} "
        f"held-out tokens, vocabulary of {corpus.vocab_size:,}, {parameters:,} parameters"
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.compare is None:
        train_once(args)
    else:
        compare_etas(args)


if __name__ == "__main__":
    main()
