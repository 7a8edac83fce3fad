"""Encoded image bytes to RGB pixels, one way for import, training, evaluation and the report."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

from PIL import Image, ImageOps

from pinclip.errors import DataError

# 200 MB as RGBA; what is larger is a print poster or an attack, and several are decoded at a time.
MOST_PIXELS = 50_000_000


@contextlib.contextmanager
def without_size_warnings() -> Iterator[None]:
    """Silence PIL's warning of large images, which `decode` refuses anyway, in all threads meanwhile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def decode(data: bytes, at_least: int | None = None) -> Image.Image:
    """Decode `data` to an RGB image: EXIF orientation applied, transparency laid on white.

    `at_least`: the caller will shrink the image to this many pixels or fewer a side, so a JPEG may be
    decoded at 1/2, 1/4 or 1/8 of its size, several times faster, while both sides stay at least that long.
    Of an animation the first frame counts. Raises `DataError` with the reason (no file name: the caller
    knows it) for anything that is not a whole image.
    """
    if not data:
        raise DataError("the image has no bytes")
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MOST_PIXELS:
            raise Image.DecompressionBombError
        if at_least is not None:
            image.draft("RGB", (at_least, at_least))
        image.load()
        return _upright_rgb(image)
    except Image.UnidentifiedImageError:
        raise DataError("not an image in a known format") from None
    except Image.DecompressionBombError:
        raise DataError(f"more than {MOST_PIXELS:,} pixels") from None
    except Exception as error:  # PIL's decoders raise almost any type on damaged bytes
        raise DataError(f"damaged or truncated image ({error or type(error).__name__})") from None


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        # PIL would clip 16-bit grey to white; the eight high bits are the picture.
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")
