"""What every PEFT method outside PEFT needs: registration, optimizer-step events, run events, atomic files."""

from .files import folder_replaced_at_once, replace_file
from .registration import register_method
from .steps import StepListener, watch_steps
from .trainer import RunListener, watch_runs

__all__ = [
    "RunListener",
    "StepListener",
    "folder_replaced_at_once",
    "register_method",
    "replace_file",
    "watch_runs",
    "watch_steps",
]
