"""Generation: keyed draws, exact distributions, bans, and agreement with plain Hugging Face generate and forward."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from scipy.stats import chisquare, kstest
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from lightning_vlm.data.encode import Encoder
from lightning_vlm.data.schema import Sample, image, message, text
from lightning_vlm.models.batch import ImageInput, Row
from lightning_vlm.models.collate import collate
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import load_model
from lightning_vlm.models.policy import Policy
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone
from lightning_vlm.models.tiny import TINY_FAMILIES, make_tiny
from lightning_vlm.rollouts import PolicyEngine, Sampling, completion_row, decode
from lightning_vlm.rollouts.sampling import draw_key, draw_tokens, filter_logits, keyed_uniform

V, PAD, EOS, IMAGE, VIDEO, START, END = 24, 0, 1, 2, 3, 4, 5
GREEDY = Sampling(max_new_tokens=12)
SAMPLED = Sampling(max_new_tokens=12, temperature=0.8)


class Tokens:
    """Decodes ids to words; the special ones vanish."""

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(f"w{i}" for i in ids if not (skip_special_tokens and i <= END))


PROCESSOR = SimpleNamespace(tokenizer=Tokens(), pad_id=PAD, eos_ids={EOS}, banned_ids={IMAGE, VIDEO})


def qwen() -> Qwen2_5_VLForConditionalGeneration:
    language = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
        "initializer_range": 0.5, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "out_hidden_size": 32,
        "window_size": 16, "fullatt_block_indexes": [1], "initializer_range": 0.3,
    }  # fmt: skip
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=language, vision_config=vision, **ids))


def llava() -> LlavaForConditionalGeneration:
    language = {
        "model_type": "qwen2", "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 8, "patch_size": 4, "projection_dim": 32, "initializer_range": 0.3,
    }  # fmt: skip
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=language, vision_config=vision, image_token_index=IMAGE, image_seq_length=4)
    )


@pytest.fixture(scope="module", params=[qwen, llava], ids=["qwen2_5_vl", "llava"])
def policy(request) -> Policy:
    torch.manual_seed(0)
    model = request.param().double()
    # As a real model directory does: settings that must not leak into what we draw.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.01,
        top_k=1,
        repetition_penalty=1.9,
        pad_token_id=7,
        eos_token_id=[9],
        max_length=3,
    )
    return Policy(model, family_of(model))


def picture(policy: Policy, seed: int) -> ImageInput:
    noise = torch.Generator().manual_seed(seed)
    if policy.family.name == "llava":
        return ImageInput(f"p{seed}", {"pixel_values": torch.randn(1, 3, 8, 8, generator=noise).double()}, 4)
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=noise).double()
    return ImageInput(f"p{seed}", {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}, 4)


def prompt(id: str, images: list[ImageInput], words: list[int]) -> Row:
    ids = [6]
    for shown in images:
        ids += [START] + [IMAGE] * shown.tokens + [END]
    ids = torch.tensor(ids + words)
    return Row(id, ids, torch.zeros(len(ids), dtype=torch.bool), images=images)


@pytest.fixture(scope="module")
def prompts(policy) -> list[Row]:
    """One image, none, two (one shared with the first), none again: lengths 9, 3, 15, 7."""
    a, b = picture(policy, 1), picture(policy, 2)
    return [
        prompt("a", [a], [8, 9]),
        prompt("b", [], [10, 11]),
        prompt("c", [b, a], [12, 13]),
        prompt("d", [], [14, 15, 16, 17, 18, 19]),
    ]


def plain_generate(policy: Policy, row: Row, config: GenerationConfig) -> list[int]:
    """Hugging Face generate on one unpadded row, images merged by hand."""
    kwargs = {"input_ids": row.input_ids[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
    if row.images:
        kwargs |= {k: torch.cat([i.tensors[k] for i in row.images]) for k in row.images[0].tensors}
        if policy.family.name != "llava":
            kwargs["mm_token_type_ids"] = (kwargs["input_ids"] == IMAGE).int()
    own, policy.model.generation_config = policy.model.generation_config, GenerationConfig()
    policy.eval()
    try:
        out = policy.model.generate(**kwargs, generation_config=config)
    finally:
        policy.model.generation_config = own
    return out[0, len(row) :].tolist()


def test_greedy_equals_plain_generate(policy, prompts):
    config = GenerationConfig(
        max_new_tokens=12, do_sample=False, eos_token_id=[EOS], pad_token_id=PAD, suppress_tokens=[IMAGE, VIDEO]
    )
    engine = PolicyEngine(policy, PROCESSOR)
    completions = engine.generate(prompts, sampling=GREEDY, keys=(0, 0))
    for row, (completion,) in zip(prompts, completions, strict=True):
        assert completion.ids == plain_generate(policy, row, config)
        assert completion.finished == (completion.ids[-1] == EOS)
        assert completion.finished or len(completion.ids) == 12
        assert completion.text == " ".join(f"w{i}" for i in completion.ids if i > END)


@pytest.mark.parametrize("penalty", [1.7, 0.6])
def test_a_repetition_penalty_is_that_of_plain_generate(policy, prompts, penalty):
    config = GenerationConfig(
        max_new_tokens=12, do_sample=False, eos_token_id=[EOS], pad_token_id=PAD, suppress_tokens=[IMAGE, VIDEO],
        repetition_penalty=penalty,
    )  # fmt: skip
    sampling = Sampling(max_new_tokens=12, repetition_penalty=penalty)
    engine = PolicyEngine(policy, PROCESSOR)
    for p, row in enumerate(prompts):  # alone, for padding counts as seen, in plain generate as here
        ((completion,),) = engine.generate(prompts[p : p + 1], sampling=sampling, keys=(0, 0))
        assert completion.ids == plain_generate(policy, row, config)


def test_a_stop_text_ends_a_completion_and_stays(policy, prompts):
    """The same completions as without it, cut behind the first token that completes it."""
    whole = PolicyEngine(policy, PROCESSOR).generate(prompts, n=3, sampling=SAMPLED, keys=(5, 7))
    words = [completion.text.split() for group in whole for completion in group]
    stop = max(sorted({w for row in words for w in row[1:]}), key=lambda w: sum(w in row for row in words))
    sampling = replace(SAMPLED, stop=["never this", f" {stop}"])
    cut = PolicyEngine(policy, PROCESSOR, batch_size=5).generate(prompts, n=3, sampling=sampling, keys=(5, 7))
    flat = [[completion for group in groups for completion in group] for groups in (whole, cut)]
    stopped = 0
    for before, after in zip(*flat, strict=True):
        written = [PROCESSOR.tokenizer.decode(before.ids[:n], True) for n in range(1, len(before.ids) + 1)]
        first = next((n for n, text in enumerate(written, 1) if f" {stop}" in text), None)
        stopped += first is not None
        assert after.ids == before.ids[:first]
        assert after.finished == (before.finished or first is not None)
        assert after.logprobs == pytest.approx(before.logprobs[:first], abs=1e-6)
        assert after.text == written[len(after.ids) - 1]
    assert 0 < stopped < len(flat[0])


def test_prompts_run_once_and_what_has_ended_leaves_the_batch(policy, prompts, monkeypatch):
    """Rows of each forward: the prompts first, then never more than what is still being written and an eighth."""
    shapes = []
    forward = policy.model.model.forward

    @wraps(forward)
    def counted(*args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(policy.model.model, "forward", counted)
    (*groups,) = PolicyEngine(policy, PROCESSOR).generate(prompts, n=6, sampling=SAMPLED, keys=(1, 1))
    lengths = [len(completion.ids) for group in groups for completion in group]
    assert shapes[0] == (4, max(map(len, prompts))) and all(width == 1 for _, width in shapes[1:])
    assert min(lengths) < max(lengths)
    for step, (rows, _) in enumerate(shapes[1:], 1):
        alive = sum(length > step for length in lengths)
        assert alive <= rows <= alive * 8 / 7 + 1


def test_draws_do_not_depend_on_the_batch(policy, prompts):
    """Batch size, order, neighbours and global random state leave a completion as it is; seed, step, draw do not."""
    reference = PolicyEngine(policy, PROCESSOR).generate(prompts, n=3, sampling=SAMPLED, keys=(5, 7))
    assert len({tuple(c.ids) for c in reference[2]}) > 1
    torch.manual_seed(123)
    for batch_size in (1, 2, 5):
        other = PolicyEngine(policy, PROCESSOR, batch_size=batch_size).generate(
            prompts[::-1], n=3, sampling=SAMPLED, keys=(5, 7)
        )
        assert [[c.ids for c in group] for group in other[::-1]] == [[c.ids for c in group] for group in reference]
    alone = PolicyEngine(policy, PROCESSOR).generate(prompts[2:3], n=2, sampling=SAMPLED, keys=(5, 7))
    assert [c.ids for c in alone[0]] == [c.ids for c in reference[2][:2]]
    for keys in ((5, 8), (6, 7)):
        changed = PolicyEngine(policy, PROCESSOR).generate(prompts, n=3, sampling=SAMPLED, keys=keys)
        assert [[c.ids for c in group] for group in changed] != [[c.ids for c in group] for group in reference]


def test_generation_leaves_the_global_random_state_alone(policy, prompts):
    before = torch.get_rng_state()
    PolicyEngine(policy, PROCESSOR).generate(prompts, n=2, sampling=SAMPLED, keys=(0, 0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_logprobs_equal_a_teacher_forced_forward(policy, prompts, sampling):
    engine = PolicyEngine(policy, PROCESSOR, batch_size=3)
    groups = engine.generate(prompts, n=2, sampling=sampling, keys=(1, 2))
    for row, group in zip(prompts, groups, strict=True):
        for completion in group:
            batch = collate([completion_row(row, completion)], policy.family, PAD)
            with torch.no_grad():
                logits = policy.hidden_states(batch) @ policy.head_weight().T / (sampling.temperature or 1.0)
            labels = batch.labels
            assert labels.tolist() == completion.ids
            expected = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, atol=2e-5, rtol=0)
            entropies = torch.distributions.Categorical(logits=logits).entropy()
            torch.testing.assert_close(torch.tensor(completion.entropies).double(), entropies, atol=2e-5, rtol=0)
            banned = logits.index_fill(1, torch.tensor([IMAGE, VIDEO]), -torch.inf).log_softmax(-1)
            expected = banned.gather(1, labels[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.sampling_logprobs).double(), expected, atol=2e-5, rtol=0)


def test_banned_ids_never_come_out(policy, prompts, monkeypatch):
    """Even with by far the largest logit, greedy and sampled."""

    def pushed(logits, *args):
        return draw_tokens(logits.index_fill(-1, torch.tensor([IMAGE, VIDEO]), 1e4), *args)

    monkeypatch.setattr(decode, "draw_tokens", pushed)
    for sampling in (GREEDY, SAMPLED, Sampling(max_new_tokens=12, temperature=1.0, top_k=1)):
        for group in PolicyEngine(policy, PROCESSOR).generate(prompts, n=2, sampling=sampling, keys=(0, 0)):
            for completion in group:
                assert not {IMAGE, VIDEO} & set(completion.ids)
                assert (
                    max(completion.logprobs) < -1000
                )  # what the full softmax thinks of a token that is not the banned one


def test_modes_and_settings_are_put_back(policy, prompts):
    policy.train()
    policy.model.lm_head.eval()
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    modes = {name: module.training for name, module in policy.named_modules()}
    checkpointed = PolicyEngine(policy, PROCESSOR).generate(prompts, sampling=GREEDY, keys=(0, 0))
    assert modes == {name: module.training for name, module in policy.named_modules()}
    assert policy.model.is_gradient_checkpointing
    policy.model.gradient_checkpointing_disable()
    policy.eval()
    assert checkpointed == PolicyEngine(policy, PROCESSOR).generate(prompts, sampling=GREEDY, keys=(0, 0))


def test_context_surrounds_the_generation(policy, prompts):
    events = []

    class Gathered:
        def __init__(self, given):
            assert given is policy

        def __enter__(self):
            events.append("enter")

        def __exit__(self, *_):
            events.append("exit")

    PolicyEngine(policy, PROCESSOR, batch_size=1, context=Gathered).generate(prompts, sampling=GREEDY, keys=(0, 0))
    assert events == ["enter", "exit"]


def test_no_prompts_and_bad_arguments(policy, prompts):
    engine = PolicyEngine(policy, PROCESSOR)
    assert engine.generate([], sampling=GREEDY, keys=(0, 0)) == []
    with pytest.raises(ValueError, match="at least 1"):
        engine.generate(prompts, n=0, sampling=GREEDY, keys=(0, 0))
    with pytest.raises(ValueError, match="batch_size"):
        PolicyEngine(policy, PROCESSOR, batch_size=0)


def families_own_generate(policy: Policy, processor, row: Row) -> list[int]:
    """Hugging Face's generate on one unpadded row, with the family's own handling of images and positions."""
    kwargs = {"input_ids": row.input_ids[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
    if row.images:
        kwargs |= policy.family.merge(row.images)
        if policy.family.patch_rows:
            kwargs["mm_token_type_ids"] = (kwargs["input_ids"] == processor.image_token_id).int()
    config = GenerationConfig(
        max_new_tokens=GREEDY.max_new_tokens, do_sample=False, eos_token_id=sorted(processor.eos_ids),
        pad_token_id=processor.pad_id, suppress_tokens=sorted(processor.banned_ids),
    )  # fmt: skip
    policy.model.generation_config = GenerationConfig()
    with torch.no_grad():
        return policy.eval().model.generate(**kwargs, generation_config=config)[0, len(row) :].tolist()


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_every_family_with_its_own_processor(name, tmp_path):
    """One image, none, and two (one of them shared): greedy answers are plain generate's, the batch draws what each row
    draws alone, and the trainer's log-probs of the completion, right-padded, are the engine's."""
    make_tiny(name, tmp_path / name, initializer_range=0.3)
    backbone = Backbone(path=str(tmp_path / name), dtype="float64")
    processor, model = load_processor(backbone), load_model(backbone)
    policy, encoder = Policy(model, family_of(model)), Encoder(processor)
    noise = torch.randint(0, 256, (2, 40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    a, b = (Image.fromarray(pixels.numpy()) for pixels in noise)
    rows = [
        encoder.encode_prompt(Sample(id, [message("user", *parts)], images))
        for id, parts, images in (
            ("one", [image(), text("what is it?")], [a]),
            ("none", [text("hello there")], []),
            ("two", [text("x"), image(), text("and"), image(), text("compare")], [b, a]),
        )
    ]
    greedy = PolicyEngine(policy, processor).generate(rows, sampling=GREEDY, keys=(0, 0))
    for row, (completion,) in zip(rows, greedy, strict=True):
        assert completion.ids == families_own_generate(policy, processor, row)
    together = PolicyEngine(policy, processor).generate(rows, n=2, sampling=SAMPLED, keys=(0, 0))
    apart = PolicyEngine(policy, processor, batch_size=1).generate(rows, n=2, sampling=SAMPLED, keys=(0, 0))
    assert [[c.ids for c in group] for group in together] == [[c.ids for c in group] for group in apart]
    pairs = [(row, completion) for row, group in zip(rows, together, strict=True) for completion in group]
    batch = collate([completion_row(*pair) for pair in pairs], policy.family, processor.pad_id)
    with torch.no_grad():
        logits = policy.hidden_states(batch) @ policy.head_weight().T / SAMPLED.temperature
    expected = logits.log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]
    got = torch.tensor([logprob for _, completion in pairs for logprob in completion.logprobs])
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=0)


# --- the draw itself -------------------------------------------------------------------------------------------------


def test_uniform_numbers_are_uniform_and_stateless():
    """F(x) = x over draws and over positions; neighbours are uncorrelated; a row is the same alone."""
    keys = torch.tensor([draw_key(0, 0, "row", d) for d in range(20_000)])
    numbers = torch.stack([keyed_uniform(keys, t) for t in range(4)])
    assert numbers.min() >= 0 and numbers.max() < 1
    for row in numbers:
        assert kstest(row.numpy(), "uniform").pvalue > 1e-3
    along = torch.stack([keyed_uniform(keys[:3], t) for t in range(20_000)], 1)
    for row in along:
        assert kstest(row.numpy(), "uniform").pvalue > 1e-3
    for table in (numbers, along):
        correlation = torch.corrcoef(table) - torch.eye(len(table), dtype=torch.double)
        assert correlation.abs().max() < 5 / 20_000**0.5
    assert keyed_uniform(keys[2:3], 1) == numbers[1, 2]


def test_splitmix_known_answers():
    """The published first outputs from state 0: e220a8397b1dcdaf, 6e789e6aa1b965f4, 06c45d188009454f."""
    from lightning_vlm.rollouts.sampling import _GOLDEN, _splitmix

    states = torch.arange(1, 4) * _GOLDEN
    outputs = [value % 2**64 for value in _splitmix(states).tolist()]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=1.0, top_k=3),
        Sampling(temperature=1.0, top_p=0.7),
        Sampling(temperature=2.0, min_p=0.4),
    ],
    ids=str,
)
def test_frequencies_follow_the_exact_distribution(sampling):
    """χ² of 20,000 keyed draws against p = (.5, .25, .15, .1), tempered and cut by hand, and a banned fifth token."""
    p = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.double)
    tempered = p ** (1 / sampling.temperature)
    keep = torch.ones(4, dtype=torch.bool)
    if sampling.top_k:
        keep = torch.tensor([True, True, True, False])
    if sampling.top_p < 1:
        keep = torch.tensor([True, True, False, False])  # .5 < .7 ≤ .75
    if sampling.min_p:
        keep = tempered >= sampling.min_p * tempered.max()
        assert 1 < keep.sum() < 5
    exact = torch.where(keep, tempered, 0.0)
    exact = exact / exact.sum()

    n = 20_000
    keys = torch.tensor([draw_key(3, 1, "x", d) for d in range(n)])
    logits = torch.cat([p.log(), torch.tensor([9.0])]).float().expand(n, 5)
    out = draw_tokens(logits.clone(), sampling, keyed_uniform(keys, 0), torch.tensor([4]))
    drawn = out.tokens
    counts = torch.bincount(drawn, minlength=5).double()
    assert counts[4] == 0 and counts[:4][~keep].sum() == 0
    assert chisquare(counts[:4][keep], exact[keep] * n).pvalue > 1e-3
    torch.testing.assert_close(out.sampling_logprobs, exact[drawn].log(), atol=1e-5, rtol=0)
    full = (logits[0].double() / sampling.temperature).log_softmax(-1)
    torch.testing.assert_close(out.logprobs, full[drawn], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.entropies, -(full.exp() * full).sum().expand(n), atol=1e-5, rtol=0)


def test_frequencies_over_a_vocabulary_of_many_blocks():
    """χ² of 60,000 draws over 300 tokens, some of mass 0, among them whole blocks and both ends."""
    torch.manual_seed(0)
    p = torch.rand(300, dtype=torch.double)
    p[:3] = p[128:256] = p[-2:] = 0
    p /= p.sum()
    n = 60_000
    keys = torch.tensor([draw_key(1, 2, "y", d) for d in range(n)])
    logits = p.log().float().expand(n, 300)
    drawn = torch.cat(
        [
            draw_tokens(
                part, Sampling(temperature=1.0), keyed_uniform(own, 5), torch.tensor([], dtype=torch.long)
            ).tokens
            for part, own in zip(logits.contiguous().split(5000), keys.split(5000), strict=True)
        ]
    )
    counts = torch.bincount(drawn, minlength=300).double()
    assert counts[p == 0].sum() == 0
    assert chisquare(counts[p > 0], p[p > 0] * n).pvalue > 1e-3


def test_a_million_draws_never_give_a_banned_placeholder():
    """Its logit is the largest, by little and by far; the edges of the uniform numbers are among the draws."""
    torch.manual_seed(0)
    banned = torch.tensor([151, 299])
    for lead in (1.0, 1e3):
        logits = torch.randn(1000, 300)
        logits[:, banned] = logits.max() + lead
        for step in range(500):
            uniform = keyed_uniform(torch.arange(1000), step)
            uniform[:2] = torch.tensor([0.0, 1 - 2.0**-53])
            out = draw_tokens(logits.clone(), Sampling(temperature=1.0), uniform, banned)
            assert not torch.isin(out.tokens, banned).any()
            assert out.sampling_logprobs.isfinite().all() and out.entropies.isfinite().all()


def test_entropies_and_the_mass_that_is_kept():
    """p = (.4, .3, .2, .1) with the last banned: entropy of the whole, log-probs of the whole and of what is left."""
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    out = draw_tokens(p.log(), Sampling(temperature=1.0), torch.tensor([0.5], dtype=torch.double), torch.tensor([3]))
    # .5 · .9 = .45 lies in the second token's share, (.4, .7].
    assert out.tokens.tolist() == [1]
    expected = -sum(x * math.log(x) for x in (0.4, 0.3, 0.2, 0.1))
    assert out.entropies.item() == pytest.approx(expected, abs=1e-6)
    assert out.logprobs.item() == pytest.approx(math.log(0.3), abs=1e-6)
    assert out.sampling_logprobs.item() == pytest.approx(math.log(0.3 / 0.9), abs=1e-6)


def test_a_nucleus_wider_than_what_is_sorted_first():
    """Flat logits over 3,000 tokens: .9 of them stay."""
    kept = filter_logits(torch.linspace(0, 1e-4, 3000)[None], Sampling(temperature=1.0, top_p=0.9)).isfinite()
    assert 2690 < int(kept.sum()) < 2710 and bool(kept[0, -1]) and not bool(kept[0, 0])


def test_filters_against_a_slow_oracle():
    """Token by token in plain Python, on random logits with ties broken by the lower id."""
    torch.manual_seed(0)
    logits = torch.randn(50, 11).mul(2)
    sampling = Sampling(temperature=1.0, top_k=7, top_p=0.8, min_p=0.05)
    kept = filter_logits(logits, sampling).isfinite()
    for row, got in zip(logits.tolist(), kept.tolist(), strict=True):
        order = sorted(range(11), key=lambda v: -row[v])[:7]
        weights = {v: torch.tensor(row[v]).exp().item() for v in order}
        total, mass, alive = sum(weights.values()), 0.0, []
        for v in order:
            if mass < 0.8:
                alive.append(v)
            mass += weights[v] / total
        alive = {v for v in alive if weights[v] >= 0.05 * weights[order[0]]}
        assert {v for v in range(11) if got[v]} == alive


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.5},
        {"temperature": 1.0, "top_k": -1},
        {"temperature": 1.0, "min_p": 2.0},
        {"top_p": 0.9},
        {"top_k": 5},
        {"repetition_penalty": 0.0},
        {"stop": "text"},
        {"stop": [""]},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError):
        Sampling(**wrong)
