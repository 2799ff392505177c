"""A flow read as a variational autoencoder whose noise is small."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .bijection import per_sample_sum, push, wide_dtype
from .flow import Flow


class VariationalBound(NamedTuple):
    """What :func:`variational_bound` gives, each in nats and of shape ``(B,)``.

    Attributes:
        bound: estimate of the lower bound on the log-density of the noisy decoder.
        exact: the exact ``log p(x)`` of the flow, by the change of variables.
        error: standard error of ``bound``; NaN for one sample.
    """

    bound: Tensor
    exact: Tensor
    error: Tensor


@torch.no_grad()
def variational_bound(
    flow: Flow, x: Tensor, sigma: float, samples: int = 16, context: Tensor | None = None
) -> VariationalBound:
    """The evidence lower bound of a flow whose encoder and decoder have noise, beside the exact.

    With f the flow from data to noise, g its way back by the learned inverses, n standard normal,

        encoder q(z|x):  z = f(x + sigma n)          decoder p(x|z):  N(x; g(z), sigma^2 I)

        bound = E[ log p_Z(z) + log p(x|z) - log q(z|x) ]
              = E[ log p_f(x') - n'e / sigma - ||e||^2 / (2 sigma^2) ]
              with  x' = x + sigma n,  e = g(f(x')) - x'

    since ``log q(z|x) = log N(x'; x, sigma^2 I) - log |det J_f(x')|`` and ``x - g(z) =
    -(sigma n + e)``, whose ``||n||^2 / 2`` cancel. It is a lower bound on ``log of the integral of
    p_Z(z) N(x; g(z), sigma^2 I)``, the density of the decoder, for any g. It is one on the
    flow's own ``log p_f(x)`` only so far as g inverts f: a g that contracts makes data near its
    image likelier than f says. For exact inverses e = 0, and the bound is the mean of
    ``log p_f`` around x, which goes to ``log p_f(x)`` as sigma -> 0, with an error of
    ``sigma^2 / 2 tr(Hessian of log p_f)``.

    Where the inverse is not exact the bound falls as ``-||e||^2 / (2 sigma^2)``: it tells for which
    noise the learned inverse is a decoder. Up to a constant, minus the bound is
    :meth:`snf_ext.Flow.loss` at x' with ``recon_weight = 1 / (2 sigma^2)``, but for measuring the
    reconstruction end to end, and against x in place of x'.

    Of f only injectivity within a few sigma of x matters: that is the local invertibility which
    the paper hopes for. It names neither the encoder's covariance nor the way noise enters. Here
    noise enters at the data, which for small sigma is ``z = f(x) + sigma J_f n``, of covariance
    ``sigma^2 J_f J_f'``, and for linear f exactly so; noise of one size in z would not lead to
    the change of variables.

    Args:
        flow: of continuous data. One that dequantizes is to be cut behind that layer.
        x: ``(B, *event_shape)``.
        sigma: standard deviation of the noise, in units of x.
        samples: number of draws n for each x.
        context: ``(B, context_features)`` for a conditional flow.

    Raises:
        TypeError: ``flow`` is no Flow.
        ValueError: ``sigma`` is not positive and finite, ``samples`` is under 1, x or the context
            does not fit.

    Cost: ``samples`` exact likelihoods and passes back. For sigma below the precision of x relative
    to its size, e is rounding.
    Source: SNF A.4, "Variational Interpretation"; Gritsenko et al. 2019, "On the relationship
    between normalising flows and variational- and denoising autoencoders".

    >>> import snf_ext
    >>> layer = snf_ext.SelfNormLinear(3).double()
    >>> layer.weight_inv.data = layer.weight.data.inverse()
    >>> flow, x = snf_ext.Flow([layer], event_shape=(3,)), torch.randn(5, 3).double()
    >>> bound, exact, error = snf_ext.variational_bound(flow, x, sigma=1e-6)
    >>> torch.allclose(bound, exact, atol=1e-4)
    True
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"flow must be a snf_ext.Flow; got {type(flow).__name__}")
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma must be positive and finite; got {sigma}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1; got {samples}")
    exact = flow.log_prob(x, context)
    draws = torch.stack([_draw(flow, x, sigma, context) for _ in range(samples)])
    error = draws.std(0) / math.sqrt(samples) if samples > 1 else torch.full_like(exact, math.nan)
    return VariationalBound(draws.mean(0), exact, error)


def _draw(flow: Flow, x: Tensor, sigma: float, context: Tensor | None) -> Tensor:
    noisy = x + sigma * torch.randn_like(x)
    n = (noisy - x) / sigma  # what rounding has left of it
    z, log_det, _ = push(list(flow.bijections), noisy, context, exact=True)  # type: ignore[arg-type]
    e = flow.inverse(z, context) - noisy
    n, e = (t.to(wide_dtype(x.dtype)) for t in (n, e / sigma))
    return ops.normal_log_prob(z) + log_det - per_sample_sum(n * e + e.square() / 2)
