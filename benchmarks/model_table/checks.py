"""What is asked of a method on an architecture: it trains, reloads equal, and merges equal."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import CONFIG_MAPPING

from aslora import ASLoRAConfig
from aslora.layer import ASLoRALayer
from benchmarks.model_table.tiny import inputs, model_kind, tiny_model
from meft import MEFTConfig

STEPS = 20  # at most
FALLS = 0.99  # of the first loss
_ASLORA = {"r": 2, "lora_alpha": 4, "init_weights": False}
METHODS: dict[str, Callable[[], PeftConfig]] = {
    "ASLoRA, default": lambda: ASLoRAConfig(**_ASLORA),
    "ASLoRA, all-linear": lambda: ASLoRAConfig(target_modules="all-linear", **_ASLORA),
    "MEFT, default": lambda: MEFTConfig(r=16, num_experts=4, experts_per_token=2, top_k=8, init_weights=False),
}


class Row(NamedTuple):
    """An architecture in the table.

    Attributes:
        model_type: its name in transformers. head: the class of model.
        found: method -> "yes"; "yes, to ..." where outputs differ so much after reloading; or the reason why not.
        targets: the modules that MEFT stands beside by default.
    """

    model_type: str
    head: str
    found: dict[str, str]
    targets: str = ""


def model_types() -> list[str]:
    """All architectures of transformers with a causal, seq2seq, classification or masked head."""
    found = []
    for name in CONFIG_MAPPING:
        try:
            kind = model_kind(CONFIG_MAPPING[name])
        except Exception:  # what is registered and cannot be imported here
            continue
        if kind is not None:
            found.append(name)
    return sorted(found)


def check(model_type: str) -> Row:
    """Try all methods on a tiny model of an architecture."""
    kind = model_kind(CONFIG_MAPPING[model_type])
    assert kind is not None
    head = kind[1].__name__
    try:
        _loss(tiny_model(CONFIG_MAPPING[model_type]), kind[0]).backward()
    except Exception as error:
        why = f"not tried: no tiny model ({_sentence(error)})"
        return Row(model_type, head, dict.fromkeys(METHODS, why))
    found, targets = {}, ""
    for method, config in METHODS.items():
        try:
            model, found[method] = _check(model_type, kind[0], config())
        except Exception as error:
            found[method] = f"{type(error).__name__}: {_sentence(error)}"
        else:
            if method.startswith("MEFT"):
                named = model.peft_config["default"].target_modules
                targets = named if isinstance(named, str) else ", ".join(sorted(named)[:4])
    return Row(model_type, head, found, targets)


def _check(model_type: str, head: str, config: PeftConfig) -> tuple[PeftModel, str]:
    """Raises what the method raises; else the model, and what it does."""
    base = CONFIG_MAPPING[model_type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny_model(base), config)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = _loss(model, head)
            loss.backward()
            if not losses:
                flows = sum(1 for p in trained if p.grad is not None and float(torch.linalg.vector_norm(p.grad)) > 0)
            losses.append(float(loss))
            if losses[-1] < FALLS * losses[0]:
                break
            optimizer.step()
        if not flows:
            return model, "no gradient reaches the adapter"
        if not all(loss < float("inf") for loss in losses):
            return model, "the loss is not finite"
        if not losses[-1] < losses[0]:
            return model, f"the loss does not fall: {losses[0]:.4g}, after {len(losses) - 1} steps {losses[-1]:.4g}"
        want = _output(model, head)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(tiny_model(base), folder)
        same = get_peft_model_state_dict(loaded), get_peft_model_state_dict(model)
        if same[0].keys() != same[1].keys() or not all(torch.equal(v, same[1][k]) for k, v in same[0].items()):
            return model, "reloads with other tensors"
        again, verdict = _output(loaded, head), "yes"
        if not torch.equal(again, want):
            # Equal tensors: the architecture's own operations give other bits elsewhere in memory.
            verdict = f"yes, to {float((again - want).abs().max()):.0e}"
            if not torch.allclose(again, want, rtol=1e-5, atol=1e-6):
                return model, f"reloads with a difference of {float((again - want).abs().max()):.1e}"
        if isinstance(config, ASLoRAConfig):
            unused = _not_called(model, head)
            merged = _output(model.merge_and_unload(), head)
            if not torch.allclose(merged, want, rtol=1e-3, atol=1e-4):
                what = f"merges with a difference of {float((merged - want).abs().max()):.1e}"
                if unused:
                    what = (
                        f"trains, but the model reads the weight of {', '.join(unused)} without calling it, so that "
                        "merging changes the output (with LoRA too): exclude_modules"
                    )
                return model, what
    return model, verdict


def _not_called(model: PeftModel, head: str) -> list[str]:
    """Names of adapted layers that a forward pass does not call."""
    layers = {m: path for path, m in model.named_modules() if isinstance(m, ASLoRALayer)}
    called, hooks = set(), []
    for layer in layers:
        hooks.append(layer.register_forward_hook(lambda module, args, output: called.add(module)))
    _output(model, head)
    for hook in hooks:
        hook.remove()
    return sorted({path.rpartition(".")[2] for layer, path in layers.items() if layer not in called})


def _loss(model: Any, head: str) -> torch.Tensor:
    model.train()
    torch.manual_seed(0)  # of dropout
    return model(**inputs(_base(model), head)).loss


@torch.no_grad()
def _output(model: Any, head: str) -> torch.Tensor:
    model.eval()
    torch.manual_seed(0)
    return model(**inputs(_base(model), head)).logits


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _sentence(error: Exception) -> str:
    said = " ".join(str(error).split()).replace("|", "\\|").replace("[", "\\[")
    return said if len(said) <= 300 else said[:297] + "..."
