"""Transforms of torch.distributions and of zuko as bijections."""

import pytest
import torch
from torch.distributions import transforms as T

import snf_ext
from snf_ext.adapters import TransformBijection

D = 4


def zukos(name, *arguments):
    def make():
        zuko = pytest.importorskip("zuko", reason="zuko is not installed")
        return getattr(zuko.transforms, name)(*arguments)

    return make


def zuko_autoregressive():
    zuko = pytest.importorskip("zuko", reason="zuko is not installed")
    torch.manual_seed(0)
    return zuko.flows.MAF(D, transforms=1).double().transform()


CASES = {
    "tanh": (T.TanhTransform, (D,)),
    "logit": (lambda: T.SigmoidTransform().inv, (2, D)),
    "affine": (lambda: T.AffineTransform(1.0, torch.tensor([2.0, -1.0, 3.0, 0.5])), (D,)),
    "reshape": (lambda: T.ReshapeTransform((2, 3), (6,)), (2, 3)),
    "stick-breaking": (lambda: T.StickBreakingTransform(), (D,)),
    "composed": (lambda: T.ComposeTransform([T.TanhTransform(), T.AffineTransform(0, 2.0)]), (D,)),
    "zuko softclip": (zukos("SoftclipTransform", 5.0), (2, D)),
    "zuko lu": (zukos("LULinearTransform", torch.tensor([[2.0, 0.3], [0.1, 1.5]]).double()), (2,)),
    "zuko autoregressive": (zuko_autoregressive, (D,)),
}
every = pytest.mark.parametrize("name", CASES)


def build(name):
    make, event_shape = CASES[name]
    draw = torch.rand if name == "logit" else torch.randn
    return TransformBijection(make()), draw(5, *event_shape, dtype=torch.float64)


@every
def test_inverse_and_log_det(name):
    bijection, x = build(name)
    z, log_det, recon = bijection(x)
    event_shape = tuple(x.shape[1:])
    assert z.shape == (5, *bijection.output_shape(event_shape))
    assert log_det.shape == recon.shape == (5,)
    for exact in (False, True):
        torch.testing.assert_close(bijection.inverse(z, exact=exact), x)
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(
            lambda row: bijection(row[None]).z.flatten(), x[i]
        ).reshape(z[i].numel(), -1)
        if name == "stick-breaking":  # onto a simplex: all but the last coordinate
            jacobian = jacobian[:-1]
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_det[i])


def test_inside_a_flow():
    """With the support of what it begins with, and trained like any other."""
    layers = [TransformBijection(T.SigmoidTransform().inv), snf_ext.SelfNormLinear(2)]
    flow = snf_ext.Flow(layers, (2,)).double()
    q = flow.as_distribution()
    assert q.support.base_constraint is torch.distributions.constraints.unit_interval
    x = q.sample((7,))
    z = torch.logit(x)
    slopes = -(x.log() + (1 - x).log()).sum(1)
    want = snf_ext.Flow(layers[1:], (2,)).log_prob(z) + slopes
    torch.testing.assert_close(q.log_prob(x), want)
    flow.loss(x).backward()
    assert layers[1].weight.grad.any()


def test_there_and_back_again():
    """A bijection as a transform as a bijection."""
    layer = snf_ext.ExactLinear(D).double()
    twice = TransformBijection(snf_ext.BijectionTransform(layer, (D,)))
    x = torch.randn(5, D).double()
    torch.testing.assert_close(tuple(twice(x)), tuple(layer(x)))
    turned = TransformBijection(snf_ext.BijectionTransform(layer, (D,)).inv)
    z, log_det, _ = turned(layer(x).z)
    torch.testing.assert_close(z, x)
    torch.testing.assert_close(log_det, -layer(x).log_det)


def test_what_cannot_be_used():
    with pytest.raises(TypeError, match=r"transform must be a torch.*Transform; got Linear"):
        TransformBijection(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="transform must be bijective; got AbsTransform"):
        TransformBijection(T.AbsTransform())
    lower = TransformBijection(T.StickBreakingTransform())
    with pytest.raises(ValueError, match=r"x must have a batch and the 1 dimensions .* got \[3\]"):
        lower(torch.zeros(3))
    assert repr(lower) == "TransformBijection(StickBreakingTransform())"
