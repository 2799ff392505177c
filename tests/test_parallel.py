"""Data parallel in torch's own ways: DataParallel, DistributedDataParallel, FSDP2.

A step by two processes leaves what one leaves that takes both halves. How ``snf-ext train`` splits
batches is in test_split_batches.py.
"""

from __future__ import annotations

import subprocess
import sys

import models_table
import parallel_runs
import pytest
import torch
from bijections_table import BIJECTIONS
from cli_runs import environment
from torch import nn

import snf_ext
from snf_ext.layers import BatchNorm

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
NAMES = [row[0] for row in parallel_runs.rows()]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What each of two processes is left with, by way and name."""
    stem = tmp_path_factory.mktemp("two") / "found"
    command = [*TORCHRUN, parallel_runs.__file__, str(stem)]
    subprocess.run(command, check=True, timeout=300, env=environment())
    return [torch.load(f"{stem}.{rank}") for rank in (0, 1)]


@pytest.fixture(scope="module")
def of_one():
    """The same by one process, by name."""
    torch.set_num_threads(1)
    return {name: parallel_runs.truth(name, *rest) for name, *rest in parallel_runs.rows()}


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, check_device=False)


def assert_losses(runs, truth):
    """Of both processes, those of both halves, or their mean the whole batch's."""
    together = [torch.stack(pair) for pair in zip(*(run["losses"] for run in runs), strict=True)]
    if len(truth["losses"]) == len(together):
        together = [pair.mean() for pair in together]
    assert_close(torch.stack(together).flatten(), torch.stack(truth["losses"]).flatten())


def assert_state(state, truth, name):
    """But for what each rank has of its own, and what actnorm counted before the steps."""
    counted = () if name in parallel_runs.OWN_STATE else ("sums", "elements")
    own = ("running_mean", "running_var", *counted)
    kept = {key: t for key, t in state.items() if not key.endswith(own)}
    assert_close(kept, {key: truth["state"][key] for key in kept})


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ddp(name, of_two, of_one):
    runs, truth = [run["ddp", name] for run in of_two], of_one[name]
    if "refused" in runs[0]:
        assert "doesn't have any parameter" in runs[0]["refused"]
        assert not [key for key in truth["state"] if key != "permutation"]
        return
    assert_losses(runs, truth)
    for run in runs:
        assert_state(run["state"], truth, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fsdp2(name, of_two, of_one):
    """What is gathered is an ordinary state, also of what passes and reset_parameters set."""
    runs, truth = [run["fsdp2", name] for run in of_two], of_one[name]
    assert_losses(runs, truth)
    state = runs[0]["state"]
    assert set(state) == set(truth["state"])
    assert_state(state, truth, name)
    if "BatchNorm" not in name:
        for run in runs:
            assert_close(run["nats"], truth["nats"])
    layers = truth["anew"].keys() - {key for key in state if ".network." in f".{key}"}
    assert_close(*({key: of["anew"][key] for key in layers} for of in (runs[0], truth)))
    make = {row[0]: row[1] for row in parallel_runs.rows()}[name]
    parallel_runs.started(make).load_state_dict(state)


def test_every_row_is_run():
    assert {case.name for case in BIJECTIONS} | set(models_table.VARIANTS) <= set(NAMES)


# ---- DataParallel, which without a GPU is the module itself


def test_data_parallel_calls_the_flow():
    flow, x = models_table.build("conv-smooth"), models_table.images(4)
    torch.manual_seed(1)
    want = flow(x)
    torch.manual_seed(1)
    assert_close(tuple(nn.DataParallel(flow)(x)), tuple(want))


def replica(module):
    """As ``replicate`` makes one on another device: the same tensors, no parameters of its own."""
    copies = {name: m._replicate_for_data_parallel() for name, m in module.named_modules()}
    for name, made in copies.items():
        for key, child in module.get_submodule(name)._modules.items():
            made._modules[key] = None if child is None else copies[f"{name}.{key}".lstrip(".")]
        for key, p in module.get_submodule(name)._parameters.items():
            setattr(made, key, p if p is None else p.view_as(p))
    return copies[""]


@pytest.mark.parametrize("name", models_table.VARIANTS)
def test_data_parallel_replicas_have_the_gradients(name):
    """Half of a batch each, in one process; outputs are gathered as a FlowStep."""
    flow, x = models_table.build(name), models_table.images(4)
    steps = []
    for half in x.chunk(2):
        torch.manual_seed(1)
        steps.append(replica(flow)(half))
    gathered = snf_ext.FlowStep(*(torch.cat(parts) for parts in zip(*steps, strict=True)))
    parallel_runs.objective(gathered).backward()
    got = {key: p.grad for key, p in flow.named_parameters()}
    flow.zero_grad(set_to_none=True)
    for half in x.chunk(2):
        torch.manual_seed(1)
        (parallel_runs.objective(flow(half)) / 2).backward()
    assert_close(got, {key: p.grad for key, p in flow.named_parameters()})


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: snf_ext.ActNorm(3), (3, 2)),
        (lambda: BatchNorm(3), (3, 2)),
        (lambda: snf_ext.SelfNormLinear(3, inverse="tracked"), (3,)),
        (
            lambda: snf_ext.constrain(
                parallel_runs.flow(snf_ext.SelfNormLinear(3), shape=(3,)), snf_ext.Relative()
            ).float(),
            (3,),
        ),
    ],
    ids=["actnorm", "batch-norm", "tracked", "controller"],
)
def test_replicas_that_would_lose_their_state_are_refused(make, shape):
    module = make()
    with pytest.raises(RuntimeError, match=r"changes its state .* nn.DataParallel throws .* Distr"):
        replica(module)(torch.randn(4, *shape))
    replica(module.eval())(torch.randn(4, *shape))
