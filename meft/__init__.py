"""MEFT: large sparse adapters beside each FFN, kept and updated in host memory (arXiv 2406.04984).

Importing this package makes PEFT know the method: `get_peft_model(model, MEFTConfig(...))`.
"""

from peft_bridge import __version__ as __version__
from peft_bridge import (
    check_native_loads,
    describe_in_cards,
    index_when_offloaded,
    refuse_lora_optimizer,
    register_method,
    write_weights_at_once,
)

from .config import MEFTConfig
from .files.adapter_file import FILE
from .files.card import CARD
from .files.export import export_dense
from .files.training_state import check_training_state
from .memory.config import TrainRowsConfig
from .memory.count import count_rows
from .memory.tasks import freeze_rows, list_tasks, select_task
from .model import MEFTModel, take_back
from .optim.row_adamw import RowAdamW
from .row_optimizer import RowOptimizerConfig
from .scaling import record_rows, scale_values
from .table.host_loading import host_storages_begin, host_storages_end  # noqa: F401  # names in optimizer.pt
from .table.moments import row_moments_of_file  # noqa: F401

register_method(name="meft", config_cls=MEFTConfig, model_cls=MEFTModel, prefix="meft_")
write_weights_at_once("meft_", load_on_host=True)
describe_in_cards("MEFT", CARD)
check_native_loads("meft_", lambda model, config, name, tensors: ({}, FILE.checked(config, tensors)), take_back)
index_when_offloaded("meft_")
refuse_lora_optimizer(
    "LoRA+",
    "meft_",
    "it raises the learning rate of LoRA's B alone, and MEFT has none; use AdamW, with a parameter group of its own "
    "for the values ('.meft_values.' in their names) where these shall learn faster.",
)
refuse_lora_optimizer(
    "LoRA-FA", "meft_", "MEFT's rows are updated by the rule of Adam or AdamW; use one of these, or meft.RowAdamW."
)

__all__ = [
    "MEFTConfig",
    "MEFTModel",
    "RowAdamW",
    "RowOptimizerConfig",
    "TrainRowsConfig",
    "check_training_state",
    "count_rows",
    "export_dense",
    "freeze_rows",
    "list_tasks",
    "record_rows",
    "scale_values",
    "select_task",
]
