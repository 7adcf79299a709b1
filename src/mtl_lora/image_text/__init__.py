"""The system ``image_text``: a language model that also sees images, for questions and statements about them, and
captions."""

from typing import TYPE_CHECKING

from mtl_lora.systems import predictor_of

if TYPE_CHECKING:
    from mtl_lora.image_text.evaluate import Predictor

__all__ = ["Predictor"]
__getattr__ = predictor_of(__name__)
