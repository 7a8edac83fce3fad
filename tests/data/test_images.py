"""Decoding: every kind of picture comes out as upright RGB on white, every damaged one as a reason."""

import io

import numpy as np
import pytest
from data_samples import noise, picture
from PIL import Image

from pinclip.data import images
from pinclip.data.images import decode
from pinclip.errors import DataError


def encoded(image, fmt, **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the left half becomes the top
    turned = decode(encoded(image, "JPEG", exif=exif, quality=95))
    assert turned.size == (20, 40)
    pixels = np.asarray(turned, int)
    assert pixels[5, 10, 1] < 40
    assert pixels[35, 10, 1] > 215


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode):
    image = Image.new("RGBA", (4, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    if mode == "P":  # palettes have transparency of all or nothing here
        image = Image.new("P", (4, 1), 0)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.putpixel((1, 0), 1)
        data = encoded(image, "PNG", transparency=0)
        expected = [255, 0, 255, 255]
    else:
        data = encoded(image.convert(mode), "PNG")
        expected = [255, 0, 127, 255]
    decoded = decode(data)
    assert decoded.mode == "RGB"
    assert np.asarray(decoded)[0, :, 0].tolist() == expected


def test_sixteen_bit_grey_keeps_its_tones():
    grey = Image.fromarray(np.array([[0, 256 * 100, 65535]], np.uint16))
    assert np.asarray(decode(encoded(grey, "PNG")))[0, :, 1].tolist() == [0, 100, 255]


@pytest.mark.parametrize(("mode", "fmt"), [("CMYK", "JPEG"), ("L", "PNG"), ("1", "PNG"), ("RGB", "WEBP")])
def test_other_modes_become_rgb(mode, fmt):
    decoded = decode(encoded(Image.new("RGB", (5, 7), "white").convert(mode), fmt))
    assert (decoded.mode, decoded.size) == ("RGB", (5, 7))
    assert np.asarray(decoded).min() > 250


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((0, 0)) == (255, 0, 0)


def test_at_least_shrinks_a_jpeg_but_not_below():
    data = picture("red", (800, 400), "JPEG")
    assert decode(data).size == (800, 400)
    small = decode(data, at_least=64)
    assert min(small.size) >= 64
    assert small.width < 800


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_a_truncated_image_is_an_error(fmt, share):
    data = noise(0, 64, fmt)
    decode(data)
    with pytest.raises(DataError) as caught:
        decode(data[: int(share * len(data))])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "no bytes"), (b"<html>404</html>", "not an image"), (b"\0" * 5000, "not an image")],
)
def test_what_is_no_image_is_an_error(data, reason):
    with pytest.raises(DataError, match=reason):
        decode(data)


def test_too_many_pixels_are_an_error(monkeypatch):
    monkeypatch.setattr(images, "MOST_PIXELS", 47)
    with pytest.raises(DataError, match="more than 47 pixels"):
        decode(picture("red", (8, 6)))


def test_pil_own_limit_is_an_error_too(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match="pixels"):
        decode(picture("red", (8, 6)))


def test_large_images_of_an_import_warn_of_nothing(monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with images.without_size_warnings():
        decode(picture("red", (8, 6)))
    assert not recwarn.list
    decode(picture("red", (8, 6)))
    assert len(recwarn.list) == 1
