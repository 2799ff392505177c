"""Self-normalizing flows: unconstrained linear and convolutional layers that learn their inverse.

The layers are drop-in modules, :class:`Flow` composes them into a density, ``models`` holds the
papers' architectures. Direction: ``forward`` goes from data x to noise z.
"""

from . import models, ops, reference
from .backend import backend, build_info, use_backend
from .bijection import Bijection, FlowStep
from .constraint import constrain
from .controllers import (
    GECO,
    AugmentedLagrangian,
    Controller,
    Fixed,
    ModifiedDifferentialMultipliers,
    Relative,
)
from .distributions import FlowDistribution
from .flow import Flow
from .graphed import GraphedStep
from .layers import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    BatchNorm,
    ComponentwiseAffine,
    Debias,
    Dequantize,
    EmergingConv2d,
    ExactConv2d,
    ExactLinear,
    ExponentialConv2d,
    Flatten,
    HouseholderConv1x1,
    LeakyReLU,
    LearnableLeakyReLU,
    Logit,
    LUConv1x1,
    Normalize,
    Penalty,
    Permutation,
    PlainConv1x1,
    RationalQuadraticSpline,
    RelativeLinear,
    SelfNormBijection,
    SelfNormConv2d,
    SelfNormLinear,
    SmoothLeakyReLU,
    SmoothTanh,
    SplitPrior,
    Squeeze,
    Tracked,
    Unsqueeze,
    VariationalDequantize,
    coupling_outputs,
    initialize,
)
from .refine import InverseNotConverged, Refined
from .reversible import NotReversible, Reversible
from .training.angle import gradient_angle
from .training.errors import Diverged
from .training.guard import DivergenceGuard
from .training.monitor import GradientMonitor
from .transforms import BijectionTransform
from .variational import VariationalBound, variational_bound
from .version import __version__

__all__ = [
    "GECO",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "AugmentedLagrangian",
    "BatchNorm",
    "Bijection",
    "BijectionTransform",
    "ComponentwiseAffine",
    "Controller",
    "Debias",
    "Dequantize",
    "Diverged",
    "DivergenceGuard",
    "EmergingConv2d",
    "ExactConv2d",
    "ExactLinear",
    "ExponentialConv2d",
    "Fixed",
    "Flatten",
    "Flow",
    "FlowDistribution",
    "FlowStep",
    "GradientMonitor",
    "GraphedStep",
    "HouseholderConv1x1",
    "InverseNotConverged",
    "LUConv1x1",
    "LeakyReLU",
    "LearnableLeakyReLU",
    "Logit",
    "ModifiedDifferentialMultipliers",
    "Normalize",
    "NotReversible",
    "Penalty",
    "Permutation",
    "PlainConv1x1",
    "RationalQuadraticSpline",
    "Refined",
    "Relative",
    "RelativeLinear",
    "Reversible",
    "SelfNormBijection",
    "SelfNormConv2d",
    "SelfNormLinear",
    "SmoothLeakyReLU",
    "SmoothTanh",
    "SplitPrior",
    "Squeeze",
    "Tracked",
    "Unsqueeze",
    "VariationalBound",
    "VariationalDequantize",
    "__version__",
    "backend",
    "build_info",
    "constrain",
    "coupling_outputs",
    "gradient_angle",
    "initialize",
    "models",
    "ops",
    "reference",
    "use_backend",
    "variational_bound",
]
