"""The one table of cases: what logits, targets, options and modes every backend is tried on."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from support.oracle import Options
from support.weightings import WEIGHTINGS

FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = (FLOAT32, BFLOAT16, FLOAT16, FLOAT64)

MODES = {
    "plain": {},
    "inplace": {"inplace_backward": True},
    "grad_in_forward": {"grad_in_forward": True},
    "inplace_grad_in_forward": {"inplace_backward": True, "grad_in_forward": True},
}


@dataclass(frozen=True)
class Case:
    """One call. `shape` is [..., V]; the other fields name choices of `inputs.build`."""

    name: str
    shape: tuple[int, ...] = (6, 515)
    dtype: torch.dtype = FLOAT32
    kind: str = "random"
    layout: str = "contiguous"
    target_dtype: torch.dtype = torch.int64
    ignored: str = "some"
    eta: str = "0.3"
    weighting: str = "probability"
    options: Options = field(default_factory=Options)
    mode: str = "plain"
    reduction: str = "mean"
    token_weights: bool = False
    num_items: str = "none"
    upstream: str = "3.7"

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"

    def at(self, **changes: Any) -> Case:
        """The case with some fields changed."""
        return replace(self, **changes)


# Sizes at which something changes: one logit, fewer than a vector, an odd tail, one block of the kernels (2048) and its
# neighbours, several blocks, and GPT-2's 50257, whose contiguous rows are aligned to nothing.
_VOCAB_SIZES = (1, 2, 7, 32, 255, 1000, 2047, 2048, 2049, 6145)
_BASE = Case("base")
_OPTIONS = {
    "smoothing": Options(label_smoothing=0.1),
    "smoothing_1": Options(label_smoothing=1.0),
    "z_loss": Options(z_loss=1e-3),
    "softcap": Options(softcap=3.0),
    "softcap_30": Options(softcap=30.0),
    "scale": Options(logit_scale=1.7),
    "ignore_7": Options(ignore_index=7),
    "softcap_scale": Options(softcap=5.0, logit_scale=0.5),
    "all": Options(ignore_index=0, label_smoothing=0.2, z_loss=1e-2, softcap=4.0, logit_scale=1.3),
}

SIZES = [
    _BASE.at(name=f"v{size}", shape=(5, size), dtype=dtype, reduction="none", upstream="per_token")
    for size in _VOCAB_SIZES
    for dtype in DTYPES
]
SIZES += [_BASE.at(name="v50257", shape=(3, 50257), dtype=dtype) for dtype in DTYPES]
SIZES += [_BASE.at(name="v128256", shape=(2, 128256), dtype=dtype) for dtype in (FLOAT32, BFLOAT16)]
SIZES += [_BASE.at(name="v1000000", shape=(1, 1_000_000), dtype=dtype) for dtype in (FLOAT32, BFLOAT16)]
# More rows than the kernels hand to a thread at once, and logits enough for two threads.
SIZES += [_BASE.at(name="rows", shape=(200, 515), dtype=dtype) for dtype in (FLOAT32, BFLOAT16)]
SIZES += [
    _BASE.at(name="no_rows", shape=(0, 9)),
    _BASE.at(name="no_rows_3d", shape=(2, 0, 9), reduction="none", upstream="expanded"),
    _BASE.at(name="one_row", shape=(1, 1000)),
    _BASE.at(name="one_dimension", shape=(1000,), reduction="none"),
    _BASE.at(name="one_dimension_mean", shape=(1000,), dtype=BFLOAT16),
]

KINDS = [
    _BASE.at(
        name=f"{kind}_eta{eta}", shape=(12, size), kind=kind, dtype=dtype, eta=eta, reduction="none", upstream="-2",
    )
    for kind, size in (
        ("confident", 1000), ("masked", 2500), ("first_block_masked", 5125), ("target_masked", 2500), ("ties", 2500),
        ("wide", 2500), ("nonfinite_rows", 4500), ("shifted", 2500),
    )
    for eta in ("0", "0.3", "1")
    for dtype in DTYPES
    if kind != "shifted" or dtype in (FLOAT32, FLOAT64)
]  # fmt: skip

OPTIONS = [
    _BASE.at(name=name, options=options, dtype=dtype, upstream="1")
    for name, options in _OPTIONS.items()
    for dtype in DTYPES
]
OPTIONS += [
    _BASE.at(name=f"{name}_{kind}", kind=kind, shape=(12, 2500), options=_OPTIONS[name], reduction="none")
    for name in ("smoothing", "smoothing_1", "z_loss", "softcap", "softcap_30", "scale")
    for kind in ("confident", "masked", "target_masked", "shifted", "wide", "nonfinite_rows")
    # Capped logits near 1e5 are all the cap.
    if "softcap" not in name or kind != "shifted"
]
OPTIONS += [_BASE.at(name="scale_shifted", kind="shifted", shape=(12, 2500), options=_OPTIONS["scale"], dtype=FLOAT64)]
OPTIONS += [
    _BASE.at(name=f"eta_{eta}", eta=eta, shape=(4, 3, 77), dtype=dtype)
    for eta in ("0", "1", "0d", "0d_bfloat16", "0d_float64", "per_token", "column")
    for dtype in DTYPES
]

LAYOUTS = [
    _BASE.at(name=f"{layout}_{mode}", shape=shape, layout=layout, dtype=dtype, mode=mode, target_dtype=target_dtype)
    for layout, shape in (
        ("sliced", (3, 4, 1025)), ("transposed", (3, 4, 1025)), ("sliced_columns", (5, 1023)), ("unaligned", (5, 1000)),
        ("every_other_column", (5, 100)), ("scattered", (2, 3, 2, 515)),
    )
    for mode in MODES
    for dtype, target_dtype in ((FLOAT32, torch.int64), (BFLOAT16, torch.int32))
]  # fmt: skip

# More rows than a GPU has multiprocessors.
LAYOUTS += [
    _BASE.at(name=f"many_{layout}_{mode}", shape=(200, 131), layout=layout, dtype=dtype, mode=mode)
    for layout in ("contiguous", "sliced_columns")
    for mode in ("grad_in_forward", "inplace_grad_in_forward")
    for dtype in (FLOAT32, BFLOAT16)
]

UPSTREAMS = [
    _BASE.at(name=f"{mode}_upstream_{upstream}", mode=mode, upstream=upstream, dtype=dtype, reduction="none")
    for mode in MODES
    for upstream in ("1", "3.7", "-2", "0", "per_token", "expanded")
    for dtype in (FLOAT32, BFLOAT16, FLOAT16, FLOAT64)
]

REDUCTIONS = [
    _BASE.at(
        name=f"{reduction}_{num_items}{'_weighted' if weighted else ''}_{mode}",
        mode=mode, reduction=reduction, num_items=num_items, token_weights=weighted, shape=(3, 4, 129), dtype=dtype,
    )
    for reduction, num_items in (
        ("none", "none"), ("sum", "none"), ("mean", "none"), ("mean", "int"), ("mean", "float"), ("mean", "tensor"),
        ("mean", "int_tensor"),
    )
    for weighted in (False, True)
    for mode in ("plain", "grad_in_forward", "inplace_grad_in_forward")
    for dtype in (FLOAT32, BFLOAT16)
]  # fmt: skip
REDUCTIONS += [
    _BASE.at(
        name=f"all_ignored_{reduction}{'_weighted' if weighted else ''}_{mode}",
        ignored="all", reduction=reduction, mode=mode, token_weights=weighted,
    )
    for reduction in ("none", "mean", "sum")
    for mode in MODES
    for weighted in (False, True)
]  # fmt: skip


def _random_case(seed: int) -> Case:
    """Everything at once, drawn by chance."""
    draw = random.Random(seed)
    reduction = draw.choice(("none", "mean", "sum"))
    dtype = draw.choice(DTYPES)
    layout = draw.choice(("contiguous", "sliced", "transposed", "sliced_columns", "unaligned", "every_other_column"))
    options = Options(
        ignore_index=draw.choice((-100, 0, 3, -1, 10**9)),
        label_smoothing=draw.choice((0.0, 0.0, 0.1, 0.7)),
        z_loss=draw.choice((0.0, 0.0, 1e-4, 0.05)),
        softcap=draw.choice((None, None, 2.5, 30.0)),
        logit_scale=draw.choice((1.0, 1.0, 0.3, 2.2)),
    )
    kinds = ["random", "confident", "masked", "ties", "wide"]
    return Case(
        f"random_{seed}",
        shape=(draw.randint(1, 4), draw.randint(1, 4), draw.choice((3, 17, 64, 333, 2050, 4111))),
        dtype=dtype,
        kind=draw.choice(kinds),
        layout=layout,
        target_dtype=draw.choice((torch.int64, torch.int32)),
        ignored=draw.choice(("some", "none")),
        eta=draw.choice(("0", "0.3", "0.9", "1", "0d", "per_token", "column")),
        options=options,
        mode=draw.choice(tuple(MODES)),
        reduction=reduction,
        token_weights=draw.random() < 0.5,
        num_items=draw.choice(("none", "int", "tensor")) if reduction == "mean" else "none",
        upstream=draw.choice(("1", "3.7", "-2", "0") + (("per_token", "expanded") if reduction == "none" else ())),
        weighting=draw.choice(("probability", *WEIGHTINGS)),
    )


RANDOM = [_random_case(seed) for seed in range(100)]

WEIGHTED = [
    _BASE.at(name=f"{name}_eta{eta}", weighting=name, eta=eta, dtype=dtype, shape=(12, 515), reduction="none")
    for name in WEIGHTINGS
    for eta in ("0", "0.3")
    for dtype in DTYPES
]
WEIGHTED += [
    _BASE.at(name=f"{name}_{kind}", weighting=name, kind=kind, shape=(12, 2500), eta=eta, dtype=dtype, reduction="none")
    for name in WEIGHTINGS
    for kind, eta, dtype in (
        ("confident", "0", FLOAT32), ("confident", "0.3", FLOAT64), ("confident", "0.3", BFLOAT16),
        ("masked", "0.3", FLOAT32), ("target_masked", "0", FLOAT32), ("ties", "0", FLOAT16), ("wide", "0.3", FLOAT32),
        ("nonfinite_rows", "0.3", FLOAT32),
    )
]  # fmt: skip
WEIGHTED += [
    _BASE.at(name=f"{name}_{options}_{mode}", weighting=name, options=_OPTIONS[options], mode=mode, dtype=dtype)
    for name in WEIGHTINGS
    for options, mode, dtype in (
        ("all", "plain", FLOAT32), ("all", "inplace_grad_in_forward", BFLOAT16), ("smoothing_1", "plain", FLOAT64),
        ("softcap", "grad_in_forward", FLOAT32), ("z_loss", "inplace", FLOAT16),
    )
]  # fmt: skip
WEIGHTED += [
    _BASE.at(
        name=f"{name}_layout_{layout}", weighting=name, layout=layout, shape=(3, 4, 1025), eta="per_token",
        token_weights=True,
    )
    for name in ("power_per_token", "entropy_per_token", "custom", "tailr_floor")
    for layout in ("sliced", "transposed")
]  # fmt: skip
WEIGHTED += [
    _BASE.at(name=f"{name}_v{size}", weighting=name, shape=(3, size), ignored="none")
    for name in ("power_0.3", "focal_0.5", "entropy", "collision", "custom")
    for size in (1, 7, 50257)
]

ALL = SIZES + KINDS + OPTIONS + LAYOUTS + UPSTREAMS + REDUCTIONS + WEIGHTED + RANDOM

# Calls that ask for statistics.
STATISTICS = [
    Case(f"stats_{kind}_{name}", shape=(12, 2500), kind=kind, dtype=dtype, options=options, target_dtype=target_dtype)
    for kind in ("random", "confident", "masked", "target_masked", "ties", "wide", "nonfinite_rows")
    for name, options in (
        ("default", Options()), ("smoothing", Options(label_smoothing=0.1)), ("softcap", Options(softcap=5.0)),
        ("scale", Options(logit_scale=1.7, z_loss=0.01)),
    )
    for dtype, target_dtype in (
        (torch.float32, torch.int64), (torch.bfloat16, torch.int32), (torch.float16, torch.int64),
    )
] + [
    Case(f"stats_{size}", shape=(5, size), dtype=dtype, eta="per_token")
    for size in (1, 2, 7, 2047, 2048, 2049)
    for dtype in DTYPES
]  # fmt: skip
STATISTICS += [Case("stats_one_dimension", shape=(300,), dtype=dtype) for dtype in DTYPES]
STATISTICS += [case for case in SIZES if case.shape[0] == 0]
