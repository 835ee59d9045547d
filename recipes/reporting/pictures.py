"""Pictures of a run inside of the page: smaller, and as text."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from pathlib import Path

from PIL import Image

__all__ = ["embedded"]

COLOURS = 256
"""Of an embedded picture, which makes it a quarter as large."""


def embedded(path: Path, width: int) -> tuple[str, int, int] | None:
    """Return a PNG as the address of itself, with its width and height; None if it is none.

    Args:
        path: the picture.
        width: pixels that are enough.
    """
    try:
        at = path.stat()
        return _embedded(path, width, at.st_mtime_ns, at.st_size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


@lru_cache(maxsize=256)
def _embedded(path: Path, width: int, *state: int) -> tuple[str, int, int]:
    with Image.open(path, formats=["PNG"]) as picture:
        rgb = Image.new("RGB", picture.size, "white")
        whole = picture.convert("RGBA")
        rgb.paste(whole, mask=whole.getchannel("A"))
    if rgb.width > width:
        size = width, max(1, round(rgb.height * width / rgb.width))
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    few = rgb.quantize(COLOURS, Image.Quantize.FASTOCTREE)  # keeps colours of few pixels
    few.save(file, "PNG", optimize=True)
    text = base64.b64encode(file.getvalue()).decode()
    return f"data:image/png;base64,{text}", rgb.width, rgb.height
