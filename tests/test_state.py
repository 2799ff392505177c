"""Copies and states: deepcopy and pickle after use, state dicts with versions, the meta device."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import nullcontext

import models_table
import pytest
import torch
from bijections_table import BIJECTIONS
from models_table import VARIANTS, images
from torch import nn

import snf_ext
from snf_ext.controllers import CONTROLLERS
from snf_ext.layers import LearnableLeakyReLU, LUConv1x1

pytestmark = pytest.mark.usefixtures("one_thread")
every = pytest.mark.parametrize("case", BIJECTIONS, ids=lambda case: case.name)
every_model = pytest.mark.parametrize("name", VARIANTS)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}
ways = pytest.mark.parametrize("way", COPIES)


def used(name, **settings):
    """A model that has been trained, evaluated and sampled from: all caches are full."""
    flow, x = models_table.build(name, **settings), images()
    flow.loss(x).backward()
    flow.eval()
    flow.log_prob(x)
    flow.sample(2, exact=True)
    flow.zero_grad(set_to_none=True)
    return flow, x


def seeded(function, *arguments):
    torch.manual_seed(7)
    return function(*arguments)


def assert_same_flow(one, two, x):
    """The same likelihood and, in training, the same loss and gradients, to the bit."""
    for mode, function in ((False, "log_prob"), (True, "loss")):
        results = []
        for flow in (one.train(mode), two.train(mode)):
            value = seeded(getattr(flow, function), x)
            flow.zero_grad(set_to_none=True)
            value.sum().backward()
            results.append([value, *(p.grad for p in flow.parameters())])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@ways
@every_model
def test_copies_of_used_models(name, way):
    flow, x = used(name)
    twin = COPIES[way](flow)
    assert not {id(p) for p in flow.parameters()} & {id(p) for p in twin.parameters()}
    assert_same_flow(flow, twin, x)
    before = seeded(flow.eval().log_prob, x)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.01)
    assert torch.equal(seeded(flow.log_prob, x), before)
    assert not torch.equal(seeded(twin.eval().log_prob, x), before)  # nothing kept is stale


@ways
@every
def test_copies_of_bijections(case, way):
    bijection, x = case.build().eval(), case.data()
    context = case.context(x)
    want = seeded(bijection, x, context)
    bijection.inverse(want.z, context, exact=True)
    for a, b in zip(seeded(COPIES[way](bijection), x, context), want, strict=True):
        assert torch.equal(a, b)


@ways
def test_copies_of_what_goes_with_a_flow(way):
    """Controllers, tracked inverses with a fit due, debiased growth, reversible mode."""
    flow = snf_ext.Flow(
        [
            snf_ext.SelfNormConv2d(2, 3, debias=1),
            snf_ext.ActNorm(2, init_batches=4),
            snf_ext.Flatten((2, 3, 3)),
            snf_ext.SelfNormLinear(18, inverse=snf_ext.Tracked(every=3)),
        ],
        (2, 3, 3),
    )
    flow = snf_ext.constrain(flow, snf_ext.Relative())
    flow.reversible = snf_ext.Reversible()
    x = torch.randn(4, 2, 3, 3)
    for _ in range(2):
        flow.loss(x).backward()
    twin = COPIES[way](flow)
    assert twin.reversible is not flow.reversible
    for step in range(3):
        losses = [seeded(f.loss, x + step) for f in (flow, twin)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
    for (key, a), b in zip(flow.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert flow.bijections[1].initialized == twin.bijections[1].initialized


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@every_model
def test_state_dict(name, assign):
    """Through a file of data alone, with its versions; into a flow that had other determinants."""
    flow, x = used(name)
    buffer = io.BytesIO()
    torch.save(flow.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = VARIANTS[name]().double()
    other.loss(x)
    other.eval().log_prob(x)
    assert str(other.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert_same_flow(flow, other, x)


def test_a_loaded_actnorm_does_not_start_again():
    case = next(case for case in BIJECTIONS if case.name == "ActNorm")
    layer = case.build(torch.float32)
    whole = layer.state_dict()
    alone = {key: whole[key] for key in ("shift", "log_scale")}
    for state, strict, assign in (
        (whole, True, False),
        (whole, True, True),
        (alone, False, False),
        (alone, False, True),
    ):
        other = snf_ext.ActNorm(3)
        other.load_state_dict(dict(state), strict=strict, assign=assign)
        assert other.initialized
        other(100 * torch.randn(5, 3, 2, 4))
        assert torch.equal(other.shift, layer.shift)
        assert torch.equal(other.log_scale, layer.log_scale)
    with pytest.raises(RuntimeError, match=r"Missing key.*sums"):
        snf_ext.ActNorm(3).load_state_dict(dict(alone))


# ---- versions


@every
def test_newer_states_are_refused(case):
    """With both versions, and nothing of it taken over."""
    module = case.make()
    state, version = module.state_dict(), module._version
    state._metadata[""]["version"] = version + 1
    for key, value in state.items():
        state[key] = torch.zeros_like(value)
    before = copy.deepcopy(module.state_dict())
    name = type(module).__name__
    match = rf"{name}\) must be of version {version} at most; got version {version + 1}, of a newer"
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=match):
            module.load_state_dict(state, strict=strict)
    for key in (key for key in before if "." not in key):
        assert torch.equal(module.state_dict()[key], before[key])


@every_model
def test_states_of_models_say_their_versions(name):
    flow = VARIANTS[name]()
    metadata = flow.state_dict()._metadata
    for path, module in flow.named_modules():
        assert metadata[path]["version"] == module._version
    layer = next(path for path, m in flow.named_modules() if isinstance(m, snf_ext.Bijection))
    state = flow.state_dict()
    state._metadata[layer]["version"] = 99
    with pytest.raises(RuntimeError, match=rf"state of {layer} \(\w+\) must be .* version 99"):
        flow.load_state_dict(state)


@every
def test_states_without_versions(case):
    """As plain dictionaries and safetensors have none."""
    module, x = case.build(), case.data()
    other = case.make().double()
    other.load_state_dict(dict(module.state_dict()))
    found = [seeded(m.eval(), x, case.context(x)) for m in (module, other)]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("version", [None, 1])
def test_lu_in_two_parameters(version):
    """Its first version."""
    layer, x = LUConv1x1(3), torch.randn(2, 3, 2, 2)
    state = layer.state_dict()
    metadata = copy.deepcopy(state._metadata)
    lu = state.pop("lu")
    state["lower"], state["upper"] = lu.tril(-1), lu.triu(1)
    flow, prefixed = snf_ext.Flow([LUConv1x1(3)], (3, 2, 2)), {}
    for key, value in state.items():
        prefixed["bijections.0." + key] = value
    if version is not None:
        metadata[""]["version"] = version
        prefixed = type(state)(prefixed)
        prefixed._metadata = {"": {"version": 1}, "bijections.0": metadata[""]}
    flow.load_state_dict(prefixed)
    assert torch.equal(flow(x).z, layer(x).z)
    assert "bijections.0.lower" in prefixed  # the caller's
    del prefixed["bijections.0.upper"]
    message = r"state of bijections.0 \(LUConv1x1\) must have .*lu, as of version 2; got version 1"
    expected = pytest.warns(UserWarning, match=message) if version else nullcontext()
    with expected, pytest.raises(RuntimeError, match=r"Missing key.*bijections.0.lu"):
        flow.load_state_dict(prefixed)


def test_scalar_slopes():
    layer = LearnableLeakyReLU()
    layer.load_state_dict({"p": torch.tensor(0.25)})
    assert layer.p.tolist() == [0.25]


@pytest.mark.parametrize("ways", [("penalty", "tracked"), ("tracked", "penalty")], ids="-to-".join)
def test_states_of_inverses_kept_in_other_ways(ways):
    """A tracked inverse fits itself at its first step, wherever its numbers come from."""
    flows = []
    for inverse in ways:
        torch.manual_seed(len(flows))
        flows.append(
            snf_ext.Flow(
                [
                    snf_ext.SelfNormConv2d(2, 3, inverse=inverse),
                    snf_ext.Flatten((2, 3, 3)),
                    snf_ext.SelfNormLinear(18, inverse=inverse),
                ],
                (2, 3, 3),
            )
        )
    x = torch.randn(4, 2, 3, 3)
    flows[0].loss(x)
    flows[1].load_state_dict(flows[0].state_dict())
    assert torch.equal(flows[0].sample(0), flows[1].sample(0))
    z = torch.randn(4, 18)
    assert torch.equal(flows[0].inverse(z), flows[1].inverse(z))
    flows[1].loss(x)
    linear = flows[1].bijections[2]
    if ways[1] == "tracked":
        product = linear.weight_inv @ linear.weight
        torch.testing.assert_close(product, torch.eye(18), rtol=0, atol=1e-4)
    assert ("bijections.2.due" in flows[1].state_dict()) == (ways[1] == "tracked")


# ---- the meta device


def on_meta(make):
    with torch.device("meta"):
        module = make()
    assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))
    return module


def started_anew(module):
    """From memory that holds rubbish, as torch's own initialisation of shards does it."""
    module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.fill_(7 if not tensor.is_floating_point() else float("nan"))
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return module


def assert_starts_like(module, ordinary):
    state, like = module.state_dict(), ordinary.state_dict()
    assert state.keys() == like.keys()
    for key, value in like.items():
        got = state[key]
        assert (got.shape, got.dtype, got.device) == (value.shape, value.dtype, value.device)
        assert got.isfinite().all(), key
        if not value.any() or not (value.is_floating_point() or value.dim()):  # zeros, counters
            assert torch.equal(got, value), key


@every
def test_bijections_from_the_meta_device(case):
    module = started_anew(on_meta(case.make))
    assert_starts_like(module, case.make())
    bijection, x = case.build(torch.float32), case.data(4, torch.float32)
    for assign in (False, True):
        module = on_meta(case.make)
        module = module if assign else module.to_empty(device="cpu")
        module.load_state_dict(bijection.state_dict(), assign=assign)
        found = [seeded(m.eval(), x, case.context(x)) for m in (bijection, module)]
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


@every_model
def test_models_from_the_meta_device(name):
    flow, x = started_anew(on_meta(VARIANTS[name])), images(dtype=torch.float32)
    assert_starts_like(flow, VARIANTS[name]())
    flow.loss(x).backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters())
    loaded = on_meta(VARIANTS[name])
    loaded.load_state_dict(flow.state_dict(), assign=True)
    assert torch.equal(seeded(flow.eval().log_prob, x), seeded(loaded.eval().log_prob, x))


@pytest.mark.parametrize("name", [*CONTROLLERS, "fixed"])
def test_controllers_from_the_meta_device(name):
    make = CONTROLLERS.get(name, lambda: snf_ext.controllers.Fixed(3.0))
    assert_starts_like(started_anew(on_meta(make)), make())
    for key, value in make().state_dict().items():
        assert torch.equal(started_anew(on_meta(make)).state_dict()[key], value)


def test_every_layer_with_parameters_can_start_anew():
    own = [*(case.make() for case in BIJECTIONS), *(make() for make in VARIANTS.values())]
    lacking = {
        type(m).__name__
        for module in own
        for m in module.modules()
        if (*m.parameters(recurse=False), *m.buffers(recurse=False))
        and not hasattr(m, "reset_parameters")
    }
    assert not lacking


def test_networks_that_start_at_zero_do_so_again():
    """Whatever the order in which their parts are reset."""
    coupling = snf_ext.AffineCoupling(4, 8)
    for m in coupling.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.ones_(m.weight)
    for part in reversed(list(coupling.modules())):
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(coupling(x).z, x)
