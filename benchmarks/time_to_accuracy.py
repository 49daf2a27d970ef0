"""Seconds to a validation accuracy: the course's recipe, and a ResNet-18 trained the way most tutorials do it.

    python benchmarks/time_to_accuracy.py                              # CIFAR-10, the recipe's epochs, one seed
    python benchmarks/time_to_accuracy.py --seeds 3 --test             # with test accuracy, mean of three seeds
    python benchmarks/time_to_accuracy.py --seeds 3 --all-images       # the same, trained on the validation images too
    python benchmarks/time_to_accuracy.py --tutorial-epochs 30 --tutorial-seconds 36000

The course's network is trained by `fit` to the end of its schedule; the seconds are those of training alone, without
validation. The tutorial's network is torchvision's ResNet-18 with the usual stem for small images, in float32, with SGD and
OneCycle and a DataLoader that augments one image at a time. Where its time runs out, the speed is measured and the seconds
of its epochs are projected, and the output says so. Both speeds are also given as a share of the machine's convolution peak, which is
measured in the same run. With --test the test split is opened at the end, for each seed, with one view and with ten.

Records on CIFAR-10 are set with all 50,000 training images, of which the course keeps 5,000 for validation. --all-images gives
them back once every other choice is made. The validation images still say which epoch's weights are kept, though they are now
among those to learn from; the test split, opened at the end, is the only judge.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18
from torchvision.transforms import v2

from tools import at_least, run, training_precision
from vision_course.core import pick_device, provenance
from vision_course.data import Split, load
from vision_course.resnet import resnet, resnet_recipe
from vision_course.train import evaluate, fit, predict_augmented


def wait(device):
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def convolution_peak(device, precision, rounds=7):
    """Most multiplications and additions a second of a large convolution."""
    conv = nn.Conv2d(256, 256, 3, padding=1, bias=False).to(device, memory_format=torch.channels_last)
    images = torch.rand(128, 256, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
    work = 2 * images.numel() * 256 * 9
    best = 0.0
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        images = images.bfloat16() if precision == "bfloat16" else images
        for _ in range(rounds):
            wait(device)
            start = time.perf_counter()
            for _ in range(5):
                conv(images)
            wait(device)
            best = max(best, 5 * work / (time.perf_counter() - start))
    return best


def work_of_training(model, size):
    """Multiplications and additions to train on one image: forward, and twice as much backward."""
    total = 0

    def count(module, _, output):
        nonlocal total
        total += 6 * output[0].numel() * module.weight[0].numel()

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    for handle in handles:
        handle.remove()
    return total


def first_time(seconds, scores, target):
    """When the target was reached, or None."""
    return next((second for second, score in zip(seconds, scores) if score >= target), None)


def in_words(row, target):
    """When the target was reached, or that it was not."""
    after = row["seconds_to_target"]
    return f"{target:.1%} of the validation images: " + (f"after {after:,.0f} s" if after else f"not reached in {row['seconds']:,.0f} s")


def with_validation_images(data):
    """The data set with its validation images among those to learn from."""
    both = data.train, data.valid
    images, labels = torch.cat([split.images for split in both]), torch.cat([split.labels for split in both])
    return replace(data, train=Split(images, labels))


def run_course(data, options, seed):
    """One training of the course's recipe."""
    torch.manual_seed(seed)
    model, known = resnet(data), with_validation_images(data) if options.all_images else data
    history = fit(model, known, resnet_recipe(data, options.epochs), seed)
    row = {
        "seed": seed, "epochs": len(history), "images": len(known.train), "seconds": history.seconds.sum(),
        "images_per_second": history.images_per_second.median(),
    }
    if not options.all_images:  # else it has learned from them
        row["valid_accuracy"] = history.valid_accuracy.max()
        row["seconds_to_target"] = first_time(history.seconds.cumsum(), history.valid_accuracy, options.target)
    if options.test or options.all_images:
        test = data.open_test()
        views = predict_augmented(model, test).argmax(1)
        row["test_accuracy"] = evaluate(model, test)["accuracy"]
        row["test_accuracy_ten_views"] = (views == test.labels).double().mean().item()
    return row, work_of_training(model, data.image_size)


def transformed(rows):
    """Images and labels of a batch."""
    return torch.stack([f(image) for f, image, _ in rows]), torch.stack([label for *_, label in rows])


def tutorial_batches(split, data, training, device):
    """A DataLoader over images that are turned into normalised tensors one at a time; for a GPU by workers."""
    steps = [v2.RandomCrop(data.image_size, padding=4), v2.RandomHorizontalFlip()] if training else []
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
    transform = v2.Compose(steps)
    pairs = [(transform, image, label) for image, label in TensorDataset(split.images, split.labels)]
    helped = {"num_workers": min(4, os.cpu_count() or 1), "pin_memory": True, "persistent_workers": True}
    helped = helped if device.type == "cuda" else {}
    return DataLoader(pairs, batch_size=128, shuffle=training, drop_last=training, collate_fn=transformed, **helped)


def small_resnet18(classes):
    """torchvision's ResNet-18 with a 3×3 stem and no pooling after it."""
    model = resnet18(weights=None, num_classes=classes)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def accuracy_of(model, batches, device):
    """Share of images that are classified rightly."""
    model.eval()
    with torch.no_grad():
        hits = [(model(x.to(device)).argmax(1).cpu() == y).double() for x, y in batches]
    return torch.cat(hits).mean().item()


def run_tutorial(data, options, device):
    """SGD with OneCycle, in float32 with PyTorch's own settings, until its epochs or its seconds are over."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = True, False  # the course sets both the other way
    peak = convolution_peak(device, "float32")  # under these settings
    model = small_resnet18(len(data.classes)).to(device)
    batches, checks = tutorial_batches(data.train, data, True, device), tutorial_batches(data.valid, data, False, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = options.tutorial_epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
    spent, step, seconds, scores = 0.0, 0, [], []
    for _ in range(options.tutorial_epochs):
        model.train()
        start = time.perf_counter()
        for x, y in batches:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if spent + time.perf_counter() - start > options.tutorial_seconds:
                break
        wait(device)
        spent += time.perf_counter() - start
        if spent > options.tutorial_seconds:
            break
        seconds, scores = seconds + [spent], scores + [accuracy_of(model, checks, device)]
    speed, finished = 128 * step / spent, step == steps
    return {
        "epochs": options.tutorial_epochs, "finished": finished, "seconds": spent, "images_per_second": speed,
        "projected_seconds": spent if finished else 128 * steps / speed, "valid_accuracy": max(scores, default=None),
        "seconds_to_target": first_time(seconds, scores, options.target),
        "share_of_peak": speed * work_of_training(model, data.image_size) / peak,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="cifar10", help="as in the chapters (default cifar10)")
    parser.add_argument("--target", type=float, default=0.94, help="validation accuracy to reach (default 0.94)")
    parser.add_argument("--epochs", type=at_least(1), help="of the course's recipe (default: what the recipe says)")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="trainings of the course's recipe (default 1)")
    parser.add_argument("--test", action="store_true", help="open the test split at the end of each training")
    parser.add_argument("--all-images", action="store_true",
                        help="train the course's network on the validation images too; judge by the test split")
    parser.add_argument("--tutorial-epochs", type=at_least(1), default=30, help="its OneCycle schedule is as long (default 30)")
    parser.add_argument("--tutorial-seconds", type=float, default=60, help="of its training at most; 0 leaves it out (default 60)")
    options = parser.parse_args()
    device = pick_device()
    precision = training_precision(device)
    data = load(options.dataset, seed=0)
    peak = {name: convolution_peak(device, name) for name in dict.fromkeys((precision, "float32"))}
    print("convolution peak:", ", ".join(f"{value / 1e9:,.0f} GFLOP/s in {name}" for name, value in peak.items()))
    rows = []
    for seed in range(options.seeds):
        row, work = run_course(data, options, seed)
        row["share_of_peak"] = row["images_per_second"] * work / peak[precision]
        rows.append(row)
        print("course:", json.dumps(row))
        if "seconds_to_target" in row:
            print(f"course, {in_words(row, options.target)}")
    for name in ("valid_accuracy", "test_accuracy", "test_accuracy_ten_views", "seconds"):
        values = [row[name] for row in rows if name in row]
        if values:
            print(f"course, {name}: mean {statistics.mean(values):.4g}, from {min(values):.4g} to {max(values):.4g}")
    report = {"course": rows, "peak": peak, "target": options.target, "dataset": data.name}
    if options.tutorial_seconds > 0:
        row = run_tutorial(data, options, device)
        print(f"tutorial's ResNet-18, {in_words(row, options.target)}")
        ended = "run to the end" if row["finished"] else f"stopped early; to its end it would take {row['projected_seconds']:,.0f} s"
        print(f"tutorial's ResNet-18: {row['images_per_second']:,.0f} images a second, {row['share_of_peak']:.0%} of the peak, {ended}")
        report["tutorial"] = row
    print(json.dumps({**report, "provenance": provenance()}))


if __name__ == "__main__":
    run(main)
