"""Explanations against their reference libraries on known architectures, and against answers that are known."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from captum.attr import GuidedBackprop, IntegratedGradients, LayerAttribution, LayerGradCam, Saliency
from pytorch_grad_cam import GradCAM, GradCAMPlusPlus
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torchvision import models

from vision_course import explain
from vision_course import maps as judging
from vision_course.cnn import SmallCNN
from vision_course.core import CourseError, pick_device
from vision_course.resnet import ResNet


class Viewed(nn.Module):
    """A network that takes its maps apart with `view`, which works in the usual order of memory only."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU())
        self.head = nn.Linear(16 * 7 * 7, 10)

    def forward(self, x):
        return self.head(self.body(x).view(len(x), -1))


GUIDED = judging.guided(explain.saliency)
METHODS = {
    "saliency": explain.saliency, "smooth_grad": explain.smooth_grad, "integrated_map": explain.integrated_map,
    "grad_cam": explain.grad_cam, "grad_cam_plus_plus": explain.grad_cam_plus_plus, "guided_backprop": GUIDED,
}
NETWORKS = {  # name: maker, layer for the reference libraries, layer that is found when none is given, side of the images
    "ours": (lambda: ResNet(10), "stages", "stages", 32),
    "small_cnn": (lambda: SmallCNN(10), "blocks", "blocks", 32),
    "viewed": (Viewed, "body", "body", 32),
    "resnet18": (models.resnet18, "layer4", "layer4", 64),
    "mobilenet_v2": (models.mobilenet_v2, "features", "features", 64),
    "densenet121": (models.densenet121, "features.denseblock4", "features", 64),
    "convnext_tiny": (models.convnext_tiny, "features", "features", 64),
}


def make(name):
    """A network with random weights and the statistics of its images, the images, and a target class for each."""
    maker, layer, _, side = NETWORKS[name]
    torch.manual_seed(0)
    model, images = maker().train(), torch.rand(8, 3, side, side)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # one batch says all; with other statistics the images hardly matter to deep networks
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias, 0, 0.1)
    with torch.no_grad():
        model(images)
        model.eval()
        targets = model(images).topk(8).indices.diagonal()  # the likeliest class of the first image, the second of the second …
    return model, layer, images, targets


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    return make(request.param)


def unit(maps):
    """As pytorch-grad-cam scales a map."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (1e-7 + maps.amax((1, 2), keepdim=True))


def error(ours, theirs):
    """Largest difference within an image, relative to the largest value in that image; the worst image."""
    ours, theirs = (torch.as_tensor(x).detach().flatten(1) for x in (ours, theirs))
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().amax(1) / theirs.abs().amax(1).clamp(min=1e-12)).max().item()


def snapshot(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return state, [m.training for m in model.modules()], [(p.requires_grad, p.grad) for p in model.parameters()], [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]


def same(a, b):
    return all(torch.equal(a[0][name], b[0][name]) for name in a[0]) and a[1:] == b[1:]


def reference_cam(kind, model, layer, images, targets):
    """pytorch-grad-cam's maps at the layer's own size, from a copy, because it sets modes and gradients."""
    model = copy.deepcopy(model)
    with kind(model=model, target_layers=[model.get_submodule(layer)]) as cam:
        return torch.from_numpy(cam(input_tensor=images, targets=[ClassifierOutputTarget(k) for k in targets.tolist()]))


@pytest.mark.parametrize("ours, theirs", [(explain.grad_cam, GradCAM), (explain.grad_cam_plus_plus, GradCAMPlusPlus)])
def test_grad_cam_equals_pytorch_grad_cam(network, ours, theirs):
    model, layer, images, targets = network
    came, expected = unit_small(ours, model, layer, images, targets), reference_cam(theirs, model, layer, images, targets)
    assert expected.amax((1, 2)).gt(0.5).sum() >= 2  # of an untrained network some maps are empty
    assert error(came, expected) < 1e-4


def unit_small(method, model, layer, images, targets):
    """Our map, scaled before it is enlarged, as pytorch-grad-cam does."""
    weigh = explain.plus_plus_weights if method is explain.grad_cam_plus_plus else explain.mean_gradient
    (output, gradient), = explain.maps_and_gradients(model, images, targets, [layer])
    small = unit(torch.einsum("nc,nchw->nhw", weigh(output, gradient), output).relu())
    return unit(F.interpolate(small[:, None], images.shape[2:], mode="bilinear")[:, 0])


def test_grad_cam_equals_captum(network):
    model, layer, images, targets = network
    theirs = LayerGradCam(model, model.get_submodule(layer)).attribute(images, target=targets, relu_attributions=True)
    theirs = LayerAttribution.interpolate(theirs, images.shape[2:], "bilinear")[:, 0]
    assert error(explain.grad_cam(model, images, targets, layer), theirs) < 1e-4


def test_gradients_equal_captum(network):
    model, _, images, targets = network
    theirs = Saliency(model).attribute(images.clone().requires_grad_(), target=targets).amax(1)
    assert error(explain.saliency(model, images, targets), theirs) < 1e-4
    theirs = IntegratedGradients(model).attribute(images, target=targets, n_steps=4, method="riemann_middle", internal_batch_size=8)
    assert error(explain.integrated_gradients(model, images, targets, steps=4), theirs) < 1e-4


def test_the_layer_is_found(network, request):
    model, _, images, targets = network
    expected = NETWORKS[request.node.callspec.params["network"]][2]
    assert explain.target_layer(model, images) == expected
    assert torch.equal(explain.grad_cam(model, images, targets), explain.grad_cam(model, images, targets, expected))


@pytest.mark.parametrize("training", [False, True])
def test_looking_changes_nothing(network, training):
    model, layer, images, targets = network
    model.train(training)
    next(model.children()).train(not training)
    next(model.parameters()).requires_grad_(False)
    before, pixels = snapshot(model), images.clone()
    for method in METHODS.values():
        method(model, images[:2], targets[:2])
    explain.feature_maps(model, images[:2], [layer])
    explain.first_filters(model)
    next(judging.randomised(model, images[:2]))
    with pytest.raises(ZeroDivisionError), explain.capture(model, [layer]):
        1 / 0
    assert same(before, snapshot(model)) and torch.equal(pixels, images) and torch.is_grad_enabled()
    next(model.parameters()).requires_grad_(True)
    model.eval()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_each_image_has_a_map_of_its_own(method):
    model, _, images, targets = make("small_cnn")
    model, images = model.double(), images.double()  # in float32 a ReLU may tip over with the size of the batch
    options = {} if method is not explain.smooth_grad else {"noise": 0.0}
    together = method(model, images, targets, **options)
    assert together.shape == (8, 32, 32) and together.min() >= 0 and not together.requires_grad
    alone = torch.cat([method(model, images[i : i + 1], targets[i : i + 1], **options) for i in range(8)])
    assert error(together, alone) < 1e-4
    assert torch.equal(method(model, images, None), method(model, images, explain.predicted(model, images)))
    with torch.no_grad():
        assert torch.equal(method(model, images, targets, **options), together)


def test_several_layers_at_once():
    model, _, images, targets = make("resnet18")
    layers = ["layer4", "layer2", "layer3.0.conv1", "relu"]
    together = explain.grad_cam(model, images, targets, layers)
    assert together.shape == (4, 8, 64, 64)
    for maps, layer in zip(together, layers):
        assert error(maps, explain.grad_cam(model, images, targets, layer)) < 1e-4


def test_in_place_operations_behind_a_layer_leave_its_output_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    plain, images = copy.deepcopy(model), torch.rand(2, 3, 8, 8)
    plain[1].inplace = False
    assert explain.feature_maps(model, images, ["0"])["0"].min() < 0
    assert torch.equal(explain.grad_cam(model, images, 1, "0"), explain.grad_cam(plain, images, 1, "0"))
    densenet, _, images, targets = make("densenet121")
    ours = unit_small(explain.grad_cam, densenet, "features", images, targets)
    forward = lambda x: densenet.classifier(F.relu(densenet.features(x)).mean((2, 3)))
    densenet.forward = forward
    theirs = LayerGradCam(forward, densenet.features).attribute(images, target=targets, relu_attributions=True)[:, 0]
    assert error(ours, unit(F.interpolate(unit(theirs)[:, None], images.shape[2:], mode="bilinear")[:, 0])) < 1e-4


def test_the_graph_is_cut_at_the_layer():
    model, _, images, targets = make("ours")
    (output, _), = explain.maps_and_gradients(model, images, targets, ["stages"])
    assert output.is_leaf and not output.requires_grad
    with torch.no_grad(), explain.capture(model, ["stages.0", "stages"], explain.begin_graph) as kept:
        model(images)
    assert kept["stages.0"].is_leaf and kept["stages"].grad_fn is not None
    with torch.no_grad(), explain.capture(model, ["stages.0"]) as kept:
        assert not model(images).requires_grad and not kept["stages.0"].requires_grad


class Spotter(nn.Module):
    """Class 1 is the brightness of a place, found by one filter; class 0 is darkness."""

    def __init__(self):
        super().__init__()
        self.find = nn.Conv2d(3, 2, 3, padding=1, bias=False)
        self.head = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.find.weight.copy_(torch.stack([torch.ones(3, 3, 3), -torch.ones(3, 3, 3)]))
            self.head.weight.copy_(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))

    def forward(self, x):
        return self.head(F.relu(self.find(x)).mean((2, 3)))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_planted_patch_is_found(method):
    images, masks = torch.zeros(4, 3, 16, 16), torch.zeros(4, 16, 16, dtype=torch.bool)
    for i, (y, x) in enumerate(((1, 2), (9, 9), (4, 11), (12, 5))):
        images[i, :, y : y + 3, x : x + 3], masks[i, y : y + 3, x : x + 3] = 1.0, True
    options = {"noise": 0.0} if method is explain.smooth_grad else {}
    maps = method(Spotter(), images, 1, **options)
    assert (judging.pointing_game(maps, masks) > 0.3).all()
    assert (judging.share_inside(maps, masks) > 0.2).all()  # the patch is 3.5 % of the image
    assert method not in (explain.grad_cam, explain.grad_cam_plus_plus) or (judging.pointing_game(maps, masks) == 1).all()


class Linear(nn.Module):
    """The score of class k is the sum of weights times pixels."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.linspace(-1, 1, 2 * 3 * 5 * 5).view(2, 3, 5, 5))

    def forward(self, x):
        return torch.einsum("nchw,kchw->nk", x, self.weights)


def test_a_linear_model_is_explained_exactly():
    model, images = Linear(), torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 1, 0])
    own = model.weights.detach()[targets]
    assert torch.equal(explain.input_gradients(model, images, targets), own)
    assert error(explain.smooth_grad(model, images, targets), own.abs().amax(1)) < 1e-5
    for steps in (1, 16):
        assert error(explain.integrated_gradients(model, images, targets, 0.25, steps), own * (images - 0.25)) < 1e-5


def test_integrated_gradients_are_complete():
    torch.manual_seed(0)
    model, images, targets = NETWORKS["small_cnn"][0]().eval(), torch.rand(8, 3, 32, 32), torch.arange(8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # enough to bend the way from grey to the images, not to fold it
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 1.5), nn.init.normal_(module.bias, 0, 0.1)
    whole = explain.integrated_gradients(model, images, targets, 0.5, steps=256).sum((1, 2, 3))
    with torch.no_grad():
        rise = (model(images) - model(torch.full_like(images, 0.5))).gather(1, targets[:, None])[:, 0]
    assert (whole - rise).abs().max() < 0.01 * rise.abs().max()


def test_smooth_grad_averages_captum_gradients(network):
    model, _, images, targets = network
    noise = torch.Generator().manual_seed(3)
    copies = [images + 0.2 * torch.randn(images.shape, generator=noise) for _ in range(4)]
    gradients = [Saliency(model).attribute(x.requires_grad_(), target=targets, abs=False) for x in copies]
    assert error(explain.smooth_grad(model, images, targets, 4, 0.2, 3), torch.stack(gradients).mean(0).abs().amax(1)) < 1e-4


def test_guided_backprop_equals_captum():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 144, 10))
    images, targets = torch.rand(8, 3, 16, 16), torch.arange(8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = GuidedBackprop(model).attribute(images, target=targets).abs().amax(1)
    assert error(GUIDED(model, images, targets), theirs) < 1e-4
    assert error(explain.saliency(model, images, targets), theirs) > 0.1


def test_randomising_goes_from_the_last_layer_to_the_first():
    model, images = SmallCNN(10), torch.rand(8, 3, 32, 32)
    with torch.random.fork_rng():
        state = torch.get_rng_state()
        names = []
        for name, copied in judging.randomised(model, images, seed=1):
            names.append(name)
            changed = {n for n, m in model.named_modules() if hasattr(m, "weight")
                       and not torch.equal(m.weight, copied.get_submodule(n).weight)}
            assert changed == set(names)
        assert torch.equal(state, torch.get_rng_state())
    assert names[0] == "head" and names[-1] == "blocks.0.0" and len(names) == 5


def test_statistics_are_those_of_the_images_and_nothing_else_changes():
    model, images = SmallCNN(10), 5 + 3 * torch.rand(8, 3, 32, 32)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    seen = []
    handle = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    judging.measure_statistics(model, images)
    handle.remove()
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, seen[0].var((0, 2, 3)))
    assert norm.momentum == 0.1 and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()
               if not name.endswith(("running_mean", "running_var", "num_batches_tracked")))


def test_maps_are_float32_under_autocast():
    model, images = SmallCNN(10).eval(), torch.rand(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        for name, method in METHODS.items():
            assert method(model, images).dtype == torch.float32, name


class Enlarging(nn.Module):
    """A map of 8 × 8 places that is shrunk to 2 × 2, then to one place, and enlarged again; one layer is never run."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 4, 1))
        self.pool, self.grow, self.head = nn.AdaptiveAvgPool2d(1), nn.Upsample(scale_factor=3), nn.Linear(36, 2)
        self.spare = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.head(self.grow(self.pool(self.body(x))).flatten(1))


def test_a_map_that_was_enlarged_again_is_not_chosen():
    model, images = Enlarging(), torch.rand(2, 3, 16, 16)
    assert explain.target_layer(model, images) == "body"
    with pytest.raises(CourseError, match="'spare': its output .no tensor came. is no map"):
        explain.grad_cam(model, images, 0, "spare")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_precision_and_inference_mode_do_not_matter(method):
    model, images = ResNet(10), torch.rand(2, 3, 32, 32)
    expected = method(model, images, 1)
    with torch.inference_mode():
        assert torch.equal(method(model, images.clone(), 1), expected)
    assert error(method(model, images.double(), 1), expected) < 1e-6
    assert method(copy.deepcopy(model).half(), images, 1).dtype == torch.float32


class Greyed(nn.Module):
    """A network whose first convolution sees other channels than the images have."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

    def forward(self, x):
        return self.body(x.mean(1, keepdim=True))


def test_channels_are_the_networks_business():
    assert explain.grad_cam(Greyed(), torch.rand(2, 3, 8, 8), 0).shape == (2, 8, 8)


def bad(words, call):
    return pytest.param(words, call, id=words)


@pytest.mark.parametrize("words, call", [
    bad("Nearest: stages.2", lambda m, x: explain.grad_cam(m, x, 0, "stage.2")),
    bad("is no map", lambda m, x: explain.grad_cam(m, x, 0, "head")),
    bad("from 0 to 9", lambda m, x: explain.grad_cam(m, x, 10)),
    bad("targets from -1", lambda m, x: explain.saliency(m, x, -1)),
    bad("one an image", lambda m, x: explain.saliency(m, x, torch.zeros(3, dtype=torch.int64))),
    bad("whole numbers", lambda m, x: explain.integrated_gradients(m, x, torch.zeros(2))),
    bad("no convolutions", lambda m, x: explain.grad_cam(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), x)),
    bad("no filters", lambda m, x: explain.first_filters(nn.Linear(3, 2))),
    bad("must be (images, 3, height, width)", lambda m, x: explain.grad_cam(m, x[0])),
    bad("(2, 1, 32, 32)", lambda m, x: explain.smooth_grad(m, x[:, :1])),
    bad("Divide bytes", lambda m, x: explain.saliency(m, (x * 255).byte())),
    bad("images 1: hold", lambda m, x: explain.grad_cam(m, torch.stack([x[0], x[1] / 0]))),
    bad("Name the layers", lambda m, x: explain.grad_cam(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2)), x)),
    bad("steps (0)", lambda m, x: explain.integrated_gradients(m, x, steps=0)),
    bad("samples (0)", lambda m, x: explain.smooth_grad(m, x, samples=0)),
    bad("cannot take them", lambda m, x: explain.saliency(m, x[..., :7, :7])),
    bad("(3, 7, 7): ResNet cannot", lambda m, x: explain.grad_cam(m, x[..., :7, :7])),
    bad("(2, 3, 32, 0)", lambda m, x: explain.grad_cam(m, x[..., :0])),
    bad("of type torch.uint8", lambda m, x: explain.integrated_gradients(m, (x * 255).byte(), 0)),
    bad("floats in [0, 1]", lambda m, x: explain.smooth_grad(m, (x * 255).byte(), 0)),
    bad("of several places", lambda m, x: explain.grad_cam(m, x, 0, "pool")),
    bad("a name, or a list", lambda m, x: explain.grad_cam(m, x, 0, m.stages)),
    bad("at least one name", lambda m, x: explain.grad_cam(m, x, 0, [])),
    bad("not a Sequential", lambda m, x: explain.grad_cam(m, x, 0, [m.stages])),
    bad("outputs of shape", lambda m, x: explain.saliency(m.stem, x)),
])
def test_bad_input_is_one_clear_line(words, call):
    model, images = ResNet(10), torch.rand(2, 3, 32, 32)
    before = snapshot(model)
    with pytest.raises(CourseError) as caught:
        call(model, images)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 200
    assert same(before, snapshot(model)) and torch.is_grad_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_gives_the_maps_of_the_cpu():
    pick_device("cuda")  # float32 without TF32
    model, _, images, targets = make("ours")
    expected = {name: method(model, images, targets) for name, method in METHODS.items() if name != "smooth_grad"}
    model.cuda()
    for name, maps in expected.items():
        came = METHODS[name](model, images.cuda(), targets)
        assert came.is_cuda and error(came.cpu(), maps) < 1e-2
