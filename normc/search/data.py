"""Data: the images that networks are trained and judged on.

    digits              1,797 images of 8 x 8 pixels in ten classes, from scikit-learn's wheel
    cifar10:FOLDER      60,000 of 32 x 32 in colour, from a folder with the files of the
    cifar100:FOLDER     "binary version", as https://www.cs.toronto.edu/~kriz/cifar.html gives them

or any `torch.utils.data.Dataset` of images and classes. All of it is held in memory, as bytes where
it came as bytes, and never leaves its order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normc.errors import NormcError

HELD_OUT = 5
"""Of the digits every fifth image is kept for judging."""

SIDE = 32
"""Pixels along the side of an image of CIFAR."""

CIFAR = {  # files to train with, file to judge with, bytes of classes before an image, classes
    "cifar10": ([f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", 1, 10),
    "cifar100": (["train.bin"], "test.bin", 2, 100),
}


@dataclass(frozen=True)
class Images:
    """Images (N, C, H, W) with their classes (N,), in two parts.

    Bytes stand for numbers from 0 to 1. ``mean`` and ``std`` per channel are those of the first
    part; a batch is scaled by them. With ``crop``, training sees random crops of that many pixels
    along each side, mirrored at random.
    """

    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor
    classes: int
    mean: Tensor
    std: Tensor
    crop: int | None = None

    @staticmethod
    def of(train: Tensor, train_classes: Tensor, test: Tensor, test_classes: Tensor,
           classes: int | None = None, crop: int | None = None) -> Images:  # fmt: skip
        """Check the parts and measure the first; `NormcError` for what are no images."""
        for part, labels in ((train, train_classes), (test, test_classes)):
            if part.dim() != 4 or labels.shape != part.shape[:1] or not len(part):
                raise NormcError(
                    f"images are (N, C, H, W) with as many classes, not {tuple(part.shape)} "
                    f"with {tuple(labels.shape)}"
                )
        if train.shape[1:] != test.shape[1:]:
            raise NormcError(
                f"images to train with are {tuple(train.shape[1:])}, those to judge with "
                f"{tuple(test.shape[1:])}"
            )
        most = int(max(train_classes.max(), test_classes.max())) + 1
        least = int(min(train_classes.min(), test_classes.min()))
        if least < 0 or (classes is not None and most > classes):
            raise NormcError(f"classes are from {least} to {most - 1}: expected 0 to {classes}")
        scaled = _scaled(train[:10_000])
        mean = scaled.mean((0, 2, 3)).view(1, -1, 1, 1)
        std = scaled.std((0, 2, 3)).clamp_min(1e-6).view(1, -1, 1, 1)
        return Images(
            train, train_classes.long(), test, test_classes.long(), classes or most, mean, std, crop
        )

    @property
    def channels(self) -> int:
        """Of an image."""
        return self.train.shape[1]

    def prepared(self, images: Tensor) -> Tensor:
        """A batch as networks take it: float32, each channel scaled."""
        return (_scaled(images) - self.mean) / self.std

    def batch(self, chosen: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
        """Some images to train with, cropped and mirrored if so wished, and their classes."""
        images = self.prepared(self.train[chosen])
        if self.crop:
            images = _cropped(images, self.crop, chance)
        return images, self.train_classes[chosen]

    @property
    def digest(self) -> str:
        """A name for the content, by which a resume knows that data passed again are the same."""
        found = hashlib.sha256()
        for part in (self.train, self.train_classes, self.test, self.test_classes):
            found.update(f"{part.dtype}{tuple(part.shape)}".encode())
            found.update(part.contiguous().numpy().tobytes())
        return found.hexdigest()[:32]


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _cropped(images: Tensor, size: int, chance: torch.Generator) -> Tensor:
    """Each image cropped somewhere, and mirrored or not."""
    count = len(images)
    places: list[Tensor] = []
    for side in images.shape[2:]:
        if side < size:
            raise NormcError(f"no crop of {size} pixels fits into images {tuple(images.shape[2:])}")
        first = torch.randint(side - size + 1, (count, 1), generator=chance)
        places.append(first + torch.arange(size))
    rows, columns = places
    mirrored = torch.randint(2, (count, 1), generator=chance).bool()
    columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(count).view(-1, 1, 1)
    cut = images.permute(0, 2, 3, 1)[each, rows.unsqueeze(2), columns.unsqueeze(1)]
    return cut.permute(0, 3, 1, 2).contiguous()


# --- where they come from -------------------------------------------------------------------------


def load(name: str) -> Images:
    """The images of a name in a setting; `NormcError` for one that says nothing here."""
    kind, _, folder = name.partition(":")
    if kind == "digits" and not folder:
        return digits()
    if kind in CIFAR and folder:
        return cifar(kind, Path(folder))
    raise NormcError(
        f"no data are called {name!r}: expected digits, cifar10:FOLDER or cifar100:FOLDER; "
        "other data are passed in Python, also to a resume"
    )


@lru_cache(maxsize=1)
def digits() -> Images:
    """The digits that come with scikit-learn, as numbers from 0 to 1."""
    try:
        from sklearn import datasets
    except ImportError:
        raise NormcError(
            "the digits come with scikit-learn, which is missing: pip install scikit-learn"
        ) from None
    found: Any = datasets.load_digits()
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    classes = torch.tensor(found.target)[order]
    test = len(images) // HELD_OUT + 1
    return Images.of(images[test:], classes[test:], images[:test], classes[:test], 10)


def cifar(kind: str, folder: Path, crop: int | None = 24) -> Images:
    """CIFAR-10 or CIFAR-100 from the files of its binary version.

    A record is the class (for CIFAR-100 after the superclass) and 3 x 32 x 32 bytes, channel after
    channel. Training crops to 24 pixels, as the paper's searches did.
    """
    trained, judged, labels, classes = CIFAR[kind]
    train = [_records(folder / name, labels, classes) for name in trained]
    test, test_classes = _records(folder / judged, labels, classes)
    images, found = (torch.cat(part) for part in zip(*train, strict=True))
    return Images.of(images, found, test, test_classes, classes, crop)


def _records(path: Path, labels: int, classes: int) -> tuple[Tensor, Tensor]:
    """The images of a file with their classes."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise NormcError(f"cannot read {path.name} of CIFAR: {error}") from error
    size = labels + 3 * SIDE * SIDE
    if not data or len(data) % size:
        raise NormcError(f"{path.name} has {len(data)} bytes, which is no multiple of {size}")
    table = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, size)
    found = table[:, labels - 1].long()
    if int(found.max()) >= classes:
        raise NormcError(f"{path.name} has a class {int(found.max())}: expected 0 to {classes - 1}")
    return table[:, labels:].reshape(-1, 3, SIDE, SIDE).clone(), found


def from_datasets(train: Sequence[Any], test: Sequence[Any], crop: int | None = None) -> Images:
    """Images from two datasets: with a length, and of pairs of an image and a class.

    Images are tensors (C, H, W), or (H, W) for one channel, bytes or floating-point numbers.
    """
    return Images.of(*_stacked(train), *_stacked(test), crop=crop)


def _stacked(dataset: Sequence[Any]) -> tuple[Tensor, Tensor]:
    images, classes = list[Tensor](), list[int]()
    for i in range(len(dataset)):
        image, label = dataset[i]
        tensor = torch.as_tensor(image)
        images.append(tensor.unsqueeze(0) if tensor.dim() == 2 else tensor)
        classes.append(int(label))
    if not images:
        raise NormcError("a dataset has no images")
    return torch.stack(images), torch.tensor(classes)
