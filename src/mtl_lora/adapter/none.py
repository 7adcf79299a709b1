"""No adapter: only ``modules_to_save`` is trained, such as heads on a frozen base or, with ``["*"]``, every weight."""

from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.layer import AdapterLayer


class NoAdapterLayer(AdapterLayer):
    """y = W x + b: no layer gets an adapter, so target_modules, dropout, rank and alpha have no effect."""

    method, title = "none", "No adapter"
    adapts = False

    @staticmethod
    def shapes(config: AdapterConfig, k: int, d: int) -> dict[str, tuple[int, ...]]:
        return {}
