"""What every PEFT method outside PEFT needs: registration, configuration, step and run events, reading and writing."""

from .config_fields import known_keywords
from .files import folder_replaced_at_once, process_runs, replace_file, sync
from .lora_optimizers import refuse_lora_optimizer
from .native import check_native_loads
from .offload import index_when_offloaded
from .registration import register_method
from .steps import StepListener, watch_steps
from .tied import TiesSavedModules
from .trainer import RunListener, watch_runs
from .weights import last_loaded_folder, save_config_at_once, write_weights_at_once

__all__ = [
    "RunListener",
    "StepListener",
    "TiesSavedModules",
    "check_native_loads",
    "folder_replaced_at_once",
    "index_when_offloaded",
    "known_keywords",
    "last_loaded_folder",
    "process_runs",
    "refuse_lora_optimizer",
    "register_method",
    "replace_file",
    "save_config_at_once",
    "sync",
    "watch_runs",
    "watch_steps",
    "write_weights_at_once",
]
