"""The general bijection: its gradients against the linear layer, autograd and closed forms."""

from __future__ import annotations

import pytest
import torch
from bijections_table import residual_pair
from torch import nn

import snf_ext
from snf_ext import SelfNormBijection
from snf_ext.jacobian import jacobian, orthonormal_probes
from snf_ext.newton import newton_inverse

DIMENSION = 4


def off(module: nn.Module, scale: float = 0.2) -> nn.Module:
    """In float64, its parameters a little off where they start."""
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn_like(p))
    return module


def upstream(batch: int, dimension: int = DIMENSION) -> tuple[torch.Tensor, ...]:
    """Gradients of z, log_det and recon."""
    return tuple(torch.randn(batch, *shape).double() for shape in ((dimension,), (), ()))


def linear_twins(probes: int) -> tuple[snf_ext.SelfNormLinear, SelfNormBijection]:
    """A linear layer, and the general one with the same two matrices."""
    layer = off(snf_ext.SelfNormLinear(DIMENSION, bias=False))
    f, g = (nn.Linear(DIMENSION, DIMENSION, bias=False).double() for _ in range(2))
    f.weight.data.copy_(layer.weight.data)
    g.weight.data.copy_(layer.weight_inv.data)
    return layer, SelfNormBijection(f, g, (DIMENSION,), probes=probes)


def both_gradients(layer, general, x, grads):
    inputs = (x, layer.weight, layer.weight_inv)
    want = torch.autograd.grad(tuple(layer(x)), inputs, grads)
    got = torch.autograd.grad(tuple(general(x)), (x, *general.parameters()), grads)
    return got, want


def test_all_probes_give_the_linear_layers_gradients():
    layer, general = linear_twins(probes=DIMENSION)
    x = torch.randn(7, DIMENSION).double().requires_grad_()
    for got, want in zip(layer(x), general(x), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    for got, want in zip(*both_gradients(layer, general, x, upstream(7)), strict=True):
        assert want.abs().max() > 0.1
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_all_probes_give_the_convolutions_gradients():
    layer = off(snf_ext.SelfNormConv2d(2, 3, bias=False))
    f, g = (nn.Conv2d(2, 2, 3, padding=1, bias=False).double() for _ in range(2))
    f.weight.data.copy_(layer.weight.data)
    g.weight.data.copy_(layer.weight_inv.data)
    general = SelfNormBijection(f, g, (2, 3, 4), probes=24)
    x = torch.randn(5, 2, 3, 4).double().requires_grad_()
    dz, *others = upstream(5, 24)
    for got, want in zip(*both_gradients(layer, general, x, (dz.view_as(x), *others)), strict=True):
        assert want.abs().max() > 0.1
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("probes", [1, 2])
def test_mean_over_10000_probes_is_the_linear_layers_gradient(probes):
    """100 batches of 100 samples, each sample with probes of its own."""
    layer, general = linear_twins(probes)
    x = torch.randn(100, DIMENSION).double().requires_grad_()
    grads = upstream(100)
    # Each sample's draw counts the same, and no data term hides the estimate.
    grads = (0 * grads[0], torch.ones_like(grads[1]), 0 * grads[2])
    draws = [both_gradients(layer, general, x, grads) for _ in range(100)]
    for i in (1, 2):
        estimates = torch.stack([got[i] for got, _ in draws])
        error = estimates.std(0) / len(draws) ** 0.5
        assert error.max() > 0.01
        assert ((estimates.mean(0) - draws[0][1][i]).abs() <= 3 * error).all()


def test_gradients_of_networks_are_the_equations():
    """The equation set, with traces from autograd's Jacobians, for f and g that do not match."""
    general = off(residual_pair((3,), probes=3))
    f, g = list(general.f.parameters()), list(general.g.parameters())
    x = torch.randn(5, 3).double().requires_grad_()
    dz, c, q = upstream(5, 3)
    got = torch.autograd.grad(tuple(general(x)), [x, *f, *g], (dz, c, q))

    def slopes(function, points):
        return torch.stack(
            [
                torch.autograd.functional.jacobian(
                    lambda r: function(r[None])[0], p, create_graph=True
                )
                for p in points
            ]
        )

    z = general.f(x)
    slope_f, slope_g = slopes(general.f, x), slopes(general.g, z.detach())

    def trace(a, b):
        return (c * (a @ b).diagonal(dim1=1, dim2=2).sum(1)).sum()

    of_f = (dz * z).sum() + trace(slope_g.detach(), slope_f)
    dx, *dtheta = torch.autograd.grad(of_f, [x, *f], retain_graph=True)
    of_g = (dx * general.g(z.detach())).sum() + trace(slope_f.detach(), slope_g)
    dgamma = torch.autograd.grad(of_g, g, allow_unused=True, materialize_grads=True)
    recon = (general.g(general.f(x.detach())) - x.detach()).square().sum(1)
    drecon = torch.autograd.grad((q * recon).sum(), [*f, *g])
    halves = [d / 2 for d in dtheta] + [-d / 2 for d in dgamma]
    want = [dx, *(h + r for h, r in zip(halves, drecon, strict=True))]
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 0.01
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


class SinhOfLinear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return torch.sinh(x @ self.weight.T)


class LinearOfAsinh(SinhOfLinear):
    def forward(self, z):
        return torch.asinh(z) @ self.weight.T


def exact_inverses(probes: int) -> SelfNormBijection:
    weight = torch.eye(3).double() + 0.3 * torch.randn(3, 3).double()
    return SelfNormBijection(
        SinhOfLinear(weight), LinearOfAsinh(weight.inverse()), (3,), probes=probes
    )


def log_density(z, slope_of_sinh, matrix):
    return -z.square().sum(1) / 2 + slope_of_sinh.log().sum(1) + torch.logdet(matrix)


def test_gradients_are_half_the_exact_ones_where_g_is_the_inverse():
    """Of both densities, in closed form, though the Jacobian depends on x; whole for x."""
    general = exact_inverses(probes=3)
    x = torch.randn(6, 3).double().requires_grad_()
    z, log_det, recon = general(x)
    assert recon.max() < 1e-20
    loss = (log_det - z.square().sum(1) / 2).sum()
    dx, dweight, dweight_inv = torch.autograd.grad(loss, [x, *general.parameters()])

    weight, weight_inv = (p.detach().clone().requires_grad_() for p in general.parameters())
    y = x @ weight.T
    of_f = log_density(y.sinh(), y.cosh(), weight).sum()
    want_x, want = torch.autograd.grad(of_f, [x, weight])
    torch.testing.assert_close(dx, want_x, rtol=0, atol=1e-10)
    torch.testing.assert_close(dweight, want / 2, rtol=0, atol=1e-10)

    inverse = weight_inv.inverse()
    y = x.detach() @ inverse.T
    of_g = log_density(y.sinh(), y.cosh(), inverse).sum()
    (want,) = torch.autograd.grad(of_g, [weight_inv])
    assert want.abs().max() > 1
    torch.testing.assert_close(dweight_inv, want / 2, rtol=0, atol=1e-9)


def test_one_probe_is_right_on_average_where_the_jacobian_depends_on_x():
    general = exact_inverses(probes=1)
    x = torch.randn(1, 3).double()
    draws = []
    for _ in range(100):
        log_det = general(x.expand(100, 3)).log_det.mean()
        draws.append(torch.autograd.grad(log_det, general.f.weight)[0])
    weight = general.f.weight.detach().clone().requires_grad_()
    exact = (x @ weight.T).cosh().log().sum() + torch.logdet(weight)
    (want,) = torch.autograd.grad(exact, weight)
    estimates = torch.stack(draws)
    error = estimates.std(0) / len(draws) ** 0.5
    assert error.max() > 1e-3
    assert ((estimates.mean(0) - want / 2).abs() <= 3 * error).all()


def test_exact_forward_is_the_density_of_f_with_its_whole_gradient():
    general = off(residual_pair((2, 1, 3)))
    x = torch.randn(4, 2, 1, 3).double().requires_grad_()
    slopes = [
        torch.autograd.functional.jacobian(
            lambda r: general.f(r[None])[0].flatten(), event, create_graph=True
        ).reshape(6, 6)
        for event in x
    ]
    want = torch.stack([torch.linalg.slogdet(slope).logabsdet for slope in slopes])
    step = general.exact_forward(x)
    torch.testing.assert_close(step.log_det, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(step.z, general.f(x), rtol=0, atol=0)
    wide = x[:1].expand(3, -1, -1, -1)  # which forward mode does not take as it is
    assert torch.equal(general.exact_forward(wide).log_det, step.log_det[:1].expand(3))
    inputs = [x, *general.f.parameters()]
    z = general.f(x).square().sum()
    for got, true in zip(
        torch.autograd.grad(step.log_det.sum() - step.z.square().sum(), inputs),
        torch.autograd.grad(want.sum() - z, inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, true, rtol=0, atol=1e-11)


def test_a_surrogate_is_no_likelihood():
    """In training mode too the likelihood is that of f, whatever g has learned."""
    general = off(residual_pair((3,)))
    flow = snf_ext.Flow([general, off(residual_pair((3,)))], event_shape=(3,)).double()
    x = torch.randn(5, 3).double()
    want = flow.eval().log_prob(x)
    # The chain rule on the whole flow, which knows of no layers.
    for i in range(len(x)):
        slope = torch.autograd.functional.jacobian(lambda r: flow(r[None]).z[0], x[i])
        z = flow(x[i : i + 1]).z[0]
        normal = torch.distributions.Normal(0, 1).log_prob(z).sum()
        assert abs(want[i] - normal - slope.det().abs().log()) < 1e-12
    off(general.g, 1.0)
    for mode in (True, False):
        assert torch.equal(flow.train(mode).log_prob(x), want)
    assert not flow.train()(x).log_det.any()
    assert (-flow.loss(x) - want.mean()).abs() > 0.1


def test_reconstruction_sends_nothing_to_x():
    x = torch.randn(5, 3).double().requires_grad_()
    for mode in (True, False):
        general = off(residual_pair((3,), probes=2, jvp_weight=0.5)).train(mode)
        first = nn.Linear(3, 3).double()
        general(first(x)).recon.sum().backward()
        assert x.grad is None or not x.grad.any()
        assert first.weight.grad is None or not first.weight.grad.any()
        assert all(p.grad is not None and p.grad.any() for p in general.parameters())


def test_jvp_constraint_is_the_distance_of_the_jacobians_in_training_alone():
    general = off(residual_pair((3,), probes=3, jvp_weight=0.5))
    x = torch.randn(5, 3).double()
    recon = (general.g(general.f(x)) - x).square().sum(1)
    product = jacobian(general.g, general.f(x)) @ jacobian(general.f, x)
    distance = (product - torch.eye(3)).square().sum((1, 2))
    assert distance.min() > 1e-3
    torch.testing.assert_close(general(x).recon, recon + 0.5 * distance, rtol=0, atol=1e-12)
    parameters = list(general.parameters())
    got = torch.autograd.grad(general(x).recon.sum(), parameters)
    want = torch.autograd.grad((recon + 0.5 * distance).sum(), parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    torch.testing.assert_close(general.eval()(x).recon, recon, rtol=0, atol=1e-12)
    torch.testing.assert_close(general.exact_forward(x).recon, recon, rtol=0, atol=1e-12)

    few = SelfNormBijection(general.f, general.g, (3,), probes=1, jvp_weight=0.5)
    draws = few(x[:1].expand(4000, 3)).recon
    assert abs(draws.mean() - (recon + 0.5 * distance)[0]) <= 3 * draws.std() / 4000**0.5


def test_probes_are_orthogonal_and_unbiased():
    v = orthonormal_probes(torch.zeros(4000, 2, 2, dtype=torch.float64), 3).flatten(2)
    gram = torch.einsum("pbd,qbd->bpq", v, v)
    assert (gram - 4 * torch.eye(3)).abs().max() < 1e-12
    outer = torch.einsum("pbd,pbe->bde", v, v) / 3
    error = outer.std(0) / 4000**0.5
    assert ((outer.mean(0) - torch.eye(4)).abs() <= 4 * error).all()


def test_exact_inverse_from_a_learned_one_that_is_wrong():
    general = off(residual_pair((3,))).eval()
    off(general.g, 2.0)
    x = 3 * torch.randn(20, 3).double()
    z = general(x).z
    assert (general.inverse(z) - x).abs().max() > 1
    together = general.inverse(z, exact=True)
    assert (together - x).abs().max() < 1e-12
    for i in range(3):
        alone = general.inverse(z[i : i + 1], exact=True)
        assert (alone - together[i]).abs().max() < 1e-13
    with torch.no_grad():
        general.g.out.bias.fill_(torch.nan)
    assert (general.inverse(z, exact=True) - x).abs().max() < 1e-12


def test_refined_inverse_comes_to_the_exact_one_or_warns():
    general = off(residual_pair((2, 1, 3)), 0.05).eval()
    x = torch.randn(6, 2, 1, 3).double()
    z = general(x).z
    assert (general.inverse(z) - x).abs().max() > 0.01
    start = general.g(z)
    once = start + start - general.g(general.f(start))
    torch.testing.assert_close(general.inverse(z, refine=1), once, rtol=0, atol=1e-13)
    assert (general.inverse(z, refine=200) - x).abs().max() < 1e-12
    back, residual, steps = general.refine_inverse(z, 200)
    assert (back - x).abs().max() < 1e-12
    assert residual.shape == (6,)
    assert residual.max() < 1e-13
    assert 1 < steps < 200
    flow = snf_ext.Flow([general], (2, 1, 3))
    assert torch.equal(flow.inverse(z, refine=200), back)

    with torch.no_grad():
        general.g.out.weight.mul_(-30)
    with pytest.warns(snf_ext.InverseNotConverged, match=r"SelfNormBijection\(\(2, 1, 3\), probes"):
        general.inverse(z, refine=30)
    with pytest.raises(ValueError, match="refine must be 0 with exact=True"):
        general.inverse(z, exact=True, refine=1)
    with pytest.raises(ValueError, match="steps must be an int of at least 0; got -1"):
        general.refine_inverse(z, -1)


def test_exact_inverse_has_the_derivative_in_the_weights():
    x = torch.randn(4, 2).double()
    weight = (torch.eye(2) + 0.3 * torch.randn(2, 2)).double().requires_grad_()
    with torch.no_grad():
        z = torch.sinh(x @ weight.T)

    def back(weight_, z_):
        return newton_inverse(lambda x_: torch.sinh(x_ @ weight_.T), z_, torch.zeros_like(z_))

    assert torch.autograd.gradcheck(back, (weight, z.requires_grad_()))


@pytest.mark.parametrize(
    ("function", "z"),
    [(torch.tanh, 2.0), (torch.square, -1.0), (torch.sinh, float("nan"))],
    ids=["out of range", "no solution", "not finite"],
)
def test_newton_that_does_not_converge_is_an_error(function, z):
    z = torch.tensor([[0.25], [z]], dtype=torch.float64)
    message = r"z must be in the range of f: .* did not converge for 1 of 2 events; got residuals"
    with pytest.raises(ValueError, match=message):
        newton_inverse(function, z, 0.3 + 0 * z.nan_to_num())


def test_compiled_gradients_are_the_eager_ones():
    torch.compiler.reset()
    general = off(residual_pair((3,), probes=2, jvp_weight=0.5))
    x = torch.randn(5, 3).double()

    def loss(x_):
        z, log_det, recon = general(x_)
        return z.square().sum() - log_det.sum() + recon.sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(4)
        gradients.append(torch.autograd.grad(function(x), list(general.parameters())))
    for a, b in zip(*gradients, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_autocast_keeps_exact_values_exact():
    general = residual_pair((3,)).eval()
    x = torch.randn(5, 3)
    want = general(x)
    with torch.autocast("cpu", torch.bfloat16):
        for got, expected in zip(general(x), want, strict=True):
            assert torch.equal(got, expected)
        back = general.inverse(want.z, exact=True)
        training = general.train()(x)
    assert (back - x).abs().max() < 1e-5
    assert [t.dtype for t in training] == 3 * [torch.float32]


def test_double_backward_is_an_error():
    general = residual_pair((3,))
    x = torch.randn(5, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(general(x).z.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward through a self-normalizing"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"f": torch.sinh}, TypeError, "f must be a torch.nn.Module; got builtin_function"),
        ({"g": None}, TypeError, "g must be a torch.nn.Module; got NoneType"),
        ({"event_shape": ()}, ValueError, r"event_shape must have positive sizes; got \[\]"),
        ({"probes": 0}, ValueError, "probes must be at least 1; got 0"),
        ({"probes": 4}, ValueError, "probes must be at most D = 3; got 4"),
        ({"jvp_weight": -1.0}, ValueError, "jvp_weight must be finite and not negative; got -1"),
        ({"jvp_weight": float("nan")}, ValueError, "jvp_weight must be finite .*; got nan"),
    ],
)
def test_settings_are_checked(settings, error, message):
    defaults = {"f": nn.Linear(3, 3), "g": nn.Linear(3, 3), "event_shape": (3,)}
    with pytest.raises(error, match=message):
        SelfNormBijection(**{**defaults, **settings})


def test_shapes_are_checked():
    general = SelfNormBijection(nn.Linear(3, 2), nn.Linear(3, 4), (3,))
    for call in (general, general.exact_forward, general.inverse):
        with pytest.raises(ValueError, match=r"must have shape .* events \[3\]; got \[5, 2\]"):
            call(torch.zeros(5, 2))
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"f must keep .* input, \[5, 3\]; got \[5, 2\]"):
            general.train(mode)(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"g must keep .* input, \[5, 3\]; got \[5, 4\]"):
        general.inverse(torch.zeros(5, 3))
