"""Self-normalizing flows: unconstrained linear and convolutional layers that learn their inverse.

The layers are drop-in modules, :class:`Flow` composes them into a density, ``models`` holds the
papers' architectures. Direction: ``forward`` goes from data x to noise z.
"""

from . import models, ops, reference
from .backend import backend, build_info, use_backend
from .bijection import Bijection, FlowStep
from .flow import Flow
from .graphed import GraphedStep
from .layers import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Dequantize,
    ExactConv2d,
    ExactLinear,
    Flatten,
    Logit,
    Normalize,
    RationalQuadraticSpline,
    SelfNormConv2d,
    SelfNormLinear,
    SmoothLeakyReLU,
    SplitPrior,
    Squeeze,
    initialize,
)
from .training.angle import gradient_angle
from .version import __version__

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Bijection",
    "Dequantize",
    "ExactConv2d",
    "ExactLinear",
    "Flatten",
    "Flow",
    "FlowStep",
    "GraphedStep",
    "Logit",
    "Normalize",
    "RationalQuadraticSpline",
    "SelfNormConv2d",
    "SelfNormLinear",
    "SmoothLeakyReLU",
    "SplitPrior",
    "Squeeze",
    "__version__",
    "backend",
    "build_info",
    "gradient_angle",
    "initialize",
    "models",
    "ops",
    "reference",
    "use_backend",
]
