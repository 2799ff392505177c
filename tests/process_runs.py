"""Short runs by one process or, started by torchrun, by several; each leaves its weights.

torchrun --nproc-per-node 2 tests/process_runs.py FOLDER NAME...
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import snf_ext
from snf_ext.training.config import Config
from snf_ext.training.data import Dataset
from snf_ext.training.loop import Trainer
from snf_ext.training.world import ALONE, joined

SHAPE, SEED = (1, 8, 8), 3
CONFIG = Config(
    "any", "noise", 5, 20, 1e-3, 1.0, warmup_epochs=1, seed=SEED, angle_every=0, check_every=10
)


def images(count, seed):
    """Blots, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(17, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)


DATA = Dataset("noise", images(195, 1), images(1100, 2), images(30, 3), SHAPE, 17)
TINY = partial(snf_ext.models.glow, SHAPE, 2, 1, 8, pixel_levels=17)


def small_conv(**options):
    return snf_ext.models.conv(SHAPE, 3, 3, pixel_levels=17, **options)


def held(flow):
    return snf_ext.constrain(flow, snf_ext.Relative())


# What is built, and what it is trained with besides CONFIG.
CASES = {
    "fc": (lambda: snf_ext.models.fc(SHAPE, pixel_levels=17), {}),
    "fc tracked": (
        lambda: snf_ext.models.fc(SHAPE, pixel_levels=17, inverse="tracked"),
        {"batch_size": 65, "epochs": 17},
    ),
    "fc debiased": (lambda: snf_ext.models.fc(SHAPE, pixel_levels=17, debias=1), {}),
    "conv held": (lambda: held(small_conv()), {"clip_norm": 1.0}),
    "conv tracked": (lambda: small_conv(inverse="tracked"), {"objective": "bits"}),
    "glow held": (lambda: held(TINY()), {"actnorm_batches": 3, "log_det_penalty": 1e-5}),
    "glow lu": (lambda: TINY(mixing="lu"), {"optimizer": "radam"}),
}


def train(name, folder, world=ALONE, dtype=torch.float64, **settings):
    """The flow's state after 50 steps, and its likelihoods on the way."""
    make, own = CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(CONFIG, **(own | settings))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # of the images, too
    try:
        torch.manual_seed(SEED)
        flow = make()
        model = {"name": name, "settings": {}}
        trainer = Trainer(flow, model, DATA, config, folder, progress=False, world=world)
        trainer.begin()
        assert trainer.fit()
    finally:
        torch.set_default_dtype(before)
    return flow.state_dict(), [row["val_nll"] for row in trainer.history]


def main(folder, *names):
    with joined(torch.device("cpu")) as world:
        for name in names:
            state, figures = train(name, Path(folder) / name, world)
            torch.save([state, figures], Path(folder) / f"{name} {world.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
