"""Training steps at a GPU's full speed: one CUDA graph from the choice of images to the update."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from ..flow import Flow
from ..graphed import GraphedStep
from .batches import Batches
from .config import Config
from .world import World

DEVICE = "cuda"


def can_be_graphed(config: Config, world: World, device: torch.device) -> bool:
    """Whether a run's steps can be replayed as graphs: one process and one whole batch a step."""
    whole = world.size == 1 and config.accumulate == 1 and not config.reversible
    return config.graph and whole and device.type == DEVICE


def graphed_step(flow: Flow, optimizer: Optimizer, batches: Batches, config: Config) -> GraphedStep:
    """A step whose argument are the places ``(B,)`` of its images in the training set.

    In the graph are the images' choice, augmentation and dequantization, the passes forward and
    back, what moves the penalty's weight, clipping, and the optimizer's step.
    """

    def loss(index: Tensor) -> Tensor:
        return flow.loss(
            *batches.take(index),
            log_det_penalty=config.log_det_penalty,
            bits_per_dim=config.objective == "bits",
        )

    def clip() -> None:
        assert config.clip_norm is not None
        clip_grad_norm_(flow.parameters(), config.clip_norm)

    after = None if config.clip_norm is None else clip
    return GraphedStep(flow, optimizer, loss=loss, after_backward=after)
