"""What every PEFT method outside PEFT needs: registration, configuration, step and run events, reading and writing."""

from importlib.metadata import PackageNotFoundError, version

from .files.atomic_files import folder_replaced_at_once, process_runs, replace_file, sync
from .files.model_card import MethodCard, describe_in_cards, read_results, write_card
from .files.weights import last_loaded_folder, write_weights_at_once
from .integrations.hotswap import allow_hotswap
from .integrations.load import check_native_loads
from .integrations.lora_optimizers import refuse_lora_optimizer
from .integrations.offload import index_when_offloaded
from .method.adapter_file import AdapterFile, check_digest, check_known_fields, check_shapes, digest, read_adapter
from .method.config_base import MethodConfig, is_int, is_number, known_keywords
from .method.quantised import keep_trainable_on_cpu
from .method.registration import register_method
from .method.tuner_base import Injection, MethodTuner
from .training.deepspeed_engines import EngineFollower, EngineOptimizer, group_of_each
from .training.last_ranks import StateOfLastRanks
from .training.optimizer_steps import StepListener, watch_steps
from .training.trainer_runs import RunListener, watch_runs
from .training.uneven_inputs import JoinFollower, follow_joins

try:
    __version__ = version("aslora-meft")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"

__all__ = [
    "AdapterFile",
    "EngineFollower",
    "EngineOptimizer",
    "Injection",
    "JoinFollower",
    "MethodCard",
    "MethodConfig",
    "MethodTuner",
    "RunListener",
    "StateOfLastRanks",
    "StepListener",
    "allow_hotswap",
    "check_digest",
    "check_known_fields",
    "check_native_loads",
    "check_shapes",
    "describe_in_cards",
    "digest",
    "folder_replaced_at_once",
    "follow_joins",
    "group_of_each",
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
