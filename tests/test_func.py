"""torch.func: what its transforms give is what loops and autograd give, or a refusal in words."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from bijections_table import BIJECTIONS
from elementwise_table import ELEMENTWISE
from ops_table import OPS
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from traced_flows import ROWS, flow_of, function_of

import snf_ext

REFUSED = "double backward through"
close = torch.testing.assert_close


def names(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def scalar(outputs, weights):
    """A sum in which every element counts differently."""
    return sum((t * w).sum() for t, w in zip(outputs, weights, strict=True))


def autograd(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves, materialize_grads=True)


# Operators


@names(OPS)
def test_operator(case):
    """Gradients, those of each sample, of several weights at once, and forward mode in x."""
    x, *weights = [t for t in case.tensors() if t is not None]
    function = functools.partial(getattr(snf_ext.ops, case.op), **case.rest)
    outputs = case.gradients_of_outputs(torch.float64)

    def loss(x_, *weights_):
        return scalar(function(x_, *weights_), outputs)

    every = tuple(range(1 + len(weights)))
    for got, want in zip(
        grad(loss, every)(x, *weights), autograd(loss, (x, *weights)), strict=True
    ):
        close(got, want)

    def loss_of_one(row, *weights_):
        return sum(t.square().sum() for t in function(row[None], *weights_))

    each = vmap(grad(loss_of_one, every), (0, *(None for _ in weights)))(x, *weights)
    for i, row in enumerate(x):
        for got, want in zip(each, autograd(loss_of_one, (row, *weights)), strict=True):
            close(got[i], want)

    several = [torch.stack([w, 1.5 * w]) for w in weights]
    both = vmap(grad(loss, every), (None, *(0 for _ in weights)))(x, *several)
    for i in range(2):
        given = [w[i] for w in several]
        for got, want in zip(both, autograd(loss, (x, *given)), strict=True):
            close(got[i], want)

    step, tangents = jvp(lambda x_: function(x_, *weights), (x,), (outputs[0],))
    close(tangents[0], function(outputs[0], *weights[:2])[0])  # linear, without the bias
    close(step, function(x, *weights))
    assert not tangents[1].any()
    assert not tangents[2].any()


@names([c for c in OPS if c.name in ("linear", "conv-3x3", "linear-plain", "conv-plain")])
def test_operator_refuses(case):
    x, weight, *rest = case.tensors()
    function = functools.partial(getattr(snf_ext.ops, case.op), **case.rest)

    def loss(x_, weight_):
        return sum(t.square().sum() for t in function(x_, weight_, *rest))

    with pytest.raises(NotImplementedError, match=f"forward-mode derivatives of {case.op} are"):
        jvp(lambda w: loss(x, w), (weight,), (weight,))
    for second in (jacrev, jacfwd):
        with pytest.raises(NotImplementedError, match=REFUSED):
            second(grad(loss))(x, weight)


# Two sizes of each: images and vectors.
FEW = [c for c in ELEMENTWISE if c.name.endswith(("3x4x3x5", "-5x7"))]


@names(FEW)
def test_elementwise_operator(case):
    """Of first and second order, in both modes."""
    x, *rest = case.tensors()
    weights = case.gradients(case.function(x, *rest))
    batched = [0 if t.dim() > 1 else None for t in rest]

    def loss(x_, *rest_):
        return scalar(case.function(x_, *rest_), weights)

    every = tuple(range(1 + len(rest)))
    want = autograd(loss, (x, *rest))
    for a, b in zip(grad(loss, every)(x, *rest), want, strict=True):
        close(a, b)
    direction = torch.randn_like(x)
    close(jvp(lambda x_: loss(x_, *rest), (x,), (direction,))[1], (want[0] * direction).sum())

    def one(row, *rest_):
        given = [t if b is None else t[None] for t, b in zip(rest_, batched, strict=True)]
        return tuple(t[0] for t in case.function(row[None], *given))

    for a, b in zip(vmap(one, (0, *batched))(x, *rest), case.function(x, *rest), strict=True):
        close(a, b)

    # What the gradient changes by along a direction, against finite differences of the native one.
    got = jvp(lambda x_: grad(loss)(x_, *rest), (x,), (direction,))[1]
    step = 1e-6 * direction
    ahead, behind = (autograd(loss, (at, *rest))[0] for at in (x + step, x - step))
    close(got, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-5)


# Bijections


def parts(case, training):
    bijection = case.build().train(training)
    x = case.data(3)
    return bijection, dict(bijection.named_parameters()), x, case.context(x)


def row_of(context, i):
    return None if context is None else context[i : i + 1]


QUIET = [c for c in BIJECTIONS if not c.noisy and not c.batch_dependent]


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@names(QUIET)
def test_bijection(case, mode):
    """The gradient of each sample, by functional_call, is that of a loop."""
    bijection, parameters, x, context = parts(case, mode == "training")
    probed = case.name.startswith("SelfNormBijection") and mode == "training"

    def loss(parameters_, row, given):
        given = None if given is None else given[None]
        z, log_det, recon = functional_call(bijection, parameters_, (row[None], given))
        return z.square().sum() - 2 * log_det.sum() + 3 * recon.sum()

    both = grad(loss, (0, 1))
    in_dims = (None, 0, None if context is None else 0)
    random = "different" if probed else "error"
    of_weights, of_x = vmap(both, in_dims, randomness=random)(parameters, x, context)
    if probed:  # each sample its own probes
        assert all(t.isfinite().all() for t in of_weights.values())
        return
    for i in range(len(x)):
        leaves = [x[i : i + 1].clone().requires_grad_(), *bijection.parameters()]
        z, log_det, recon = bijection(leaves[0], row_of(context, i))
        total = z.square().sum() - 2 * log_det.sum() + 3 * recon.sum()
        want = torch.autograd.grad(total, leaves, materialize_grads=True, allow_unused=True)
        close(of_x[i], want[0][0])
        for got, w in zip(of_weights.values(), want[1:], strict=True):
            close(got[i], w)


@names([c for c in BIJECTIONS if not c.noisy])
def test_bijection_there_and_back(case):
    """Each sample on its own, both Jacobians in both modes, and several sets of weights."""
    bijection, parameters, x, context = parts(case, training=False)
    in_dims = (0, None if context is None else 0)

    def forward(row, given):
        z, log_det, recon = bijection(row[None], None if given is None else given[None])
        return z[0], log_det[0], recon[0]

    step = bijection(x, context)
    close(vmap(forward, in_dims)(x, context), tuple(step))
    z = step.z.detach()
    for exact in (False, True):
        if exact and case.name.startswith("SelfNormBijection"):
            with pytest.raises(NotImplementedError, match="exact inverse of f is found by Newton"):
                vmap(lambda r: bijection.inverse(r[None], exact=True))(z)
            continue

        def inverse(row, given, exact=exact):
            given = None if given is None else given[None]
            return bijection.inverse(row[None], given, exact=exact)[0]

        close(vmap(inverse, in_dims)(z, context), bijection.inverse(z, context, exact=exact))
        only = functools.partial(inverse, given=None if context is None else context[0])
        want = torch.autograd.functional.jacobian(only, z[0])
        close(jacrev(only)(z[0]), want)
        close(jacfwd(only)(z[0]), want)
    first = None if context is None else context[0]

    def outputs(row):
        return forward(row, first)[:2]

    want = torch.autograd.functional.jacobian(outputs, x[0])
    close(jacrev(outputs)(x[0]), want)
    if case.name == "RelativeLinear":
        with pytest.raises(NotImplementedError, match="RelativeLinear has no forward-mode"):
            jacfwd(outputs)(x[0])
    else:
        close(jacfwd(outputs)(x[0]), want)
    if parameters:
        several = {k: torch.stack([p.detach(), 1.1 * p.detach()]) for k, p in parameters.items()}
        both = vmap(lambda p: tuple(functional_call(bijection, p, (x, context))))(several)
        for i in range(2):
            given = {k: p[i] for k, p in several.items()}
            for got, w in zip(both, functional_call(bijection, given, (x, context)), strict=True):
                close(got[i], w)


@names([c for c in BIJECTIONS if c.noisy])
def test_noisy_bijection(case):
    """Noise of its own for each sample, if asked; else torch refuses."""
    bijection = case.build().eval()
    same = torch.arange(case.data(1).numel()).view(case.data(1).shape).double() % 8
    same = same.expand(3, *case.event_shape)

    def forward(row):
        return bijection(row[None]).z[0]

    z = vmap(forward, randomness="different")(same)
    assert not torch.equal(z[0], z[1])
    assert torch.equal(bijection.inverse(z), same)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(forward)(same)


LINEAR = ("SelfNormLinear", "SelfNormConv2d", "RelativeLinear")


@names([c for c in BIJECTIONS if not c.noisy and not c.batch_dependent])
def test_second_derivatives_of_a_bijection(case):
    """Of the log-density in x: those of finite differences, or a refusal."""
    bijection, _, x, context = parts(case, training=False)

    def density(row):
        z, log_det, _ = bijection(row[None], row_of(context, 0))
        return log_det.sum() - 0.5 * z.square().sum()

    if case.name.startswith(LINEAR):
        with pytest.raises(NotImplementedError, match=REFUSED):
            jacrev(grad(density))(x[0])
        return
    direction = torch.randn_like(x[0])
    got = (hessian(density)(x[0]).flatten(0, x.dim() - 2).flatten(1) @ direction.flatten()).view(
        x[0].shape
    )
    step = 1e-6 * direction
    ahead, behind = (autograd(density, (at,))[0] for at in (x[0] + step, x[0] - step))
    close(got, (ahead - behind) / 2e-6, rtol=1e-4, atol=1e-5)


@names([c for c in BIJECTIONS if c.batch_dependent])
def test_what_depends_on_the_batch_refuses_in_training(case):
    layer = case.build().train()
    with pytest.raises(NotImplementedError, match=r"in training .* call eval\(\)"):
        grad(lambda x: layer(x).z.sum())(case.data(4))


def test_actnorm_refuses_to_start():
    layer = snf_ext.ActNorm(3)
    with pytest.raises(NotImplementedError, match=r"ActNorm .* \(1 are left\) outside"):
        grad(lambda x: layer(x).z.square().sum())(torch.randn(4, 3))
    layer(torch.randn(4, 3))
    grad(lambda x: layer(x).z.square().sum())(torch.randn(4, 3))


def test_reversible_flows_keep_their_activations():
    flow = flow_of("fc-self_norm")
    _, draw = function_of(flow, "loss")
    x, weight = draw(2), flow.bijections[-1].weight
    want = torch.autograd.grad(flow.loss(x), weight)[0]
    flow.reversible = snf_ext.Reversible()
    held = {k: weight for k, p in Call(flow, "loss").named_parameters() if p is weight}
    got = grad(lambda p: functional_call(Call(flow, "loss"), p, (x,)))(held)
    close(*got.values(), want)


@pytest.mark.parametrize("state", ["tracked", "controller"])
def test_state_is_left_alone(state):
    """A tracked inverse and a controller's weight stay: transforms want pure functions."""
    torch.manual_seed(3)
    layer = snf_ext.SelfNormLinear(4, inverse="tracked" if state == "tracked" else "penalty")
    if state == "controller":
        layer.controller = snf_ext.Relative(recon_weight=0.3)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    parameters, x = dict(layer.named_parameters()), torch.randn(3, 4)

    def loss(parameters_, row):
        z, log_det, recon = functional_call(layer, parameters_, (row[None],))
        return z.square().sum() - log_det.sum() + recon.sum()

    got = vmap(grad(loss), (None, 0))(parameters, x)
    assert got["weight"].any()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_debiased_gradient_of_each_sample():
    layer = snf_ext.SelfNormLinear(4, debias=2)
    parameters, x = dict(layer.named_parameters()), torch.randn(3, 4)

    def log_det(parameters_, row):
        return functional_call(layer, parameters_, (row[None],)).log_det.sum()

    got = vmap(grad(log_det), (None, 0), randomness="different")(parameters, x)["weight"]
    assert layer.growth is None  # nothing of a transform stays in the layer
    close(got.mean(0), torch.linalg.inv(layer.weight.detach()).T / 2, rtol=0.05, atol=0.02)


# Models


@pytest.mark.parametrize("use", ["loss", "log_prob"])
@pytest.mark.parametrize("name", ROWS)
def test_model(name, use):
    """The gradient of each sample is that of a loop."""
    flow = flow_of(name)
    _, draw = function_of(flow, use)
    x, parameters = draw(2), dict(flow.named_parameters())

    def loss(parameters_, row):
        return torch.func.functional_call(Call(flow, use), parameters_, (row[None],)).sum()

    held = {f"flow.{key}": p for key, p in parameters.items()}
    each = vmap(grad(loss), (None, 0))(held, x)
    for i in range(len(x)):
        value = getattr(flow, use)(x[i : i + 1]).sum()
        want = torch.autograd.grad(
            value, list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        for got, w in zip(each.values(), want, strict=True):
            close(got[i], w)


class Call(torch.nn.Module):
    """A method of a flow, as a module for functional_call."""

    def __init__(self, flow, use):
        super().__init__()
        self.flow, self.use = flow, use

    def forward(self, x):
        return getattr(self.flow, self.use)(x)


def test_model_on_the_reference_backend():
    with snf_ext.use_backend("reference"):
        test_model("conv-self_norm", "loss")


def test_exact_gradient_by_elimination():
    """Of an image that is large enough for blocks, where an operator takes the determinant."""
    layer = snf_ext.ExactConv2d(2, 3).double()
    x = torch.randn(2, 2, 9, 10, dtype=torch.float64)
    held = dict(layer.named_parameters())

    def loss(parameters, row):
        return functional_call(layer, parameters, (row[None],)).log_det.sum()

    (want,) = torch.autograd.grad(loss(held, x[0]), layer.weight)
    for got in vmap(grad(loss), (None, 0))(held, x)["weight"]:
        close(got, want)
    direction = {key: torch.randn_like(p) for key, p in held.items()}
    tangent = jvp(lambda p: loss(p, x[0]), (held,), (direction,))[1]
    close(tangent, (want * direction["weight"]).sum())
    several = {key: torch.stack([p.detach(), 1.1 * p.detach()]) for key, p in held.items()}
    values = vmap(loss, (0, None))(several, x[0])
    close((values[1] - values[0]).item(), 180 * math.log(1.1))
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        jacrev(grad(loss))(held, x[0])
