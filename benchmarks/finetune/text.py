"""The text of the comparison: the documentation inside this Python, in the tokens of the pretrained model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from documentation import python_documentation


class Text(NamedTuple):
    """The tokens of training [M], and held-out windows [W, T + 1]."""

    train_tokens: Tensor
    windows: Tensor

    @property
    def facts(self) -> dict[str, int]:
        """Columns of the CSV; another Python has another text."""
        return {"train_tokens": len(self.train_tokens), "held_out_tokens": self.windows[:, 1:].numel()}


def read(encode: Callable[[str], Tensor], samples: int, block_size: int) -> Text:
    """Holds out the end of the text: windows of `block_size` tokens, two for each sample."""
    return split(encode(python_documentation()), 2 * samples, block_size)


def split(tokens: Tensor, windows: int, block_size: int) -> Text:
    """Holds out so many windows at the end of the tokens [M]; ends the program where too little is left."""
    held_out = windows * block_size + 1
    needed = held_out + block_size + 1
    if len(tokens) < needed:
        raise SystemExit(
            f"expected a text of {needed} tokens or more for {windows} held-out windows of {block_size}, got "
            f"{len(tokens)}: fewer --samples, or a smaller --block-size"
        )
    # The last token of a window is the next one's first, so that every token but the first is predicted once.
    return Text(tokens[:-held_out], tokens[-held_out:].unfold(0, block_size + 1, block_size))
