"""The synthetic experiment of the MixCE paper."""
