"""Fused MixCE loss kernels over vocabulary-sized logits (Zhang et al., ACL 2023, arXiv 2305.16958).

`fused_mixce_loss` is the function, `MixCELoss` its module, `mixce_loss_reference` the same in plain PyTorch.
"""

from importlib.metadata import version

from mixce_kernels.functional import fused_mixce_loss
from mixce_kernels.modules import MixCELoss
from mixce_kernels.reference import mixce_loss_reference
from mixce_kernels.stats import MixCEStats

__all__ = ["MixCELoss", "MixCEStats", "fused_mixce_loss", "mixce_loss_reference"]
__version__ = version("mixce_kernels")
