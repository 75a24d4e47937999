"""What every PEFT method outside PEFT needs: registration, configuration, step and run events, reading and writing."""

from importlib.metadata import PackageNotFoundError, version

from .adapter_file import AdapterFile, check_digest, check_known_fields, check_shapes, digest, read_adapter
from .atomic_files import folder_replaced_at_once, process_runs, replace_file, sync
from .config_base import MethodConfig, is_int, is_number, known_keywords
from .hotswap import allow_hotswap
from .load import check_native_loads
from .lora_optimizers import refuse_lora_optimizer
from .model_card import MethodCard, describe_in_cards, read_results, write_card
from .offload import index_when_offloaded
from .optimizer_steps import StepListener, watch_steps
from .quantised import keep_trainable_on_cpu
from .registration import register_method
from .trainer_runs import RunListener, watch_runs
from .tuner_base import Injection, MethodTuner
from .weights import last_loaded_folder, write_weights_at_once

try:
    __version__ = version("aslora-meft")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"

__all__ = [
    "AdapterFile",
    "Injection",
    "MethodCard",
    "MethodConfig",
    "MethodTuner",
    "RunListener",
    "StepListener",
    "allow_hotswap",
    "check_digest",
    "check_known_fields",
    "check_native_loads",
    "check_shapes",
    "describe_in_cards",
    "digest",
    "folder_replaced_at_once",
    "index_when_offloaded",
    "is_int",
    "is_number",
    "keep_trainable_on_cpu",
    "known_keywords",
    "last_loaded_folder",
    "process_runs",
    "read_adapter",
    "read_results",
    "refuse_lora_optimizer",
    "register_method",
    "replace_file",
    "sync",
    "watch_runs",
    "watch_steps",
    "write_card",
    "write_weights_at_once",
]
