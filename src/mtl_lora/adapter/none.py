"""No adapter: nothing but ``modules_to_save`` is trained, heads on a frozen base or, with ``["*"]``, every weight."""

from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.layer import AdapterLayer
from mtl_lora.errors import UserError


class NoAdapterLayer(AdapterLayer):
    """y = W x + b: put on no layer, so target_modules and dropout are ignored, and rank and alpha mean nothing."""

    method, title = "none", "No adapter"
    adapts = False

    @classmethod
    def check_config(cls, config: AdapterConfig) -> None:
        if not config.modules_to_save:
            raise UserError(
                "modules_to_save must be at least one module with the method none, which trains nothing else; "
                "'*' is every weight",
                "modules_to_save",
            )

    @staticmethod
    def shapes(config: AdapterConfig, k: int, d: int) -> dict[str, tuple[int, ...]]:
        return {}
