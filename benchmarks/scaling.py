"""Does the cost of an epoch grow with the number of images and not faster, and does the memory stay when a set is streamed?

    python benchmarks/scaling.py
    python benchmarks/scaling.py --counts 10000 50000 --files 5000

An epoch through the course's input pipeline (flip, crop, floats), without a network: over 10, 50 and 200 thousand images of 32×32 in
memory, then over the largest of these sets from the disk, and over a folder of PNG files that is given less memory than its
images need, so that the course streams it. Each case has a process of its own, whose memory is what it holds beyond files mapped
from the disk (the operating system takes those back when it needs the room). The first of four epochs warms up; the median of
the others counts. Results are printed in words and as JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from tools import at_least, run
from vision_course.core import pick_device, provenance
from vision_course.data import Batches, Split, augmentation, load

SIZE, CLASSES, BATCH = 32, 10, 500


def held():
    """Megabytes of this process that are not mapped from files."""
    info = psutil.Process().memory_info()
    return (info.rss - getattr(info, "shared", 0)) / 1e6


def array(count, path=None):
    """Random images, in memory or in a file that is mapped."""
    shape, noise = (count, SIZE, SIZE, 3), np.random.default_rng(0)
    images = np.empty(shape, np.uint8) if path is None else np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    for start in range(0, count, 10_000):
        images[start : start + 10_000] = noise.integers(0, 256, images[start : start + 10_000].shape, dtype=np.uint8)
    return images if path is None else np.load(path, mmap_mode="r+")


def write_folder(folder, count):
    """PNG files in class folders."""
    noise = np.random.default_rng(0)
    for k in range(CLASSES):
        (folder / f"class{k}").mkdir(parents=True)
    for i in range(count):
        Image.fromarray(noise.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / f"class{i % CLASSES}" / f"{i}.png")


def split_of(case, count, place):
    """The training images of one case."""
    if case == "folder":
        return load(str(place / "folder"), image_size=SIZE).train
    images = array(count, None if case == "memory" else place / "images.npy")
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    return Split(planes, torch.arange(count) % CLASSES, memory_mapped=case == "disk")


def measure(case, count, place):
    """Images a second and megabytes of one case, in this process."""
    before, device = held(), pick_device()
    split = split_of(case, count, place)
    rates, most = [], 0.0
    batches = Batches(split, BATCH, augmentation("flip+crop"), shuffle=True, device=device)
    for _ in range(4):
        start, seen = time.perf_counter(), 0
        for images, _ in batches:
            seen += len(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(seen / (time.perf_counter() - start))
        most = max(most, held())
    return {"case": case, "images": len(split), "images_per_second": statistics.median(rates[1:]), "megabytes": most - before,
            "of_the_images": split.images.numel() / 1e6, "streamed": split.memory_mapped}


def in_a_process(case, count, place, **environment):
    words = [sys.executable, __file__, "--case", case, "--counts", str(count), "--place", str(place)]
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=at_least(1000), nargs="+", default=[10_000, 50_000, 200_000], help="images of the sets (default 10,000 50,000 200,000)")
    parser.add_argument("--files", type=at_least(1000), default=20_000, help="PNG files in the folder (default 20,000)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.counts[0], options.place)))
        return
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        rows = [in_a_process("memory", count, place) for count in options.counts]
        rows.append(in_a_process("disk", max(options.counts), place))
        (place / "images.npy").unlink()
        write_folder(place / "folder", options.files)
        limit = options.files * SIZE * SIZE * 3 / 4 / 2**30  # a quarter of what its images need
        rows.append(in_a_process("folder", options.files, place, VISION_COURSE_MEMORY_LIMIT=str(limit),
                                 VISION_COURSE_DATA=str(place / "data"), VISION_COURSE_OUTPUTS=str(place / "outputs")))
    for row in rows:
        where = f"{row['case']}, streamed" if row["streamed"] else row["case"]
        print(f"{row['images']:>9,} images, {where:16} {row['images_per_second']:>9,.0f} images/s, "
              f"{row['megabytes']:>5,.0f} MB held for {row['of_the_images']:,.0f} MB of images")
    print(json.dumps({"rows": rows, "provenance": provenance()}))


if __name__ == "__main__":
    run(main)
