"""Train the backbone that the package brings, and write it with all that is to be known about it.

    python benchmarks/train_backbone.py                 # 48 epochs; needs Tiny-ImageNet under data/
    python benchmarks/train_backbone.py --epochs 30 --seed 1 --folder somewhere

The network is chapter 3's, and so is its recipe, but for half the rate and half the smoothing. It sees Tiny-ImageNet at 32
pixels: in training random windows of the 64-pixel originals, of half to all of their width, reduced to 32; in validation whole
images reduced to 32. A tenth of the training images is held out and decides which epoch is kept. The score is measured on the
official validation images, which decide nothing, with the weights as they are stored, in half precision. A training that was
stopped goes on where it was.

The weights in the package come from half of the data set, 250 training and 25 validation images a class. With all of it, others
come out.
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from tools import at_least, run, training_precision
from vision_course.core import output_folder, pick_device, provenance
from vision_course.augment import pixels_last, places, to_float
from vision_course.data import AUGMENTATIONS, Split, load, windows
from vision_course.readers import channels_first, resized
from vision_course.resnet import ResNet, quick_biases, resnet_recipe, start_well
from vision_course.train import fit, predict
from vision_course.transfer import BUNDLED
from vision_course.weights import save_backbone

SIZE = 32
ASSETS = Path(__file__).resolve().parent.parent / "vision_course" / "assets"


def reduced_window(images, generator):
    """A random window of each image, reduced; its width is drawn for the batch."""
    width = images.shape[-1]
    choices = torch.arange(width // 2, width + 1, width // 16)
    side = choices[torch.randint(len(choices), (), generator=generator, device=generator.device).cpu()].item()
    rows = torch.arange(len(images), device=images.device)
    top, left = (places(generator, len(images), width - side + 1) for _ in range(2))
    picked = channels_first(windows(pixels_last(images), side)[rows, top, left].unflatten(2, (side, -1)))
    return F.interpolate(to_float(picked), (SIZE, SIZE), mode="bilinear", antialias=True)


def small(split):
    return Split(resized(split.images, SIZE), split.labels)


def rounded(network):
    """The network as it will be stored."""
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.half())
    return network


def scores(network, split):
    """Share of images whose class is the best guess, and among the best five."""
    best = predict(network, split).topk(5, 1).indices == split.labels[:, None]  # (images, 5)
    return {"top1": best[:, 0].double().mean().item(), "top5": best.any(1).double().mean().item(), "images": len(split)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=at_least(1), default=48, help="passes over the training images (default 48)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of first weights, order and augmentation (default 0)")
    parser.add_argument("--images", type=at_least(1), help="train on so many images only, to try the command")
    parser.add_argument("--folder", type=Path, default=ASSETS, help="where the two files go (default: into the package)")
    options = parser.parse_args()

    training_precision(pick_device())
    AUGMENTATIONS["reduced_window"] = reduced_window
    data = load("tiny_imagenet", seed=0)
    data = data.smaller(options.images) if options.images else data
    recipe = replace(resnet_recipe(data, options.epochs), name="backbone", learning_rate=0.12, label_smoothing=0.1,
                     augment="alternate+reduced_window")
    torch.manual_seed(options.seed)
    network = ResNet(len(data.classes), data.mean, data.std, **BUNDLED)
    quick_biases(start_well(network, resized(data.train.images[:500], SIZE)))
    state = output_folder("tiny_imagenet") / "checkpoints" / "backbone.state"
    history = fit(network, replace(data, valid=small(data.valid)), recipe, options.seed, state)
    score = scores(rounded(network), small(data.open_test()))
    path = save_backbone(options.folder, network, {
        "network": "ResNet", "settings": {name: getattr(value, "__name__", value) for name, value in BUNDLED.items()},
        "trained_on": "Tiny-ImageNet", "classes": len(data.classes), "image_size": SIZE,
        "training_images": len(data.train), "fingerprint": data.fingerprint, **score, "seed": options.seed,
        "parameters": sum(p.numel() for name, p in network.named_parameters() if not name.startswith("head.")),
        "recipe": asdict(recipe), "seconds": history.seconds.sum(), "history": history.to_dict("records"),
        "command": " ".join(["python benchmarks/train_backbone.py", *sys.argv[1:]]), "data": "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "provenance": provenance(),
    })
    state.unlink(missing_ok=True)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, top-1 {score['top1']:.2%}, top-5 {score['top5']:.2%}")


if __name__ == "__main__":
    run(main)
