"""Tokenizer, chat template and image processor of a model, for images only and without torchvision.

The family's own Hugging Face processor does the work: this module builds it without its video part, and asks it for one
image at a time, so that an image's tensors and placeholder tokens do not depend on what else is in the sample.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
import shutil
import sys
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from PIL import Image
from transformers import AutoTokenizer, ProcessorMixin

from lightning_vlm.models.batch import ImageInput
from lightning_vlm.models.load import check_path

if TYPE_CHECKING:
    from lightning_vlm.models.spec import Backbone

# Everything a processor may consist of; copied unchanged when a model directory is written.
_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
# Settings without which these processors count the wrong number of image tokens.
_REQUIRED = {
    "LlavaProcessor": ("patch_size", "vision_feature_select_strategy"),
    "LlavaOnevisionProcessor": ("num_image_tokens", "vision_feature_select_strategy"),
}
_PARTS = ("video_processor", "chat_template")  # arguments of a processor class that are no settings
_PLACEHOLDER = re.compile(r"image|img|video|vision|<row_\d+_col_\d+>", re.IGNORECASE)


class Processor:
    """What turns messages and images into ids and tensors, for every family alike.

    Attributes:
        hf: the family's Hugging Face processor, without its video part.
        tokenizer: its tokenizer.
        chat_template: the jinja text in use.
        image_token: what the chat template writes for one image.
        image_token_id: the placeholder id that image features replace.
        eos_ids: ids that end a generated text.
        end_of_turn: text and id of the token that ends an assistant's turn: the one the template writes after it, or
            else the tokenizer's EOS.
        pad_id: id to pad with.
        banned_ids: ids that only ever stand around or for images and videos, which sampling must never emit.
        control_tokens: texts that a message must not contain: placeholders, ends and starts of turns.
    """

    def __init__(
        self, hf: ProcessorMixin, *, eos_ids: set[int] = frozenset(), backbone: Any = None, source: Any = None
    ):
        """Wrap `hf`, whose `chat_template` is set.

        Args:
            hf: processor with `tokenizer`, `image_processor`, `image_token` and a chat template.
            eos_ids: ids that end a text beside those of tokenizer and template.
            backbone: what it was loaded from (so that it can be rebuilt in another process).
            source: directory whose files `save` copies; None saves the parts.

        Raises:
            ValueError: no chat template, an image token that is not one token, or no end of turn.
        """
        self.hf, self.backbone, self.source = hf, backbone, source
        self.tokenizer = hf.tokenizer
        self.chat_template = hf.chat_template
        self.image_token: str = hf.image_token
        self.image_token_id: int = self.tokenizer.convert_tokens_to_ids(self.image_token)
        added = self.tokenizer.added_tokens_decoder
        known = {token.content: id for id, token in added.items()}
        if known.get(self.image_token) != self.image_token_id:
            raise ValueError(
                f"the tokenizer has no special token {self.image_token!r}, which {type(hf).__name__} puts for an "
                "image: use the tokenizer that belongs to the model"
            )
        named = set(self.tokenizer.all_special_tokens)
        special = {token.content: id for id, token in added.items() if token.special or token.content in named}
        self.banned_ids: set[int] = {id for token, id in special.items() if _PLACEHOLDER.search(token)}
        self.banned_ids |= {self.image_token_id}

        mark = "the assistant's text"
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "."}]}
        probe = self.render([user, {"role": "assistant", "content": [{"type": "text", "text": mark}]}])
        if probe.count(mark) != 1 or probe.count(self.image_token) != 1:
            raise ValueError(
                f"the chat template does not write each text once and {self.image_token!r} once per image; rendered: "
                f"{probe!r}. Give a template for this model with backbone.chat_template"
            )
        after = probe.split(mark)[1].lstrip()
        ends = [token for token in special if after.startswith(token) and special[token] not in self.banned_ids]
        eos = self.tokenizer.eos_token_id
        if not ends and eos is None:
            raise ValueError("neither the chat template nor the tokenizer has a token that ends an assistant's turn")
        end = max(ends, key=len) if ends else self.tokenizer.eos_token
        self.end_of_turn: tuple[str, int] = (end, special[end] if ends else eos)
        self.eos_ids: set[int] = {self.end_of_turn[1], *eos_ids, *([] if eos is None else [eos])}
        self.banned_ids -= self.eos_ids
        pad = self.tokenizer.pad_token_id
        self.pad_id: int = self.end_of_turn[1] if pad is None else pad
        control = self.banned_ids | self.eos_ids | {self.tokenizer.bos_token_id}
        self.control_tokens: tuple[str, ...] = tuple(
            sorted(token for token, id in known.items() if id in control or (token in special and token in probe))
        )

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the tokenizer's largest id; the model's embedding has at least as many rows."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """The conversation as the chat template writes it, one `image_token` per image part.

        Raises:
            jinja2.TemplateError: the template refuses the conversation.
        """
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def image(self, image: Image.Image) -> tuple[ImageInput, list[int]]:
        """One RGB image's tensors, and the ids that stand for it in the text, wrapping tokens included.

        LLaVA-OneVision tiles every image as it would a sample's only one.

        Raises:
            ValueError: the image processor refuses it (an extreme aspect ratio, say).
        """
        out = self.hf(images=[image], text=[self.image_token], add_special_tokens=False, return_tensors="pt")
        ids = out["input_ids"][0].tolist()
        text_names = {*self.tokenizer.model_input_names, "input_ids", "mm_token_type_ids", "batch_num_images"}
        tensors = {name: value for name, value in out.items() if name not in text_names}
        digest = blake2b(digest_size=16)
        for name in sorted(tensors):
            value = tensors[name].contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            digest.update(value.numpy().data)
        return ImageInput(digest.hexdigest(), tensors, ids.count(self.image_token_id)), ids

    def save(self, directory: str | Path) -> None:
        """Write the files from which plain transformers loads this processor, settings of the backbone included."""
        out = Path(directory)
        out.mkdir(parents=True, exist_ok=True)
        if self.source is None:
            self.hf.save_pretrained(out)
            self.hf.image_processor.save_pretrained(out)
            return
        for name in (*_FILES, *_VOCABULARIES):
            path = Path(self.source) / name
            if path.is_dir():
                shutil.copytree(path, out / name, dirs_exist_ok=True)
            elif path.is_file() and path.resolve() != (out / name).resolve():
                shutil.copyfile(path, out / name)
        if getattr(self.backbone, "chat_template", None):
            (out / "chat_template.json").unlink(missing_ok=True)  # it would win over the jinja file
            (out / "chat_template.jinja").write_text(self.chat_template)
        if _pixel_bounds(self.backbone):
            self.hf.image_processor.save_pretrained(out)
            nested = out / "processor_config.json"
            if nested.is_file() and "image_processor" in (values := json.loads(nested.read_text())):
                values["image_processor"] = self.hf.image_processor.to_dict()
                nested.write_text(json.dumps(values, indent=2) + "\n")

    def fingerprint(self) -> str:
        """Hash of everything that decides ids and tensors: vocabulary, template, image settings."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        tokenizer = self.tokenizer
        text = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
        settings = {name: value for name, value in vars(self.hf).items() if isinstance(value, str | int | float)}
        digest = blake2b(digest_size=16)
        for part in (text, self.chat_template, self.hf.image_processor.to_json_string(), json.dumps(settings)):
            digest.update(part.encode())
        return digest.hexdigest()

    def __reduce__(self):
        # The image-only class is made at run time, so another process loads anew instead of unpickling.
        return load_processor, (self.backbone,)


def images_only(name: str) -> type[ProcessorMixin]:
    """The Hugging Face processor class `name`, as a class that neither needs nor has a video processor.

    Raises:
        ValueError: transformers has no processor of that name.
    """
    base = getattr(transformers, name, None)
    if not (isinstance(base, type) and issubclass(base, ProcessorMixin)):
        raise ValueError(f"transformers {transformers.__version__} has no processor {name!r}: is it new enough?")
    module = sys.modules[base.__module__]
    if getattr(module, "num2words", True) is None:
        # SmolVLM refuses to be built without this package, which only spells out the number of a video's frames.
        module.num2words = str
    attributes = [attribute for attribute in base.get_attributes() if attribute != "video_processor"]
    return type(
        name, (base,), {"get_attributes": classmethod(lambda _: list(attributes)), "__module__": base.__module__}
    )


def build_processor(name: str, *, tokenizer: Any, image_processor: Any, chat_template: str, **settings: Any) -> Any:
    """The processor class `name` for images only, made from its parts.

    Args:
        name: Hugging Face processor class, such as `Qwen2_5_VLProcessor`.
        tokenizer: its tokenizer.
        image_processor: its image processor (a Pil one).
        chat_template: jinja text.
        settings: further arguments of the class (`patch_size`, `image_seq_len`, ...).

    Raises:
        ValueError: an unknown class, or parts it cannot be built from.
    """
    cls = images_only(name)
    parameters = inspect.signature(cls.__init__).parameters
    video = {"video_processor": None} if "video_processor" in parameters else {}
    try:
        return cls(
            image_processor=image_processor, tokenizer=tokenizer, chat_template=chat_template, **video, **settings
        )
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{name} cannot be built from these files: {error}") from error


def load_processor(backbone: Backbone) -> Processor:
    """The processor of a model directory, a hub id or an embedded model.

    Args:
        backbone: `path`, `min_pixels`, `max_pixels`, `chat_template` and `trust_remote_code` are read.

    Raises:
        ValueError: a missing directory or file, no chat template, settings the image processor does not have.
    """
    if backbone.embedded is not None:
        return _embedded(backbone)
    source = _directory(backbone.path)
    settings = read_json(source / "processor_config.json")
    name = _class_name(source, settings)
    if not any((source / file).is_file() for file in _VOCABULARIES):
        raise ValueError(f"{source} has no tokenizer ({', '.join(_VOCABULARIES)}): copy the model's own")
    if "image_processor" not in settings and not (source / "preprocessor_config.json").is_file():
        raise ValueError(f"{source} has no preprocessor_config.json: copy the model's own")
    for key in _REQUIRED.get(name, ()):
        if settings.get(key) is None:
            raise ValueError(
                f"{source}/processor_config.json does not set {key}, without which {name} cannot count image tokens: "
                "add it, with the value that the model's config.json implies"
            )
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=backbone.trust_remote_code)
    image_processor = load_image_processor(source, settings, _pixel_bounds(backbone))
    template = _override(backbone) or _template(source, settings, tokenizer)
    cls = images_only(name)
    own = inspect.signature(cls.__init__).parameters.keys() - {*cls.get_attributes(), *_PARTS}
    extra = {key: value for key, value in settings.items() if key in own}
    hf = build_processor(name, tokenizer=tokenizer, image_processor=image_processor, chat_template=template, **extra)
    eos = read_json(source / "generation_config.json").get("eos_token_id")
    eos_ids = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return Processor(hf, eos_ids=eos_ids, backbone=backbone, source=source)


def _embedded(backbone: Backbone) -> Processor:
    """The processor of an embedded model, which has no files."""
    from lightning_vlm.models.embedded import build_config, build_processor_parts

    if bounds := _pixel_bounds(backbone):
        raise ValueError(f"{backbone.path} has one image size: leave backbone.{' and '.join(bounds)} out")
    tokenizer, image_processor, template = build_processor_parts(backbone.embedded)
    config = build_config(backbone.embedded)
    name, settings = "Qwen2_5_VLProcessor", {}
    if config.model_type == "llava":
        name = "LlavaProcessor"
        settings = {
            "patch_size": config.vision_config.patch_size,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "num_additional_image_tokens": 1,  # the tower's class token
        }
    hf = build_processor(
        name,
        tokenizer=tokenizer,
        image_processor=image_processor,
        chat_template=_override(backbone) or template,
        **settings,
    )
    return Processor(hf, backbone=backbone)


def _directory(path: str) -> Path:
    """`path` itself, or the local copy of a hub model's processor files."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    check_path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.jinja", "*.txt", "*.model", "*.py"]))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"backbone.path {path!r} is no directory here and not to be had from the hub: {first}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The file's contents, {} where there is no such file; a ValueError where they are no JSON."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error


def _class_name(source: Path, settings: dict[str, Any]) -> str:
    """The processor class a directory names, or the one of its model type."""
    for values in (settings, *(read_json(source / f) for f in ("preprocessor_config.json", "tokenizer_config.json"))):
        if values.get("processor_class"):
            return values["processor_class"]
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    kind = read_json(source / "config.json").get("model_type")
    if kind in PROCESSOR_MAPPING_NAMES:
        return PROCESSOR_MAPPING_NAMES[kind]
    check_path(str(source))
    raise ValueError(
        f"{source} names no processor: neither processor_class in processor_config.json or preprocessor_config.json, "
        f"nor a known model_type in config.json ({kind!r})"
    )


def load_image_processor(source: Path, settings: dict[str, Any], bounds: dict[str, int]) -> Any:
    """The directory's image processor, the variant that needs Pillow and numpy alone.

    It is looked up by name and in its own module: some of the supported releases ask for torchvision in the Auto class
    and put a stand-in for this class, although it does without.

    `settings` are those of processor_config.json, which may hold the image processor's own; `bounds` are `min_pixels`
    and `max_pixels` in place of these. ValueError: a class that transformers lacks, or one without bounds.
    """
    values = read_json(source / "preprocessor_config.json") or settings["image_processor"]
    kind = values.get("image_processor_type") or values.get("feature_extractor_type") or ""
    kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    cls = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind or "-", None)
    if cls is None:
        raise ValueError(
            f"{source}/preprocessor_config.json: no image processor {kind!r} in transformers {transformers.__version__}"
        )
    cls = getattr(importlib.import_module(cls.__module__), cls.__name__)
    if bounds and "max_pixels" not in cls.valid_kwargs.__annotations__:
        raise ValueError(f"{kind} has no {' or '.join(bounds)}: leave backbone.{' and '.join(bounds)} out")
    return cls.from_pretrained(source, **bounds)


def _pixel_bounds(backbone: Any) -> dict[str, int]:
    names = ("min_pixels", "max_pixels")
    return {name: getattr(backbone, name) for name in names if getattr(backbone, name, None) is not None}


def _override(backbone: Any) -> str | None:
    """The text of the backbone's own chat template file, where it names one."""
    if not backbone.chat_template:
        return None
    path = Path(backbone.chat_template).expanduser()
    if not path.is_file():
        raise ValueError(f"backbone.chat_template {backbone.chat_template!r}: no such file")
    return path.read_text(encoding="utf-8")


def _template(source: Path, settings: dict[str, Any], tokenizer: Any) -> str:
    """A directory's chat template, looked for where and in the order transformers does."""
    jinja = source / "chat_template.jinja"
    template = read_json(source / "chat_template.json").get("chat_template")
    template = (
        template or settings.get("chat_template") or (jinja.read_text(encoding="utf-8") if jinja.is_file() else None)
    )
    template = template or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ValueError(f"{source} has no chat template (chat_template.jinja): give one with backbone.chat_template")
    return template
