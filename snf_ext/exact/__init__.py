"""Exact log-determinants and inverses of the layers' matrices.

The seam is :func:`factorize_linear` and :func:`factorize_conv2d`: layers ask them for a
:class:`Factorization` and know nothing of how it is made: a dense LU, or one of ``(C, C)`` for 1x1
kernels.
"""

from .cache import FactorizationCache
from .factorization import Factorization, factorize_conv2d, factorize_linear
from .log_abs_det import conv2d_log_abs_det, linear_log_abs_det
from .matrix import conv2d_matrix

__all__ = [
    "Factorization",
    "FactorizationCache",
    "conv2d_log_abs_det",
    "conv2d_matrix",
    "factorize_conv2d",
    "factorize_linear",
    "linear_log_abs_det",
]
