"""The project as a whole: the README, the chapters' anatomy, and what a clean clone needs."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from vision_course.published import MOST_BYTES, MOST_WEIGHTS, read_published, readme_text

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))


def cells(path, kind):
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_readme_is_what_the_index_and_the_published_results_say():
    assert (ROOT / "README.md").read_text() == readme_text()


@pytest.mark.parametrize("folder", sorted((ROOT / "outputs" / "published").glob("[!.]*")), ids=lambda path: path.name)
def test_published_runs_are_whole_small_and_of_committed_code(folder):
    for chapter, stored in read_published(folder.name).items():
        assert re.fullmatch("[0-9a-f]{12}", stored["provenance"]["commit"]), chapter
    assert all(path.stat().st_size <= MOST_BYTES for path in folder.glob("*.png"))
    assert all(path.stat().st_size <= MOST_WEIGHTS for path in (ROOT / "data" / "pretrained").glob("*.safetensors"))


def test_a_wheel_brings_the_backbone_the_pages_and_the_template(tmp_path):
    ignored = shutil.ignore_patterns(".venv", ".git", "data", "outputs", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, tmp_path / "copy"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "vision_course" / "assets").iterdir()}
    assert {"vision_course/assets/backbone.safetensors", "vision_course/assets/backbone.json"} <= wanted <= names


def test_readme_opens_with_sentence_picture_table_and_commands():
    top = "\n".join((ROOT / "README.md").read_text().splitlines()[:30])
    picture = re.search(r"!\[.+\]\((.+\.png)\)", top)
    assert picture and (ROOT / picture[1]).exists()
    assert re.search(r"^\|---", top, re.M) and "make report" in top and "make test" in top


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_opens_the_test_split_in_one_cell(path):
    opening = [code for code in cells(path, "code") if re.search(r"\.open_test\(\)|\bdata\.test\b", code) and "#| export" not in code]
    assert len(opening) == 1, opening


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_has_its_solutions_and_they_solve_every_exercise(path):
    asked = set(re.findall(r'check\("([\d.]+)"', "\n".join(cells(path, "code"))))
    solved = set(re.findall(r'assert check\("([\d.]+)"', "\n".join(cells(ROOT / "nbs" / "solutions" / path.name, "code"))))
    assert asked and asked == solved


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_in_colab_a_chapter_installs_the_course_from_the_address_in_the_settings(path):
    settings = ConfigParser()
    settings.read(ROOT / "settings.ini")
    assert f'git+{settings["DEFAULT"]["git_url"]}"' in cells(path, "code")[0]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_prose_has_no_typed_measurements(path):
    typed = re.findall(r"[^.\n]*\b\d+(?:\.\d+)? ?(?:%|points)[^.\n]*", "\n".join(cells(path, "markdown")))
    results = [line for line in typed if re.search(r"\b(reached|reaches|accuracy of|gains?|better by|ours)\b", line)]
    assert results == []
