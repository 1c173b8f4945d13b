"""What the compiled GPU kernels may spend on a logit of bfloat16: the bars of benchmarks/count_kernels.py."""

from __future__ import annotations

from typing import Any, NamedTuple


class Figures(NamedTuple):
    """Of a logit: bytes loaded, bytes stored, exponentials, and PTX instructions."""

    loaded: float
    stored: float
    exponentials: float
    instructions: float


UNIQUE_LOADED = 2.01
FIGURES = {
    "cuda": {
        "forward": Figures(2.12, 0.01, 1.08, 8.0),
        "backward": Figures(2.12, 2.01, 1.02, 8.0),
        "grad_in_forward": Figures(2.12, 2.01, 2.1, 16.0),
        "logprobs_forward": Figures(2.12, 0.01, 1.08, 14.0),
        "logprobs_backward": Figures(2.12, 2.01, 1.02, 10.0),
    },
    "triton": {
        "forward": Figures(2.12, 0.01, 1.08, 11.0),
        "backward": Figures(2.12, 2.01, 1.02, 11.0),
        # In a cluster of 8 more threads load the row's few numbers, from a cache, and make their own of them.
        "grad_in_forward": Figures(2.2, 2.01, 2.15, 22.0),
        "logprobs_forward": Figures(2.12, 0.01, 1.08, 22.0),
        "logprobs_backward": Figures(2.12, 2.01, 1.02, 13.0),
    },
}
# Of the bytes, those in accesses of 16.
IN_VECTORS = {"cuda": 0.98, "triton": 0.95}
# The rest of a row of 128256, beside 15 steps of a cluster of 8, is a 24th.
IN_VECTORS_OF_A_CLUSTER = 0.92


def assert_figures(backend: str, step: str, counters: dict[str, Any], n_logits: int) -> None:
    """Holds what ptx_on_cpu counted in a step to its figures."""
    figures = FIGURES[backend][step]
    message = (backend, step, n_logits, counters)
    assert counters["unique_loaded_bytes"] <= UNIQUE_LOADED * n_logits, message
    assert counters["global_loaded_bytes"] <= figures.loaded * n_logits, message
    assert counters["global_stored_bytes"] <= figures.stored * n_logits, message
    assert counters["special_ops"] <= figures.exponentials * n_logits, message
    assert counters["instructions"] <= figures.instructions * n_logits, message
    moved = counters["global_loaded_bytes"] + counters["global_stored_bytes"]
    in_vectors = 16 * (counters["global_loads"].get(16, 0) + counters["global_stores"].get(16, 0))
    in_cluster = backend == "triton" and step == "grad_in_forward"
    assert in_vectors >= (IN_VECTORS_OF_A_CLUSTER if in_cluster else IN_VECTORS[backend]) * moved, message
