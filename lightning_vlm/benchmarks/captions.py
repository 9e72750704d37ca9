"""Caption benchmarks: graded as a corpus, not one by one."""

from __future__ import annotations

from statistics import fmean

from lightning_vlm.benchmarks.rule import Record, Rule, Summary, by_problem, shares
from lightning_vlm.data.schema import Sample
from lightning_vlm.metrics.exact import exact_match

CAPTION_RULES = {
    "ptb": {"tokenizer": "ptb", "spice": False},
    "ptb-spice": {"tokenizer": "ptb", "spice": True},
    "python": {"tokenizer": "python", "spice": False},
}


def metric_names(tokenizer: str, spice: bool) -> tuple[str, ...]:
    """Metrics of `summarise_captions`, those of several draws included."""
    java = ("METEOR", *(("SPICE",) if spice else ())) if tokenizer == "ptb" else ()
    suite = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", *java, "ROUGE_L", "CIDEr")
    return (*suite, "CIDEr_mean", "CIDEr_oracle", "n", "empty", "unfinished")


def grade_caption(output: str, sample: Sample) -> Record:
    """The caption and its references; `summarise_captions` scores it, together with all others.

    Raises:
        ValueError: an image without references.
    """
    references = [caption for caption in sample.info.get("references") or [] if caption.strip()]
    if not references:
        raise ValueError(f"image {sample.id} has no reference caption to score against")
    return {"extraction": output, "gold": references, "score": 0.0}


def grade_world_caption(output: str, sample: Sample) -> Record:
    """As `grade_caption`; `exact` is 1 if the caption is one of the references, word for word.

    Raises:
        ValueError: a sample of another family of the embedded world.
    """
    if sample.info.get("family") != "caption":
        raise ValueError(f"sample {sample.id} is no caption: set source.options.families to [caption]")
    return grade_caption(output, sample) | {"exact": exact_match(output.strip(), sample.info["references"])}


def summarise_world_captions(rule: Rule, records: list[Record]) -> Summary:
    """As `summarise_captions` with the Python tokenizer; `exact`: share of captions that are one of the references."""
    summary = summarise_captions(rule, records, tokenizer="python", spice=False)
    columns = dict(summary.columns) | {"exact": [fmean(r["exact"] for r in draws) for draws in by_problem(records)]}
    return Summary(summary.metrics | {"exact": fmean(columns["exact"])}, columns, summary.captions)


def summarise_captions(rule: Rule, records: list[Record], *, tokenizer: str, spice: bool) -> Summary:
    """The COCO suite of the first caption of each image; each record's `score` becomes its CIDEr-D.

    With several captions per image, `CIDEr_mean` and `CIDEr_oracle` are the mean over images of the mean and of the
    best CIDEr-D. `empty` counts captions without a word: they score 0, as the formulas have it.
    """
    from lightning_vlm.metrics.captions import score_captions, topk_cider

    images = by_problem(records)
    references = {draws[0]["id"]: draws[0]["gold"] for draws in images}
    first = {draws[0]["id"]: draws[0]["extraction"] for draws in images}
    scores = score_captions(first, references, tokenizer=tokenizer, spice=spice, allow_empty=True)
    for draws in images:
        draws[0]["score"] = scores.per_image[draws[0]["id"]]["CIDEr"]
        draws[0]["scores"] = scores.per_image[draws[0]["id"]]
    metrics = scores.corpus | {"n": float(len(images)), "empty": float(scores.empty)}
    columns = {name: values for name, values in shares(images).items() if name == "unfinished"}
    if max(map(len, images)) > 1:
        drawn = {draws[0]["id"]: [r["extraction"] for r in draws] for draws in images}
        cider = topk_cider(drawn, references, tokenizer=tokenizer)
        for draws, values in zip(images, cider, strict=True):
            for record, value in zip(draws, values, strict=True):
                record["score"] = float(value)
        columns |= {"CIDEr_mean": cider.mean(axis=1).tolist(), "CIDEr_oracle": cider.max(axis=1).tolist()}
    return Summary(metrics | {name: fmean(values) for name, values in columns.items()}, columns, scores)
