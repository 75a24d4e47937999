"""The progress of a run: a bar with the time that is left, and a short line for what is logged."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

# Name in the logs -> what the line says; in this order.
_SHOWN = {
    "loss": "loss {:.4g}",
    "eval_loss": "held-out loss {:.4g}",
    "learning_rate": "learning rate {:.3g}",
    "grad_norm": "gradient norm {:.3g}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "memory/device_gib": "{:.1f} GiB on the device",
    "meft/union_share": "|U|/r {:.3f}",
    "aslora/trainable_values": "{:,} values trained",
}


class Progress(ProgressCallback):
    """transformers' progress bar with tokens/s in it; of the logs it shows what says how training goes."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a line above the bar."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "tokens_per_second" in logs:
            self.training_bar.set_postfix_str(f"{logs['tokens_per_second']:,.0f} tokens/s", refresh=False)
        parts = [text.format(logs[name]) for name, text in _SHOWN.items() if isinstance(logs.get(name), int | float)]
        if parts:
            self.training_bar.write(f"step {state.global_step}: {', '.join(parts)}")


def show_progress(trainer: Trainer) -> None:
    """Replace the Trainer's progress bar, where it has one."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Progress())
