"""COCO captions, from Karpathy's `dataset_coco.json` or COCO's own `captions_*.json`.

`captions: all` gives every caption of every image as a sample of its own (ids `IMAGE#N`); `captions: one` gives every
image once per epoch with one of its captions, another one in the next. All references are in `info["references"]`.
"""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from typing import Any

from lightning_vlm.data.schema import BadSample, Sample
from lightning_vlm.data.sources.base import ImageFinder, Source, checked_ids
from lightning_vlm.data.sources.conversations import question
from lightning_vlm.data.sources.spec import SourceSpec, choose
from lightning_vlm.data.sources.tables import JsonTable, Row, existing_path, read_json

INSTRUCTION = "Describe this image in one sentence."


class CocoSource(Source):
    """Images with their captions.

    Args:
        table: rows with `id`, `image` (path) and `captions` (list of texts).
        captions: `all` or `one`.
        label: name of the source. instruction: what the user says beside the image.

    Raises:
        ValueError: two images of one id, or no captions at all.
    """

    def __init__(self, table: JsonTable, *, captions: str, label: str, instruction: str) -> None:
        self.table, self.label, self.instruction = table, label, instruction
        self._ids = checked_ids(table.column("id"), table.where)
        counts = [len(c) for c in table.column("captions")]
        if not any(counts):
            raise ValueError(f"{table.where} has no captions")
        self.varies = captions == "one"
        self._pairs: array | None = None
        if captions == "all":
            self._pairs = array("Q", (n for i, c in enumerate(counts) for k in range(c) for n in (i, k)))

    def __len__(self) -> int:
        return len(self.table) if self._pairs is None else len(self._pairs) // 2

    def sample_id(self, index: int) -> str:
        if self._pairs is None:
            return f"{self.label}/{self._ids[index]}"
        return f"{self.label}/{self._ids[self._pairs[2 * index]]}#{self._pairs[2 * index + 1]}"

    def draw(self, index: int, epoch: int) -> Sample:
        id = self.sample_id(index)
        row = self.table.row(index if self._pairs is None else self._pairs[2 * index])
        references = row["captions"]
        if not references:
            raise BadSample(id, "missing_column", "the image has no caption")
        # images start at different captions, so that an epoch shows early and late annotators alike
        which = (index + epoch) % len(references) if self._pairs is None else self._pairs[2 * index + 1]
        caption = references[which].strip()
        return question(
            id,
            self.label,
            self.instruction,
            [row["image"]],
            target=caption,
            answer=caption,
            info={"image_id": row["id"], "references": references},
        )


def open_coco(spec: SourceSpec, label: str, *, for_training: bool) -> CocoSource:
    """COCO captions of a file and a split.

    Args:
        spec: `options.captions` is `all` or `one`; default `all` for training, else `one`.
        label: name of the source. for_training: chooses that default; evaluation takes Karpathy's `test` where no
            split is named.

    Raises:
        ValueError: no such file, another shape, an unknown split, or a missing image folder.
    """
    captions = choose(spec.options.get("captions", "all" if for_training else "one"), ("all", "one"), "captions")
    path = existing_path(spec)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; for coco give the file (dataset_coco.json or captions_*.json)")
    split = "test" if spec.split is None and not for_training else spec.split
    rows = read_captions(path, split, default=spec.split is None)
    place = _Folders(ImageFinder.of(spec, path.parent))
    for row in rows:
        row["image"] = place(row.pop("folder"), row["image"])
    instruction = INSTRUCTION if spec.instruction is None else spec.instruction
    return CocoSource(JsonTable(rows, str(path), path.parent), captions=captions, label=label, instruction=instruction)


def read_captions(path: Path, split: str | None, *, default: bool = False) -> list[Row]:
    """Images with their captions, from Karpathy's `dataset_coco.json` or COCO's `captions_*.json`.

    Args:
        path: the file. split: of Karpathy's file. default: whether `split` is only a default, that a file with one
            split or none need not have.

    Returns:
        Rows with `id`, `folder`, `image` (file name) and `captions`.

    Raises:
        ValueError: another shape, or an unknown split.
    """
    content = read_json(path, rows=False)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise ValueError(f"{path}: expected an object with `images`, as dataset_coco.json and captions_*.json have")
    if not images:
        raise ValueError(f"{path} is empty: it has no images")
    if "annotations" in content:
        if split is not None and not default:
            raise ValueError(f"`split: {split}` has no meaning for {path}: COCO keeps one annotation file per split")
        return _annotated_rows(content, path)
    if not (isinstance(images[0], dict) and "sentences" in images[0]):
        raise ValueError(f"{path}: neither COCO's `annotations` nor Karpathy's `sentences` are there")
    splits = sorted({str(i.get("split")) for i in images})
    if default and (len(splits) == 1 or split not in splits):
        split = None
    return _karpathy_rows(images, split, splits, path)


def _karpathy_rows(images: list[Any], split: str | None, splits: list[str], path: Path) -> list[Row]:
    if split is None and len(splits) > 1:
        raise ValueError(
            f"{path} has several splits ({', '.join(splits)}); choose by `split` (`train+restval` joins two)"
        )
    wanted = set(splits if split is None else split.split("+"))
    for name in wanted - set(splits):
        raise ValueError(f"{path} has no split {name!r}; it has {', '.join(splits)}")
    return [
        {
            "id": i.get("cocoid", i["filename"]),
            "folder": i.get("filepath", ""),
            "image": i["filename"],
            "captions": [s["raw"] for s in i["sentences"]],
        }
        for i in images
        if str(i.get("split")) in wanted
    ]


def _annotated_rows(content: dict[str, Any], path: Path) -> list[Row]:
    rows = {i["id"]: {"id": i["id"], "folder": "", "image": i["file_name"], "captions": []} for i in content["images"]}
    if len(rows) < len(content["images"]):
        raise ValueError(f"{path}: {len(content['images']) - len(rows)} images share an id with another")
    for annotation in content["annotations"]:
        if "caption" not in annotation:
            raise ValueError(f"{path}: annotation {annotation.get('id')} has no caption; give a captions_*.json file")
        if annotation["image_id"] not in rows:
            raise ValueError(
                f"{path}: annotation {annotation.get('id')} is of image {annotation['image_id']}, not listed"
            )
        rows[annotation["image_id"]]["captions"].append(annotation["caption"])
    return list(rows.values())


class _Folders:
    """Full path of an image: below the root in its folder (`val2014`), or right below it where that has no such folder.

    Args:
        find: knows the root.
    """

    def __init__(self, find: ImageFinder) -> None:
        self.find, self.prefix = find, {}

    def __call__(self, folder: str, file: str) -> str:
        if folder not in self.prefix:
            self.prefix[folder] = self._existing(folder, file)
        return self.find(f"{self.prefix[folder]}{file}")

    def _existing(self, folder: str, file: str) -> str:
        if folder and os.path.isdir(self.find(folder)):
            return f"{folder}/"
        if folder and not os.path.isfile(self.find(file)):
            raise ValueError(
                f"image folder {self.find(folder)} does not exist, and {file} does not lie in {self.find.root}; "
                "set images_root to the folder that holds it"
            )
        return ""
