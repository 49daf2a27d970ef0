"""What the benchmarks are given, and that they say in one line what is wrong with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vision_course.data import load

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.parametrize("words, said", [
    (("input_pipeline", "--rounds", "0"), "must be 1 or more, not 0"),
    (("time_to_accuracy", "--dataset", "shape"), "error: data set 'shape': not known"),
    (("service", "none.onnx"), "none.onnx"),
], ids=lambda value: "_".join(value) if isinstance(value, tuple) else "")
def test_a_bad_option_ends_a_benchmark_with_one_line(words, said, tmp_path):
    name, *options = words
    environment = {**os.environ, "VISION_COURSE_OUTPUTS": str(tmp_path), "VISION_COURSE_DATA": str(tmp_path)}
    done = subprocess.run([sys.executable, BENCHMARKS / f"{name}.py", *options], env=environment, capture_output=True, text=True)
    assert done.returncode and "Traceback" not in done.stderr and said in done.stderr.splitlines()[-1]


def test_a_machine_without_bfloat16_says_so_and_uses_float32(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import tools

    monkeypatch.setattr(tools, "fast_bfloat16", lambda device: False)
    assert tools.training_precision(torch.device("cpu")) == "float32" and "no fast bfloat16" in capsys.readouterr().out
    monkeypatch.setattr(tools, "fast_bfloat16", lambda device: True)
    assert tools.training_precision(torch.device("cpu")) == "bfloat16" and capsys.readouterr().out == ""


@pytest.mark.usefixtures("shapes_elsewhere")
def test_all_images_are_those_of_training_and_validation(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from time_to_accuracy import with_validation_images

    data = load("shapes", seed=1)
    known = with_validation_images(data)
    assert torch.equal(known.train.images[: len(data.train)], data.train.images) and known.test is data.test
    assert torch.equal(known.train.labels, torch.cat([data.train.labels, data.valid.labels]))
    assert torch.equal(known.train.images[len(data.train) :], data.valid.images)
