"""The loss inside trainers: `transformers` for Hugging Face models and their `Trainer`, `trl` for `SFTTrainer`.

Each module needs the package it is named after, and says so where it is missing or its version is not supported.
"""

from mixce_kernels.integrations.metrics import TokenMetrics

__all__ = ["TokenMetrics"]
