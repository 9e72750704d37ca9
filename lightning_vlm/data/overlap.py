r"""What of a benchmark is in the training data: pictures by exact and perceptual hash, questions by normalised text.

**Exact**: SHA-256 over size and RGB pixels of the upright picture; another file format without loss, other metadata or
another name do not hide a copy.

**Perceptual**: pHash of 16 x 16 bits (`imagehash`) of the whole picture and of its inner 98 and 96 %; the distance of
two pictures is the least number of bits, of 256, between the whole one and any of the other's three. The two inner ones
make a narrow border or crop of one side the whole picture of the other. A picture without contrast, such as the white
one that stands in for none, matches nothing.

Measured on 680 pictures (300 photographs of MMVP, 304 pictures of MATH-V, 57 diagrams of Geometry3K, 19 photographs of
COCO). At the default threshold of 32 bits 99.8 % or more of the copies are found that are resized to 50, 75 or 200 %,
grey, JPEG of quality 50 (also at half the size), or cropped by 1, 1.5 or 2 % on each side; 98 % of those with a border
of 1 % of the longer side, 90 % with one of 2 %, 93 % of those cropped by 2 % on the left alone. At 24 these are 99, 96,
85 and 74 %. Of the 230,000 pairs of distinct pictures none is nearer than 56. Bare line drawings are the weak spot: of
3,002 figures drawn from Geometry3K's point positions (letters but no numbers) 22 % have another figure within 32, and
16 % within 24 (.03 and .01 % of the pairs), mostly the same kind of triangle or parallelogram. Mirrored or rotated
copies, and larger crops, are not found.

**Text**: a question of the benchmark is found where a user's turn of the training data holds it, whatever stands before
and after it (instructions, choices). See `normalised` and `tells`.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import imagehash
import numpy as np
from PIL import Image

from lightning_vlm.data.images import BadImage, load_image
from lightning_vlm.data.schema import BadSample, Sample

BITS = 256
THRESHOLD = 32
KINDS = ("image_exact", "image_perceptual", "text")
_SIDE = 16  # of the hash
_THUMBNAIL = 256  # pixels; the hashes are taken of it
_INSETS = (0.0, 0.01, 0.02)  # cut from each side
_LEAST_CONTRAST = 2.0  # standard deviation of grey levels; below, a hash would be of noise
_HEAD = 16  # characters by which long texts are looked up
_CHUNK = 2048

_TAGS = re.compile(r"<(?:image|video)\d*>")
_HINT = re.compile(r"\A\s*hint:.*?^\s*question:", re.IGNORECASE | re.DOTALL | re.MULTILINE)
_CHOICES = re.compile(
    r"\b(?:choices|options)\s*:\s*\(?a\b.*|^\s*\(?a[.):].*?^\s*\(?b[.):].*", re.IGNORECASE | re.DOTALL | re.MULTILINE
)
# What is also written as a sign, or not at all.
_LATEX = re.compile(
    r"\\(?:left|right|[dt]?frac|text\w*|math\w+|overline|widehat|angle|triangle|odot|circ|degree|cdot|times|parallel"
    r"|perp|cong|sim|q?quad|displaystyle|begin|end)(?![a-z])"
)
_TOKENS = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+")


def normalised(text: str) -> str:
    r"""Letters joined, numbers between spaces, nothing else: `Find $A B$ if x=3.5` → `findabifx 3.5 `.

    Compatibility characters become plain, case and tags of images go, and so do the LaTeX commands for which others
    write a sign or nothing (`\angle`, `\text`, `\left`). Spaces go because books and data sets differ in them
    (`A B`, `AB`).
    """
    plain = unicodedata.normalize("NFKC", _TAGS.sub(" ", text)).casefold()
    tokens = _TOKENS.findall(_LATEX.sub(" ", plain))
    return re.sub(" +", " ", "".join(f" {t} " if t[0].isdigit() else t for t in tokens))


def questions(sample: Sample) -> tuple[str, ...]:
    """What a sample asks, normalised: its question where the source kept it, else the user's turns.

    The choices after a question, and the hint that MathVista's released prompt begins with, are no part of it.
    """
    asked = sample.info.get("question")
    if isinstance(asked, str):
        turns = [asked]
    else:
        turns = [
            " ".join(part["text"] for part in message["content"] if part["type"] == "text")
            for message in sample.prompt()
            if message["role"] == "user"
        ]
    bare = (normalised(_CHOICES.sub("", _HINT.sub("", turn))) for turn in turns)
    return tuple(dict.fromkeys(text for text in bare if text))


def tells(text: str) -> bool:
    """Whether a normalised text says by itself which question it is.

    It does with 20 letters and digits and two different numbers, or with 100. A shorter question about a picture is
    asked about others too: `Find the area of the parallelogram. Round to the nearest tenth if necessary.` A Chinese
    character counts as three letters (length in UTF-8).
    """
    length = len(text.replace(" ", "").encode())
    numbers = {token for token in text.split() if token[0].isdigit()}
    return (length >= 20 and len(numbers) >= 2) or length >= 100


@dataclass(frozen=True, slots=True)
class Picture:
    """Hashes of one picture.

    Attributes:
        digest: SHA-256 of size and RGB pixels.
        hashes: pHash bits of the whole picture and the two inner ones, packed (3, 32); None without contrast.
    """

    digest: bytes
    hashes: np.ndarray | None


def hash_picture(source: Any) -> Picture:
    """Hashes of whatever a sample names an image by.

    Raises:
        BadImage: as `load_image`.
    """
    image = load_image(source)
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).digest()
    grey = image.convert("L").resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    if np.asarray(grey).std() < _LEAST_CONTRAST:
        return Picture(digest, None)
    rows = []
    for inset in _INSETS:
        low, high = inset * _THUMBNAIL, (1 - inset) * _THUMBNAIL
        inner = grey.resize((4 * _SIDE, 4 * _SIDE), Image.Resampling.LANCZOS, box=(low, low, high, high))
        rows.append(np.packbits(imagehash.phash(inner, _SIDE).hash))
    return Picture(digest, np.stack(rows))


@dataclass
class Fingerprints:
    """Hashes and texts of many samples.

    Attributes:
        ids: of the samples. origins: (source, index) that gives each sample again. texts: normalised questions of each.
        pictures: rows of `digests` and `hashes` of each; equal pictures share a row.
        bad: what could not be read; a sample whose picture is bad stays, with its text.
        total: samples looked at.
    """

    ids: list[str] = field(default_factory=list)
    origins: list[tuple[Sequence[Sample], int]] = field(default_factory=list)
    texts: list[tuple[str, ...]] = field(default_factory=list)
    pictures: list[tuple[int, ...]] = field(default_factory=list)
    digests: dict[bytes, int] = field(default_factory=dict)
    hashes: list[np.ndarray | None] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)
    total: int = 0

    def row(self, picture: Picture) -> int:
        """The row of a picture, a new one if it was not seen before."""
        row = self.digests.setdefault(picture.digest, len(self.hashes))
        if row == len(self.hashes):
            self.hashes.append(picture.hashes)
        return row


def fingerprint(
    sources: Iterable[Sequence[Sample]],
    *,
    jobs: int | None = None,
    skip_bad: bool = False,
    track: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
) -> Fingerprints:
    """Read all samples of all sources once; decoding and hashing release the interpreter, so threads do it.

    Args:
        sources: sequences of samples. jobs: threads; default the number of processors.
        skip_bad: go on after a sample or a picture that cannot be used, and list it.
        track: wraps (items, their number), to show progress.

    Raises:
        BadSample: the first that cannot be used, without `skip_bad`.
    """
    places = [(source, index) for source in sources for index in range(len(source))]
    known: dict[Any, Picture] = {}  # a picture that many samples name by the same path or bytes is decoded once

    def read(place: tuple[Sequence[Sample], int]) -> tuple[str, tuple[str, ...], list[Picture], list[BadSample]]:
        source, index = place
        try:
            sample = source[index]
        except BadSample as bad:
            return bad.id, (), [], [bad]
        pictures, bads = [], []
        for image in sample.images:
            try:
                key = _key(image)
                picture = known.get(key) or hash_picture(image)
            except BadImage as bad:
                bads.append(BadSample(sample.id, bad.reason, str(bad)))
                continue
            if key is not None:
                known[key] = picture
            pictures.append(picture)
        return sample.id, questions(sample), pictures, bads

    found = Fingerprints(total=len(places))
    pool = ThreadPoolExecutor(jobs or os.cpu_count())
    try:
        for place, (id, texts, pictures, bads) in zip(places, track(pool.map(read, places), len(places)), strict=True):
            if bads and not skip_bad:
                raise bads[0]
            found.bad += bads
            if bads and not (texts or pictures):
                continue
            found.ids.append(id)
            found.origins.append(place)
            found.texts.append(texts)
            found.pictures.append(tuple(found.row(picture) for picture in pictures))
    finally:
        pool.shutdown(cancel_futures=True)
    return found


@dataclass(slots=True)
class Match:
    """A sample of the benchmark and one of the training data that share something.

    Attributes:
        benchmark, train: positions in the two `Fingerprints`.
        distance: of their nearest pictures in bits, 0 to 256; None where the text alone is shared.
        exact: whether a picture is the same pixel by pixel. text: whether the question is the same.
    """

    benchmark: int
    train: int
    distance: int | None = None
    exact: bool = False
    text: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of `KINDS`; one of pictures at most."""
        image = () if self.distance is None else ("image_exact",) if self.exact else ("image_perceptual",)
        return (*image, "text") if self.text else image


@dataclass
class Overlap:
    """What was found.

    Attributes:
        train, benchmark: what was compared. threshold: of the perceptual hash, in bits.
        matches: in the order of the benchmark; nearest pictures first within a sample.
        general: samples of the benchmark that share nothing but a text that says too little (`tells`): not counted.
    """

    train: Fingerprints
    benchmark: Fingerprints
    threshold: int
    matches: list[Match]
    general: list[int]

    def leave_out(self) -> list[str]:
        """Ids of the benchmark that have a match."""
        return list(dict.fromkeys(self.benchmark.ids[m.benchmark] for m in self.matches))

    def records(self) -> Iterator[dict[str, Any]]:
        """One plain record per match."""
        for m in self.matches:
            ids = {"benchmark": self.benchmark.ids[m.benchmark], "train": self.train.ids[m.train]}
            yield ids | {"kinds": list(m.kinds), "distance": m.distance}

    def summary(self) -> dict[str, Any]:
        """Sizes, samples of the benchmark and pairs per kind, share of the benchmark, and what could not be read."""
        sides = {
            name: {
                "samples": side.total,
                "pictures": len(side.hashes),
                "bad": [{"id": b.id, "reason": b.reason, "detail": b.detail} for b in side.bad],
            }
            for name, side in (("train", self.train), ("benchmark", self.benchmark))
        }
        kinds = {}
        for kind in (*KINDS, "any"):
            pairs = [m for m in self.matches if kind in (*m.kinds, "any")]
            samples = len({m.benchmark for m in pairs})
            kinds[kind] = {"samples": samples, "share": samples / self.benchmark.total, "pairs": len(pairs)}
        return {**sides, "threshold": self.threshold, "kinds": kinds, "general_text_only": len(self.general)}


def find_overlap(train: Fingerprints, benchmark: Fingerprints, *, threshold: int = THRESHOLD) -> Overlap:
    """Every pair of samples that share a picture or a question.

    Args:
        train, benchmark: what to compare. threshold: largest distance of two pictures that are taken for copies, in
            bits.

    Raises:
        ValueError: a threshold out of range.
    """
    if not 0 <= threshold < BITS // 2:
        raise ValueError(
            f"threshold must be 0 to {BITS // 2 - 1} bits (unrelated pictures differ in half), got {threshold}"
        )
    pairs: dict[tuple[int, int], Match] = {}
    showing, shown = _inverted(train.pictures), _inverted(benchmark.pictures)
    equal = [(row, benchmark.digests[d], 0) for d, row in train.digests.items() if d in benchmark.digests]
    equal = [found for found in equal if train.hashes[found[0]] is not None]
    for exact, found in ((True, equal), (False, _near(train.hashes, benchmark.hashes, threshold))):
        for row, other, distance in found:
            for b, t in product(shown[other], showing[row]):
                match = pairs.setdefault((b, t), Match(b, t))
                match.exact |= exact
                match.distance = distance if match.distance is None else min(distance, match.distance)
    for (b, t), match in pairs.items():
        match.text = any(mine in other for mine in benchmark.texts[b] for other in train.texts[t])
    general = _match_texts(train, benchmark, pairs)
    matched = {b for b, _ in pairs}
    ordered = sorted(pairs.values(), key=lambda m: (m.benchmark, BITS if m.distance is None else m.distance, m.train))
    return Overlap(train, benchmark, threshold, ordered, sorted(general - matched))


def _match_texts(train: Fingerprints, benchmark: Fingerprints, pairs: dict[tuple[int, int], Match]) -> set[int]:
    """Add the pairs that share a text that tells; give the samples of the benchmark that share another."""
    asks, holds = _inverted(benchmark.texts), _inverted(train.texts)
    heads: dict[str, list[str]] = defaultdict(list)
    for wanted in asks:
        if len(wanted) >= _HEAD:
            heads[wanted[:_HEAD]].append(wanted)
    hits: dict[str, set[int]] = defaultdict(set)
    for text, samples in holds.items():
        within = {text} & asks.keys()  # shorter ones only as a whole
        for start in range(len(text) - _HEAD + 1):
            within.update(w for w in heads.get(text[start : start + _HEAD], ()) if text.startswith(w, start))
        for wanted in within:
            hits[wanted].update(samples)
    general: set[int] = set()
    for wanted, samples in hits.items():
        if not tells(wanted):
            general.update(asks[wanted])
            continue
        for b, t in product(asks[wanted], samples):
            pairs.setdefault((b, t), Match(b, t)).text = True
    return general


def _near(
    train: list[np.ndarray | None], benchmark: list[np.ndarray | None], threshold: int
) -> Iterator[tuple[int, int, int]]:
    """(row of train, row of benchmark, distance) of all pairs of pictures within the threshold."""
    # Of bits written as ±1 the inner product is BITS − 2 · distance, and products are what numpy is fastest at.
    (rows, left), (columns, right) = _stacked(train), _stacked(benchmark)
    for i, j in product(range(0, len(rows), _CHUNK), range(0, len(columns), _CHUNK)):
        many, few = _signs(left[i : i + _CHUNK]), _signs(right[j : j + _CHUNK])
        likeness = many[:, 0] @ few[:, 0].T
        for inner in range(1, len(_INSETS)):
            np.maximum(likeness, many[:, inner] @ few[:, 0].T, out=likeness)
            np.maximum(likeness, many[:, 0] @ few[:, inner].T, out=likeness)
        for p, q in np.argwhere(likeness >= BITS - 2 * threshold):
            yield rows[i + p], columns[j + q], int(BITS - likeness[p, q]) // 2


def _stacked(hashes: list[np.ndarray | None]) -> tuple[list[int], np.ndarray]:
    """Rows that have a hash, and these."""
    rows = [row for row, value in enumerate(hashes) if value is not None]
    return rows, np.array([hashes[row] for row in rows])


def _signs(packed: np.ndarray) -> np.ndarray:
    """Each bit as ±1."""
    return np.unpackbits(packed, axis=-1).astype(np.float32) * 2 - 1


def _inverted(values: Iterable[Iterable[Any]]) -> dict[Any, list[int]]:
    """Value → positions that have it."""
    positions: dict[Any, list[int]] = defaultdict(list)
    for index, several in enumerate(values):
        for value in dict.fromkeys(several):
            positions[value].append(index)
    return positions


def _key(image: Any) -> Any:
    """What tells that two samples name the same picture, before it is decoded; None where nothing does."""
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    return hashlib.sha256(image).digest() if isinstance(image, bytes) else None
