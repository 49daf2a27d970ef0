"""Is the service's overlay true? Its occlusion maps and Grad-CAM's, scored on the objects' masks as in chapter 5.

    python benchmarks/overlay.py --images 300

The built-in data set knows which pixels are the object. Both explain the answer of the same network to the same validation images:
occlusion asks the exported graph, Grad-CAM looks into the network (at the last layer that still has places; with a linear head
behind global pooling that is the class activation map). A map that knows nothing points at the object as often as the object
covers the image. Results are printed in words and as JSON.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from tools import at_least, run
from vision_course.core import CourseError, provenance
from vision_course.data import load
from vision_course.explain import grad_cam
from vision_course.maps import mean_interval, overlap, pointing_game, share_inside
from vision_course.predictor import Predictor, occlusion_map
from vision_course.resnet import resnet, resnet_recipe
from vision_course.train import load_or_train

SCORES = {"points at the object": pointing_game, "share on the object": share_inside, "overlap with the object": overlap}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default="outputs/shapes/exports/model.onnx", help="default: the network of chapter 8")
    parser.add_argument("--images", type=at_least(1), default=300, help="validation images (default 300)")
    options = parser.parse_args()
    data, predictor = load("shapes"), Predictor(options.model)
    trained = load_or_train(resnet, data, resnet_recipe(data))
    made = predictor.metadata.get("provenance", {})
    if any(made.get(what) != trained.info[what] for what in ("recipe", "seed")) or predictor.metadata["network"] != "resnet":
        raise CourseError(f"{options.model}: is not the residual network of chapter 3. Run vision-course export first.")
    split = data.valid.subset(torch.arange(min(options.images, len(data.valid))))
    pixels = split.images.permute(0, 2, 3, 1).numpy()
    answers = predictor.predict(pixels).argmax(1)
    heats, seconds = [], []
    for image, target in zip(pixels, answers):
        start = time.perf_counter()
        heats.append(occlusion_map(predictor, image, int(target))[0])
        seconds.append(time.perf_counter() - start)
    network = trained.model.cpu()
    maps = {
        "occlusion": torch.tensor(np.stack(heats), dtype=torch.float32),
        "Grad-CAM": grad_cam(network, split.images / 255, torch.as_tensor(answers)),
    }
    found = {name: {what: mean_interval(score(heat, split.masks)) for what, score in SCORES.items()} for name, heat in maps.items()}
    area = split.masks.float().mean().item()
    print(f"the object covers {area:.0%} of the image on average; {1000 * statistics.median(seconds):.0f} ms for an occlusion map")
    for name, rows in found.items():
        print(f"{name:10}", ", ".join(f"{what} {mean:.2f} ({low:.2f} to {high:.2f})" for what, (low, mean, high) in rows.items()))
    report = {"images": len(split), "area": area, "scores": found, "seconds": statistics.median(seconds)}
    print(json.dumps({**report, "provenance": provenance()}))


if __name__ == "__main__":
    run(main)
