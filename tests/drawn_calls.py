"""Runs a call that was drawn: natively, and by the reference."""

from __future__ import annotations

import torch
from strategies import Call

import snf_ext


def run(call: Call, function, dtype=None):
    """Outputs, and a gradient or None for each tensor."""
    leaves = [
        None if t is None else (t if dtype is None else t.detach().to(dtype)).requires_grad_(wanted)
        for t, wanted in zip(
            (None if t is None else t.detach() for t in call.tensors),
            call.wanted or (False,) * len(call.tensors),
            strict=True,
        )
    ]
    outputs = function(*leaves, **call.rest)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [t for t in leaves if t is not None and t.requires_grad]
    pairs = [
        (o, g if dtype is None else g.to(o.dtype))
        for o, g in zip(outputs, call.grads, strict=False)  # a count of iterations has none
        if g is not None and o.requires_grad
    ]
    found = iter(())
    if pairs and used:
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], used, [g for _, g in pairs], materialize_grads=True
            )
        )
    else:
        used = []
    grads = [next(found) if t is not None and t.requires_grad and used else None for t in leaves]
    return [o.detach() for o in outputs], grads


def native(call):
    return run(call, getattr(torch.ops.snf_ext, call.op))


def nothing(call: Call) -> bool:
    """Whether there are no elements: sums of nothing are 0, or NaN where 0 meets infinity."""
    if call.tensors[0].numel():
        return False
    outputs, grads = native(call)
    for t in (*outputs, *grads):
        assert t is None or not t.nan_to_num(0 if call.wild else 1).any()
    return True


def reference(call, dtype=None):
    return run(call, getattr(snf_ext.reference, call.op), dtype)


def large(call: Call) -> bool:
    bound = 1e3 if call.dtype == torch.float16 else 1e10
    given = (t for t in (*call.tensors, *call.grads) if t is not None and t.numel())
    return any(bool(((t.abs() > bound) & t.isfinite()).any()) for t in given)
