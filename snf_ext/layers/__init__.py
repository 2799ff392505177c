"""Bijections: one idea a file."""

from .activations import SmoothLeakyReLU
from .actnorm import ActNorm, initialize
from .coupling import AdditiveCoupling, AffineCoupling
from .exact import ExactConv2d, ExactLinear
from .preprocessing import Dequantize, Logit, Normalize
from .self_norm import SelfNormConv2d, SelfNormLinear
from .shape import Flatten, Squeeze
from .spline import RationalQuadraticSpline
from .split_prior import SplitPrior

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Dequantize",
    "ExactConv2d",
    "ExactLinear",
    "Flatten",
    "Logit",
    "Normalize",
    "RationalQuadraticSpline",
    "SelfNormConv2d",
    "SelfNormLinear",
    "SmoothLeakyReLU",
    "SplitPrior",
    "Squeeze",
    "initialize",
]
