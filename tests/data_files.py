"""Small files in the forms of the data sets, and the folders of the real ones."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_mnist = pytest.mark.skipif(
    not (SHARED / "mnist").is_dir(), reason="MNIST is not beside the repository"
)
needs_images = pytest.mark.skipif(
    not (SHARED / "cifar10-jpeg-subset.npz").is_file(),
    reason="the natural images are not beside the repository",
)


def idx(images: torch.Tensor, magic: int = 0x0803) -> bytes:
    return struct.pack(f">I{images.dim()}I", magic, *images.shape) + images.numpy().tobytes()


def random_images(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)


def write_mnist(folder: Path, train: int, test: int) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = random_images(train, 1), random_images(test, 2)
    (folder / "train-images-idx3-ubyte").write_bytes(idx(first))
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(second)))
    return first, second


def write_labels(folder: Path, name: str, labels: torch.Tensor) -> None:
    (folder / name).write_bytes(gzip.compress(idx(labels, 0x0801)))


def write_cifar10(folder: Path, counts: dict[str, int]) -> dict[str, np.ndarray]:
    """Records of random bytes, the first a label of 0..9; by the file's name without its end."""
    generator, content = np.random.default_rng(0), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in counts.items():
        records = generator.integers(0, 256, (count, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (folder / f"{name}.bin").write_bytes(records.tobytes())
        content[name] = records
    return content


CIFAR10_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))


def write_imagenet32(train: Path, test: Path, sizes: list[int], tests: int) -> list[dict]:
    """Ten batches of these sizes and the test file; the content of each."""
    generator, content = np.random.default_rng(0), []
    names = [f"train_data_batch_{number}.npz" for number in range(1, 11)]
    for folder, name, size in [
        *((train, name, size) for name, size in zip(names, sizes, strict=True)),
        (test, "val_data.npz", tests),
    ]:
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            "data": generator.integers(0, 256, (size, 3072), dtype=np.uint8),
            "labels": generator.integers(1, 1001, size),
            "mean": np.zeros(3072),
        }
        np.savez(folder / name, **arrays)
        content.append(arrays)
    return content
