"""What several tests share."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def photos(tmp_path):
    """A folder of two easy classes, 60 images of 16 by 16 pixels each."""
    noise = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(60):
            pixels = noise.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            pixels[..., channel] += 80
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def course(tmp_path):
    """Run `vision-course …` as a user would, with its outputs in a folder of the test."""
    environment = {**os.environ, "VISION_COURSE_OUTPUTS": str(tmp_path / "outputs"), "VISION_COURSE_DATA": str(tmp_path / "data")}

    def run(*words, launcher=(), **options):
        command = [sys.executable, *launcher, "-m", "vision_course.cli", *map(str, words)]
        settings = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment, **options}
        return subprocess.run(command, **settings)

    run.environment = environment
    run.outputs = tmp_path / "outputs"
    return run
