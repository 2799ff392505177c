"""Bijections: one idea a file."""

from .activations import SmoothLeakyReLU
from .actnorm import ActNorm, initialize
from .coupling import AdditiveCoupling, AffineCoupling
from .emerging import EmergingConv2d
from .exact import ExactConv2d, ExactLinear
from .exponential import ExponentialConv2d
from .glow_mixing import HouseholderConv1x1, LUConv1x1, PlainConv1x1
from .preprocessing import Dequantize, Logit, Normalize
from .relative import RelativeLinear
from .self_norm import SelfNormConv2d, SelfNormLinear
from .shape import Flatten, Squeeze
from .spline import RationalQuadraticSpline
from .split_prior import SplitPrior

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
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
    "RationalQuadraticSpline",
    "RelativeLinear",
    "SelfNormConv2d",
    "SelfNormLinear",
    "SmoothLeakyReLU",
    "SplitPrior",
    "Squeeze",
    "initialize",
]
