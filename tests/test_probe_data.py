"""Pictures to probe with: single figures, folders of classes, ADE20K's layout."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lightning_vlm.probes.encoder import (
    Picture,
    ProbeData,
    image_folder,
    load_encoder,
    segment_folder,
    segmentation_probe,
    world_classes,
)
from lightning_vlm.probes.encoder.data import noisy


def test_single_figures():
    """24 classes alike, no picture on both sides or twice; noise is drawn anew for each and always the same."""
    data = world_classes(train=48, test=72, seed=3)
    ids = [p.id for side in (data.train, data.test) for p in side]
    assert len(ids) == len(set(ids)) == 120
    for side, each in ((data.train, 2), (data.test, 3)):
        labels = [p.label for p in side]
        assert len(set(labels)) == 24 and all(labels.count(label) == each for label in labels)
    assert {p.label for p in world_classes("shape", train=24, test=24).train} == {
        "circle",
        "square",
        "triangle",
        "cross",
    }
    again = world_classes(train=48, test=72, seed=3)
    pixels = [np.asarray(p.image()) for p in (data.train[0], again.train[0], data.train[1])]
    assert (pixels[0] == pixels[1]).all() and (pixels[0] != pixels[2]).any()
    clean = np.asarray(world_classes(train=48, test=72, noise=0, seed=3).train[0].image()).astype(float)
    grey = np.full((64, 64, 3), 128, np.uint8)
    drawn = np.asarray(noisy(lambda: Image.fromarray(grey), 10.0, "k")()).astype(float) - 128
    assert abs(drawn.std() - 10) < 0.3 and abs(drawn.mean()) < 0.3 and (clean != pixels[0]).mean() > 0.4
    with pytest.raises(ValueError, match="no task 'pairs'; did you mean 'pair'"):
        world_classes("pairs")
    with pytest.raises(ValueError, match="single figures have 3456 pictures"):
        world_classes(train=3000, test=3000)
    with pytest.raises(ValueError, match="noise is -1"):
        world_classes(noise=-1)


def test_image_folders(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(3):
                Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{n}.png")
    data = image_folder(tmp_path)
    assert [len(data.train), len(data.test)] == [6, 6]
    assert {(p.id.split("/")[0], p.label) for p in data.train} == {("train", "cat"), ("train", "dog")}
    assert sorted(p.label for p in image_folder(tmp_path, train=2, test=2).train) == ["cat", "dog"]
    flat = tmp_path / "flat"
    for name in ("a", "b"):
        (flat / name).mkdir(parents=True)
        for n in range(60):
            (flat / name / f"{n}.png").touch()
    data = image_folder(flat)
    assert len(data.train) + len(data.test) == 120 and 10 < len(data.test) < 40
    assert not {p.id for p in data.train} & {p.id for p in data.test}
    (tmp_path / "val/cow").mkdir()
    (tmp_path / "val/cow/0.png").touch()
    with pytest.raises(ValueError, match="class 'cow' is in the test but not in training"):
        image_folder(tmp_path)
    with pytest.raises(ValueError, match="has 0 classes with pictures to fit on"):
        image_folder(flat / "a")
    with pytest.raises(ValueError, match="'nowhere' does not exist"):
        image_folder("nowhere")


def test_ade20k_layout(tmp_path):
    """Colour tells the class of each half of a picture: everything is found; maps may be larger than the patches."""
    rng = np.random.default_rng(0)
    for side, count in (("training", 60), ("validation", 20)):
        (tmp_path / "images" / side).mkdir(parents=True)
        (tmp_path / "annotations" / side).mkdir(parents=True)
        for n in range(count):
            classes = np.kron(rng.integers(0, 4, (2, 2)), np.ones((48, 48), int)).astype(np.uint8)
            colours = np.array([(240, 240, 240), (220, 20, 20), (20, 200, 20), (20, 20, 220)], np.uint8)
            Image.fromarray(colours[classes]).save(tmp_path / "images" / side / f"{n}.png")
            Image.fromarray(classes).save(tmp_path / "annotations" / side / f"{n}.png")
    data = segment_folder(tmp_path, train=50)
    assert [len(data.train), len(data.test)] == [50, 20]
    names, masks = data.train[0].masks()
    assert names == sorted(names) and "0" not in names and masks.shape == (len(names), 96, 96)
    found = segmentation_probe(load_encoder("embedded:llava-tiny"), data, seeds=(0,), steps=300)
    assert found.recall > 0.95 and found.iou > 0.9 and found.classes == ["1", "2", "3"] and found.patches == (4, 4)
    (tmp_path / "annotations/validation/3.png").unlink()
    with pytest.raises(ValueError, match=r"3\.png has no map of classes"):
        segment_folder(tmp_path)
    with pytest.raises(ValueError, match=r"has no masks as this probe reads them: images.training is missing"):
        segment_folder(tmp_path / "images")
    with pytest.raises(ValueError, match="cover is 0"):
        segmentation_probe(None, data, cover=0)
    with pytest.raises(ValueError, match="picture p has no masks"):
        segmentation_probe(None, ProbeData("x", [Picture("p", None)], []))
