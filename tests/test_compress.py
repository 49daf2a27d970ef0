"""Pruning, grids and distillation against their references, and what is refused."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from conftest import copied, unchanged
from onnx import numpy_helper
from torch import nn
from torch.nn.utils import prune

from vision_course.compress import (
    Pupil, affine_grid, dequantise, distillation_loss, learned_weights, magnitude_masks, masked, multiplications,
    pareto_front, prune_channels, prune_to, quantise, stored_megabytes, symmetric_grid,
)
from vision_course.core import CourseError
from vision_course.data import Dataset, Split
from vision_course.graphs import export_onnx, quantise_onnx
from vision_course.resnet import ResidualBlock, ResNet, ShortBlock, network_rows
from vision_course.train import Recipe, load_or_train

EXAMPLE = torch.zeros(2, 3, 16, 16)


def build(block=ShortBlock, widths=(16, 32, 32)):
    torch.manual_seed(0)
    network = ResNet(5, widths=widths, block=block)
    network.stem[0].weight.requires_grad_(False)
    return network.eval()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_masks_are_those_of_torch(share):
    network, theirs = build(), build()
    weights = learned_weights(network)
    assert "stem.0.weight" not in weights and "head.weight" in weights
    layers = [(theirs.get_submodule(name.removesuffix(".weight")), "weight") for name in weights]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=share)
    for mask, (layer, _) in zip(magnitude_masks(weights, share).values(), layers):
        assert torch.equal(mask, layer.weight_mask.bool())
    for name, mask in magnitude_masks(weights, share, per_layer=True).items():
        alone = prune.L1Unstructured(amount=share).compute_mask(weights[name], torch.ones_like(weights[name]))
        assert torch.equal(mask, alone.bool())


def test_masking_leaves_the_network_as_it_was():
    network = build()
    before, masks = copied(network), magnitude_masks(learned_weights(network), 0.7)
    pruned = masked(network, masks)
    assert unchanged(network, before)
    left = sum((weight != 0).sum().item() for weight in learned_weights(pruned).values())
    total = sum(weight.numel() for weight in learned_weights(pruned).values())
    assert left == total - round(0.7 * total)


def test_sizes_on_the_disk():
    dense, zeros = torch.randn(1000), torch.zeros(1000)
    zeros[::10] = torch.randn(100)
    assert stored_megabytes([dense, dense])["plain"] == stored_megabytes([zeros, zeros])["plain"] == 8e-3
    assert stored_megabytes([dense])["sparse"] == 12e-3 and stored_megabytes([zeros])["sparse"] == 1.2e-3
    assert stored_megabytes([zeros])["deflated"] < 1e-3 < 3.5e-3 < stored_megabytes([dense])["deflated"]


@pytest.mark.parametrize("block", [ShortBlock, ResidualBlock])
def test_multiplications_are_those_of_the_layers(block):
    network = build(block)
    assert multiplications(network, EXAMPLE) == sum(row[3] for row in network_rows(network, 16)[0])


@pytest.mark.parametrize("block", [ShortBlock, ResidualBlock])
def test_channels_go_and_the_rest_stays(block):
    network = build(block).train()
    before = copied(network)
    narrow = prune_channels(network, EXAMPLE, 0.5, round_to=8)
    assert unchanged(network, before) and network.training and narrow.training
    assert all(p.grad is None for p in narrow.parameters())
    assert [p.requires_grad for p in narrow.parameters()] == [p.requires_grad for p in network.parameters()]
    assert [stage[0][0].out_channels for stage in narrow.stages] == [8, 16, 16]
    assert narrow.stem[0].out_channels == 24 and narrow.eval()(EXAMPLE).shape == (2, 5)
    prune_channels(network, EXAMPLE, 0.5, round_to=8).load_state_dict(narrow.state_dict())  # a checkpoint of it can be read again


def test_some_channels_always_stay():
    widths = lambda **more: [stage[0][0].out_channels for stage in prune_channels(build(widths=(16, 32, 64)), EXAMPLE, 0.99, **more).stages]
    assert widths() == [16, 16, 16] and widths(round_to=8) == [8, 8, 8]


def test_a_silent_channel_goes_first_and_nothing_changes():
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))
    with torch.no_grad():
        for k in (1, 4):
            chain[0].weight[k], chain[0].bias[k], chain[2].weight[:, k] = 0, 0, 0
    narrow, images = prune_channels(chain, torch.rand(2, 3, 8, 8), 1 / 3, ignored=("2",), round_to=1), torch.rand(5, 3, 8, 8)
    assert torch.equal(narrow[0].weight, chain[0].weight[[0, 2, 3, 5]])
    torch.testing.assert_close(narrow(images), chain(images))


@pytest.mark.parametrize("part", [0.7, 0.4])
def test_pruned_to_a_part_of_the_multiplications(part):
    network = build(widths=(32, 64, 64))
    count, full = multiplications(prune_to(network, EXAMPLE, part), EXAMPLE), multiplications(network, EXAMPLE)
    assert 0.5 * part * full < count <= part * full


@pytest.mark.parametrize("seed", range(4))
def test_grids_are_those_of_torch(seed):
    x = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(seed)) * 10.0 ** torch.arange(-3, 3).view(6, 1, 1, 1)
    for grid in (symmetric_grid(x), symmetric_grid(x, highest=64), affine_grid(x)):
        theirs = torch.fake_quantize_per_tensor_affine(x, grid.scale.item(), int(grid.zero_point), grid.lowest, grid.highest)
        torch.testing.assert_close(dequantise(quantise(x, grid), grid), theirs)
    for grid in (symmetric_grid(x, axis=0), affine_grid(x, axis=0)):
        given = grid.scale.flatten(), grid.zero_point.flatten().int(), 0, grid.lowest, grid.highest
        theirs = torch.fake_quantize_per_channel_affine(x, *given)
        torch.testing.assert_close(dequantise(quantise(x, grid), grid), theirs)


@pytest.mark.parametrize("make", [symmetric_grid, affine_grid])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_no_value_moves_by_more_than_half_a_step_and_zero_stays(make, axis):
    x = torch.randn(7, 9, generator=torch.Generator().manual_seed(1)) + 3  # all positive or nearly so
    grid = make(x, axis)
    assert ((dequantise(quantise(x, grid), grid) - x).abs() <= grid.scale * 0.5001 + 1e-6).all()
    assert (dequantise(quantise(0 * x, grid), grid) == 0).all()
    assert torch.isfinite(dequantise(quantise(0 * x, make(0 * x, axis)), make(0 * x, axis))).all()


@pytest.mark.parametrize("bad", [torch.zeros(0, 3), torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])], ids=str)
def test_grids_refuse_what_has_no_range(bad):
    for make in (symmetric_grid, affine_grid):
        with pytest.raises(CourseError, match="nothing to quantise"):
            make(bad)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits, highest", [(7, 64), (8, 127)])
def test_onnx_runtime_stores_the_steps_that_we_compute(per_channel, bits, highest, tmp_path):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3)
    layer.weight.data *= torch.tensor([0.1, 1, 3, 0.5]).view(4, 1, 1, 1)
    path = export_onnx(nn.Sequential(layer, nn.ReLU()), torch.zeros(2, 3, 8, 8), tmp_path / "a.onnx")
    images = [np.random.default_rng(0).random((16, 3, 8, 8), dtype=np.float32)]
    small = onnx.load(quantise_onnx(path, tmp_path / "b.onnx", images, per_channel=per_channel, weight_bits=bits))
    stored = [numpy_helper.to_array(tensor) for tensor in small.graph.initializer if len(tensor.dims) == 4]
    ours = quantise(layer.weight.detach(), symmetric_grid(layer.weight.detach(), 0 if per_channel else None, highest))
    assert len(stored) == 1 and stored[0].dtype == np.int8
    assert np.abs(stored[0].astype(int) - ours.numpy()).max() <= 1 and (stored[0] == ours.numpy()).mean() > 0.99


@pytest.mark.parametrize("call, words", [
    (lambda: magnitude_masks(learned_weights(build()), 50), "from 0 to 1"),
    (lambda: learned_weights(build().requires_grad_(False)), "no weights that learn"),
    (lambda: learned_weights(nn.ReLU()), "no weights that learn"),
    (lambda: prune_channels(build(), EXAMPLE, 1.0), "below 1"),
    (lambda: prune_to(build(), EXAMPLE, 1.5), "between 0 and 1"),
    (lambda: prune_to(build(), EXAMPLE, 0.001), "cannot be reached"),
    (lambda: Pupil(nn.ReLU(), nn.ReLU(), temperature=0.0), "above 0"),
    (lambda: Pupil(nn.ReLU(), nn.ReLU(), weight=1.5), "above 0"),
])
def test_bad_input_is_one_clear_line(call, words):
    with pytest.raises(CourseError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_distillation_is_torchs_distance_and_the_temperature_keeps_gradients_at_size():
    torch.manual_seed(0)
    logits, told = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5)
    for temperature in (1.0, 3.0):
        reference = F.kl_div((logits / temperature).log_softmax(1), (told / temperature).softmax(1), reduction="batchmean")
        ours = distillation_loss(logits, told, torch.tensor(2.0), temperature, 0.6)
        torch.testing.assert_close(ours, 0.4 * torch.tensor(2.0) + 0.6 * temperature**2 * reference)
    sizes = [torch.autograd.grad(distillation_loss(logits, told, torch.tensor(0.0), t, 1.0), logits)[0].norm() for t in (20.0, 40.0)]
    assert sizes[1] == pytest.approx(sizes[0].item(), rel=0.05)


def greys():
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 2
    noise = torch.randint(0, 60, (64, 3, 8, 8), generator=random, dtype=torch.uint8)
    split = Split((noise + 150 * labels[:, None, None, None].byte()).contiguous(memory_format=torch.channels_last), labels)
    return Dataset("two-greys", ("dark", "light"), split, split, split, (0.5,) * 3, (0.3,) * 3, "two-greys")


def test_a_pupil_learns_from_its_teacher_alone_and_is_saved_without_it(tmp_path, monkeypatch):
    monkeypatch.setenv("VISION_COURSE_OUTPUTS", str(tmp_path))
    monkeypatch.setenv("VISION_COURSE_DEVICE", "cpu")

    class Knowing(nn.Module):  # is right, while all training labels are wrong
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(20.0))

        def forward(self, x):
            bright = self.factor * (x.mean((1, 2, 3)) - 0.4)
            return torch.stack([-bright, bright], 1)

    teacher, data = Knowing().train(), greys()
    data = replace(data, train=Split(data.train.images, 1 - data.train.labels))
    right = lambda run: (run.model(data.valid.images / 255).argmax(1) == data.valid.labels).float().mean().item()
    make = lambda weight: lambda _: Pupil(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), teacher, 2.0, weight)
    recipe = Recipe("pupil", epochs=12, batch_size=16, learning_rate=0.02, augment="none", schedule="constant")
    follows = load_or_train(make(1.0), data, recipe)
    assert right(follows) == 1
    assert teacher.training and teacher.factor.item() == 20.0 and teacher.factor.grad is None
    assert set(follows.model.state_dict()) == {"student.1.weight", "student.1.bias"}
    assert torch.equal(load_or_train(make(1.0), data, recipe).model.student[1].weight, follows.model.student[1].weight)
    alone = load_or_train(make(0.0), data, replace(recipe, name="alone"))
    assert right(alone) < 0.9


def test_the_front_holds_whoever_is_beaten_by_none():
    cost, value = torch.tensor([1.0, 2, 2, 3, 4]), torch.tensor([1.0, 3, 2, 3, 5])
    assert pareto_front(cost, value).tolist() == [True, True, False, False, True]
    torch.manual_seed(0)
    cost, value = torch.rand(50), torch.rand(50)
    slow = [not any(c <= cost[i] and v >= value[i] and (c < cost[i] or v > value[i]) for c, v in zip(cost, value)) for i in range(50)]
    assert pareto_front(cost, value).tolist() == slow
