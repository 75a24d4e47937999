"""One adapted layer: forward, delta weight, merging into the base weight."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.other import transpose
from torch import Tensor, nn

from peft_bridge.peft_private import in_out_features
from peft_bridge.torch_private import NotReplicated, is_transformed

from .config import ASLoRAConfig
from .shared_a import InputProducts, SharedA, autocast_dtype
from .sharing.shared_tensors import SharedB


class ASLoRALayer(BaseTunerLayer):
    """A layer's references to the tuner's A and B, and its position in B."""

    aslora_A: nn.ModuleDict
    aslora_B: nn.ModuleDict
    fan_in_fan_out: bool
    adapter_layer_names = ("aslora_A", "aslora_B")
    other_param_names = ("aslora_dropout", "r", "lora_alpha", "scaling", "position", "owns_device")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        # References, hidden from nn.Module's registry: the tuner owns these modules, once for all layers.
        object.__setattr__(self, "aslora_A", nn.ModuleDict())
        object.__setattr__(self, "aslora_B", nn.ModuleDict())
        self.aslora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.position: dict[str, int] = {}
        self.owns_device: dict[str, tuple[bool, bool]] = {}
        self.on_delete: Callable[[str], None] | None = None  # without a PeftModel, layers are told and the tuner is not
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features: int
        self.out_features: int
        self.in_features, self.out_features = in_out_features(self.get_base_layer())  # type: ignore[assignment]
        self.kwargs = kwargs

    def update_layer(self, adapter_name: str, config: ASLoRAConfig) -> None:
        """Prepare the layer for an adapter; `attach` then gives it the tensors."""
        self.r[adapter_name] = config.r
        self.lora_alpha[adapter_name] = config.lora_alpha
        self.scaling[adapter_name] = config.scaling
        dropout = nn.Dropout(config.aslora_dropout) if config.aslora_dropout > 0 else nn.Identity()
        self.aslora_dropout[adapter_name] = dropout

    def attach(self, adapter_name: str, shared_a: SharedA, shared_b: SharedB, position: int, owns_a: bool) -> None:
        """Refer to the A and B of the tuner.

        Args:
            position: this layer's place in the B-group.
            owns_a: whether this is the first layer of its A-group, whose device and dtype A takes.
        """
        self.aslora_A[adapter_name] = shared_a
        self.aslora_B[adapter_name] = shared_b
        self.position[adapter_name] = position
        self.owns_device[adapter_name] = (owns_a, position == 0)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter, and without a `PeftModel` let its shared tensors go too."""
        super().delete_adapter(adapter_name)
        if self.on_delete is not None:
            self.on_delete(adapter_name)

    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Where and in what dtype PEFT would put this layer's adapter: those of the base layer, if it is of floats."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if dtype is None or not (dtype.is_floating_point or dtype.is_complex):
            dtype = torch.float32
        return device or torch.device("cpu"), dtype

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT calls this after loading. Shared tensors follow the first layer of their group, as whole modules."""
        if adapter_name not in self.aslora_B:
            return
        base_device, dtype = self.device_and_dtype()
        target = device or (
            base_device if base_device.type != "meta" else None
        )  # where the base is offloaded, values stay
        shared = (self.aslora_A[adapter_name], self.aslora_B[adapter_name])
        for module, owns in zip(shared, self.owns_device[adapter_name], strict=True):
            if owns and not any(p.is_meta for p in module.parameters()):
                # To a wider dtype only: float32 values from a file are not to be rounded to those of a bf16 base.
                widest = max((dtype, *(p.dtype for p in module.parameters())), key=lambda d: d.itemsize)
                module.to(target, widest)

    def factors(self, adapter_name: str, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """A [r, in_features] and this layer's B [out_features, r], on `device` (None: where A is)."""
        # Called as modules, so that accelerate's hooks load offloaded tensors.
        A: Tensor = self.aslora_A[adapter_name]()
        B: Tensor = self.aslora_B[adapter_name](self.position[adapter_name])
        device = device or A.device
        return A if A.device == device else A.to(device), B if B.device == device else B.to(device)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling * B A, in the layout of the base weight: [out_features, in_features], transposed for Conv1D."""
        A, B = self.factors(adapter)
        if A.device.type == "cpu" and A.dtype in (torch.float16, torch.bfloat16):
            delta = (B.float() @ A.float() * self.scaling[adapter]).to(A.dtype)  # half products are slow on CPUs
        else:
            delta = B @ A * self.scaling[adapter]
        return transpose(delta, self.fan_in_fan_out)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


def _sum(update: Tensor, result: Tensor) -> Tensor:
    """result + update, in the memory of `update` where that can be: that of `result` may be somebody else's."""
    plain = type(update) is Tensor and type(result) is Tensor and not torch.compiler.is_compiling()
    if plain and update.dtype == torch.promote_types(update.dtype, result.dtype) and not is_transformed():
        return update.add_(result)
    return result + update


class Linear(NotReplicated, ASLoRALayer):
    """An adapted `nn.Linear`, transformers `Conv1D`, or quantised linear layer."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: ASLoRAConfig, **kwargs: Any) -> None:
        super().__init__()
        ASLoRALayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = config.fan_in_fan_out
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def get_base_weight(self) -> Tensor:
        """The base layer's weight, dequantised if need be."""
        base = self.get_base_layer()
        if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
            # bitsandbytes repacks 4-bit weights for its CPU kernel at the first forward in eval mode, and would read
            # them wrongly here; taking a state dict puts them back.
            base.state_dict()
        return super().get_base_weight()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the delta weights of the active adapters to the base weight.

        Args:
            safe_merge: work on a copy, and raise ValueError instead if the result is not finite.
            adapter_names: adapters to merge; None means the active ones.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.aslora_B:
                continue
            weight = self.get_base_weight()
            if safe_merge:
                weight = weight.clone()
            weight += self.get_delta_weight(adapter).to(weight.device)
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            self.set_base_weight(weight)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take the delta weights of all merged adapters away again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.aslora_B:
                weight = self.get_base_weight()
                weight -= self.get_delta_weight(adapter).to(weight.device)
                self.set_base_weight(weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """base_layer(x) + the sum over active adapters of scaling * B_group(l) A dropout(x) (eq. 2)."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            self._check_forward_args(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if not isinstance(result, Tensor) or result.shape != (*x.shape[:-1], self.out_features):
            raise ValueError(
                f"{type(self.get_base_layer()).__name__} gives more than, or another shape than, a linear layer: it "
                "cannot be adapted, name it in exclude_modules."
            )
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter in self.active_adapters:
            if adapter in self.aslora_B:
                result = _sum(self._update(adapter, x), result)
        return result.to(dtype)

    def _update(self, adapter: str, x: Tensor) -> Tensor:
        """scaling * B_group(l) A dropout(x), in memory of its own."""
        A, B = self.factors(adapter, x.device)
        scaling = self.scaling[adapter]
        if torch.compiler.is_compiling():  # which finds by itself what layers have in common
            x = self.aslora_dropout[adapter](self._cast_input_dtype(x, A.dtype))
            return F.linear(F.linear(x, A), B) * scaling
        # A power of two rounds nothing, wherever it is applied, and the product with A is the smallest place. float16
        # soon has no room for it there.
        wide = (autocast_dtype(x.device.type) or A.dtype) != torch.float16
        early = scaling if wide and abs(math.frexp(scaling)[0]) == 0.5 else 1.0
        update = F.linear(self._product(adapter, x, A, early), B)
        return update if early == scaling else update * scaling

    def _product(self, adapter: str, x: Tensor, A: Tensor, factor: float) -> Tensor:
        """factor * dropout(x) A^T, which layers without dropout share where they read the same x and A."""

        def product(x: Tensor) -> Tensor:
            xA = F.linear(x, A)
            return xA if factor == 1 else xA * factor

        dropout = self.aslora_dropout[adapter]
        if dropout.training and not isinstance(dropout, nn.Identity):  # each layer has a mask of its own
            return product(dropout(self._cast_input_dtype(x, A.dtype)))
        x = dropout(x)
        products: InputProducts = self.aslora_A[adapter].products  # type: ignore[assignment]
        return products.get(self, x, A, factor, lambda: product(self._cast_input_dtype(x, A.dtype)))

    def _check_forward_args(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Each sample of the batch has its own adapter; `__base__` means none."""
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter in dict.fromkeys(adapter_names):
            if adapter in self.aslora_B:
                samples = [i for i, name in enumerate(adapter_names) if name == adapter]
                result[samples] += self._update(adapter, x[samples]).to(result.dtype)
        return result

    def __repr__(self) -> str:
        return "aslora." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
