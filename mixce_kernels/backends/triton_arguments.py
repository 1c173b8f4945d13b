"""Launches of the Triton kernels: their arguments, by the names of the kernels' parameters."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixce_kernels.backends.devices import WARP_SIZE
from mixce_kernels.backends.layout import RowLayout, entries
from mixce_kernels.backends.triton_launch import (
    TileConfig,
    merge_config,
    reduction_config,
    row_config,
    split_config,
    tile_config,
)
from mixce_kernels.mixture import Mixture
from mixce_kernels.options import TokenOptions

# Columns are counted in 31 bits, a block of them past a row's end included.
_MAX_VOCAB_SIZE = 2**30
# Launches that are kept for later calls of the same sizes and options.
_KEPT = 256


def no_kernels(vocab_size: int) -> str | None:
    """The sentence why no kernel can take rows of so many logits; None where one can."""
    if vocab_size > _MAX_VOCAB_SIZE:
        return f"it takes at most {_MAX_VOCAB_SIZE} logits a row, and these are {vocab_size}"
    return _import_problem()


@torch.compiler.assume_constant_result
def _import_problem() -> str | None:
    """The reason why Triton is missing; a compiler, which cannot look into Triton, takes it as it is."""
    try:
        kernels("forward")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None


@functools.cache
def kernels(name: str) -> ModuleType:
    """A file of `triton_kernels`, imported by the first call that needs it."""
    return importlib.import_module(f"..triton_kernels.{name}", __package__)


def statistics_arguments(options: TokenOptions, with_stats: bool) -> dict[str, Any]:
    """The arguments of pass 1 and the epilogue: how logits become exponents, and which sums there are."""
    return _transform(options) | {"SMOOTH": options.label_smoothing > 0, "STATS": with_stats}


def loss_arguments(options: TokenOptions) -> dict[str, float]:
    """The arguments of the epilogue that only the loss of a token needs."""
    return {"label_smoothing": options.label_smoothing, "z_loss": options.z_loss}


def mixture_arguments(mixture: Mixture, anything: Tensor) -> dict[str, Any]:
    """The arguments of a mixture of tokens [N]; where there is no tensor of etas, any address will do."""
    eta, eta_value, weighting, parameters, first, second = mixture
    eta_entries, eta_stride = (anything, 0) if eta is None else entries(eta)
    return {
        "eta_ptr": eta_entries,
        "parameters_ptr": None if parameters is None else parameters.contiguous(),
        "eta_stride": eta_stride,
        "eta_value": eta_value,
        "weighting": weighting,
        "first": first,
        "second": second,
        "HAS_ETA": eta is not None,
    }


def of_tokens(numbers: Tensor | None, targets: Tensor) -> Tensor | None:
    """Numbers [] or [...] as one for each of the tokens `targets` [...], contiguous."""
    return None if numbers is None else numbers.expand(targets.shape).contiguous()


def gradient_arguments(options: TokenOptions) -> dict[str, Any]:
    """The arguments of pass 2: how logits become exponents, and the factor of the gradient that comes from it."""
    return _transform(options) | {"logit_scale": options.logit_scale}


class Launch:
    """A kernel with the arguments that follow from a call's sizes and options; tensors come with each call.

    Triton gets all of them by position: keywords would take the host longer.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """Takes the arguments by the names of the kernel's parameters, and those of the launch itself."""
        names = list(inspect.signature(kernel.fn).parameters)
        self._launcher = kernel[grid]
        self._values = [arguments.get(name) for name in names]
        self._places = {name: i for i, name in enumerate(names) if name not in arguments}
        self._options = {name: value for name, value in arguments.items() if name not in names}

    @property
    def names(self) -> Iterable[str]:
        """The names of the other arguments."""
        return self._places

    def __call__(self, **arguments: Any) -> None:
        """Launches the kernel with the other arguments.

        Raises:
            KeyError: the kernel has no such parameter, or it has its argument already.
            TypeError: an argument is missing.
        """
        values = self._values.copy()
        for name, value in arguments.items():
            values[self._places[name]] = value
        if len(arguments) < len(self._places):
            raise TypeError(f"expected the arguments {list(self._places)}, got {list(arguments)}")
        self._launcher(*values, **self._options)


class ForwardLaunch(NamedTuple):
    """The kernels of a forward, the numbers they need of `partial_ptr`, and whether its gradient is another launch."""

    launches: tuple[Launch, ...]
    n_partials: int = 0
    grad_apart: bool = False

    def __call__(self, **arguments: Any) -> None:
        """Launches each kernel with those of the arguments that it takes."""
        for launch in self.launches:
            launch(**{name: arguments[name] for name in launch.names})


@functools.lru_cache(maxsize=_KEPT)
def forward_launch(
    rows: RowLayout,
    grad_rows: RowLayout | None,
    vocab_size: int,
    itemsize: int,
    options: TokenOptions,
    *,
    with_stats: bool,
    same_window: bool,
    arch: int,
    multiprocessors: int,
) -> ForwardLaunch:
    """A launch of `forward_kernel`, or of the kernels that split its rows where they are few and need not be held.

    `grad_rows` are those of the gradient, None without one; `same_window` says whether they lie as the logits' rows do
    to a 16-byte boundary. `arch` is that of `row_config`.
    """
    arguments = statistics_arguments(options, with_stats) | loss_arguments(options) | gradient_arguments(options)
    with_grad, with_options = grad_rows is not None, arguments["CAP"] or arguments["SMOOTH"]
    may_hold = with_grad and same_window
    config = row_config(vocab_size, itemsize, may_hold, with_stats, with_options, WARP_SIZE, arch)
    arguments |= {"n_rows": rows.number, "vocab_size": vocab_size, "ignore_index": options.ignore_index}
    arguments |= _layout(rows)
    n_partials = rows.number * kernels("row_stats").PARTIALS.value
    split = split_config(rows.number, vocab_size, itemsize, multiprocessors, with_stats, with_options, WARP_SIZE)
    if split is not None and not config.held:
        return ForwardLaunch(_split_launches(rows.number, arguments, split), n_partials * split.n_tiles, with_grad)
    arguments |= {"HAS_GRAD": with_grad, "SAME_WINDOW": same_window, "PTX": may_hold and arch > 0}
    arguments |= _layout(grad_rows or rows, "grad_") | config.arguments()
    launch = Launch(kernels("forward").forward_kernel, (rows.number,), arguments)
    return ForwardLaunch((launch,), n_partials * config.n_ctas if config.n_ctas > 1 else 0)


def _split_launches(n_rows: int, arguments: dict[str, Any], config: TileConfig) -> tuple[Launch, Launch]:
    """The kernel of the tiles' statistics, and the one that merges them."""
    split_forward = kernels("split_forward")
    tiles = arguments | config.arguments() | {"STACK": config.stack}
    merge = arguments | merge_config(config.n_tiles, WARP_SIZE).arguments()
    return (
        _launch_of(split_forward.partial_stats_kernel, n_rows * config.n_tiles, tiles),
        _launch_of(split_forward.merge_kernel, n_rows, merge),
    )


def _launch_of(kernel: Any, n_programs: int, arguments: dict[str, Any]) -> Launch:
    """A launch with those of the arguments that the kernel or its launch takes."""
    names = {*inspect.signature(kernel.fn).parameters, "num_warps", "maxnreg"}
    return Launch(kernel, (n_programs,), {name: value for name, value in arguments.items() if name in names})


@functools.lru_cache(maxsize=_KEPT)
def logits_grad_launch(
    rows: RowLayout, grad_rows: RowLayout, vocab_size: int, itemsize: int, options: TokenOptions, *, same_window: bool
) -> Launch:
    """A launch of `logits_grad_kernel`."""
    arguments = gradient_arguments(options)
    config = tile_config(rows.number, vocab_size, itemsize, arguments["CAP"], WARP_SIZE)
    arguments |= {"n_rows": rows.number, "vocab_size": vocab_size, "ignore_index": options.ignore_index}
    arguments |= {"SAME_WINDOW": same_window, "STACK": config.stack}
    arguments |= _layout(rows) | _layout(grad_rows, "grad_") | config.arguments()
    return Launch(kernels("gradient").logits_grad_kernel, (rows.number * config.n_tiles,), arguments)


@functools.lru_cache(maxsize=_KEPT)
def scale_rows_launch(rows: RowLayout, vocab_size: int, itemsize: int) -> Launch:
    """A launch of `scale_rows_kernel`."""
    config = tile_config(rows.number, vocab_size, itemsize, warp_size=WARP_SIZE)
    arguments = {"vocab_size": vocab_size} | _layout(rows) | config.arguments()
    return Launch(kernels("gradient").scale_rows_kernel, (rows.number * config.n_tiles,), arguments)


@functools.cache
def reduction_launch(kind: str) -> Launch:
    """A launch of `reduction_kernel` for a reduction of that kind."""
    arguments = {"SUMS": kind != "none", "MEAN": kind == "mean"} | reduction_config(WARP_SIZE).arguments()
    return Launch(kernels("reduction").reduction_kernel, (1,), arguments)


def _layout(rows: RowLayout, prefix: str = "") -> dict[str, int]:
    """The arguments that say where rows lie; `prefix` is "grad_" for the gradient's beside those of logits."""
    return {
        f"{prefix}inner": rows.inner,
        f"{prefix}outer_stride": rows.outer_stride,
        f"{prefix}inner_stride": rows.inner_stride,
    }


def _transform(options: TokenOptions) -> dict[str, Any]:
    """The scale of differences of (capped) logits, the cap, the scale inside of tanh, and whether there is a cap.

    Without a softcap the scale is applied to differences, which keeps the digits of logits near 1e5.
    """
    if options.softcap is None:
        return {"diff_scale": options.logit_scale, "cap": math.inf, "tanh_scale": 0.0, "CAP": False}
    return {"diff_scale": 1.0, "cap": options.softcap, "tanh_scale": options.logit_scale / options.softcap, "CAP": True}
