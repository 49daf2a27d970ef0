"""Images a second of the course's input pipeline against the two that people use instead.

    python benchmarks/input_pipeline.py

Flip, crop (4 pixels of reflection), a covered square of 12×12, floats, normalised by channel: once as batched tensor
operations on the device (vision_course.data), once per image with torchvision.transforms.v2 and once with albumentations,
both in a DataLoader with 0, 1, 2 and 4 workers. All start from the same uint8 images in memory, and all end with a float
batch in memory. torchvision runs in both of its forms, on tensors and on Pillow images. A round takes every contender in
turn; the first round warms up and is not counted, and the median of the others is printed, in words and as JSON.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # no look-up in the network on import

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from tools import at_least, run
from vision_course.core import pick_device, provenance
from vision_course.data import Batches, Split, augmentation, channel_statistics

SIZE, BATCH, HOLE = 32, 500, 12


class PerImage(Dataset):
    """One image at a time, as a DataLoader's workers see it."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i]


def torchvision_tail(mean, std):
    """What both torchvision forms end with; RandomErasing covers a square of fixed size, as cutout does."""
    share = (HOLE / SIZE) ** 2
    erase = v2.RandomErasing(p=1.0, scale=(share, share), ratio=(1.0, 1.0), value=0.5)
    return [v2.ToDtype(torch.float32, scale=True), erase, v2.Normalize(mean, std)]


def contenders(images, labels, mean, std):
    """Data set by name of contender."""
    geometry = [v2.RandomHorizontalFlip(), v2.RandomCrop(SIZE, padding=4, padding_mode="reflect")]
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    pictures = [Image.fromarray(array) for array in arrays]
    chain = A.Compose([
        A.HorizontalFlip(p=0.5),
        A.Pad(padding=4, border_mode=cv2.BORDER_REFLECT_101),
        A.RandomCrop(SIZE, SIZE),
        A.CoarseDropout(num_holes_range=(1, 1), hole_height_range=(HOLE, HOLE), hole_width_range=(HOLE, HOLE), fill=128, p=1.0),
        A.Normalize(mean, std),
        ToTensorV2(),
    ])
    tensors, pillow = v2.Compose([*geometry, *torchvision_tail(mean, std)]), v2.Compose([*geometry, v2.ToImage(), *torchvision_tail(mean, std)])
    return {
        "torchvision v2, tensors": PerImage(images, labels, tensors),
        "torchvision v2, Pillow": PerImage(pictures, labels, pillow),
        "albumentations": PerImage(arrays, labels, Albumentations(chain)),
    }


class Albumentations:
    """A chain that takes an array and gives a tensor; it can be sent to worker processes."""

    def __init__(self, chain):
        self.chain = chain

    def __call__(self, array):
        return self.chain(image=array)["image"]


def images_per_second(batches, normalise=None):
    """Walk over one epoch."""
    start, count = time.perf_counter(), 0
    for images, labels in batches:
        images = normalise(images) if normalise else images
        count += len(labels)
    if images.is_cuda:
        torch.cuda.synchronize()
    assert images.dtype == torch.float32 and abs(images.mean()) < 1
    return count / (time.perf_counter() - start)


def normaliser(mean, std, device):
    """Subtract the mean and divide by the standard deviation, in place, along whole rows of pixels."""
    shift, scale = (torch.tensor(x, device=device).repeat(SIZE) for x in ([-m / s for m, s in zip(mean, std)], [1 / s for s in std]))

    def normalise(images):
        rows = images.permute(0, 2, 3, 1).flatten(2)  # (images, height, width · 3): a view, as images are stored channels last
        torch.addcmul(shift, rows, scale, out=rows)
        return images

    return normalise


def limit_threads(_):
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def measure(images, labels, workers, rounds, device):
    """Images a second, one number a round, by name and number of workers."""
    mean, std = channel_statistics(images)
    ours = Batches(Split(images, labels), BATCH, augmentation("flip+crop+cutout"), shuffle=True, device=device)
    loaders = {
        (name, count): DataLoader(data, BATCH, shuffle=True, num_workers=count, persistent_workers=count > 0,
                                  worker_init_fn=limit_threads, drop_last=True)
        for name, data in contenders(images, labels, mean, std).items() for count in workers
    }
    speeds = {("vision_course", 0): [], **{key: [] for key in loaders}}
    for number in range(rounds + 1):
        for key, rows in speeds.items():
            if key in loaders:
                rows.append(images_per_second(loaders[key]))
            else:
                ours.epoch = number
                epochs = itertools.chain.from_iterable(itertools.repeat(ours, 20))  # one would be over too soon to be timed
                rows.append(images_per_second(epochs, normaliser(mean, std, device)))
            print(f"round {number}: {key[0]}, {key[1]} workers: {rows[-1]:,.0f}", file=sys.stderr)
    return {key: rows[1:] for key, rows in speeds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=at_least(500), default=10_000, help="images in an epoch (default 10,000)")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="rounds that count (default 3)")
    parser.add_argument("--workers", type=at_least(0), nargs="+", default=[0, 1, 2, 4], help="workers to try (default 0 1 2 4)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="of the course's pipeline (default auto)")
    options = parser.parse_args()
    pixels = np.random.default_rng(0).integers(0, 256, (options.images, SIZE, SIZE, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    labels = torch.arange(options.images) % 10
    device = pick_device(options.device)
    os.environ["VISION_COURSE_DEVICE"] = device.type  # for what is said of the machine
    speeds = measure(images, labels, options.workers, options.rounds, device)
    medians = {key: statistics.median(rows) for key, rows in speeds.items()}
    ours = medians.pop(("vision_course", 0))
    rivals = {name: max((key for key in medians if key[0] == name), key=medians.get) for name, _ in medians}
    print(f"{'vision_course, on the device':32} {ours:>10,.0f} images a second")
    for name, key in rivals.items():
        print(f"{name:32} {medians[key]:>10,.0f} with {key[1]} workers, its best; vision_course makes {ours / medians[key]:.1f} times as many")
    result = {"images_per_second": {f"{n}, {w} workers": round(v) for (n, w), v in medians.items()}, "vision_course": round(ours)}
    print(json.dumps({**result, "times_the_fastest": round(ours / max(medians.values()), 1), "provenance": provenance()}))


if __name__ == "__main__":
    run(main)
