"""Backbones, frozen parts, rates and probes; none of it needs the bundled weights or a network."""

import urllib.error
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import Evil, copied, unchanged
from sklearn.linear_model import LogisticRegression
from torchvision.models import get_model

from vision_course.core import CourseError
from vision_course.data import Dataset, Split
from vision_course.optim import make_optimizer
from vision_course.resnet import ResNet
from vision_course.train import Recipe, fit, predict
from vision_course.transfer import (
    CUTS, Adopted, FineTuning, backbone, best_probe, features, few_images, freeze, latencies, linear_probe, parts, tune, with_head,
)
from vision_course.weights import read_weights, save_backbone, weights_file


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("VISION_COURSE_DEVICE", "cpu")


def photos(count=96, classes=3):
    """Images whose class is the channel that is brightest."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 160, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % classes
    images[torch.arange(count), labels] += 80
    split = Split(images.contiguous(memory_format=torch.channels_last), labels)
    return Dataset("coloured", ("red", "green", "blue"), split, split, split, (0.4,) * 3, (0.2,) * 3, "coloured")


def small_network(seed=0):
    torch.manual_seed(seed)
    network = ResNet(3, (0.4,) * 3, (0.2,) * 3, widths=(8, 16, 32))
    for module in network.modules():  # statistics that can be told from fresh ones
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
    return network


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """A folder with a bundled backbone of random weights."""
    folder = tmp_path_factory.mktemp("assets")
    network = backbone("bundled", replace(photos(), mean=(0.1,) * 3, classes=("a", "b")), pretrained=False)
    save_backbone(folder, network, {"trained_on": "nothing"})
    return folder, network


@pytest.mark.parametrize("name", ["ours", *CUTS])
def test_frozen_parts_do_not_move_in_training_and_their_statistics_neither(name):
    torch.manual_seed(0)
    network = small_network() if name == "ours" else Adopted(get_model(name, weights=None), CUTS[name], 3, size=32)
    model = FineTuning(network, learning=2)
    before = [copied(part) for part in parts(model.network)]
    fit(model, photos(), Recipe("frozen", 2, 32, learning_rate=0.01))
    moved = [not unchanged(part, old) for part, old in zip(parts(model.network), before)]
    assert moved == [False] * (len(before) - 2) + [True, True]


def test_frozen_batch_norm_stays_in_eval_mode_whatever_mode_the_network_is_put_in():
    model = FineTuning(small_network(), learning=2)
    for switch in (model.train, model.eval, model.train):
        switch()
        assert not any(module.training for part in parts(model.network)[:3] for module in part.modules())
        assert all(module.training == model.training for part in parts(model.network)[3:] for module in part.modules())


def test_without_eval_mode_the_statistics_of_a_frozen_network_would_move():
    network = small_network().requires_grad_(False).train()
    before = copied(network)
    with torch.no_grad():
        network(torch.rand(8, 3, 16, 16))
    assert not unchanged(network, before)
    freeze(network, len(parts(network)))
    before = copied(network)
    network(torch.rand(8, 3, 16, 16))
    assert unchanged(network, before)


def test_a_later_phase_thaws_what_an_earlier_one_froze():
    first = FineTuning(small_network(), learning=1)
    assert sum(p.requires_grad for p in first.parameters()) == 2
    later = FineTuning(first.network)
    assert all(p.requires_grad for p in later.parameters()) and all(module.training for module in later.modules())


def test_rates_fall_from_head_to_stem_and_are_zero_where_frozen():
    scales = FineTuning(small_network(), learning=3, decay=0.5).learning_rate_scales()
    seen = {name: {scale for key, scale in scales.items() if key.startswith(f"network.{name}")}
            for name in ("head", "stages.2", "stages.1", "stages.0", "stem")}
    assert seen == {"head": {1.0}, "stages.2": {0.5}, "stages.1": {0.25}, "stages.0": {0.0}, "stem": {0.0}}


def test_one_step_of_the_optimiser_moves_each_part_by_its_rate_and_frozen_ones_not_at_all():
    model = FineTuning(small_network(), learning=3, decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, Recipe("step", optimizer="adamw", learning_rate=0.8, weight_decay=0.0))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == sum(p.requires_grad for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()  # the first step of AdamW is as long as its rate
    for name, p in model.named_parameters():
        torch.testing.assert_close(before[name] - p.detach(), torch.full_like(p, 0.8 * model.learning_rate_scales()[name]), atol=1e-5, rtol=1e-4)


def test_fit_trains_at_the_rates_that_the_network_asks_for():
    still, moving = FineTuning(small_network(), decay=1e-9), FineTuning(small_network(), decay=1.0)
    start = copied(still)
    recipe = Recipe("rates", 1, 32, learning_rate=0.01, schedule="constant", augment="none")
    for model in (still, moving):
        history = fit(model, photos(), recipe)
        assert history.learning_rate.tolist() == pytest.approx([0.01])  # the recipe's, not that of some part
    far = lambda model, name: (dict(model.named_parameters())[name] - start[name]).abs().max()
    assert far(still, "network.head.weight") > 1e-4 and far(still, "network.stem.0.weight") < 1e-6
    assert far(moving, "network.stem.0.weight") > 1e-4


def test_cached_features_are_what_the_forward_pass_puts_into_the_head():
    network, split = small_network().train(), photos(50).train
    before = copied(network)
    x = features(network, split, batch_size=16)
    assert x.shape == (50, 32) and not x.is_inference() and network.training and unchanged(network, before)
    assert not network.head._forward_pre_hooks
    with torch.no_grad():
        torch.testing.assert_close(network.head(x), predict(network, split), atol=1e-5, rtol=1e-5)


def test_the_hook_is_taken_away_even_after_an_error():
    network = small_network()
    with pytest.raises(RuntimeError):
        features(network, Split(torch.zeros(2, 1, 16, 16, dtype=torch.uint8).expand(2, 5, 16, 16), torch.zeros(2).long()))
    assert not network.head._forward_pre_hooks


@pytest.mark.parametrize("decay", [1.0, 0.01])
def test_the_probe_is_the_logistic_regression_of_scikit_learn(decay):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(120) % 4
    x = (torch.randn(120, 6, generator=generator) + F.one_hot(y, 6)).double()
    head = linear_probe(x, y, 4, decay)
    reference = LogisticRegression(C=1 / (decay * len(x)), max_iter=5_000, tol=1e-10).fit(x, y)
    torch.testing.assert_close(head.weight.detach(), torch.from_numpy(reference.coef_), atol=1e-3, rtol=0)
    torch.testing.assert_close(head(x).softmax(1).detach(), torch.from_numpy(reference.predict_proba(x)), atol=1e-3, rtol=0)


def test_the_best_probe_is_chosen_by_the_other_images():
    x, y = torch.eye(4).repeat(5, 1), torch.arange(4).repeat(5)
    heads = [linear_probe(x, y, 4, decay) for decay in (100.0, 0.001)]
    best = best_probe((x, y), (x, y), 4, decays=(0.001, 100.0))
    torch.testing.assert_close(best.weight, heads[1].weight)
    with_new = with_head(small_network(), torch.nn.Linear(32, 3))
    assert with_new.head.weight.shape == (3, 32)


def test_a_plan_goes_through_its_phases_and_each_begins_where_the_last_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("VISION_COURSE_OUTPUTS", str(tmp_path))
    start, recipe = small_network(), Recipe("plan", 1, 16, learning_rate=0.02, augment="none")
    before = copied(start)
    runs = tune(start, photos(), recipe, (1, 2, None))
    assert unchanged(start, before) and [run.model.frozen for run in runs] == [4, 3, 0]
    assert unchanged(runs[0].model.network.stages, {name[7:]: value for name, value in before.items() if name.startswith("stages.")})
    assert unchanged(runs[1].model.network.stem, copied(start.stem))
    assert sorted(path.name for path in tmp_path.rglob("*.safetensors")) == [f"plan_{i}-seed0.safetensors" for i in (1, 2, 3)]
    again = tune(start, photos(), recipe, (1, 2, None))
    for other in (tune(start, photos(), recipe, (2, 2, None)), tune(start, photos(), recipe, (1, 2, None), 0.25),
                  tune(with_head(start, torch.nn.Linear(start.head.in_features, 3)), photos(), recipe, (1, 2, None))):
        assert other[-1].info["key"] != again[-1].info["key"]  # another training, not what lies there under the name
    assert unchanged(again[-1].model, copied(runs[-1].model))


def test_few_images_are_repeated_and_none_more_often_than_another():
    few = few_images(photos(), 2, 16, seed=0)
    counts = few.train.images.flatten(1).unique(dim=0, return_counts=True)[1]
    assert len(counts) == 6 and counts.sum() == 16 and counts.max() - counts.min() <= 1
    assert torch.equal(few.train.labels.unique(), torch.arange(3))
    assert len(few_images(photos(), 20, 16, seed=0).train) == 60
    assert few.fingerprint != few_images(photos(), 2, 17, seed=0).fingerprint != photos().fingerprint


def test_the_bundled_backbone_brings_body_and_normalisation_and_a_new_head(bundled):
    folder, network = bundled
    found = backbone("bundled", photos(), folder=folder)
    assert found.head.out_features == 3
    torch.testing.assert_close(found.normalise.mean, network.normalise.mean, atol=1e-3, rtol=1e-3)
    for ours, theirs in zip(parts(found)[:-1], parts(network)[:-1]):
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, theirs.state_dict()[name], atol=1e-3, rtol=1e-3)


def test_the_bundled_file_is_small_and_holds_no_head(bundled):
    file = bundled[0] / "backbone.safetensors"
    assert file.stat().st_size <= 4_000_000
    assert not [name for name in read_weights(file) if name.startswith("head")]


@pytest.mark.parametrize("name", CUTS)
def test_a_torchvision_network_in_parts_gives_the_logits_of_the_whole(name):
    torch.manual_seed(0)
    reference = get_model(name, weights=None).eval()
    model = Adopted(deepcopy(reference), CUTS[name], 5, size=64).eval()
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 5)
    model.head = [module for module in reference.modules() if isinstance(module, torch.nn.Linear)][-1]
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), reference(model.normalise(images)), atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters())
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    widths = []
    x = model.stem(model.normalise(images))
    for stage in model.stages:
        x = stage(x)
        widths.append(x.shape[-1])
    assert widths == sorted(widths, reverse=True) and widths[-1] == 2


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_an_unknown_backbone_is_refused_with_the_choices():
    with pytest.raises(CourseError) as error:
        backbone("resnet34", photos())
    one_line(error, "resnet34", "bundled", "resnet18", "mobilenet_v2")


def test_without_network_and_file_the_error_says_what_to_put_where(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(CourseError) as error:
        backbone("resnet18", photos())
    one_line(error, "resnet18-f37072fd.pth", str(tmp_path), "https://download.pytorch.org", "Name or service not known")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how, words", [
    ("truncated", "damaged"), ("foreign", "damaged"), ("pickle", "damaged"),
    ("another network", "another architecture"), ("no names", "another architecture"),
])
def test_a_wrong_weights_file_in_the_cache_is_named_and_never_unpickled(how, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = weights_file("resnet18")
    path.parent.mkdir(parents=True)
    content = {"pickle": {"conv1.weight": Evil()}, "another network": get_model("mobilenet_v2").state_dict(), "no names": [1, 2]}
    torch.save(content.get(how, get_model("resnet18").state_dict()), path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-5_000])
    if how == "foreign":
        path.write_bytes(b"<html>not found</html>")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(CourseError) as error:
        backbone("resnet18", photos())
    one_line(error, str(path), words)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert "unpickled" not in capsys.readouterr().out


def test_cached_weights_are_loaded_into_the_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights_file("resnet18").parent.mkdir(parents=True)
    reference = get_model("resnet18")
    torch.save(reference.state_dict(), weights_file("resnet18"))
    found = backbone("resnet18", photos())
    assert torch.equal(found.stem[0].weight, reference.conv1.weight) and found.head.out_features == 3


@pytest.mark.parametrize("how, words", [
    ("gone", "not there"), ("truncated", "damaged"), ("edited", "does not match"), ("narrower", "another architecture"),
    ("more", "another architecture"),
])
def test_a_wrong_bundled_file_is_named(how, words, bundled, tmp_path):
    folder, network = bundled
    path = save_backbone(tmp_path, {"narrower": small_network(), "more": torch.nn.Sequential(network)}.get(how, network), {})
    if how == "gone":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "edited":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(CourseError) as error:
        backbone("bundled", photos(), folder=tmp_path)
    one_line(error, str(path), words)


def test_latencies_are_positive_and_leave_the_networks_as_they_were():
    models = {"one": small_network().train(), "other": small_network().eval()}
    times = latencies(models, torch.rand(1, 3, 16, 16), rounds=4)
    assert set(times) == set(models) and all(value > 0 for value in times.values())
    assert models["one"].training and not models["other"].training


@pytest.mark.parametrize("words, call", [
    ("at least one part", lambda: tune(backbone("bundled", photos(), pretrained=False), photos(), Recipe("none", 1), (0,))),
    ("0 images of each class", lambda: few_images(photos(), 0, 16, seed=0)),
    ("-1 parts", lambda: freeze(backbone("bundled", photos(), pretrained=False), -1)),
    ("2 rounds", lambda: latencies({}, torch.rand(1, 3, 16, 16), rounds=2)),
    ("from 0 to 3", lambda: linear_probe(torch.rand(4, 5), torch.arange(4), 3, 0.1)),
    ("not empty", lambda: linear_probe(torch.rand(0, 5), torch.arange(0), 3, 0.1)),
])
def test_bad_input_is_one_clear_line(words, call):
    with pytest.raises(CourseError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)
