"""Images from paths, bytes, pictures and callables: upright RGB, or a reason why not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lightning_vlm.data.images import BadImage, load_image


def picture(width: int = 60, height: int = 50) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **more) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


def test_images_from_anything(tmp_path):
    original = picture()
    (tmp_path / "a.png").write_bytes(encoded(original))
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(original), original, lambda: original):
        assert np.array_equal(np.asarray(load_image(source)), np.asarray(original))


def test_images_become_upright_rgb_on_white():
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    assert list(load_image(encoded(clear)).get_flattened_data()) == [(255, 255, 255), (255, 0, 0)]
    deep = Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16))
    assert [p[0] for p in load_image(encoded(deep)).get_flattened_data()] == [0, 128, 255]
    exif = Image.Exif()
    exif[0x0112] = 6  # shot with the camera turned: shown rotated by 90 degrees
    assert load_image(encoded(picture(60, 50), "JPEG", exif=exif)).size == (50, 60)


def test_damaged_images(tmp_path):
    data = encoded(picture(), "JPEG")
    cases = {
        "broken_image": [data[: len(data) // 2], b"", encoded(Image.new("1", (9000, 9000)))],
        "missing_image": [tmp_path / "gone.png", "http://x.org/y.png", lambda: Image.open(tmp_path / "gone.png")],
    }
    for reason, sources in cases.items():
        for source in sources:
            with pytest.raises(BadImage) as error:
                load_image(source)
            assert error.value.reason == reason and "\n" not in str(error.value)
