"""Policy against each family's own forward, one unpadded row at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_vlm.models.batch import Row
from lightning_vlm.models.collate import collate
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import check_vocabulary, load_model
from lightning_vlm.models.policy import Policy
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone
from lightning_vlm.models.tiny import TINY_FAMILIES, make_tiny

from .test_families import IMAGE, KINDS, PAD, mixed_rows, picture, row, shapes, tiny


@pytest.fixture(params=KINDS)
def policy(request):
    model = tiny(request.param)
    return Policy(model, family_of(model))


def own_inputs(policy, rows):
    """What the Hugging Face forward takes for one unpadded row, every image occurrence encoded on its own."""
    (r,) = rows
    inputs = {"input_ids": r.input_ids[None], "attention_mask": torch.ones(1, len(r), dtype=torch.long)}
    if r.images:
        inputs |= policy.family.merge(r.images)
        if policy.family.patch_rows:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return inputs


def reference(policy, rows):
    """[N, D] hidden states before each scored token, row by row."""
    states = []
    for r in rows:
        if policy.family.patch_rows:
            policy.model.model.rope_deltas = None
        out = policy.model.model(**own_inputs(policy, [r]), use_cache=False).last_hidden_state[0]
        states.append(out[:-1][r.loss_mask[1:]])
    return torch.cat(states)


def grads(policy, states):
    weight = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)
    policy.zero_grad()
    (states * weight).sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in policy.named_parameters()}


def assert_same_grads(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert (left[name] is None) == (right[name] is None), name
        if left[name] is not None:
            torch.testing.assert_close(
                left[name], right[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("share", [True, False])
def test_equals_the_familys_own_forward(policy, side, share):
    """Mixed batch: one image, several, text only, one image shared by rows and within one."""
    rows = mixed_rows(policy.model)
    want = reference(policy, rows)
    wanted = grads(policy, want)
    batch = collate(rows, policy.family, PAD, side=side, share_images=share)
    got = policy.hidden_states(batch)
    assert got.shape == (12, 32)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    assert_same_grads(grads(policy, got), wanted)


def test_padding_side_and_sharing_leave_gradients_equal(policy):
    rows = mixed_rows(policy.model)
    first = grads(policy, policy.hidden_states(collate(rows, policy.family, PAD)))
    for side, share in (("left", True), ("right", False)):
        batch = collate(rows, policy.family, PAD, side=side, share_images=share)
        assert_same_grads(first, grads(policy, policy.hidden_states(batch)))


def test_labels_are_the_scored_ids_in_row_order(policy):
    rows = mixed_rows(policy.model)
    want = torch.cat([r.input_ids[r.loss_mask] for r in rows])
    for side in ("right", "left"):
        assert torch.equal(collate(rows, policy.family, PAD, side=side).labels, want)


def test_float32_agrees(policy):
    """1e-5 in the dtype most runs use."""
    policy.float()
    rows = mixed_rows(policy.model)
    got = policy.hidden_states(collate(rows, policy.family, PAD, side="left"))
    torch.testing.assert_close(got, reference(policy, rows), rtol=1e-5, atol=1e-5)


def test_text_alone_never_runs_the_vision_tower(policy):
    rows = [row("long", 9), row("t", 4)]
    for path in policy.family.vision:
        policy.model.get_submodule(path).register_forward_pre_hook(lambda *_: pytest.fail("vision tower was called"))
    want = reference(policy, rows)
    for side in ("right", "left"):
        got = policy.hidden_states(collate(rows, policy.family, PAD, side=side))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_text_after_images_is_not_shifted_by_them(policy):
    """The Qwen line keeps position offsets of its last batch; text must not inherit them."""
    text = collate([row("t", 7)], policy.family, PAD)
    fresh = policy.hidden_states(text)
    policy.hidden_states(collate(mixed_rows(policy.model), policy.family, PAD))
    assert torch.equal(policy.hidden_states(text), fresh)


def test_each_distinct_image_is_encoded_once(policy, monkeypatch):
    inner, seen = policy.model.model, []
    original = type(inner).get_image_features

    def counting(self, **kwargs):
        seen.append({name: tuple(value.shape) for name, value in kwargs.items() if isinstance(value, torch.Tensor)})
        return original(self, **kwargs)

    batch = collate(mixed_rows(policy.model), policy.family, PAD)
    monkeypatch.setattr(type(inner), "get_image_features", counting)
    policy.hidden_states(batch)
    assert seen == [{name: tuple(value.shape) for name, value in batch.pixels.items()}]
    assert "get_image_features" not in vars(inner), "the seam must be gone after the forward"


def test_pixels_matter_and_land_in_their_own_place(policy):
    """Exchanging two images changes the states, and a row that shows neither stays as it was."""
    a, b = (picture(policy.model, i) for i in range(2))
    rows = [row("x", 2, a, 4), row("y", 2, b, 4), row("text", 6)]
    swapped = [row("x", 2, b, 4), row("y", 2, a, 4), row("text", 6)]
    one, other = (policy.hidden_states(collate(r, policy.family, PAD)) for r in (rows, swapped))
    assert (one - other).abs()[:6].amax(1).min() > 1e-3
    torch.testing.assert_close(one[6:], other[6:], rtol=1e-9, atol=1e-11)


def test_backward_reaches_every_part(policy):
    batch = collate(mixed_rows(policy.model), policy.family, PAD)
    policy.head(policy.hidden_states(batch)).logsumexp(-1).sum().backward()
    off = set(policy.family.off_graph(policy.model))
    for name, param in policy.model.named_parameters():
        assert (param.grad is None) == (name in off), name
        assert name in off or param.grad.abs().max() > 0, name


def test_head_weight_is_the_heads(policy):
    states = policy.hidden_states(collate(mixed_rows(policy.model), policy.family, PAD))
    torch.testing.assert_close(states @ policy.head_weight().T, policy.head(states))


def test_generate_through_the_seam_equals_generate_alone(policy):
    """Left-padded, with a shared image and a text row, each row twice, against one Hugging Face call per row."""
    policy.eval()
    rows = mixed_rows(policy.model)
    twice = [r for r in rows for _ in range(2)]
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}
    batch = collate(twice, policy.family, PAD, side="left")
    with policy.inputs(batch) as inputs:
        got = policy.model.generate(**inputs, **settings)[:, batch.input_ids.shape[1] :]
    for i, r in enumerate(twice):
        if policy.family.patch_rows:
            policy.model.model.rope_deltas = None
        want = policy.model.generate(**own_inputs(policy, [r]), **settings)[0, len(r) :]
        assert torch.equal(got[i], want), r.id


def test_generate_through_the_seam_for_text_alone(policy):
    policy.eval()
    policy.hidden_states(collate(mixed_rows(policy.model), policy.family, PAD))
    rows = [row("long", 9), row("t", 4)]
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
    batch = collate(rows, policy.family, PAD, side="left")
    with policy.inputs(batch) as inputs:
        got = policy.model.generate(**inputs, **settings)[:, 9:]
    for i, r in enumerate(rows):
        want = policy.model.generate(**own_inputs(policy, [r]), **settings)[0, len(r) :]
        assert torch.equal(got[i], want), r.id


def test_counts_that_do_not_fit_are_named(policy):
    image = picture(policy.model, 0, shapes(policy.model)[0])
    missing = row("cut", 2, image, 3)
    missing.input_ids = missing.input_ids.clone()
    missing.input_ids[2] = 5
    with pytest.raises(ValueError, match=f"row cut has {image.tokens - 1} image placeholder ids, its 1 images fill"):
        policy.hidden_states(collate([missing], policy.family, PAD))
    bare = row("bare", 4)
    bare.input_ids[1] = IMAGE
    with pytest.raises(ValueError, match="row bare has 1 image placeholder ids, its 0 images fill 0"):
        policy.hidden_states(collate([bare], policy.family, PAD))


def test_features_that_do_not_fit_are_named(policy):
    image = picture(policy.model, 0)
    image.tokens += 1
    with pytest.raises(ValueError, match="the model gave"):
        policy.hidden_states(collate([row("wide", 2, image, 3)], policy.family, PAD))


@pytest.mark.parametrize("name", [*TINY_FAMILIES, "embedded:qwen2_5_vl-tiny", "embedded:llava-tiny"])
def test_a_directory_with_its_processor_runs_from_picture_to_gradient(name, tmp_path):
    """Pictures of three shapes through the family's own image processor; the pixels cut back equal each picture's."""
    path = name if name.startswith("embedded:") else str(make_tiny(name, tmp_path))
    backbone = Backbone(path=path, dtype="float64")
    model, processor = load_model(backbone), load_processor(backbone)
    check_vocabulary(model, processor)
    policy = Policy(model, family_of(model))
    noise, rows = np.random.default_rng(0), []
    for wide, high in ((40, 60), (120, 50), (64, 64)):
        image, ids = processor.image(Image.fromarray(noise.integers(0, 255, (high, wide, 3), dtype=np.uint8)))
        ids = torch.tensor([40, 41, *ids, 42, 43, 44])
        rows.append(Row(id=str(wide), input_ids=ids, loss_mask=torch.arange(len(ids)) >= len(ids) - 2, images=[image]))
    batch = collate([*rows, rows[0]], policy.family, processor.pad_id)
    assert len(batch.image_tokens) == 3
    for cut, r in zip(policy.family.slice(batch.pixels, batch.image_tokens), rows, strict=True):
        assert all(torch.equal(cut[key], tensor) for key, tensor in r.images[0].tensors.items())
    states = policy.hidden_states(batch)
    alone = torch.cat([policy.hidden_states(collate([r], policy.family, processor.pad_id, side="left")) for r in rows])
    torch.testing.assert_close(states, torch.cat([alone, alone[:2]]), rtol=1e-9, atol=1e-11)
    (states @ policy.head_weight().T).logsumexp(-1).sum().backward()
    without = {name for name, param in model.named_parameters() if param.grad is None}
    assert without == set(policy.family.off_graph(model))
