"""What several tests share."""

import json
import os
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def write_photos(folder, count, noise_to=120, signal=80):
    """A folder of two easy classes, red and blue, of 16 by 16 pixels."""
    noise = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = noise.integers(0, noise_to, (16, 16, 3), dtype=np.uint8)
            pixels[..., channel] += signal
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def photos(tmp_path):
    """60 images of each class."""
    return write_photos(tmp_path / "photos", 60)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command in this process; give its status, output and error lines."""
    from vision_course import command

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["vision-course", *map(str, words)])
        try:
            command.main()
            status = 0
        except SystemExit as done:
            status = done.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return run


class Evil:
    """What says so if it is ever unpickled."""

    def __reduce__(self):
        return print, ("unpickled!",)


def copied(part):
    """The weights and buffers of a network or of a part of it, to be compared with later."""
    return {name: value.clone() for name, value in part.state_dict().items()}


def unchanged(part, before):
    """Whether a network is as `copied` found it, to the last bit."""
    return all(torch.equal(value, before[name]) for name, value in part.state_dict().items())


@pytest.fixture
def shapes_elsewhere(tmp_path_factory, monkeypatch):
    """Keep what is rendered out of the project's data folder; for all tests of a process in one place."""
    monkeypatch.setenv("VISION_COURSE_DATA", str(tmp_path_factory.getbasetemp() / "rendered"))


def refused(result, *words):
    """A command ended with status 2 and one line that holds these words."""
    status, _, err = result
    assert status == 2 and len(err.strip().splitlines()) == 1, result
    assert all(str(word) in err for word in words), err
    return True


def after(statements, command):
    """A command whose process runs Python statements first (preexec_fn forks beside the threads of what other tests imported)."""
    code = f"import os, sys\n{statements}\nos.execvp(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-I", "-S", "-c", code, *map(str, command)]


HEAR_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)"  # a process started in the background ignores it


@pytest.fixture
def course(tmp_path):
    """Run `vision-course …` as a user would, with its outputs in a folder of the test."""
    environment = {**os.environ, "VISION_COURSE_OUTPUTS": str(tmp_path / "outputs"), "VISION_COURSE_DATA": str(tmp_path / "data")}

    def run(*words, launcher=(), first="", **options):
        command = [sys.executable, *launcher, "-m", "vision_course.cli", *map(str, words)]
        command = after(first, command) if first else command
        settings = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment, **options}
        return subprocess.run(command, **settings)

    run.environment = environment
    run.outputs = tmp_path / "outputs"
    return run


def colour_model(path, size=16, classes=("red", "green", "blue"), about=None):
    """Write an exported file whose answers are known: it names the strongest colour (other classes are never likely)."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    weights = np.zeros((3, len(classes)), np.float32)
    weights[:, :3] = 8 * np.eye(3)
    values = {"byte": np.float32(255), "places": np.array([1, 2]), "weights": weights}
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "byte"], ["unit"]),
        helper.make_node("ReduceMean", ["unit", "places"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", size, size, 3])
    answer = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", len(classes)])
    initial = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "colours", [image], [answer], initial), opset_imports=[helper.make_opsetid("", 20)], ir_version=10,
    )
    known = {
        "format_version": 1, "classes": list(classes), "image_size": size, "temperature": 1.0, "conformal_threshold": 0.6,
        "conformal_coverage": 0.9, "dataset": "none", "network": "colours", "accuracy": 0.75, "provenance": {},
    }
    helper.set_model_props(model, {"vision_course": json.dumps({**known, **(about or {})})} if about != "none" else {})
    onnx.save(model, path)
    return path


def file_of(image, kind="PNG", **options):
    """An image as the bytes of a file."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(side=30_000):
    """A PNG of about 100 kB that says, truly, that it holds side × side white dots."""
    def chunk(name, content):
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    packer, row = zlib.compressobj(9), b"\0" + b"\xff" * (-(-side // 8))
    packed = b"".join(packer.compress(row * 1000) for _ in range(side // 1000)) + packer.flush()
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def mutated(content, generator):
    """The same bytes with a few random changes: some overwritten, left out, doubled, or the end cut off."""
    content = bytearray(content)
    for _ in range(generator.integers(1, 6)):
        at, count = int(generator.integers(0, len(content) + 1)), int(generator.integers(1, 9))
        what = generator.integers(0, 5)
        if what <= 1:
            content[at : at + count] = generator.bytes(len(content[at : at + count]))
        elif what == 2:
            del content[at : at + count]
        elif what == 3:
            content[at:at] = content[at : at + count] or b"\0"
        else:
            del content[at:]
    return bytes(content)
