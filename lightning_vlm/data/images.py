"""From whatever a sample names an image by to one upright RGB picture, or a reason why not."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000  # of a file, before any resizing: 8,000 x 8,000


class BadImage(ValueError):
    """An image that cannot be used.

    Attributes:
        reason: `missing_image` or `broken_image`.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def load_image(source: Any, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture as upright RGB: EXIF rotation applied, transparency put on white, the first frame of several.

    Args:
        source: a path, encoded bytes, a PIL image, or a zero-argument callable that returns one of them.
        max_pixels: the header of a file that claims more is not decoded (a small file can claim gigabytes).

    Raises:
        BadImage: no such file, an undecodable or truncated one, too many pixels, or something that is no image.
    """
    name = f"image {os.fspath(source)!r}" if isinstance(source, str | os.PathLike) else "image"
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise BadImage("missing_image", f"{name} is a link: download it first and give its path")
    try:
        if callable(source):
            source = source()
        if isinstance(source, str | os.PathLike):
            image = Image.open(source)
        elif isinstance(source, bytes | bytearray | memoryview):
            image = Image.open(io.BytesIO(source))
        elif isinstance(source, Image.Image):
            image = source
        else:
            kind = type(source).__name__
            raise BadImage("broken_image", f"{name} is a {kind}, not a path, encoded bytes or a PIL image")
        if image.width * image.height > max_pixels:
            raise BadImage(
                "broken_image",
                f"{name} has {image.width} x {image.height} pixels, more than {max_pixels:,}: scale it down",
            )
        image.load()
        return _rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        where = "" if isinstance(source, str | os.PathLike) else f" ({error.filename or error})"
        raise BadImage("missing_image", f"{name} does not exist{where}") from error
    except BadImage:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # What Pillow's decoders raise for damaged files.
        raise BadImage("broken_image", f"{name} cannot be decoded: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):  # 16-bit grey, which convert() would clip to white
        grey = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
