"""The probes themselves: features that say all and nothing, hand arithmetic, finite differences, slow oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_vlm.data.encode import Encoder
from lightning_vlm.data.world import WorldSource
from lightning_vlm.models.collate import collate
from lightning_vlm.probes.encoder import (
    Picture,
    ProbeData,
    alignment,
    compare_energy,
    gradient_maps,
    linear_probe,
    load_encoder,
    load_language,
    mutual_knn,
    world_classes,
    world_questions,
    world_segments,
)
from lightning_vlm.probes.encoder.alignment import language_of
from lightning_vlm.probes.encoder.data import asked_about
from lightning_vlm.probes.encoder.gradients import GradientMaps, feature_gradients
from lightning_vlm.probes.encoder.linear import CS, fit_linear
from lightning_vlm.probes.encoder.segmentation import (
    Patches,
    _score,
    fit_segmentation,
    patch_cover,
    present_loss,
    take_patches,
)

# --- linear ----------------------------------------------------------------------------------------------------------


def labelled(n: int, classes: int = 8) -> list[str]:
    return [f"class {i % classes}" for i in range(n)]


def one_hot(labels: list[str]) -> np.ndarray:
    return np.eye(8)[[int(label[-1]) for label in labels]]


def test_features_that_are_the_class_tell_it_and_noise_does_not():
    labels, rng = labelled(400), np.random.default_rng(0)
    found = fit_linear(one_hot(labels), labels, one_hot(labels), labels)
    assert found.accuracy == 1 and found.low > 0.98 and found.high == 1 and found.converged
    assert min(CS) == found.C  # all C do equally well: the strongest penalty
    assert set(found.by_class.values()) == {1.0} and found.chance == 1 / 8
    noise = fit_linear(rng.normal(size=(400, 16)), labels, rng.normal(size=(1600, 16)), labelled(1600))
    assert abs(noise.accuracy - 1 / 8) < 0.03 and noise.low < 1 / 8 < noise.high
    best = max(noise.validation.values())
    assert noise.validation[noise.C] == best and all(v < best for C, v in noise.validation.items() if C < noise.C)


def test_the_test_has_no_say_in_C():
    """Other labels and other features of the test leave C, and what it was chosen by, as they are."""
    rng, labels = np.random.default_rng(1), labelled(160)
    train = one_hot(labels) + rng.normal(size=(160, 8))
    test = one_hot(labels) + rng.normal(size=(160, 8))
    found = fit_linear(train, labels, test, labels)
    permuted = fit_linear(train, labels, test, list(rng.permutation(labels)))
    other = fit_linear(train, labels, rng.normal(size=(160, 8)), labels)
    assert found.C == permuted.C == other.C and found.validation == permuted.validation == other.validation
    assert len(set(found.validation.values())) > 1, "the choice means something"
    assert permuted.accuracy < 0.3 < found.accuracy
    assert fit_linear(train, labels, test, labels, seed=3).validation != found.validation


def test_only_the_direction_of_a_feature_counts():
    rng, labels = np.random.default_rng(2), labelled(80)
    train = one_hot(labels) + 0.5 * rng.normal(size=(80, 8))
    scales = rng.uniform(0.1, 100, size=(80, 1))
    assert (
        fit_linear(train, labels, train, labels).predicted
        == fit_linear(train * scales, labels, train, labels).predicted
    )


def test_what_a_linear_probe_refuses():
    ones = np.ones((4, 2))
    with pytest.raises(ValueError, match=r"at least two classes, got 1 \(a\)"):
        fit_linear(ones, ["a"] * 4, ones, ["a"] * 4)
    with pytest.raises(ValueError, match="class 'b' has one picture to fit on"):
        fit_linear(ones, ["a", "a", "a", "b"], ones, ["a"] * 4)
    with pytest.raises(ValueError, match="features are not finite"):
        fit_linear(ones * math.nan, ["a", "a", "b", "b"], ones, ["a"] * 4)
    encoder = load_encoder("embedded:llava-tiny")
    unlabelled = ProbeData("x", [Picture("p", Image.new("RGB", (64, 64)))], [])
    with pytest.raises(ValueError, match="x: picture p has no class"):
        linear_probe(encoder, unlabelled)


def test_linear_probe_of_an_encoder():
    """Colours of clean figures are there for any encoder to see."""
    found = linear_probe(load_encoder("embedded:llava-tiny"), world_classes("colour", train=240, test=96, noise=0))
    assert found.accuracy > 0.8 and found.train == 240 and found.test == 96


# --- segmentation ----------------------------------------------------------------------------------------------------


def patches(n: int, seed: int, features=None) -> Patches:
    """Pictures of 4 × 4 patches with two of five labels each, one patch in four labelled."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((n, 16, 5), bool)
    for own in labels:
        for label in rng.choice(5, 2, replace=False):
            own[rng.choice(16, 4, replace=False), label] = True
    present = np.broadcast_to(labels.any(1, keepdims=True), labels.shape).reshape(-1, 5)
    flat = torch.from_numpy(labels.reshape(-1, 5))
    given = flat.float() if features is None else torch.from_numpy(features(rng, n * 16)).float()
    return Patches(given, flat, torch.from_numpy(present.copy()), [(4, 4)] * n)


def test_features_that_are_the_labels_are_found_and_noise_is_not():
    names = list("abcde")
    found = fit_segmentation(patches(40, 0), patches(20, 1), names, steps=150, hidden=64)
    assert found.recall == found.recall_patches == found.precision == found.iou == found.accuracy == 1
    assert found.per_seed == [1.0] * 3 and math.isnan(found.low)
    noise = [patches(40, seed, lambda rng, n: rng.normal(size=(n, 6))) for seed in (0, 1)]
    lost = fit_segmentation(*noise, names, steps=150, hidden=64)
    assert lost.recall < 0.35 and lost.iou < 0.25
    assert lost.positives == pytest.approx(0.25)
    assert lost.low < lost.recall < lost.high
    again = fit_segmentation(*noise, names, steps=150, hidden=64)
    assert lost.per_seed == again.per_seed and len(set(lost.per_seed)) > 1


def test_loss_and_scores_by_hand():
    """Labels that the picture lacks count in neither."""
    logits = torch.tensor([[0.0, 50.0, -1.0], [2.0, -50.0, 1.0], [-1.0, 9.0, 1.0], [3.0, 9.0, 1.0]])
    labels = torch.tensor([[1, 0, 1], [1, 0, 0], [1, 0, 1], [0, 0, 1]]).bool()
    present = torch.tensor([[1, 0, 1]] * 3 + [[0, 0, 1]]).bool()

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    terms = [sigmoid(0), sigmoid(-1), sigmoid(2), 1 - sigmoid(1), sigmoid(-1), sigmoid(1), sigmoid(1)]
    assert present_loss(logits, labels, present).item() == pytest.approx(-sum(map(math.log, terms)) / 7)
    score = _score(logits, Patches(torch.zeros(4, 1), labels, present, [(2, 2)]))
    # Class 0: 1 of 3 found. Class 1 is nowhere. Class 2: 2 of 3 found, and one patch too many.
    assert score["recall"].tolist()[::2] == pytest.approx([1 / 3, 2 / 3]) and math.isnan(score["recall"][1])
    assert score["iou"].tolist()[::2] == pytest.approx([1 / 3, 2 / 4])
    assert score["recall_patches"] == pytest.approx(3 / 6) and score["precision"] == pytest.approx(3 / 4)
    assert score["accuracy"] == pytest.approx(3 / 7)


def test_labels_of_patches():
    """A patch has what covers a twentieth of it; the figures of the world fill their cells."""
    mask = np.zeros((1, 4, 4), bool)
    mask[0, 0, 0] = mask[0, 2:, 2:] = True
    assert patch_cover(mask, 2, 2).tolist() == [[[0.25, 0.0], [0.0, 1.0]]]
    assert patch_cover(np.zeros((0, 4, 4), bool), 2, 2).shape == (0, 2, 2)
    data = world_segments(train=4, test=10)
    classes = sorted({name for p in data.test for name in p.masks()[0]})
    found = take_patches(load_encoder("embedded:llava-tiny"), data.test, classes)
    source = WorldSource(split="test", size=10, questions_per_image=1)
    for n, sample in enumerate(source):
        own = found.labels[16 * n : 16 * n + 16]
        if sample.info["family"] in ("caption", "count"):
            assert own.any(1).tolist() == (sample.info["patch_labels"][:, 1] > 0).tolist()
        if sample.info["family"] in ("angle", "perimeter"):
            assert own[:, classes.index("label")].tolist() == (sample.info["patch_labels"][:, 3] > 0).tolist()
        names = {classes[c] for c in found.present[16 * n].nonzero()[:, 0]}
        assert names == set(sample.info["masks"]()[0])


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embedded:llava-tiny", "embedded:qwen2_5_vl-tiny"])
def test_gradients_against_finite_differences(name):
    """The feature of a patch is moved where the projector begins, at its place counted by hand."""
    encoder = load_encoder(name, dtype="float64")
    policy, processor = encoder.policy, encoder.processor
    encode, source = Encoder(processor), WorldSource(size=40, questions_per_image=1, direct_fraction=1.0)
    rows = [encode.encode_answer(source[n])[0] for n in (1, 7)]
    gradients, losses = feature_gradients(encoder, rows)
    (h, w, _), qwen = gradients[0].shape, "qwen" in name
    projector = policy.model.get_submodule(policy.family.projector[0])

    def loss(row, place, channel, step):
        def move(module, args):
            moved = args[0].clone()
            moved.view(-1, moved.shape[-1])[place, channel] += step
            return (moved, *args[1:])

        handle = projector.register_forward_pre_hook(move)
        with torch.no_grad():
            value = -policy.score(collate([row], policy.family, 0)).logprobs.sum().item()
        handle.remove()
        return value

    for row, gradient, told in zip(rows, gradients, losses, strict=True):
        assert loss(row, 0, 0, 0.0) == pytest.approx(told, rel=1e-9)
        for y, x, channel in ((0, 0, 3), (1, 2, 0), (h - 1, w - 2, 7)):
            place = ((y // 2) * (w // 2) + x // 2) * 4 + (y % 2) * 2 + x % 2 if qwen else y * w + x
            slope = (loss(row, place, channel, 1e-5) - loss(row, place, channel, -1e-5)) / 2e-5
            assert gradient[y, x, channel].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_maps_are_l1_norms_and_do_not_depend_on_the_batch():
    encoder, samples = load_encoder("embedded:llava-tiny"), world_questions(size=10)
    maps = gradient_maps(encoder, samples)
    alone = gradient_maps(encoder, samples, batch_size=1)
    for a, b in zip(maps.maps, alone.maps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    rows = [Encoder(encoder.processor).encode_answer(s)[0] for s in samples]
    gradients, losses = feature_gradients(encoder, rows)
    slow = [[sum(abs(v) for v in patch) for patch in line] for line in gradients[3].tolist()]
    torch.testing.assert_close(maps.maps[3], torch.tensor(slow), rtol=1e-5, atol=1e-6)
    assert maps.losses == pytest.approx(losses, rel=1e-5)
    assert all(p.grad is None for p in encoder.policy.parameters())
    same = compare_energy(maps, alone)
    assert same.diff == pytest.approx(0, abs=1e-5)


def test_shares_by_hand():
    """What is asked about: as many figures as the answer counts, the bars that are named, everything in captions."""
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    inside = torch.tensor([[False, False], [False, True]])
    samples = world_questions(size=3)
    maps = GradientMaps(samples, [values, values, values], [inside, None, ~inside], [1.0, 2.0, 6.0], 0)
    assert maps.energy[[0, 2]].tolist() == pytest.approx([0.4, 0.6]) and math.isnan(maps.energy[1])
    assert maps.area[[0, 2]].tolist() == [0.25, 0.75] and maps.pointing[[0, 2]].tolist() == [1, 0]
    found = maps.summary()
    assert found["scored"] == 2 and found["samples"] == 3 and found["loss"] == 3
    assert found["energy"][0] == pytest.approx(0.5) and found["lift"][0] == pytest.approx(0)
    blind = GradientMaps(samples[:1], [values], [None], [1.0], 0)
    assert blind.summary()["energy"] is None
    with pytest.raises(ValueError, match="no sample's objects are known"):
        compare_energy(blind, blind)
    with pytest.raises(ValueError, match="different samples"):
        compare_energy(blind, maps)
    seen = set()
    for sample in world_questions(size=300):
        (names, masks), kind = asked_about(sample), sample.info["question"]
        assert len(names) == len(masks)
        if sample.info["family"] == "count":
            assert len(names) == int(sample.answer)
        elif sample.info["family"] == "bars":
            assert len(names) == {"value": 1, "sum": 2, "difference": 3}[kind]
            words = sample.prompt()[-1]["content"][-1]["text"].strip("?").split()
            assert all(name.split()[0] in words for name in names)
        else:
            assert len(names) == len(sample.info["masks"]()[0])
        seen.add(kind)
    assert {"colour", "shape", "value", "caption", "third"} <= seen


def test_what_gradients_refuse():
    samples = world_questions(size=1)
    with pytest.raises(ValueError, match="layer is 1: gradients are taken where the projector begins"):
        gradient_maps(load_encoder("embedded:llava-tiny", layer=1), samples)
    with pytest.raises(ValueError, match="there are no samples"):
        gradient_maps(load_encoder("embedded:llava-tiny"), [])


# --- alignment -------------------------------------------------------------------------------------------------------


def slow_knn(a: np.ndarray, b: np.ndarray, k: int) -> list[float]:
    shares = []
    for i in range(len(a)):
        near = []
        for features in (a, b):
            cosine = {
                j: features[i] @ features[j] / np.linalg.norm(features[i]) / np.linalg.norm(features[j])
                for j in range(len(a))
                if j != i
            }
            near.append(set(sorted(cosine, key=lambda j: -cosine[j])[:k]))
        shares.append(len(near[0] & near[1]) / k)
    return shares


def test_mutual_neighbours():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 5)), rng.normal(size=(40, 7))
    b[:, :5] += a
    for k in (1, 3, 10):
        assert mutual_knn(torch.tensor(a), torch.tensor(b), k).tolist() == pytest.approx(slow_knn(a, b, k))
    assert mutual_knn(torch.tensor(a), torch.tensor(3 * a), 10).tolist() == [1.0] * 40
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    assert mutual_knn(torch.tensor(a), torch.tensor(a @ rotation), 10).mean() == 1
    n, k = 600, 10
    shares = mutual_knn(torch.tensor(rng.normal(size=(n, 8))), torch.tensor(rng.normal(size=(n, 8))), k)
    assert abs(shares.mean().item() - k / (n - 1)) < 4 * math.sqrt(k / n / k / n)
    with pytest.raises(ValueError, match="k is 40 with 40 samples"):
        mutual_knn(torch.tensor(a), torch.tensor(b), 40)
    with pytest.raises(ValueError, match="40 and 39 samples"):
        mutual_knn(torch.tensor(a), torch.tensor(b[1:]), 3)


def test_alignment_of_an_encoder():
    """Padding changes no caption's feature; chance and score are what the parts say."""
    encoder, samples = load_encoder("embedded:llava-tiny"), world_questions(families=("caption",), size=40)
    language = language_of(encoder)
    texts = [s.chosen() for s in samples]
    together = language.pooled(texts, batch_size=40)
    alone = torch.cat([language.pooled([text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    ids = torch.tensor([language.tokenizer(texts[0]).input_ids])
    with torch.no_grad():
        hidden = language.model(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(together[0], hidden.mean(0), rtol=1e-4, atol=1e-5)
    found = alignment(encoder, samples, k=5)
    shares = mutual_knn(encoder.pooled([s.images[0] for s in samples]), together, 5)
    assert found.score == pytest.approx(shares.mean().item()) and found.chance == 5 / 39
    assert found.low <= found.score <= found.high and found.language == "embedded:llava-tiny"
    other = alignment(encoder, samples, k=5, language=load_language("embedded:qwen2_5_vl-tiny"))
    assert other.language == "embedded:qwen2_5_vl-tiny"
    with pytest.raises(ValueError, match="k is 40 with 40 samples"):
        alignment(encoder, samples, k=40)
