"""The loss inside trainers: `transformers` for Hugging Face models and their `Trainer`, `trl` for `SFTTrainer`.

`trl_grpo` has the log-probabilities of `GRPOTrainer`, `axolotl` a plugin, `ms_swift` and `nemo_automodel` the losses
that those trainers call. Each module needs the package of its name, `trl_grpo` TRL. Importing it raises an ImportError
if that package is missing or its version is not supported.
"""

from mixce_kernels.integrations.metrics import TokenMetrics

__all__ = ["TokenMetrics"]
