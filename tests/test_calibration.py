"""Calibration errors on sets whose true error is known, temperature, conformal sets, and what is kept beside a checkpoint."""

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from vision_course.calibration import (
    classwise_error, conformal_threshold, debiased_error, equal_mass_error, expected_calibration_error, fit_temperature,
    fit_vector_scaling, load_calibration, load_or_calibrate, prediction_sets, reliability_bins, risk_coverage, save_calibration,
)
from vision_course.core import CourseError
from vision_course.scores import bootstrap_interval, brier_decomposition, brier_score, luck_level, negative_log_likelihood
from vision_course.train import load_checkpoint, save_checkpoint

ERRORS = [expected_calibration_error, equal_mass_error, classwise_error, debiased_error]
MEASURES = [*ERRORS, negative_log_likelihood, brier_score, brier_decomposition, reliability_bins, risk_coverage, conformal_threshold]


def forecaster(count, classes=10, seed=0, spread=1.5):
    """Logits, and labels drawn from their softmax: a perfectly calibrated network."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def boaster(count, gap, seed=0):
    """Two classes, confidence from 0.65 to 0.95, right with a chance that is lower by `gap`."""
    generator = torch.Generator().manual_seed(seed)
    confidence = 0.65 + 0.3 * torch.rand(count, generator=generator, dtype=torch.float64)
    correct = torch.rand(count, generator=generator) < confidence - gap
    return torch.stack([confidence, 1 - confidence], 1), (~correct).long()


@pytest.mark.parametrize("classes, bins, count", [(2, 10, 50), (10, 15, 1000), (200, 20, 300), (3, 1, 7)])
def test_equals_torchmetrics_away_from_exactly_one(classes, bins, count):
    logits, labels = forecaster(count, classes, seed=classes)
    probabilities = (2 * logits).softmax(1).float()
    inside = probabilities.amax(1) < 1
    p, y = probabilities[inside], labels[inside]
    expected = multiclass_calibration_error(p, y, classes, n_bins=bins, norm="l1").item()
    assert expected_calibration_error(p, y, bins) == pytest.approx(expected, abs=1e-5)


def test_confidence_of_exactly_one_belongs_to_the_last_bin():
    p, y = torch.tensor([[1.0, 0.0], [0.98, 0.02]]), torch.tensor([0, 1])  # one bin: claims 0.99, reaches 0.5
    assert expected_calibration_error(p, y) == pytest.approx(0.49, abs=1e-6)
    assert reliability_bins(p, y).share[-1] == 1


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("gap", [0.1, 0.2])
def test_finds_the_known_gap(error, gap):
    assert error(*boaster(40_000, gap)) == pytest.approx(gap, abs=0.01)


@pytest.mark.parametrize("error, limit", list(zip(ERRORS, (0.01, 0.015, 0.005, 0.012))))
def test_a_perfect_forecaster_has_almost_no_error(error, limit):
    logits, labels = forecaster(40_000)
    assert error(logits.softmax(1), labels) < limit


def test_debiasing_takes_the_luck_away():
    plain = sum(equal_mass_error(*boaster(200, 0.0, seed)) for seed in range(60)) / 60
    assert sum(debiased_error(*boaster(200, 0.0, seed)) for seed in range(60)) / 60 < plain / 2


@pytest.mark.parametrize("gap", [0.03, 0.1])
def test_the_interval_holds_the_true_error(gap):
    held = 0
    for seed in range(60):
        low, high = bootstrap_interval(expected_calibration_error, *boaster(1000, gap, seed), draws=60, seed=seed)
        held += low <= gap <= high
    assert held >= 54


def test_luck_stays_below_its_level():
    level = luck_level(expected_calibration_error, boaster(1000, 0.0)[0], draws=200)
    below = sum(expected_calibration_error(*boaster(1000, 0.0, seed)) <= level for seed in range(1, 61))
    assert 51 <= below
    assert expected_calibration_error(*boaster(1000, 0.1)) > level


@pytest.mark.parametrize("shout", [0.4, 1.0, 2.5])
def test_temperature_undoes_the_shouting(shout):
    logits, labels = forecaster(20_000)
    assert fit_temperature(shout * logits, labels) == pytest.approx(shout, rel=0.03)


def test_temperature_is_the_minimum():
    logits, labels = forecaster(300, seed=5)
    best = fit_temperature(3 * logits, labels)
    loss = lambda t: F.cross_entropy(3 * logits / t, labels).item()
    assert all(loss(best) <= loss(best * factor) for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2))


def test_temperature_stays_in_its_range():
    labels = torch.arange(10)
    assert fit_temperature(5 * torch.eye(10), labels) == pytest.approx(0.05, rel=1e-3)  # all right: as sure as allowed
    assert fit_temperature(5 * torch.eye(10), (labels + 1) % 10) == pytest.approx(20, rel=1e-3)  # all wrong


def test_vector_scaling_is_never_worse_where_it_was_fitted():
    logits, labels = forecaster(2_000, seed=3)
    skewed = 2 * logits + torch.linspace(0, 2, 10)
    factor, shift = fit_vector_scaling(skewed, labels)
    fitted = F.cross_entropy(skewed * factor + shift, labels)
    assert fitted < F.cross_entropy(skewed / fit_temperature(skewed, labels), labels) - 0.01


def test_conformal_sets_cover_as_promised():
    logits, labels = forecaster(40_000, seed=7)
    p = (3 * logits).softmax(1)  # badly calibrated on purpose
    for miscoverage, kept in ((0.1, 50), (0.2, 20)):
        covered = []
        for start in range(0, 10_000, kept):
            threshold = conformal_threshold(p[start : start + kept], labels[start : start + kept], miscoverage)
            covered.append(prediction_sets(p[30_000:], threshold)[torch.arange(10_000), labels[30_000:]].double().mean())
        assert 1 - miscoverage - 0.012 < torch.stack(covered).mean() < 1 - miscoverage + 1 / (kept + 1) + 0.012


def test_a_probability_that_rounding_took_above_one_gives_a_threshold_of_zero():
    p = torch.tensor([[1 + 2e-7, 0.0]]).repeat(20, 1)
    threshold = conformal_threshold(p, torch.zeros(20, dtype=torch.long))
    assert threshold == 0 and prediction_sets(p, threshold)[:, 0].all()


def test_too_few_images_promise_nothing():
    logits, labels = forecaster(5)
    threshold = conformal_threshold(logits.softmax(1), labels, 0.1)
    assert threshold == 1.0 and prediction_sets(logits.softmax(1), threshold).all()


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("spoil, words", [
    (lambda p, y: (p * 2, y), "sum to 1"),
    (lambda p, y: (p.log(), y), "softmax"),
    (lambda p, y: (p * float("nan"), y), "NaN"),
    (lambda p, y: (p, y + 10), "labels from"),
    (lambda p, y: (p, y - 10), "labels from"),
    (lambda p, y: (p[:0], y[:0]), "empty"),
    (lambda p, y: (p[:3], y), "must be"),
    (lambda p, y: (p, y.float()), "whole numbers"),
    (lambda p, y: (p, y > 0), "whole numbers"),
])
def test_bad_input_is_one_clear_line(measure, spoil, words):
    logits, labels = forecaster(20)
    with pytest.raises(CourseError, match=words) as caught:
        measure(*spoil(logits.softmax(1), labels))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("kind", [torch.uint8, torch.int32])
def test_labels_may_be_whole_numbers_of_any_type(measure, kind):
    logits, labels = forecaster(20)
    assert str(measure(logits.softmax(1), labels.to(kind))) == str(measure(logits.softmax(1), labels))


def test_fitting_leaves_the_network_alone():
    network, (images, labels) = torch.nn.Linear(10, 10).double(), forecaster(50)
    factor, shift = fit_vector_scaling(network(images), labels)
    assert fit_temperature(network(images), labels) > 0 and not factor.requires_grad and not shift.requires_grad
    assert all(p.grad is None for p in network.parameters())


def test_sets_are_made_of_probabilities_and_a_threshold():
    logits, _ = forecaster(5)
    for bad, threshold, words in ((logits, 0.5, "sum to 1"), (logits.softmax(1) * float("nan"), 0.5, "sum to 1"),
                                  (logits.softmax(1), float("nan"), "from 0 to 1"), (logits.softmax(1), 2.0, "from 0 to 1")):
        with pytest.raises(CourseError, match=words):
            prediction_sets(bad, threshold)
    with pytest.raises(CourseError, match="sum to 1"):
        luck_level(expected_calibration_error, logits)


@pytest.mark.parametrize("fit", [fit_temperature, fit_vector_scaling])
def test_fits_refuse_an_empty_set(fit):
    with pytest.raises(CourseError, match="empty"):
        fit(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(CourseError, match="labels from"):
        fit(torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]))


def test_an_empty_calibration_set_leaves_the_checkpoint_as_it_was(tmp_path):
    checkpoint = tmp_path / "net-seed0.safetensors"
    save_checkpoint(checkpoint, torch.nn.Linear(2, 2), {"recipe": "short"})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CourseError, match="empty"):
        load_or_calibrate(checkpoint, torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_miscoverage_must_be_a_share():
    logits, labels = forecaster(20)
    with pytest.raises(CourseError, match="between 0 and 1"):
        conformal_threshold(logits.softmax(1), labels, 90)


def test_calibration_belongs_to_its_weights(tmp_path):
    checkpoint, network = tmp_path / "net-seed0.safetensors", torch.nn.Linear(2, 2)
    with pytest.raises(CourseError, match="not there"):
        save_calibration(checkpoint, 1.3, 0.9, 0.1, {})
    assert not list(tmp_path.iterdir())
    save_checkpoint(checkpoint, network, {"recipe": "short"})
    with pytest.raises(CourseError, match="not been calibrated"):
        load_calibration(checkpoint)
    for values in ((0.0, 0.9, 0.1), (1.3, 2.0, 0.1), (float("nan"), 0.9, 0.1), (1.3, 0.9, 10)):
        with pytest.raises(CourseError, match="must be above 0"):
            save_calibration(checkpoint, *values, {})
    path = save_calibration(checkpoint, 1.3, 0.9, 0.1, {"ece": 0.02})
    assert path.name == "net-seed0.json"
    assert load_calibration(checkpoint) == {"temperature": 1.3, "threshold": 0.9, "miscoverage": 0.1, "measured": {"ece": 0.02}}
    assert load_checkpoint(checkpoint, network)["recipe"] == "short"  # the rest is still there
    save_checkpoint(checkpoint, network, {"recipe": "short"})  # trained again
    with pytest.raises(CourseError, match="not been calibrated"):
        load_calibration(checkpoint)


def test_another_miscoverage_is_another_threshold(tmp_path):
    checkpoint, (logits, labels) = tmp_path / "net-seed0.safetensors", forecaster(400, seed=1)
    save_checkpoint(checkpoint, torch.nn.Linear(2, 2), {})
    with pytest.raises(CourseError, match="too few"):
        load_or_calibrate(checkpoint, logits[:1], labels[:1])
    one, again, other = (load_or_calibrate(checkpoint, logits, labels, miscoverage=rate) for rate in (0.1, 0.1, 0.3))
    assert one == again and other["miscoverage"] == 0.3 and other["threshold"] < one["threshold"]
