"""Which modules of a model are its FFNs, and how wide they are: one rule for defaults, hints and checks.

An FFN maps hidden states of width d to hidden states of width d, token by token, inside of a numbered layer. It is one
of three:

- a module: `y = mlp(x)`, a mixture of experts and its router included;
- BERT's pair of modules, of which the second is called with the FFN's input as `input_tensor`;
- two linear layers that the layer itself calls (OPT, BART, Whisper, ALBERT): the adapter stands beside the second one,
  and reads the input of the first.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_bridge.deepspeed_private import whole_shape

from .config import MEFTConfig

_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
_NORM = re.compile("norm", re.IGNORECASE)
_MIXES_TOKENS = re.compile("attention_mask|cache|past|position|encoder")  # in the names of a forward's parameters
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)


class FFN(NamedTuple):
    """An FFN of a model.

    Attributes:
        module: what the adapter stands beside, without an adapter's layer around it.
        width: hidden size d.
        up: the FFN's first linear layer where `module` is its last one; None where `module` is called with its input.
    """

    module: nn.Module
    width: int
    up: nn.Module | None = None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one linear layer, quantised ones included."""
    return isinstance(module, nn.Linear | Conv1D) or (hasattr(module, "in_features") and not list(module.children()))


def ffns(model: nn.Module) -> dict[str, FFN]:
    """Path -> FFN, of all FFNs of a model, in the order of its modules."""
    found: dict[str, FFN] = {}
    inside = ""
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        ffn = _ffn(model, path)
        if ffn is not None:
            found[path] = ffn
        if ffn is not None or isinstance(module, BaseTunerLayer):
            inside = f"{path}."
    return found


def ffn_at(model: nn.Module, path: str) -> FFN:
    """The FFN at a path.

    Raises:
        ValueError: there is none, or its input comes in pieces.
    """
    found = ffns(model)
    module = model.get_submodule(path)
    ffn = found.get(path) or _named(module, path.rpartition(".")[2])
    if ffn is None:
        raise ValueError(
            f"Target module '{path}' ({type(module).__name__}) is no FFN: MEFT stands beside a whole FFN; set "
            f"target_modules to its name{_one_of(found)}."
        )
    _check_config(model, path)
    return ffn


def targeted_ffns(config: MEFTConfig, model: nn.Module) -> tuple[dict[str, FFN], list[str]]:
    """The FFNs that `target_modules` names, and the paths of other modules that it matches too.

    Raises:
        ValueError: a name, or the regular expression, matches modules but no FFN; or an FFN's input comes in pieces.
    """
    known, inside, matched = ffns(model), "", []
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = f"{path}."
        if path and check_target_module_exists(config, path):
            matched.append(path)
    found = {path: known[path] for path in matched if path in known}
    names = config.target_modules
    for name in sorted(names) if isinstance(names, list | set) else [None]:
        ours = [path for path in matched if name is None or path == name or path.endswith(f".{name}")]
        if ours and not any(path in known for path in ours):  # as in a model without numbered layers
            known |= {path: ffn_at(model, path) for path in ours}
            found |= {path: known[path] for path in ours}
    for path in found:
        _check_config(model, path)
    found = {path: found[path] for path in matched if path in found}
    return found, [path for path in matched if path not in known]


def candidates(model: nn.Module) -> list[str]:
    """Names of a model's FFNs, of which each is a `target_modules`."""
    return sorted({path.rpartition(".")[2] for path in ffns(model)})


def default_targets(config: MEFTConfig, model_type: str | None, model: nn.Module) -> set[str] | str:
    """The `target_modules` of the FFNs of an architecture of transformers; of a model with several towers, those of
    its text model. Takes `layers_to_transform` in where it is no list of names.

    Raises:
        ValueError: the architecture is another one, or has no FFN.
    """
    known = ffns(model)
    chosen = {path for path in known if _in_text_model(model, path)}
    if model_type not in CONFIG_MAPPING or not chosen:
        unknown = f"target_modules=None: the FFN of model type '{model_type}' is not known"
        if not known:
            raise ValueError(f"{unknown}, and no module of this model looks like one: use a method for linear layers.")
        raise ValueError(f"{unknown}; name it, candidates in this model: {', '.join(candidates(model))}.")
    names = {path.rpartition(".")[2] for path in chosen}
    matched = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in names}
    if matched == chosen:
        return names
    if config.layers_to_transform is not None:  # PEFT ignores it beside expressions and whole paths
        by_name = replace(config, target_modules=sorted(names))
        chosen = {path for path in chosen if check_target_module_exists(by_name, path)}
        config.layers_to_transform = config.layers_pattern = None
    forms = {r"\.".join(r"\d+" if name.isdigit() else re.escape(name) for name in path.split(".")) for path in chosen}
    expression = "|".join(sorted(forms))
    exact = {path for path, _ in model.named_modules() if re.fullmatch(expression, path)} == chosen
    return expression if exact else chosen


# ---------------------------------------------------------------------- the rule


def _ffn(model: nn.Module, path: str) -> FFN | None:
    names = path.split(".")
    first = next((i for i, name in enumerate(names[:-1]) if name.isdigit()), None)  # the layer's index
    if first is None or any(_ATTENTION.search(name) or _NORM.search(name) for name in names[first:]):
        return None
    module = _unwrapped(model.get_submodule(path))
    if is_linear(module):
        return _second_linear(module, model.get_submodule(path.rpartition(".")[0]))
    if "input_tensor" in _parameters(module):
        return _second_module(module, model.get_submodule(path.rpartition(".")[0]))
    width = _width(module)
    if width is None or not _is_token_wise(module, width):
        return None
    return FFN(module, width)


def _named(module: nn.Module, name: str) -> FFN | None:
    """A module that is named and lies in no numbered layer, or has one linear layer: it must map tokens one by one."""
    module = _unwrapped(module)
    linear = [_shape(part) for part in module.modules() if is_linear(part)]
    if _ATTENTION.search(name) or _NORM.search(name) or is_linear(module):
        return None
    if not linear or linear[0][0] != linear[-1][1] or not _is_token_wise(module, linear[0][0]):
        return None
    return FFN(module, linear[0][0])


def _is_token_wise(module: nn.Module, width: int) -> bool:
    """Whether a module is called with hidden states alone, and neither mixes tokens nor is a residual block."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    parameters = _parameters(module)
    required = [p for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(required) > 2 or any(_MIXES_TOKENS.search(name) for name in parameters):
        return False
    for part in module.modules():
        if _ATTENTION.search(type(part).__name__) or isinstance(part, _CONVOLUTIONS):
            return False
        if _NORM.search(type(part).__name__) and any(p.shape == (width,) for p in part.parameters()):
            return False
    return True


def _second_module(module: nn.Module, parent: nn.Module) -> FFN | None:
    """Of BERT's pair: it ends in a linear layer whose counterpart another module of the layer has."""
    own = [_shape(child) for child in module.children() if is_linear(child)]
    if len(own) != 1 or _ATTENTION.search(type(parent).__name__):
        return None
    others = [_unwrapped(child) for child in parent.children() if _unwrapped(child) is not module]
    counterparts = [_shape(p) for m in others for p in m.modules() if is_linear(p) and not _in_attention(m)]
    return FFN(module, own[0][1]) if own[0][::-1] in counterparts else None


def _second_linear(module: nn.Module, parent: nn.Module) -> FFN | None:
    """Of two linear layers that their parent calls; not of a parent that is an FFN itself."""
    siblings = [_unwrapped(child) for child in parent.children()]
    linear = [child for child in siblings if is_linear(child)]
    before = linear[: linear.index(module)]
    ups = [child for child in before if _shape(child) == _shape(module)[::-1]]
    inner, width = _shape(module)
    if not ups or inner < width or (inner == width and len(linear) != 2) or _ATTENTION.search(type(parent).__name__):
        return None
    return FFN(module, width, ups[0])


def _width(module: nn.Module) -> int | None:
    """The width of what a module maps to the same width, by the shapes of its weights."""
    linear = [_shape(part) for part in module.modules() if is_linear(part)]
    if len(linear) > 1 and linear[0][0] in {out for _, out in linear}:
        return linear[0][0]
    apart = [part for part in module.modules() if not is_linear(part)]
    weights = [whole_shape(p) for part in apart for p in part.parameters(recurse=False)]
    experts = [set(shape[1:]) for shape in weights if len(shape) == 3]
    if len(experts) < 2:
        rows = {shape for shape in weights if len(shape) == 2}  # DBRX: all experts' rows in one matrix
        stacked = len(rows) == 1 and linear and linear[0][0] == next(iter(rows))[1]
        return linear[0][0] if stacked else None
    read = {first for first, _ in linear} | {shape[-1] for shape in weights if len(shape) == 2}  # by the router
    common = set.intersection(*experts)
    common = common & read if len(common) > 1 else common
    return common.pop() if len(common) == 1 else None


def _shape(linear: nn.Module) -> tuple[int, int]:
    """in_features and out_features."""
    if isinstance(linear, Conv1D):
        first, second = whole_shape(linear.weight)
        return first, second
    return int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]


def _in_attention(module: nn.Module) -> bool:
    return bool(_ATTENTION.search(type(module).__name__))


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(module.forward).parameters)


def _unwrapped(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _one_of(found: dict[str, FFN]) -> str:
    names = sorted({path.rpartition(".")[2] for path in found})
    return f", one of {', '.join(names)}" if names else ""


def _check_config(model: nn.Module, path: str) -> None:
    pieces = getattr(model.get_submodule(path.rpartition(".")[0]), "chunk_size_feed_forward", 0)
    if pieces:
        raise ValueError(
            f"chunk_size_feed_forward={pieces} in the model's config cuts the FFN's input into pieces that the padding "
            "mask does not fit: set it to 0, which changes no result."
        )
    rescaled = getattr(getattr(model, "config", None), "rescale_every", 0)
    if rescaled:
        raise ValueError(
            f"rescale_every={rescaled} in the model's config divides the FFN's weights in eval mode, and the adapter's "
            "output would not follow: set it to 0 in the model's config, which changes no result in float32."
        )


def _in_text_model(model: nn.Module, path: str) -> bool:
    """Whether a module belongs to the text model of a model that has other towers."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    around = [part for part in _modules_around(model, path) if isinstance(part, PreTrainedModel)]
    if text is config or getattr(config, "is_encoder_decoder", False):
        return not around or type(around[-1].config) is type(config) or around[-1].main_input_name == "input_ids"
    return any(type(part.config) is type(text) for part in around)


def _modules_around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    yield model
    for name in path.split(".")[:-1]:
        model = model.get_submodule(name)
        yield model
