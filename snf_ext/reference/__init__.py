"""The operators in plain torch: the fallback where nothing is compiled, and the tests' oracle."""

from .self_norm import snf_conv2d, snf_linear

__all__ = ["snf_conv2d", "snf_linear"]
