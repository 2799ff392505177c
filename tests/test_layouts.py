"""What models and bijections take, beside test_bijections.py: layouts; and second derivatives.

A second derivative is refused with a reason, or it is right.
"""

from __future__ import annotations

import models_table
import pytest
import torch
from bijections_table import BIJECTIONS
from models_table import VARIANTS, images

from snf_ext.layers import preprocessing

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = [case for case in BIJECTIONS if not case.noisy]
every = pytest.mark.parametrize("case", BIJECTIONS, ids=lambda case: case.name)
every_model = pytest.mark.parametrize("name", VARIANTS)
REFUSALS = r"double backward|no native second derivative|cannot be differentiated twice"
# Their gradients are not the operators', and have gradients of their own (ExactConv2d's while it
# is small enough for one dense block).
TWICE = (
    *(
        "ExactLinear",
        "ExactConv2d",
        "LeakyReLU",
        "LearnableLeakyReLU",
        "SmoothTanh",
        "Normalize",
        "Dequantize",
    ),
    *("Flatten", "Squeeze", "Unsqueeze", "Permutation", "ComponentwiseAffine", "BatchNorm"),
    *("PlainConv1x1", "LUConv1x1", "HouseholderConv1x1", "EmergingConv2d", "ExponentialConv2d"),
    *("AdditiveCoupling-vector",),
)


def seeded(function, *arguments):
    torch.manual_seed(3)
    return function(*arguments)


def strided(t):
    return torch.stack([t, t + 1], -1)[..., 0]


def channels_last(t):
    return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t


LAYOUTS = {"non_contiguous": strided, "channels_last": channels_last}


def bijection_outputs(bijection, x, context):
    """Of both directions and modes, with the gradients of a training step."""
    x = x.detach().requires_grad_()
    step = seeded(bijection.train(), x, context)
    loss = step.z.square().sum() - step.log_det.sum() + step.recon.sum()
    learn = [x, *bijection.parameters()]
    grads = torch.autograd.grad(loss, learn, allow_unused=True)
    with torch.no_grad():
        exact = seeded(bijection.eval(), x, context)
        z = exact.z.detach()
        back = [bijection.inverse(z, context, exact=e) for e in (False, True)]
    return [*step, *grads, *exact, *back]


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def check_bijection(case, layout):
    bijection, x = seeded(case.build), case.data(4)
    context = case.context(x)
    want = bijection_outputs(bijection, x, context)
    other = layout(x)
    assert torch.equal(other, x)
    assert_close(
        bijection_outputs(seeded(case.build), other, None if context is None else layout(context)),
        want,
    )
    z = seeded(bijection.eval(), x, context).z.detach()
    for exact in (False, True):
        got = bijection.inverse(layout(z), context, exact=exact)
        assert_close([got], [bijection.inverse(z, context, exact=exact)])


@every
def test_non_contiguous_bijections(case):
    check_bijection(case, strided)


@every
def test_channels_last_bijections(case, monkeypatch):
    """Events that are no images have no such layout, and the parameters of these have it then."""
    # Noise is drawn in the order of memory: other numbers from the same seed.
    monkeypatch.setattr(preprocessing, "drawn_for", lambda x, draw: draw(x.contiguous()))
    check_bijection(case, channels_last)
    bijection, x = seeded(case.build), case.data(4)
    context = case.context(x)
    want = bijection_outputs(bijection, x, context)
    moved = seeded(case.build).to(memory_format=torch.channels_last)
    assert_close(bijection_outputs(moved, channels_last(x), context), want)


@every
def test_double_backward_of_bijections(case):
    bijection, x = seeded(case.build), case.data(2).requires_grad_()
    context, parameters = case.context(x), tuple(bijection.parameters())

    def objective(x_, *parameters_):
        named = dict(zip(dict(bijection.named_parameters()), parameters_, strict=True))
        step = seeded(torch.func.functional_call, bijection, named, (x_, context))
        return step.z.square().sum() - step.log_det.sum() + step.recon.sum()

    inputs = (x, *(p.detach().clone().requires_grad_() for p in parameters))
    if case.name.split("-")[0] in TWICE:
        assert torch.autograd.gradgradcheck(objective, inputs, atol=1e-4, fast_mode=True)
        return
    grads = torch.autograd.grad(objective(*inputs), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match=REFUSALS):
        sum(g.square().sum() for g in grads).backward()


@every_model
def test_double_backward_of_models(name):
    flow = models_table.build(name)
    learn = list(flow.parameters())
    grads = torch.autograd.grad(flow.loss(images()), learn, create_graph=True)
    with pytest.raises(NotImplementedError, match=REFUSALS):
        sum(g.square().sum() for g in grads).backward()


@every_model
def test_empty_batch_of_models(name):
    """A likelihood of none, samples of none; a loss is a mean, and says that it needs a sample."""
    flow = models_table.build(name)
    x = images(0)
    with pytest.raises(ValueError, match=r"x must hold at least one sample; got \[0, 1, 8, 8\]"):
        flow.loss(x)
    for mode in (True, False):
        z, log_det, recon = flow.train(mode)(x)
        assert z.shape == (0, *flow.latent_shape)
        assert log_det.shape == recon.shape == flow.log_prob(x).shape == (0,)
        (z.sum() - log_det.sum() + recon.sum()).backward()
        for exact in (False, True):
            assert flow.sample(0, exact=exact).shape == x.shape


def model_outputs(flow, x):
    loss = seeded(flow.train().loss, x)
    grads = torch.autograd.grad(loss, list(flow.parameters()))
    with torch.no_grad():
        return [loss, *grads, seeded(flow.eval().log_prob, x)]


@pytest.mark.parametrize("layout", LAYOUTS)
@every_model
def test_layouts_of_models(name, layout):
    flow, x = models_table.build(name), images(4).expand(-1, 1, -1, -1)
    change = LAYOUTS[layout]
    want = model_outputs(flow, x)
    assert_close(model_outputs(flow, change(x)), want)
    z = torch.randn(3, *flow.latent_shape, dtype=torch.float64)
    for exact in (False, True):
        back = flow.inverse(z, exact=exact)
        assert_close([flow.inverse(change(z), exact=exact)], [back])
    if layout == "channels_last":
        assert_close(model_outputs(flow.to(memory_format=torch.channels_last), change(x)), want)
