"""Image tower, text tower, fusion: `PinCLIP(images, tokens, ...) -> Embeddings(image, text, fused)`."""

from pinclip.models.folder import load_model, save_model
from pinclip.models.fusion import FusionConfig
from pinclip.models.image_tower import ImageTowerConfig
from pinclip.models.pinclip import Embeddings, PinCLIP, PinCLIPConfig
from pinclip.models.text_tower import TextTowerConfig

__all__ = [
    "Embeddings",
    "FusionConfig",
    "ImageTowerConfig",
    "PinCLIP",
    "PinCLIPConfig",
    "TextTowerConfig",
    "load_model",
    "save_model",
]
