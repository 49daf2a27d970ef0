"""Grad-CAM images a second: the course's against pytorch-grad-cam, captum, and the bare forward pass, which is the limit.

    python benchmarks/attribution.py

All explain the same batch by the same layer in float32, each image with a target of its own. A round takes every contender
in turn; the first round warms up and is not counted, and the median of the others is printed, in words and as JSON. Before
that the maps are compared. pytorch-grad-cam returns maps in [0, 1] at the size of the image, captum the layer's own size.

What there is to gain depends on the network, so two are measured. The course's residual network, with the channels that it has
for many images, spends its time in arithmetic, to which a graph from the pixels on adds little. MobileNetV2 makes large maps
with little arithmetic, and a graph keeps them all. It also depends on the order in memory in which network and images come,
the same for all contenders: PyTorch's usual one, or `channels_last`, which the course brings images to on a CPU anyway.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from itertools import product
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torchvision import models

from tools import at_least, run
from vision_course.core import pick_device, provenance
from vision_course.data import Dataset, Split
from vision_course.explain import grad_cam, target_layer
from vision_course.resnet import resnet

ORDERS = {"usual": torch.contiguous_format, "channels_last": torch.channels_last}
GOALS = {"pytorch-grad-cam": 3.5, "captum": 1.2, "forward pass": 0.85}  # times as many images a second


def contenders(model, images, targets, layer):
    """Call by name of contender."""
    own, reference = copy.deepcopy(model), copy.deepcopy(model)
    cam = GradCAM(model=reference, target_layers=[reference.get_submodule(layer)])
    choices = [ClassifierOutputTarget(k) for k in targets.tolist()]
    attribute = LayerGradCam(own, own.get_submodule(layer)).attribute

    def forward():
        with torch.no_grad():
            return model(images)

    return {
        "forward pass": forward,
        "vision_course": lambda: grad_cam(model, images, targets, layer),
        "vision_course, layer found": lambda: grad_cam(model, images, targets),
        "pytorch-grad-cam": lambda: cam(input_tensor=images, targets=choices),
        "captum": lambda: attribute(images, target=targets, relu_attributions=True),
    }


def largest_difference(calls, size):
    """Between our maps and captum's, relative to the largest value of each image."""
    ours, theirs = calls["vision_course"](), calls["captum"]().detach()
    theirs = F.interpolate(theirs, size, mode="bilinear")[:, 0]
    return ((ours - theirs).abs().amax((1, 2)) / theirs.amax((1, 2)).clamp(min=1e-12)).max().item()


def images_per_second(call, count, repeats, device):
    """Call several times and wait for the device."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count * repeats / (time.perf_counter() - start)


def network_and_size(text):
    """Such as course:32; the size is in pixels, 32 where none is named."""
    name, _, size = text.partition(":")
    if name != "course" and name not in models.list_models():
        raise argparse.ArgumentTypeError(f"{name!r} is neither course nor a network of torchvision")
    return name, int(size or 32)


def made(name, size):
    """The network that chapter 3 makes for many images, or one of torchvision's; untrained, as the speed does not ask."""
    if name != "course":
        return models.get_model(name, weights=None)
    split = Split(torch.randint(256, (20_000, 3, size, size), dtype=torch.uint8), torch.zeros(20_000, dtype=torch.long))
    return resnet(Dataset("made", tuple("abcdefghij"), split, split, split, (0.5,) * 3, (0.25,) * 3, "0"))


def measure(name, size, order, options):
    """Compare the maps, let the contenders take turns, and print what came out."""
    device = pick_device(options.device)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = made(name, size).eval().to(device, memory_format=ORDERS[order])
    images = torch.rand(options.batch, 3, size, size, device=device).contiguous(memory_format=ORDERS[order])
    targets = torch.arange(options.batch, device=device) % 10
    layer = target_layer(model, images)
    calls = contenders(model, images, targets, layer)
    difference = largest_difference(calls, images.shape[2:])
    assert difference < (1e-4 if device.type == "cpu" else 1e-2), f"the maps differ by {difference:.1e}"
    speeds = {contender: [] for contender in calls}
    for number in range(options.rounds + 1):
        for contender, call in calls.items():
            speeds[contender].append(images_per_second(call, options.batch, options.repeats, device))
            print(f"round {number}: {contender}: {speeds[contender][-1]:,.0f}", file=sys.stderr)
    medians = {contender: statistics.median(rows[1:]) for contender, rows in speeds.items()}
    ours = medians["vision_course"]
    ratios = {contender: round(ours / medians[contender], 2) for contender in GOALS}
    print(f"{name}, {size} pixels, layer {layer}, memory in {order} order:")
    for contender, speed in medians.items():
        told = f"; ours is {ratios[contender]} times as fast, the goal is {GOALS[contender]}" if contender in GOALS else ""
        print(f"  {contender:28} {speed:>8,.0f} images a second{told}")
    report = {"images_per_second": {each: round(v) for each, v in medians.items()}, "times_as_fast": ratios, "difference": difference}
    settings = {"network": name, "layer": layer, "size": size, "order": order, "batch": options.batch}
    print(json.dumps({**report, **settings, "provenance": provenance()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", type=network_and_size, default=[("course", 32), ("mobilenet_v2", 128)],
                        metavar="NAME:PIXELS",
                        help="course, or networks of torchvision, each with a size (default course:32 mobilenet_v2:128)")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS), help="of network and images in memory (default both)")
    parser.add_argument("--batch", type=at_least(1), default=64, help="images in the batch (default 64)")
    parser.add_argument("--rounds", type=at_least(1), default=9, help="rounds that count (default 9)")
    parser.add_argument("--repeats", type=at_least(1), default=5, help="calls of each contender in a round (default 5)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute (default auto)")
    options = parser.parse_args()
    os.environ["VISION_COURSE_DEVICE"] = pick_device(options.device).type  # for the processes, and for what they say of themselves
    for (name, size), order in product(options.networks, options.orders):  # each in a process whose memory no other has prepared
        process = get_context("spawn").Process(target=measure, args=(name, size, order, options))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    run(main)
