"""Our bijections inside zuko's flows and distributions."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from zuko_cases import C, D, build, inputs

import snf_ext
from snf_ext.adapters import ZukoBijection, as_lazy_transform, pop_recon

zuko = pytest.importorskip("zuko", reason="zuko is not installed")


def mixed(exact=False):
    """Self-normalizing, autoregressive, self-normalizing: as zuko's flow, and its parts."""
    torch.manual_seed(2)
    first, last = snf_ext.SelfNormLinear(D), snf_ext.SelfNormLinear(D)
    with torch.no_grad():
        for layer in (first, last):
            for p in layer.parameters():
                p += 0.1 * torch.randn_like(p)
    maf = zuko.flows.MAF(D, transforms=1)
    parts = [
        as_lazy_transform(first, (D,), exact),
        maf.transform,
        as_lazy_transform(last, (D,), exact),
    ]
    flow = zuko.lazy.Flow(parts, maf.base).double()
    ours = snf_ext.Flow([first, ZukoBijection(maf, D), last], (D,), recon_weight=10.0)
    return flow, ours, (first, maf, last)


def test_log_prob_in_a_zuko_flow_is_the_dense_one():
    flow, _, (first, maf, last) = mixed()
    x = torch.randn(7, D, dtype=torch.float64)
    y = x @ first.weight.T + first.bias
    h, between = maf.transform().call_and_ladj(y)
    z = h @ last.weight.T + last.bias
    dense = sum(torch.linalg.slogdet(layer.weight).logabsdet for layer in (first, last))
    want = snf_ext.ops.normal_log_prob(z) + between + dense
    torch.testing.assert_close(flow.eval()().log_prob(x), want)
    # In training mode the value leaves the determinants out, and is exact where that is asked for.
    torch.testing.assert_close(flow.train()().log_prob(x), want - dense)
    torch.testing.assert_close(mixed(exact=True)[0].train()().log_prob(x), want)


def test_training_gradients_in_a_zuko_flow_are_those_of_ours():
    flow, ours, _ = mixed()
    x = torch.randn(7, D, dtype=torch.float64)
    parameters = list(ours.parameters())
    want = torch.autograd.grad(ours.loss(x), parameters)
    loss = -flow().log_prob(x).mean() + 10.0 * pop_recon(flow).mean()
    for a, b in zip(torch.autograd.grad(loss, parameters), want, strict=True):
        torch.testing.assert_close(a, b)
        assert b.any()
    with pytest.raises(ValueError, match=r"flow must hold a layer .* got no reconstruction error"):
        pop_recon(flow)


@pytest.mark.parametrize("exact", [False, True])
def test_samples_of_a_zuko_flow(exact):
    flow, ours, _ = mixed(exact)
    flow.eval()
    noise = torch.randn(4, D, dtype=torch.float64)
    with torch.no_grad():
        got = flow().transform.inv(noise)
        torch.testing.assert_close(got, ours.inverse(noise, exact=exact))
        assert flow().sample((4, 2)).shape == (4, 2, D)
        if exact:
            x, log_prob = flow().rsample_and_log_prob((4,))
            torch.testing.assert_close(flow().log_prob(x), log_prob)


def test_any_leading_shape():
    flow, _, _ = mixed()
    flow.eval()
    x = torch.randn(2, 3, D, dtype=torch.float64)
    want = flow().log_prob(x.reshape(6, D)).reshape(2, 3)
    torch.testing.assert_close(flow().log_prob(x), want)
    torch.testing.assert_close(flow().log_prob(x[1, 2]), want[1, 2])
    with pytest.raises(ValueError, match=r"x must have shape \[..., 5\]; got \[2, 3, 4\]"):
        flow().log_prob(x[..., :4])


def test_images_in_a_zuko_flow():
    """A convolution, then a bijection that changes the shape, then zuko's own."""
    conv = snf_ext.SelfNormConv2d(2, 3)
    base = zuko.flows.MAF(12, transforms=1)
    shape = (2, 2, 3)
    parts = [as_lazy_transform(conv, shape), as_lazy_transform(snf_ext.Flatten(shape), shape)]
    flow = zuko.lazy.Flow([*parts, base.transform], base.base).eval()
    ours = snf_ext.Flow([conv, snf_ext.Flatten(shape), ZukoBijection(base, 12)], shape).eval()
    x = torch.randn(4, *shape)
    torch.testing.assert_close(flow().log_prob(x), ours.log_prob(x))
    assert flow().event_shape == shape
    assert flow().sample((3,)).shape == (3, *shape)


def test_context_reaches_a_bijection():
    """One context for each sample, and one for several."""
    inner = build("realnvp", C)
    flow = zuko.lazy.Flow(as_lazy_transform(inner, (D,)), zuko.flows.MAF(D).base.double())
    x, context = inputs(C)
    step = inner(x, context)
    want = snf_ext.ops.normal_log_prob(step.z) + step.log_det
    torch.testing.assert_close(flow(context).log_prob(x), want)
    same = inner(x, context[:1].expand(6, C))
    want = snf_ext.ops.normal_log_prob(same.z) + same.log_det
    torch.testing.assert_close(flow(context[0]).log_prob(x), want)
    assert flow(context).sample((2,)).shape == (2, 6, D)


def test_transforms_in_zukos_distributions():
    """Without a lazy transform, and with gradients of samples in the weight."""
    layer = snf_ext.SelfNormLinear(D, inverse="tracked").double()
    transform = snf_ext.BijectionTransform(layer, (D,))
    base = zuko.distributions.DiagNormal(torch.zeros(D).double(), torch.ones(D).double())
    flow = zuko.distributions.NormalizingFlow(transform, base)
    ours = snf_ext.Flow([layer], (D,))
    x, log_prob = flow.rsample_and_log_prob((6,))
    torch.testing.assert_close(log_prob, ours.log_prob(x))
    (x.sum() + log_prob.sum()).backward()
    assert layer.weight.grad.abs().min() > 0
    q = ours.as_distribution()
    mixture = zuko.distributions.Mixture(q.expand((2,)), torch.zeros(2).double())
    torch.testing.assert_close(mixture.log_prob(x), q.log_prob(x))


def test_samples_of_lazy_transforms_send_gradients_to_weights():
    flow, _, (first, maf, last) = mixed(exact=True)
    x = flow.eval()().rsample((6,))
    x.square().sum().backward()
    for module in (first, maf, last):
        assert all(p.grad.any() for n, p in module.named_parameters() if n != "weight_inv")


def test_the_inverse_as_a_lazy_transform():
    layer = snf_ext.SelfNormLinear(D).double().eval()
    lazy = as_lazy_transform(layer, (D,), exact=True)
    x, _ = inputs()
    z, log_det = lazy().call_and_ladj(x)
    back, inverse_log_det = lazy.inv().call_and_ladj(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_log_det, -log_det)


def test_copies_and_files_between_evaluation_and_backward():
    flow, _, _ = mixed()
    x = torch.randn(7, D, dtype=torch.float64)
    flow().log_prob(x)
    buffer = io.BytesIO()
    torch.save(flow, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(flow), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(twin().log_prob(x), flow().log_prob(x))
    assert pop_recon(flow).shape == (7,)
