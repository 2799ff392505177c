"""Bijections of other flow libraries as ours, and ours as theirs."""

from .pyro import pyro_distribution
from .transform import TransformBijection
from .zuko import LazyBijection, ZukoBijection, as_lazy_transform, pop_recon

__all__ = [
    "LazyBijection",
    "TransformBijection",
    "ZukoBijection",
    "as_lazy_transform",
    "pop_recon",
    "pyro_distribution",
]
