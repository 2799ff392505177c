"""The operators, sent to the compiled library or to plain torch (see ``backend.py``)."""

from .debias import debias_conv2d, debias_linear, with_gradient
from .elementwise import (
    actnorm,
    affine_coupling,
    logit,
    normal_log_prob,
    smooth_leaky_relu,
    smooth_leaky_relu_inverse,
)
from .network import image_network
from .self_norm import conv2d_weight_gradient, convolve, snf_conv2d, snf_linear
from .spline import rq_spline
from .triangular import triangular_conv2d_solve

__all__ = [
    "actnorm",
    "affine_coupling",
    "conv2d_weight_gradient",
    "convolve",
    "debias_conv2d",
    "debias_linear",
    "image_network",
    "logit",
    "normal_log_prob",
    "rq_spline",
    "smooth_leaky_relu",
    "smooth_leaky_relu_inverse",
    "snf_conv2d",
    "snf_linear",
    "triangular_conv2d_solve",
    "with_gradient",
]
