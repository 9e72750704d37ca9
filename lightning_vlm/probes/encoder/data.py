"""Pictures to probe encoders with: single figures and scenes of the embedded world, image folders, ADE20K's layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from lightning_vlm.data.schema import Sample
from lightning_vlm.data.sources.spec import one_of
from lightning_vlm.data.world import WorldSource, picture
from lightning_vlm.data.world.families import HELD_OUT_PAIRS
from lightning_vlm.data.world.scene import GRID, Figure, Scene
from lightning_vlm.models.embedded import COLOURS, PLURALS, SHAPES

WORLD_TASKS = ("pair", "colour", "shape")
HELD_OUT = tuple(f"{COLOURS[colour]} {SHAPES[shape]}" for colour, shape in HELD_OUT_PAIRS)
NOISE = 60.0  # levels of 255; see `world_classes`
Masks = Callable[[], tuple[Sequence[str], np.ndarray]]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm")
_TEST_NAMES = ("val", "validation", "test")
_TEST_SHARE = 0.2  # of an image folder without a split of its own


@dataclass(frozen=True)
class Picture:
    """One picture, and what is known of it.

    Attributes:
        id: unique within its data.
        image: what `load_image` takes.
        label: its class, where it has one.
        masks: → class names of the objects, [objects, H, W] bool; of any size in the picture's proportions.
    """

    id: str
    image: Any
    label: str | None = None
    masks: Masks | None = None


@dataclass(frozen=True)
class ProbeData:
    """Pictures to fit a probe on, and others to judge it by.

    Attributes:
        name: for reports. train, test: no picture is in both.
    """

    name: str
    train: Sequence[Picture]
    test: Sequence[Picture]


# --- the embedded world ----------------------------------------------------------------------------------------------


def world_classes(
    task: str = "pair", *, train: int = 1200, test: int = 1200, noise: float = NOISE, seed: int = 0
) -> ProbeData:
    """Pictures of a single figure of the embedded world, all classes equally often; no picture comes twice.

    The three pairs of colour and shape that the world's training splits never show (`HELD_OUT`) are classes like any.

    Args:
        task: `pair` (24 classes of colour and shape), `colour` (6) or `shape` (4).
        train, test: pictures of each side, rounded up to whole pictures per pair; 3456 there are in all.
        noise: standard deviation of grey noise on every value of every pixel, of 255 levels. Without it the pictures
            are so clean that random weights tell the classes, and no encoder from another.
        seed: of cells, offsets and noise.

    Raises:
        ValueError: an unknown task, more pictures than there are, or a negative noise.
    """
    if task not in WORLD_TASKS:
        raise ValueError(f"the world has no task {task!r}{one_of(task, WORLD_TASKS)}")
    pairs = [(colour, shape) for colour in range(len(COLOURS)) for shape in range(len(SHAPES))]
    each = {"train": -(-train // len(pairs)), "test": -(-test // len(pairs))}
    places = [(cell, dx, dy) for cell in range(GRID * GRID) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
    if min(each.values()) < 1 or sum(each.values()) > len(places):
        raise ValueError(
            f"train and test are {train} and {test}: single figures have {len(places) * len(pairs)} pictures, and each "
            "side needs one at least"
        )
    found: dict[str, list[Picture]] = {"train": [], "test": []}
    for colour, shape in pairs:
        drawn = Random(f"probe/{seed}/{colour}/{shape}").sample(places, sum(each.values()))
        for n, (cell, dx, dy) in enumerate(drawn):
            figure = Figure(colour, shape, cell, dx, dy)
            side = "train" if n < each["train"] else "test"
            label = {"pair": figure.name, "colour": COLOURS[colour], "shape": SHAPES[shape]}[task]
            id = f"{figure.name} {cell} {dx} {dy}"
            shown = noisy(partial(picture, Scene(figures=(figure,))), noise, f"{seed}/{id}")
            found[side].append(Picture(id, shown, label))
    return ProbeData(f"world, single figures, {task}", found["train"], found["test"])


def world_segments(
    *, split: str = "test", train: int = 600, test: int = 300, noise: float = NOISE, seed: int = 0
) -> ProbeData:
    """Scenes of the embedded world with the masks of their objects; classes are figures, bars and `label`.

    The probe is fitted on `val`, which no model is trained on. The pairs of `HELD_OUT` are not there, so that they are
    no classes of it.

    Args:
        split: of the pictures that the probe is judged by.
        train, test: pictures of each side. noise: as for `world_classes`. seed: of the world and the noise.

    Raises:
        ValueError: an unknown split, or the one that the probe is fitted on.
    """
    if split == "val":
        raise ValueError("split is 'val': the probe is fitted on it, give another one to judge it by")
    sides = []
    for name, size in (("val", train), (split, test)):
        source = WorldSource(split=name, size=size, seed=seed, questions_per_image=1)
        sides.append(
            [Picture(s.id, noisy(s.images[0], noise, f"{seed}/{s.id}"), masks=s.info["masks"]) for s in source]
        )
    return ProbeData(f"world:{split}", *sides)


def noisy(shown: Callable[[], Image.Image], sigma: float, key: str) -> Callable[[], Image.Image]:
    """A picture with Gaussian noise of `sigma` of 255 levels on each value, always the same for one key.

    Raises:
        ValueError: a negative or infinite sigma.
    """
    if not 0 <= sigma < float("inf"):
        raise ValueError(f"noise is {sigma:g}: it must be at least 0, in levels of 255")
    return partial(_noisy, shown, sigma, key) if sigma else shown


def _noisy(shown: Callable[[], Image.Image], sigma: float, key: str) -> Image.Image:
    clean = np.asarray(shown(), np.float64)
    drawn = np.random.default_rng(list(blake2b(key.encode(), digest_size=16).digest())).normal(0, sigma, clean.shape)
    return Image.fromarray((clean + drawn).round().clip(0, 255).astype(np.uint8))


def world_questions(
    *, split: str = "test", size: int = 200, families: Sequence[str] | None = None, seed: int = 0
) -> list[Sample]:
    """Questions about pictures of the embedded world, one each, with gold answers and the objects' masks.

    Args:
        split, families: as the world has them; None takes all families of the split.
        size: how many. seed: of the world.

    Raises:
        ValueError: an unknown split or family.
    """
    return list(WorldSource(split=split, size=size, seed=seed, families=families, questions_per_image=1))


def asked_about(sample: Sample) -> tuple[Sequence[str], np.ndarray]:
    """The objects that a question of the world is about, as `Sample.info["masks"]` gives them.

    Counting asks about the figures that count, bars about those it names, angles and sides about what is written,
    captions about all. There may be none: no red shapes.

    Raises:
        ValueError: a sample without masks.
    """
    if "masks" not in sample.info:
        raise ValueError(f"sample {sample.id} has no masks of its objects: only the embedded world's samples have")
    names, masks = sample.info["masks"]()
    if sample.info["family"] not in ("count", "bars"):
        return names, masks
    words = " ".join(part.get("text", "") for part in sample.prompt()[-1]["content"]).strip("?").split()
    colours = [colour for colour in COLOURS if colour in words]
    shapes = [shape for shape, plural in zip(SHAPES, PLURALS, strict=True) if plural in words]
    named = [name.split() for name in names]
    chosen = [
        n
        for n, (colour, shape) in enumerate(named)
        if (not colours or colour in colours) and (not shapes or shape in shapes)
    ]
    return [names[n] for n in chosen], masks[chosen]


# --- folders ---------------------------------------------------------------------------------------------------------


def image_folder(root: str | Path, *, train: int | None = None, test: int | None = None, seed: int = 0) -> ProbeData:
    """A folder of pictures by class: `root/train/CLASS/*` and `root/val/CLASS/*`, or `root/CLASS/*`.

    Without folders of its own a fifth of the pictures are for the test, by a hash of their names.

    Args:
        root: the folder. train, test: at most so many pictures of each side, classes in turn; None takes all.
        seed: of which pictures those are.

    Raises:
        ValueError: no such folder, fewer than two classes, or classes of the test that training lacks.
    """
    root = _folder(root)
    test_root = next((root / name for name in _TEST_NAMES if (root / name).is_dir()), None)
    if (root / "train").is_dir() and test_root is not None:
        sides = [_classes(root / "train"), _classes(test_root)]
    elif (root / "train").is_dir():
        raise ValueError(f"{root} has a folder train, but none of {', '.join(_TEST_NAMES)}: the probe needs a test")
    else:
        whole = _classes(root)
        sides = [
            {label: [file for file in files if _is_test(root, file) == test] for label, files in whole.items()}
            for test in (False, True)
        ]
    sides = [{label: files for label, files in side.items() if files} for side in sides]
    if len(sides[0]) < 2:
        raise ValueError(
            f"{root} has {len(sides[0])} classes with pictures to fit on, and a probe needs two: the layout is "
            "train/CLASS/*.png and val/CLASS/*.png, or CLASS/*.png"
        )
    if odd := sorted(sides[1].keys() - sides[0].keys()):
        raise ValueError(f"{root}: class {odd[0]!r} is in the test but not in training")
    if not sides[1]:
        raise ValueError(f"{root} has no pictures to judge the probe by: give val/CLASS/*.png, or more pictures")
    found = []
    for side, limit in zip(sides, (train, test), strict=True):
        shuffled = {label: Random(f"{seed}/{label}").sample(files, len(files)) for label, files in side.items()}
        turns = [
            Picture(str(file.relative_to(root)), str(file), label)
            for turn in range(max(map(len, shuffled.values())))
            for label, files in shuffled.items()
            for file in files[turn : turn + 1]
        ]
        found.append(turns[:limit])
    return ProbeData(str(root), *found)


def segment_folder(root: str | Path, *, train: int | None = None, test: int | None = None, seed: int = 0) -> ProbeData:
    """Pictures with a map of classes, in ADE20K's layout.

    `images/training/X.jpg` has `annotations/training/X.png`, whose pixels are class numbers, 0 being nothing; the same
    for `validation`.

    Args:
        root: the folder. train, test: at most so many pictures of each side; None takes all.
        seed: of which pictures those are.

    Raises:
        ValueError: no such folder, one of another layout, or a picture without a map.
    """
    root = _folder(root)
    found = []
    for side, limit in (("training", train), ("validation", test)):
        images, maps = root / "images" / side, root / "annotations" / side
        for place in (images, maps):
            if not place.is_dir():
                raise ValueError(
                    f"{root} has no masks as this probe reads them: {place.relative_to(root)} is missing (the layout "
                    "is images/training, annotations/training, images/validation, annotations/validation)"
                )
        files = _pictures(images)
        if not files:
            raise ValueError(f"{images} has no pictures ({', '.join(_SUFFIXES)})")
        if missing := [file for file in files if not (maps / f"{file.stem}.png").is_file()]:
            raise ValueError(f"{missing[0]} has no map of classes: {maps / missing[0].stem}.png is missing")
        files = Random(f"{seed}/{side}").sample(files, len(files))[:limit]
        found.append([Picture(f.stem, str(f), masks=partial(_from_map, maps / f"{f.stem}.png")) for f in files])
    return ProbeData(str(root), *found)


def _from_map(file: Path) -> tuple[list[str], np.ndarray]:
    """Class numbers as names, [classes, H, W] bool."""
    classes = np.asarray(Image.open(file))
    if classes.ndim != 2:
        raise ValueError(f"{file} is no map of classes: its pixels have {classes.shape[-1]} channels, give one number")
    present = [int(value) for value in np.unique(classes) if value]
    return [str(value) for value in present], classes[None] == np.array(present, classes.dtype)[:, None, None]


def _folder(root: str | Path) -> Path:
    place = Path(root).expanduser()
    if not place.is_dir():
        raise ValueError(f"data folder {str(root)!r} does not exist")
    return place


def _classes(root: Path) -> dict[str, list[Path]]:
    return {place.name: _pictures(place) for place in sorted(root.iterdir()) if place.is_dir()}


def _pictures(place: Path) -> list[Path]:
    return sorted(file for file in place.iterdir() if file.suffix.lower() in _SUFFIXES)


def _is_test(root: Path, file: Path) -> bool:
    digest = blake2b(str(file.relative_to(root)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < _TEST_SHARE * 2**64
