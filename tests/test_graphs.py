"""Graphs: parity with the network, one file, what is inside it, bad input, and clocks that take turns."""

import statistics
import time

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from vision_course.cnn import SmallCNN, conv_block
from vision_course.core import CourseError
from vision_course.graphs import (
    export_onnx, file_megabytes, fold_norms, interleaved_seconds, open_session, quantise_onnx, run_session,
)
from vision_course.resnet import PlainBlock, ResidualBlock, ResNet, ShortBlock


def warmed(network, size=16):
    """A network whose running statistics are not the first ones."""
    torch.manual_seed(0)
    network.train()
    for _ in range(3):
        network(torch.rand(32, 3, size, size))
    return network.eval()


def build(block=ShortBlock):
    torch.manual_seed(1)
    return warmed(ResNet(5, widths=(8, 16, 16), block=block))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder, network = tmp_path_factory.mktemp("graphs"), build()
    return network, export_onnx(network, torch.rand(1, 3, 16, 16), folder / "float.onnx", {"note": "ünï", "json": '{"a": 1}'})


def largest_difference(network, path, count=7, size=16):
    images = torch.rand(count, 3, size, size)
    with torch.no_grad():
        expected = network(images).numpy()
    return np.abs(run_session(open_session(path), images.numpy(), 3) - expected).max()


@pytest.mark.parametrize("network", [build(ResidualBlock), build(PlainBlock), warmed(SmallCNN(5, widths=(8, 8, 8, 8)))],
                         ids=["residual", "plain", "small"])
def test_a_graph_gives_the_logits_of_its_network(network, tmp_path):
    path = export_onnx(network, torch.zeros(2, 3, 16, 16), tmp_path / "a.onnx")
    assert largest_difference(network, path) < 1e-4
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_any_number_of_images_and_metadata(exported):
    network, path = exported
    assert max(largest_difference(network, path, count) for count in (1, 2, 50)) < 1e-4
    session = open_session(path)
    assert session.get_modelmeta().custom_metadata_map == {"note": "ünï", "json": '{"a": 1}'}
    assert [x.name for x in (*session.get_inputs(), *session.get_outputs())] == ["image", "logits"]


def test_nothing_of_this_machine_is_in_the_file(exported):
    content = exported[1].read_bytes()
    assert b".py" not in content and b"/home" not in content and b"site-packages" not in content


def test_exporting_leaves_the_network_as_it_was(tmp_path):
    network = build().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    export_onnx(network, torch.rand(2, 3, 16, 16), tmp_path / "a.onnx")
    assert network.training and all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.stages[0][0])


def test_folding_changes_nothing_and_leaves_negative_factors_alone():
    torch.manual_seed(0)
    block, images = warmed(conv_block(3, 6)), torch.randn(4, 3, 8, 8)
    nn.init.uniform_(block[2].weight, 0.5, 2)
    expected = block(images)
    fold_norms(block)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in block)
    torch.testing.assert_close(block(images), expected, atol=1e-5, rtol=1e-5)
    other = warmed(conv_block(3, 6))
    other[2].weight.data[0] = -1
    expected = other(images)
    assert isinstance(fold_norms(other)[2], nn.BatchNorm2d)
    torch.testing.assert_close(other(images), expected)


@pytest.mark.parametrize("options", [{}, {"per_channel": False}, {"signed_activations": True}, {"weight_bits": 8}], ids=str)
def test_eight_bits_are_near_and_smaller(exported, tmp_path, options):
    network, path = exported
    batches = [np.random.default_rng(i).random((32, 3, 16, 16), dtype=np.float32) for i in range(3)]
    small = quantise_onnx(path, tmp_path / "small.onnx", batches, **options)
    images = batches[0]
    expected = run_session(open_session(path), images)
    off = np.abs(run_session(open_session(small), images) - expected)
    assert off.mean() < 0.1 * expected.std() and off.max() > 0
    assert file_megabytes(small) < file_megabytes(path)
    assert open_session(small).get_modelmeta().custom_metadata_map["note"] == "ünï"
    kinds = {tensor.data_type for tensor in onnx.load(small).graph.initializer if len(tensor.dims) == 4 and tensor.dims[0] > 1}
    assert kinds == {onnx.TensorProto.INT8}


@pytest.mark.parametrize("layer", [nn.Conv2d(64, 4, 3), nn.Conv2d(64, 4, 1), nn.Sequential(nn.Flatten(), nn.Linear(4096, 4))], ids=str)
def test_sums_of_the_largest_products_do_not_overflow(layer, tmp_path):
    for p in layer.parameters():  # whole bytes on both sides, at all places: half of it is lost where sums end at 16 bits
        p.data.fill_(1.0)
        p.data[1::2] = -1.0
    images = np.random.default_rng(0).random((16, 64, 8, 8), dtype=np.float32)
    images[:8] = 1.0
    path = export_onnx(layer, torch.zeros(2, 64, 8, 8), tmp_path / "a.onnx")
    expected = run_session(open_session(path), images)
    small = run_session(open_session(quantise_onnx(path, tmp_path / "b.onnx", [images])), images)
    assert np.abs(small - expected).max() < 0.01 * np.abs(expected).max()


class Odd(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x.mean(1)).real


class Fickle(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("network, words", [(Odd(), "linalg_eig"), (Fickle(), "Fickle cannot be exported")])
def test_a_network_that_cannot_be_exported_is_named_and_leaves_no_file(network, words, tmp_path):
    with pytest.raises(CourseError, match=words) as caught:
        export_onnx(network, torch.rand(2, 3, 8, 8), tmp_path / "a.onnx")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("spoil", [lambda content: content[:3000], lambda content: b"", lambda content: b"PK" + content[2:]])
def test_a_bad_file_is_one_clear_line(exported, tmp_path, spoil):
    path = tmp_path / "bad.onnx"
    path.write_bytes(spoil(exported[1].read_bytes()))
    with pytest.raises(CourseError, match="cannot load it") as caught:
        open_session(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(CourseError, match="not there"):
        open_session(tmp_path / "none.onnx")


def test_calls_take_turns_and_the_first_rounds_do_not_count():
    order = []
    seconds = interleaved_seconds({name: lambda name=name: order.append(name) for name in "abcd"}, rounds=18)
    rounds = ["".join(order[i : i + 4]) for i in range(0, 80, 4)]
    assert {"".join(sorted(turn)) for turn in rounds} == {"abcd"} and [len(row) for row in seconds.values()] == [18] * 4
    before = {name: {turn[turn.index(name) - 1] for turn in rounds if turn.index(name)} for name in "abcd"}
    assert all(before[name] == set("abcd") - {name} for name in "abcd")  # nobody always runs after the same one
    paused = interleaved_seconds({"a": lambda: None}, rounds=3, pause=0.3)
    assert min(paused["a"]) < 0.3  # the pause does not count
    slow = interleaved_seconds({"waits": lambda: time.sleep(0.03), "idle": lambda: None}, rounds=3)
    assert statistics.median(slow["waits"]) >= 0.03 > statistics.median(slow["idle"])


@pytest.mark.parametrize("batches", [[], [np.zeros((0, 3, 16, 16), np.float32)], [np.full((2, 3, 16, 16), np.nan, np.float32)]], ids=len)
def test_calibration_needs_images(exported, tmp_path, batches):
    with pytest.raises(CourseError, match="calibration: no images"):
        quantise_onnx(exported[1], tmp_path / "small.onnx", batches)
    assert not list(tmp_path.iterdir())
