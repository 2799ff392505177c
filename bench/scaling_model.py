"""The time of a training step on several GPUs: what is computed, sent, and waited for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

RANKS = (1, 2, 4, 8, 16, 64)
FLOAT = 4  # bytes

# Of its nominal bandwidth that a link reaches: 376 and 380 of 450 GB/s were seen on NVLink.
REACHED = 0.8
# DistributedDataParallel's default sizes: gradients go in buckets, the first one smaller.
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
# Six products of a layer are two forward and four backward; three of a coupling, one and two.
BACKWARD = 2 / 3
STEP_SUM = 16  # bytes of two numbers in each step: the loss, and whether to stop


@dataclass(frozen=True)
class Link:
    """The narrowest link between ranks, with NCCL's latencies of it.

    ``bandwidth`` is nominal, bytes/s in one direction. Seconds a hop: by ring in ``small`` packets
    (LL) and in ``large`` ones (Simple), by ``tree`` in small ones; None within a node, where NCCL's
    tree is a chain. It joins up to ``most`` ranks.
    """

    name: str
    bandwidth: float
    small: float
    large: float
    tree: float | None = None
    most: int = 64


NETWORK = {"small": 2.7e-6, "large": 9.6e-6, "tree": 5.0e-6}
LINKS = (
    Link("NVLink", 450e9, small=0.47e-6, large=3.4e-6, most=8),
    Link("PCIe 5.0 x16", 64e9, small=1.0e-6, large=5.7e-6, most=8),
    Link("400 Gb/s", 400e9 / 8, **NETWORK),
    Link("100 Gb/s", 100e9 / 8, **NETWORK),
)
# Seconds before the first hop: the same three.
BASE_SMALL, BASE_LARGE, BASE_TREE = 3.6e-6, 8.4e-6, 4.4e-6


@dataclass(frozen=True)
class Facts:
    """What is counted of a model, and the two parts of its step's time on one GPU.

    ``tracked`` and ``penalty`` are the parameters that get gradients, by how inverses are kept;
    ``learned`` the layers with an inverse; ``operations`` those of one image's training step;
    ``dispatches`` its operators; ``shown`` the bytes of samples that tracked linear layers sum.
    A step of b images takes ``fixed_s + b * image_s`` replayed as a graph, and at least ``eager_s``
    where the host starts every kernel.
    """

    model: str
    batch: int
    tracked: int
    penalty: int
    learned: int
    operations: float
    dispatches: int
    fixed_s: float
    image_s: float
    eager_s: float
    shown: list[int]
    measured: bool

    def compute_s(self, batch: int, replayed: bool = True) -> float:
        device = self.fixed_s + batch * self.image_s
        return device if replayed else max(device, self.eager_s)


def all_reduce_seconds(size: float, ranks: int, link: Link) -> float:
    """Of ``size`` bytes: the fastest of NCCL's ring with large or small packets and its tree.

    A ring takes 2 (N - 1) hops and sends 2 (N - 1) / N of the bytes; small packets carry flags and
    reach a quarter of the bandwidth. A tree takes 2 log2 N hops, sends all twice, and reaches
    0.9 / 3.8 of it.

    >>> all_reduce_seconds(100, 1, LINKS[0])
    0.0
    """
    if ranks == 1:
        return 0.0
    around, bandwidth = 2 * (ranks - 1), REACHED * link.bandwidth
    sent = around / ranks * size
    ways = [
        BASE_SMALL + around * link.small + sent / (bandwidth / 4),
        BASE_LARGE + around * link.large + sent / bandwidth,
    ]
    if link.tree is not None:
        up = 2 * math.log2(ranks)
        ways.append(BASE_TREE + up * link.tree + 2 * size / (0.9 / 3.8 * bandwidth))
    return min(ways)


def buckets(size: int) -> list[float]:
    """Bytes of each of the all-reduces that the gradients go in, taken as filled to the brim.

    >>> [round(part / 2**20, 1) for part in buckets(60 * 2**20)]
    [1.0, 25.0, 25.0, 9.0]
    """
    parts: list[float] = [min(size, FIRST_BUCKET)]
    while sum(parts) < size:
        parts.append(min(size - sum(parts), BUCKET))
    return parts


def gradient_seconds(size: int, ranks: int, link: Link, compute: float, overlap: bool) -> float:
    """How long a step waits for gradients.

    Overlapped, they go while backward still runs, but for the last bucket, which is full only when
    it ends.
    """
    parts = [all_reduce_seconds(part, ranks, link) for part in buckets(size)]
    if not overlap:
        return sum(parts)
    return max(sum(parts) - BACKWARD * compute, parts[-1])


def controller_seconds(facts: Facts, ranks: int, link: Link) -> float:
    """Of an all-reduce of two numbers in each learned layer, which the layer waits for."""
    return facts.learned * all_reduce_seconds(2 * FLOAT, ranks, link)


def step_seconds(
    facts: Facts,
    ranks: int,
    link: Link,
    *,
    weak: bool,
    overlap: bool,
    inverse: str = "tracked",
    replayed: bool = True,
) -> float:
    """Of a step with tracked inverses or, with ``"penalty"``, with the penalty and controllers.

    ``weak``: each rank has the paper's batch; else the batch is split, the fullest rank counts.
    ``replayed``: several ranks replay graphs, as one does.
    """
    images = facts.batch if weak else math.ceil(facts.batch / ranks)
    compute = facts.compute_s(images, replayed or ranks == 1)
    size = FLOAT * (facts.tracked if inverse == "tracked" else facts.penalty)
    seconds = compute + gradient_seconds(size, ranks, link, compute, overlap)
    if inverse == "penalty":
        seconds += controller_seconds(facts, ranks, link)
    else:
        seconds += sum(all_reduce_seconds(shown, ranks, link) for shown in facts.shown)
    return seconds + all_reduce_seconds(STEP_SUM, ranks, link)


def rows(models: Sequence[Facts]) -> Iterator[dict[str, Any]]:
    """Seconds and efficiency of every model, way to keep inverses, link and number of ranks.

    Efficiency: of fixed batches a rank T(1) / T(N), of a split batch T(1) / (N T(N)).
    """
    for facts in models:
        for inverse in ("tracked", "penalty"):
            for link in LINKS:
                for ranks in (n for n in RANKS if n <= link.most):
                    for weak in (False, True):
                        how: dict[str, Any] = {"weak": weak, "inverse": inverse}
                        alone = step_seconds(facts, 1, link, overlap=False, **how)
                        row = {"model": facts.model, "link": link.name, "ranks": ranks, **how}
                        for overlap in (False, True):
                            seconds = step_seconds(facts, ranks, link, overlap=overlap, **how)
                            key = "overlapped" if overlap else "in_turn"
                            row[f"{key}_s"] = seconds
                            row[f"{key}_efficiency"] = alone / seconds / (1 if weak else ranks)
                        yield row
