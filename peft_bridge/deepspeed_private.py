"""Names of DeepSpeed that its documentation leaves out; `tests/peft_bridge/test_deepspeed_private.py` tests them.

DeepSpeed is imported only where one of its engines is at work already.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def engine_in_construction() -> Any:
    """The engine whose construction has led to this call; None: there is none.

    An engine calls `set_deepspeed_parallelism` of each of its modules that has it: when it has cast the model and moved
    it to its device, and before it looks at the parameters to broadcast, flatten or partition them.
    """
    engines = sys.modules.get("deepspeed.runtime.engine")
    frame = sys._getframe(1)
    while engines is not None and frame is not None:
        caller = frame.f_locals.get("self")
        if frame.f_code.co_name == "_configure_distributed_model" and isinstance(caller, engines.DeepSpeedEngine):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None


def steps_parameters(engine: Any) -> bool:
    """Whether the engine's optimizer has the model's own parameters, so that torch's hooks see its steps."""
    return engine.zero_optimization_stage() == 0 and not (engine.fp16_enabled() or engine.bfloat16_enabled())


def unsupported(engine: Any) -> str | None:
    """The first setting of an engine whose steps cannot be followed, as "field=value (remedy)"; None: none is."""
    zero = engine._config.zero_config
    optimizer = zero.offload_optimizer

    def device(offload: Any) -> str:
        return getattr(offload, "device", "none")

    of_cpu = "'cpu' or 'none'"
    settings = [
        ("zero_optimization.stage", engine.zero_optimization_stage(), (1, 2, 3), "1, 2 or 3"),
        ("zero_optimization.offload_optimizer.device", device(optimizer), ("none", "cpu"), of_cpu),
        ("zero_optimization.offload_optimizer.super_offload", bool(engine.super_offload()), (False,), "False"),
        ("zero_optimization.offload_optimizer.ratio", float(engine.zero_partial_offload()), (1.0,), "1.0"),
        ("zero_optimization.offload_param.device", device(zero.offload_param), ("none", "cpu"), of_cpu),
        ("zero_optimization.zenflow", zero.zenflow, (None,), "null"),
        ("zero_optimization.elastic_checkpoint", bool(engine.zero_elastic_checkpoint()), (False,), "False"),
        ("zero_optimization.zero_quantized_weights", bool(engine.zero_quantized_weights()), (False,), "False"),
        ("zero_optimization.zero_hpz_partition_size", engine.zero_hpz_partition_size(), (1,), "1"),
        ("zero_optimization.compute_grad_norm", bool(getattr(zero, "compute_grad_norm", True)), (True,), "True"),
        ("gradient_allreduce_op averages", bool(engine.gradient_average), (True,), "mean"),
        ("checkpoint.load_universal", bool(engine.load_universal_checkpoint()), (False,), "False"),
        ("compile.deepcompile", bool(engine.is_deepcompile_enabled()), (False,), "False"),
        ("tensor_parallel.autotp_size", engine.autotp_size(), (0, 1), "1"),
        ("pipeline", engine.pipeline_parallelism, (False,), "a model that is no PipelineModule"),
        ("managed_gradient_accumulation", bool(engine.managed_gradient_accumulation()), (True,), "True"),
    ]
    for field, value, allowed, remedy in settings:
        if value not in allowed:
            return f"{field}={getattr(value, 'value', value)} (set {remedy})"
    if engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16:
        return "torch_autocast.dtype=float16 (set bfloat16, or fp16.enabled)"
    if engine.zero_optimization_stage() == 1 and engine.get_data_types() == (torch.bfloat16, torch.float32):
        return "data_types.grad_accum_dtype=fp32 with bf16 (set stage 2 or 3, or leave it out)"
    return None


class ZeroSteps:
    """The steps of one ZeRO optimizer (stages 1 to 3), for those who keep parameters that it does not have.

    Attributes:
        group: process group of the ranks over which gradients are averaged.
    """

    def __init__(self, engine: Any, zero: Any) -> None:
        self._engine, self._ref, self.group = weakref.ref(engine), weakref.ref(zero), engine.seq_data_parallel_group
        self._destroyed = False
        self._scaled_norm: Tensor | None = None

    @property
    def _zero(self) -> Any:
        return self._ref()

    @property
    def alive(self) -> bool:
        """Whether ZeRO has the parameters still."""
        return self._zero is not None and self._engine() is not None and not self._destroyed

    @property
    def engine(self) -> Any:
        """The engine, None if it is gone."""
        return self._engine()

    @property
    def writes_checkpoints(self) -> bool:
        """Whether this rank writes what all ranks have alike into a checkpoint."""
        engine = self.engine
        return bool((engine.local_rank if engine.use_node_local_storage() else engine.global_rank) == 0)

    @property
    def partitions_parameters(self) -> bool:
        """Whether this is stage 3."""
        return hasattr(self._zero, "fp16_partitioned_groups_flat")

    def watch(
        self,
        before: Callable[[], None],
        norm: Callable[[], Tensor | None],
        after: Callable[[float], None],
        skipped: Callable[[], None],
        destroyed: Callable[[], None],
    ) -> None:
        """Tell of each step.

        A step whose gradients are not finite, in any precision, is skipped as DeepSpeed skips those of fp16.

        Args:
            before: the gradients of this step are complete.
            norm: 2-norm of gradients that ZeRO does not have and shall clip with its own, equal on all ranks; they are
                scaled as the loss is. None: there are none.
            after: the step was taken; called with what such gradients have to be divided by (loss scale, clipping).
            skipped: the step was not taken.
            destroyed: there are no further steps; an engine itself lives as long as its model, whose hooks have it.
        """
        zero, take_step, destroy = self._zero, self._zero.step, self._zero.destroy
        zero.check_grad_overflow = True  # stage 3 looks without it
        self._add_norm(norm)

        def step(*args: Any, **kwargs: Any) -> Any:
            before()
            scale, self._scaled_norm = float(zero.loss_scale), None
            result = take_step(*args, **kwargs)
            if zero.overflow:
                skipped()
            else:
                after(self._divisor(scale))
            return result

        def destroy_and_tell(*args: Any, **kwargs: Any) -> Any:
            self._destroyed = True
            destroyed()
            return destroy(*args, **kwargs)

        zero.step, zero.destroy = step, destroy_and_tell

    def _add_norm(self, norm: Callable[[], Tensor | None]) -> None:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        # Of stages 1 and 2 the norm, of stage 3 those of groups of parameters, from which it makes the norm.
        name = "_get_norm_groups" if self.partitions_parameters else "scaled_global_norm"
        norms_of_zero = getattr(self._zero, name)

        def with_others(*args: Any, **kwargs: Any) -> Any:
            given, others = norms_of_zero(*args, **kwargs), norm()
            norms = list(given) if self.partitions_parameters else [given]
            if others is not None:
                norms.append(others.to(norms[0].device, norms[0].dtype))
            self._scaled_norm = combine_grad_norm_groups(norms)
            return norms if self.partitions_parameters else self._scaled_norm

        setattr(self._zero, name, with_others)

    def _divisor(self, scale: float) -> float:
        limit = float(self._zero.clip_grad)
        if limit <= 0 or self._scaled_norm is None:
            return scale
        return scale * max(1.0, (float(self._scaled_norm) / scale + 1e-6) / limit)

    # ------------------------------------------------------------------ values of parameters

    def read(self, parameter: Any) -> Tensor:
        """The whole value of a parameter, in ZeRO's precision where it steps it; all ranks call it."""
        stepped = self.alive and parameter.requires_grad
        if is_partitioned(parameter):
            return self._zero.get_full_hp_param(parameter).detach() if stepped else gathered(parameter)
        if not stepped or parameter.dtype == torch.float32:  # equal to ZeRO's copy
            return parameter.detach()  # type: ignore[no-any-return]
        return parameter.get_full_hp_param().detach()  # type: ignore[no-any-return]

    @torch.no_grad()
    def write(self, parameter: Any, value: Tensor) -> None:
        """Write a value, that all ranks have, into ZeRO's copy and into what the model reads; no communication."""
        if not is_partitioned(parameter):
            parameter.set_full_hp_param(value)
            parameter.data.copy_(value)
            return
        part = parameter.ds_tensor
        flat = value.flatten()
        first = part.numel() * self._zero._get_param_partition_rank(parameter)
        own = flat.new_zeros(part.numel())  # of the last ranks, padding
        end = min(len(flat), first + part.numel())
        if first < end:
            own[: end - first] = flat[first:end]
        self._zero.set_local_hp_param(own, parameter)
        part.data.copy_(own)
        if parameter.numel() == value.numel():  # one that ZeRO-3 keeps gathered
            parameter.data.copy_(value)


def gathered(parameter: Any) -> Tensor:
    """The whole value of a parameter that ZeRO-3 has in parts; all ranks call it."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()  # type: ignore[no-any-return]


def whole_shape(parameter: Any) -> torch.Size:
    """The shape of a parameter, also of one that ZeRO-3 has in parts."""
    return getattr(parameter, "ds_shape", parameter.shape)  # type: ignore[no-any-return]


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has a parameter in parts."""
    return hasattr(parameter, "ds_id")


def before_zero_is_made(
    engine: Any, begin: Callable[[Optimizer], None], made: Callable[[ZeroSteps], None], failed: Callable[[], None]
) -> None:
    """Tell of an engine's ZeRO optimizer.

    Args:
        begin: it is about to be made from an optimizer, whose parameters it will flatten.
        made: it was made.
        failed: it could not be made.
    """
    make = engine._configure_zero_optimizer

    def configure(optimizer: Any) -> Any:
        if optimizer is None:  # for inference
            return make(optimizer)
        if engine.sequence_parallel_size > 1:
            raise ValueError(
                f"sequence_parallel_size={engine.sequence_parallel_size}: ASLoRA and MEFT do not support sequence "
                "parallelism of DeepSpeed; set it to 1."
            )
        try:
            begin(optimizer)
            zero = make(optimizer)
            made(ZeroSteps(engine, zero))
        except BaseException:
            failed()
            raise
        return zero

    engine._configure_zero_optimizer = configure


def around_checkpoints(
    engine: Any, saving: Callable[[str], Any], loading: Callable[[], Any], loaded: Callable[[str], None]
) -> None:
    """Take part in an engine's `save_checkpoint` and `load_checkpoint`.

    Args:
        saving: called with the checkpoint's folder before the engine writes; what it returns is called when the engine
            has written.
        loading: called before the engine reads; what it returns is called when the engine has read.
        loaded: called with the folder of a checkpoint whose optimizer states the engine has read.
    """
    import os

    save_checkpoint, load_checkpoint = engine.save_checkpoint, engine.load_checkpoint

    def save(save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        name = str(tag) if tag is not None else f"global_step{engine.global_steps}"
        done = saving(os.path.join(save_dir, name))
        try:
            return save_checkpoint(save_dir, tag, *args, **kwargs)
        finally:
            done()

    def load(load_dir: Any, tag: Any = None, load_module_strict: bool = True, *args: Any, **kwargs: Any) -> Any:
        done = loading()
        try:
            path, state = load_checkpoint(load_dir, tag, load_module_strict, *args, **kwargs)
        finally:
            done()
        with_states = args[0] if args else kwargs.get("load_optimizer_states", True)
        if path is not None and with_states and not kwargs.get("load_module_only", len(args) > 2 and args[2]):
            loaded(os.path.dirname(path))
        return path, state

    engine.save_checkpoint, engine.load_checkpoint = save, load


def adam_of(optimizer: Optimizer) -> bool | None:
    """Of DeepSpeed's Adam on a CPU or a GPU, whether its weight decay is decoupled; None: it is another optimizer."""
    kind = type(optimizer)
    if not kind.__module__.startswith("deepspeed.ops.adam.") or kind.__name__ not in ("DeepSpeedCPUAdam", "FusedAdam"):
        return None
    return bool(optimizer.adam_w_mode)  # type: ignore[attr-defined]
