"""The predictor: light, the same as in training, the same every time, and calm about whatever it is given."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import bomb, colour_model, file_of, mutated
from PIL import Image

from vision_course.files import CourseError
from vision_course.images import FORMATS, ImageError, read_image

pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed (extra serve)")
from vision_course.predictor import Predictor, answer, describe_images, format_text, list_images, write_triton_repository  # noqa: E402

MUTATIONS = int(os.environ.get("VISION_COURSE_MUTATIONS", 500))


@pytest.fixture
def model(tmp_path):
    return Predictor(colour_model(tmp_path / "colours.onnx"))


def photo(width=90, height=60, seed=0):
    """Something with edges, colours and noise."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    ramp = np.linspace(0, 180, width)[None, :, None] * [1, 0.5, 0] + np.linspace(0, 150, height)[:, None, None] * [0, 0.3, 1]
    return Image.fromarray((noise + ramp).astype(np.uint8))


def every_kind():
    """(name, bytes) of image files of every kind that people have."""
    picture = photo()
    clear = picture.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(picture.size))
    palette = picture.quantize(32)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        yield f"{mode}.png", file_of(clear.convert(mode) if mode != "P" else palette)
    yield "clear.png", file_of(palette, transparency=3)
    yield "deep.png", file_of(Image.fromarray(np.asarray(picture.convert("L"), np.uint16) * 257))
    for mode in ("L", "RGB", "CMYK", "YCbCr"):
        yield f"{mode}.jpg", file_of(picture.convert(mode), "JPEG")
    yield "large.jpg", file_of(photo(1500, 1100), "JPEG")
    for turn in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        yield f"turned{turn}.jpg", file_of(picture, "JPEG", exif=exif)
    for kind in ("WEBP", "GIF", "BMP", "TIFF"):
        yield f"plain.{kind.lower()}", file_of(picture, kind)
    for mode in ("I", "F", "CMYK"):
        yield f"{mode}.tiff", file_of(picture.convert("L").convert(mode), "TIFF")
    yield "film.gif", file_of(picture, "GIF", save_all=True, append_images=[photo(seed=1)])
    yield "film.webp", file_of(picture, "WEBP", save_all=True, append_images=[photo(seed=1)])
    yield "film.png", file_of(picture, "PNG", save_all=True, append_images=[photo(seed=1)])
    yield "pages.tiff", file_of(picture, "TIFF", save_all=True, append_images=[photo(seed=1)])
    yield "narrow.png", file_of(photo(200, 3))
    yield "dot.png", file_of(photo(1, 1))


def test_it_needs_three_packages_and_starts_within_a_second(tmp_path):
    colour_model(tmp_path / "colours.onnx")
    photo().save(tmp_path / "photo.png")
    code = """
import sys, time
start = time.process_time()  # other work on the machine does not count
from vision_course.predictor import Predictor, describe_images, format_text
print(format_text(describe_images(Predictor("colours.onnx"), ["photo.png"])))
print(*sorted({name.partition(".")[0] for name in sys.modules}))
print(time.process_time() - start)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    settings = {"cwd": tmp_path, "capture_output": True, "text": True, "check": True, "env": environment}
    runs = [subprocess.run([sys.executable, "-c", code], **settings).stdout.splitlines() for _ in range(3)]
    assert runs[0][0] == runs[1][0] == runs[2][0] and "90% set" in runs[0][0]
    loaded = set(runs[0][1].split())
    assert {"numpy", "onnxruntime", "PIL"} <= loaded
    assert not loaded & {"torch", "torchvision", "pandas", "matplotlib", "accelerate", "fastapi", "typer", "tqdm", "filelock"}, loaded
    assert min(float(run[2]) for run in runs) < 1, runs


@pytest.mark.parametrize("name, content", list(every_kind()), ids=lambda value: value if isinstance(value, str) else "")
def test_reads_what_the_readers_of_training_read(tmp_path, name, content):
    from vision_course.readers import read_folder

    for label in ("a", "b"):
        (tmp_path / "set" / label).mkdir(parents=True)
        (tmp_path / "set" / label / name).write_bytes(content)
    trained_on = read_folder(tmp_path / "set", tmp_path / "cache", 20).images[0].permute(1, 2, 0).numpy()
    for source in (content, tmp_path / "set" / "a" / name):
        notes = []
        pixels = read_image(source, 20, notes)
        assert pixels.dtype == np.uint8 and np.array_equal(pixels, trained_on)
        assert len(notes) == (name.startswith(("film", "pages"))), notes
    if notes:
        assert notes[0] == ("several pages: the first was used" if "tiff" in name else "animated: the first frame was used")
        assert np.abs(pixels.astype(int) - read_image(file_of(photo()), 20)).mean() < 12  # the first, not the second


BAD = {
    "nothing": (b"", "is empty"),
    "text": (b"There is no picture in here.\n" * 40, "is not an image"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
    "half a PNG": (file_of(photo())[:3000], "damaged or cut short"),
    "half a JPEG": (file_of(photo(), "JPEG")[:700], "damaged or cut short"),
    "half a GIF": (file_of(photo(), "GIF")[:2000], "damaged or cut short"),
    "half a WebP": (file_of(photo(), "WEBP")[:700], "is not an image|damaged or cut short"),
    "half a TIFF": (file_of(photo(), "TIFF")[:700], "is not an image|damaged or cut short"),
    "a bomb": (bomb(), r"has 900,000,000 pixels; at most 50,000,000 are read"),
    "a smaller bomb": (bomb(9_000), r"has 9,000 × 9,000 pixels; at most 50,000,000 are read"),
}


@pytest.mark.parametrize("content, words", BAD.values(), ids=BAD)
@pytest.mark.filterwarnings("ignore")
def test_a_bad_file_is_one_clear_line(model, tmp_path, content, words):
    (tmp_path / "bad.png").write_bytes(content)
    before = psutil.Process().memory_info().rss
    for source in (content, tmp_path / "bad.png"):
        with pytest.raises(ImageError, match=words) as caught:
            read_image(source, 16)
        assert "\n" not in str(caught.value)
    rows = describe_images(model, [tmp_path / "bad.png"])
    assert re.search(words, rows[0]["error"]) and rows[0]["error"].startswith(f"{tmp_path / 'bad.png'}: ")
    assert psutil.Process().memory_info().rss - before < 60e6


def test_the_bomb_is_what_it_says():
    assert 80_000 < len(bomb()) < 160_000
    Image.MAX_IMAGE_PIXELS, limit = None, Image.MAX_IMAGE_PIXELS
    try:
        from io import BytesIO

        with Image.open(BytesIO(bomb(3_000))) as small:
            assert small.size == (3000, 3000) and small.convert("L").getextrema() == (255, 255)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@pytest.mark.filterwarnings("ignore")
def test_random_damage_ends_in_an_answer_or_in_one_line(model):
    generator, outcomes = np.random.default_rng(0), {"answered": 0, "refused": 0}
    odd = dict(every_kind())
    files = [file_of(photo(), kind) for kind in FORMATS] + [odd[name] for name in ("film.gif", "film.webp", "P.png", "deep.png")]
    for number in range(MUTATIONS):
        content = mutated(files[number % len(files)], generator)
        try:
            pixels = read_image(content, 16, notes := [])
            assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8 and all(isinstance(note, str) for note in notes)
            outcomes["answered"] += 1
        except ImageError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
            outcomes["refused"] += 1
    assert min(outcomes.values()) > MUTATIONS / 20, outcomes


def test_the_same_picture_gets_the_same_bytes_in_any_company(model, tmp_path):
    for seed in range(5):
        photo(seed=seed).save(tmp_path / f"{seed}.png")
    alone = json.dumps(describe_images(model, [tmp_path / "3.png"])[0])
    assert json.dumps(describe_images(model, list_images([tmp_path]))[3]) == alone == json.dumps(describe_images(model, [tmp_path / "3.png"])[0])


def test_sets_are_those_of_chapter_6(model):
    import torch

    from vision_course.calibration import prediction_sets

    for threshold in (0.0, 0.3, 0.6, 0.95, 1.0):
        model.threshold = threshold
        probabilities = torch.rand(200, 3, generator=torch.Generator().manual_seed(1)).pow(3)
        probabilities = probabilities / probabilities.sum(1, keepdim=True)
        for row, expected in zip(probabilities, prediction_sets(probabilities, threshold)):
            found = model.conformal_set(row.numpy())
            assert set(found) == {name for name, inside in zip(model.classes, expected) if inside}
            assert found == sorted(found, key=lambda name: -row[model.classes.index(name)])


def test_rows_and_text(model, tmp_path, monkeypatch):
    Image.new("RGB", (30, 20), (220, 30, 30)).save(tmp_path / "rose.png")
    (tmp_path / "torn.gif").write_bytes(b"GIF89a")
    good, bad = describe_images(model, list_images([tmp_path]))
    assert list(good) == ["image", "class", "probability", "probabilities", "set", "coverage", "notes"]
    assert good["class"] == "red" and good["set"] == ["red"] and good["coverage"] == 0.9
    assert sum(good["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert list(bad) == ["image", "error"]
    text = format_text([good, bad]).splitlines()
    assert text[0].startswith(f"{tmp_path / 'rose.png'}  red 9") and text[0].endswith("90% set: red") and text[1] == bad["error"]
    pixels = np.full((16, 16, 3), 99, np.uint8)
    assert "90% set: empty (animated)" in format_text([{"image": "x", **answer(model, pixels), "notes": ["animated"]}])
    with open(tmp_path / "rose.png") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert describe_images(model, ["-"])[0] == {**good, "image": "-"}
        assert describe_images(model, ["-"])[0] == {"image": "-", "error": "standard input: is empty (0 bytes)."}  # it has been read
    (tmp_path / "empty").mkdir()
    with pytest.raises(CourseError, match="a folder without images"):
        list_images([tmp_path / "empty"])


def test_a_name_that_is_no_text_does_not_stop_the_others(course, tmp_path):
    model = colour_model(tmp_path / "colours.onnx")
    (tmp_path / "own").mkdir()
    for name in (b"a.png", b"caf\xe9.png", b"z.png"):
        try:
            with open(os.path.join(os.fsencode(tmp_path / "own"), name), "wb") as file:
                file.write(file_of(Image.new("RGB", (30, 20), (220, 30, 30))))
        except OSError:
            pytest.skip("this file system takes only names that are text")
    done = course("predict", "own", "--model", model, "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(row) for row in done.stdout.splitlines()]
    assert [row["class"] for row in rows] == ["red"] * 3 and rows[1]["image"].endswith("caf\udce9.png")
    assert course("predict", "own", "--model", model).stdout.count(" red ") == 3
    done = course("predict", "x" * 300, "own/a.png", "--model", model)
    assert done.returncode == 2 and "cannot be read" in done.stderr and done.stdout.count(" red ") == 1


def test_a_folder_without_images_does_not_stop_the_others(course, tmp_path):
    model = colour_model(tmp_path / "colours.onnx")
    (tmp_path / "empty").mkdir()
    for name in ("a.png", "own/.b.png", "own/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(file_of(Image.new("RGB", (30, 20), (220, 30, 30))))
    done = course("predict", "a.png", "empty", "own", "--model", model)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "empty: a folder without images" in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["a.png", "own/c.png"]


def test_a_picture_over_the_limit_is_refused_in_one_line(course, tmp_path):
    Image.new("1", (12_000, 9_000)).save(tmp_path / "large.png")
    done = course("predict", "large.png", "--model", colour_model(tmp_path / "colours.onnx"))
    assert done.returncode == 2 and done.stderr == "vision-course: large.png: has 12,000 × 9,000 pixels; at most 50,000,000 are read.\n"


@pytest.mark.parametrize("spoil, words", [
    (lambda path: path.unlink(), "not there"),
    (lambda path: path.write_bytes(b""), "cannot be loaded"),
    (lambda path: path.write_bytes(path.read_bytes()[:-40]), "cannot be loaded|not one of this course's"),
    (lambda path: path.write_bytes(b"\x08\x0a" + bytes(300)), "cannot be loaded"),
    (lambda path: colour_model(path, about="none"), "not one of this course's"),
    (lambda path: colour_model(path, about={"format_version": 2}), "has format version 2, this program knows 1. Update"),
    (lambda path: colour_model(path, about={"format_version": "new"}), "not one of this course's"),
    (lambda path: colour_model(path, about={"classes": ["red", "green"]}), "not what its metadata say"),
    (lambda path: colour_model(path, about={"image_size": 32}), "not what its metadata say"),
])
def test_a_model_that_cannot_be_used_is_one_clear_line(tmp_path, spoil, words):
    spoil(colour_model(tmp_path / "colours.onnx"))
    with pytest.raises(CourseError, match=words) as caught:
        Predictor(tmp_path / "colours.onnx")
    assert "\n" not in str(caught.value) and "colours.onnx" in str(caught.value) and len(str(caught.value)) < 400


def test_pixels_of_another_shape_or_type_are_refused(model):
    for shape, kind in (((1, 16, 16, 3), float), ((1, 17, 16, 3), np.uint8), ((16, 16, 3), np.uint8), ((1, 3, 16, 16), np.uint8)):
        with pytest.raises(CourseError, match="must be uint8"):
            model.predict(np.zeros(shape, kind))


def test_a_repository_for_triton(tmp_path):
    source = colour_model(tmp_path / "my model.int8.onnx", about={"classes": ["red", 'gr"een', "blue"]})
    target = write_triton_repository(source, tmp_path / "models")
    assert target == tmp_path / "models" / "my-model.int8"
    assert (target / "1" / "model.onnx").read_bytes() == source.read_bytes()
    assert (target / "labels.txt").read_text().splitlines() == ["red", 'gr"een', "blue"]
    config = (target / "config.pbtxt").read_text()
    assert config.startswith('name: "my-model.int8"\nbackend: "onnxruntime"\n')
    assert "data_type: TYPE_UINT8 dims: [ 16, 16, 3 ]" in config and "data_type: TYPE_FP32 dims: [ 3 ]" in config
    assert config.count("{") == config.count("}") and config.count("[") == config.count("]")
    before = sorted(tmp_path.rglob("*"))
    write_triton_repository(source, tmp_path / "models")  # once more: the same
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(CourseError, match="cannot be written"):
        write_triton_repository(source, source)
