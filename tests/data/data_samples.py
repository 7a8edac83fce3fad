"""Small pictures, tars and samples."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def picture(color, size=(8, 6), fmt="PNG", **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, fmt, **options)
    return buffer.getvalue()


def noise(seed, size=64, fmt="JPEG"):
    """A picture that does not compress to nothing, so that cutting it loses pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, fmt)
    return buffer.getvalue()


def write_tar(path, members):
    """members: (name, bytes) in order."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def sample(key, color="red", text=None, **record):
    """The members of one img2dataset sample."""
    members = [(f"{key}.png", picture(color))]
    if text is not None:
        members.append((f"{key}.txt", text.encode()))
    if record:
        members.append((f"{key}.json", json.dumps(record).encode()))
    return members


COLORS = ("red", "green", "blue", "yellow", "cyan", "magenta")
