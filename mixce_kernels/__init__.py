"""Fused MixCE loss kernels over vocabulary-sized logits (Zhang et al., ACL 2023, arXiv 2305.16958).

`fused_mixce_loss` is the function, `MixCELoss` its module, `mixce_loss_reference` the same in plain PyTorch.
`fused_linear_mixce_loss`, `LinearMixCELoss` and `linear_mixce_loss_reference` compute it straight from hidden states.
`vocab_parallel_mixce_loss` computes it of logits whose vocabulary is split over the ranks of a process group.
`fused_token_logprobs`, `fused_linear_token_logprobs` and `vocab_parallel_token_logprobs` give tokens' log-probabilities
and entropies, both differentiable.
`weightings` has other functions of a token's statistics for its weight.
"""

from importlib.metadata import version

from mixce_kernels.functional import fused_linear_mixce_loss, fused_mixce_loss, vocab_parallel_mixce_loss
from mixce_kernels.logprobs import fused_linear_token_logprobs, fused_token_logprobs, vocab_parallel_token_logprobs
from mixce_kernels.modules import LinearMixCELoss, MixCELoss
from mixce_kernels.reference import linear_mixce_loss_reference, mixce_loss_reference
from mixce_kernels.stats import MixCEStats

__all__ = [
    "LinearMixCELoss",
    "MixCELoss",
    "MixCEStats",
    "fused_linear_mixce_loss",
    "fused_linear_token_logprobs",
    "fused_mixce_loss",
    "fused_token_logprobs",
    "linear_mixce_loss_reference",
    "mixce_loss_reference",
    "vocab_parallel_mixce_loss",
    "vocab_parallel_token_logprobs",
]
__version__ = version("mixce_kernels")
