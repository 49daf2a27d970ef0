"""Unsolved stubs and plausible wrong answers must not pass, and the text says what is wrong."""

import math
import statistics

import pytest
import torch
import torch.nn.functional as F

from vision_course.checks import CHECKS, check


def statistics_with_variance(batches):
    pixels = torch.cat(batches).transpose(0, 1).flatten(1)
    return pixels.mean(1), pixels.var(1, correction=0)


def convolution_turned(image, kernel, stride=1, padding=0):
    return F.conv2d(image[None, None], kernel.flip(0, 1)[None, None], stride=stride, padding=padding)[0, 0]


def convolution_without_padding(image, kernel, stride=1, padding=0):
    return F.conv2d(image[None, None], kernel[None, None], stride=stride)[0, 0]


def convolution_without_stride(image, kernel, stride=1, padding=0):
    return F.conv2d(image[None, None], kernel[None, None], padding=padding)[0, 0]


def convolution_padded_on_one_side(image, kernel, stride=1, padding=0):
    return F.conv2d(F.pad(image, (0, 2 * padding, 0, 2 * padding))[None, None], kernel[None, None], stride=stride)[0, 0]


def smoothing_over_the_others(logits, labels, smoothing):
    classes = logits.shape[1]
    targets = torch.full_like(logits, smoothing / (classes - 1)).scatter(1, labels[:, None], 1 - smoothing)
    return -(targets * logits.log_softmax(1)).sum(1).mean()


def smoothing_summed(logits, labels, smoothing):
    return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")


def smoothing_without_softmax(logits, labels, smoothing):
    targets = F.one_hot(labels, logits.shape[1]) * (1 - smoothing) + smoothing / logits.shape[1]
    return -(targets * logits).sum(1).mean()


def f1_of_means(labels, predicted, classes):
    hits = torch.bincount(labels[labels == predicted], minlength=classes)
    precision = (hits / torch.bincount(predicted, minlength=classes)).mean()
    recall = (hits / torch.bincount(labels, minlength=classes)).mean()
    return 2 * precision * recall / (precision + recall)


def f1_weighted(labels, predicted, classes):
    hits = torch.bincount(labels[labels == predicted], minlength=classes)
    support, answers = (torch.bincount(x, minlength=classes) for x in (labels, predicted))
    return (2 * hits / (support + answers) * support / len(labels)).sum()


def f1_not_a_number(labels, predicted, classes):
    hits = torch.bincount(labels[labels == predicted], minlength=classes)
    support, answers = (torch.bincount(x, minlength=classes) for x in (labels, predicted))
    return (2 * hits / (support + answers)).mean()


def f1_of_precision_and_recall(labels, predicted, classes):
    scores = []
    for k in range(classes):
        hits, support, answers = (float(x.sum()) for x in ((labels == k) & (predicted == k), labels == k, predicted == k))
        precision, recall = torch.tensor(hits) / answers, torch.tensor(hits) / support
        scores.append(2 * precision * recall / (precision + recall) if support else torch.tensor(0.0))
    return torch.stack(scores).mean()


def f1_of_classes_with_answers(labels, predicted, classes):
    scores = []
    for k in range(classes):
        hits, support, answers = (float(x.sum()) for x in ((labels == k) & (predicted == k), labels == k, predicted == k))
        if not support or not answers:
            scores.append(torch.tensor(0.0))
            continue
        precision, recall = torch.tensor(hits / answers), torch.tensor(hits / support)
        scores.append(2 * precision * recall / (precision + recall))
    return torch.stack(scores).mean()


def share_of_whole_halves(height, width, y, x, box_height, box_width):
    rows = min(height, y + box_height // 2) - max(0, y - box_height // 2)
    columns = min(width, x + box_width // 2) - max(0, x - box_width // 2)
    return 1 - rows * columns / (height * width)


def residual(x, first, second, projection):
    shortcut = F.conv2d(x, projection, stride=2)
    return shortcut, F.conv2d(F.relu(F.conv2d(x, first, stride=2, padding=1)), second, padding=1)


def residual_relu_too_early(*tensors):
    shortcut, branch = residual(*tensors)
    return shortcut + F.relu(branch)


def residual_without_inner_relu(x, first, second, projection):
    branch = F.conv2d(F.conv2d(x, first, stride=2, padding=1), second, padding=1)
    return F.relu(F.conv2d(x, projection, stride=2) + branch)


def residual_with_late_stride(x, first, second, projection):
    branch = F.conv2d(F.relu(F.conv2d(x, first, padding=1)), second, stride=2, padding=1)
    return F.relu(F.conv2d(x, projection, stride=2) + branch)


def depth_with(kept, scale):
    def answer(x, branch, keep, training):
        return x + kept(x, keep) * branch(x) * scale(keep) if training else x + branch(x)

    return answer


def each_image(x, keep):
    return torch.rand(len(x), 1, 1, 1) < keep


def depth_as_in_the_paper(x, branch, keep, training):
    return x + each_image(x, keep) * branch(x) if training else x + keep * branch(x)


def depth_without_shortcut(x, branch, keep, training):
    return each_image(x, keep) * (x + branch(x)) / keep if training else x + branch(x)


def blend_with(prepare, choose):
    def answer(first, second, labels):
        shares = [i / 10 for i in range(11)]
        p, q = prepare(first), prepare(second)
        return choose(shares, [((s * p + (1 - s) * q).argmax(1) == labels).double().mean().item() for s in shares])

    return answer


def blend_among(shares):
    def answer(first, second, labels):
        p, q = softmax(first), softmax(second)
        return max(shares, key=lambda s: ((s * p + (1 - s) * q).argmax(1) == labels).sum())

    return answer


def softmax(logits):
    return logits.softmax(1)


def first_best(shares, scores):
    return shares[scores.index(max(scores))]


def frozen_norm_with(scale):
    def answer(x, weight, bias, mean, variance, eps):
        mean, weight, bias = (v[:, None, None] for v in (mean, weight, bias))
        return (x - mean) / scale(variance, eps)[:, None, None] * weight + bias

    return answer


def frozen_norm_of_the_batch(x, weight, bias, mean, variance, eps):
    return F.batch_norm(x, None, None, weight, bias, True, 0, eps)


def frozen_norm_along_columns(x, weight, bias, mean, variance, eps):
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def prototypes_with(prepare, finish):
    def answer(features, labels, queries, classes):
        means = torch.stack([prepare(features)[labels == k].mean(0) for k in range(classes)])
        return (queries @ finish(means).T).argmax(1)

    return answer


def prototypes_nearest_image(features, labels, queries, classes):
    return labels[(queries @ F.normalize(features).T).argmax(1)]


def unchanged(x):
    return x


def path_gradients(gradient, image, baseline, steps):
    return torch.stack([gradient(baseline + (i + 0.5) / steps * (image - baseline)) for i in range(steps)])


def deletion(order_of, cumulative=True, first=0, last=None):
    def curve(score, image, attribution, steps=4):
        order, scores, left = order_of(attribution.flatten()), [score(image)], image.clone().flatten(1)
        for step in range(1, steps + 1):
            left = left if cumulative else image.clone().flatten(1)
            left[:, order[(step - 1) * len(order) // steps : step * len(order) // steps]] = 0
            scores.append(score(left.view_as(image)))
        return scores[first:last]
    return curve


def deletion_of_flat_images(score, image, attribution, steps=4):
    order, left, scores = attribution.flatten().argsort(descending=True), image.clone().flatten(1), [score(image)]
    for step in range(1, steps + 1):
        left[:, order[: step * len(order) // steps]] = 0
        scores.append(score(left))
    return scores


def deletion_in_place(score, image, attribution, steps=4):
    order, flat, scores = attribution.flatten().argsort(descending=True), image.flatten(1), [score(image)]
    for step in range(1, steps + 1):
        flat[:, order[: step * len(order) // steps]] = 0
        scores.append(score(image))
    return scores


def falling(attribution):
    return attribution.argsort(descending=True)


def deletion_of_whole_parts(score, image, attribution, steps=4):
    order, left, scores, part = falling(attribution.flatten()), image.clone().flatten(1), [score(image)], attribution.numel() // steps
    for step in range(1, steps + 1):
        left[:, order[: step * part]] = 0
        scores.append(score(left.view_as(image)))
    return scores


def mean_weights(gradient):
    return gradient.mean((2, 3), keepdim=True)


def gaps_of(confidence, correct, bins, least):
    which = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    rows = [(which == k) for k in range(bins) if (which == k).sum() >= max(least, 1)]
    return [((confidence[r].mean() - correct[r].mean()).item(), r.float().mean().item()) for r in rows]


def maximum_of_signed_gaps(confidence, correct, bins=15, least=10):
    return max((gap for gap, _ in gaps_of(confidence, correct, bins, least)), default=0.0)


def mean_of_gaps(confidence, correct, bins=15, least=10):
    return sum(abs(gap) * share for gap, share in gaps_of(confidence, correct, bins, 1))


def maximum_of_weighted_gaps(confidence, correct, bins=15, least=10):
    return max((abs(gap) * share for gap, share in gaps_of(confidence, correct, bins, least)), default=0.0)


def maximum_over_all_bins(confidence, correct, bins=15, least=10):
    return max(abs(gap) for gap, _ in gaps_of(confidence, correct, bins, 1))


def maximum_over_more_than_least(confidence, correct, bins=15, least=10):
    return max((abs(gap) for gap, _ in gaps_of(confidence, correct, bins, least + 1)), default=0.0)


def maximum_of_fifteen_bins(confidence, correct, bins=15, least=10):
    return max((abs(gap) for gap, _ in gaps_of(confidence, correct, 15, least)), default=0.0)


def maximum_or_nan(confidence, correct, bins=15, least=10):
    return max((abs(gap) for gap, _ in gaps_of(confidence, correct, bins, least)), default=float("nan"))


def maximum_without_the_edge(confidence, correct, bins=15, least=10):
    inside = [(confidence >= i / bins) & (confidence < (i + 1) / bins) for i in range(bins)]
    return max(((confidence[x].mean() - correct[x].mean()).abs().item() for x in inside if x.sum() >= least), default=0.0)


def maximum_of_bin_middles(confidence, correct, bins=15, least=10):
    which = (confidence * bins).ceil().clamp(min=1).long() - 1
    return max((abs((k + 0.5) / bins - correct[which == k].mean().item()) for k in range(bins) if (which == k).sum() >= least), default=0.0)


def risks_sorted(confidence, correct):
    wrong = 1 - correct[confidence.argsort(descending=True)]
    return wrong.cumsum(0) / torch.arange(1, len(wrong) + 1)


def coverage_until_first_rise(confidence, correct, risk=0.02):
    return (risks_sorted(confidence, correct) <= risk).float().cumprod(0).mean().item()


def coverage_below_risk(confidence, correct, risk=0.02):
    places = (risks_sorted(confidence, correct) < risk).nonzero()
    return (places.max().item() + 1) / len(correct) if len(places) else 0.0


def count_at_risk(confidence, correct, risk=0.02):
    return float((risks_sorted(confidence, correct) <= risk).nonzero().max() + 1)


def confidence_at_risk(confidence, correct, risk=0.02):
    place = (risks_sorted(confidence, correct) <= risk).nonzero().max()
    return confidence.sort(descending=True).values[place].item()


def coverage_unsorted(confidence, correct, risk=0.02):
    risks = (1 - correct).cumsum(0) / torch.arange(1, len(correct) + 1)
    safe = (risks <= risk).nonzero()
    return (safe.max().item() + 1) / len(correct) if len(safe) else 0.0


def class_scores(probabilities, labels):
    return [(1 - probabilities[labels == k, k]).sort().values for k in range(probabilities.shape[1])]


def thresholds_without_the_new_image(probabilities, labels, miscoverage=0.1):
    return torch.stack([s[math.ceil((1 - miscoverage) * len(s)) - 1] for s in class_scores(probabilities, labels)])


def thresholds_by_quantile(probabilities, labels, miscoverage=0.1):
    return torch.stack([s.quantile(1 - miscoverage) for s in class_scores(probabilities, labels)])


def thresholds_by_higher_quantile(probabilities, labels, miscoverage=0.1):
    level = lambda n: math.ceil((n + 1) * (1 - miscoverage) - 1e-9) / n
    return torch.tensor([s.quantile(level(len(s)), interpolation="higher").item() if level(len(s)) <= 1 else 1.0
                         for s in class_scores(probabilities, labels)])


def thresholds_cut_at_the_last(probabilities, labels, miscoverage=0.1):
    rank = lambda s: min(math.ceil((len(s) + 1) * (1 - miscoverage) - 1e-6), len(s))
    return torch.stack([s[rank(s) - 1] for s in class_scores(probabilities, labels)])


def thresholds_at_ten_percent(probabilities, labels, miscoverage=0.1):
    rank = lambda s: math.ceil((len(s) + 1) * 0.9 - 1e-6)
    return torch.tensor([s[rank(s) - 1] if rank(s) <= len(s) else 1.0 for s in class_scores(probabilities, labels)])


def one_threshold_for_all(probabilities, labels, miscoverage=0.1):
    scores = (1 - probabilities.gather(1, labels[:, None])[:, 0]).sort().values
    return scores[math.ceil((len(scores) + 1) * (1 - miscoverage)) - 1].repeat(probabilities.shape[1])


def keep_by(choose, size=4):
    def answer(weight):
        groups = weight.reshape(-1, size)
        return (groups * choose(groups)).view_as(weight)

    return answer


def largest(groups, count=2):
    return torch.zeros_like(groups).scatter(1, groups.topk(count).indices, 1.0)


def pattern_in_place(weight):
    groups = weight.view(-1, 4)
    groups *= largest(groups.abs())
    return weight


def whole_numbers(x, zero_point, weight):
    return (x.int() - zero_point) @ weight.int().T
def scale_and_shift(scale=lambda m, s: 1 / (255 * s), shift=lambda m, s: -m / s):
    return lambda mean, std: (scale(mean, std), shift(mean, std))


def folded(factor=lambda g, v, e: g / (v + e).sqrt(), bias=lambda b, m, f: b - m * f, shape=(-1, 1, 1, 1)):
    def answer(weight, gamma, beta, mean, variance, epsilon=1e-5):
        f = factor(gamma, variance, epsilon)
        return weight * f.view(shape), bias(beta, mean, f)

    return answer


def ratios(first, second):
    return [a / b for a, b in zip(first, second)]


WRONG = [  # number, words that the text must hold, the answer
    ("1.1", "average of the batches' means", lambda batches: [torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)] * 2),
    ("1.1", "this is the variance", statistics_with_variance),
    ("1.2", "all images are mirrored", lambda images, mirrored: images.flip(2)),
    ("1.2", "left to right", lambda images, mirrored: torch.where(mirrored[:, None, None, None], images.flip(3), images)),
    ("1.3", "first and last row", share_of_whole_halves),
    ("1.3", "reaches over the edge", lambda height, width, y, x, *box: 1 - box[0] * box[1] / (height * width)),
    ("2.1", "turned", convolution_turned),
    ("2.1", "padding is ignored", convolution_without_padding),
    ("2.1", "stride is ignored", convolution_without_stride),
    ("2.1", "one side", convolution_padded_on_one_side),
    ("2.2", "plain cross-entropy", lambda logits, labels, smoothing: F.cross_entropy(logits, labels)),
    ("2.2", "other classes only", smoothing_over_the_others),
    ("2.2", "Take the mean", smoothing_summed),
    ("2.2", "log_softmax", smoothing_without_softmax),
    ("2.3", "accuracy", lambda labels, predicted, classes: (labels == predicted).float().mean()),
    ("2.3", "whose answers are all wrong gives 0 / 0", f1_of_classes_with_answers),
    ("2.3", "averaged first", f1_of_means),
    ("2.3", "weighted", f1_weighted),
    ("2.3", "0 / 0", f1_not_a_number),
    ("2.3", "never answered gives 0 / 0", f1_of_precision_and_recall),
    ("3.1", "after the addition is missing", lambda *tensors: sum(residual(*tensors))),
    ("3.1", "before the addition", residual_relu_too_early),
    ("3.1", "between the two", residual_without_inner_relu),
    ("3.1", "shortcut is missing", lambda *tensors: F.relu(residual(*tensors)[1])),
    ("3.1", "stride 1", residual_with_late_stride),
    ("3.2", "no ReLU at the end", lambda x, branch, keep, training: F.relu(x + branch(x))),
    ("3.2", "not scaled", depth_with(each_image, lambda keep: 1)),
    ("3.2", "shrinks at test time", depth_as_in_the_paper),
    ("3.2", "lost their shortcut", depth_without_shortcut),
    ("3.2", "in part", depth_with(lambda x, keep: torch.rand_like(x) < keep, lambda keep: 1 / keep)),
    ("3.2", "share one fate", depth_with(lambda x, keep: torch.rand(1) < keep, lambda keep: 1 / keep)),
    ("3.2", "not to drop it", depth_with(lambda x, keep: ~each_image(x, keep), lambda keep: 1 / keep)),
    ("3.3", "share 1 is tried", blend_among([i / 10 for i in range(10)])),
    ("3.3", "share 0 is tried", blend_among([i / 10 for i in range(1, 11)])),
    ("3.3", "logits are mixed", blend_with(lambda logits: logits, first_best)),
    ("3.3", "second network", lambda *given: 1 - blend_with(softmax, first_best)(*given)),
    ("3.3", "best accuracy", blend_with(softmax, lambda shares, scores: max(scores))),
    ("3.3", "equally good", blend_with(softmax, lambda shares, scores: max(zip(scores, shares))[1])),
    ("4.1", "statistics of the batch", frozen_norm_of_the_batch),
    ("4.1", "square root", frozen_norm_with(lambda variance, eps: variance + eps)),
    ("4.1", "eps is missing", frozen_norm_with(lambda variance, eps: variance.sqrt())),
    ("4.1", "under the root", frozen_norm_with(lambda variance, eps: variance.sqrt() + eps)),
    ("4.1", "along the columns", frozen_norm_along_columns),
    ("4.2", "two things", lambda weight, bias, mean, std: weight / std),
    ("4.2", "multiplied by std", lambda weight, bias, mean, std: (weight * std, bias)),
    ("4.2", "weights are as before", lambda weight, bias, mean, std: (weight, bias - weight @ mean)),
    ("4.2", "bias is as before", lambda weight, bias, mean, std: (weight / std, bias)),
    ("4.2", "sign", lambda weight, bias, mean, std: (weight / std, bias + weight @ (mean / std))),
    ("4.2", "forgets std", lambda weight, bias, mean, std: (weight / std, bias - weight @ mean)),
    ("4.3", "their own lengths", prototypes_with(unchanged, F.normalize)),
    ("4.3", "long prototype", prototypes_with(F.normalize, unchanged)),
    ("4.3", "nearest image", prototypes_nearest_image),
    ("4.3", "points away", lambda features, labels, queries, classes: prototypes_with(F.normalize, F.normalize)(features, labels, -queries, classes)),
    ("5.1", "Multiply it by the way", lambda g, x, b, n: path_gradients(g, x, b, n).mean(0)),
    ("5.1", "multiplied by the image", lambda g, x, b, n: path_gradients(g, x, b, n).mean(0) * x),
    ("5.1", "Begin at the baseline", lambda g, x, b, n: path_gradients(g, x, 0 * b, n).mean(0) * x),
    ("5.1", "at the image only", lambda g, x, b, n: g(x) * (x - b)),
    ("5.1", "Take their mean", lambda g, x, b, n: path_gradients(g, x, b, n).sum(0) * (x - b)),
    ("5.2", "values below 0 are left", lambda a, g: (mean_weights(g) * a).sum(1)),
    ("5.2", "over places first", lambda a, g: (g * a).sum(1).relu()),
    ("5.2", "over the images too", lambda a, g: (g.mean((0, 2, 3), keepdim=True) * a).sum(1).relu()),
    ("5.2", "negative weights", lambda a, g: (mean_weights(g).relu() * a).sum(1).relu()),
    ("5.2", "before the sum", lambda a, g: (mean_weights(g) * a).relu().sum(1)),
    ("5.2", "channels are averaged", lambda a, g: (mean_weights(g) * a).mean(1).relu()),
    ("5.2", "summed over places", lambda a, g: (g.sum((2, 3), keepdim=True) * a).sum(1).relu()),
    ("5.3", "give the pixels their shape back", deletion_of_flat_images),
    ("5.3", "falling order", deletion(lambda x: x.argsort())),
    ("5.3", "with its sign", deletion(lambda x: x.abs().argsort(descending=True))),
    ("5.3", "stays deleted", deletion(falling, cumulative=False)),
    ("5.3", "missing at the start", deletion(falling, first=1)),
    ("5.3", "missing at the end", deletion(falling, last=-1)),
    ("5.3", "Work on a copy", deletion_in_place),
    ("5.3", "s · h · w // steps", deletion_of_whole_parts),
    ("6.1", "absolute", maximum_of_signed_gaps),
    ("6.1", "average", mean_of_gaps),
    ("6.1", "weighted", maximum_of_weighted_gaps),
    ("6.1", "fewer answers than", maximum_over_all_bins),
    ("6.1", "exactly `least`", maximum_over_more_than_least),
    ("6.1", "Use `bins`", maximum_of_fifteen_bins),
    ("6.1", "middle of a bin", maximum_of_bin_middles),
    ("6.1", "NaN", maximum_or_nan),
    ("6.1", "belongs to the last bin", maximum_without_the_edge),
    ("6.2", "fall back", coverage_until_first_rise),
    ("6.2", "exactly the limit", coverage_below_risk),
    ("6.2", "number of images", count_at_risk),
    ("6.2", "share of images", confidence_at_risk),
    ("6.2", "as they come", coverage_unsorted),
    ("6.3", "new image counts", thresholds_without_the_new_image),
    ("6.3", "one too high", thresholds_by_higher_quantile),
    ("6.3", "interpolates", thresholds_by_quantile),
    ("6.3", "two images", thresholds_cut_at_the_last),
    ("6.3", "Use `miscoverage`", thresholds_at_ten_percent),
    ("6.3", "share one threshold", one_threshold_for_all),
    ("7.1", "that is the mask", lambda w: largest(w.reshape(-1, 4).abs()).view_as(w)),
    ("7.1", "Compare magnitudes", keep_by(largest)),
    ("7.1", "two smallest", keep_by(lambda groups: largest(-groups.abs()))),
    ("7.1", "four neighbours at a time", keep_by(lambda rows: largest(rows.abs(), 4), size=8)),
    ("7.1", "down the columns", lambda w: keep_by(lambda groups: largest(groups.abs()))(w.T.contiguous()).T),
    ("7.1", "Keep two", keep_by(lambda groups: largest(groups.abs(), 1))),
    ("7.1", "Work on a copy", pattern_in_place),
    ("7.2", "zero point is missing", lambda x, s, z, w, scales: whole_numbers(x, 0, w) * s * scales),
    ("7.2", "belongs to each input", lambda x, s, z, w, scales: (whole_numbers(x, 0, w) - z) * s * scales),
    ("7.2", "wrap around", lambda x, s, z, w, scales: whole_numbers(x - z, 0, w) * s * scales),
    ("7.2", "overflow", lambda x, s, z, w, scales: whole_numbers(x, z, w).to(torch.int8) * s * scales),
    ("7.2", "scales of the weights", lambda x, s, z, w, scales: whole_numbers(x, z, w) * s),
    ("7.2", "scale of the inputs", lambda x, s, z, w, scales: whole_numbers(x, z, w) * scales),
    ("7.2", "still whole numbers", lambda x, s, z, w, scales: whole_numbers(x, z, w)),
    ("7.3", "outvotes the others", lambda logits, t: (logits / t).mean(0).softmax(1)),
    ("7.3", "temperature is missing", lambda logits, t: logits.softmax(2).mean(0)),
    ("7.3", "Divide by it", lambda logits, t: (logits * t).softmax(2).mean(0)),
    ("7.3", "not the logits", lambda logits, t: logits.softmax(2).mean(0) / t),
    ("7.3", "Take their mean", lambda logits, t: (logits / t).softmax(2).sum(0)),
    ("7.3", "over the images", lambda logits, t: (logits / t).softmax(1).mean(0)),
    ("7.3", "over the teachers", lambda logits, t: (logits / t).softmax(0).mean(0)),
    ("7.3", "first teacher", lambda logits, t: (logits / t).softmax(2)[0]),
    ("8.1", "two tensors", lambda mean, std: 1 / (255 * std)),
    ("8.1", "lacks the 255", scale_and_shift(scale=lambda m, s: 1 / s)),
    ("8.1", "divide by", scale_and_shift(scale=lambda m, s: 255 * s)),
    ("8.1", "turned around", scale_and_shift(scale=lambda m, s: 255 / s)),
    ("8.1", "negative", scale_and_shift(shift=lambda m, s: m / s)),
    ("8.1", "standard deviation as well", scale_and_shift(shift=lambda m, s: -m)),
    ("8.1", "share of 1 already", scale_and_shift(shift=lambda m, s: -m / (255 * s))),
    ("8.1", "added after the scale", scale_and_shift(shift=lambda m, s: -255 * m)),
    ("8.2", "gamma is missing", folded(lambda g, v, e: 1 / (v + e).sqrt())),
    ("8.2", "epsilon is missing", folded(lambda g, v, e: g / v.sqrt())),
    ("8.2", "Take its root", folded(lambda g, v, e: g / (v + e))),
    ("8.2", "input channels", folded(shape=(1, -1, 1, 1))),
    ("8.2", "before the factor", folded(bias=lambda b, m, f: b - m)),
    ("8.2", "mean's share", folded(bias=lambda b, m, f: b)),
    ("8.2", "sign of the mean", folded(bias=lambda b, m, f: b + m * f)),
    ("8.3", "mean of the ratios", lambda first, second: statistics.mean(ratios(first, second))),
    ("8.3", "ratio of the sums", lambda first, second: sum(first) / sum(second)),
    ("8.3", "ratio of the medians", lambda first, second: statistics.median(first) / statistics.median(second)),
    ("8.3", "first / second", lambda first, second: statistics.median(ratios(second, first))),
    ("8.3", "difference in seconds", lambda first, second: statistics.median(a - b for a, b in zip(first, second))),
    ("8.3", "even number of rounds", lambda first, second: statistics.median_low(ratios(first, second))),
]


@pytest.mark.parametrize("number", sorted(CHECKS))
def test_an_unsolved_stub_says_so(number, capsys):
    assert not check(number, lambda *arguments, **options: ...)
    assert capsys.readouterr().out.strip() == f"{number} not solved yet"


@pytest.mark.parametrize("number, words, answer", WRONG)
def test_a_wrong_answer_is_named(number, words, answer, capsys):
    assert not check(number, answer)
    said = capsys.readouterr().out
    assert said.startswith(f"{number} is not right yet") and words in said


@pytest.mark.parametrize("number", sorted(CHECKS))
def test_every_exercise_has_a_wrong_answer_here(number):
    assert number in {row[0] for row in WRONG}
