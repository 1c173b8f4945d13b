"""A first use of an installed package: every vector width of the CPU kernels against plain PyTorch, and what is inside.

It runs where nothing but the package and torch is installed, and prints a line.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import time

USE = """
import torch
from mixce_kernels import fused_linear_mixce_loss, fused_mixce_loss, linear_mixce_loss_reference, mixce_loss_reference

torch.manual_seed(0)
logits = torch.randn(33, 5003, requires_grad=True)
targets = torch.randint(5003, (33,))
hidden, weight = torch.randn(33, 16, requires_grad=True), torch.randn(5003, 16, requires_grad=True)
ours = fused_mixce_loss(logits, targets, 0.5, backend="cpu"), fused_linear_mixce_loss(hidden, weight, targets, 0.5)
plain = mixce_loss_reference(logits, targets, 0.5), linear_mixce_loss_reference(hidden, weight, targets, 0.5)
torch.testing.assert_close(ours, plain)
of = ((logits,), (hidden, weight))
for one, other, inputs in zip(ours, plain, of):
    torch.testing.assert_close(torch.autograd.grad(one, inputs), torch.autograd.grad(other, inputs))
"""


def main() -> None:
    """Tries what this processor has; raises AssertionError where a result is wrong or a part is missing."""
    import torch

    begin = time.perf_counter()
    from mixce_kernels import _C, fused_mixce_loss

    fused_mixce_loss(torch.randn(8, 1000), torch.randint(1000, (8,)), backend="cpu")
    seconds = time.perf_counter() - begin
    assert hasattr(_C, "cuda_forward"), "expected CUDA kernels inside, found none"
    isas = _C.supported_isas()
    for isa in isas:
        program = f"import os\nos.environ['MIXCE_CPU_ISA'] = {isa!r}\n{USE}"
        subprocess.run([sys.executable, "-W", "ignore", "-I", "-c", program], check=True)
    package = importlib.metadata.version("mixce_kernels")
    print(
        f"mixce_kernels {package} with torch {torch.__version__}, CUDA kernels inside, right on {', '.join(isas)}; "
        f"first loss {seconds:.2f} s after the import of torch"
    )


if __name__ == "__main__":
    main()
