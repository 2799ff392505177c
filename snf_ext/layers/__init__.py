"""Bijections: one idea a file."""

from .activations import LeakyReLU, LearnableLeakyReLU, SmoothLeakyReLU, SmoothTanh
from .actnorm import ActNorm, initialize
from .affine import ComponentwiseAffine
from .batch_norm import BatchNorm
from .coupling import AdditiveCoupling, AffineCoupling
from .debias import Debias
from .emerging import EmergingConv2d
from .exact import ExactConv2d, ExactLinear
from .exponential import ExponentialConv2d
from .general import SelfNormBijection
from .glow_mixing import HouseholderConv1x1, LUConv1x1, PlainConv1x1
from .preprocessing import Dequantize, Logit, Normalize, VariationalDequantize
from .probe import coupling_outputs
from .relative import RelativeLinear
from .self_norm import SelfNormConv2d, SelfNormLinear
from .shape import Flatten, Permutation, Squeeze, Unsqueeze
from .spline import RationalQuadraticSpline
from .split_prior import SplitPrior
from .upkeep import Penalty, Tracked

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "BatchNorm",
    "ComponentwiseAffine",
    "Debias",
    "Dequantize",
    "EmergingConv2d",
    "ExactConv2d",
    "ExactLinear",
    "ExponentialConv2d",
    "Flatten",
    "HouseholderConv1x1",
    "LUConv1x1",
    "LeakyReLU",
    "LearnableLeakyReLU",
    "Logit",
    "Normalize",
    "Penalty",
    "Permutation",
    "PlainConv1x1",
    "RationalQuadraticSpline",
    "RelativeLinear",
    "SelfNormBijection",
    "SelfNormConv2d",
    "SelfNormLinear",
    "SmoothLeakyReLU",
    "SmoothTanh",
    "SplitPrior",
    "Squeeze",
    "Tracked",
    "Unsqueeze",
    "VariationalDequantize",
    "coupling_outputs",
    "initialize",
]
