"""Model families, one description file each; importing this package registers them."""

from . import autoencoder_kl, dit, unet_motion
from .family import Family, parts_of, supported
from .stages import Observer, Stage, execute

__all__ = [
    "Family",
    "Observer",
    "Stage",
    "autoencoder_kl",
    "dit",
    "execute",
    "parts_of",
    "supported",
    "unet_motion",
]
