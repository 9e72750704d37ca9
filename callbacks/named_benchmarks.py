r"""The field's benchmarks, each ready by its path alone: `callbacks: {MathVista: {path: DIR, every: 200}}`."""

from __future__ import annotations

from typing import ClassVar, Literal

from callbacks.benchmarks import Benchmarks
from lightning_vlm.benchmarks import BenchmarkSpec
from lightning_vlm.data.sources import SourceSpec


class NamedBenchmark(Benchmarks):
    """Base of the benchmarks that are known by name.

    Args:
        path: folder or file with the data, or a data set on the hub.
        split: split to evaluate; default the benchmark's own where the path has splits, else all that is there.
        name: what its metrics are called by, `val/<name>/…`; default the benchmark's.
        every: optimizer steps between evaluations.
        limit: only the first so many problems. A part of a benchmark is another benchmark: never compare across sizes.
        n: answers drawn per problem; several add pass_at_k, maj_at_n and diversity.
        temperature: of drawn answers; default 0 (greedy) for one answer, 1 for several.
        top_p: nucleus of drawn answers.
        max_new_tokens: longest answer in tokens.
        instruction: text after the question in place of the benchmark's own.
        images_root: folder that relative image paths start from; default the folder of the data.
        rule: grading rule; default the benchmark's own.
        prompt: how the question is asked, where there are several ways; default the first.
    """

    kind: ClassVar[str]
    default_name: ClassVar[str]

    def __init__(
        self,
        *,
        path: str,
        split: str | None = None,
        name: str | None = None,
        every: int = 100,
        limit: int | None = None,
        n: int = 1,
        temperature: float | None = None,
        top_p: float = 1.0,
        max_new_tokens: int = 1024,
        instruction: str | None = None,
        images_root: str | None = None,
        rule: str | None = None,
        prompt: str | None = None,
    ) -> None:
        source = SourceSpec(
            kind=self.kind,
            path=path,
            split=split,
            prompt=prompt,
            limit=limit,
            instruction=instruction,
            images_root=images_root,
        )
        spec = BenchmarkSpec(
            source=source,
            rule=rule,
            every=every,
            n=n,
            temperature=(1.0 if n > 1 else 0.0) if temperature is None else temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
        )
        super().__init__(benchmarks={name or self.default_name: spec})


class CocoCaptions(NamedBenchmark):
    """COCO captions: BLEU, METEOR, ROUGE-L, CIDEr-D; logged as `val/coco/CIDEr` and so on.

    CIDEr depends on the set of images: never compare numbers of different `limit`s or splits.

    Args:
        path: Karpathy's `dataset_coco.json` or COCO's `captions_*.json`, with the image folders beside it.
        rule: `coco/ptb` tokenises by the PTB tokenizer and adds METEOR, both need Java; `coco/ptb-spice` adds SPICE, of
            which some files must be fetched by hand; `coco/python` needs no Java and is another rule.
        max_new_tokens: longest caption in tokens.
    """

    kind, default_name = "coco", "coco"

    def __init__(
        self,
        *,
        path: str,
        rule: Literal["coco/ptb", "coco/ptb-spice", "coco/python"] = "coco/ptb",
        max_new_tokens: int = 64,
        **settings,
    ) -> None:
        super().__init__(path=path, rule=rule, max_new_tokens=max_new_tokens, **settings)


class MathVista(NamedBenchmark):
    """MathVista, answers extracted by rules; logged as `val/mathvista/accuracy`, by task and by skill.

    The official score extracts answers by a GPT model. For that, write predictions, extract them elsewhere, and score
    the file by `lightning-vlm score mathvista`.

    Args:
        path: folder with `testmini.json` and `images/`, or the data set on the hub.
    """

    kind, default_name = "mathvista", "mathvista"

    def __init__(self, *, path: str = "AI4Math/MathVista", **settings) -> None:
        super().__init__(path=path, **settings)


class Geometry3K(NamedBenchmark):
    r"""Geometry3K; logged as `val/geometry3k/accuracy`.

    Args:
        path: folder or file with the data, or the data set on the hub.
        prompt: `freeform` shows no options and grades the \boxed{} answer by math-verify, `mcq` shows them and grades
            the letter: two tasks under one name.
    """

    kind, default_name = "geometry3k", "geometry3k"

    def __init__(
        self, *, path: str = "hiyouga/geometry3k", prompt: Literal["freeform", "mcq"] = "freeform", **settings
    ) -> None:
        super().__init__(path=path, prompt=prompt, **settings)


class MathVision(NamedBenchmark):
    """MATH-V by its released rule; logged as `val/mathvision/accuracy`, by level and by subject.

    Args:
        path: folder with `testmini.jsonl` or `test.jsonl` and `images/`, or the data set on the hub.
    """

    kind, default_name = "mathvision", "mathvision"

    def __init__(self, *, path: str = "MathLLMs/MathVision", **settings) -> None:
        super().__init__(path=path, **settings)


class Mmvp(NamedBenchmark):
    """MMVP; logged as `val/mmvp/accuracy` and `val/mmvp/pairs`, the share of pairs with both questions right.

    Args:
        path: folder of `N/request.json` with its photograph.
        swap_pairs: show each question with its pair's other photograph, where the right answer becomes wrong.
        max_new_tokens: longest answer in tokens.
    """

    kind, default_name = "mmvp", "mmvp"

    def __init__(self, *, path: str, swap_pairs: bool = False, max_new_tokens: int = 64, **settings) -> None:
        super().__init__(path=path, max_new_tokens=max_new_tokens, **settings)
        for spec in self.specs.values():
            spec.source.options = {"swap_pairs": swap_pairs}


class Answers(NamedBenchmark):
    r"""Questions with short answers, with images or without: the form of MATH-500, AIME and GPQA.

    Args:
        path: a table of `question` (or `problem`), `answer`, optionally `choices`, `images`, `level`, `subject`.
        prompt: `boxed` asks for the answer inside \boxed{}, `direct` asks nothing.
    """

    kind, default_name = "qa", "answers"

    def __init__(self, *, path: str, prompt: Literal["boxed", "direct"] = "boxed", **settings) -> None:
        super().__init__(path=path, prompt=prompt, **settings)
