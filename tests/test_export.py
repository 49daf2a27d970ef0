"""Exported files: that they answer as the network does, say what they are, need little, and that what is wrong is refused."""

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import refused, write_photos
from torch import nn

from vision_course import export
from vision_course.calibration import load_calibration, load_or_calibrate
from vision_course.card import SECTIONS, model_card, write_card
from vision_course.cnn import small_cnn
from vision_course.core import CourseError, output_folder, run_name, save_result
from vision_course.data import load
from vision_course.export import Deployable, answers, demand_parity, export_model, open_exported, parity
from vision_course.predictor import Predictor, read_image
from vision_course.train import Recipe, load_or_train, predict

try:
    import ai_edge_litert  # noqa: F401
    import ai_edge_quantizer  # noqa: F401
    import litert_torch  # noqa: F401
    TFLITE = True
except ImportError:
    TFLITE = False

tflite = pytest.mark.skipif(not TFLITE, reason="the extra 'tflite' is not installed")
FORMATS = ["pt2", "onnx", "onnx-int8", pytest.param("tflite", marks=tflite), pytest.param("tflite-int8", marks=tflite)]
FLOATS = FORMATS[:2] + FORMATS[3:4]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small network that tells red from blue, its data and calibration, in a folder of its own."""
    folder = tmp_path_factory.mktemp("course")
    write_photos(folder / "photos", 150, noise_to=150, signal=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISION_COURSE_OUTPUTS", str(folder / "outputs"))
        patch.setenv("VISION_COURSE_DATA", str(folder / "data"))
        patch.setenv("VISION_COURSE_DEVICE", "cpu")
        data = load(str(folder / "photos"))
        made = load_or_train(small_cnn, data, Recipe("small_cnn", epochs=3, batch_size=32, learning_rate=0.05))
        checkpoint = output_folder(data.name) / "checkpoints" / made.info["file"]
        calibration = load_or_calibrate(checkpoint, predict(made.model, data.valid), data.valid.labels)
        yield made, data, calibration


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory):
    """One exported file for each format, made when it is asked for."""
    folder, made = tmp_path_factory.mktemp("exports"), {}

    def file(format):
        if format not in made:
            made[format] = export_model(*trained, format, folder)
        return made[format]

    return file


@pytest.fixture(scope="module")
def expected(trained):
    made, data, calibration = trained
    return (predict(made.model, data.valid) / calibration["temperature"]).softmax(1).numpy()


def test_two_pixels_by_hand():
    class ChannelMeans(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    image = torch.tensor([[[[255, 0, 0], [255, 255, 0]]]], dtype=torch.uint8)
    assert torch.allclose(Deployable(ChannelMeans(), 0.5)(image), torch.tensor([[2.0, 1.0, 0.0]]).softmax(1), atol=1e-6)


def test_wrapping_leaves_the_network_alone(trained):
    model = trained[0].model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ready = Deployable(model, 2.0)
    with torch.no_grad():
        ready.network.head.weight.zero_()
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_answers_as_the_network_does(trained, files, expected, format):
    made, came = files(format), answers(open_exported(files(format).path).run, trained[1].valid)
    assert came.shape == expected.shape and np.allclose(came.sum(1), 1, atol=1e-3 if "int8" not in format else 0.02)
    if format.endswith("int8"):
        assert (came.argmax(1) == expected.argmax(1)).mean() >= 0.985
    else:
        assert np.abs(came - expected).max() <= 1e-4
    assert made.parity.agreement >= 0.985 and made.megabytes > 0.01
    assert [entry.name for entry in made.path.parent.iterdir() if entry.name.startswith(".")] == []


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_images(trained, files, format, count):
    pixels = np.ascontiguousarray(trained[1].valid.images[:count].permute(0, 2, 3, 1).numpy())
    assert open_exported(files(format).path).run(pixels).shape == (count, 2)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_says_what_it_is(trained, files, format):
    made, data, calibration = trained
    facts = open_exported(files(format).path).facts
    assert facts["format_version"] == 1 and facts["classes"] == list(data.classes) and facts["image_size"] == 64
    assert facts["temperature"] == calibration["temperature"] and facts["conformal_threshold"] == calibration["threshold"]
    assert facts["conformal_coverage"] == pytest.approx(0.9) and facts["network"] == "small_cnn" and facts["dataset"] == data.name
    assert facts["provenance"]["recipe"]["epochs"] == 3 and facts["provenance"]["torch"] == made.info["provenance"]["torch"]


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_exporting_twice_gives_the_same_answers(trained, files, expected, format, tmp_path):
    again = export_model(*trained, format, tmp_path)
    ours, theirs = (answers(open_exported(path).run, trained[1].valid) for path in (again.path, files(format).path))
    assert np.array_equal(ours, theirs)


PROGRAMS = {
    "onnx": """import onnxruntime
session = onnxruntime.InferenceSession(path)
text = session.get_modelmeta().custom_metadata_map["vision_course"]
p = session.run(None, {"image": images})[0]""",
    "pt2": """import torch
files = {"vision_course": ""}
module, text = torch.export.load(path, extra_files=files).module(), files["vision_course"]
p = module(torch.from_numpy(images)).detach().numpy()""",
    "tflite": """import zipfile
from ai_edge_litert.interpreter import Interpreter
text = zipfile.ZipFile(path).read("vision_course")
runner = Interpreter(path).get_signature_runner()
p = numpy.concatenate([list(runner(args_0=x[None]).values())[0] for x in images])""",
}


@pytest.mark.parametrize("format", FLOATS)
def test_round_trip_in_a_fresh_process_without_the_package(trained, files, expected, format, tmp_path):
    images = np.ascontiguousarray(trained[1].valid.images[:5].permute(0, 2, 3, 1).numpy())
    np.save(tmp_path / "images.npy", images)
    code = ("import json, sys, numpy\npath = sys.argv[1]\nimages = numpy.load('images.npy')\n" + PROGRAMS[format] +
            "\nnumpy.save('p.npy', p)\nprint(json.loads(text)['classes'], 'vision_course' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, str(files(format).path)], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['blue', 'red'] False"
    assert np.abs(np.load(tmp_path / "p.npy") - expected[:5]).max() <= 1e-4


# What fails is not left behind

def test_a_file_that_answers_differently_is_not_left_behind(trained, tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_bytes(b"an older file")
    monkeypatch.setitem(export.LIMITS, "difference", -1.0)
    with pytest.raises(CourseError, match="does not answer as the network does"):
        export_model(*trained, "onnx", tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"an older file"


def test_limits_of_parity():
    labels = torch.arange(1000) % 2
    before = np.stack([1 - labels.numpy() * 0.8 - 0.1, labels.numpy() * 0.8 + 0.1], 1)
    moved, flipped = before.copy(), before.copy()
    moved[7] += (2e-4, -2e-4)
    flipped[:16] = flipped[:16, ::-1]
    found = parity(before, moved, labels)
    assert found.difference == pytest.approx(2e-4) and (found.agreement, found.accuracy, found.before) == (1, 1, 1)
    demand_parity(found, "onnx-int8")
    with pytest.raises(CourseError, match="off by 0.0002"):
        demand_parity(found, "onnx")
    found = parity(before, flipped, labels)
    assert found.agreement == pytest.approx(0.984) and found.accuracy == pytest.approx(0.984)
    with pytest.raises(CourseError, match="98.40% of the answers are the same"):
        demand_parity(found, "tflite-int8")
    bolder = before.copy()
    bolder[:, 0] = np.where(before[:, 0] > 0.5, before[:, 0] + 0.06, before[:, 0] - 0.06)
    bolder[:, 1] = 1 - bolder[:, 0]  # every answer is the same, but the calibration is gone
    found = parity(before, bolder, labels)
    assert found.agreement == 1 and found.drift == pytest.approx(0.06)
    with pytest.raises(CourseError, match="off by 0.06 on average"):
        demand_parity(found, "onnx-int8")
    lost = before.copy()
    lost[7] = np.nan
    for format in ("onnx", "onnx-int8"):
        with pytest.raises(CourseError, match="off by nan"):
            demand_parity(parity(before, lost, labels), format)
    with pytest.raises(CourseError, match="shapes"):
        parity(before, before[:3], labels)


class Spectrum(nn.Module):
    def forward(self, x):
        return torch.fft.fft2(x).abs().mean((2, 3))[:, :2]


class Choosy(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))[:, :2] if x.mean() > 0.5 else -x.mean((2, 3))[:, :2]


@pytest.mark.parametrize("format, network, words", [
    ("onnx", Choosy, "Choosy|Deployable"), ("pt2", Choosy, "Choosy"), pytest.param("tflite", Choosy, "Choosy", marks=tflite),
    pytest.param("tflite", Spectrum, "fft|Spectrum", marks=tflite),
])
def test_a_network_that_cannot_be_exported_is_one_clear_line(trained, tmp_path, format, network, words):
    made, data, calibration = trained
    with pytest.raises(CourseError, match=words) as caught:
        export_model(replace(made, model=network()), data, calibration, format, tmp_path)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_an_operation_that_onnx_lacks_is_named(trained, tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x.mean(1)).real[:, :2]

    made, data, calibration = trained
    with pytest.raises(CourseError, match="linalg_eig"):
        export_model(replace(made, model=Odd()), data, calibration, "onnx", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_formats_and_folders_that_cannot_be_written(trained, tmp_path):
    with pytest.raises(CourseError, match="format 'h5': not known. Choose from pt2, onnx"):
        export_model(*trained, "h5", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CourseError, match="cannot be written"):
        export_model(*trained, "onnx", tmp_path / "file")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    with pytest.raises(CourseError, match=r"litert_torch is not installed: pip install 'vision_course\[tflite\]'"):
        export.needed("litert_torch", "tflite")


# Files that are not what they should be

@pytest.mark.parametrize("format", FLOATS)
def test_damaged_and_foreign_files_are_one_clear_line(files, format, tmp_path):
    whole, suffix = files(format).path.read_bytes(), files(format).path.suffix
    for name, content in (("cut", whole[: len(whole) // 2]), ("empty", b""), ("text", b"weights, by post" * 99)):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(content)
        with pytest.raises(CourseError, match=f"{name}{suffix}: ") as caught:
            open_exported(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(CourseError, match="not there"):
        open_exported(tmp_path / f"none{suffix}")
    with pytest.raises(CourseError, match="not a model file"):
        open_exported(tmp_path / "model.h5")


def with_facts(path, target, change):
    """A copy of an ONNX file whose metadata are changed."""
    import onnx

    graph = onnx.load(path)
    known = {entry.key: entry.value for entry in graph.metadata_props}
    onnx.helper.set_model_props(graph, change(json.loads(known["vision_course"])))
    onnx.save(graph, target)
    return target


def test_foreign_and_newer_files_are_refused(files, tmp_path):
    path = files("onnx").path
    newer = with_facts(path, tmp_path / "newer.onnx", lambda facts: {"vision_course": json.dumps({**facts, "format_version": 2})})
    foreign = with_facts(path, tmp_path / "foreign.onnx", lambda facts: {"author": "somebody"})
    for opened in (open_exported, Predictor):
        with pytest.raises(CourseError, match="newer.onnx: has format version 2"):
            opened(newer)
        with pytest.raises(CourseError, match="foreign.onnx: "):
            opened(foreign)


@tflite
def test_a_litert_file_is_also_an_archive(files):
    with zipfile.ZipFile(files("tflite").path) as archive:
        assert json.loads(archive.read("vision_course"))["classes"] == ["blue", "red"]


# The command line

@pytest.mark.parametrize("name", ["export", "predict", "explain", "evaluate"])
def test_help_has_defaults_and_an_example(command, name):
    status, out, _ = command(name, "--help")
    assert status == 0 and f"vision-course {name}" in out and "default" in out.lower() and "xample" in out


def test_predict_prints_class_probability_and_set(trained, files, command, tmp_path):
    Image.new("RGB", (301, 57), (200, 60, 60)).save(tmp_path / "rose.png")
    Image.new("L", (9, 31), 10).save(tmp_path / "night.jpg")
    model = ("--model", files("onnx").path)
    status, out, err = command("predict", *model, tmp_path / "rose.png")
    assert status == 0 and err == "" and "rose.png  red " in out and "90% set:" in out
    status, out, _ = command("predict", *model, "--json", tmp_path)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [Path(row["image"]).name for row in rows] == ["night.jpg", "rose.png"] and rows[1]["class"] == "red"
    run = open_exported(files("onnx").path).run
    p = run(read_image(tmp_path / "rose.png", 64)[None])[0]
    assert rows[1]["probabilities"]["red"] == pytest.approx(float(p[1]), abs=1e-6)


def test_the_same_image_gives_the_same_bytes(files, command, tmp_path):
    Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 50).save(tmp_path / "a.png")
    once, twice = (command("predict", "--json", "--model", files("onnx").path, tmp_path / "a.png") for _ in range(2))
    assert once == twice and once[0] == 0
    (tmp_path / "more").mkdir()
    for i in range(3):
        (tmp_path / "more" / f"{i}.png").write_bytes((tmp_path / "a.png").read_bytes())
    many = command("predict", "--json", "--model", files("onnx").path, tmp_path / "more")[1].splitlines()
    assert len({json.dumps({**json.loads(line), "image": ""}) for line in (*many, *once[1].splitlines())}) == 1


def test_a_bad_image_is_named_and_the_others_are_answered(files, command, tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "b.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes()[:40])
    status, out, err = command("predict", "--model", files("onnx").path, tmp_path)
    assert status == 2 and "b.png  red" in out and "a.png" in err and len(err.splitlines()) == 1
    (tmp_path / "none").mkdir()
    assert refused(command("predict", "--model", files("onnx").path, tmp_path / "none"), "none")
    assert refused(command("predict", "--model", tmp_path / "no.onnx", tmp_path / "b.png"), "no.onnx", "not there")
    assert refused(command("predict"), "image")
    assert refused(command("predict", "--colour", "x.png"), "--colour")


def run_predict(files, *words, **options):
    command = [sys.executable, "-m", "vision_course.command", "predict", "--model", str(files("onnx").path), *map(str, words)]
    return subprocess.run(command, capture_output=True, **options)


def test_predict_reads_standard_input(files, tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "b.png")
    done = run_predict(files, "--json", "-", input=(tmp_path / "b.png").read_bytes())
    assert done.returncode == 0 and json.loads(done.stdout)["class"] == "red"
    done = run_predict(files, "-", input=b"")
    assert done.returncode == 2 and len(done.stderr.decode().splitlines()) == 1


def test_predict_needs_three_packages_and_starts_in_under_a_second(files, tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "b.png")
    code = """import sys, time
import numpy, PIL.Image, onnxruntime
before = {name.split('.')[0] for name in sys.modules}
sys.argv[0] = 'vision-course'
from vision_course.command import main
try:
    main()
finally:
    loaded = {name.split('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
    print(sorted(loaded), file=sys.stderr)"""
    words = ["predict", "--model", str(files("onnx").path), str(tmp_path / "b.png")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip() == "['vision_course']", done.stderr
    seconds = []
    for _ in range(3):
        usage = os.times()
        assert run_predict(files, tmp_path / "b.png").returncode == 0
        after = os.times()
        seconds.append(after.children_user + after.children_system - usage.children_user - usage.children_system)
    assert min(seconds) < 1, seconds


def test_evaluate_takes_every_format(trained, files, command):
    expected = command("evaluate", output_folder(trained[1].name) / "checkpoints" / trained[0].info["file"])[1]
    for format in ("onnx", "onnx-int8", "pt2"):
        status, out, err = command("evaluate", files(format).path)
        assert status == 0 and out.startswith("valid: accuracy "), err
        assert out.split(",")[0] == expected.split(",")[0] or format == "onnx-int8"


def test_export_writes_files_and_a_repository_for_triton(trained, command, tmp_path, monkeypatch):
    made, data, _ = trained
    monkeypatch.setitem(export.LIMITS, "agreement", 0.5)  # so little training leaves answers near the border
    words = ("export", "small_cnn", "--dataset", data.name, "--epochs", 1, "--seed", 1, "--format", "onnx-int8", "--triton", tmp_path / "models")
    status, out, err = command(*words)
    assert status == 0, err
    folder = output_folder(data.name) / "exports"
    assert str(folder / "model.int8.onnx") in out and (folder / "model.onnx").exists()
    config = next((tmp_path / "models").rglob("config.pbtxt"))
    assert config.parent.name == f"{run_name(data.name)}-small_cnn"  # another data set's model stays where it is
    assert "TYPE_UINT8" in config.read_text() and (config.parent / "1" / "model.onnx").exists()
    assert refused(command("export", "--format", "h5"))


def test_explain_writes_the_overlay(trained, command, tmp_path):
    made, data, _ = trained
    Image.new("RGB", (64, 40), "red").save(tmp_path / "rose.png")
    checkpoint = output_folder(data.name) / "checkpoints" / made.info["file"]
    status, out, err = command("explain", tmp_path / "rose.png", "--checkpoint", checkpoint)
    assert status == 0 and "red" in out, err
    assert Image.open(tmp_path / "rose-explained.png").size[0] >= 500
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    assert refused(command("explain", tmp_path / "torn.png", "--checkpoint", checkpoint), "torn.png")
    assert refused(command("explain", tmp_path / "rose.png", "--checkpoint", tmp_path / "none.safetensors"), "none")


# Calibration and the card

def test_calibration_is_made_once_as_chapter_6_makes_it(trained):
    made, data, calibration = trained
    checkpoint = output_folder(data.name) / "checkpoints" / made.info["file"]
    assert load_calibration(checkpoint) == calibration
    other = load_or_calibrate(checkpoint, torch.zeros(10, 2), torch.zeros(10, dtype=torch.long), seed=5)
    assert other == calibration  # what is there is not made again


def test_a_card_without_chapter_8_is_refused():
    with pytest.raises(CourseError, match="chapter 8 has not run"):
        model_card({"01_data": {}})


def test_a_card_says_what_is_missing_and_quotes_only_results(trained, monkeypatch, tmp_path):
    monkeypatch.setenv("VISION_COURSE_OUTPUTS", str(tmp_path))
    facts = export.describe(*trained)
    row = {"file": "model.onnx", "megabytes": 1.23, "difference": 4.5e-7, "agreement": 1.0, "accuracy": 0.987, "before": 0.987}
    save_result("photos", "08_export", facts=facts, exported={"onnx": row}, limits=export.LIMITS,
                latency={"1 image, 1 thread": {"ONNX Runtime": 0.57}}, test={"onnx": {"accuracy": 0.9, "low": 0.85, "high": 0.95}},
                by_class={"red": 0.5, "blue": 1.0}, confused=[{"truth": "red", "answer": "blue", "images": 3}],
                strangers={"noise": {"mean confidence": 0.8, "empty set": 0.125}})
    text = write_card("photos").read_text()
    for words in ("| `model.onnx` | 1.23 | 4.5e-07 | 100.0 % | 98.7 % |", "90.0 % [85.0 %, 95.0 %]", "red taken for blue (3)",
                  "| noise | 80.0 % | 12.5 % |", "Hardest classes: red 50.0 %", "Not measured: chapter 6 has not run", "ONNX Runtime 0.57"):
        assert words in text, words
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(SECTIONS)
    assert "not available" not in text.lower()
