"""Data: files of CIFAR written byte by byte, the digits, datasets, crops and scaling."""

import re

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from normc.errors import NormcError
from normc.search.data import Images, cifar, digits, from_datasets, load

BATCHES = [f"data_batch_{i}.bin" for i in range(1, 6)]


def pixels(number):
    """An image as 3 x 32 x 32 bytes, channel after channel, no two of which look alike."""
    return bytes((number * 7 + c * 80 + row * 5 + col * 3) % 256
                 for c in range(3) for row in range(32) for col in range(32))  # fmt: skip


def record(number, *labels):
    return bytes(labels) + pixels(number)


def cifar10(folder, each=2):
    """Image i has class i % 10; those to judge with are 100, 101 and 102, all of class 9."""
    for b, name in enumerate(BATCHES):
        mine = range(b * each, (b + 1) * each)
        (folder / name).write_bytes(b"".join(record(i, i % 10) for i in mine))
    (folder / "test_batch.bin").write_bytes(b"".join(record(100 + i, 9) for i in range(3)))
    return folder


def test_cifar10_is_read_in_order(tmp_path):
    found = load(f"cifar10:{cifar10(tmp_path)}")
    assert found.classes == 10 and found.crop == 24 and found.channels == 3
    assert found.train_classes.tolist() == list(range(10))
    assert found.test_classes.tolist() == [9, 9, 9]
    assert found.train.shape == (10, 3, 32, 32) and found.train.dtype == torch.uint8
    for i in range(10):
        assert found.train[i].numpy().tobytes() == pixels(i)
    assert found.test[2].numpy().tobytes() == pixels(102)
    assert found.train[3, 1, 4, 5] == (3 * 7 + 1 * 80 + 4 * 5 + 5 * 3) % 256  # channel, row, column


def test_cifar100_has_the_fine_class_second(tmp_path):
    (tmp_path / "train.bin").write_bytes(record(0, 19, 99) + record(1, 3, 0))
    (tmp_path / "test.bin").write_bytes(record(2, 255, 42))  # the superclass is not looked at
    found = cifar("cifar100", tmp_path, crop=None)
    assert found.classes == 100 and found.crop is None
    assert found.train_classes.tolist() == [99, 0] and found.test_classes.tolist() == [42]
    assert found.train[1].numpy().tobytes() == pixels(1)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("data_batch_3.bin", record(0, 1)[:-1], "3072 bytes"),
        ("data_batch_4.bin", record(0, 1) + b"\0", "3074 bytes"),
        ("data_batch_5.bin", b"", "0 bytes"),
        ("data_batch_1.bin", record(0, 10), "class 10: expected 0 to 9"),
        ("test_batch.bin", record(0, 255), "class 255"),
    ],
)
def test_a_damaged_file_of_cifar_is_named(tmp_path, name, content, message):
    (cifar10(tmp_path) / name).write_bytes(content)
    with pytest.raises(NormcError, match=f"{re.escape(name)} has .*{message}"):
        cifar("cifar10", tmp_path)


@pytest.mark.parametrize("name", [*BATCHES, "test_batch.bin"])
def test_a_missing_file_of_cifar_is_named(tmp_path, name):
    (cifar10(tmp_path) / name).unlink()
    with pytest.raises(NormcError, match=f"cannot read {name}"):
        cifar("cifar10", tmp_path)


def test_a_class_beyond_100_is_told(tmp_path):
    (tmp_path / "train.bin").write_bytes(record(0, 0, 100))
    (tmp_path / "test.bin").write_bytes(record(0, 0, 0))
    with pytest.raises(NormcError, match="train.bin has a class 100: expected 0 to 99"):
        cifar("cifar100", tmp_path)


@pytest.mark.parametrize("name", ["", "mnist", "cifar10", "cifar10:", "digits:here", "cifar:/x"])
def test_other_names_say_nothing(name):
    with pytest.raises(NormcError, match="no data are called"):
        load(name)


def test_the_digits():
    one = digits()
    digits.cache_clear()
    again = load("digits")
    assert one is not again and one.digest == again.digest
    assert one.train.shape == (1437, 1, 8, 8) and one.test.shape == (360, 1, 8, 8)
    every = torch.cat([one.train, one.test])
    assert every.min() == 0 and every.max() == 1 and every.dtype == torch.float32
    assert one.classes == 10 and one.crop is None
    for classes in (one.train_classes, one.test_classes):  # no class is rare in either part
        counts = classes.bincount(minlength=10)
        assert len(counts) == 10 and counts.min() > 0.07 * len(classes)
    assert len({image.numpy().tobytes() for image in every}) == 1797  # none is in both parts


class Words(Dataset):
    """A dataset as people write them: (H, W) or (C, H, W) images as arrays, classes as integers."""

    def __init__(self, count, shape, dtype, classes=3):
        chance = torch.Generator().manual_seed(count)
        high = 256 if dtype == torch.uint8 else 2
        self.images = torch.randint(high, (count, *shape), generator=chance).to(dtype)
        self.classes = classes

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index].numpy(), index % self.classes


def test_datasets_of_torch():
    images, classes = torch.rand(6, 2, 5, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    whole = TensorDataset(images, classes)
    found = from_datasets(whole, TensorDataset(images[:2], classes[:2]), crop=3)
    assert torch.equal(found.train, images) and torch.equal(found.train_classes, classes)
    assert torch.equal(found.test, images[:2]) and found.classes == 4 and found.crop == 3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 5), (1, 6, 5), (3, 6, 5)])
def test_datasets_by_hand(dtype, shape):
    train, test = Words(7, shape, dtype), Words(4, shape, dtype)
    found = from_datasets(train, test)
    assert found.train.dtype == dtype  # bytes stay bytes
    assert found.train.shape == (7, shape[0] if len(shape) == 3 else 1, 6, 5)
    assert torch.equal(found.train.view(7, *shape), train.images)
    assert found.train_classes.tolist() == [0, 1, 2, 0, 1, 2, 0]
    ready = found.prepared(found.train)
    assert ready.dtype == torch.float32
    assert ready.mean().abs() < 1e-5 and abs(float(ready.std()) - 1) < 0.1


def test_a_dataset_without_images_is_told():
    some = Words(2, (4, 4), torch.uint8)
    with pytest.raises(NormcError, match="no images"):
        from_datasets(some, Words(0, (4, 4), torch.uint8))


SOME, LABELS = torch.rand(4, 1, 3, 3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    "parts, message",
    [
        ((SOME[0], LABELS, SOME, LABELS), "are .N, C, H, W"),
        ((SOME, LABELS[:3], SOME, LABELS), "with .3,."),
        ((SOME, LABELS, SOME, LABELS.view(4, 1)), "with .4, 1."),
        ((SOME[:0], LABELS[:0], SOME, LABELS), "are .N, C, H, W"),
        ((SOME, LABELS, SOME[..., :2], LABELS), r"judge with\s+.1, 3, 2."),
        ((SOME, LABELS, SOME.expand(4, 3, 3, 3), LABELS), r"judge with\s+.3, 3, 3."),
        ((SOME, LABELS - 1, SOME, LABELS), "from -1 to 2"),
        ((SOME, LABELS, SOME, LABELS + 1, 3), "from 0 to 3: expected 0 to 3"),
    ],
)
def test_what_are_no_images_is_told(parts, message):
    with pytest.raises(NormcError, match=message):
        Images.of(*parts)


def test_classes_may_be_more_than_those_seen():
    assert Images.of(SOME, LABELS, SOME, LABELS).classes == 3
    assert Images.of(SOME, LABELS, SOME, LABELS, 7).classes == 7
    short = LABELS.to(torch.uint8)
    assert Images.of(SOME, short, SOME, short).train_classes.dtype == torch.int64


def windows(image, size):
    """Every crop of an image, as it is and mirrored."""
    _, height, width = image.shape
    for top in range(height - size + 1):
        for left in range(width - size + 1):
            window = image[:, top : top + size, left : left + size]
            yield (top, left, False), window
            yield (top, left, True), window.flip(2)


def test_a_crop_is_a_window_or_its_mirror_image():
    images = torch.rand(40, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    whole = Images.of(images, torch.zeros(40), images, torch.zeros(40), crop=3)
    ready, places = whole.prepared(images), set()
    for seed in range(5):
        found, _ = whole.batch(torch.arange(40), torch.Generator().manual_seed(seed))
        assert found.shape == (40, 2, 3, 3) and found.is_contiguous()
        for image, crop in zip(ready, found, strict=True):
            fits = [place for place, w in windows(image, 3) if torch.equal(w, crop)]
            assert len(fits) == 1
            places.add(fits[0])
    assert len(places) == 3 * 4 * 2  # each of them comes up


def test_crops_follow_from_the_seed():
    images = torch.rand(8, 1, 6, 6)
    whole = Images.of(images, torch.zeros(8), images, torch.zeros(8), crop=4)

    def drawn(seed):
        return whole.batch(torch.arange(8), torch.Generator().manual_seed(seed))[0]

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_a_crop_larger_than_the_image_is_told():
    whole = Images.of(SOME, LABELS, SOME, LABELS, crop=4)
    with pytest.raises(NormcError, match="no crop of 4 pixels"):
        whole.batch(torch.arange(2), torch.Generator())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_each_channel_is_scaled_by_its_own(dtype):
    chance = torch.Generator().manual_seed(0)
    images = torch.stack([torch.randint(low, high, (50, 8, 8), generator=chance)
                          for low, high in ((0, 20), (100, 256), (7, 9))], 1).to(dtype)  # fmt: skip
    whole = Images.of(images, torch.zeros(50), images[:3], torch.zeros(3))
    ready = whole.prepared(images)
    assert ready.mean((0, 2, 3)).abs().max() < 1e-4
    assert (ready.std((0, 2, 3)) - 1).abs().max() < 1e-4
    assert torch.equal(whole.prepared(images[:3]), ready[:3])  # whatever else is in the batch


def test_a_channel_that_never_changes_is_finite():
    images = torch.full((4, 1, 3, 3), 5, dtype=torch.uint8)
    whole = Images.of(images, LABELS, images, LABELS)
    assert whole.prepared(images).isfinite().all()


def test_the_digest_is_that_of_the_content():
    def named(train=SOME, train_classes=LABELS, test=SOME, test_classes=LABELS):
        return Images.of(train, train_classes, test, test_classes, 3).digest

    other, classes = SOME.clone(), LABELS.clone()
    other[3, 0, 2, 2] += 1e-6
    classes[3] = 1
    changed = [
        named(train=other),
        named(train_classes=classes),
        named(test=other),
        named(test_classes=classes),
        named(train=SOME.double()),
        named(SOME.view(4, 3, 1, 3), LABELS, SOME.view(4, 3, 1, 3)),
    ]
    assert named() == named(SOME.clone()) and len({named(), *changed}) == 7
    turned = SOME.permute(0, 1, 3, 2)
    assert named(turned, test=turned) == named(turned.clone().contiguous(), test=turned)
