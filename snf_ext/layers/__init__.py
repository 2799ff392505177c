"""Bijections: one idea a file."""

from .activations import SmoothLeakyReLU
from .emerging import EmergingConv2d
from .exact import ExactConv2d, ExactLinear
from .exponential import ExponentialConv2d
from .glow_mixing import HouseholderConv1x1, LUConv1x1, PlainConv1x1
from .preprocessing import Dequantize, Logit, Normalize
from .relative import RelativeLinear
from .self_norm import SelfNormConv2d, SelfNormLinear
from .shape import Flatten, Squeeze

__all__ = [
    "Dequantize",
    "EmergingConv2d",
    "ExactConv2d",
    "ExactLinear",
    "ExponentialConv2d",
    "Flatten",
    "HouseholderConv1x1",
    "LUConv1x1",
    "Logit",
    "Normalize",
    "PlainConv1x1",
    "RelativeLinear",
    "SelfNormConv2d",
    "SelfNormLinear",
    "SmoothLeakyReLU",
    "Squeeze",
]
