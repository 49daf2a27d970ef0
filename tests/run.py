"""Run every check of the project; the last line counts them.

    python tests/run.py            everything
    python tests/run.py 02 core    only the notebooks whose path contains one of the words, and no pytest
"""

import filecmp
import gc
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SLOW = ("torch", "torchvision", "accelerate", "sklearn.linear_model", "pandas", "matplotlib.pyplot", "nbdev.test")  # to import
FORKS = {"os.fork": RuntimeWarning, "This process": DeprecationWarning}  # warnings of libraries with threads, which survive a fork


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
            return done.stderr or done.stdout or f"{command} ended with status {done.returncode}"
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


def begin(path, threads):
    """Start on a notebook, as `nbdev_test` does, in a copy of this process; its number, and the file of what it prints."""
    import torch
    from nbdev.config import get_config
    from nbdev.test import test_nb

    log = tempfile.TemporaryFile("w+")
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process, log
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    passed, _ = test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    sys.exit(not passed)


def run_notebooks(paths, at_once, threads=None):
    """Every cell of each notebook runs, and its tests hold: True or False for each."""
    waiting, running, results = list(paths), {}, []
    while waiting or running:
        while waiting and len(running) < at_once:
            path = waiting.pop(0)
            start = time.perf_counter()
            process, log = begin(path, threads)
            running[process] = path, log, start
        process, status = os.wait()
        path, log, start = running.pop(process)
        log.seek(0)
        problem = status and f"ended with status {os.waitstatus_to_exitcode(status)}\n{log.read()}"
        results.append(report(path.relative_to(ROOT), problem, time.perf_counter() - start))
    return results


def report(name, problem, seconds):
    print(f"{'FAILED' if problem else 'ok':7}{seconds:6.1f} s  {name}", flush=True)
    if problem:
        print(problem, flush=True)
    return not problem


def timed(name, check):
    start = time.perf_counter()
    problem = check()
    return report(name, problem, time.perf_counter() - start)


def pytest_counts():
    """Run pytest, showing what it prints, and read its last line."""
    quiet = [word for start, kind in FORKS.items() for word in ("-W", f"ignore:{start}:{kind.__name__}")]
    words = ["-q", "-n", "2", "-p", "no:anyio", *quiet, "--durations=10", "tests"]
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
    chosen = [path for path in notebooks() if not words or any(word in str(path.relative_to(ROOT)) for word in words)]
    if not chosen:
        sys.exit(f"no notebook has {' or '.join(words)} in its name")
    results = [] if words else [timed("exported files", exported), timed("clean notebooks", clean)]
    os.environ.update(environment())
    os.chdir(ROOT)
    for name in SLOW:  # once, and not in each notebook again
        importlib.import_module(name)
    gc.freeze()  # what was imported need not be looked through again
    for start, kind in FORKS.items():
        warnings.filterwarnings("ignore", start, kind)
    chapters = [path for path in chosen if path.parent.name == "nbs"]  # these train, and need the machine for themselves
    results += run_notebooks(chapters, at_once=1)
    results += run_notebooks([path for path in chosen if path not in chapters], at_once=2, threads=1)
    passed, failed, skipped = (0, 0, 0) if words else pytest_counts()
    passed, failed = passed + sum(results), failed + results.count(False)
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
