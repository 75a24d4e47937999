"""One adapted parameter of a module: the fused 3-D weights of experts, by `target_parameters`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from peft_bridge.torch_private import NotReplicated

from .config import ASLoRAConfig
from .layer import ASLoRALayer


# PEFT finds the layer of a parameter that is adapted already by this name.
class ParamWrapper(NotReplicated, ASLoRALayer):
    """A module of which one parameter is adapted: W_e + scaling * B_e A_e for each expert e.

    The parameter is [experts, out_features, in_features], or [experts, in_features, out_features] where the module says
    `is_transposed`; or [out_features, in_features], as of one expert. A is [experts * r, in_features], or
    [r, in_features] with `share_a_experts`; B is [out_features, experts * r], of each expert r columns. Of several
    parameters of a module each has a wrapper of its own, the later ones around the earlier ones, as in PEFT's LoRA.

    Attributes:
        experts: how many the parameter stacks.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: ASLoRAConfig) -> None:
        super().__init__()
        self.parameter_name = parameter_name
        ASLoRALayer.__init__(self, base_layer)
        shape = self.parameter.shape
        self._stacked = len(shape) == 3
        self.is_transposed = self._stacked and bool(getattr(self.get_base_layer(), "is_transposed", False))
        self.experts = shape[0] if self._stacked else 1
        self.out_features, self.in_features = shape[-2:]
        if self.is_transposed:
            self.out_features, self.in_features = self.in_features, self.out_features
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter, without adapters."""
        return getattr(self.get_base_layer(), self.parameter_name)  # type: ignore[no-any-return]

    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        return self.parameter.device, self.parameter.dtype

    def _factors_by_expert(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The two factors of which the product has the parameter's layout, [experts, ., r] and [experts, r, .]."""
        A, B = self.factors(adapter, self.parameter.device)
        A = A.view(-1, self.r[adapter], self.in_features).expand(self.experts, -1, -1)
        B = B.view(self.out_features, self.experts, self.r[adapter]).transpose(0, 1)
        return (A.mT, B.mT) if self.is_transposed else (B, A)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling * B_e A_e of all experts, in the layout of the parameter."""
        left, right = self._factors_by_expert(adapter)
        delta = left @ right * self.scaling[adapter]
        return delta.view(self.parameter.shape)

    def _adapted(self, weight: Tensor, adapter: str) -> Tensor:
        left, right = (factor.to(weight.dtype) for factor in self._factors_by_expert(adapter))
        stacked = weight.view(self.experts, *weight.shape[-2:])
        return torch.baddbmm(stacked, left, right, alpha=self.scaling[adapter]).view(weight.shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the deltas of the active adapters to the parameter; arguments as in `Linear.merge`."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.aslora_B:
                continue
            merged = self.parameter.data + self.get_delta_weight(adapter).to(self.parameter.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            self.parameter.data = merged
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take the deltas of all merged adapters away again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.aslora_B:
                self.parameter.data -= self.get_delta_weight(adapter).to(self.parameter.dtype)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module itself; PEFT calls this, as wrappers may be nested."""
        layer: Any = self
        while merge and isinstance(layer, ParamWrapper):
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return self.get_base_layer()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output with the adapted parameter.

        Raises:
            ValueError: `adapter_names`: all samples go through the same experts.
        """
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(
                "adapter_names: an adapter on target_parameters changes the weights that all samples of a batch share; "
                "call set_adapter and run the samples of each adapter as a batch of their own."
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [adapter for adapter in self.active_adapters if adapter in self.aslora_B]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(*args, **kwargs)
        weight: Tensor = self.parameter
        with torch.autocast(weight.device.type, enabled=False):  # a parameter keeps its dtype
            for adapter in active:
                weight = self._adapted(weight, adapter)
        path: str = self.parameter_name
        layer: Any = self.base_layer
        while hasattr(layer, "base_layer"):
            path, layer = f"base_layer.{path}", layer.base_layer
        return torch.func.functional_call(self.base_layer, {path: weight}, args, kwargs)

    def __repr__(self) -> str:
        return "aslora." + super().__repr__()

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"


def check_parameter(path: str, parameter: Any, config: ASLoRAConfig) -> None:
    """Raises: ValueError: the parameter, or the configuration, does not suit a `ParamWrapper`."""
    problem = None
    if parameter.ndim not in (2, 3):
        problem = f"it has {parameter.ndim} dimensions, and 2 or 3 are needed"
    elif not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        problem = f"it is {parameter.dtype}: load the model in bfloat16, float16 or float32"
    if problem is not None:
        raise ValueError(f"target_parameters: '{path}' cannot be adapted, {problem}.")
    if config.aslora_dropout:
        raise ValueError(
            f"aslora_dropout={config.aslora_dropout} does not work with target_parameters, which have no input of "
            "their own: set aslora_dropout=0."
        )
