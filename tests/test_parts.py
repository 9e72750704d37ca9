"""Parts: freezing, adapters, checkpointing, the table, and the guards."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

from lightning_vlm.models.collate import collate
from lightning_vlm.models.families import family_of
from lightning_vlm.models.guard import check_frozen, check_gradients, part_gradient_norms, snapshot_frozen
from lightning_vlm.models.lora import adapter_state, inject_lora, load_adapter, lora_layers, merge_lora
from lightning_vlm.models.parts import PartPolicy, apply_parts, part_of, part_parameters, part_table, render_table
from lightning_vlm.models.policy import Policy

from .test_families import KINDS, PAD, mixed_rows, tiny


@pytest.fixture(params=KINDS)
def policy(request):
    model = tiny(request.param, dtype=torch.float32)
    return Policy(model, family_of(model))


def make(kind="llava", **more):
    model = tiny(kind, dtype=torch.float32, **more)
    return Policy(model, family_of(model))


def forward(policy):
    with torch.no_grad():
        return policy.hidden_states(collate(mixed_rows(policy.model), policy.family, PAD))


def backward(policy, batch=None):
    batch = batch or collate(mixed_rows(policy.model), policy.family, PAD)
    states = policy.hidden_states(batch)
    (states @ policy.head_weight().T).logsumexp(-1).sum().backward()
    return states.detach()


def trained(policy):
    return {
        part: sum(param.requires_grad for _, param in params)
        for part, params in part_parameters(policy, policy.family).items()
    }


# --- which parameter belongs where -----------------------------------------------------------------------------------


def test_parts_partition_all_parameters_exactly(policy):
    owned = part_parameters(policy, policy.family)
    assert list(owned) == ["vision", "projector", "language", "head"]
    names = [name for params in owned.values() for name, _ in params]
    assert sorted(names) == sorted(name for name, _ in policy.model.named_parameters())
    assert [name for name, _ in owned["head"]] == ["lm_head.weight"]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava", "smolvlm"])
def test_tied_head_belongs_to_language(kind):
    policy = make(kind, tied=True)
    assert list(part_parameters(policy, policy.family)) == ["vision", "projector", "language"]
    with pytest.raises(ValueError, match=r"parts\.head cannot be set: the head is tied"):
        apply_parts(policy, policy.family, {"head": PartPolicy(lr=1e-4)})


def test_projector_inside_the_tower_is_projector():
    family = family_of(tiny("qwen3_vl"))
    assert part_of("model.visual.merger.norm.weight", family) == "projector"
    assert part_of("model.visual.deepstack_merger_list.0.norm.weight", family) == "projector"
    assert part_of("model.visual.blocks.0.norm1.weight", family) == "vision"
    with pytest.raises(ValueError, match=r"'elsewhere\.weight' belongs to no part of qwen3_vl"):
        part_of("elsewhere.weight", family)


# --- freezing --------------------------------------------------------------------------------------------------------


def test_frozen_parts_get_no_gradient_and_trainable_ones_do(policy):
    off = apply_parts(policy, policy.family, {"vision": PartPolicy(freeze=True), "head": PartPolicy(freeze=True)})
    assert off == policy.family.off_graph(policy.model)
    backward(policy)
    for part, params in part_parameters(policy, policy.family).items():
        assert all((param.grad is not None) == (part in ("projector", "language")) for _, param in params), part


def test_parameters_off_the_graph_are_frozen_and_listed():
    policy = make("llava")
    off = apply_parts(policy, policy.family)
    assert off and {name for name, p in policy.model.named_parameters() if not p.requires_grad} == set(off)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"visoin": PartPolicy()}, "unknown part 'visoin' in parts: did you mean 'vision'"),
        ({"xyz": PartPolicy()}, "unknown part 'xyz' in parts: parts are vision, projector, language, head"),
        (
            {"vision": PartPolicy(freeze=True, lr=1e-4)},
            r"parts\.vision\.lr is 0.0001 but parts\.vision\.freeze is true",
        ),
        ({"vision": PartPolicy(freeze=True, lora_rank=4)}, r"parts\.vision\.lora_rank is 4 but"),
        ({"vision": PartPolicy(freeze=True, checkpoint=True)}, r"parts\.vision\.checkpoint is True but"),
        ({"vision": PartPolicy(lora_alpha=4.0)}, r"parts\.vision\.lora_alpha has no effect without"),
        ({"vision": PartPolicy(lr=-1.0)}, r"parts\.vision\.lr is -1.0: it cannot be negative"),
        ({"vision": PartPolicy(lr=0.0)}, r"parts\.vision\.lr is 0: use parts\.vision\.freeze"),
        ({"projector": PartPolicy(checkpoint=True)}, r"parts\.projector\.checkpoint has no effect"),
        (dict.fromkeys(("vision", "projector", "language", "head"), PartPolicy(freeze=True)), "every part is frozen"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(parts, message):
    policy = make()
    with pytest.raises(ValueError, match=message):
        apply_parts(policy, policy.family, parts)


# --- LoRA ------------------------------------------------------------------------------------------------------------


def test_lora_starts_as_the_model_and_trains_adapters_only(policy):
    before = backward(policy)
    policy.zero_grad(set_to_none=True)
    parts = {"vision": PartPolicy(lora_rank=2), "projector": PartPolicy(freeze=True), "head": PartPolicy(freeze=True)}
    parts["language"] = PartPolicy(lora_rank=4, lora_alpha=4.0)
    apply_parts(policy, policy.family, parts)
    torch.testing.assert_close(backward(policy), before, rtol=1e-6, atol=1e-6)
    for name, param in policy.model.named_parameters():
        assert param.requires_grad == (".lora_" in name) == (param.grad is not None), name
    layers = lora_layers(policy.model)
    ranks = {
        part_of(f"{name}.weight", policy.family): (layer.r["default"], layer.scaling["default"])
        for name, layer in layers.items()
    }
    assert ranks == {"vision": (2, 2.0), "language": (4, 1.0)}
    # Four attention and three MLP projections in each of two decoder layers.
    assert sum(part_of(f"{name}.weight", policy.family) == "language" for name in layers) == 14


def stir(policy):
    """Gives the zero halves of the adapters values, as training would."""
    generator = torch.Generator().manual_seed(1)
    for name, param in policy.model.named_parameters():
        if "lora_B" in name:
            param.data = 0.1 * torch.randn(param.shape, generator=generator)


ALL_LORA = {part: PartPolicy(lora_rank=2) for part in ("vision", "projector", "language", "head")}


def test_merged_adapters_give_plain_names_and_equal_outputs(policy, tmp_path):
    names = list(policy.model.state_dict())
    start = forward(policy)
    apply_parts(policy, policy.family, ALL_LORA)
    stir(policy)
    states, weight = forward(policy), policy.head_weight().detach()
    assert (states - start).abs().max() > 1e-3
    merge_lora(policy.model)
    assert list(policy.model.state_dict()) == names and not lora_layers(policy.model)
    torch.testing.assert_close(forward(policy), states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(policy.model.lm_head.weight, weight)
    policy.model.save_pretrained(tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in policy.model.state_dict().items())


def test_head_weight_includes_its_adapter():
    policy = make()
    apply_parts(policy, policy.family, {"head": PartPolicy(lora_rank=2)})
    stir(policy)
    states = torch.randn(5, 32)
    torch.testing.assert_close(states @ policy.head_weight().T, policy.head(states))
    backward(policy)
    assert policy.head.lora_A["default"].weight.grad.abs().max() > 0 and policy.head.base_layer.weight.grad is None


def test_adapters_start_the_same_for_the_same_seed():
    def start(seed):
        policy = make()
        torch.manual_seed(99 + seed)
        state = torch.get_rng_state()
        apply_parts(policy, policy.family, {"language": PartPolicy(lora_rank=2)}, seed=seed)
        assert torch.equal(torch.get_rng_state(), state), "the caller's generator must not move"
        return adapter_state(policy.model)

    one, same, other = start(0), start(0), start(1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_adapters_load_back_and_refuse_another_width():
    policy, fresh = make(), make()
    for each in (policy, fresh):
        apply_parts(each, each.family, {"language": PartPolicy(lora_rank=2)})
    stir(policy)
    state = adapter_state(policy.model)
    load_adapter(fresh.model, state)
    assert torch.equal(forward(fresh), forward(policy))

    wide = make()
    apply_parts(wide, wide.family, {"language": PartPolicy(lora_rank=3)})
    with pytest.raises(ValueError, match=r"is \[2, 32\], the model's is \[3, 32\]: it was trained with another rank"):
        load_adapter(wide.model, state)
    with pytest.raises(ValueError, match="has no place in this model"):
        load_adapter(make().model, state)
    with pytest.raises(ValueError, match="the adapter lacks 1 of the model's tensors"):
        load_adapter(fresh.model, dict(list(state.items())[1:]))
    projector = {"model.multi_modal_projector.linear_1.weight": torch.zeros(48, 32)}
    with pytest.raises(ValueError, match=r"is \[48, 32\], the model's is \[32, 32\]: .* another width"):
        load_adapter(fresh.model, projector)


def test_lora_on_one_layer_by_its_exact_name():
    """`layers.1` must not match `layers.11`, nor the vision tower's layers the language model's."""
    model = make().model
    inject_lora(model, {"model.language_model.layers.1.mlp.up_proj": (2, 4.0)})
    assert list(lora_layers(model)) == ["model.language_model.layers.1.mlp.up_proj"]


# --- activation checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [("vision",), ("language",), ("vision", "language")])
def test_checkpointing_leaves_gradients_equal_to_the_bit(policy, parts):
    apply_parts(policy, policy.family)
    batch = collate(mixed_rows(policy.model), policy.family, PAD)
    want = backward(policy, batch)
    grads = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad(set_to_none=True)
    apply_parts(policy, policy.family, {part: PartPolicy(checkpoint=True) for part in parts})
    recomputed = []
    for name, block in policy.model.named_modules():
        if getattr(block, "gradient_checkpointing", False) is True and hasattr(block, "_gradient_checkpointing_func"):
            inner = next(m for m in block.modules() if isinstance(m, torch.nn.Linear))
            inner.register_forward_hook(lambda *_, name=name: recomputed.append(name))
    assert torch.equal(backward(policy, batch), want)
    for name, param in policy.named_parameters():
        assert (param.grad is None) == (name not in grads)
        assert param.grad is None or torch.equal(param.grad, grads[name]), name
    owners = {part_of(f"{name}.weight", policy.family) for name in recomputed}
    # A block behind LLaVA's feature layer runs, but no gradient asks for it again.
    unused = {name for name in recomputed if f"{name}.mlp.fc1.weight" in policy.family.off_graph(policy.model)}
    assert owners == set(parts) and all(recomputed.count(n) == 2 for n in recomputed if n not in unused)


# --- the table -------------------------------------------------------------------------------------------------------


def test_table_counts():
    """Head 64 × 32; projector two 32 × 32 layers with bias, each with an adapter of 2 · (32 + 32); language by hand."""
    policy = make()
    parts = {"vision": PartPolicy(freeze=True), "projector": PartPolicy(lora_rank=2), "head": PartPolicy(lr=3e-4)}
    apply_parts(policy, policy.family, parts)
    rows = {row.part: row for row in part_table(policy, policy.family, parts)}
    assert list(rows) == ["vision", "projector", "language", "head"]
    assert (rows["head"].parameters, rows["head"].trainable, rows["head"].policy.lr) == (2048, 2048, 3e-4)
    assert (rows["projector"].parameters, rows["projector"].trainable) == (2 * (32 * 32 + 32) + 2 * 128, 2 * 128)
    assert rows["vision"].trainable == 0 and rows["vision"].off_graph > 0 and rows["language"].off_graph == 0
    # q 32·32+32, k and v 16·32+16 each, o 32·32; MLP 3·32·48; two norms: 7,808 a layer; 64·32 embeddings, one norm.
    assert rows["language"].parameters == rows["language"].trainable == 2 * 7_808 + 2_048 + 32
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in policy.parameters())
    assert {row.dtype for row in rows.values()} == {"float32"}


def test_table_as_text():
    policy = make("qwen2_5_vl")
    parts = {"vision": PartPolicy(freeze=True)}
    apply_parts(policy, policy.family, parts)
    lines = render_table(part_table(policy, policy.family, parts)).splitlines()
    assert lines[0].split() == ["part", "parameters", "trainable", "dtype"]
    assert [line.split()[0] for line in lines[1:]] == ["vision", "projector", "language", "head", "all"]
    assert lines[4].split() == ["head", "2,048", "2,048", "float32"]
    total = sum(p.numel() for p in policy.parameters())
    assert lines[5].split()[:2] == ["all", f"{total:,}"]


# --- the guards ------------------------------------------------------------------------------------------------------


def test_frozen_weights_that_move_are_caught_to_the_bit():
    policy = make()
    apply_parts(policy, policy.family, {"vision": PartPolicy(freeze=True)})
    snapshot = snapshot_frozen(policy)
    assert all(name.startswith("model.vision_tower.") for name in snapshot)
    backward(policy)
    torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1).step()
    check_frozen(policy, snapshot, policy.family)
    weight = policy.model.model.vision_tower.embeddings.patch_embedding.weight
    value = weight.data[0, 0, 0, 0].clone()
    weight.data[0, 0, 0, 0] = torch.nextafter(value, torch.tensor(9.0))
    with pytest.raises(ValueError, match=r"1 frozen parameters moved, first .*patch_embedding.weight' of part vision"):
        check_frozen(policy, snapshot, policy.family)
    weight.data[0, 0, 0, 0] = value
    check_frozen(policy, snapshot, policy.family)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_changes_do_not_cancel_in_the_fingerprint(dtype):
    """Weight decay on a norm's ones, a swap of two values, and a shift of zeros are all seen."""
    changes = [lambda w: w.mul_(0.5), lambda w: w.copy_(w.flip(0)), lambda w: w.add_(1.0)]
    for start in (torch.ones(4096), torch.zeros(4096), torch.arange(4096.0)):
        for change in changes:
            policy = make()
            policy.model.extra = None
            param = policy.model.model.vision_tower.post_layernorm.weight
            param.data = start.to(dtype)
            param.requires_grad_(False)
            snapshot = snapshot_frozen(policy)
            before = param.data.clone()
            change(param.data)
            if torch.equal(before, param.data):
                check_frozen(policy, snapshot, policy.family)
            else:
                with pytest.raises(ValueError, match="post_layernorm"):
                    check_frozen(policy, snapshot, policy.family)


def test_gradient_norms_by_part(policy):
    apply_parts(policy, policy.family, {"language": PartPolicy(freeze=True)})
    backward(policy)
    norms = part_gradient_norms(policy, policy.family)
    assert list(norms) == ["vision", "projector", "head"]
    for part, params in part_parameters(policy, policy.family).items():
        if part in norms:
            flat = torch.cat([p.grad.flatten().double() for _, p in params if p.grad is not None])
            assert norms[part] == pytest.approx(float(flat.norm()), rel=1e-6)
    check_gradients(norms)


def test_trainable_parts_without_gradient_are_named():
    policy = make()
    apply_parts(policy, policy.family)
    batch = collate(mixed_rows(policy.model)[2:3], policy.family, PAD)
    policy.hidden_states(batch).sum().backward()
    norms = part_gradient_norms(policy, policy.family)
    with pytest.raises(
        ValueError, match=r"part vision is trainable but .* no batch had an image.*parts\.vision\.freeze"
    ):
        check_gradients(norms)
    with pytest.raises(ValueError, match="part language is trainable but its gradient norm is nan"):
        check_gradients({"language": float("nan")})
