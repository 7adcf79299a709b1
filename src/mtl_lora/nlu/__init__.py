"""The system ``nlu``: one encoder for many classification and regression tasks, with a head per task."""

from typing import TYPE_CHECKING

from mtl_lora.systems import predictor_of

if TYPE_CHECKING:
    from mtl_lora.nlu.evaluate import Predictor

__all__ = ["Predictor"]
__getattr__ = predictor_of(__name__)
