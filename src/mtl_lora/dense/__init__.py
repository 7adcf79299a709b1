"""A system: one vision transformer for several dense maps of an image, with a decoder per task."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtl_lora.dense.evaluate import Predictor

__all__ = ["Predictor"]


def __getattr__(name: str):
    # Loaded on first use, so that the flags of this package can be read without torch.
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mtl_lora.dense.evaluate import Predictor

    return Predictor
