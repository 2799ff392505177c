"""Bijections of other flow libraries as ours, and ours as theirs."""

from .zuko import LazyBijection, ZukoBijection, as_lazy_transform, pop_recon

__all__ = ["LazyBijection", "ZukoBijection", "as_lazy_transform", "pop_recon"]
