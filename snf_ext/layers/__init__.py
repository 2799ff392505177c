"""Bijections: one idea a file."""

from .activations import SmoothLeakyReLU
from .exact import ExactConv2d, ExactLinear
from .preprocessing import Dequantize, Logit, Normalize
from .self_norm import SelfNormConv2d, SelfNormLinear
from .shape import Flatten, Squeeze

__all__ = [
    "Dequantize",
    "ExactConv2d",
    "ExactLinear",
    "Flatten",
    "Logit",
    "Normalize",
    "SelfNormConv2d",
    "SelfNormLinear",
    "SmoothLeakyReLU",
    "Squeeze",
]
