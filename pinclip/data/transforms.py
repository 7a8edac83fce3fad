"""Images to uint8 tensors. Randomness is passed in, so that a pin's crop is a function of its place alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class TrainTransform:
    """Random crop of area share [min_crop, 1] and aspect ratio [3/4, 4/3], resized to `size`; maybe mirrored;
    contrast, brightness and saturation each changed by up to the share `color_jitter`."""

    size: int
    min_crop: float = 1.0
    flip: bool = False
    color_jitter: float = 0.0

    @property
    def least_size(self) -> int:
        """An image of this many pixels a side is large enough for the smallest crop not to be enlarged."""
        return math.ceil(self.size / math.sqrt(self.min_crop))

    def __call__(self, image: Image.Image, random: np.random.Generator) -> torch.Tensor:
        """PIL RGB to uint8 [3, size, size]."""
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=self._box(image, random))
        if self.flip and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(image)
        if self.color_jitter:
            pixels = _jitter(pixels, self.color_jitter * (2 * random.random(3, np.float32) - 1))
        return _to_tensor(pixels)

    def _box(self, image: Image.Image, random: np.random.Generator) -> tuple[float, float, float, float]:
        width, height = image.size
        share, log_ratio, left, top = random.random(4)
        area = (self.min_crop + (1 - self.min_crop) * share) * width * height
        ratio = (4 / 3) ** (2 * log_ratio - 1) if self.min_crop < 1 else width / height
        crop_width = min((area * ratio) ** 0.5, width)
        crop_height = min((area / ratio) ** 0.5, height)
        left *= width - crop_width
        top *= height - crop_height
        return left, top, left + crop_width, top + crop_height


@dataclass(frozen=True)
class EvalTransform:
    """The whole image resized to `size`: items fill their frame, and a crop would lose part of them."""

    size: int

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """PIL RGB to uint8 [3, size, size]."""
        return _to_tensor(np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR)))


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3, H, W] to fp32 in [-1, 1], as SigLIP's towers expect."""
    return images.float() / 127.5 - 1.0


def _jitter(pixels: np.ndarray, change: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]; change = (contrast, brightness, saturation), each a share around 0."""
    contrast, brightness, saturation = change
    values = pixels * (1 + contrast) + 127.5 * (brightness - contrast)
    grey = values.mean(axis=2, keepdims=True)
    return np.clip(grey + (1 + saturation) * (values - grey), 0, 255).astype(np.uint8)


def _to_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
