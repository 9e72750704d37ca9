"""Composing VLM directories, and changing one part of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning_vlm.compose.assemble import Plan, ids_of, origin, placed, plan, write_vlm
from lightning_vlm.compose.checks import check_common
from lightning_vlm.compose.encoder import Encoder, read_encoder
from lightning_vlm.compose.language import (
    Language,
    as_qwen_text,
    generation_config,
    read_language,
)  # fmt: skip
from lightning_vlm.compose.projector import PROJECTORS, fresh_projector
from lightning_vlm.compose.tokens import Text, bind, extended, load_tokenizer
from lightning_vlm.compose.vlm import FORMS, Vlm, projector_out, read_vlm
from lightning_vlm.models.processor import load_processor
from lightning_vlm.models.spec import Backbone

SELECT = ("default", "full")


def compose(
    *,
    vision: str | Path,
    language: str | Path,
    out: str | Path,
    projector: str = "mlp2x_gelu",
    form: str = "auto",
    vision_feature_layer: int | None = None,
    vision_feature_select: str | None = None,
    seed: int = 0,
    chat_template: str | Path | None = None,
    dtype: str | None = None,
    max_shard_size: str = "4GB",
) -> Path:
    """Build a VLM of an encoder, a fresh projector and a language model.

    Args:
        vision: directory of a bare tower (CLIP, SigLIP, fixed-size SigLIP2, DINOv2, InternViT, Qwen2.5-VL's) or of a
            dual encoder, whose vision half is taken.
        language: directory of a causal LM (Qwen2, Qwen2.5, Qwen3, Llama) with its tokenizer.
        out: directory to make.
        projector: `mlp2x_gelu`, two layers with GELU, as LLaVA-1.5's.
        form: `llava`, `internvl`, `qwen2_5_vl`, or `auto`: the one that the encoder takes.
        vision_feature_layer: index of the hidden state that is read; the field's usual one by default.
        vision_feature_select: `default` drops the class token, `full` keeps all tokens; likewise.
        seed: of the projector's weights.
        chat_template: jinja file in place of the language model's own template.
        dtype: of all written weights; as they are by default.
        max_shard_size: of one weight file, such as 4GB.

    Returns:
        `out`.

    Raises:
        ValueError: parts that do not fit, in one line.
    """
    shard, kind = check_common(out, max_shard_size, dtype)
    if projector not in PROJECTORS:
        raise ValueError(f"projector is {projector!r}; there is {', '.join(PROJECTORS)} (what the VLM classes hold)")
    if vision_feature_select not in (None, *SELECT):
        raise ValueError(f"vision_feature_select is {vision_feature_select!r}; choose one of {', '.join(SELECT)}")
    if form not in ("auto", *FORMS):
        raise ValueError(f"form is {form!r}; choose one of auto, {', '.join(FORMS)}")
    encoder = read_encoder(vision)
    form = _form(form, encoder)
    llm = read_language(language)
    if form == "qwen2_5_vl":
        if vision_feature_layer is not None or vision_feature_select is not None:
            raise ValueError(
                "Qwen2.5-VL's class reads the tower's last layer: leave vision_feature_layer and _select out"
            )
        as_qwen_text(llm.config, None, llm.path)
    text = bind(llm, form, chat_template=chat_template)
    llm, source = extended(llm, text.rows), llm
    planned = plan(
        form,
        encoder,
        llm,
        ids_of(text, form),
        layer=vision_feature_layer,
        select=vision_feature_select,
        image_token=text.image,
    )
    fresh = fresh_projector(planned.projector, seed=seed, dtype=llm.dtype)
    facts = origin(
        "compose",
        llm.path,
        {"vision": encoder.path, "projector": {"made": projector, "seed": seed}, "language": llm.path},
        form=form,
        **_reads(planned),
        **_tokens(text, source, llm),
    )
    return write_vlm(
        Path(out),
        planned,
        placed(planned, encoder, fresh, llm),
        save_text=text.save,
        generation=generation_config(llm.path),
        provenance=facts,
        dtype=kind,
        weights_dtype=llm.dtype,
        max_shard_size=shard,
    )


def swap_language(
    vlm: str | Path,
    *,
    language: str | Path,
    out: str | Path,
    chat_template: str | Path | None = None,
    dtype: str | None = None,
    max_shard_size: str = "4GB",
) -> Path:
    """Put another language model behind a VLM's encoder and projector, which stay bit for bit.

    Tokenizer, placeholder, chat template, padding and EOS become the new model's.

    Args:
        vlm: directory in LLaVA, InternVL or Qwen2.5-VL form.
        language: directory of a causal LM of the width the projector writes.
        out, chat_template, dtype, max_shard_size: as of `compose`.

    Raises:
        ValueError: widths that differ, or parts that do not fit.
    """
    shard, kind = check_common(out, max_shard_size, dtype)
    base, llm = read_vlm(vlm), read_language(language)
    width, wanted = llm.config.hidden_size, projector_out(base.projector)
    if width != wanted:
        raise ValueError(
            f"the projector of {base.path} writes {wanted} numbers per token, {llm.path} reads {width}: take an LLM of "
            f"width {wanted}, or a fresh projector (`lightning-vlm take-encoder`, then `compose`)"
        )
    form = base.family.name
    if form == "qwen2_5_vl":
        as_qwen_text(llm.config, None, llm.path)
    text = bind(llm, form, chat_template=chat_template)
    video = base.path / "video_preprocessor_config.json"  # belongs to the images' side, which stays

    def save(folder: Path) -> None:
        text.save(folder)
        if video.is_file():
            shutil.copyfile(video, folder / video.name)

    llm, source = extended(llm, text.rows), llm
    planned = plan(form, base.encoder, llm, ids_of(text, form), base=base, image_token=text.image)
    facts = origin(
        "swap-language",
        base.path,
        {"vision": base.path, "projector": base.path, "language": llm.path},
        form=form,
        **_reads(planned),
        **_tokens(text, source, llm),
    )
    return write_vlm(
        Path(out),
        planned,
        placed(planned, base.encoder, base.projector, llm),
        save_text=save,
        generation=generation_config(llm.path),
        provenance=facts,
        dtype=kind,
        weights_dtype=llm.dtype,
        max_shard_size=shard,
    )


def put_encoder(
    vlm: str | Path,
    *,
    encoder: str | Path,
    out: str | Path,
    projector: str = "fresh",
    vision_feature_layer: int | None = None,
    vision_feature_select: str | None = None,
    seed: int = 0,
    dtype: str | None = None,
    max_shard_size: str = "4GB",
) -> Path:
    """Put another encoder before a VLM's language model, which stays bit for bit.

    Args:
        vlm: directory in LLaVA, InternVL or Qwen2.5-VL form.
        encoder: directory of an encoder that goes with that form.
        out: directory to make.
        projector: `fresh`, from the seed, or `keep`, the VLM's; then width, patches and layers must be the same.
        vision_feature_layer, vision_feature_select: by default as the VLM reads a tower of the same kind, else as of
            `compose`.
        seed, dtype, max_shard_size: as of `compose`.

    Raises:
        ValueError: parts that do not fit.
    """
    if projector not in ("fresh", "keep"):
        raise ValueError(f"projector is {projector!r}; choose fresh (new, from the seed) or keep (the VLM's)")
    shard, kind = check_common(out, max_shard_size, dtype)
    base, tower = read_vlm(vlm), read_encoder(encoder, role="--encoder")
    form = base.family.name
    if tower.custom.form != form:
        raise ValueError(
            f"{tower.path} is a {tower.kind}, which takes the {tower.custom.form} form, {base.path} has the {form} "
            "form: "
            "`lightning-vlm take-language`, then `compose`, makes a VLM of that form"
        )
    if tower.kind == base.encoder.kind and base.encoder.reads:
        tower.reads = base.encoder.reads
    ids = _own_ids(base)
    processor = load_processor(Backbone(path=str(base.path)))
    planned = plan(
        form,
        tower,
        base.language,
        ids,
        layer=vision_feature_layer,
        select=vision_feature_select,
        base=base,
        image_token=processor.image_token,
    )
    if projector == "keep":
        _check_same_features(base, tower, planned)
        pieces, made = base.projector, base.path
    else:
        pieces = fresh_projector(planned.projector, seed=seed, dtype=base.language.dtype)
        made = {"made": "fresh", "seed": seed}
    facts = origin(
        "put-encoder",
        base.path,
        {"vision": tower.path, "projector": made, "language": base.path},
        form=form,
        **_reads(planned),
    )
    return write_vlm(
        Path(out),
        planned,
        placed(planned, tower, pieces, base.language),
        save_text=processor.save,
        generation=generation_config(base.path),
        provenance=facts,
        dtype=kind,
        weights_dtype=base.language.dtype,
        max_shard_size=shard,
    )


def _form(form: str, encoder: Encoder) -> str:
    wanted = encoder.custom.form
    if form not in ("auto", wanted):
        reasons = {
            "qwen2_5_vl": "Qwen2.5-VL's class holds its own tower only, which takes patches with image_grid_thw",
            "llava": "LLaVA's class passes on neither image_grid_thw nor a pixel shuffle",
            "internvl": "InternVL's class holds an InternViT",
        }
        raise ValueError(
            f"{encoder.path} is a {encoder.kind}, which takes the {wanted} form, not {form}: {reasons[form]}"
        )
    return wanted


def _reads(planned: Plan) -> dict[str, Any]:
    names = ("vision_feature_layer", "vision_feature_select_strategy")
    return {name: getattr(planned.config, name) for name in names if hasattr(planned.config, name)}


def _tokens(text: Text, source: Language, llm: Language) -> dict[str, Any]:
    return {
        "tokens": {"image": text.image, "added": text.added, "template_wrapped": text.wrapped},
        "embedding_rows": {"source": source.rows, "written": llm.rows},
    }


def _own_ids(base: Vlm) -> dict[str, int]:
    """The ids of a VLM that keeps its language model."""
    config, tokenizer = base.config, load_tokenizer(base.path)
    text = config.text_config

    def bound(name: str, of_tokenizer: int | None) -> int | None:
        given = getattr(config, name, None)
        given = getattr(text, name, None) if given is None else given
        return of_tokenizer if given is None else given

    eos = bound("eos_token_id", tokenizer.eos_token_id)
    pad = bound("pad_token_id", tokenizer.pad_token_id)
    ids = {"image": config.image_token_id, "eos": eos, "pad": eos if pad is None else pad}
    if base.family.name == "qwen2_5_vl":
        ids |= {"video": config.video_token_id}
        ids |= {"start": config.vision_start_token_id, "end": config.vision_end_token_id}
    return ids


def _check_same_features(base: Vlm, tower: Encoder, planned: Plan) -> None:
    """Refuses a kept projector before other features than it was trained on."""
    old = base.encoder
    facts = {
        "kind": (old.kind, tower.kind),
        "width": (old.config.hidden_size, tower.config.hidden_size),
        "patch size": (old.patch, tower.patch),
        "layers": (old.depth, tower.depth),
        "image tokens": tuple(getattr(c, "image_seq_length", None) for c in (base.config, planned.config)),
        "merge size": tuple(getattr(e.config, "spatial_merge_size", None) for e in (old, tower)),
        "feature layer": (base.reads[0], _reads(planned).get("vision_feature_layer", base.reads[0])),
    }
    for name, (was, now) in facts.items():
        if was != now:
            raise ValueError(
                f"--projector keep: the projector of {base.path} was trained on features of {name} {was}, "
                f"{tower.path} has "
                f"{now}: take --projector fresh"
            )
