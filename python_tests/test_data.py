import io
import os
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cmd_ext import data, models

Image = pytest.importorskip("PIL.Image")

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def write_image(path, seed, width=8, height=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.fixture
def folder(tmp_path):
    """Two classes (one named like a split), three training and two test images each, one of them in a subfolder."""
    root = tmp_path / "images"
    for split, count in (("train", 3), ("test", 2)):
        for target, name in enumerate(("bird", "train")):
            for i in range(count):
                write_image(root / split / name / ("sub" if i == 1 else "") / f"{i}.png", seed=100 * target + i + count)
    (root / "train" / "bird" / "notes.txt").write_text("not an image")
    return root


def pack(folder, path, prefix="", mode="w"):
    """Members in reverse order, as no reader may rely on theirs."""
    with tarfile.open(path, mode) as archive:
        for member in sorted(folder.rglob("*"), reverse=True):
            archive.add(member, f"{prefix or '.'}/{member.relative_to(folder).as_posix()}", recursive=False)
    return path


def write_cifar(root, per_batch=2):
    """The pickles of torchvision's CIFAR-10 folder; returns the training pixels and labels in order."""
    root.mkdir(parents=True)
    names = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]
    (root / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))
    pixels, labels = [], []
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        batch = np.random.default_rng(i).integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        content = {b"data": batch, b"labels": [i, 9 - i][:per_batch], b"batch_label": b"x"}
        (root / name).write_bytes(pickle.dumps(content, protocol=2))
        if name != "test_batch":
            pixels.append(batch)
            labels += content[b"labels"]
    return torch.from_numpy(np.concatenate(pixels)).view(-1, 3, 32, 32), labels


def test_folder_items(folder):
    dataset = data.open_dataset(folder, "train", MEAN, STD)
    assert dataset.classes == ["bird", "train"]
    assert dataset.targets.tolist() == [0, 0, 0, 1, 1, 1]
    image, target = dataset[3]
    pixels = torch.from_numpy(np.array(Image.open(folder / "train" / "train" / "0.png"))).permute(2, 0, 1)
    expected = (pixels.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert (image.dtype, target) == (torch.float32, 1)
    torch.testing.assert_close(image, expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["", "cifar"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_tar_equals_folder(folder, tmp_path, prefix, split):
    from_folder = data.open_dataset(folder, split, MEAN, STD)
    from_tar = data.open_dataset(pack(folder, tmp_path / "x.tar", prefix), split, MEAN, STD)
    assert from_tar.classes == from_folder.classes
    assert torch.equal(from_tar.images, from_folder.images)
    assert torch.equal(from_tar.targets, from_folder.targets)


@pytest.mark.parametrize("packed", [False, True])
def test_val_stands_for_test(folder, tmp_path, packed):
    wanted = data.open_dataset(folder, "test", MEAN, STD).images
    (folder / "test").rename(folder / "val")
    path = pack(folder, tmp_path / "x.tar") if packed else folder
    for split in ("test", "val"):
        assert torch.equal(data.open_dataset(path, split, MEAN, STD).images, wanted)


def test_large_images_are_resized_and_cropped_as_pillow_does(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        write_image(tmp_path / "train" / name / "0.png", seed, width=100, height=70)
    dataset = data.open_dataset(tmp_path, "train", (0, 0, 0), (1, 1, 1), size=56)
    assert data.open_dataset(tmp_path, "train", MEAN, STD)[0][0].shape == (3, 224, 224)
    resized = Image.open(tmp_path / "train" / "b" / "0.png").resize((91, 64), Image.Resampling.BILINEAR)
    expected = np.array(resized.crop((17, 4, 17 + 56, 4 + 56)))
    image = (dataset[1][0] * 255).round().permute(1, 2, 0)
    assert (image - torch.from_numpy(expected)).abs().max() <= 1
    images, targets = next(iter(data.loader(dataset, 2, num_workers=0)))
    assert torch.equal(images[1], dataset[1][0])
    assert targets.tolist() == [0, 1]


def test_small_images_are_enlarged_on_request(folder):
    assert data.open_dataset(folder, "test", MEAN, STD, size=20)[0][0].shape == (3, 20, 20)


def test_small_images_of_several_sizes_become_224(folder):
    write_image(folder / "train" / "train" / "9.png", seed=0, width=9)
    assert data.open_dataset(folder, "train", MEAN, STD)[0][0].shape == (3, 224, 224)


def test_cifar_pickles(tmp_path):
    pixels, labels = write_cifar(tmp_path / "cifar-10-batches-py")
    for path in (tmp_path, tmp_path / "cifar-10-batches-py"):
        dataset = data.open_dataset(path, "train", MEAN, STD)
        assert torch.equal(dataset.images, pixels)
        assert dataset.targets.tolist() == labels
        assert dataset.classes == sorted(dataset.classes)
    assert len(data.open_dataset(tmp_path, "test", MEAN, STD)) == 2


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("key", ["data", "labels", "unused"])
def test_cifar_pickle_that_would_run_code_is_refused(tmp_path, key):
    root = tmp_path / "cifar-10-batches-py"
    write_cifar(root)
    content = {b"data": np.zeros((1, 3072), np.uint8), b"labels": [0], key.encode(): Malicious(str(tmp_path / "ran"))}
    (root / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=r"test_batch is refused .* asks for (posix|nt)\.mkdir"):
        data.open_dataset(tmp_path, "test", MEAN, STD)
    assert not (tmp_path / "ran").exists()


def test_broken_cifar_files(tmp_path):
    root = tmp_path / "cifar-10-batches-py"
    write_cifar(root)
    whole = (root / "test_batch").read_bytes()
    (root / "test_batch").write_bytes(whole[:-900])
    with pytest.raises(ValueError, match="test_batch is refused"):
        data.open_dataset(tmp_path, "test", MEAN, STD)
    content = {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}
    (root / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match="one label per image"):
        data.open_dataset(tmp_path, "test", MEAN, STD)
    (root / "test_batch").unlink()
    with pytest.raises(FileNotFoundError, match="test_batch is missing"):
        data.open_dataset(tmp_path, "test", MEAN, STD)


def test_bad_requests(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder or tar file at .*nowhere"):
        data.open_dataset(tmp_path / "nowhere", "train", MEAN, STD)
    with pytest.raises(ValueError, match="split must be one of train, test, val, got 'eval'"):
        data.open_dataset(folder, "eval", MEAN, STD)
    with pytest.raises(ValueError, match="std positive"):
        data.open_dataset(folder, "train", MEAN, (1, 1, 0))
    with pytest.raises(FileNotFoundError, match="has no folder train"):
        data.open_dataset(folder / "train" / "bird", "train", MEAN, STD)
    with pytest.raises(FileNotFoundError, match="has no folder test or val"):
        data.open_dataset(pack(folder / "train", tmp_path / "x.tar"), "test", MEAN, STD)
    with pytest.raises(ValueError, match="neither a folder nor an uncompressed tar"):
        data.open_dataset(pack(folder, tmp_path / "x.tar.gz", mode="w:gz"), "train", MEAN, STD)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        data.loader(data.open_dataset(folder, "train", MEAN, STD), 2, limit=0)


@pytest.mark.parametrize("packed", [False, True])
def test_empty_class_and_unreadable_image(folder, tmp_path, packed):
    def path():
        return pack(folder, tmp_path / "x.tar") if packed else folder

    (folder / "train" / "cat").mkdir()
    with pytest.raises(ValueError, match="class 'cat' has no images in split 'train'"):
        data.open_dataset(path(), "train", MEAN, STD)
    (folder / "train" / "cat" / "0.png").write_bytes((folder / "train" / "bird" / "0.png").read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"image .*cat.*0\.png cannot be read"):
        data.open_dataset(path(), "train", MEAN, STD)


def test_without_pillow(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"needs Pillow: pip install 'cmd_ext\[data\]'"):
        data.open_dataset(folder, "train", MEAN, STD)


def test_loader_gives_the_items_in_batches(folder):
    dataset = data.open_dataset(folder, "train", MEAN, STD)
    loader = data.loader(dataset, 4)
    plain = DataLoader(dataset, 4)
    assert len(loader) == 2
    assert len(loader.dataset) == 6
    assert loader.dataset.classes == dataset.classes
    for (images, targets), (wanted_images, wanted_targets) in zip(loader, plain, strict=True):
        assert (images.dtype, targets.dtype) == (torch.float32, torch.int64)
        assert torch.equal(images, wanted_images)
        assert torch.equal(targets, wanted_targets)


def test_loader_limit_keeps_the_shares_of_the_classes(folder):
    loader = data.loader(data.open_dataset(folder, "train", MEAN, STD), 8, limit=4)
    assert [targets.tolist() for _, targets in loader] == [[0, 0, 1, 1]]


def test_loader_permute_takes_the_front_of_a_permutation(folder):
    dataset = data.open_dataset(folder, "train", MEAN, STD)
    order = np.random.RandomState(3).permutation(len(dataset))
    for limit in (3, None):
        loader = data.loader(dataset, 2, limit=limit, permute=3)
        got = [target for _, targets in loader for target in targets.tolist()]
        assert got == dataset.targets[order[:limit].copy()].tolist()
        assert [batch.indices for batch in [loader.dataset]] == [order[:limit].tolist()]


def epoch(loader):
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([targets for _, targets in batches])


def test_restored_random_state_repeats_the_epoch(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-py")
    loader = data.loader(data.open_dataset(tmp_path, "train", MEAN, STD), 4, shuffle=True, augment=True)
    epoch(loader)
    state = torch.get_rng_state()
    images, targets = epoch(loader)
    other_images, other_targets = epoch(loader)
    torch.set_rng_state(state)
    again_images, again_targets = epoch(loader)
    assert torch.equal(images, again_images)
    assert torch.equal(targets, again_targets)
    assert not torch.equal(images, other_images)
    assert not torch.equal(targets, other_targets)


def test_seed_fixes_the_order(tmp_path):
    _, labels = write_cifar(tmp_path / "cifar-10-batches-py")
    dataset = data.open_dataset(tmp_path, "train", MEAN, STD)
    orders = []
    for _ in range(2):
        loader = data.loader(dataset, 4, shuffle=True, seed=3)
        orders.append([epoch(loader)[1].tolist() for _ in range(2)])
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[0][1]
    assert sorted(orders[0][0]) == sorted(labels)


def test_augmented_images_are_shifted_and_flipped_originals(tmp_path):
    pixels, _ = write_cifar(tmp_path / "cifar-10-batches-py")
    dataset = data.open_dataset(tmp_path, "train", (0, 0, 0), (1, 1, 1))
    padded = torch.nn.functional.pad(pixels[0], (4, 4, 4, 4))
    crops = {}
    for y in range(9):
        for x in range(9):
            crop = padded[:, y : y + 32, x : x + 32]
            crops[crop.numpy().tobytes()] = (y, x, False)
            crops[crop.flip(2).numpy().tobytes()] = (y, x, True)
    torch.manual_seed(0)
    images, _ = data.loader(dataset, 1, augment=True).dataset.__getitems__([0] * 300)
    seen = [crops[image.numpy().tobytes()] for image in (images * 255).round().byte()]
    assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(9))
    assert 100 < sum(flipped for _, _, flipped in seen) < 200


@pytest.mark.data
@pytest.mark.skipif("CMD_EXT_DATA" not in os.environ, reason="CMD_EXT_DATA is not set")
def test_pretrained_resnet20_on_the_real_test_images():
    root = Path(os.environ["CMD_EXT_DATA"])
    dataset = data.open_dataset(root / "cifar10.tar", "test", *models.NORMALIZATION["resnet20"])
    assert dataset.targets.bincount().tolist() == [1000] * 10
    with tarfile.open(root / "cifar10.tar") as archive:
        image = Image.open(io.BytesIO(archive.extractfile("test/airplane/0000.jpg").read()))
    assert np.array_equal(dataset.images[0].permute(1, 2, 0), np.array(image))
    model = models.load_weights(models.resnet20(), root / "pretrained" / "resnet20.safetensors").eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in data.loader(dataset, 250, limit=500))
    assert right / 500 > 0.75


@pytest.mark.data
@pytest.mark.skipif("CMD_EXT_DATA" not in os.environ, reason="CMD_EXT_DATA is not set")
@pytest.mark.parametrize("name", models.NORMALIZATION)
def test_pretrained_files_fit(name):
    models.load_weights(models.create(name), Path(os.environ["CMD_EXT_DATA"]) / "pretrained" / f"{name}.safetensors")
