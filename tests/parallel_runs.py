"""One step of every bijection and model by two processes, which leave what they are left with.

torchrun --standalone --nproc-per-node 2 tests/parallel_runs.py FILE
"""

from __future__ import annotations

import sys

import models_table
import torch
import torch.distributed as dist
from bijections_table import BIJECTIONS
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

import snf_ext

SIZE, STEPS = 2, 2
WHOLE = StateDictOptions(full_state_dict=True)


def flow(*bijections, shape):
    return snf_ext.Flow(bijections, shape).double()


def started(make):
    """Made by a seed of its own, so that both processes and their judge have the same."""
    torch.manual_seed(2)
    return make()


# What changes its own state in a pass, and so could go wrong where parameters are sharded. Their
# truth is the whole batch's.
OWN_STATE = {
    "ActNorm-starting": (
        lambda: flow(snf_ext.ActNorm(3, init_batches=2), shape=(3, 2, 4)),
        (3, 2, 4),
    ),
    "tracked": (
        lambda: flow(
            snf_ext.SelfNormConv2d(2, 3, inverse="tracked"),
            snf_ext.Flatten((2, 3, 3)),
            snf_ext.SelfNormLinear(18, inverse=snf_ext.Tracked(every=1, samples=0)),
            shape=(2, 3, 3),
        ),
        (2, 3, 3),
    ),
    "held": (
        lambda: snf_ext.constrain(
            flow(snf_ext.SelfNormLinear(6), snf_ext.SmoothTanh(), shape=(6,)),
            snf_ext.Relative().double(),
        ),
        (6,),
    ),
}


def rows():
    """Name, how to make the module, its whole batch of 6 and the context."""
    for case in BIJECTIONS:
        x = case.data(6)
        yield case.name, case.build, x, case.context(x)
    for name in models_table.VARIANTS:
        torch.manual_seed(5)
        yield name, lambda name=name: models_table.build(name), models_table.images(6), None
    for name, (make, shape) in OWN_STATE.items():
        x = torch.randn(6, *shape, generator=torch.Generator().manual_seed(4)).double() + 0.5
        yield name, make, x, None


def objective(step):
    return (step.z.square().flatten(1).sum(1) - step.log_det + step.recon).mean()


def half(t, rank):
    return None if t is None else t.chunk(SIZE)[rank]


def steps(module, call, x, context, ranks):
    """SGD on the mean over ``ranks``, one after the other, None being the whole batch: losses."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01) if parameters else None
    losses = []
    for number in range(STEPS):
        module.zero_grad()
        for rank in ranks:
            torch.manual_seed(50 + 10 * number + (rank or 0))
            whole = rank is None
            batch = (x, context) if whole else (half(x, rank), half(context, rank))
            loss = objective(call(*batch))
            if loss.requires_grad:
                (loss / len(ranks)).backward()
            losses.append(loss.detach())
        if optimizer is not None:
            optimizer.step()
    return losses


def exact_method(module):
    return "log_prob" if isinstance(module, snf_ext.Flow) else "exact_forward"


@torch.no_grad()
def exact_values(module, x, context):
    """After training, by what a flow has kept of its determinants where that is still true."""
    module.eval()
    torch.manual_seed(9)
    found = getattr(module, exact_method(module))(x, context)
    return found if isinstance(found, torch.Tensor) else found.log_det


def started_again(module):
    """Every layer of the package; a seed for each, since torch's own draw for each shard."""
    if hasattr(module, "reshard"):  # a pass leaves the outermost module's parameters whole
        module.reshard()
    for number, part in enumerate(module.modules()):
        torch.manual_seed(70 + number)
        if isinstance(part, snf_ext.bijection.Bijection) and hasattr(part, "reset_parameters"):
            part.reset_parameters()


def data_parallel(make, x, context, rank):
    module = started(make)
    try:
        wrapped = DistributedDataParallel(module)
    except RuntimeError as error:
        return {"refused": str(error)}
    losses = steps(module, wrapped, x, context, [rank])
    return {"losses": losses, "state": module.state_dict()}


def sharded(make, x, context, rank):
    module = started(make)
    if isinstance(module, snf_ext.Flow):
        for bijection in module.bijections:
            fully_shard(bijection)
            for method in ("exact_forward", "inverse"):
                register_fsdp_forward_method(bijection, method)
    fully_shard(module)
    register_fsdp_forward_method(module, exact_method(module))
    losses = steps(module, module, x, context, [rank])
    nats = exact_values(module, x, context)
    state = module.state_dict()
    if state:
        state = get_model_state_dict(module, options=WHOLE)
        set_model_state_dict(module, dict(state), options=WHOLE)
        again = get_model_state_dict(module, options=WHOLE)
        torch.testing.assert_close(again, state, rtol=0, atol=0)
    state = {key: t.clone() for key, t in state.items()}  # buffers among it
    started_again(module)
    anew = get_model_state_dict(module, options=WHOLE) if state else {}
    return {"losses": losses, "state": state, "nats": nats, "anew": anew}


WAYS = {"ddp": data_parallel, "fsdp2": sharded}


def truth(name, make, x, context):
    """What one process is left with."""
    module = started(make)
    ranks = [None] if name in OWN_STATE else range(SIZE)
    losses = steps(module, module, x, context, ranks)
    nats = exact_values(module, x, context)
    state = {key: t.clone() for key, t in module.state_dict().items()}
    started_again(module)
    return {"losses": losses, "state": state, "nats": nats, "anew": module.state_dict()}


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    for name, make, x, context in rows():
        for way, run in WAYS.items():
            found[way, name] = run(make, x, context, rank)
    torch.save(found, f"{sys.argv[1]}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
