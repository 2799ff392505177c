"""The operators, sent to the compiled library or to plain torch (see ``backend.py``)."""

from .self_norm import snf_conv2d, snf_linear

__all__ = ["snf_conv2d", "snf_linear"]
