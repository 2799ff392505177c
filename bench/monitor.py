"""What the gradient monitor and the divergence guard cost beside a training step.

    python -m bench.monitor [--model conv|fc] [--rounds 21] [--every 100] [--out F]

A step at batch 100 on 1x28x28 images, fused Adam included: plain; measured by the monitor; measured
with the exact log-determinants replaced by something that costs nothing, which shows the monitor's
own part; checked by the guard, without and with the norms of I - R W. The share is that of such a
step's extra time in ``every`` steps.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import snf_ext
from snf_ext import exact

from . import report
from .timing import Variant, interleave, quartiles

BATCH = 100


def variants(model: str, event_shape: tuple[int, int, int] = (1, 28, 28)) -> list[Variant]:
    """The same step in different company, each on a flow of its own."""

    def variant(
        name: str, watched: bool = False, free: bool = False, guarded: str | None = None
    ) -> Variant:
        torch.manual_seed(0)
        flow = getattr(snf_ext.models, model)(event_shape).train()
        optimizer = torch.optim.Adam(flow.parameters(), fused=True)
        monitor = snf_ext.GradientMonitor(flow, every=1)
        guard = snf_ext.DivergenceGuard(flow, 1, check_inverse=guarded == "inverse")
        x = torch.randint(256, (BATCH, *event_shape)).float()

        def step() -> None:
            optimizer.zero_grad()
            with (
                monitor.step() if watched else contextlib.nullcontext(),
                guard.step() if guarded else contextlib.nullcontext(),
            ):
                loss = flow.loss(x)
                loss.backward()
            if guarded:
                guard.check(loss, x)
            optimizer.step()

        return Variant(name, step, free_log_dets if free else contextlib.nullcontext)

    return [
        variant("step"),
        variant("measured", watched=True),
        variant("measured, log-determinants free", watched=True, free=True),
        variant("checked", guarded="gradient"),
        variant("checked, norms too", guarded="inverse"),
    ]


@contextlib.contextmanager
def free_log_dets() -> Iterator[None]:
    """Linear functions of the weight in place of the log-determinants."""

    def total(weight: Tensor, *_: object) -> Tensor:
        return weight.sum()

    with (
        mock.patch.object(exact, "conv2d_log_abs_det", total),
        mock.patch.object(exact, "linear_log_abs_det", total),
    ):
        yield


def main() -> None:
    """Time, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("conv", "fc"), default="conv")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    record = report.environment(f"bench.monitor --model {options.model} --every {options.every}")
    print(report.headline(record))
    timings = interleave(variants(options.model), rounds=options.rounds)
    plain = timings["step"]
    record["results"] = {}
    for name, timing in timings.items():
        pairs = zip(timing.seconds, plain.seconds, strict=True)
        extra = quartiles([(a - b) / b / options.every for a, b in pairs])
        record["results"][name] = {"seconds": timing.quartiles(), "share": extra}
        low, median, high = extra
        print(
            f"{name:32} {timing.quartiles()[1] * 1e3:7.1f} ms, {100 * median:.2f} % of training "
            f"(quartiles {100 * low:.2f} to {100 * high:.2f}) at every {options.every} steps"
        )
    if options.out:
        report.write_json(options.out, record)


if __name__ == "__main__":
    main()
