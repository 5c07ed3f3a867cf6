"""Images of rows, small enough to stand in a page that is one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.storage import files
from luthier.storage.images import MAX_PIXELS

SIDE = 160  # pixels of the longer one
MOST = 4  # images of a row


def thumbnails(paths: Any) -> list[str]:
    """data: addresses of the first images of a row; those that cannot be read are left out."""
    if not isinstance(paths, Sequence) or isinstance(paths, str):
        return []
    addresses = [thumbnail(path) for path in paths[:MOST] if isinstance(path, str)]
    return [address for address in addresses if address]


def thumbnail(path: str) -> str:
    """The data: address of a small copy of an image; "" where it cannot be read."""
    try:
        from PIL import Image

        with files.open_regular(Path(path)) as file, Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                return ""
            small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        content = io.BytesIO()
        small.save(content, "JPEG", quality=80)
    except Exception:  # no PIL, or whatever a file that calls itself an image makes it raise
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
