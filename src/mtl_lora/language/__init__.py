"""Causal language models that answer in words: the eight commonsense benchmarks and one's own tasks."""

from typing import TYPE_CHECKING

from mtl_lora.systems import predictor_of

if TYPE_CHECKING:
    from mtl_lora.language.evaluate import Predictor

__all__ = ["Predictor"]
__getattr__ = predictor_of(__name__)
