"""Beam search: against greedy generation, brute force, a slow search without a cache, and the trainer's log-probs."""

from __future__ import annotations

from functools import wraps
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lightning_vlm.data.encode import Encoder
from lightning_vlm.data.schema import Sample, image, message, text
from lightning_vlm.models.batch import Row
from lightning_vlm.models.collate import collate
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import load_model
from lightning_vlm.models.policy import Policy
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone
from lightning_vlm.models.tiny import TINY_FAMILIES, make_tiny
from lightning_vlm.rollouts import Completion, PolicyEngine, Sampling, completion_row

EMBEDDED = ("embedded:qwen2_5_vl-tiny", "embedded:llava-tiny")


def policy_and_prompts(path: str, dtype: str = "float64") -> tuple[Policy, object, list[Row]]:
    """One image, none, two (one shared with the first), none again; all of different lengths."""
    backbone = Backbone(path=path, dtype=dtype)
    processor, model = load_processor(backbone), load_model(backbone)
    noise = torch.randint(0, 256, (2, 40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    a, b = (Image.fromarray(pixels.numpy()) for pixels in noise)
    samples = (
        ("one", [image(), text("what is it?")], [a]),
        ("none", [text("hello there")], []),
        ("two", [text("x"), image(), text("and"), image(), text("compare")], [b, a]),
        ("long", [text("how many red circles are there to the left of the blue square, and how many above?")], []),
    )
    encoder = Encoder(processor)
    prompts = [encoder.encode_prompt(Sample(id, [message("user", *parts)], images)) for id, parts, images in samples]
    assert len({len(row) for row in prompts}) == len(prompts)
    return Policy(model, family_of(model)).eval(), processor, prompts


@pytest.fixture(scope="module", params=["qwen2_5_vl", "llava_clip_qwen2", "internvl"])
def made(request, tmp_path_factory) -> tuple[Policy, object, list[Row]]:
    """Random weights, spread enough that many sequences compete."""
    path = tmp_path_factory.mktemp("beam") / request.param
    make_tiny(request.param, path, initializer_range=0.3)
    return policy_and_prompts(str(path))


def only(processor: object, policy: Policy, others: int) -> tuple[SimpleNamespace, list[int]]:
    """The processor with all ids banned but its end of turn and a few `others`; and the ids that are left."""
    eos = min(processor.eos_ids)
    left = [eos, *(i for i in range(30, 30 + others) if i not in processor.eos_ids | processor.banned_ids)]
    vocabulary = policy.head_weight().shape[0]
    few = SimpleNamespace(
        tokenizer=processor.tokenizer,
        pad_id=processor.pad_id,
        eos_ids={eos},
        banned_ids=set(range(vocabulary)) - {*left},
    )
    return few, left


@torch.no_grad()
def scored(policy: Policy, prompt: Row, sequences: list[tuple[int, ...]], pad: int) -> list[float]:
    """Log-prob of every sequence behind the prompt, by the trainer's own forward."""
    rows = [completion_row(prompt, Completion(list(ids), "", True, [], [])) for ids in sequences]
    scores = policy.score(collate(rows, policy.family, pad))
    return scores.per_row(scores.logprobs, len(rows)).tolist()


def test_one_beam_is_greedy(made):
    policy, processor, prompts = made
    engine = PolicyEngine(policy, processor)
    greedy = engine.generate(prompts, sampling=Sampling(max_new_tokens=10), keys=(0, 0))
    found = engine.beams(prompts, beams=1, max_new_tokens=10)
    for (expected,), (beam,) in zip(greedy, found, strict=True):
        assert (beam.ids, beam.text, beam.finished) == (expected.ids, expected.text, expected.finished)
        assert beam.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
        assert beam.sampling_logprobs == pytest.approx(expected.sampling_logprobs, abs=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
def test_enough_beams_find_what_brute_force_finds(made, penalty):
    """All sequences of up to 3 tokens out of 4 (the end of turn and three others), with as many beams as there are."""
    policy, processor, prompts = made
    few, (eos, *words) = only(processor, policy, 3)
    every = [(*start, end) for t in range(3) for start in product(words, repeat=t) for end in (eos, *words)]
    every = [ids for ids in every if ids[-1] == eos or len(ids) == 3]
    assert len(every) == 1 + 3 + 9 * 4
    found = PolicyEngine(policy, few).beams(prompts, beams=64, n=64, max_new_tokens=3, length_penalty=penalty)
    for prompt, beams in zip(prompts, found, strict=True):
        exact = dict(zip(every, scored(policy, prompt, every, few.pad_id), strict=True))
        order = sorted(every, key=lambda ids: -exact[ids] / len(ids) ** penalty)
        assert [tuple(beam.ids) for beam in beams] == order
        assert [sum(beam.logprobs) for beam in beams] == pytest.approx([exact[ids] for ids in order], abs=1e-5)
        assert [beam.finished for beam in beams] == [ids[-1] == eos for ids in order]
        # What is left after the bans is a distribution: its sequences exhaust it.
        mass = sum(torch.tensor(beam.sampling_logprobs).double().sum().exp().item() for beam in beams)
        assert mass == pytest.approx(1, abs=1e-5)


def slow_search(policy, prompt, words, eos, pad, beams, length, penalty) -> list[tuple[int, ...]]:
    """The definition, one prompt, no cache: every candidate scored from the start."""
    kept = [()]
    for _ in range(length):
        ended = [ids for ids in kept if ids[-1:] == (eos,)]
        candidates = ended + [(*ids, word) for ids in kept if ids not in ended for word in (eos, *words)]
        exact = dict(zip(candidates, scored(policy, prompt, candidates, pad), strict=True))
        kept = sorted(candidates, key=lambda ids: -exact[ids] / len(ids) ** penalty)[:beams]
    return kept


@pytest.mark.parametrize(("beams", "penalty"), [(2, 0.0), (5, 0.0), (5, 1.0)])
def test_a_narrow_search_equals_a_slow_one(made, beams, penalty):
    policy, processor, prompts = made
    few, (eos, *words) = only(processor, policy, 8)
    found = PolicyEngine(policy, few).beams(prompts, beams=beams, n=beams, max_new_tokens=6, length_penalty=penalty)
    ends = 0
    for prompt, best in zip(prompts, found, strict=True):
        expected = slow_search(policy, prompt, words, eos, few.pad_id, beams, 6, penalty)
        assert [tuple(beam.ids) for beam in best] == expected
        ends += sum(beam.finished and len(beam.ids) < 6 for beam in best)
    assert ends  # some ended early and stayed


def test_neighbours_and_padding_do_not_matter(made):
    policy, processor, prompts = made
    search = {"beams": 4, "n": 3, "max_new_tokens": 6}
    together = PolicyEngine(policy, processor).beams(prompts, **search)
    assert all(len(best) == 3 for best in together)
    for batch_size in (1, 8):  # one prompt at a time, two at a time
        engine = PolicyEngine(policy, processor, batch_size=batch_size)
        apart = engine.beams(prompts[::-1], **search)[::-1]
        assert [[b.ids for b in best] for best in apart] == [[b.ids for b in best] for best in together]
    # Fewer are a prefix of more; a prompt that comes twice gets the same twice.
    again = PolicyEngine(policy, processor).beams([prompts[2], prompts[0], prompts[2]], beams=4, n=1, max_new_tokens=6)
    assert [best[0].ids for best in again] == [together[p][0].ids for p in (2, 0, 2)]


def test_images_are_encoded_once(made, monkeypatch):
    """Two distinct images in three places, whatever the number of beams and steps."""
    policy, processor, prompts = made
    seen = []
    kind = type(policy.model.model)
    original = kind.get_image_features

    @wraps(original)
    def counted(*args, **kwargs):
        seen.append(len(kwargs.get("image_grid_thw", kwargs["pixel_values"])))
        return original(*args, **kwargs)

    monkeypatch.setattr(kind, "get_image_features", counted)
    batch = collate(prompts, policy.family, processor.pad_id)
    PolicyEngine(policy, processor).beams(prompts, beams=3, max_new_tokens=4)
    assert seen == [len(batch.pixels.get("image_grid_thw", batch.pixels["pixel_values"]))]


def test_banned_ids_never_come_out(made, monkeypatch):
    """Not even where they have by far the largest logit."""
    policy, processor, prompts = made
    banned = torch.tensor(sorted(processor.banned_ids))
    handle = policy.head.register_forward_hook(lambda *call: call[-1].index_fill(-1, banned, 1e4))
    try:
        found = PolicyEngine(policy, processor).beams(prompts, beams=3, n=3, max_new_tokens=4)
    finally:
        handle.remove()
    for beam in (beam for best in found for beam in best):
        assert not processor.banned_ids & set(beam.ids)
        assert max(beam.logprobs) < -1000 < min(beam.sampling_logprobs)


def test_where_fewer_sequences_exist_fewer_come_back(made):
    policy, processor, prompts = made
    few, (eos, word) = only(processor, policy, 1)
    (best,) = PolicyEngine(policy, few).beams(prompts[:1], beams=9, n=9, max_new_tokens=2)
    assert sorted(beam.ids for beam in best) == sorted([[eos], [word, eos], [word, word]])


def test_modes_and_random_state_are_left(made):
    policy, processor, prompts = made
    policy.train()
    policy.head.eval()
    modes = {name: module.training for name, module in policy.named_modules()}
    before = torch.get_rng_state()
    PolicyEngine(policy, processor).beams(prompts, beams=2, n=2, max_new_tokens=3)
    assert modes == {name: module.training for name, module in policy.named_modules()}
    assert torch.equal(before, torch.get_rng_state())
    policy.eval()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"beams": 0}, "beams"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"n": 0}, "at least 1"),
        ({"n": 3}, "at most 2"),
    ],
    ids=str,
)
def test_bad_arguments(made, wrong, words):
    policy, processor, prompts = made
    with pytest.raises(ValueError, match=words):
        PolicyEngine(policy, processor).beams(prompts, **({"beams": 2, "max_new_tokens": 4} | wrong))
    assert PolicyEngine(policy, processor).beams([], beams=2, max_new_tokens=4) == []


def agree(policy: Policy, processor: object, prompts: list[Row], tolerance: float) -> None:
    found = PolicyEngine(policy, processor).beams(prompts, beams=4, n=4, max_new_tokens=8)
    pairs = [(row, beam) for row, best in zip(prompts, found, strict=True) for beam in best]
    assert len(pairs) == 4 * len(prompts)
    with torch.no_grad():
        scores = policy.score(collate([completion_row(*pair) for pair in pairs], policy.family, processor.pad_id))
    got = torch.tensor([value for _, beam in pairs for value in beam.logprobs])
    torch.testing.assert_close(got.double(), scores.logprobs.double(), atol=tolerance, rtol=0)
    for best in found:
        totals = [sum(beam.logprobs) for beam in best]
        assert totals == sorted(totals, reverse=True)
        assert len({tuple(beam.ids) for beam in best}) == len(best)


@pytest.mark.parametrize("path", EMBEDDED)
def test_logprobs_are_the_trainers_in_single_precision(path):
    agree(*policy_and_prompts(path, "float32"), tolerance=1e-4)


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_every_family(name, tmp_path):
    make_tiny(name, tmp_path / name, initializer_range=0.3)
    policy, processor, prompts = policy_and_prompts(str(tmp_path / name))
    agree(policy, processor, prompts, tolerance=2e-5)
    (greedy,), (one,) = (
        PolicyEngine(policy, processor).generate(prompts[2:3], sampling=Sampling(max_new_tokens=8), keys=(0, 0)),
        PolicyEngine(policy, processor).beams(prompts[2:3], beams=1, max_new_tokens=8),
    )
    assert one[0].ids == greedy[0].ids
