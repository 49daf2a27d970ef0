"""Run every check of the project; the last line counts them.

    python tests/run.py            everything
    python tests/run.py 02 core    only the notebooks whose path contains one of the words, and no pytest
"""

import filecmp
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def run(*words, cwd=ROOT, **more):
    return subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, env=environment(**more))


def environment(**more):
    return {**os.environ, "VISION_COURSE_QUIET": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **more}


def notebooks():
    found = sorted((ROOT / "nbs").rglob("*.ipynb"))
    return [path for path in found if ".ipynb_checkpoints" not in path.parts]


def in_copy(command, compared):
    """Run a command in a copy of the project and name the files that it changes."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / ROOT.name
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "data", "outputs", "__pycache__"))
        done = run(BIN / command, cwd=copy)
        if done.returncode:
            return done.stderr
        ours, theirs = ({p.relative_to(root) for p in root.glob(compared)} for root in (ROOT, copy))
        changed = [p for p in ours & theirs if not filecmp.cmp(ROOT / p, copy / p, shallow=False)]
        return ", ".join(sorted(map(str, [*changed, *(ours ^ theirs)])))


def exported():
    """The package is what nbdev_export makes of the notebooks."""
    stale = in_copy("nbdev_export", "vision_course/*.py")
    return stale and f"not what the notebooks export (run nbdev_export): {stale}"


def clean():
    """Notebooks are committed without outputs."""
    dirty = in_copy("nbdev_clean", "nbs/**/*.ipynb")
    return dirty and f"not clean (run nbdev_clean): {dirty}"


def notebook(path, **more):
    """Every cell of a notebook runs, and its tests hold."""
    done = run(BIN / "nbdev_test", "--path", path, "--n_workers", 0, "--do_print", **more)
    return done.returncode and (done.stdout + done.stderr)


def report(name, check):
    start = time.perf_counter()
    problem = check()
    print(f"{'FAILED' if problem else 'ok':7}{time.perf_counter() - start:6.1f} s  {name}", flush=True)
    if problem:
        print(problem, flush=True)
    return not problem


def pytest_counts():
    """Run pytest, showing what it prints, and read its last line."""
    forks = ("ignore:os.fork:RuntimeWarning", "ignore:This process:DeprecationWarning")  # a DataLoader's workers, from Python 3.12
    words = ["-q", "-n", "2", "-p", "no:anyio", *(word for rule in forks for word in ("-W", rule)), "--durations=10", "tests"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, env=environment(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, text=True,
    )
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line if line.strip() else last
    count = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", last)}
    failed = count.get("failed", 0) + count.get("error", 0)
    return count.get("passed", 0), failed or int(process.wait() != 0), count.get("skipped", 0)


def main(words):
    chosen = [path for path in notebooks() if not words or any(word in str(path) for word in words)]
    results = [] if words else [report("exported files", exported), report("clean notebooks", clean)]
    chapters = [path for path in chosen if path.parent.name == "nbs"]  # these train, and need the machine for themselves
    results += [report(path.relative_to(ROOT), lambda: notebook(path)) for path in chapters]
    with ThreadPoolExecutor(2) as pool:
        light = [path for path in chosen if path not in chapters]
        results += pool.map(lambda path: report(path.relative_to(ROOT), lambda: notebook(path, OMP_NUM_THREADS="1")), light)
    passed, failed, skipped = (0, 0, 0) if words else pytest_counts()
    passed, failed = passed + sum(results), failed + results.count(False)
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
