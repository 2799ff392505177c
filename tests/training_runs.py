"""Short runs of a small model on noise, and whether two of them are the same."""

import torch

import snf_ext
from snf_ext.training import checkpoint
from snf_ext.training.config import Config
from snf_ext.training.data import Dataset
from snf_ext.training.loop import Trainer

SHAPE = (1, 2, 3)


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(17, (count, *SHAPE), generator=generator, dtype=torch.uint8)


DATA = Dataset("noise", images(50, 1), images(20, 2), images(20, 3), SHAPE, 17)
CONFIG = Config("fc", "noise", 5, 8, 1e-2, 1.0, warmup_epochs=2, clip_norm=100.0, seed=7)


def trainer(folder, config=CONFIG, data=DATA):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    flow = snf_ext.models.fc(SHAPE, pixel_levels=17)
    return Trainer(flow, {"name": "fc", "settings": {}}, data, config, folder, progress=False)


def new_run(folder, config=CONFIG):
    run = trainer(folder, config)
    run.begin()
    return run


def resumed(folder, config=CONFIG):
    run = trainer(folder, config)
    torch.manual_seed(123456)  # whatever came before must not matter
    run.flow.load_state_dict({k: v + 1 for k, v in run.flow.state_dict().items()})
    run.resume(checkpoint.load(folder / "last.pt", resume=True), folder / "last.pt")
    return run


def same_run(a, b):
    """Bit for bit the same files, but for the clock."""
    for name in ("last.pt", "best.pt"):
        one, two = checkpoint.load(a / name), checkpoint.load(b / name)
        for content in (one, two):
            del content["config"]["epochs"]  # best.pt has what was asked for when it was written
            for row in content.get("history", []):
                del row["seconds"]
        assert_same(one, two)


def assert_same(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert a.numpy().tobytes() == b.numpy().tobytes(), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where
