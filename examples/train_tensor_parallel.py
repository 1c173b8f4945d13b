"""Trains a small GPT with tensor parallelism: each process holds a shard of every layer, and of the vocabulary.

    torchrun --nproc-per-node=2 examples/train_tensor_parallel.py          # one process for each shard: 2, 3 or 4
    python examples/train_tensor_parallel.py                               # the same losses, by one process
    torchrun --nproc-per-node=4 examples/train_tensor_parallel.py --device cpu --eta 0.3 --steps 100

The layers are split by PyTorch's own `parallelize_module`. The head leaves each process the logits of its own columns
of the vocabulary, and `vocab_parallel_mixce_loss` takes them as they are: the logits are never gathered.

The text is the language reference inside every Python, as bytes.
"""

from __future__ import annotations

import argparse
import os
import pydoc_data.topics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from mixce_kernels import fused_mixce_loss, vocab_parallel_mixce_loss

END_OF_TOPIC = 256
VOCAB_SIZE = 257  # the bytes and the end of a topic
# The head's columns: more than the vocabulary, because 257 is prime and 264 is a multiple of 2, 3 and 4.
PADDED_VOCAB_SIZE = 264


def language_reference() -> Tensor:
    """The topics of Python's language reference as tokens [M]."""
    topics = pydoc_data.topics.topics.values()
    return torch.tensor([token for topic in topics for token in (*topic.encode(), END_OF_TOPIC)])


class Block(nn.Module):
    """A pre-norm transformer block: causal self-attention, then a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        # Heads come first among the columns of qkv, so that a process holds whole heads.
        qkv = self.qkv(self.attention_norm(hidden)).unflatten(-1, (-1, 3, self.head_width))
        query, key, value = qkv.permute(3, 0, 2, 1, 4)  # each [B, heads of this process, T, D / heads]
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.projection(attended.transpose(1, 2).flatten(2))
        return hidden + self.contract(F.gelu(self.expand(self.mlp_norm(hidden))))


class GPT(nn.Module):
    """A decoder-only transformer."""

    def __init__(self, block_size: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB_SIZE, width)
        self.positions = nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, PADDED_VOCAB_SIZE, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> logits [B, T, columns of this process]
        hidden = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.lm_head(self.norm(hidden))


def parallelize(model: GPT, mesh: DeviceMesh) -> None:
    """Splits the weights over the mesh; embeddings and norms stay whole, with the same gradient in every process."""
    layers = {
        "qkv": ColwiseParallel(),
        "projection": RowwiseParallel(),
        "expand": ColwiseParallel(),
        "contract": RowwiseParallel(),
    }
    for block in model.blocks:
        parallelize_module(block, mesh, layers)
    # The logits stay split by columns, and leave the head as plain tensors.
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=True)
    parallelize_module(model, mesh, {"lm_head": head})


def loss_of(logits: Tensor, targets: Tensor, eta: float, mesh: DeviceMesh | None) -> Any:
    """The mean loss of logits [B, T, columns of this process] and targets [B, T]: the same in every process."""
    if mesh is None:
        return fused_mixce_loss(logits[..., :VOCAB_SIZE], targets, eta, inplace_backward=True)
    return vocab_parallel_mixce_loss(
        logits,
        targets,
        eta,
        group=mesh.get_group(),
        vocab_start=mesh.get_local_rank() * logits.shape[-1],
        vocab_size=VOCAB_SIZE,  # columns from there on are padding: no probability, no gradient
        inplace_backward=True,
    )


def train(model: GPT, mesh: DeviceMesh | None, device: torch.device, args: argparse.Namespace) -> Tensor:
    """Trains the model on random blocks of the text; returns the steps' losses [steps]."""
    text = language_reference()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    # On the CPU and with the same seed in every process: all processes have to see the same batches.
    generator = torch.Generator().manual_seed(args.seed)
    losses = []
    for _ in range(args.steps):
        starts = torch.randint(len(text) - args.block_size, (args.batch_size, 1), generator=generator)
        batch = text[starts + torch.arange(args.block_size + 1)].to(device)  # [B, T + 1]
        loss = loss_of(model(batch[:, :-1]), batch[:, 1:], args.eta, mesh)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@contextmanager
def processes(device_type: str) -> Iterator[tuple[DeviceMesh | None, torch.device]]:
    """The mesh of the processes that torchrun started, None without torchrun; and the device of this process."""
    if "LOCAL_RANK" not in os.environ:
        yield None, torch.device(device_type)
        return
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield init_device_mesh(device_type, (dist.get_world_size(),)), device
    finally:
        dist.destroy_process_group()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--eta", type=float, default=0.5, help="mixing ratio: 1 is cross-entropy, 0 its reverse")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--print-every", type=int, default=10, help="steps from one line of the table to the next")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=128, help="tokens of a training sequence")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--heads", type=int, default=12, help="a multiple of the number of processes")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with processes(args.device) as (mesh, device):
        shards = 1 if mesh is None else mesh.size()
        if args.width % args.heads or args.heads % shards or PADDED_VOCAB_SIZE % shards:
            raise SystemExit(
                f"expected a width of whole heads, and heads and {PADDED_VOCAB_SIZE} columns that {shards} processes "
                f"can share, got a width of {args.width} and {args.heads} heads"
            )
        torch.manual_seed(args.seed)
        model = GPT(args.block_size, args.layers, args.width, args.heads).to(device, getattr(torch, args.dtype))
        if mesh is not None:
            parallelize(model, mesh)
        losses = train(model, mesh, device, args).tolist()
        if mesh is None or mesh.get_rank() == 0:
            print(f"{shards} shard{'s'[: shards > 1]} of the vocabulary\n step          loss")
            for step in sorted({1, *range(args.print_every, args.steps + 1, args.print_every)}):
                print(f"{step:5d}  {losses[step - 1]:12.8f}")


if __name__ == "__main__":
    main()
