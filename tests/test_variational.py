"""The small-noise bound against closed forms of Gaussians, a quadrature, and the exact density."""

from __future__ import annotations

import ground_truth
import pytest
import torch
from bijections_table import residual_pair
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

import snf_ext
from snf_ext import variational_bound


def linear_case():
    layer = snf_ext.SelfNormLinear(4).double()
    return layer, (4,), layer.weight, layer.weight_inv, lambda c: c


def conv_case():
    layer = snf_ext.SelfNormConv2d(2, 3, padding_mode="circular", bias=True).double()
    return layer, (2, 2, 3), None, None, lambda c: c.repeat_interleave(6)


@pytest.mark.parametrize("make", [linear_case, conv_case])
@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_gap_to_the_decoders_density_is_the_divergence_from_its_posterior(make, sigma):
    """bound + KL(q(z|x), p(z|x)) = log p(x), all Gaussian, though W and R are no inverses."""
    layer, shape, weight, weight_inv, spread = make()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    if weight is None:
        weight, weight_inv = (
            torch.from_numpy(ground_truth.conv_matrix(k.detach().numpy(), shape[1:], circular=True))
            for k in (layer.weight, layer.weight_inv)
        )
    weight, weight_inv, bias = weight.detach(), weight_inv.detach(), spread(layer.bias.detach())
    x = torch.randn(2, *shape).double()
    bound, exact, error = variational_bound(snf_ext.Flow([layer], shape), x, sigma, samples=2000)

    eye, rows = torch.eye(len(bias)).double(), x.flatten(1)
    decoder = MultivariateNormal(-weight_inv @ bias, weight_inv @ weight_inv.T + sigma**2 * eye)
    posterior = torch.linalg.inv(eye + weight_inv.T @ weight_inv / sigma**2)
    centre = (rows + weight_inv @ bias) @ weight_inv @ posterior / sigma**2
    encoder = MultivariateNormal(rows @ weight.T + bias, sigma**2 * weight @ weight.T)
    gap = kl_divergence(encoder, MultivariateNormal(centre, posterior))
    assert gap.min() > 0.01
    assert error.max() < 0.5
    assert (error > 0).all()
    want = decoder.log_prob(rows) - gap
    assert ((bound - want).abs() <= 4 * error).all()
    assert torch.equal(exact, snf_ext.Flow([layer], shape).log_prob(x))


class Stretch(nn.Module):
    """``sinh(x W')``, or the inverse of that."""

    def __init__(self, weight, back):
        super().__init__()
        self.weight, self.back = nn.Parameter(weight), back

    def forward(self, x):
        if self.back:
            return torch.asinh(x) @ self.weight.T
        return torch.sinh(x @ self.weight.T)


def exact_pair():
    weight = torch.eye(3).double() + 0.2 * torch.randn(3, 3).double()
    f, g = Stretch(weight, False), Stretch(weight.inverse(), True)
    return snf_ext.SelfNormBijection(f, g, (3,)), (3,)


def exact_linear():
    layer = snf_ext.SelfNormLinear(3).double()
    layer.weight_inv.data.copy_(layer.weight.data.inverse())
    return layer, (3,)


def exact_conv():
    layer = snf_ext.SelfNormConv2d(2, 1).double()
    layer.weight_inv.data.copy_(layer.weight.data[..., 0, 0].inverse()[..., None, None])
    return layer, (2, 3, 2)


@pytest.mark.parametrize("make", [exact_pair, exact_linear, exact_conv])
def test_bound_of_exact_inverses_goes_to_the_change_of_variables(make):
    layer, shape = make()
    flow = snf_ext.Flow([layer, snf_ext.SmoothLeakyReLU(0.3)], shape).double().train()
    x = torch.randn(4, *shape).double()
    distances = []
    for sigma in (0.1, 1e-2, 1e-3, 1e-4):
        bound, exact, _ = variational_bound(flow, x, sigma, samples=50)
        torch.testing.assert_close(exact, flow.log_prob(x), rtol=0, atol=0)
        distances.append((bound - exact).abs().max().item())
        assert distances[-1] < 10 * sigma
    assert distances[-1] < 1e-2 * distances[0]


def test_bound_is_its_definition_and_below_the_decoders_density_by_quadrature():
    general = residual_pair((2,)).double()
    prior = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    x, sigma = torch.randn(4, 2).double(), 0.3
    with torch.no_grad():
        for p in general.parameters():
            p.add_(0.05 * torch.randn_like(p))

        def likelihood(z):  # log p(x|z), every x against every z
            squares = torch.cdist(x, general.g(z)).square()
            return -squares / (2 * sigma**2) - torch.tensor(2 * torch.pi * sigma**2).log()

        axis = torch.linspace(-7, 7, 351).double()
        z = torch.cartesian_prod(axis, axis)
        joint = prior.log_prob(z) + likelihood(z)
        decoder = joint.logsumexp(1) + 2 * (axis[1] - axis[0]).log()

        n = torch.cartesian_prod(*2 * [torch.linspace(-6, 6, 61).double()])
        chances = prior.log_prob(n).softmax(0)
        bounds = []
        for i in range(len(x)):
            z, log_det, _ = general.exact_forward(x[i] + sigma * n)
            encoder = prior.log_prob(n) - 2 * torch.tensor(sigma).log() - log_det
            bounds.append(chances @ (prior.log_prob(z) + likelihood(z)[i] - encoder))
        want = torch.stack(bounds)
    bound, exact, error = variational_bound(snf_ext.Flow([general], (2,)), x, sigma, samples=400)
    assert error.max() < 0.5
    assert ((bound - want).abs() <= 4 * error).all()
    assert (want + 0.1 < decoder).all()
    assert (bound - exact).abs().min() > 0.1


def test_less_noise_costs_what_the_inverse_lacks():
    """-||e||^2 / (2 sigma^2) for the smallest sigma; one sample has no standard error."""
    general = residual_pair((2,)).double().eval()
    x = torch.randn(6, 2).double()
    bound, exact, error = variational_bound(snf_ext.Flow([general], (2,)), x, 1e-5, samples=1)
    price = general(x).recon / 2e-10
    assert price.min() > 1000
    torch.testing.assert_close(exact - bound, price, rtol=0.02, atol=0)
    assert error.isnan().all()


def test_context_and_half_precision():
    affine = snf_ext.ComponentwiseAffine((3,), context_features=2)
    flow = snf_ext.Flow([affine], (3,), context_features=2)
    x, context = torch.randn(4, 3), torch.randn(4, 2)
    bound, exact, _ = variational_bound(flow, x, 0.01, samples=3, context=context)
    assert (bound - exact).abs().max() < 0.2
    bound, exact, _ = variational_bound(flow.bfloat16(), x.bfloat16(), 0.5, context=context)
    assert bound.dtype == exact.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"flow": nn.Linear(3, 3)}, TypeError, "flow must be a snf_ext.Flow; got Linear"),
        ({"sigma": 0.0}, ValueError, "sigma must be positive and finite; got 0.0"),
        ({"sigma": float("inf")}, ValueError, "sigma must be positive and finite; got inf"),
        ({"samples": 0}, ValueError, "samples must be at least 1; got 0"),
        ({"x": torch.zeros(2, 4)}, ValueError, r"x must have shape .* events \[3\]; got \[2, 4\]"),
        ({"context": torch.zeros(2, 1)}, ValueError, "context must not be given"),
    ],
)
def test_arguments_are_checked(change, error, message):
    flow = snf_ext.Flow([snf_ext.SelfNormLinear(3)], (3,))
    with pytest.raises(error, match=message):
        variational_bound(**{"flow": flow, "x": torch.zeros(2, 3), "sigma": 0.1, **change})
