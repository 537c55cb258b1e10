"""Images of any file as 8-bit RGB: scaled where a file stores more bits, refused where it does not say what white is.

Here: what `training` and `measure` both read image files by. H x W pixels.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

DEEP = ("I;16", "I;16B", "I;16L", "I;16N")  # grey of 16 bits
FIXED_RANGE = (
    "PNG",
    "PPM",
)  # what Pillow opens of them in mode "I" spans 0..65535 (Pillow < 11, or a PGM of more than 8 bits)
_BITS, _PHOTOMETRIC = 258, 262  # TIFF tags
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@contextmanager
def named(what: str) -> Iterator[None]:
    """Whatever goes wrong inside with an image file is a ValueError that names `what`: the file, or the row of a table."""
    try:
        yield
    except BROKEN as error:
        raise ValueError(f"{what} cannot be read as an image: {error}") from error


def rgb(image: Image.Image) -> Image.Image:
    """Any PIL image -> mode RGB, transparency on white. 16-bit grey is scaled, `round(255 v / 65535)`: Pillow's own conversion cuts at 255.

    Raises:
        ValueError: a mode without a fixed range (32-bit integers, floating point) or that Pillow cannot convert.
    """
    if image.mode in DEEP or (image.mode == "I" and image.format in FIXED_RANGE):
        image = _shallow(image)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are of mode {image.mode!r} (32 bits), which does not say what white is, expected 8 or 16 bits a channel"
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _shallow(image: Image.Image) -> Image.Image:
    """16-bit grey -> L, or LA where one value is transparent (PNG's tRNS)."""
    values, white = np.asarray(image).astype(np.int64), 65535
    if image.format == "TIFF":
        white = 2 ** image.tag_v2[_BITS][0] - 1  # 12 bits come in this mode, too
        if image.tag_v2.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow turns round for 8 bits only
            values = white - values
    grey = Image.fromarray(((255 * values + white // 2) // white).astype(np.uint8))
    if "transparency" not in image.info:
        return grey
    alpha = Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))
