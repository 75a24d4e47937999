"""The tuner: wraps the FFNs, follows optimizer steps and runs, and lays adapters out for saving."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from peft_bridge import MethodTuner, last_loaded_folder

from .config import MEFTConfig
from .cost.auto import chosen
from .cost.host_memory import require_memory_for
from .files import training_state as state
from .files.adapter_file import FILE, RESERVED
from .files.tasks import with_tasks
from .injection import check_gradients_last, connect, profile_of, warn_of_others
from .layer import NOT_MERGEABLE, MEFTLayer
from .load_balancing import note_loss_scale
from .optim.optimizer_hook import RowSteps
from .optim.rank_average import RankAverage
from .optim.zero_rows import ZeroRows
from .report import TransferReport, transfer_report
from .retrieval import forward_context as context
from .retrieval.costs import Rows
from .retrieval.engine import Engine
from .table.row_table import RowTable
from .targets import default_targets, ffn_at, targeted_ffns


class MEFTModel(ZeroRows, MethodTuner):
    """MEFT in PEFT's frame; made by `get_peft_model(model, MEFTConfig(...))` and reached as `model.base_model`.

    Rows are updated by themselves: torch's global optimizer hooks show each step of the Adam or AdamW that was made
    over `model.parameters()`.

    Attributes:
        steps: follows the optimizer steps and updates the rows.
    """

    uses_shared_state = False
    reserved = RESERVED
    file = FILE
    prefix = "meft_"
    tuner_layer_cls = MEFTLayer
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012  (PEFT's; `targets` finds FFNs by their form)

    @property
    def configs(self) -> dict[str, MEFTConfig]:
        """Adapter of this method -> its configuration; without a `PeftModel` a model may have others' as well."""
        return {name: config for name, config in self.peft_config.items() if isinstance(config, MEFTConfig)}

    def adapted_ffns(self) -> dict[str, MEFTLayer]:
        """Path in the base model -> adapted FFN; not called `layers`, which would hide the base model's."""
        return {path: module for path, module in self.model.named_modules() if isinstance(module, MEFTLayer)}

    # ------------------------------------------------------------------ injection

    def prepare(self, model: nn.Module) -> None:
        self.steps = RowSteps()
        self.engines: dict[str, Engine] = {}
        self._logged: dict[str, float] = {}
        self.loaded_from: dict[str, str] = {}
        self.ranks = RankAverage(self.steps)
        # generate() calls the inner model and not this one, chunked losses the part of it without a head.
        inner = getattr(model, getattr(model, "base_model_prefix", "") or "-", model)
        self._hooks = [h for part in dict.fromkeys([model, inner]) for h in context.watch_passes(part, self)]

    def step_listener(self) -> RowSteps:
        return self.steps

    def join_follower(self) -> RankAverage:
        return self.ranks

    def take_back(self, adapter_name: str) -> None:
        """Remove an adapter with all that was wrapped for it."""
        layers = self.adapted_ffns().values()
        super().take_back(adapter_name)
        for layer in layers:
            if not layer.configs:
                layer.call.end()
        if not self.steps.configs:
            self._unhook()

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config: Any = peft_config
        if config.target_modules is None:
            config.target_modules = default_targets(config, model_config.get("model_type"), self.model)
        return config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._ffns, others = targeted_ffns(peft_config, model)
        warn_of_others(others)
        require_memory_for(peft_config, list(self._ffns.values()))

    def wrap(
        self, target: nn.Module, path: str, parent: nn.Module, adapter_name: str, config: MEFTConfig,
        parameter_name: str | None = None,
    ) -> MEFTLayer | None:  # fmt: skip
        if self._ffns and path not in self._ffns:
            return None
        layer = target
        if not isinstance(layer, MEFTLayer):
            # Where PEFT takes the targets from a state dict, the configuration may name none.
            ffn = self._ffns[path] if self._ffns else ffn_at(self.model, path)
            layer = MEFTLayer(target, ffn.width, ffn.up)
            layer.train(target.training)
        layer.update_layer(adapter_name, config)
        return layer

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The inherited one looks for a weight, which an FFN module has not.
        setattr(parent, child_name, new_module)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # PEFT comes here when all layers are wrapped.
        if self.injection.layers and self.injection.adapter_name not in self.steps.configs:
            name = self.injection.adapter_name
            layers = {path: layer for path, layer in self.adapted_ffns().items() if name in layer.configs}
            self.engines[name] = connect(name, self.configs[name], layers, self.steps, self.ranks, self._choose)
        super()._mark_only_adapters_as_trainable(model)

    def _choose(self, config: MEFTConfig, widths: list[int], x: Tensor) -> tuple[str, Rows]:
        """The strategy, and what happens with the rows for backward, that fit beside the base model."""
        plan = chosen(config, widths, x, profile_of(self.model, list(self.adapted_ffns().values())))
        return plan.strategy, plan.work.rows

    def forget(self, adapter_name: str) -> None:
        for table in self.steps.tables.get(adapter_name, []):
            table.rows.grad = None  # an optimizer that goes on would take it for a gradient of all rows
        for owner in (self.steps.tables, self.steps.configs, self.steps.routers, self.loaded_from, self.engines):
            owner.pop(adapter_name, None)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing: masters and router have the dtypes of the configuration, whatever the base model's is."""

    def _check_merge_allowed(self) -> None:
        raise ValueError(NOT_MERGEABLE)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Raises: ValueError: a non-linear adapter cannot be merged."""
        raise ValueError(NOT_MERGEABLE)

    # ------------------------------------------------------------------ forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward pass; its attention mask tells the layers which tokens are padding."""
        opened = self.begin_pass(context.named_arguments(self.model, args, kwargs))
        try:
            output = self.model.forward(*args, **kwargs)
            self.finish_pass(opened, output)
            return output
        finally:
            context.end(opened)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Raises: ValueError: `adapter_names`, which PEFT would drop without a word."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: MEFT uses the same adapters for a whole batch; call set_adapter or disable_adapter "
                "and run the rows of each adapter as a batch of their own."
            )
        yield

    def begin_pass(self, kwargs: dict[str, Any]) -> context.ForwardContext | None:
        """Open a context for a pass with these arguments; None inside of another pass."""
        self.ranks.note_forward()
        if context.current() is None and torch.is_grad_enabled():
            for name in self.active_adapters:
                if name in self.engines:
                    self.engines[name].begin_pass()
        layers = max(1, len(self.steps.tables.get(self.active_adapters[0], [])) // 2) if self.active_adapters else 1
        return context.begin(context.padding_mask(kwargs, getattr(self.model, "config", None)), layers)

    def finish_pass(self, opened: context.ForwardContext | None, output: Any) -> None:
        """Tie the context to the output's graph, and the loss to the balance loss where there is one."""
        if opened is None:
            return
        context.keep_with_graph(opened, output)
        if any(self.configs[name].router_aux_loss_coef for name in self.active_adapters if name in self.configs):
            note_loss_scale(output, opened)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        layers = self.adapted_ffns().values()
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        for layer in layers:
            layer.call.end()
        self._unhook()
        return model

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()

    # ------------------------------------------------------------------ training state and runs

    def save_training_state(self, folder: str | os.PathLike, optimizer: Optimizer | None = None) -> None:
        """Write moments and counts to `meft_state-*.safetensors`; see `meft.files.training_state`.

        `optimizer.state_dict()` has them too: this is for loops that do not save it. The files appear together or not
        at all. Of a distributed run one process calls this.

        Args:
            optimizer: whose moments; None: those of the optimizer that has stepped last.
        """
        state.save(self._named_tables(), folder, optimizer)

    def load_training_state(self, folder: str | os.PathLike, optimizer: Optimizer | None = None) -> None:
        """Restore what `save_training_state` wrote, for the weights it was written with.

        Args:
            optimizer: gets the moments; None: the optimizer that steps the rows next.

        Raises:
            FileNotFoundError: there is no such state.
            ValueError: it is damaged, or belongs to other weights.
        """
        state.load(self._named_tables(), folder, optimizer)

    def _named_tables(self) -> dict[str, RowTable]:
        return {name: table for name, table in self.model.named_modules() if isinstance(table, RowTable)}

    def rows_changed(self) -> None:
        """Say that rows were written in a way that nobody can see: the next forward pass reads all of them again.

        What is written by torch, through a parameter, its `.data`, its views and its numpy arrays, and what others
        write into tensors and arrays that share its memory, is seen without this call. It is needed after writing to
        an address (`data_ptr()`) that was kept, from a library that was given one, or from another process.
        """
        for table in self._all_tables():
            table.note_change()

    def transfer_report(self, adapter_name: str | None = None) -> TransferReport:
        """What an adapter (None: the active one) has moved between host and device, and how its neurons were used."""
        name = adapter_name or self.active_adapters[0]
        return transfer_report(name, self.adapted_ffns())

    def check_run(self, arguments: Any) -> None:
        """Raises: ValueError: the run clips or scales gradients, and an adapter's are used up before that."""
        # A Trainer of several ranks averages gradients when the backward pass is over, so rows are updated after that.
        alone = getattr(arguments, "world_size", 1) == 1
        if alone and any(self._updates_in_backward(name) for name in self.active_adapters if name in self.configs):
            check_gradients_last(arguments)

    def _updates_in_backward(self, adapter_name: str) -> bool:
        layer = next(layer for layer in self.adapted_ffns().values() if adapter_name in layer.configs)
        beside = self.engines[adapter_name].updates_beside(layer.device)
        free = any(t.claimed_by is None or t.claimed_by() is None for t in self.steps.tables[adapter_name])
        return self.configs[adapter_name].updates_in_backward and beside and free

    def on_run_begin(self, total_steps: int, done_steps: int = 0, steps_seen: bool = True) -> None:
        """A Trainer's run begins, perhaps from a checkpoint of 0.1, whose optimizer has no moments of rows."""
        if not steps_seen:
            raise RuntimeError(
                "MEFT's rows do not follow this engine, whose optimizer holds copies of the parameters: train with one "
                "process, DistributedDataParallel, FSDP2, or DeepSpeed's ZeRO."
            )
        if done_steps:
            active = [folder for name, folder in self.loaded_from.items() if name in self.active_adapters]
            state.resume_of_0_1(self._named_tables(), active)

    def log_scalars(self) -> dict[str, float]:
        """For a Trainer's logs: what was moved and waited for since the last time."""
        if not self.active_adapters or self.active_adapters[0] not in self.engines:
            return {}
        report = self.transfer_report()
        last, self._logged = self._logged, report.totals()
        return report.scalars(last)

    # ------------------------------------------------------------------ saving, loading, DDP

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Rows are not in DDP's buckets: their gradients are averaged over the ranks' touched rows."""
        tables = {id(p) for ts in self.steps.tables.values() for t in ts for p in t.parameters()}
        return [f"base_model.{name}" for name, p in self.named_parameters() if id(p) in tables]

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: MEFTConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As inherited; and remember where the adapter comes from, for training states of 0.1."""
        tensors = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if isinstance(tuner := getattr(model, "base_model", None), MEFTModel) and (folder := last_loaded_folder()):
            tuner.loaded_from[adapter_name] = folder
        return with_tasks(tensors, config, adapter_name)


def take_back(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter from a model whose FFNs were wrapped without a `PeftModel`, as if it had not been added."""
    for tuner in context.watching(model):
        if isinstance(tuner, MEFTModel) and adapter_name in tuner.steps.configs:
            tuner.take_back(adapter_name)
