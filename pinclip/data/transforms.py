"""Images to uint8 tensors. Randomness is passed in, so that a pin's crop is a function of its place alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class TrainTransform:
    """Random crop of area share [min_crop, 1] and aspect ratio [3/4, 4/3], resized to `size`; maybe mirrored."""

    size: int
    min_crop: float
    flip: bool

    def __call__(self, image: Image.Image, random: np.random.Generator) -> torch.Tensor:
        """PIL RGB to uint8 [3, size, size]."""
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=self._box(image, random))
        if self.flip and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _to_tensor(image)

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
        return _to_tensor(image.resize((self.size, self.size), Image.Resampling.BILINEAR))


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3, H, W] to fp32 in [-1, 1], as SigLIP's towers expect."""
    return images.float() / 127.5 - 1.0


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
