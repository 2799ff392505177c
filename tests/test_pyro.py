"""Flows in Pyro's models and guides."""

import sys

import pytest
import torch

import snf_ext
from snf_ext.adapters import pyro_distribution
from snf_ext.training.errors import UserError

D = 3


def test_without_pyro_one_line_says_so(monkeypatch):
    from snf_ext.adapters.pyro import _pyro_flow

    _pyro_flow.cache_clear()
    for name in [m for m in sys.modules if m.split(".")[0] == "pyro"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyro", None)
    flow = snf_ext.Flow([snf_ext.ExactLinear(D)], (D,))
    with pytest.raises(UserError, match=r'pyro is needed .*: pip install "snf_ext\[pyro\]"'):
        pyro_distribution(flow)


@pytest.fixture
def pyro():
    module = pytest.importorskip("pyro", reason="pyro-ppl is not installed")
    module.clear_param_store()
    module.set_rng_seed(0)
    yield module
    module.clear_param_store()


def posterior():
    """z ~ N(0, I), x = A z + N(0, I): mean and covariance of z given x, and log p(x)."""
    A = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -0.7], [0.4, 0.0, 1.2], [1.0, 1.0, 1.0]])
    x = torch.tensor([0.9, -1.1, 0.3, 1.4])
    covariance = torch.linalg.inv(torch.eye(D) + A.T @ A)
    mean = covariance @ A.T @ x
    marginal = torch.distributions.MultivariateNormal(torch.zeros(4), A @ A.T + torch.eye(4))
    return A, x, mean, covariance, marginal.log_prob(x)


@pytest.mark.filterwarnings("ignore:.*weight_inv was not registered")  # it has no gradient
@pytest.mark.parametrize("way", ["flow", "noise pushed forward"])
def test_a_guide_finds_the_posterior(pyro, way):
    A, x, mean, covariance, log_evidence = posterior()
    dist = pyro.distributions
    layer = snf_ext.SelfNormLinear(D, inverse="tracked")
    flow = snf_ext.Flow([layer], (D,))

    def normal(location, scale):
        return dist.Normal(location, scale).to_event(1)

    def model():
        z = pyro.sample("z", normal(torch.zeros(D), 1.0))
        pyro.sample("x", normal(z @ A.T, 1.0), obs=x)

    def guide():
        pyro.module("flow", flow)
        if way == "flow":
            q = pyro_distribution(flow)
        else:
            t = snf_ext.BijectionTransform(layer, (D,), cache_size=1)
            q = dist.TransformedDistribution(normal(torch.zeros(D), 1.0), t)
        return pyro.sample("z", q)

    adam = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.01 ** (1 / 200)})

    def elbo(particles):
        return pyro.infer.Trace_ELBO(particles, max_plate_nesting=0, vectorize_particles=True)

    svi = pyro.infer.SVI(model, guide, adam, elbo(64))
    for _ in range(200):
        svi.step()
    # The posterior is in reach, where the bound is tight whatever is drawn.
    assert -elbo(500).loss(model, guide) == pytest.approx(log_evidence.item(), abs=0.01)
    with torch.no_grad(), pyro.plate("draws", 20_000):
        z = guide()
    torch.testing.assert_close(z.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(z.T.cov(), covariance, rtol=0, atol=0.02)


def test_a_model_of_data_with_a_context_in_a_plate(pyro):
    coupling = snf_ext.AffineCoupling(D, 8, mask="vector", context_features=2)
    flow = snf_ext.Flow([snf_ext.ExactLinear(D), coupling], (D,), context_features=2)
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.1 * torch.randn_like(p)
    x, context = torch.randn(20, D), torch.randn(20, 2)

    def model(x=None):
        pyro.module("flow", flow)
        with pyro.plate("data", 20):
            return pyro.sample("x", pyro_distribution(flow, context), obs=x)

    trace = pyro.poutine.trace(model).get_trace(x)
    torch.testing.assert_close(trace.log_prob_sum(), flow.log_prob(x, context).sum())
    assert model().shape == (20, D)
    with pyro.plate("chains", 5, dim=-2):
        assert model().shape == (5, 20, D)
    adam = pyro.optim.Adam({"lr": 0.01})
    svi = pyro.infer.SVI(model, lambda x: None, adam, pyro.infer.Trace_ELBO())
    losses = [svi.step(x) for _ in range(20)]
    assert losses[0] == pytest.approx(-trace.log_prob_sum().item(), rel=1e-5)
    assert losses[-1] < losses[0] - 3


def test_integers_are_sampled_without_gradient(pyro):
    flow = snf_ext.models.fc((1, 2, 2), pixel_levels=5)
    q = pyro_distribution(flow)
    assert isinstance(q, snf_ext.FlowDistribution)
    assert not pyro.sample("image", q).requires_grad
    assert q.expand_by((3,)).batch_shape == (3,)
    assert q.mask(torch.tensor(False)).log_prob(q.sample()).item() == 0
