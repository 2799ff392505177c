"""Likelihood, reconstruction error and gradient angle: the numbers are right."""

import math

import pytest
import small_flows
import torch
import torch.nn.functional as F

import snf_ext
from snf_ext.training import angle, evaluate
from snf_ext.training.angle import gradient_angle, left_out, mean_angle, too_large
from snf_ext.training.bound import noise_bound
from snf_ext.training.evaluate import negative_log_likelihood

SHAPE = (1, 2, 3)


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(17, (count, *SHAPE), generator=generator, dtype=torch.uint8)


# ---- the likelihood


def test_nll_against_the_jacobian():
    torch.manual_seed(0)
    flow = snf_ext.Flow(
        [
            snf_ext.Normalize(0.0, 17.0),
            snf_ext.Logit(1e-3),
            snf_ext.Flatten(SHAPE),
            snf_ext.SelfNormLinear(6),
            snf_ext.SmoothLeakyReLU(0.3),
            snf_ext.SelfNormLinear(6),
        ],
        SHAPE,
    ).double()
    for parameter in flow.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    x = images(7).double() + torch.rand(7, *SHAPE, dtype=torch.float64)
    expected = []
    for sample in x:
        matrix = torch.autograd.functional.jacobian(lambda s: flow(s[None]).z[0], sample)
        z = flow(sample[None]).z[0]
        log_normal = -0.5 * z.square().sum() - 3 * math.log(2 * math.pi)
        expected.append(-(log_normal + torch.linalg.slogdet(matrix.reshape(6, 6)).logabsdet))
    expected = torch.stack(expected).detach()
    nll = evaluate.negative_log_likelihood(flow, x)
    torch.testing.assert_close(nll, expected, rtol=1e-10, atol=1e-10)
    result = evaluate.evaluate(flow, x)
    assert result.nll == pytest.approx(expected.mean().item(), rel=1e-10)
    assert result.bits_per_dim == pytest.approx(expected.mean().item() / math.log(2) / 6, rel=1e-10)
    assert result.nll_error == pytest.approx(
        expected.std(correction=0).item() / math.sqrt(7), rel=1e-9
    )
    assert result.images == 7


def test_bits_of_a_uniform_density_count_the_levels():
    """Uniform over 17 values is log2 17 bits a pixel, by the flow's own preprocessing."""

    class Uniform(snf_ext.Flow):
        def log_prob(self, x, context=None):
            step = self.forward(x)  # dequantized and scaled to [0, 1], where the density is 1
            assert ((step.z >= 0) & (step.z <= 1)).all()
            return step.log_det

    flow = Uniform([snf_ext.Dequantize(17), snf_ext.Normalize(0.0, 17.0)], SHAPE)
    nll = evaluate.negative_log_likelihood(flow, images(9)).mean().item()
    assert evaluate.bits_per_dim(nll, SHAPE) == pytest.approx(math.log2(17), rel=1e-6)


def test_measuring_repeats_and_leaves_no_trace():
    flow = snf_ext.models.fc(SHAPE, pixel_levels=17).train()
    x = images(600)  # two batches
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = evaluate.evaluate(flow, x, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert flow.training
    assert all(p.grad is None for p in flow.parameters())
    assert evaluate.evaluate(flow.eval(), x, seed=1) == first
    assert evaluate.evaluate(flow, x, seed=2).nll != first.nll
    assert not flow.training
    with pytest.raises(ValueError, match="images must be at least one; got none"):
        evaluate.evaluate(flow, x[:0])


def test_reconstruction_error_by_hand():
    torch.manual_seed(0)
    one, two = snf_ext.SelfNormLinear(6), snf_ext.SelfNormLinear(6)
    flow = snf_ext.Flow([snf_ext.Normalize(0, 17), snf_ext.Flatten(SHAPE), one, two], SHAPE)
    for parameter in flow.double().parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    x = images(5).double()
    u = x.flatten(1) / 17
    with torch.no_grad():
        h = u @ one.weight.T + one.bias
        z = h @ two.weight.T + two.bias
        back = (z - two.bias) @ two.weight_inv.T
        back = (back - one.bias) @ one.weight_inv.T
        layer_one = u @ (one.weight_inv @ one.weight).T - u
        layer_two = h @ (two.weight_inv @ two.weight).T - h
    total, layers = evaluate.reconstruction_error(flow, x)
    assert total == pytest.approx((back - u).square().sum(1).mean().item(), rel=1e-10)
    assert layers == pytest.approx(
        {
            "bijections.2": layer_one.square().sum(1).mean().item(),
            "bijections.3": layer_two.square().sum(1).mean().item(),
        },
        rel=1e-10,
    )


def test_layers_inside_other_bijections_are_found():
    torch.manual_seed(0)
    layers = [snf_ext.SelfNormLinear(6) for _ in range(3)]
    for layer in layers:
        layer.weight.data += 0.2 * torch.randn(6, 6)
    one, two, three = layers
    flat = snf_ext.Flow([snf_ext.Flatten(SHAPE), one, two, three], SHAPE)
    nest = small_flows.Nest([two, small_flows.Nest([three])])
    deep = snf_ext.Flow([snf_ext.Flatten(SHAPE), one, nest], SHAPE)
    x = images(20).float() / 17
    want, got = evaluate.reconstruction_error(flat, x), evaluate.reconstruction_error(deep, x)
    assert min(want[1].values()) > 1e-3
    assert got[0] == pytest.approx(want[0], rel=1e-6)
    assert list(got[1]) == ["bijections.1", "bijections.2.rest.0", "bijections.2.rest.1.rest.0"]
    assert list(got[1].values()) == pytest.approx(list(want[1].values()), rel=1e-6)
    assert not any(module._forward_hooks for module in deep.modules())
    angles = gradient_angle(deep, x)
    assert list(angles) == list(got[1])
    assert list(angles.values()) == pytest.approx(list(gradient_angle(flat, x).values()), rel=1e-9)


def test_context_reaches_every_measure():
    """A conditional flow measured at once, and class by class as flows without context."""
    torch.manual_seed(0)
    flow = small_flows.conditional(context_features=2).double()
    for parameter in flow.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    _, *rest = flow.bijections
    x = images(40).double() + torch.rand(40, *SHAPE, dtype=torch.float64)
    labels = torch.arange(40) % 2
    context = torch.nn.functional.one_hot(labels, 2).double()
    whole = snf_ext.Flow(rest, SHAPE, context_features=2)
    nll = evaluate.negative_log_likelihood(whole, x, context=context)
    recon, _ = evaluate.reconstruction_error(whole, x, context=context)
    parts = 0.0
    for label in (0, 1):
        shift, scale = (table[label].detach() for table in (rest[-1].shift, rest[-1].scale))
        affine = snf_ext.SelfNormLinear(6).double()
        affine.weight.data = torch.diag(torch.exp(-scale))
        affine.weight_inv.data = torch.diag(torch.exp(scale))
        affine.bias.data = -shift
        own = snf_ext.Flow([*rest[:-1], affine], SHAPE)
        chosen = x[labels == label]
        want = evaluate.negative_log_likelihood(own, chosen)
        torch.testing.assert_close(nll[labels == label], want, rtol=1e-9, atol=1e-9)
        parts += evaluate.reconstruction_error(own, chosen)[0] / 2
        if label == 1:
            same = torch.tensor([0.0, 1.0]).expand(len(chosen), 2)
            angles = gradient_angle(whole, chosen, same)
            assert list(angles) == ["bijections.3.rest.0"]
            want = gradient_angle(own, chosen)["bijections.3.rest.0"]
            assert angles["bijections.3.rest.0"] == pytest.approx(want, rel=1e-6)
    assert recon == pytest.approx(parts, rel=1e-9)


# ---- the angle


def linear_flow(count, exact_inverse):
    torch.manual_seed(0)
    bijections = []
    for index in range(count):
        bijections += [snf_ext.SmoothLeakyReLU(0.3)] if index else []
        bijections += [snf_ext.SelfNormLinear(6)]
    flow = snf_ext.Flow(bijections, (6,)).double()
    for layer in flow.bijections[::2]:
        layer.weight.data += 0.2 * torch.randn(6, 6, dtype=torch.float64)
        if exact_inverse:
            layer.weight_inv.data = torch.linalg.inv(layer.weight.data)
    return flow


def test_angle_is_zero_with_the_exact_inverse():
    x = torch.randn(10, 6, dtype=torch.float64)
    angles = gradient_angle(linear_flow(2, exact_inverse=True), x)
    assert list(angles) == ["bijections.0", "bijections.2"]
    assert max(angles.values()) < 1e-9
    torch.manual_seed(0)
    conv = snf_ext.SelfNormConv2d(3, 1).double()
    conv.weight.data += 0.2 * torch.randn(3, 3, 1, 1, dtype=torch.float64)
    conv.weight_inv.data = torch.linalg.inv(conv.weight.data[..., 0, 0])[..., None, None]
    flow = snf_ext.Flow([conv], (3, 4, 5))
    angles = gradient_angle(flow, torch.randn(10, 3, 4, 5, dtype=torch.float64))
    assert angles["bijections.0"] < 1e-9


def arccos_degrees(u, v):
    cosine = (u * v).sum() / (u.norm() * v.norm())
    return math.degrees(math.acos(cosine))


def test_angle_of_two_linear_layers_by_hand():
    flow = linear_flow(2, exact_inverse=False)
    first, second = flow.bijections[0], flow.bijections[2]
    x = torch.randn(10, 6, dtype=torch.float64)
    weights = [layer.weight.detach().clone().requires_grad_() for layer in (first, second)]
    h = F.linear(x, weights[0], first.bias.detach())
    z = F.linear(0.3 * h + 0.7 * F.softplus(h), weights[1], second.bias.detach())
    slope = 0.3 + 0.7 * torch.sigmoid(h)
    data_term = (0.5 * z.square().sum(1) - slope.log().sum(1)).mean()
    gradients = torch.autograd.grad(data_term, weights)
    expected = {}
    for name, layer, gradient in zip(
        ("bijections.0", "bijections.2"), (first, second), gradients, strict=True
    ):
        learned = 0.5 * gradient - 0.5 * layer.weight_inv.detach().T
        exact = gradient - torch.linalg.inv(layer.weight.detach()).T
        expected[name] = arccos_degrees(learned, exact)
    angles = gradient_angle(flow, x)
    assert min(expected.values()) > 1
    assert angles == pytest.approx(expected, rel=1e-6)
    assert mean_angle(angles) == pytest.approx(sum(expected.values()) / 2, rel=1e-6)


def test_angle_of_a_convolution_against_the_dense_jacobian():
    torch.manual_seed(0)
    shape = (2, 3, 4)
    conv = snf_ext.SelfNormConv2d(2, 3, dilation=2, inverse_kernel_size=5).double()
    conv.weight.data += 0.1 * torch.randn_like(conv.weight)
    flow = snf_ext.Flow([conv], shape, recon_weight=0.0)
    x = torch.randn(6, *shape, dtype=torch.float64)
    flow.loss(x).backward()
    weight = conv.weight.detach().clone().requires_grad_()
    basis = torch.eye(24, dtype=torch.float64).reshape(24, *shape)
    matrix = F.conv2d(basis, weight, padding=2, dilation=2).flatten(1).T
    z = F.conv2d(x, weight, conv.bias.detach(), padding=2, dilation=2)
    loss = 0.5 * z.square().sum((1, 2, 3)).mean() - torch.linalg.slogdet(matrix).logabsdet
    loss.backward()
    expected = arccos_degrees(conv.weight.grad, weight.grad)
    assert expected > 0.5
    assert gradient_angle(flow, x) == pytest.approx({"bijections.0": expected}, rel=1e-6)


def test_angle_leaves_the_flow_alone():
    flow = snf_ext.models.fc(SHAPE, pixel_levels=17).eval().requires_grad_(False)
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    gradient_angle(flow, images(5))
    for name, value in flow.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not flow.training
    assert all(p.grad is None and not p.requires_grad for p in flow.parameters())
    assert gradient_angle(snf_ext.models.fc(SHAPE, linear="exact"), images(5)) == {}
    assert mean_angle({}) is None


def test_angle_does_not_depend_on_the_pieces(monkeypatch):
    flow, x = linear_flow(2, exact_inverse=False), torch.randn(10, 6, dtype=torch.float64)
    whole = gradient_angle(flow, x)
    monkeypatch.setattr(angle, "CHUNK", 3)
    assert gradient_angle(flow, x) == pytest.approx(whole, rel=1e-9)


def test_angle_of_hundreds_of_layers():
    x = torch.randn(10, 6, dtype=torch.float64)
    angles = gradient_angle(linear_flow(200, exact_inverse=True), x)
    assert len(angles) == 200
    assert max(angles.values()) < 1e-6


def test_large_convolutions_have_no_angle_and_say_so(monkeypatch):
    image = (3, 16, 16)
    large, point = snf_ext.SelfNormConv2d(3, 5), snf_ext.SelfNormConv2d(3, 1)
    small = [snf_ext.Squeeze(), snf_ext.SelfNormConv2d(12, 1)]
    flow = snf_ext.Flow([large, small_flows.Nest([point]), *small], image)
    assert too_large(flow) == {}
    monkeypatch.setattr(angle, "MAX_OPERATIONS", 2e7)
    assert too_large(flow) == {"bijections.0": large.exact_plan((16, 16))}
    angles = gradient_angle(flow, torch.randn(5, *image))
    assert list(angles) == ["bijections.1.rest.0", "bijections.3"]
    assert all(0 < value < 90 for value in angles.values())
    operations = large.exact_plan((16, 16)).operations / 1e9
    assert left_out(flow) == (
        "no gradient angle for 1 convolutions: their exact log-determinants take up to "
        f"{operations:.2g} Gflop each, more than 0.02"
    )
    assert left_out(snf_ext.Flow([snf_ext.SelfNormConv2d(1, 3)], (1, 28, 28))) is None
    assert left_out(linear_flow(2, exact_inverse=True)) is None


def test_noise_bound_is_the_definition_behind_dequantization():
    """On a flow of one linear layer, in closed form, the Jacobian of preprocessing counted."""
    flow = snf_ext.models.fc((1, 2, 2), layers=1, pixel_levels=17)
    layer = flow.bijections[-1]
    with torch.no_grad():
        layer.weight.add_(0.2 * torch.randn(4, 4))
        layer.weight_inv.copy_(layer.weight.inverse())
    images, sigma = torch.randint(17, (600, 1, 2, 2), dtype=torch.uint8), 0.3
    result = noise_bound(flow, images, sigma, seed=3, samples=50)
    assert result.nll == pytest.approx(negative_log_likelihood(flow, images, 3).mean().item())
    # For an exact inverse: the mean of log N(W (u + sigma n)), lower by sigma^2 ||W||^2 / 2.
    gap = sigma**2 * layer.weight.square().sum().item() / 2
    assert result.error < 0.05 * gap
    assert abs(result.bound - result.nll - gap) < 4 * result.error
    with pytest.raises(ValueError, match="sigma must be positive and finite; got 0"):
        noise_bound(flow, images, 0.0)
