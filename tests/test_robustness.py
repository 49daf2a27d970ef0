"""Corruptions at other sizes and devices, and the promises of adversarial noise on a network with batch norm."""

import copy

import pytest
import torch
from torch import nn

from vision_course.cnn import SmallCNN
from vision_course.core import CourseError
from vision_course.robustness import CORRUPTIONS, corrupt, fgsm, pgd, random_noise
from vision_course.shapes import render

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = SmallCNN(10, widths=(8, 16, 16, 16))
    model(render(64, 32, seed=9).images / 255)  # running statistics that are not the initial ones
    nn.init.normal_(model.head.weight)
    return model.train()


@pytest.fixture(scope="module")
def batch():
    made = render(24, 32, seed=4)
    return made.images / 255, made.labels


def margin(model, images, labels):
    model.eval()
    with torch.no_grad():
        logits = model(images)
    model.train()
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - logits.gather(1, labels[:, None])[:, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("size", [24, 64])
def test_corruptions_grow_with_severity_at_every_size(kind, size, device):
    images = render(12, size, seed=1).images.to(device)
    far = []
    for severity in range(1, 6):
        spoiled = corrupt(images, kind, severity, seed=2)
        assert spoiled.shape == images.shape and spoiled.dtype == torch.float32 and spoiled.device == images.device
        assert torch.isfinite(spoiled).all() and 0 <= spoiled.min() and spoiled.max() <= 1
        far.append((spoiled - images / 255).abs().mean().item())
    assert far[0] > 0.002 and far[4] > 1.1 * far[0]
    assert torch.equal(corrupt(images, kind, 3, seed=2), corrupt(images, kind, 3, seed=2))


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_take_odd_shapes_and_leave_the_input_alone(kind):
    images = torch.rand(3, 3, 27, 35, generator=torch.Generator().manual_seed(0))
    before, state = images.clone(), torch.get_rng_state()
    assert corrupt(images, kind, 5).shape == images.shape
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_epsilon_zero_changes_nothing(attack, network, batch):
    assert torch.equal(attack(network, *batch, 0.0), batch[0])


def test_more_steps_are_never_weaker(network, batch):
    images, labels = batch
    margins = [margin(network, pgd(network, images, labels, 0.03, steps), labels) for steps in (1, 2, 3, 5, 10, 20)]
    margins = [margin(network, images, labels), *margins]
    for fewer, more in zip(margins, margins[1:]):
        assert (more >= fewer - 1e-5).all()
    assert margins[-1].mean() > margins[0].mean() + 0.1


def test_pgd_is_never_weaker_than_fgsm_and_both_beat_random_noise(network, batch):
    images, labels = batch
    fast, slow, blind = fgsm(network, images, labels, 0.03), pgd(network, images, labels, 0.03), random_noise(images, 0.03)
    assert (margin(network, slow, labels) >= margin(network, fast, labels) - 1e-5).all()
    assert margin(network, fast, labels).mean() > margin(network, blind, labels).mean()


@pytest.mark.parametrize("epsilon", [1 / 255, 8 / 255, 0.5, 1.0])
def test_the_perturbation_stays_inside_its_ball(epsilon, network, batch):
    images, labels = batch
    for attacked in (fgsm(network, images, labels, epsilon), pgd(network, images, labels, epsilon), random_noise(images, epsilon)):
        assert (attacked - images).abs().max() <= epsilon + 1e-6
        assert 0 <= attacked.min() and attacked.max() <= 1


def test_the_network_is_left_as_it_was(network, batch):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pgd(network, *batch, 0.03, 3, batch_size=7)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_works_inside_no_grad_and_on_a_frozen_network(network, batch):
    expected = pgd(network, *batch, 0.03, 3)
    for p in network.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(pgd(network, *batch, 0.03, 3), expected)
    for p in network.parameters():
        p.requires_grad_(True)


@pytest.mark.parametrize("spoil, words", [
    (lambda x: x[0], "shape"),
    (lambda x: x[:, :1], "shape"),
    (lambda x: x[:0], "empty"),
    (lambda x: x * 255, "bytes, or floats"),
    (lambda x: x - 1, "bytes, or floats"),
    (lambda x: x * float("nan"), "NaN"),
])
def test_bad_images_are_one_clear_line(spoil, words, network, batch):
    images, labels = batch
    for call in (lambda x: corrupt(x, "fog", 1), lambda x: random_noise(x, 0.1), lambda x: fgsm(network, x, labels[: len(x)], 0.1)):
        with pytest.raises(CourseError, match=words) as caught:
            call(spoil(images))
        assert "\n" not in str(caught.value)


def test_bad_requests_are_one_clear_line(network, batch):
    images, labels = batch
    broken = copy.deepcopy(network)
    nn.init.constant_(broken.head.weight, float("nan"))
    for call, words in (
        (lambda: corrupt(images, "defocus", 1), "defocus_blur"),
        (lambda: corrupt(images, "fog", 0), "1 to 5"),
        (lambda: pgd(network, images, labels + 10, 0.1), "classes 0 to 9"),
        (lambda: pgd(network, images, labels[:3], 0.1), "one an image"),
        (lambda: pgd(network, images, labels > 0, 0.1), "whole numbers"),
        (lambda: random_noise(images, float("nan")), "epsilon nan"),
        (lambda: pgd(broken, images, labels, 0.1), "NaN or infinite"),
        (lambda: pgd(network, images, labels, -0.1), "epsilon"),
        (lambda: pgd(network, images, labels, 0.1, steps=0), "steps 0"),
    ):
        with pytest.raises(CourseError, match=words):
            call()


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_images_of_any_float_type_are_spoiled_alike(kind, dtype, batch):
    images = (batch[0][:2] * 255).round() / 255
    assert (corrupt(images.to(dtype), kind, 3) - corrupt(images.to(dtype).float(), kind, 3)).abs().max() < 1e-6
