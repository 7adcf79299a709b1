"""No adapter: nothing but ``modules_to_save`` is trained, heads on a frozen base or, with ``["*"]``, every weight."""

from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.layer import AdapterLayer


class NoAdapterLayer(AdapterLayer):
    """y = W x + b: put on no layer, so target_modules and dropout are ignored, and rank and alpha mean nothing."""

    method, title = "none", "No adapter"
    adapts = False

    @staticmethod
    def shapes(config: AdapterConfig, k: int, d: int) -> dict[str, tuple[int, ...]]:
        return {}
