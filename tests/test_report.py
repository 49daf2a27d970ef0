"""The runner and the pages, with tiny notebooks in a project of their own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from conftest import HEAR_CTRL_C, after
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from vision_course.core import CourseError
from vision_course.report import make_report, render_report, run_chapters

PARAMETERS = 'dataset = "shapes"   # which data\nepochs = None\nseed = 0'
DRAW = """
from vision_course.core import save_figure, save_result
from vision_course.plots import bars
print("seed", seed, "\\x1b[31mred\\x1b[0m")
save_result(dataset, "01_good", headline=[{"what": "Answer", "value": 42, "note": "seconds"}], key_figures=["01_good-bars"])
save_figure(bars({"a": 1, "b": 2}, "length (m)"), dataset, "01_good-bars", alt="Bars <a> & b")
"""


def notebook(title, *cells, tags=("parameters",)):
    intro = new_markdown_cell(f"# {title}\n\n> A promise of {title}.\n\n## Part one")
    return new_notebook(cells=[intro, new_code_cell(PARAMETERS, metadata={"tags": list(tags)}), *cells])


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one chapter that works and one that does not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VISION_COURSE_OUTPUTS", raising=False)
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    (tmp_path / "nbs").mkdir()
    good = notebook(
        "Good",
        new_code_cell("#| hide\nhidden_word = 1"),
        new_code_cell("#| export\nimport sys, os\nprint(sys.executable, os.environ['VISION_COURSE_QUIET'])"),
        new_code_cell(DRAW),
        new_markdown_cell("*Longer is longer.*\n\nAnd so on, see [there](https://example.org)."),
        new_code_cell("import pandas; pandas.DataFrame({'x': [1.5], 'y': ['z']})"),
    )
    nbformat.write(good, tmp_path / "nbs" / "01_good.ipynb")
    bad = notebook("Bad", new_code_cell("def fail():\n    raise ValueError('too wide\\nby far')\n\n\nfail()"), new_code_cell("1"))
    nbformat.write(bad, tmp_path / "nbs" / "02_bad.ipynb")
    return tmp_path


def external(html):
    """Addresses that a browser would fetch by itself."""
    return re.findall(r"<(?:link|script|img|iframe|source)[^>]*(?:src|href)=[\"']?(?!data:)[^\"' >]+", html) + re.findall(r"url\(|@import", html)


def test_pages_of_a_run_with_a_failure(project, capsys):
    with pytest.raises(CourseError) as failure:
        make_report("shapes", epochs=2, seed=7)
    message = str(failure.value)
    assert "02_bad failed in cell 3 of 4" in message and "ValueError: too wide" in message and "def fail():" in message
    assert len(message.splitlines()) <= 25 and "\x1b" not in message
    progress = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"1/2  01_good +\d+ s", progress[0]) and re.fullmatch(r"2/2  02_bad +failed after \d+ s", progress[1])

    report = project / "outputs" / "shapes" / "report"
    index, good, bad = ((report / f"{name}.html").read_text() for name in ("index", "01_good", "02_bad"))
    for html in (index, good, bad):
        assert not external(html) and "<script" not in html and "\x1b" not in html
        assert set(re.findall(r'href="([^"#:]+)"', html)) <= {"index.html", "01_good.html", "02_bad.html"}
    assert "seed 7 red" in good and sys.executable in good and f"{sys.executable} 1" in good
    assert 'alt="Bars &lt;a&gt; &amp; b"' in good and '<div class="caption"><p><em>Longer is longer.</em></p>' in good
    assert "hidden_word" not in good and "#| export" not in good and "the values asked for did not arrive" not in good
    assert "<style scoped>" not in good and '<a href="#Part-one">Part one</a>' in good
    assert "failed in cell 3" in bad and "too wide" in bad
    assert "<td>42</td>" in index and 'alt="Bars &lt;a&gt; &amp; b"' in index and "<strong>Bad</strong> failed in cell 3" in index
    assert "<dd>7</dd>" in index and "torch 2" in index and "was given 2 epochs, not what its recipe asks for" in index


def test_some_chapters_only(project, capsys):
    outcomes = run_chapters("shapes", chapters=["01"])
    assert [outcome.chapter for outcome in outcomes] == ["01_good"] and outcomes[0].seconds > 0
    assert "<strong>Bad</strong> has not run" in render_report("shapes").read_text()
    with pytest.raises(CourseError, match="chapter '09': not known. Choose from 01_good, 02_bad"):
        run_chapters("shapes", chapters=["09"])
    with pytest.raises(CourseError, match="no text, so no notebook can take it"):
        run_chapters("caf\udce9")


def test_a_notebook_without_the_tag_is_refused(project):
    nbformat.write(notebook("Untagged", tags=()), project / "nbs" / "01_good.ipynb")
    with pytest.raises(CourseError, match="01_good.ipynb: 0 cells are tagged 'parameters'"):
        run_chapters("shapes")


def test_bad_values_stop_before_anything_is_written(project):
    for arguments, words in ((("shaps",), "Did you mean shapes"), (("shapes", 0), "epochs 1 or more"), (("shapes", 1, -1), "seed must be")):
        with pytest.raises(CourseError, match=words):
            make_report(*arguments)
    assert not (project / "outputs").exists()


def test_another_kernel_named_python3_is_not_used(project, monkeypatch):
    kernel = project / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({"argv": ["/no/such/python"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(kernel.parents[1]))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    assert len(run_chapters("shapes", chapters=["01"])) == 1


def test_a_process_that_dies(project):
    nbformat.write(notebook("Dead", new_code_cell("import os; os._exit(9)")), project / "nbs" / "02_bad.ipynb")
    with pytest.raises(CourseError, match="02_bad failed: its process died"):
        run_chapters("shapes", chapters=["02"])


def test_after_a_process_has_died_no_older_page_counts_as_new(project):
    dead = notebook("Dead", new_code_cell("import os; os._exit(9)"))
    with pytest.raises(CourseError, match="02_bad failed in cell"):
        make_report("shapes")
    nbformat.write(dead, project / "nbs" / "01_good.ipynb")
    with pytest.raises(CourseError, match="^01_good failed: its process died.*$"):  # there is no page to name
        make_report("shapes")
    assert not list((project / "outputs" / "shapes" / "notebooks").iterdir())


def test_ctrl_c_stops_the_run_and_its_kernel(project):
    body = "import os, time, pathlib\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)"
    nbformat.write(notebook("Slow", new_code_cell(body)), project / "nbs" / "01_good.ipynb")
    run = "from vision_course.report import make_report; make_report('shapes')"
    command = after(HEAR_CTRL_C, [sys.executable, "-c", run])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid = project / "nbs" / "pid"
    try:
        for _ in range(600):
            if pid.exists() and pid.read_text():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0 and "stopped after" in out and "KeyboardInterrupt" in err
    assert "02_bad" not in out and "Report:" not in out
    for _ in range(50):
        if not psutil.pid_exists(int(pid.read_text())):
            break
        time.sleep(0.1)
    else:
        os.kill(int(pid.read_text()), signal.SIGKILL)
        pytest.fail("the kernel outlived the run")
