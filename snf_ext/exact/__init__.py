"""Exact log-determinants and inverses of the layers' matrices.

The seam is :func:`factorize_linear` and :func:`factorize_conv2d`: layers ask them for a
:class:`Factorization` and know nothing of how it is made. A linear layer has a dense LU. A
convolution is cut into independent pieces (``pieces``), for each of which ``plan`` chooses blocks
of image rows; ``block_lu`` eliminates these, ``band_lu`` takes over where its pivots are weak, and
``fourier`` does circular padding.
"""

from .cache import FactorizationCache
from .factorization import Factorization, factorize_conv2d, factorize_linear
from .log_abs_det import conv2d_log_abs_det, linear_log_abs_det
from .matrix import conv2d_matrix
from .of_layer import differentiates, factorized
from .plan import Plan, plan_conv2d

__all__ = [
    "Factorization",
    "FactorizationCache",
    "Plan",
    "conv2d_log_abs_det",
    "conv2d_matrix",
    "differentiates",
    "factorize_conv2d",
    "factorize_linear",
    "factorized",
    "linear_log_abs_det",
    "plan_conv2d",
]
