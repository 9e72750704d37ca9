"""Rows of one prompt in one physical row: the same hidden states and gradients as each row alone."""

from __future__ import annotations

import pytest
import torch

from lightning_vlm.models.attention import prompt_mask, use_attention
from lightning_vlm.models.batch import Row
from lightning_vlm.models.collate import collate
from lightning_vlm.models.families import family_of
from lightning_vlm.models.packing import Pack, packs
from lightning_vlm.models.policy import Policy

from .test_families import KINDS, PAD, mixed_rows, row, tiny
from .test_policy import assert_same_grads, grads, reference


def continued(prompt: Row, name: str, length: int) -> Row:
    """The prompt continued by tokens of its own, all of them scored."""
    tail = torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(sum(map(ord, name))))
    mask = torch.zeros(len(prompt) + length, dtype=torch.bool)
    mask[len(prompt) :] = True
    return Row(prompt.id, torch.cat([prompt.input_ids, tail]), mask, images=prompt.images, name=name)


def continuations(model) -> list[Row]:
    """Two or three continuations, of different length, of each prompt of the mixed batch."""
    return [
        continued(prompt, name, length)
        for prompt in mixed_rows(model)
        for name, length in (("a", 4), ("b", 1), ("c", 6))[: 3 if prompt.id == "several" else 2]
    ]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_each_row_alone(kind, backend):
    """Several images, shared images, text only, ragged lengths: hidden states and every gradient in float64."""
    model = tiny(kind)
    use_attention(model, family_of(model), backend)
    policy = Policy(model, family_of(model))
    rows = continuations(model)
    want = reference(policy, rows)
    wanted = grads(policy, want)
    packed = packs(rows)
    assert [len(pack.rows) for pack in packed] == [2, 3, 2, 2]
    batch = collate(packed, policy.family, PAD)
    assert len(batch.input_ids) == 4 and len(batch.rows) == 9 and batch.row_index.max() == 8
    got = policy.hidden_states(batch)
    if backend == "eager":  # whose softmax is float32 whatever the dtype
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        return
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    assert_same_grads(grads(policy, got), wanted)
    assert torch.equal(batch.labels, torch.cat([r.input_ids[r.loss_mask] for r in rows]))


def test_the_images_of_a_prompt_are_encoded_once():
    model = tiny("qwen2_5_vl")
    policy = Policy(model, family_of(model))
    batch = collate(packs(continuations(model)), policy.family, PAD)
    assert batch.image_index.tolist() == [0, 1, 0, 2, 0, 0] and len(batch.image_tokens) == 3


def test_layout_by_hand():
    """Prompt of 2, continuations of 2 and 1: [p0 p1 a0 a1 b0]; b0 is predicted by p1 and stands where a0 does."""
    prompt = Row("x", torch.tensor([7, 8]), torch.zeros(2, dtype=torch.bool))
    (pack,) = packs([continued(prompt, "a", 2), continued(prompt, "b", 1)])
    assert (pack.prefix, len(pack), pack.starts()) == (2, 5, [2, 4])
    assert pack.segments().tolist() == [0, 0, 1, 1, 2] and pack.shifts().tolist() == [0, 0, 0, 0, 2]
    places, labels = pack.scored()
    assert [p.tolist() for p in places] == [[1, 2], [1]]
    assert [i.tolist() for i in labels] == [r.input_ids[2:].tolist() for r in pack.rows]


def test_mask_by_hand():
    """A continuation sees the prompt and itself; padding is seen by nobody."""
    mask = prompt_mask(torch.tensor([[0, 0, 1, 2, 2, -1]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 0],
    ]


def test_what_is_not_one_prompt_stays_apart():
    model = tiny("llava")
    one, several, _, twice = mixed_rows(model)
    rows = [continued(one, "a", 2), continued(one, "b", 2), continued(twice, "a", 2), continued(several, "a", 1)]
    assert [len(pack.rows) for pack in packs(rows)] == [2, 1, 1]
    other = continued(one, "c", 2)
    other.images = several.images[:1]  # the same words about another picture
    assert [len(pack.rows) for pack in packs([rows[0], other])] == [1, 1]
    unscored = row("one", 5, scored=3)
    unscored.loss_mask[:] = False
    assert [pack.prefix for pack in packs([unscored, unscored])] == [5, 5]
    assert isinstance(packs([unscored])[0], Pack)
