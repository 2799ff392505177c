"""On a device without float64, as Apple's MPS: the reference backend, and no float64 made."""

from __future__ import annotations

import models_table
import no_float64
import pytest
import torch
from bijections_table import BIJECTIONS
from models_table import VARIANTS, images
from no_float64 import Pretended, pretended_device

import snf_ext
from snf_ext.backend import runs_native

pytestmark = pytest.mark.usefixtures("one_thread")


def on_it(t):
    return None if t is None else Pretended(t)


def plain(t):
    return t.detach().inner if isinstance(t, Pretended) else t.detach()


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(plain(a), plain(b), rtol=1e-4, atol=1e-4)


def test_the_pretended_device_refuses_float64():
    """Whatever would make one: a cast, a factory, a promotion, a move that casts."""
    with pretended_device():
        x = Pretended(torch.ones(2))
        assert x.device == torch.device("mps")
        assert (x + 1).device == torch.zeros(2, device="mps").device == x.device
        assert type(x.cpu()) is torch.Tensor
        assert x.cpu().double().dtype == torch.float64
        for make in (
            lambda: x.double(),
            lambda: x.to("cpu", torch.float64),
            lambda: x.new_zeros(2, dtype=torch.float64),
            lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
            lambda: torch.add(x, torch.ones(2, dtype=torch.float64)),
            lambda: Pretended(torch.ones(2).double()),
        ):
            with pytest.raises(TypeError, match=r"has no torch.float64"):
                make()


def test_mps_runs_on_the_reference_backend():
    assert not runs_native(torch.device("mps"))


@pytest.mark.parametrize("case", BIJECTIONS, ids=lambda case: case.name)
def test_bijections(case):
    """Training, evaluation and both inverses; the same values as on the CPU."""
    if case.name.startswith("SelfNormBijection"):
        pytest.skip("torch.func does not go through tensors that are pretended")
    torch.manual_seed(1)
    bijection, x = case.build(torch.float32), case.data(4, torch.float32)
    context = case.context(x)
    with snf_ext.use_backend("reference"):
        want = list(bijection.eval()(x, context))
        want += [bijection.inverse(want[0], context, exact=e) for e in (False, True)]
    there = no_float64.moved(bijection)
    with pretended_device():
        x, context = on_it(x), on_it(context)
        got = list(there(x, context))
        got += [there.inverse(on_it(plain(want[0])), context, exact=e) for e in (False, True)]
        if not case.noisy:
            assert_close(got, want)
        z, log_det, recon = there.train()(x, context)
        loss = z.square().sum() - log_det.sum() + recon.sum()
        if loss.requires_grad:
            loss.backward()
        for p in there.parameters():
            assert plain(p.grad).isfinite().all()


@pytest.mark.parametrize("name", VARIANTS)
def test_models(name):
    """A step of the optimizer, the exact likelihood, and samples by both inverses."""
    flow, x = models_table.build(name, torch.float32), images(3, torch.float32)
    with snf_ext.use_backend("reference"):
        torch.manual_seed(4)
        want = flow.eval().log_prob(x)
    flow = no_float64.moved(flow)
    optimizer = torch.optim.SGD(flow.parameters(), lr=1e-4)
    with pretended_device():
        torch.manual_seed(4)
        assert_close([flow.log_prob(on_it(x))], [want])
        flow.train().loss(on_it(x), log_det_penalty=1e-5).backward()
        optimizer.step()
        flow.eval().log_prob(on_it(x))
        for exact in (False, True):
            assert plain(flow.sample(2, exact=exact)).isfinite().all()


def test_what_starts_from_data_and_what_is_tracked():
    """The sums of actnorm and the least squares of a kernel are float64's, and on the CPU."""

    def make():
        torch.manual_seed(1)
        flow = snf_ext.Flow(
            [
                snf_ext.ActNorm(2, init_batches=2),
                snf_ext.SelfNormConv2d(2, 3, inverse="tracked", debias=1),
                snf_ext.Flatten((2, 3, 3)),
                snf_ext.SelfNormLinear(18, inverse=snf_ext.Tracked(every=2)),
                snf_ext.SelfNormLinear(18),
            ],
            (2, 3, 3),
        )
        return snf_ext.constrain(flow, snf_ext.Relative())

    x, states = torch.randn(6, 2, 3, 3), []
    with snf_ext.use_backend("reference"):
        for flow, batch in ((make(), x), (no_float64.moved(make()), on_it(x))):
            optimizer = torch.optim.SGD(flow.parameters(), lr=1e-4)
            with pretended_device():
                for step in range(3):
                    torch.manual_seed(step)
                    optimizer.zero_grad()
                    flow.loss(batch).backward()
                    optimizer.step()
                flow.fit_inverses()
            states.append(flow.state_dict())
    assert states[0].keys() == states[1].keys()
    assert_close(states[1].values(), states[0].values())
    assert states[1]["bijections.0.sums"].dtype == torch.float64
    assert type(states[1]["bijections.0.sums"]) is torch.Tensor
