"""Causal language models that answer in words, on the eight commonsense benchmarks and on your own tasks."""

from typing import TYPE_CHECKING

from mtl_lora.systems import predictor_of

if TYPE_CHECKING:
    from mtl_lora.language.evaluate import Predictor

__all__ = ["Predictor"]
__getattr__ = predictor_of(__name__)
