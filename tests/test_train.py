"""Trainings that are killed, split over processes, or go wrong."""

import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from conftest import Evil
from joblib.externals.loky import get_reusable_executor

from vision_course import optim
from vision_course.cli import trained_network
from vision_course.cnn import SmallCNN
from vision_course.core import CourseError, save_json
from vision_course.data import Dataset, Split
from vision_course.resnet import ResNet, ShortBlock, quick_biases, resnet_recipe, start_well
from vision_course.train import (
    Recipe, Trainer, evaluate, fit, load_checkpoint, load_or_train, load_or_train_all, pretrained_path, save_checkpoint,
    share_cores, training_key,
)

ROOT = Path(__file__).resolve().parent.parent


def checkpoint(outputs, name="small_cnn-seed0.safetensors"):
    found = list(outputs.rglob(name))
    return found[0] if found else None


def written(folder):
    try:
        return next((path.stat().st_mtime_ns for path in folder.glob("small_cnn-seed0-*.state")), None)
    except FileNotFoundError:  # the training has just ended
        return None


def test_killed_training_ends_as_one_never_killed(course, photos):
    words = ("train", "small_cnn", "--dataset", photos, "--epochs", 12)
    done = course(*words)
    assert done.returncode == 0, done.stderr
    expected = checkpoint(course.outputs).read_bytes()
    folder = checkpoint(course.outputs).parent
    for file in folder.iterdir():
        file.unlink()
    command = [sys.executable, "-m", "vision_course.cli", *map(str, words)]
    kills = 0
    for _ in range(12):  # each time it gets one saved epoch further, or is killed in the middle of one
        process = subprocess.Popen(command, env=course.environment, cwd=photos.parent, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        before = written(folder)
        while process.poll() is None and written(folder) in (None, before):
            time.sleep(0.002)
        time.sleep(0.03 * kills)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        if checkpoint(course.outputs):
            break
        if kills == 3:
            assert course(*words).returncode == 0
            break
    assert kills >= 2
    assert checkpoint(course.outputs).read_bytes() == expected
    assert written(folder) is None


def linear(dataset):
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 256, 2))


def small_dataset(count=256):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = (images.float().mean((1, 2, 3)) > 127.5).long()
    split = Split(images, labels)
    return Dataset("noise", ("dark", "light"), split, split, split, (0.5,) * 3, (0.25,) * 3, "0")


def test_two_processes_compute_the_gradients_of_one(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(__file__.rsplit('/', 1)[0])!r})\n"
        "from test_train import linear, small_dataset\n"
        "from vision_course.train import Recipe, fit\n"
        "torch.manual_seed(0)\n"
        "model, data = linear(None), small_dataset()\n"
        "fit(model, data, Recipe('linear', 3, 64, learning_rate=0.01, augment='flip+crop'))\n"
        "fit(model, data, Recipe('again', 1, 64, learning_rate=0.01, augment='flip+crop'))\n"
        "import os\n"
        "if int(os.environ.get('RANK', 0)) == 0: torch.save(model.state_dict(), sys.argv[1])\n"
    )
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "--main_process_port", "0"]
    subprocess.run([sys.executable, script, one], check=True)
    subprocess.run([*launch, script, two], check=True, capture_output=True)
    one, two = (torch.load(path, weights_only=True) for path in (one, two))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0.02, atol=2e-3)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    def weights(seed):
        torch.manual_seed(0)
        model = linear(None)
        fit(model, small_dataset(), Recipe("linear", 2, 64, learning_rate=0.01), seed)
        return model[0].weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_a_loss_that_is_not_a_number_stops_the_training_and_keeps_the_state(tmp_path):
    class Poisoned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.steps = linear(None), 0

        def forward(self, x):
            self.steps += self.training
            return self.net(x) * (float("nan") if self.steps > 6 else 1)

    state = tmp_path / "state"
    with pytest.raises(CourseError, match=r"loss is nan at step 7 \(epoch 2\).*[Ll]earning rate.*after epoch 1 is kept"):
        fit(Poisoned(), small_dataset(), Recipe("poisoned", 3, 64, learning_rate=0.01), state_file=state)
    assert len(torch.load(state, weights_only=True)["rows"]) == 1


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon", "schedule": "linear", "lookahead": 3}], ids=["sgd", "muon"])
def test_a_training_that_goes_on_ends_as_one_never_stopped(changes, tmp_path, monkeypatch):
    recipe, state = Recipe("net", 4, 64, learning_rate=0.02, **changes), tmp_path / "state"

    def trained(state_file):
        torch.manual_seed(0)
        model = linear(None)
        fit(model, small_dataset(), recipe, state_file=state_file)
        return model.state_dict()

    def stopping(self, epoch, bar, whole=Trainer.train_epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return whole(self, epoch, bar)

    expected = trained(None)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", stopping)
        with pytest.raises(KeyboardInterrupt):
            trained(state)
    came = trained(state)
    assert all(torch.equal(came[name], expected[name]) for name in expected)


def test_early_stopping_keeps_the_best_weights():
    class Spoiled(torch.nn.Module):
        """Right at first; each epoch of training makes it worse."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor([1.0]))
            self.register_buffer("epochs", torch.zeros(1))

        def forward(self, x):
            if self.training:
                self.epochs += 1
            light = x.mean((1, 2, 3)) - 0.5 - 0.01 * (self.epochs - 4).clamp(min=0)
            return torch.stack([-light, light], 1) * self.scale

    model = Spoiled()
    history = fit(model, small_dataset(), Recipe("spoiled", 9, 64, learning_rate=1e-4, patience=2, augment="none"))
    assert len(history) == 3 and history.valid_accuracy.idxmax() == 0
    assert model.epochs.item() == 4


class Watching(torch.nn.Module):
    """Notes the widths of what it is trained on, and whether the channels lie side by side."""

    def __init__(self):
        super().__init__()
        self.head, self.widths = torch.nn.Linear(3, 2), []

    def forward(self, x):
        if self.training:
            self.widths.append((x.shape[-1], x.is_contiguous(memory_format=torch.channels_last)))
        return self.head(x.mean((2, 3)))


def test_small_images_come_first_and_the_last_epoch_is_whole():
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = replace(small_dataset(), train=Split(images, torch.arange(64) % 2))
    model = Watching()
    fit(model, data, Recipe("growing", 3, 64, small_first=0.9, mixing="cutmix"))
    assert model.widths == [(24, True), (24, True), (32, True)]


def test_patience_begins_where_the_images_are_whole():
    data, model = small_dataset(), Watching()
    torch.nn.init.zeros_(model.head.weight)
    history = fit(model, data, Recipe("growing", 8, 64, learning_rate=1e-12, small_first=0.5, patience=2, augment="none"))
    assert history.valid_accuracy.nunique() == 1 and len(history) == 6  # four small epochs, and two without a better one


def test_a_validation_loss_that_is_not_a_number_stops_the_training():
    class Broken(Watching):
        def forward(self, x):
            return super().forward(x) * (1 if self.training else float("nan"))

    with pytest.raises(CourseError, match=r"loss is nan at step 4 \(epoch 1\)"):
        fit(Broken(), small_dataset(), Recipe("broken", 1, 64))


@pytest.mark.parametrize("field, value", [
    ("epochs", 0), ("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", float("nan")), ("weight_decay", -1.0),
    ("label_smoothing", 1.0), ("optimizer", "rmsprop"), ("schedule", "steps"), ("mixing", "cut"), ("augment", "flop"), ("patience", 0),
    ("small_first", 1.0),
])
def test_a_recipe_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(CourseError, match="flop" if field == "augment" else field):
        Recipe("odd", **{field: value})


def spoil(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "a pickle":
        torch.save({"net": Evil()}, path)
    elif how == "gone":
        path.unlink()
    elif how == "edited":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how, message", [
    ("truncated", "truncated"), ("a pickle", "not a safetensors file"), ("gone", "cannot be read"), ("edited", "does not match the JSON"),
])
def test_a_spoiled_checkpoint_is_named_and_never_unpickled(tmp_path, capsys, how, message):
    path = save_checkpoint(tmp_path / "linear.safetensors", linear(None), {})
    spoil(path, how)
    with pytest.raises(CourseError, match=message) as raised:
        load_checkpoint(path, linear(None))
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert "unpickled" not in capsys.readouterr().out


def test_weights_of_another_architecture_are_refused(tmp_path):
    path = save_checkpoint(tmp_path / "linear.safetensors", linear(None), {})
    with pytest.raises(CourseError, match="another architecture than Linear"):
        load_checkpoint(path, torch.nn.Linear(2, 2))


def test_a_training_state_that_is_a_foreign_pickle_is_not_unpickled(tmp_path, capsys):
    state = tmp_path / "state"
    torch.save({"key": Evil()}, state)
    with pytest.raises(CourseError, match="Delete it to train anew"):
        fit(linear(None), small_dataset(), Recipe("linear", 1, 64), state_file=state)
    assert "unpickled" not in capsys.readouterr().out


def test_the_state_of_another_training_is_left_unread(tmp_path):
    state, recipe = tmp_path / "state", Recipe("linear", 1, 64, learning_rate=0.01)
    fit(linear(None), small_dataset(), recipe, seed=1, state_file=state)
    assert len(fit(linear(None), small_dataset(), recipe, seed=0, state_file=state)) == 1
    assert torch.load(state, weights_only=True)["key"] == training_key(linear(None), small_dataset(), recipe, 0)


def test_a_checkpoint_of_another_network_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("VISION_COURSE_OUTPUTS", str(tmp_path))
    plain = lambda dataset: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 256, 2))
    runs = [load_or_train(build, small_dataset(), Recipe("net", 1, 64)) for build in (linear, plain, plain)]
    assert [len(run.model) for run in runs] == [4, 2, 2]
    assert runs[0].info["key"] != runs[1].info["key"] == runs[2].info["key"]


def test_a_tracker_needs_a_place_for_its_logs():
    with pytest.raises(CourseError, match="needs a state_file"):
        fit(linear(None), small_dataset(), Recipe("net", 1, 64), tracker="tensorboard")


def test_all_that_changes_a_training_changes_its_key():
    def keyed(change=lambda model: None, recipe=Recipe("net", 1, 64), seed=0, dropout=0.0):
        model = SmallCNN(2, (0.5,) * 3, (0.25,) * 3, dropout=dropout)
        change(model)
        return training_key(model, small_dataset(), recipe, seed)

    keys = [
        keyed(), keyed(seed=1), keyed(recipe=Recipe("net", 2, 64)), keyed(dropout=0.3),
        keyed(lambda model: [setattr(m, "momentum", 0.4) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]),
        keyed(lambda model: next(model.parameters()).requires_grad_(False)),
        keyed(lambda model: setattr(model, "learning_rate_scales", lambda: {"head.bias": 2.0})),
        keyed(lambda model: setattr(model, "learning_rate_scales", lambda: {"head.bias": 3.0})),
    ]
    fewer = replace(small_dataset(), valid=small_dataset().valid.subset(range(5)))  # it chooses the epoch
    keys.append(training_key(SmallCNN(2, (0.5,) * 3, (0.25,) * 3), fewer, Recipe("net", 1, 64), 0))
    assert len(set(keys)) == len(keys)
    assert keyed() == keys[0] == keyed(lambda model: next(model.parameters()).data.add_(1.0))  # first weights follow from the seed


def test_weights_that_come_with_the_project_stand_for_the_same_training_only(tmp_path, monkeypatch):
    monkeypatch.setenv("VISION_COURSE_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("VISION_COURSE_DATA", str(tmp_path / "data"))
    recipe, data = Recipe("net", 1, 64, learning_rate=0.01), small_dataset()
    trained = load_or_train(linear, data, recipe)
    kept = checkpoint(tmp_path, "net-seed0.safetensors")
    target = pretrained_path("noise", "net", 0)
    target.parent.mkdir(parents=True)
    halves = deepcopy(trained.model).half()  # as they are shipped
    save_checkpoint(target, halves, {**trained.info, "marked": True, "precision": "float16"})
    for path in (kept, kept.with_suffix(".json")):
        path.unlink()
    found = load_or_train(linear, data, recipe)
    assert found.info["marked"] and kept.exists() and {p.dtype for p in found.model.parameters()} == {torch.float32}
    torch.testing.assert_close(found.model[0].weight, trained.model[0].weight, rtol=1e-3, atol=1e-3)
    assert "marked" not in load_or_train(linear, data, Recipe("net", 2, 64, learning_rate=0.01)).info  # another recipe
    load_or_train(linear, data, recipe)  # a copy of them lies in the outputs now
    monkeypatch.setenv("VISION_COURSE_PRETRAINED", "no")
    assert "marked" not in load_or_train(linear, data, recipe).info
    monkeypatch.delenv("VISION_COURSE_PRETRAINED")
    kept.unlink()
    beside = target.with_suffix(".json")
    listed = tmp_path / "outputs" / "published" / "noise" / "hashes.json"
    save_json(listed, {"files": {}, "weights": {path.name: sha256(path.read_bytes()).hexdigest() for path in (target, beside)}})
    assert load_or_train(linear, data, recipe).info["marked"]
    kept.unlink()
    beside.write_text((told := beside.read_text()).replace('"seconds": ', '"seconds": 1'))
    with pytest.raises(CourseError, match="noise-net-seed0.json: was changed after it was published"):
        load_or_train(linear, data, recipe)
    beside.unlink()
    with pytest.raises(CourseError, match="noise-net-seed0.json: is missing beside"):
        load_or_train(linear, data, recipe)
    beside.write_text(told)
    listed.unlink()
    target.write_bytes(target.read_bytes()[:-5])
    with pytest.raises(CourseError, match="noise-net-seed0.safetensors: (truncated|does not match)"):
        load_or_train(linear, data, recipe)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    get_reusable_executor().shutdown(wait=True)  # its processes would stay for minutes


def test_cores_are_shared():
    large = 64_000_000_000
    shares = {given: share_cores(*given) for given in (
        (1, 2, large), (2, 1, large), (45, 2, large), (3, 8, large), (45, 8, large), (45, 16, large), (45, 3, large),
        (45, 8, 8_000_000_000), (45, 8, 2_000_000_000))}
    assert list(shares.values()) == [(1, 2), (1, 1), (2, 1), (3, 2), (4, 2), (4, 4), (3, 1), (2, 4), (1, 8)]


def test_trainings_side_by_side_end_as_in_turn(tmp_path, monkeypatch, two_threads):
    monkeypatch.setenv("VISION_COURSE_DEVICE", "cpu")
    factor = 3 * 256  # a network that is made by a function of this file, with a variable of its own
    build = lambda dataset: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.1), torch.nn.Linear(factor, 2))
    recipe, data = Recipe("net", 2, 64, learning_rate=0.01), small_dataset()
    wanted = {"low": [(build, data, recipe, s) for s in (0, 1)], "high": [(build, data, replace(recipe, name="high", learning_rate=0.1), 0)]}
    monkeypatch.setenv("VISION_COURSE_OUTPUTS", str(tmp_path / "aside"))
    aside = load_or_train_all(wanted)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(files) == 3
    again = load_or_train_all(wanted)  # from the checkpoints
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    monkeypatch.setenv("VISION_COURSE_OUTPUTS", str(tmp_path / "in-turn"))
    torch.set_num_threads(1)
    in_turn = load_or_train_all(wanted)
    assert [len(runs) for runs in aside.values()] == [2, 1] and list(aside) == list(in_turn) == ["low", "high"]
    for name in wanted:
        for runs in zip(aside[name], again[name], in_turn[name]):
            weights = [run.model.state_dict() for run in runs]
            assert all(torch.equal(weights[0][k], w[k]) for w in weights for k in w)
            scores = [run.history[["train_loss", "valid_loss", "valid_accuracy"]].to_numpy().tolist() for run in runs]
            assert scores[0] == scores[1] == scores[2]


def test_processes_that_train_side_by_side_stay(tmp_path, monkeypatch, two_threads):
    monkeypatch.setenv("VISION_COURSE_DEVICE", "cpu")
    monkeypatch.setenv("VISION_COURSE_OUTPUTS", str(tmp_path / "outputs"))

    def greedy(dataset):  # from the second training of a process on half a gigabyte for a moment, which joblib looks for
        if os.getpid() != parent:
            (tmp_path / f"{os.getpid()}.pid").touch()
            if "VISION_COURSE_SECOND" in os.environ:
                torch.ones(130_000_000)
                time.sleep(1.1)
            os.environ["VISION_COURSE_SECOND"] = "yes"
        return linear(dataset)

    parent = os.getpid()
    load_or_train_all({"six": [(greedy, small_dataset(), Recipe("net", 1, 64), s) for s in range(6)]})
    assert len(list(tmp_path.glob("*.pid"))) == 2


def test_a_training_side_by_side_that_fails_says_why(tmp_path, monkeypatch, two_threads):
    monkeypatch.setenv("VISION_COURSE_DEVICE", "cpu")
    monkeypatch.setenv("VISION_COURSE_OUTPUTS", str(tmp_path))
    explodes = Recipe("net", 2, 64, learning_rate=1e30)
    with pytest.raises(CourseError, match="net: the loss is .* Lower the learning rate"):
        load_or_train_all({"both": [(linear, small_dataset(), explodes, s) for s in (0, 1)]})

    def killed(dataset):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return linear(dataset)

    parent = os.getpid()
    with pytest.raises(CourseError, match="a training was ended from outside"):
        load_or_train_all({"both": [(killed, small_dataset(), Recipe("other", 1, 64), s) for s in (0, 1)]})


@pytest.mark.skipif(not (ROOT / "data" / "cifar-10-batches-py").exists(), reason="data/ has no CIFAR-10")
def test_the_published_network_scores_what_its_json_says():
    path = pretrained_path("cifar10", "resnet", 0)
    model, data, info = trained_network(path)
    assert training_key(model, data, resnet_recipe(data), 0) == info["key"]  # so `load_or_train` will find it
    assert abs(evaluate(model, data.valid)["accuracy"] - info["valid_accuracy"]) < 0.002


def test_bfloat16_is_chosen_only_where_it_is_no_slower(monkeypatch):
    """Without instructions for it a product in bfloat16 takes ten to fifty times as long."""
    matrix, fastest = torch.randn(128, 1152, generator=torch.Generator().manual_seed(0)), {}
    for choice in (optim.fast_bfloat16, lambda device: False):
        monkeypatch.setattr(optim, "fast_bfloat16", choice)
        seconds = []
        for _ in range(10):
            start = time.perf_counter()
            optim.orthogonalise(matrix)
            seconds.append(time.perf_counter() - start)
        fastest[choice] = min(seconds)
    chosen, in_float32 = fastest.values()
    assert chosen < 4 * in_float32


def test_the_stem_stays_and_biases_of_batch_normalisation_take_steps_twenty_times_as_long():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (500, 3, 32, 32), dtype=torch.uint8)
    model = quick_biases(start_well(ResNet(4, widths=(24, 24, 24), block=ShortBlock), images))
    optimizer = optim.make_optimizer(model, Recipe("step", optimizer="muon", learning_rate=0.01))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()  # the first of Nesterov's steps is 1.85 times the gradient
    moved = {name: (before[name] - p.detach()).abs().max().item() for name, p in model.named_parameters()}
    usual = 1.85 * 0.01 * optim.MUON_RATES[1]
    scales = [name for name in moved if name.endswith((".2.weight", ".norm.weight"))]
    assert model.fixed == ["stem.0.weight", "stem.0.bias", *scales]
    assert all(moved[name] == 0 for name in model.fixed)
    assert moved["head.bias"] == pytest.approx(usual, rel=1e-4)
    biases = [name for name in moved if name.endswith("bias") and name not in ("head.bias", "stem.0.bias")]
    assert len(biases) == 6 and [moved[name] for name in biases] == pytest.approx([20 * usual] * 6, rel=1e-4)
    assert {module.momentum for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {0.4}
