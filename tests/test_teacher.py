"""The teacher against its own forward, row by row; whose tokenizers it accepts; rows of its own; sharded over ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from lightning_vlm.algorithms import SFT
from lightning_vlm.algorithms.teacher import TEACHER_ROW, Teacher, check_same_tokens, teacher_rows
from lightning_vlm.data.encode import Encoder
from lightning_vlm.data.world import WorldSource
from lightning_vlm.losses.distillation import distill
from lightning_vlm.models.adapters import save_adapter, trained_tensors
from lightning_vlm.models.batch import Row
from lightning_vlm.models.collate import collate
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import load_model
from lightning_vlm.models.packing import laid_out
from lightning_vlm.models.parts import PartPolicy, apply_parts
from lightning_vlm.models.policy import Policy
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone
from lightning_vlm.models.tiny import make_tiny
from lightning_vlm.rollouts import Completion, completion_row
from lightning_vlm.strategies.fsdp import shard_policy

from .conftest import free_port
from .test_sft_c import full_logprobs

STUDENT, LARGER, OTHER = "embedded:qwen2_5_vl-tiny", "embedded:qwen2_5_vl-small", "embedded:llava-tiny"


def student(path: str = STUDENT, mesh=None, mixed_precision: str = "none", **settings) -> SFT:
    """An algorithm around a float64 student, as far as a teacher looks at it."""
    module = SFT(backbone=Backbone(path=str(path), **({"dtype": "float64"} | settings)))
    module.processor = load_processor(module.backbone)
    module.low_precision = nullcontext
    if mesh is not None:
        module.shard = lambda policy: shard_policy(policy, mesh, mixed_precision)
    return module


def alone(path: str, **settings) -> Policy:
    """The teacher's model by itself."""
    model = load_model(Backbone(path=str(path), **({"dtype": "float64"} | settings))).eval()
    return Policy(model, family_of(model))


def samples(size: int = 5):
    """Questions and captions of the world, two about each picture."""
    source = WorldSource(size=size, pairs=True, questions_per_image=2)
    return [source[i] for i in range(size)]


def rows_of(module: SFT, size: int = 5) -> list[Row]:
    """Chosen and rejected answers: two completions of each prompt."""
    encoder = Encoder(module.processor)
    return [row for sample in samples(size) for row in encoder.encode_pair(sample)]


def annotate(teacher: Teacher, rows: list[Row], shown: list) -> None:
    """Every row gets the teacher's row, its sample's prompt encoded by the teacher's processor."""
    if teacher.shares_inputs:
        return
    prompts = {sample.id: Encoder(teacher.processor).encode_prompt(sample) for sample in shown}
    for row in rows:
        teacher.annotate([row], prompts[row.id])


def batch_of(module: SFT, rows: list[Row], *, share: bool = True):
    family = family_of(load_model(module.backbone))
    return collate(laid_out(rows, share), family, module.processor.pad_id)


def logprobs_of(head, temperature: float = 1.0):
    return (head.hidden @ head.weight.T / temperature).log_softmax(-1)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("path", [LARGER, OTHER])
def test_its_distributions_are_those_of_its_own_forward(path, share):
    """Of one row at a time; of another architecture behind its own encoding of the same prompts."""
    module = student()
    teacher = Teacher(module, path)
    assert teacher.shares_inputs == (path == LARGER)
    teacher.start()
    rows = rows_of(module)
    annotate(teacher, rows, samples())
    batch = batch_of(module, rows, share=share)
    head = teacher.head_input(batch)
    policy, own_rows = alone(path), [row.info.get(TEACHER_ROW, row) for row in rows]
    with torch.no_grad():
        if path == LARGER:
            found = [full_logprobs(policy, row) for row in own_rows]
        else:  # one text and one picture at a time
            found = []
            for row in own_rows:
                single = collate([row], policy.family, 0)
                hidden, weight = policy(single, raw=True)
                found.append(((hidden @ weight.T).log_softmax(-1), single.labels))
    want, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    assert torch.equal(batch.labels, labels)
    torch.testing.assert_close(logprobs_of(head), want, rtol=0, atol=1e-9)
    picked = want.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(teacher.score(batch).logprobs, picked, rtol=0, atol=1e-9)
    ids, logprobs = teacher.top_logprobs(batch, 3, temperature=0.7)
    top = (want / 0.7).log_softmax(-1).topk(3)
    assert torch.equal(ids, top.indices)
    torch.testing.assert_close(logprobs, top.values, rtol=0, atol=1e-9)


def test_rows_of_its_own_are_what_its_encoder_makes_of_the_same_answers():
    """Ids, pictures and scored places: the world's tokenizer is one, the placeholders and their number are not."""
    module = student()
    teacher = Teacher(module, OTHER)
    rows = rows_of(module)
    annotate(teacher, rows, samples())
    for row, want in zip(rows, rows_of(student(OTHER)), strict=True):
        got = row.info[TEACHER_ROW]
        assert torch.equal(got.input_ids, want.input_ids) and torch.equal(got.loss_mask, want.loss_mask)
        assert [i.key for i in got.images] == [i.key for i in want.images] and (got.id, got.name) == (want.id, row.name)
        assert not torch.equal(got.input_ids, row.input_ids)


def test_sampled_completions_are_put_behind_its_prompt():
    module = student()
    teacher = Teacher(module, OTHER)
    (sample,) = samples(1)
    prompt = Encoder(module.processor).encode_prompt(sample)
    row = completion_row(prompt, Completion([40, 41, 42], "", False, [0.0] * 3, [0.0] * 3))
    annotate(teacher, [row], [sample])
    own = Encoder(teacher.processor).encode_prompt(sample)
    assert row.info[TEACHER_ROW].input_ids.tolist() == [*own.input_ids.tolist(), 40, 41, 42]
    assert row.info[TEACHER_ROW].scored == row.scored == 3


def test_a_student_of_the_same_weights_has_nothing_to_learn():
    """To the bit, through two models in memory."""
    module = student(dtype="float32")
    teacher, policy = Teacher(module, STUDENT), alone(STUDENT, dtype="float32")
    batch = batch_of(module, rows_of(module))
    hidden, weight = policy(batch, raw=True)
    got = distill(hidden, weight, *teacher.head_input(batch))
    assert not got.values.any()
    got.total.backward()
    assert not any(p.grad.any() for p in policy.parameters() if p.grad is not None)


def test_it_is_frozen_and_no_part_of_the_module():
    module = student()
    teacher = Teacher(module, LARGER, dtype="bfloat16")
    module.teacher = teacher
    policy = teacher.frozen["teacher"]
    module.train()
    assert not any(part.training for part in policy.modules())
    assert not any(p.requires_grad for p in policy.parameters()) and not list(module.parameters())
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16} and not module.state_dict()
    head = teacher.head_input(batch_of(module, rows_of(module)))
    assert not head.hidden.requires_grad and not head.weight.requires_grad


def test_it_starts_from_an_adapter_with_the_settings_in_the_file(tmp_path):
    parts = {"vision": PartPolicy(freeze=True), "language": PartPolicy(lora_rank=2, lora_alpha=3.0)}
    parts["projector"] = PartPolicy(freeze=True)
    trained = alone(STUDENT)
    apply_parts(trained.model, trained.family, parts)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    save_adapter(tmp_path / "adapter.safetensors", trained, trained_tensors(trained), parts)
    module = student()
    batch = batch_of(module, rows_of(module))
    with torch.no_grad():
        want = trained.eval()(batch, raw=True)
    got = Teacher(module, STUDENT, adapter=str(tmp_path)).head_input(batch)
    torch.testing.assert_close(got.hidden, want.hidden, rtol=0, atol=1e-12)
    plain = Teacher(module, STUDENT).head_input(batch)
    assert (got.hidden - plain.hidden).abs().max() > 1e-3
    with pytest.raises(ValueError, match="adapter 'nowhere': no such file"):
        Teacher(module, STUDENT, adapter="nowhere")


# --- tokenizers and processors ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Model directories: a student; the same with a wider padded head, another template, other pixels, other tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    for name, size in (("plain", 420), ("padded", 440), ("template", 420), ("pixels", 420), ("added", 440)):
        make_tiny("qwen2_5_vl", folder / name, vocab_size=size, seed=size)
    make_tiny("qwen2_5_vl", folder / "moved", vocab_size=440)
    template = folder / "template" / "chat_template.jinja"
    template.write_text(template.read_text().replace("You are", "You were"))
    settings = folder / "pixels" / "preprocessor_config.json"
    values = json.loads(settings.read_text())
    values["image_mean"] = [0.1, 0.2, 0.3]
    settings.write_text(json.dumps(values))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "added")
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    tokenizer.save_pretrained(folder / "added")
    file = folder / "moved" / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    one, two = [token for token in vocabulary if len(token) > 3][:2]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(values))
    return folder


def test_padded_heads_are_no_other_tokenizer(tiny):
    """As Qwen2.5-VL 3B and 7B: the same tokens, heads of 420 and 440 rows."""
    module = student(tiny / "plain")
    teacher = Teacher(module, str(tiny / "padded"))
    assert teacher.shares_inputs
    row = Encoder(module.processor).encode(samples(1)[0])
    batch = batch_of(module, [row])
    head = teacher.head_input(batch)
    assert head.weight.shape[0] == 440
    hidden, weight = alone(tiny / "plain")(batch, raw=True)
    got = distill(hidden, weight, *head)
    shared = (head.hidden @ head.weight[:420].T).log_softmax(-1)
    mine = (hidden @ weight.T).log_softmax(-1)
    torch.testing.assert_close(got.values, (mine.exp() * (mine - shared)).sum(-1).detach(), rtol=0, atol=1e-10)


def test_tokens_that_only_one_side_added_are_let_pass(tiny):
    for one, other in (("plain", "added"), ("added", "plain")):
        sides = [load_processor(Backbone(path=str(tiny / name))) for name in (one, other)]
        check_same_tokens("x", *sides)


@pytest.mark.parametrize("name", ["moved", "embedded"])
def test_another_tokenizer_is_refused(tiny, name):
    path = STUDENT if name == "embedded" else str(tiny / name)
    with pytest.raises(ValueError, match=r"has another tokenizer than backbone\.path .* first difference") as refused:
        Teacher(student(tiny / "plain"), path)
    assert "\n" not in str(refused.value)


def test_an_added_token_at_an_id_that_is_taken_is_refused(tiny):
    """`<think>` and `<note>` at one id: the distributions would be over different tokens."""
    sides = [load_processor(Backbone(path=str(tiny / "plain"))) for _ in range(2)]
    for side, token in zip(sides, ("<think>", "<note>"), strict=True):
        side.tokenizer.add_tokens([token], special_tokens=True)
    with pytest.raises(ValueError, match="first difference '<note>', id none and 4"):
        check_same_tokens("x", *sides)


def test_what_differs_before_the_model_needs_rows_of_its_own(tiny):
    """A template may be overruled by the student's, pixels may not."""
    module = student(tiny / "plain")
    assert Teacher(module, str(tiny / "plain")).shares_inputs
    assert not Teacher(module, str(tiny / "plain"), shares_inputs=False).shares_inputs
    assert not Teacher(module, str(tiny / "template")).shares_inputs
    assert Teacher(module, str(tiny / "template"), shares_inputs=True).shares_inputs
    assert not Teacher(module, str(tiny / "pixels")).shares_inputs
    with pytest.raises(ValueError, match="processes images differently"):
        Teacher(module, str(tiny / "pixels"), shares_inputs=True)


def test_the_students_pixel_bounds_and_template_hold_for_a_teacher_of_its_kind(tiny):
    template = str(tiny / "template" / "chat_template.jinja")
    module = student(tiny / "plain", max_pixels=28 * 28, chat_template=template)
    teacher = Teacher(module, str(tiny / "plain"))
    assert teacher.shares_inputs and "You were" in teacher.processor.chat_template
    wide = student(tiny / "plain")
    assert not teacher.sees_the_same(wide.processor)


def test_a_teacher_that_ends_its_turns_otherwise_is_refused(tiny):
    template = tiny / "ends.jinja"
    template.write_text((tiny / "plain" / "chat_template.jinja").read_text().replace("<|im_end|>", "<|endoftext|>"))
    module = student(tiny / "plain", chat_template=str(template))
    module.backbone = Backbone(path=str(tiny / "plain"), dtype="float64")  # the teacher keeps its own template
    with pytest.raises(ValueError, match=r"ends its turns by '<\|im_end\|>', the student by '<\|endoftext\|>'"):
        Teacher(module, str(tiny / "padded"))


# --- rows that do not fit ---------------------------------------------------------------------------------------------


def made(ids, scored, id="a") -> Row:
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[list(scored)] = True
    return Row(id, torch.tensor(ids, dtype=torch.long), mask)


@pytest.mark.parametrize(
    "row, prompt, message",
    [
        (made([1, 2, 3, 4], [1, 3]), made([9], []), "scores 2 tokens that are not all at its end"),
        (made([1, 2, 3, 4], [1, 2]), made([9], []), "scores 2 tokens that are not all at its end"),
        (made([1, 2, 3, 4], [2, 3]), made([9], [], id="b"), "was given the teacher's prompt of b"),
        (made([1, 2, 3, 4], [2, 3]), made([], []), "scores 2 tokens, the teacher's row 1"),
    ],
)
def test_rows_that_cannot_be_continued_are_refused(row, prompt, message):
    with pytest.raises(ValueError, match=message):
        teacher_rows([row], [prompt])


def test_teacher_rows_by_hand():
    (got,) = teacher_rows([made([1, 2, 3, 4], [2, 3])], [made([7, 8, 9], [])])
    assert got.input_ids.tolist() == [7, 8, 9, 3, 4] and got.loss_mask.tolist() == [False] * 3 + [True] * 2


def test_rows_that_were_not_annotated_and_ids_it_does_not_know_are_refused():
    module = student()
    rows = rows_of(module, 1)
    with pytest.raises(ValueError, match=r"call Teacher\.annotate"):
        Teacher(module, OTHER).head_input(batch_of(module, rows))
    with pytest.raises(ValueError, match="prompts go row by row"):
        Teacher(module, OTHER).annotate(rows, made([1, 2], []))
    batch = batch_of(module, rows)
    batch.rows[0].input_ids[-1] = 500
    with pytest.raises(ValueError, match="has id 500, the teacher knows ids below"):
        Teacher(module, LARGER).head_input(batch)


def test_rows_that_only_keep_ranks_in_step_get_one_of_the_teachers():
    module = student()
    teacher = Teacher(module, OTHER)
    rows = [module._dummy_row(with_image=True), module._dummy_row(with_image=False)]
    own = teacher.batch(batch_of(module, rows))
    assert [len(row.images) for row in own.rows] == [1, 0] and not len(own.labels)
    assert teacher.head_input(batch_of(module, rows)).hidden.shape == (0, 32)


# --- sharded ----------------------------------------------------------------------------------------------------------


def shown(module: SFT, path: str, own: slice):
    """Divergences and their gradient in the hidden states, for two batches; the second after the first's forward."""
    teacher, policy = Teacher(module, path), alone(STUDENT, dtype=module.backbone.dtype)
    rows, found = rows_of(module, 8)[own], []
    teacher.start()
    annotate(teacher, rows, samples(8))
    for part in (rows[:2], rows[2:]):
        batch = batch_of(module, part)
        head = teacher.head_input(batch)  # read the head outside of the teacher's forward
        hidden, weight = (tensor.detach().requires_grad_() for tensor in policy(batch, raw=True))
        got = distill(hidden, weight, *head)
        got.total.backward()
        found.append((got.values, hidden.grad, weight.grad))
    return found


def on_rank(rank: int, port: int, out: str) -> None:
    """One of two processes that share a teacher."""
    torch.set_num_threads(1)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(env | {"GLOO_SOCKET_IFNAME": "lo"})
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    own = slice(8 * rank, 8 * rank + 8)
    found = {path: shown(student(mesh=mesh), path, own) for path in (LARGER, OTHER)}
    low = student(mesh=mesh, mixed_precision="bf16", dtype="float32")
    found["bf16"] = shown(low, LARGER, own)
    torch.save(found, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_teacher_sharded_over_two_processes_says_the_same(tmp_path):
    """To 1e-9 in float64, each rank on rows of its own; in bfloat16 as near as that allows."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs.scenarios"])
    port = free_port()
    ranks = [context.Process(target=on_rank, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
    assert [process.exitcode for process in ranks] == [0, 0]
    for rank in range(2):
        found, own = torch.load(tmp_path / f"{rank}.pt"), slice(8 * rank, 8 * rank + 8)
        for path, name, tolerance in ((LARGER, LARGER, 1e-9), (OTHER, OTHER, 1e-9), (LARGER, "bf16", 0.1)):
            for got, want in zip(found[name], shown(student(), path, own), strict=True):
                for x, y in zip(got, want, strict=True):
                    torch.testing.assert_close(x.to(y.dtype), y, rtol=0, atol=tolerance)
