"""What the notebooks of data cannot test: files of every kind, damage, caches, processes, the real sets where they are."""

import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vision_course.batches import Batches
from vision_course.cnn import small_cnn
from vision_course.core import CourseError
from vision_course.data import AUGMENTATIONS, Dataset, augmentation, channel_statistics, load, near_duplicates, shapes_dataset
from vision_course.images import to_rgb
from vision_course.readers import class_folders
from vision_course.splits import Split, image_hashes

ROOT = Path(__file__).parent.parent
CIFAR = ROOT / "data" / "cifar-10-batches-py"
TINY = ROOT / "data" / "tiny-imagenet-200"


def picture(seed, size=(24, 20)):
    """Coarse noise: different for every seed, and it survives a JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def write_classes(folder, count=10, names=("cat", "dog"), first=0):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(first + 1000 * number + i).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture
def own(tmp_path):
    return write_classes(tmp_path / "own")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def everything(data):
    return [data.train, data.valid, data.test]


def all_hashes(data):
    return {key for split in everything(data) for key in image_hashes(split.images)}


# Folders


def test_folder_is_split_80_10_10_by_class_and_seed(own, root):
    data = load(str(own), root, seed=0)
    assert [split.labels.bincount().tolist() for split in everything(data)] == [[8, 8], [1, 1], [1, 1]]
    assert data.classes == ("cat", "dog") and data.image_size == 64
    hashes = [set(image_hashes(split.images)) for split in everything(data)]
    assert len(set.union(*hashes)) == 20 == sum(map(len, hashes))
    assert load(str(own), root, seed=0).fingerprint == data.fingerprint != load(str(own), root, seed=1).fingerprint


def test_folder_with_its_own_sides(tmp_path, root):
    for i, side in enumerate(("train", "val", "test")):
        write_classes(tmp_path / "own" / side, count=4 - i, first=10_000 * i)
    data = load(str(tmp_path / "own"), root)
    assert [len(split) for split in everything(data)] == [8, 6, 4]


def test_sides_with_capital_letters_are_sides(tmp_path, root):
    for i, side in enumerate(("Training", "Testing")):
        write_classes(tmp_path / "own" / side, count=10 - i, first=10_000 * i)
    data = load(str(tmp_path / "own"), root)
    assert data.classes == ("cat", "dog") and len(data.test) == 18
    vehicles = load(str(write_classes(tmp_path / "vehicles", names=("Car", "Train"))), root)
    assert vehicles.classes == ("Car", "Train")


def test_hidden_folders_are_left_out_and_links_are_followed_once(own, tmp_path, root):
    picture(77).save(own / "cat" / "77.png")
    (own / "cat" / ".originals").mkdir()
    picture(78).save(own / "cat" / ".originals" / "78.png")
    (tmp_path / "elsewhere").mkdir()
    picture(79).save(tmp_path / "elsewhere" / "79.png")
    (own / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (own / "cat" / "round").symlink_to(own / "cat")
    assert sum(map(len, everything(load(str(own), root)))) == 22


def test_a_folder_that_nobody_may_read_is_named(own, root):
    inner = own / "cat" / "locked"
    inner.mkdir()
    inner.chmod(0)
    try:
        if os.access(inner, os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(CourseError) as error:
            load(str(own), root)
        assert f"{inner}: cannot be read" in line(error)
    finally:
        inner.chmod(0o700)


def test_a_channel_that_is_the_same_everywhere_can_be_normalised(tmp_path, root):
    for name in ("cells", "none"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(10):
            red, black = picture(i + 100 * (name == "none")).getchannel(0), Image.new("L", (24, 20))
            Image.merge("RGB", (red, black, black)).save(tmp_path / "own" / name / f"{i}.png")
    data = load(str(tmp_path / "own"), root)
    assert data.std[0] > 0.05 and data.std[1:] == pytest.approx((1 / 255,) * 2)
    assert torch.isfinite(small_cnn(data).eval()(data.train.images[:4] / 255)).all()


def test_copies_never_stand_on_two_sides(own, root):
    for i in range(10):
        shutil.copy(own / "cat" / "00.png", own / "cat" / f"copy{i}.png")
    shutil.copy(own / "cat" / "01.png", own / "dog" / "same_picture_other_label.png")
    for seed in range(5):
        data = load(str(own), root, seed=seed)
        hashes = [set(image_hashes(split.images)) for split in everything(data)]
        assert not (hashes[0] & hashes[1] or hashes[0] & hashes[2] or hashes[1] & hashes[2])
        assert data.notes["exact_duplicates"] == 11


def test_train_loses_what_stands_in_test(tmp_path, root):
    for i, side in enumerate(("train", "valid", "test")):
        write_classes(tmp_path / "own" / side, count=5, first=10_000 * i)
    shutil.copy(tmp_path / "own/train/cat/00.png", tmp_path / "own/test/cat/again.png")
    data = load(str(tmp_path / "own"), root)
    assert (len(data.train), len(data.test)) == (9, 11)
    assert data.notes["exact_duplicates"] == 1 and data.notes["removed_as_copies"] == 1


def test_a_class_whose_name_is_no_text_gets_one_that_is(tmp_path, root):
    write_classes(tmp_path / "own")
    try:
        os.rename(tmp_path / "own" / "cat", os.path.join(os.fsencode(tmp_path / "own"), b"caf\xe9"))
    except OSError:
        pytest.skip("this file system takes only names that are text")
    data = load(str(tmp_path / "own"), root)
    assert data.classes == ("caf\\xe9", "dog") and "".join(data.classes).encode()


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    with pytest.raises(CourseError, match="none: cannot be read"):
        class_folders(tmp_path / "none")


@pytest.mark.parametrize("mode, suffix", [
    ("RGB", "png"), ("L", "png"), ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("1", "png"), ("I;16", "png"), ("RGB", "jpg"),
    ("L", "jpeg"), ("CMYK", "jpg"), ("RGB", "webp"), ("RGBA", "webp"), ("RGB", "bmp"), ("P", "gif"), ("CMYK", "tiff"), ("F", "tif"), ("I;16", "tif"),
])
def test_every_kind_of_file_shows_the_same_picture(tmp_path, root, mode, suffix):
    own = write_classes(tmp_path / "own")
    half = Image.new("RGB", (40, 40), "white")
    half.paste("black", (0, 20, 40, 40))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(half.convert("L")).astype(np.uint16) * 257)
    else:
        image = half.convert(mode)
    image.save(own / "cat" / f"zz.{suffix.upper()}")
    data = load(str(own), root, image_size=16)
    found = torch.cat([split.images for split in everything(data)])
    expected = torch.tensor([255] * 7 + [0] * 7, dtype=torch.float32)
    rows = [*range(7), *range(9, 16)]  # without the edge, which is resampled
    differences = (found.float()[:, :, rows] - expected[:, None]).abs().amax((1, 2, 3))
    assert differences.min() <= 5  # JPEG is lossy


def test_palette_with_transparency_and_rotation(tmp_path, root):
    own = write_classes(tmp_path / "own")
    clear = Image.new("P", (20, 20), 0)
    clear.putpalette([255, 0, 0] + [0, 0, 255] * 255)
    clear.save(own / "cat" / "clear.png", transparency=0)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    half = Image.new("RGB", (40, 40), "black")
    half.paste("white", (0, 20, 40, 40))
    half.save(own / "dog" / "turned.jpg", exif=exif, quality=95)
    data = load(str(own), root, image_size=16)
    found = torch.cat([split.images for split in everything(data)]).float()
    assert (found == 255).flatten(1).all(1).sum() == 1
    top, bottom = found[:, :, :7].mean((1, 2, 3)), found[:, :, 9:].mean((1, 2, 3))
    assert ((top > 250) & (bottom < 5)).sum() == 1


# Caches


def count_decodings(monkeypatch):
    from vision_course import readers

    calls, decode = [], readers.decode
    monkeypatch.setattr(readers, "decode", lambda path, size: calls.append(path) or decode(path, size))
    return calls


def test_cache_is_used_and_notices_changes(own, root, monkeypatch):
    calls = count_decodings(monkeypatch)
    first = all_hashes(load(str(own), root, image_size=16))
    load(str(own), root, image_size=16)
    assert len(calls) == 20
    picture(99).save(own / "cat" / "00.png")
    changed = all_hashes(load(str(own), root, image_size=16))
    assert len(calls) == 40 and len(first - changed) == len(changed - first) == 1
    (own / "cat" / "01.png").unlink()
    assert sum(map(len, everything(load(str(own), root, image_size=16)))) == 19
    stored = sorted(path.suffix for path in (root / ".cache").iterdir() if not path.name.startswith("."))
    assert stored == [".json", ".npy"]  # what is out of date is gone
    assert all(path.suffix == ".png" for path in own.rglob("*") if path.is_file())


def test_a_run_killed_while_decoding_leaves_no_half_cache(own, root, monkeypatch):
    from vision_course import readers

    decode = readers.decode
    monkeypatch.setattr(readers, "decode", lambda path, size: (_ for _ in ()).throw(KeyboardInterrupt) if path.name == "07.png" else decode(path, size))
    with pytest.raises(KeyboardInterrupt):
        load(str(own), root)
    assert not list((root / ".cache").glob("*.npy")) and not list((root / ".cache").glob("*.partial"))
    monkeypatch.setattr(readers, "decode", decode)
    assert sum(map(len, everything(load(str(own), root)))) == 20


def test_larger_than_memory_streams_with_the_same_batches(own, root, monkeypatch):
    near = load(str(own), root, image_size=16)
    monkeypatch.setenv("VISION_COURSE_MEMORY_LIMIT", "0.000001")
    far = load(str(own), root, image_size=16)
    assert far.train.memory_mapped and not near.train.memory_mapped
    assert (far.fingerprint, far.mean, far.notes) == (near.fingerprint, near.mean, near.notes)
    for workers in (0, 2):
        pair = [Batches(data.train, 5, augmentation("flip+crop+cutout"), shuffle=True, seed=3) for data in (near, far)]
        pair[1].workers = workers
        for (images, labels), (same_images, same_labels) in zip(*pair, strict=True):
            assert torch.equal(images, same_images) and torch.equal(labels, same_labels)


@pytest.mark.parametrize("value", ["lots", "inf", "nan"])
def test_memory_limit_must_be_a_number(monkeypatch, own, root, value):
    monkeypatch.setenv("VISION_COURSE_MEMORY_LIMIT", value)
    with pytest.raises(CourseError, match=f"VISION_COURSE_MEMORY_LIMIT='{value}': not a number"):
        load(str(own), root)


def test_reading_from_the_disk_leaves_the_random_numbers_alone(own, root, monkeypatch):
    monkeypatch.setenv("VISION_COURSE_MEMORY_LIMIT", "0.000001")
    batches = Batches(load(str(own), root).train, 4)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert len(list(batches)) > 1 and torch.equal(torch.rand(3), expected)


# Bad input: one line that says what, where, what to do


def line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"GIF89a" + b[6:], lambda b: bytes(200)])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_damaged_image_is_named_or_left_out(own, root, damage, suffix):
    bad = own / "dog" / f"zz.{suffix}"
    picture(5, (200, 200)).save(bad)
    bad.write_bytes(damage(bad.read_bytes()))
    with pytest.raises(CourseError) as error:
        load(str(own), root)
    assert str(bad) in line(error) and "skip_bad" in line(error)
    data = load(str(own), root, skip_bad=True)
    assert data.notes["skipped"] == [str(bad)] and sum(map(len, everything(data))) == 20
    with pytest.raises(CourseError):
        load(str(own), root)  # the cache does not hide it


def test_empty_class_folder(own, root):
    (own / "empty").mkdir()
    (own / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(CourseError) as error:
        load(str(own), root)
    assert f"{own / 'empty'}: an empty class folder" in line(error)


def test_single_class_and_no_class(tmp_path, root):
    write_classes(tmp_path / "one", names=("cat",))
    with pytest.raises(CourseError, match=r"one: a single class \(cat\)"):
        load(str(tmp_path / "one"), root)
    (tmp_path / "none").mkdir()
    with pytest.raises(CourseError, match="none: no class folders"):
        load(str(tmp_path / "none"), root)


def test_too_few_images(tmp_path, root):
    write_classes(tmp_path / "own", count=2)
    with pytest.raises(CourseError, match="class 'cat': 2 different training images are too few; at least 3 are needed"):
        load(str(tmp_path / "own"), root)


def test_class_that_train_lacks(tmp_path, root):
    write_classes(tmp_path / "own" / "train")
    write_classes(tmp_path / "own" / "test", names=("cat", "fish"), first=500)
    with pytest.raises(CourseError, match="fish: a class that .*train does not have"):
        load(str(tmp_path / "own"), root)


@pytest.mark.parametrize("name, hint", [("cifar", "Did you mean cifar10"), ("shape", "Did you mean shapes"), ("/no/where", "Choose shapes, cifar10"), ("", "Choose shapes")])
def test_unknown_name(name, hint):
    with pytest.raises(CourseError) as error:
        load(name)
    assert hint in line(error)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"image_size": 4}, {"image_size": 1000}])
def test_parameters_out_of_range(wrong):
    with pytest.raises(CourseError, match="must be"):
        load("shapes", **wrong)


def test_unwritable_cache(own, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CourseError) as error:
        load(str(own), tmp_path / "file")
    assert "cannot be made" in line(error) or "cannot be written" in line(error)


@pytest.mark.parametrize("name, place", [("cifar10", "cifar-10-batches-py"), ("fashion_mnist", "FashionMNIST"), ("tiny_imagenet", "tiny-imagenet-200")])
def test_missing_files_without_a_network(name, place, root, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(socket.gaierror("no network")))
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    import torchvision  # noqa: F401  its import is not what is timed

    start = time.perf_counter()
    with pytest.raises(CourseError) as error:
        load(name, root)
    assert place in line(error) and ("Put the" in line(error) or "Unpack" in line(error))
    assert time.perf_counter() - start < 20  # no retries


# The known sets


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_tampered_cifar10_is_refused_and_never_unpickled(root, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CourseError) as error:
        load("cifar10", root)
    assert "data_batch_1: is not the official file" in line(error) and not (tmp_path / "exploded").exists()


@pytest.mark.skipif(not CIFAR.exists(), reason="CIFAR-10 is not in data/")
def test_cifar10():
    data = load("cifar10", ROOT / "data")
    assert [len(split) for split in everything(data)] == [45_000, 5_000, 10_000]
    assert all(set(split.labels.bincount().tolist()) == {len(split) // 10} for split in everything(data))
    assert data.classes[:2] == ("airplane", "automobile") and data.image_size == 32
    assert data.notes["exact_duplicates"] == 0 and 100 < data.notes["near_duplicates"] < 400
    mean, std = channel_statistics(torch.cat([data.train.images, data.valid.images]))
    assert np.allclose(mean, (0.4914, 0.4822, 0.4465), atol=1e-4) and np.allclose(std, (0.2470, 0.2435, 0.2616), atol=1e-4)


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.fixture
def fashion(root):
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, count in (("train", 600), ("t10k", 100)):
        write_idx(folder / f"{name}-images-idx3-ubyte", draw.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{name}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    return folder


def test_fashion_mnist(fashion, root):
    data = load("fashion_mnist", root)
    assert [len(split) for split in everything(data)] == [550, 50, 100]
    assert torch.equal(data.train.images[:, 0], data.train.images[:, 2]) and data.train.images.shape[1:] == (3, 28, 28)
    raw = (fashion / "t10k-images-idx3-ubyte").read_bytes()[16:]
    assert data.test.images[:, 0].numpy().tobytes() == raw
    assert load("fashion_mnist", root, image_size=32).image_size == 32


def test_truncated_fashion_mnist(fashion, root):
    file = fashion / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CourseError, match="a file is damaged"):
        load("fashion_mnist", root)


@pytest.fixture
def tiny(root):
    folder = root / "tiny-imagenet-200"
    for number, code in enumerate(("n01", "n02", "n03")):
        (folder / "train" / code / "images").mkdir(parents=True)
        for i in range(10):
            picture(100 * number + i, (64, 64)).save(folder / "train" / code / "images" / f"{code}_{i}.JPEG")
    (folder / "val" / "images").mkdir(parents=True)
    rows = []
    for i in range(6):
        picture(9000 + i, (64, 64)).convert("L" if i else "RGB").save(folder / "val" / "images" / f"val_{i}.JPEG")
        rows.append(f"val_{i}.JPEG\tn0{i % 3 + 1}\t0\t0\t9\t9\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    (folder / "words.txt").write_text("n01\tcrane, a bird\nn02\tcrane, a machine\nn03\tgoldfish, Carassius auratus\n")
    return folder


def test_tiny_imagenet_layout(tiny, root):
    data = load("tiny_imagenet", root)
    assert data.classes == ("crane (n01)", "crane (n02)", "goldfish")
    assert [len(split) for split in everything(data)] == [27, 3, 6]
    assert data.image_size == 64
    files = [tiny / "val" / "images" / f"val_{i}.JPEG" for i in range(6)]
    sums = {int(np.asarray(Image.open(file).convert("RGB")).astype(int).sum()): i % 3 for i, file in enumerate(files)}
    assert len(sums) == 6 and dict(zip(data.test.images.long().sum((1, 2, 3)).tolist(), data.test.labels.tolist())) == sums


def test_a_picture_of_floats_is_read_by_its_range():
    for top in (1.0, 255.0, 65535.0):
        made = to_rgb(Image.fromarray(np.array([[0.0, 0.2, 1.0]], np.float32) * top))
        assert np.asarray(made)[0, :, 0].tolist() == [0, 51, 255], top


def test_any_part_of_a_folder_has_images_of_many_classes(root, tmp_path):
    for k in range(5):
        (tmp_path / "own" / f"class {k}").mkdir(parents=True)
        for i in range(20):
            picture(100 * k + i, (16, 16)).save(tmp_path / "own" / f"class {k}" / f"{i}.png")
    data = load(str(tmp_path / "own"), root, image_size=16)
    assert all(len(split.labels[:10].unique()) > 2 for split in everything(data))
    again = load(str(tmp_path / "own"), root, image_size=16)
    assert torch.equal(data.train.images, again.train.images) and data.fingerprint == again.fingerprint


def test_tiny_imagenet_without_its_words_says_so(tiny, root):
    assert "class_names" not in load("tiny_imagenet", root).notes
    (tiny / "words.txt").unlink()
    data = load("tiny_imagenet", root)
    assert "words.txt is not there" in data.notes["class_names"] and data.classes[0].startswith("n")


def test_tiny_imagenet_with_annotations_cut_short(tiny, root):
    annotations = tiny / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text() + "val_99")
    with pytest.raises(CourseError, match="val_annotations.txt: a line does not say which class"):
        load("tiny_imagenet", root)


def test_tiny_imagenet_with_a_missing_image(tiny, root):
    (tiny / "val" / "images" / "val_3.JPEG").unlink()
    with pytest.raises(CourseError, match="val_3.JPEG: named in val_annotations.txt but not there"):
        load("tiny_imagenet", root)


# Shapes, near-duplicates, batches


@pytest.mark.usefixtures("shapes_elsewhere")
def test_shapes_and_their_shortcut():
    plain, tagged = shapes_dataset(seed=1), shapes_dataset(seed=1, shortcut=True)
    assert [len(split) for split in everything(plain)] == [8_000, 1_000, 2_000]
    assert plain.fingerprint == load("shapes", seed=1).fingerprint != tagged.fingerprint
    assert torch.equal(plain.test.images, tagged.test.images) and torch.equal(plain.valid.images, tagged.valid.images)
    assert tagged.train.tags.any((1, 2)).all() and not plain.train.tags.any() and not tagged.test.tags.any()
    assert plain.notes["near_duplicates"] <= 5


def test_a_study_of_many_classes_takes_few_and_numbers_them_anew():
    def split(each):  # an image's first byte is its class
        labels = torch.arange(50).repeat(each)
        return Split(labels.byte()[:, None, None, None].expand(-1, 3, 16, 16).contiguous(), labels)

    names = tuple(f"class {k}" for k in range(50))
    data = Dataset("many", names, split(40), split(8), split(2), (0.5,) * 3, (0.2,) * 3, "many")
    part = data.study(200, 60, seed=3)
    assert len(part.classes) == 20 and {"class 0", "class 49"} <= set(part.classes)
    for some, count in ((part.train, 200), (part.valid, 60), (part.test, 40)):
        assert some.labels.bincount().tolist() == [count // 20] * 20
        assert [part.classes[k] for k in some.labels] == [f"class {k}" for k in some.images[:, 0, 0, 0].tolist()]
    marks = {data.study(*wanted).fingerprint for wanted in ((200, 60, 3), (200, 60, 4), (100, 60, 3), (200, 60, 3, 10))}
    assert len(marks) == 4 and part.fingerprint in marks and data.fingerprint not in marks
    few, whole = data.study(100, 60, 3, classes=50), data.smaller(100, 3)
    assert few.fingerprint == whole.fingerprint and few.classes == names and few.test is data.test
    assert torch.equal(few.train.images, whole.train.images) and torch.equal(few.train.labels, whole.train.labels)


@pytest.mark.usefixtures("shapes_elsewhere")
def test_planted_near_duplicates_are_found_and_nothing_else():
    images = load("shapes", seed=2).valid.images
    copies = (images[:100].float() * 0.9 + 12).round().byte()
    rows, found = near_duplicates(copies, images)
    assert len(rows) >= 98 and torch.equal(rows, found)
    assert len(near_duplicates(images[:300], images[300:])[0]) <= 2


def test_batches_are_the_same_in_another_process_and_on_any_number_of_threads(tmp_path):
    code = """
import hashlib, sys, torch
torch.set_num_threads(int(sys.argv[1]))
from vision_course.batches import Batches
from vision_course.data import augmentation
from vision_course.splits import Split
images = (torch.arange(40 * 3 * 32 * 32) % 251).byte().view(40, 3, 32, 32).contiguous(memory_format=torch.channels_last)
batches = Batches(Split(images, torch.arange(40)), 16, augmentation("flip+crop+cutout+erasing+quarter_turns"), shuffle=True, seed=5)
batches.epoch = 2
print(hashlib.sha256(b"".join(x.numpy().tobytes() + y.numpy().tobytes() for x, y in batches)).hexdigest())
"""
    prints = {subprocess.run([sys.executable, "-c", code, n], capture_output=True, text=True, check=True).stdout for n in ("1", "2")}
    assert len(prints) == 1


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "alternate"])
def test_augmentations_draw_for_each_image_and_keep_the_input(name):
    image = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    images = image.expand(64, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    before, step = images.clone(), augmentation(name)
    out = step(images, torch.Generator().manual_seed(1))
    assert torch.equal(images, before) and out.shape == images.shape and 0 <= out.min() and out.max() <= 1
    assert len(out.flatten(1).unique(dim=0)) > 1
    assert torch.equal(out, step(images, torch.Generator().manual_seed(1)))
    whole = step((images * 255).byte(), torch.Generator().manual_seed(1))
    whole = whole if whole.is_floating_point() else whole.float() / 255
    assert (whole - out).abs().mean() < 0.02  # bytes and floats give the same picture


@pytest.mark.parametrize(("name", "farthest"), [("shift", 2), ("crop", 4)])
def test_shifts_go_as_far_as_they_say_and_no_farther(name, farthest):
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 16, 16] = 1
    moved = augmentation(name)(image.expand(400, -1, -1, -1), torch.Generator().manual_seed(0))
    down, right = (moved[:, 0] == 1).nonzero()[:, 1:].sub(16).T
    assert len(down) == 400 and set(down.tolist()) == set(right.tolist()) == set(range(-farthest, farthest + 1))


@pytest.mark.usefixtures("shapes_elsewhere")
def test_two_processes_see_what_one_would():
    data = load("shapes", seed=3).valid
    batches = [Batches(data, 64, augmentation("flip+crop+zoom+randaugment"), shuffle=True, seed=1) for _ in range(3)]
    batches[1].shard, batches[2].shard = (0, 2), (1, 2)
    for (whole, labels), (first, first_labels), (second, second_labels) in zip(*batches, strict=True):
        assert torch.equal(labels, torch.cat([first_labels, second_labels]))
        assert torch.allclose(whole, torch.cat([first, second]), atol=1e-6)
