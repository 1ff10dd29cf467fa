"""Picture files for the tests of folders."""

from __future__ import annotations

import numpy as np
from PIL import Image


def picture(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array))
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOUR = np.stack([GREY, GREY.T, 255 - GREY], axis=-1)


def damaged(folder):
    """Four files that no decoder can use, and a good one; the names of the four."""
    good = picture(folder / "good.png", GREY)
    (folder / "cut.png").write_bytes(good.read_bytes()[:50])
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.webp").write_bytes(b"")
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return ["cut.png", "empty.webp", "moving.gif", "text.jpg"]
