"""What every PEFT method outside PEFT needs: registration, optimizer-step events, run events, atomic files."""

from .files import folder_replaced_at_once, replace_file
from .offload import index_when_offloaded
from .registration import register_method
from .steps import StepListener, watch_steps
from .trainer import RunListener, watch_runs
from .weights import last_loaded_folder, save_config_at_once, write_weights_at_once

__all__ = [
    "RunListener",
    "StepListener",
    "folder_replaced_at_once",
    "index_when_offloaded",
    "last_loaded_folder",
    "register_method",
    "replace_file",
    "save_config_at_once",
    "watch_runs",
    "watch_steps",
    "write_weights_at_once",
]
