"""MEFT: large sparse adapters beside each FFN, kept and updated in host memory (arXiv 2406.04984).

Importing this package makes PEFT know the method: `get_peft_model(model, MEFTConfig(...))`.
"""

from peft_bridge import register_method, write_weights_at_once

from .config import MEFTConfig
from .export import export_dense, export_resident, load_resident
from .host_loading import host_storages_begin, host_storages_end  # noqa: F401  # names in optimizer.pt
from .model import MEFTModel
from .moments import row_moments_of_file  # noqa: F401
from .optim import RowAdamW

register_method(name="meft", config_cls=MEFTConfig, model_cls=MEFTModel, prefix="meft_")
write_weights_at_once("meft_", load_on_host=True)

__all__ = ["MEFTConfig", "MEFTModel", "RowAdamW", "export_dense", "export_resident", "load_resident"]
