"""Runs the compiled PTX of the Triton kernels on CPU tensors: `python triton_on_ptx.py FOLDER_OF_PTX_ON_CPU`."""

from __future__ import annotations

import sys

import torch
from triton_check import check, confident_inputs

from mixce_kernels import fused_mixce_loss
from mixce_kernels.backends import triton as backend
from mixce_kernels.triton_kernels import kernels

# Both windows of a gradient, a row in registers and rows past one block, each type, each option.
CASES = [
    ((3, 1003), torch.bfloat16, {}),
    ((3, 16395), torch.bfloat16, {"grad_in_forward": True, "inplace_backward": True, "softcap": 20.0}),
    ((3, 5200), torch.float32, {"label_smoothing": 0.1, "z_loss": 1e-3, "logit_scale": 0.7}),
    ((3, 1031), torch.float32, {"inplace_backward": True, "softcap": 9.0, "eta": 0.0}),
    ((3, 1003), torch.float16, {"grad_in_forward": True, "z_loss": 1e-3}),
    ((3, 515), torch.float64, {"softcap": 9.0, "label_smoothing": 0.2}),
    ((3, 1), torch.float32, {"grad_in_forward": True}),
]


def main() -> None:
    """Raises AssertionError at the first result that is off, and ptx_on_cpu's error at an access out of bounds."""
    sys.path.insert(0, sys.argv[1])
    from ptx_on_cpu import triton_backend

    with triton_backend.on_cpu("sm_90") as launches:
        for (n_rows, vocab_size), dtype, keywords in CASES:
            check(*confident_inputs(n_rows, vocab_size, dtype), **keywords)
        logits, targets = confident_inputs(4, 1005, torch.bfloat16)
        check(logits.reshape(2, 2, 1005)[:, :1], targets.reshape(2, 2)[:, :1].contiguous())

        logits, targets = confident_inputs(4, 515, torch.float32)
        targets[1] = 2**33 + 5
        logits.requires_grad_()
        loss = fused_mixce_loss(logits, targets, reduction="none", backend="triton")
        loss.sum().backward()
        expected_nan = [False, True, False, False]
        assert loss.isnan().tolist() == expected_nan
        assert logits.grad is not None
        assert logits.grad.isnan().all(1).tolist() == logits.grad.isnan().any(1).tolist() == expected_nan

        # Speed that can be seen without a GPU: each logit is read once, in whole vectors, with few instructions.
        launches.clear()
        n_rows, vocab_size = 2, 50257
        logits, targets = torch.randn(n_rows, vocab_size).bfloat16(), torch.tensor([7, 50000])
        fused_mixce_loss(logits, targets, backend="triton")
        counters = launches[-1].counters
        in_vectors = 16 * counters["global_loads"][16] / (2 * logits.numel())
        assert in_vectors > 0.999, counters
        assert counters["global_loaded_bytes"] < 1.05 * 2 * logits.numel(), counters
        assert counters["instructions"] <= 11 * logits.numel(), counters
        assert counters["special_ops"] <= 1.08 * logits.numel(), counters

        # Rows whose factor is 1 are neither read nor written: each thread reads the factor alone.
        backend.scale_rows_(logits, torch.tensor([1.0, 1.0]))
        counters = launches[-1].counters
        assert not counters["global_stores"], counters
        assert list(counters["global_loads"]) == [4], counters

        # Values do not specialise: neither sizes and strides of 1 or of multiples of 16, nor options, nor addresses.
        compiled = len(kernels.forward_kernel.device_caches[90][0])
        assert compiled > 0
        for n_rows, vocab_size, ignore_index, eta in ((1, 50257, 1, 0.0), (2, 50272, 16, 1.0), (1, 50258, 2**40, 0.3)):
            logits, targets = torch.randn(n_rows, vocab_size + 16).bfloat16(), torch.full((n_rows,), 3)
            fused_mixce_loss(logits[:, 3 : 3 + vocab_size], targets, eta, ignore_index=ignore_index, backend="triton")
        assert len(kernels.forward_kernel.device_caches[90][0]) == compiled
    print("ran", len(launches) > 0)


if __name__ == "__main__":
    main()
