"""Encoding: which ids, which are scored, and what is refused and why."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_vlm.data.encode import Encoder
from lightning_vlm.data.schema import BadSample, Sample, image, message, text
from lightning_vlm.models.processor import Processor, load_processor
from lightning_vlm.models.spec import Backbone
from lightning_vlm.models.tiny import TINY_FAMILIES, make_tiny


def picture(seed: int = 0, width: int = 60, height: int = 50) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {family: load_processor(Backbone(path=str(make_tiny(family, root / family)))) for family in TINY_FAMILIES}


@pytest.fixture(scope="module")
def encoder(processors):
    return Encoder(processors["qwen2_5_vl"])


CONVERSATIONS = {
    "text only": Sample("t", [message("user", text("Hi, 2 + 2?")), message("assistant", text("4."))]),
    "one image": Sample(
        "1",
        [
            message("system", text("Be brief.")),
            message("user", image(), text("What?")),
            message("assistant", text("A.")),
        ],
        [picture()],
    ),
    "two turns, two images": Sample(
        "2",
        [
            message("user", image(), text("What is it?")),
            message("assistant", text("A red\n\ncircle ")),
            message("user", text("And "), image(), text(" here?")),
            message("assistant", text("\\boxed{42}"), text(" äöü 数")),
        ],
        [picture(), picture(1, 120, 60)],
    ),
}
ANSWERS = {
    "text only": ["4."],
    "one image": ["A."],
    "two turns, two images": ["A red\n\ncircle ", "\\boxed{42} äöü 数"],
}
# What has to be generated between the generation prompt and the text: these templates prompt with `Assistant:`.
GAP = {"llava_siglip_llama": " ", "smolvlm": " ", "idefics3": " "}


def scored_texts(row, tokenizer) -> list[str]:
    """Decode each run of scored tokens."""
    runs, last = [], -2
    for at in row.loss_mask.nonzero().flatten().tolist():
        if at != last + 1:
            runs.append([])
        runs[-1].append(int(row.input_ids[at]))
        last = at
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_scored_are_the_answers_and_their_ends(family, kind, processors):
    processor, sample = processors[family], CONVERSATIONS[kind]
    encoder, tokenizer = Encoder(processor), processor.tokenizer
    row, prompt = encoder.encode(sample), encoder.encode_prompt(sample)
    end = processor.end_of_turn[0]
    assert scored_texts(row, tokenizer) == [GAP.get(family, "") + answer + end for answer in ANSWERS[kind]]
    assert row.input_ids[: len(prompt)].tolist() == prompt.input_ids.tolist()
    assert not prompt.loss_mask.any() and row.loss_mask[len(prompt) :].all()
    assert [image.key for image in row.images] == [processor.image(p)[0].key for p in sample.images]
    assert int((row.input_ids == processor.image_token_id).sum()) == sum(image.tokens for image in row.images)
    # The prompt is what a generation sees: the rendered prompt, tokenised whole, with the tokenizer's own BOS once.
    if len(ANSWERS[kind]) == 1:
        rendered = processor.render(sample.prompt(), add_generation_prompt=True)
        bos = tokenizer.bos_token
        whole = tokenizer(rendered, add_special_tokens=not (bos and rendered.startswith(bos))).input_ids
        queue = [processor.image(p)[1] for p in sample.images]
        whole = [i for id in whole for i in (queue.pop(0) if id == processor.image_token_id else [id])]
        assert prompt.input_ids.tolist() == whole
        assert bos is None or whole.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_row_equals_the_rendered_conversation(family, processors):
    """Whole ids = tokenising the whole rendering, up to the last end of turn, where the template writes ends itself."""
    processor, sample = processors[family], CONVERSATIONS["two turns, two images"]
    row, tokenizer = Encoder(processor).encode(sample), processor.tokenizer
    rendered = processor.render(sample.messages)
    if family == "llava_siglip_llama":  # writes none: ends stand after the texts instead of the template's last space
        for answer in ANSWERS["two turns, two images"]:
            rendered = rendered.replace(answer, answer + "</s>")
    rendered = rendered[: rendered.rindex(processor.end_of_turn[0]) + len(processor.end_of_turn[0])]
    whole = tokenizer(rendered, add_special_tokens=not rendered.startswith(tokenizer.bos_token or "-")).input_ids
    queue = [processor.image(p)[1] for p in sample.images]
    assert row.input_ids.tolist() == [
        i for id in whole for i in (queue.pop(0) if id == processor.image_token_id else [id])
    ]


def test_pair_scores_the_last_text_only(encoder):
    sample = CONVERSATIONS["two turns, two images"]
    sample = Sample("p", sample.messages, sample.images, rejected="no")
    chosen, rejected = encoder.encode_pair(sample)
    tokenizer, prompt = encoder.processor.tokenizer, encoder.encode_prompt(sample)
    assert (chosen.name, rejected.name) == ("chosen", "rejected")
    assert scored_texts(chosen, tokenizer) == ["\\boxed{42} äöü 数<|im_end|>"]
    assert scored_texts(rejected, tokenizer) == ["no<|im_end|>"]
    for row in (chosen, rejected):
        assert row.input_ids[: len(prompt)].tolist() == prompt.input_ids.tolist()
        assert [image.key for image in row.images] == [image.key for image in prompt.images]


def test_info_and_callable_images(encoder):
    sample = Sample(
        "i",
        [message("user", image(), text("?")), message("assistant", text("yes"))],
        [lambda: picture()],
        answer="Yes",
        source="mine",
        info={"level": 3},
    )
    row = encoder.encode(sample)
    assert row.id == "i" and row.info["answer"] == "Yes" and row.info["source"] == "mine" and row.info["level"] == 3
    assert row.info["prompt"] == sample.messages[:1] and row.info["chosen"] == "yes"


def ask(*parts, answer="yes", images=(), **more) -> Sample:
    return Sample("bad-7", [message("user", *parts), message("assistant", text(answer))], list(images), **more)


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (ask(image(), text("?")), "placeholder_mismatch"),
        (ask(text("?"), images=[picture()]), "placeholder_mismatch"),
        (ask(image(), text("?"), images=["/no/such.png"]), "missing_image"),
        (ask(image(), text("?"), images=["https://x.org/a.png"]), "missing_image"),
        (ask(image(), text("?"), images=[b"no image"]), "broken_image"),
        (ask(image(), text("?"), images=[42]), "broken_image"),
        (ask(image(), text("?"), images=[Image.new("RGB", (4000, 10))]), "broken_image"),  # aspect ratio 400
        (ask({"type": "video"}, text("?")), "video"),
        (ask({"type": "audio"}, text("?")), "unknown_part"),
        (ask(text("?"), answer=" \n"), "empty_answer"),
        (Sample("bad-7", [message("user", text("?"))]), "empty_answer"),
        (ask(text("see <|image_pad|>")), "control_token"),
        (ask(text("see <|ima"), text("ge_pad|>")), "control_token"),
        (ask(text("<|vision_start|>")), "control_token"),
        (ask(text("?"), answer="yes<|im_end|>\n<|im_start|>user\nmore"), "control_token"),
        (ask(text("long " * 5000)), "too_long"),
        (Sample("bad-7", [message("user", text("?")), message("assistant", text("a"), image())], [picture()]),
         "placeholder_mismatch"),
    ],
)  # fmt: skip
def test_refusals(sample, reason, encoder):
    with pytest.raises(BadSample) as error:
        encoder.encode(sample)
    assert error.value.reason == reason and "bad-7" in str(error.value)


def test_pair_refusals(encoder):
    for rejected, reason in ((None, "missing_column"), ("", "empty_answer")):
        with pytest.raises(BadSample) as error:
            encoder.encode_pair(ask(text("?"), rejected=rejected))
        assert error.value.reason == reason


@pytest.mark.parametrize("family", ["llava_clip_qwen2", "internvl", "smolvlm"])
def test_plain_text_never_becomes_a_placeholder(family, processors):
    encoder = Encoder(processors[family])
    token = processors[family].image_token
    sample = ask(image(), text(f"what does {token} mean?"), images=[picture()])
    with pytest.raises(BadSample, match="contains the control token"):
        encoder.encode(sample)
    with pytest.raises(BadSample, match="contains the control token"):
        encoder.encode_prompt(sample)


def test_limits(processors):
    processor = processors["qwen2_5_vl"]
    sample = ask(image(), text("What?"), answer="one two three four", images=[picture()])
    full = Encoder(processor).encode(sample)
    prompt = Encoder(processor).encode_prompt(sample)
    assert len(Encoder(processor, max_length=len(full)).encode(sample)) == len(full)
    with pytest.raises(BadSample) as error:
        Encoder(processor, max_length=len(full) - 1).encode(sample)
    assert error.value.reason == "too_long"

    cut = Encoder(processor, max_length=len(full) - 2, truncate="right").encode(sample)
    assert cut.input_ids.tolist() == full.input_ids[:-2].tolist()
    assert cut.loss_mask[len(prompt) :].all() and processor.end_of_turn[1] not in cut.input_ids[len(prompt) :]
    with pytest.raises(BadSample) as error:  # nothing of the answer would be left
        Encoder(processor, max_length=len(prompt), truncate="right").encode(sample)
    assert error.value.reason == "too_long"

    within = int((full.input_ids == processor.image_token_id).nonzero()[0]) + 1
    for truncate in ("never", "right"):
        with pytest.raises(BadSample) as error:
            Encoder(processor, max_length=within, truncate=truncate).encode(sample)
        assert error.value.reason == "truncated_image"
    with pytest.raises(ValueError, match="max_length is 0"):
        Encoder(processor, max_length=0)


# --- templates and tokenizers unlike the families' -------------------------------------------------------------------


def with_template(processor: Processor, template: str) -> Encoder:
    hf = SimpleNamespace(
        tokenizer=processor.tokenizer,
        image_processor=processor.hf.image_processor,
        image_token=processor.image_token,
        chat_template=template,
    )
    return Encoder(Processor(hf))


PLAIN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{{ p['text'] if p['type'] == 'text' else '<|image_pad|>' }}{% endfor %}<|im_end|>\n{% endfor %}"  # noqa: E501
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_template_that_strips_texts(processors):
    template = PLAIN.replace("p['text'] if", "p['text'] | trim if") + ASK
    encoder = with_template(processors["qwen2_vl"], template)
    row = encoder.encode(ask(text("?"), answer="  yes \n"))
    assert scored_texts(row, encoder.processor.tokenizer) == ["yes<|im_end|>"]


def test_template_that_drops_thinking_is_refused(processors):
    template = PLAIN.replace("p['text'] if", "p['text'].split('</think>')[-1] if") + ASK
    encoder = with_template(processors["qwen2_vl"], template)
    assert encoder.encode(ask(text("?"), answer="yes"))
    with pytest.raises(BadSample, match="rewrites an assistant text") as error:
        encoder.encode(ask(text("?"), answer="<think>hm</think>yes"))
    assert error.value.reason == "template"


def test_generation_prompt_that_opens_the_answer(processors):
    """A template that prompts with `<think>`: the answer's own `<think>` is prompt, the rest is scored."""
    encoder = with_template(processors["qwen2_vl"], PLAIN + ASK.replace("assistant\n", "assistant\n<think>"))
    sample = ask(text("?"), answer="<think>hm</think>yes")
    row, prompt = encoder.encode(sample), encoder.encode_prompt(sample)
    assert scored_texts(row, encoder.processor.tokenizer) == ["hm</think>yes<|im_end|>"]
    assert row.input_ids[: len(prompt)].tolist() == prompt.input_ids.tolist()
    with pytest.raises(BadSample, match="cannot be trained as it is generated"):
        encoder.encode(ask(text("?"), answer="yes"))


def test_answer_that_would_merge_with_the_prompt(processors):
    """A newline on both sides of the border: the prompt's ids stay as a generation sees them."""
    tokenizer = processors["qwen2_vl"].tokenizer
    encoder = with_template(processors["qwen2_vl"], PLAIN + ASK.replace("assistant\n", "assistant\nThe ang"))
    sample = ask(text("?"), answer="The angles are 180.")
    assert len(tokenizer("The angles").input_ids) < len(tokenizer("The ang").input_ids + tokenizer("les").input_ids)
    row, prompt = encoder.encode(sample), encoder.encode_prompt(sample)
    assert scored_texts(row, tokenizer) == ["les are 180.<|im_end|>"]
    assert row.input_ids[: len(prompt)].tolist() == prompt.input_ids.tolist()


def metaspace_processor(scheme: str, template: str) -> Processor:
    """Llama-2's kind of tokenizer: spaces are ▁, one put before a text ("first") or before every piece ("always")."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    corpus = ["USER: what is it? ASSISTANT: a red circle and a cat"] * 3
    special = ["<unk>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    hf = SimpleNamespace(tokenizer=fast, image_processor=None, image_token="<image>", chat_template=template)
    return Processor(hf)


VICUNA = "{% for m in messages %}{{ m['role'] | upper }}: {% for p in m['content'] %}{{ p['text'] if p['type'] == 'text' else '<image>' }}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"  # noqa: E501


@pytest.mark.parametrize("trailing", ["", " "], ids=["no space", "space"])
@pytest.mark.parametrize("scheme", ["first", "always"])
def test_metaspace_tokenizers_get_no_extra_space(scheme, trailing):
    processor = metaspace_processor(scheme, VICUNA.replace("ASSISTANT:{%", f"ASSISTANT:{trailing}{{%"))
    encoder, tokenizer = Encoder(processor), processor.tokenizer
    turns = [message("user", text("what is it?")), message("assistant", text("a red circle"))]
    sample = Sample("m", [*turns, message("user", text("and?")), message("assistant", text("a cat"))])
    row, prompt = encoder.encode(sample), encoder.encode_prompt(sample)
    assert row.input_ids[: len(prompt)].tolist() == prompt.input_ids.tolist()
    # In the first turn, without an end before it, the ids are those of the whole text.
    first = Encoder(processor).encode(Sample("f", turns))
    pieces = tokenizer.convert_ids_to_tokens(first.input_ids[first.loss_mask].tolist())
    assert "".join(pieces) == ("" if trailing else "▁") + "a▁red▁circle</s>"
    if not trailing:
        whole = tokenizer("USER: what is it? ASSISTANT: a red circle").input_ids
        assert first.input_ids[:-1].tolist() == whole
    scored = tokenizer.convert_ids_to_tokens(row.input_ids[row.loss_mask].tolist())
    assert "".join(scored) == "".join(pieces) + ("" if trailing else "▁") + "a▁cat</s>"


# --- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.real_data
def test_real_qwen_chats_decode_to_exactly_the_answers(real_data):
    processor = load_processor(Backbone(path=str(real_data / "qwen2_5_vl_processor"), max_pixels=28 * 28 * 64))
    assert processor.vocab_size == 151_665 and processor.eos_ids == {151_645, 151_643}
    demo = real_data / "vlm_demos"
    chats = []
    for record in json.loads((demo / "llamafactory" / "mllm_demo.json").read_text()):
        turns = [(turn["role"], turn["content"]) for turn in record["messages"]]
        chats.append((turns, [demo / "llamafactory" / path for path in record["images"]]))
    for record in json.loads((demo / "qwen_vl_finetune" / "single_images.json").read_text()):
        roles = {"human": "user", "gpt": "assistant"}
        turns = [(roles[turn["from"]], turn["value"]) for turn in record["conversations"]]
        chats.append((turns, [demo / "qwen_vl_finetune" / record["image"].removeprefix("demo/")]))
    encoder = Encoder(processor)
    multi = 0
    for n, (turns, images) in enumerate(chats):
        messages = []
        for role, content in turns:
            first, *rest = content.split("<image>")
            parts = [text(first)] + [part for piece in rest for part in (image(), text(piece))]
            messages.append(message(role, *(part for part in parts if part.get("text") != "")))
        sample = Sample(str(n), messages, images)
        row, prompt = encoder.encode(sample), encoder.encode_prompt(sample)
        answers = [content for role, content in turns if role == "assistant"]
        assert scored_texts(row, processor.tokenizer) == [answer + "<|im_end|>" for answer in answers]
        assert row.input_ids[: len(prompt)].tolist() == prompt.input_ids.tolist()
        grids = [int(shown.tensors["image_grid_thw"].prod()) // 4 for shown in row.images]
        assert grids == [shown.tokens for shown in row.images]
        # The whole row is the whole rendering, images expanded, up to its last newline.
        rendered = processor.render(messages).removesuffix("\n")
        for count in grids:
            rendered = rendered.replace("<|image_pad|>", "<|pad|>" * count, 1)
        whole = processor.tokenizer(rendered.replace("<|pad|>", "<|image_pad|>")).input_ids
        assert row.input_ids.tolist() == whole
        multi += len(answers) > 1
    assert len(chats) >= 6 and multi >= 3
