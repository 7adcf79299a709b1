"""The system ``dense``: one vision transformer that predicts several maps of an image, with a decoder per task."""

from typing import TYPE_CHECKING

from mtl_lora.systems import predictor_of

if TYPE_CHECKING:
    from mtl_lora.dense.evaluate import Predictor

__all__ = ["Predictor"]
__getattr__ = predictor_of(__name__)
