"""Losses over the batch of all ranks: gather, call a pair loss of `pinclip.ops`, average.

Usable without DeepSpeed and without a process group. The averaging is stated in `pinclip.distributed`.
"""

from pinclip.losses.clip import ClipLoss, SigLipLoss
from pinclip.losses.image_text import ImageTextLoss
from pinclip.losses.neighbor import NeighborLoss
from pinclip.losses.temperature import Temperature

__all__ = ["ClipLoss", "ImageTextLoss", "NeighborLoss", "SigLipLoss", "Temperature"]
