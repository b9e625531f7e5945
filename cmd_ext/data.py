"""Image-classification data for the command line, tests and benches: class folders, tars of them, CIFAR-10 pickles."""

from __future__ import annotations

import _codecs
import io
import math
import os
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

_SPLITS = {"train": ("train",), "test": ("test", "val"), "val": ("val", "test")}
_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_MAX_IN_MEMORY_SIDE = 64
_CIFAR_FOLDER = "cifar-10-batches-py"


class _File(NamedTuple):
    """One encoded image: `length` bytes of the file `path` from `offset` on, the whole file where length is -1."""

    name: str
    path: str
    offset: int = 0
    length: int = -1

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


class ImageDataset(Dataset):
    """Labelled RGB images; item i is (float32 [3, h, w] normalised, int target).

    Attributes:
        classes: class names in alphabetical order; a target is an index into them.
        targets: int64 [n].
    """

    def __init__(
        self, targets: Tensor, classes: list[str], mean: Sequence[float], std: Sequence[float], size: int | None
    ) -> None:
        self.targets = targets
        self.classes = classes
        self.size = size
        deviation = torch.tensor(std, dtype=torch.float32).view(3, 1, 1)
        self._scale = 1 / (255 * deviation)
        self._shift = -torch.tensor(mean, dtype=torch.float32).view(3, 1, 1) / deviation

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        return self.normalize(self.pixels([index]))[0], int(self.targets[index])

    def pixels(self, indices: list[int]) -> Tensor:
        """The images at `indices` as uint8 [b, 3, h, w]."""
        raise NotImplementedError

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 [b, 3, h, w] -> float32, (x / 255 - mean) / std."""
        return pixels.float().mul_(self._scale).add_(self._shift)


class _InMemory(ImageDataset):
    """Decoded once: `images` is uint8 [n, 3, h, w]."""

    def __init__(self, images: Tensor, *args: object) -> None:
        super().__init__(*args)
        self.images = images

    def pixels(self, indices: list[int]) -> Tensor:
        pixels = self.images.index_select(0, torch.tensor(indices, dtype=torch.int64))
        return pixels if self.size is None else _fit(pixels, self.size)


class _OnDisk(ImageDataset):
    """Decoded at each access, resized and cropped to [3, size, size]."""

    def __init__(self, files: list[_File], *args: object) -> None:
        super().__init__(*args)
        self.files = files

    def pixels(self, indices: list[int]) -> Tensor:
        return torch.cat([_fit(_decode(self.files[index])[None], self.size) for index in indices])


class _Batches(Dataset):
    """View of a dataset that gives a DataLoader whole batches: one gather, one augmentation, one normalisation."""

    def __init__(self, images: ImageDataset, indices: Sequence[int], augment: bool) -> None:
        self.images = images
        self.indices = indices
        self.augment = augment
        self.classes = images.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, targets = self.__getitems__([index])
        return images[0], int(targets[0])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        indices = [self.indices[index] for index in indices]
        pixels = self.images.pixels(indices)
        if self.augment:
            pixels = _augment(pixels)
        return self.images.normalize(pixels), self.images.targets[indices]


def open_dataset(
    path: str | os.PathLike[str], split: str, mean: Sequence[float], std: Sequence[float], size: int | None = None
) -> ImageDataset:
    """Open one split of an image-classification dataset.

    Args:
        path: a folder with `train/` and `test/` (or `val/`) of class folders; an uncompressed tar of one, possibly
            below one top folder; or a folder that holds (or is) torchvision's `cifar-10-batches-py`.
        split: "train", "test" or "val"; the last two stand for each other where only one exists.
        mean: 3 numbers, on pixels scaled to 0..1.
        std: 3 positive numbers, on the same scale.
        size: side of the square images in pixels: the shorter side is resized to size * 256 / 224, then the centre is
            cropped. None: images of one common size up to 64x64 stay as they are, all others become 224.

    Returns:
        A dataset of (float32 [3, h, w], int). Images of one common size up to 64x64 are held in memory as uint8,
        others are read and decoded at each access.

    Raises:
        FileNotFoundError: nothing at `path`, or no such split in it.
        ValueError: unknown split, bad mean, std or size, no classes, a class without images, an unreadable file.
        ImportError: Pillow is missing (class folders and tars need it).
    """
    if split not in _SPLITS:
        raise ValueError(f"open_dataset: split must be one of {', '.join(_SPLITS)}, got {split!r}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"open_dataset: mean and std must be 3 numbers, std positive, got {mean} and {std}")
    if size is not None and size < 1:
        raise ValueError(f"open_dataset: size must be at least 1, got {size}")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"open_dataset: no folder or tar file at {path}")
    cifar = path if path.name == _CIFAR_FOLDER else path / _CIFAR_FOLDER
    if cifar.is_dir():
        images, targets, classes = _read_cifar(cifar, split)
        return _InMemory(images, targets, classes, mean, std, size)
    by_class = _folder_files(path, split) if path.is_dir() else _tar_files(path, split)
    empty = [name for name, files in by_class.items() if not files]
    if empty or not by_class:
        what = f"class {empty[0]!r} has no images" if empty else "no class folders"
        raise ValueError(f"open_dataset: {what} in split {split!r} of {path}")
    classes = sorted(by_class)
    files = [file for name in classes for file in sorted(by_class[name])]
    targets = torch.tensor([target for target, name in enumerate(classes) for _ in by_class[name]])
    images = _decode_small(files)
    if images is None:
        return _OnDisk(files, targets, classes, mean, std, size or 224)
    return _InMemory(images, targets, classes, mean, std, size)


def loader(
    dataset: ImageDataset,
    batch_size: int,
    *,
    shuffle: bool = False,
    augment: bool = False,
    seed: int | None = None,
    limit: int | None = None,
    permute: int | None = None,
    num_workers: int | None = None,
) -> DataLoader:
    """Batches of a dataset of this module.

    Everything random comes from torch's global generator (the order from its own one if `seed` is given), so restoring
    the generator's state before an epoch repeats that epoch exactly.

    Args:
        dataset: what `open_dataset` returned.
        batch_size: images per batch; the last batch may be smaller.
        shuffle: new order each epoch.
        augment: random crop after padding with an eighth of the side (4 pixels at 32), and horizontal flip.
        seed: seed of the order.
        limit: use this many images, evenly spaced over the dataset, so that classes keep their shares.
        permute: take them (all, without a limit) from the front of the permutation of the dataset that numpy's
            RandomState gives for this seed instead: a random sample that does not change from epoch to epoch.
        num_workers: decoding processes; None: none for images in memory, else up to 4.

    Returns:
        A DataLoader of (float32 [b, 3, h, w], int64 [b]); its `dataset` has the same `classes`.

    Raises:
        ValueError: limit below 1.
    """
    count = len(dataset)
    if limit is not None and limit < 1:
        raise ValueError(f"loader: limit must be at least 1, got {limit}")
    used = count if limit is None else min(limit, count)
    if num_workers is None:
        num_workers = 0 if isinstance(dataset, _InMemory) else min(4, os.cpu_count() or 1)
    return DataLoader(
        _Batches(dataset, _chosen(count, used, permute), augment),
        batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        collate_fn=_unchanged,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
    )


def _chosen(count: int, used: int, permute: int | None) -> list[int]:
    if permute is None:
        return [i * count // used for i in range(used)]
    return np.random.RandomState(permute).permutation(count)[:used].tolist()


def _unchanged(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def _augment(pixels: Tensor) -> Tensor:
    batch, _, height, width = pixels.shape
    pad_y, pad_x = math.ceil(height / 8), math.ceil(width / 8)
    windows = F.pad(pixels, (pad_x, pad_x, pad_y, pad_y)).unfold(2, height, 1).unfold(3, width, 1)
    y, x = torch.randint(2 * pad_y + 1, (batch,)), torch.randint(2 * pad_x + 1, (batch,))
    cropped = windows[torch.arange(batch), :, y, x]
    flip = torch.rand(batch, 1, 1, 1) < 0.5
    return torch.where(flip, cropped.flip(3), cropped)


def _fit(pixels: Tensor, size: int) -> Tensor:
    """uint8 [b, 3, h, w] -> [b, 3, size, size]."""
    height, width = pixels.shape[2:]
    if height == width == size:
        return pixels
    short = size * 256 // 224
    height, width = (max(size, short * side // min(height, width)) for side in (height, width))
    pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[:, :, top : top + size, left : left + size]


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading image files needs Pillow: pip install 'cmd_ext[data]'") from error
    return Image


def _decode(file: _File) -> Tensor:
    """uint8 [3, h, w] of one image file."""
    pillow = _pillow()
    try:
        with pillow.open(io.BytesIO(file.read())) as image:
            rgb = image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
        raise ValueError(f"image {file.name} cannot be read: {error}") from error
    return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3).permute(2, 0, 1)


def _decode_small(files: list[_File]) -> Tensor | None:
    """uint8 [n, 3, h, w], or None at the first image that is large or not of the first one's size."""
    first = _decode(files[0])
    if max(first.shape[1:]) > _MAX_IN_MEMORY_SIDE:
        return None
    images = first.new_empty(len(files), *first.shape)
    for i, file in enumerate(files):
        image = _decode(file)
        if image.shape != first.shape:
            return None
        images[i] = image
    return images


def _is_image(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")


def _folder_files(root: Path, split: str) -> dict[str, list[_File]]:
    found = next((root / name for name in _SPLITS[split] if (root / name).is_dir()), None)
    if found is None:
        raise FileNotFoundError(f"open_dataset: {root} has no folder {' or '.join(_SPLITS[split])}")
    return {
        entry.name: [
            _File(os.path.join(folder, name), os.path.join(folder, name))
            for folder, _, names in os.walk(entry.path, followlinks=True)
            for name in names
            if _is_image(name)
        ]
        for entry in os.scandir(found)
        if entry.is_dir() and not entry.name.startswith(".")
    }


def _tar_files(path: Path, split: str) -> dict[str, list[_File]]:
    """Positions of the images inside the tar, so that each is read without unpacking and from any process."""
    splits: dict[str, dict[str, list[_File]]] = {name: {} for name in _SPLITS[split]}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                if len(parts) > 1 and parts[0] not in _SPLITS:
                    del parts[0]
                if len(parts) < 3 - member.isdir() or parts[0] not in splits or parts[1].startswith("."):
                    continue
                files = splits[parts[0]].setdefault(parts[1], [])
                if member.isfile() and _is_image(parts[-1]):
                    files.append(_File(member.name, str(path), member.offset_data, member.size))
    except tarfile.TarError as error:
        raise ValueError(f"open_dataset: {path} is neither a folder nor an uncompressed tar: {error}") from error
    found = next((splits[name] for name in _SPLITS[split] if splits[name]), None)
    if found is None:
        raise FileNotFoundError(f"open_dataset: {path} has no folder {' or '.join(_SPLITS[split])}")
    return found


class _PickledArray:
    """Stands for a numpy array while unpickling; keeps the raw bytes."""

    def __init__(self, *_: object) -> None:
        self.data = b""

    def __setstate__(self, state: tuple) -> None:
        self.data = state[-1]


class _PickledType:
    """Stands for a numpy dtype while unpickling; CIFAR-10 has uint8 only."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple) -> None:
        pass


_PICKLED = {
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledType,
    ("_codecs", "encode"): _codecs.encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds dicts, lists, bytes and stand-ins for arrays; refuses every other name, so no file can run code."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _PICKLED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _PICKLED[module, name]


def _read_pickle(path: Path, *keys: bytes) -> list:
    try:
        with open(path, "rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
        return [content[key] for key in keys]
    except FileNotFoundError:
        raise FileNotFoundError(f"open_dataset: {path} is missing") from None
    except Exception as error:  # pickle raises whatever the broken bytes lead it to
        raise ValueError(f"open_dataset: {path} is refused as a CIFAR-10 file: {error!r}") from error


def _read_cifar(folder: Path, split: str) -> tuple[Tensor, Tensor, list[str]]:
    """(images uint8 [n, 3, 32, 32], targets int64 [n], classes)."""
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    (labels,) = _read_pickle(folder / "batches.meta", b"label_names")
    classes = [label.decode() for label in labels]
    pixels, targets = bytearray(), []
    for name in names:
        array, batch_targets = _read_pickle(folder / name, b"data", b"labels")
        if len(array.data) != 3072 * len(batch_targets) or not all(0 <= t < len(classes) for t in batch_targets):
            raise ValueError(f"open_dataset: {folder / name} must hold 3072 bytes and one label per image")
        pixels += array.data
        targets += batch_targets
    return torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 3, 32, 32), torch.tensor(targets), classes
