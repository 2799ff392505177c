"""Bijections: one idea a file."""

from .activations import LeakyReLU, LearnableLeakyReLU, SmoothLeakyReLU, SmoothTanh
from .actnorm import ActNorm, initialize
from .affine import ComponentwiseAffine
from .batch_norm import BatchNorm
from .coupling import AdditiveCoupling, AffineCoupling
from .exact import ExactConv2d, ExactLinear
from .preprocessing import Dequantize, Logit, Normalize, VariationalDequantize
from .probe import coupling_outputs
from .self_norm import SelfNormConv2d, SelfNormLinear
from .shape import Flatten, Permutation, Squeeze, Unsqueeze
from .spline import RationalQuadraticSpline
from .split_prior import SplitPrior

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "BatchNorm",
    "ComponentwiseAffine",
    "Dequantize",
    "ExactConv2d",
    "ExactLinear",
    "Flatten",
    "LeakyReLU",
    "LearnableLeakyReLU",
    "Logit",
    "Normalize",
    "Permutation",
    "RationalQuadraticSpline",
    "SelfNormConv2d",
    "SelfNormLinear",
    "SmoothLeakyReLU",
    "SmoothTanh",
    "SplitPrior",
    "Squeeze",
    "Unsqueeze",
    "VariationalDequantize",
    "coupling_outputs",
    "initialize",
]
