"""Every model compiles: its loss, likelihood and samples, as one graph for batches of any size."""

from __future__ import annotations

import pytest
import torch
from bijections_table import BIJECTIONS
from models_table import VARIANTS, images
from traced_flows import SOME, USES, ZUKO, flow_of, function_of, marked

import snf_ext

# Of batches. Those of no other dimension: compiled code takes equal sizes for one.
SIZES = (11, 13)
MODELS = marked(VARIANTS, lambda name: name == "fc-self_norm", lambda name: name in SOME)


def gradients(value, flow):
    return torch.autograd.grad(
        value.sum(), list(flow.parameters()), allow_unused=True, materialize_grads=True
    )


def check(name, use, compiler, dtype=torch.float64, sizes=SIZES, whole=True):
    torch.compiler.reset()
    flow = flow_of(name, dtype)
    function, draw = function_of(flow, use)
    compiled = torch.compile(function, fullgraph=whole, dynamic=True, backend=compiler)
    for i, size in enumerate(sizes):
        with torch.compiler.set_stance("fail_on_recompile" if i and whole else "default"):
            got = compiled(draw(size))
        want = function(draw(size))
        torch.testing.assert_close(got, want)
        if not use.startswith("sample"):
            for a, b in zip(gradients(got, flow), gradients(want, flow), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", MODELS)
def test_one_graph_for_all_batches(name, use):
    check(name, use, "eager")


@pytest.mark.nightly
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", VARIANTS)
def test_one_differentiated_graph_for_all_batches(name, use):
    check(name, use, "aot_eager", torch.float32)


@pytest.mark.nightly
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", SOME)
def test_code_is_generated(name, use):
    check(name, use, "inductor", torch.float32)


@pytest.mark.nightly
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("family", ZUKO)
def test_zukos_families_compile_in_pieces(family, use):
    check(f"autoregressive-{family}", use, "eager", whole=False)


@pytest.mark.slow
def test_generated_code_of_a_likelihood():
    check("fc-self_norm", "log_prob", "inductor", torch.float32, sizes=(3,))


@pytest.mark.parametrize("use", ["loss", "log_prob"])
def test_with_dequantization(use):
    """The same generator gives the same noise."""
    torch.compiler.reset()
    flow = flow_of("fc-self_norm", noisy=True).train(use == "loss")
    function, x = getattr(flow, use), images(4)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        torch.manual_seed(1)
        results.append(call(x))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "case",
    marked(BIJECTIONS, lambda name: False, lambda name: not name.startswith("Exponential")),
)
def test_bijection(case):
    """Forward and learned inverse, in evaluation mode; training is in test_bijections.py."""
    torch.compiler.reset()
    bijection = case.build().eval()

    def there_and_back(x, context):
        step = bijection(x, context)
        return *step, bijection.inverse(step.z, context)

    compiled = torch.compile(there_and_back, fullgraph=True, dynamic=True, backend="eager")
    # The Jacobian of SelfNormBijection's exact values makes a graph for each size.
    anew = case.name.startswith("SelfNormBijection")
    for i, size in enumerate(SIZES):
        x = case.data(size)
        context = case.context(x)
        torch.manual_seed(1)
        with torch.compiler.set_stance("fail_on_recompile" if i and not anew else "default"):
            got = compiled(x, context)
        torch.manual_seed(1)
        for a, b in zip(got, there_and_back(x, context), strict=True):
            torch.testing.assert_close(a, b)


def test_samples_are_drawn():
    torch.compiler.reset()
    flow = flow_of("fc-self_norm").eval()
    compiled = torch.compile(flow.sample, fullgraph=True, dynamic=True, backend="eager")
    for count in (3, 7):
        torch.manual_seed(1)
        want = flow.sample(count)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(count), want)


def test_determinants_are_kept_and_follow_the_weights(monkeypatch):
    """Factorised once for many calls of a compiled likelihood, and anew after a step."""
    made = []
    plain = snf_ext.exact.of_layer.factorize_linear
    monkeypatch.setattr(
        snf_ext.exact.of_layer, "factorize_linear", lambda w: made.append(1) or plain(w)
    )
    torch.compiler.reset()
    flow = snf_ext.Flow([snf_ext.SelfNormLinear(5), snf_ext.ExactLinear(5)], (5,)).double().eval()
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(3):
            first = compiled(x)
    assert len(made) == 2
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(1.5)
        second = compiled(x)
    assert len(made) == 4
    flow.bijections[1]._cache = snf_ext.exact.FactorizationCache()
    torch.testing.assert_close(second, flow.log_prob(x).detach())
    assert (second - first).abs().min() > 0.1


def test_nothing_is_kept_of_weights_that_are_gone():
    import gc

    kept = snf_ext.exact.of_layer._kept
    gc.collect()
    before = len(kept)
    layer = snf_ext.SelfNormLinear(4).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(torch.randn(2, 4))
    assert len(kept) == before + 1
    del layer, compiled
    torch.compiler.reset()
    gc.collect()
    assert len(kept) == before


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradient_through_a_compiled_exact_inverse(groups, circular):
    torch.compiler.reset()
    mode = "circular" if circular else "zeros"
    layer = snf_ext.SelfNormConv2d(4, 3, groups=groups, padding_mode=mode).double().eval()
    with torch.no_grad():
        layer.weight += 0.1 * torch.randn_like(layer.weight)
    z = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(z)

    def function(z_):
        return (layer.inverse(z_, exact=True) * weights).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        *(torch.autograd.grad(call(z), z)[0] for call in (function, compiled))
    )


def test_reference_backend_compiles_its_inverse():
    torch.compiler.reset()
    with snf_ext.use_backend("reference"):
        flow = flow_of("fc-self_norm").eval()
        compiled = torch.compile(flow.inverse, fullgraph=True, dynamic=True, backend="aot_eager")
        z = torch.randn(3, *flow.latent_shape, dtype=torch.float64)
        torch.testing.assert_close(compiled(z), flow.inverse(z))
