"""axolotl's plug-in: `adapter: aslora` and `adapter: meft` in its YAML files. See docs/integrations.md.

The method's fields stand in a block of its name:

    plugins:
      - aslora_meft.plugins.axolotl.AsloraMeftPlugin
    adapter: meft
    meft:
      r: 6400
      top_k: 64
"""

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel, Field, model_validator
from transformers import set_seed

from aslora import ASLoRAConfig
from meft import MEFTConfig

CONFIGS: dict[str, type[PeftConfig]] = {"aslora": ASLoRAConfig, "meft": MEFTConfig}
# axolotl's own fields for LoRA: in a YAML file that was written for LoRA they would be read by nobody.
_LORA_FIELDS = ("lora_r", "lora_alpha", "lora_target_modules", "lora_target_linear", "lora_modules_to_save")


def config_of(cfg: Any) -> PeftConfig:
    """The adapter's configuration that a run of axolotl asks for.

    Args:
        cfg: axolotl's configuration, whose `adapter` is one of `CONFIGS`.

    Raises:
        ValueError: a field is unknown or has a wrong value.
    """
    method = cfg.adapter
    for name in (*_LORA_FIELDS, *(other for other in CONFIGS if other != method)):
        if value := getattr(cfg, name, None):
            raise ValueError(
                f"{name}={value!r} has no effect with adapter: {method}: remove it, and put the method's own fields "
                f"into the block `{method}:`."
            )
    task = "SEQ_CLS" if getattr(cfg, "reward_model", None) else "CAUSAL_LM"
    try:
        return CONFIGS[method](**{"task_type": task, **(getattr(cfg, method, None) or {})})
    except TypeError as error:  # an unknown field
        raise ValueError(f"{method}: {error}") from error


class MethodArguments(BaseModel):
    """The blocks that the plug-in adds to axolotl's YAML, checked before a model is loaded."""

    aslora: dict[str, Any] | None = Field(default=None, description="Fields of ASLoRAConfig, for adapter: aslora")
    meft: dict[str, Any] | None = Field(default=None, description="Fields of MEFTConfig, for adapter: meft")

    @model_validator(mode="after")
    def _check_fields(self) -> "MethodArguments":
        if getattr(self, "adapter", None) in CONFIGS:
            config_of(self)
        return self


class AsloraMeftPlugin(BasePlugin):
    """Adds adapters of ASLoRA and MEFT to a model that axolotl trains."""

    def get_input_args(self) -> str:
        return f"{__name__}.{MethodArguments.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        # Not lora_like: axolotl's LoRA loader would make a LoraConfig.
        return [AdapterCapabilities(name=name) for name in CONFIGS]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, PeftConfig] | None:
        """Add a new adapter, or the one in `lora_model_dir`, to the model.

        Args:
            config_only: only the configuration is wanted, for a trainer of trl that adds the adapter itself.

        Returns:
            The model (None with `config_only`) and the adapter's configuration; None: another plug-in's adapter.

        Raises:
            ValueError: a field is wrong, or the saved adapter is of another method.
        """
        if cfg.adapter not in CONFIGS:
            return None
        config = config_of(cfg)
        if config_only:
            return None, config
        if not cfg.lora_model_dir:
            if cfg.seed is not None:
                set_seed(cfg.seed)  # the adapter's first values
            model = get_peft_model(model, config)
        else:
            saved = PeftConfig.from_pretrained(cfg.lora_model_dir)
            if saved.peft_type != config.peft_type:
                raise ValueError(
                    f"lora_model_dir={cfg.lora_model_dir!r} holds an adapter of {saved.peft_type.value}, and adapter: "
                    f"{cfg.adapter} is asked for: name another folder or set adapter: {saved.peft_type.lower()}."
                )
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
            config = model.peft_config["default"]
        model.print_trainable_parameters()
        return model, config
