"""The adapter's arguments: the fields of the methods' PEFT configs, with their help, read as they are annotated."""

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peft import LoraConfig, PeftConfig
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND

from aslora import ASLoRAConfig
from aslora_meft.arguments.field_checks import check_field, check_initialisation
from aslora_meft.arguments.text import parse_json
from aslora_meft.errors import UsageError, as_usage_error
from meft import MEFTConfig

METHODS: dict[str, type[PeftConfig]] = {"aslora": ASLoRAConfig, "meft": MEFTConfig, "lora": LoraConfig}
_TRUE, _FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")  # HfArgumentParser's
_SENTENCE = re.compile(r"(?<=[.]) (?=[A-Z])")


def config_fields(config: type[PeftConfig]) -> dict[str, dataclasses.Field[Any]]:
    """Name -> field of all that a user may set: not what PEFT keeps in every config about model and version."""
    kept = {field.name for field in dataclasses.fields(PeftConfig)}
    return {field.name: field for field in dataclasses.fields(config) if field.init and field.name not in kept}


def add_config_arguments(parser: argparse.ArgumentParser, configs: Mapping[str, type[PeftConfig]]) -> None:
    """Add an argument for each field of the configs; a field that several methods have appears once.

    What is parsed are words, for :func:`read_fields`; an argument that is not given leaves no trace.

    Args:
        configs: method -> its config class.
    """
    owners: dict[str, list[str]] = {}
    for method, config in configs.items():
        for name in config_fields(config):
            owners.setdefault(name, []).append(method)
    shared = "adapter, of several methods"
    titles = [shared, *(f"adapter, --method {method}" for method in configs)]
    groups = {title: parser.add_argument_group(title) for title in titles}
    for name, methods in owners.items():
        kinds = [kind for method in methods for kind in _kinds(_hints(configs[method])[name])]
        options: dict[str, Any] = {"metavar": _metavar(name, [configs[method] for method in methods])}
        if any(get_origin(kind) is list for kind in kinds):
            options["nargs"] = "+"
        elif set(kinds) == {bool}:
            options |= {"nargs": "?", "const": "true"}
        groups[shared if len(methods) > 1 else f"adapter, --method {methods[0]}"].add_argument(
            *dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")),
            dest=name,
            default=argparse.SUPPRESS,
            help=_help(name, {method: configs[method] for method in methods}),
            **options,
        )


def read_fields(
    method: str, words: Mapping[str, str | list[str]], configs: Mapping[str, type[PeftConfig]]
) -> dict[str, Any]:
    """Turn words into the fields of a method's config.

    Raises:
        UsageError: the method has no such field, or its words do not suit its annotation.
    """
    config = configs[method]
    known, hints = config_fields(config), _hints(config)
    fields = {}
    for name, value in words.items():
        parts = [value] if isinstance(value, str) else value
        if name not in known:
            others = [other for other in configs if name in config_fields(configs[other])]
            remedy = getattr(config, "remedies", {}).get(name, f"drop it or use method={' or '.join(others)}")
            raise UsageError(f"{name}={' '.join(parts)} has no meaning with method={method}; {remedy}")
        fields[name] = _read(known[name], parts, hints[name])
        check_field(name, fields[name])
    return fields


def make_config(method: str, words: Mapping[str, str | list[str]], task_type: str = "CAUSAL_LM") -> PeftConfig:
    """The config of one of :data:`METHODS`; what is not given has the method's default.

    Args:
        task_type: PEFT's name of the kind of model.

    Raises:
        UsageError: a field that the method does not have, or a value that it does not allow.
    """
    fields = read_fields(method, words, METHODS)
    check_initialisation(fields.get("init_lora_weights"))
    with as_usage_error(ValueError, TypeError, ImportError, OverflowError, RecursionError):
        config: Any = METHODS[method](task_type=task_type, **fields)
    if method == "lora":  # its config checks nothing
        if config.r < 1:
            raise UsageError(f"r={config.r} is no rank; give an integer of at least 1")
        if not 0 <= config.lora_dropout < 1:
            raise UsageError(f"lora_dropout={config.lora_dropout} is out of range; give a number in [0, 1)")
    result: PeftConfig = config
    return result


_annotations: dict[type[PeftConfig], dict[str, Any]] = {}


def _hints(config: type[PeftConfig]) -> dict[str, Any]:
    """Name -> annotation: kept, for each look compiles the text of all of them."""
    if config not in _annotations:
        _annotations[config] = get_type_hints(config)
    return _annotations[config]


def _kinds(annotation: Any) -> list[Any]:
    """The types that a value may have, without None."""
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [] if annotation is NoneType else [annotation]


def _nested(kind: Any) -> bool:
    """Whether values of a type are written as JSON."""
    if get_origin(kind) is list:
        return get_args(kind)[0] not in (str, int, float)
    return kind is dict or get_origin(kind) is dict or dataclasses.is_dataclass(kind)


def _read(field: dataclasses.Field[Any], words: Sequence[str], annotation: Any) -> Any:
    kinds = _kinds(annotation)
    nested = [kind for kind in kinds if _nested(kind)]
    lists = [kind for kind in kinds if get_origin(kind) is list and not _nested(kind)]
    one = words[0] if len(words) == 1 else None
    if nested and one is not None and (one[:1] in "{[" or len(nested) == len(kinds)):
        return _read_json(field.name, one, nested)
    if lists and not (one is not None and str in kinds and _is_pattern(one)):
        return [_read_scalar(field, word, _kinds(get_args(lists[0])[0])) for word in words]
    if one is None:
        raise UsageError(f"{field.name}={' '.join(words)} is more than one value; give one")
    return _read_scalar(field, one, kinds)


def _is_pattern(word: str) -> bool:
    """Whether a word is a regular expression or PEFT's name for all linear layers, and not a module's name."""
    return word == INCLUDE_LINEAR_LAYERS_SHORTHAND or re.fullmatch(r"[\w.-]+", word) is None


def _read_json(name: str, word: str, kinds: Sequence[Any]) -> Any:
    value = parse_json(word, f"{name}={word!r}")
    mappings = [kind for kind in kinds if get_origin(kind) is not list]
    wanted = [dict] * bool(mappings) + [list] * (len(mappings) < len(kinds))
    if not isinstance(value, tuple(wanted)):
        raise UsageError(f"{name}={word!r} is no JSON {' or '.join({dict: 'object', list: 'list'}[w] for w in wanted)}")
    if isinstance(value, dict) and all(dataclasses.is_dataclass(kind) for kind in mappings):
        with as_usage_error(ValueError, TypeError, prefix=f"{name}={word!r} is refused: "):
            return mappings[0](**value)
    return value


def _read_scalar(field: dataclasses.Field[Any], word: str, kinds: Sequence[Any]) -> Any:
    if bool in kinds and word.lower() in (*_TRUE, *_FALSE):
        return word.lower() in _TRUE
    if int in kinds or float in kinds:
        if re.fullmatch(r"[+-]?\d{1,999}", word):
            if abs(int(word)) >= 2**63:
                raise UsageError(f"{field.name}={word[:20]}... has {len(word)} digits; give a smaller number")
            return int(word)
        if float in kinds and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|nan|[+-]?inf", word):
            return float(word)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    # PEFT writes a part that is up to the user as pissa_niter_[number of iters].
    if str in kinds or any(word == c or ("[" in c and word.startswith(c.partition("[")[0])) for c in choices):
        return word
    if choices:
        raise UsageError(f"{field.name}={word!r} is unknown; choose from {', '.join(choices)}")
    what = "number" if float in kinds else "integer" if int in kinds else "truth value, true or false"
    such = "" if field.default in (None, dataclasses.MISSING) else f", such as {field.default}"
    raise UsageError(f"{field.name}={word!r} is no {what}; give one{such}")


def _metavar(name: str, configs: Sequence[type[PeftConfig]]) -> str:
    names = []
    for config in configs:
        kinds = _kinds(_hints(config)[name])
        choices = getattr(config, "choices", {}).get(name) or [c for k in kinds for c in get_args(k) if type(c) is str]
        if choices:
            names.append("{" + ",".join(choices) + "}")
        else:
            names += ["JSON" if _nested(k) else _type_name((get_args(k) or (k,))[0]) for k in kinds]
    return "|".join(dict.fromkeys(names))


def _type_name(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind)).upper()


def _help(name: str, configs: Mapping[str, type[PeftConfig]]) -> str:
    """The fields' help and defaults, of each method where they differ."""
    fields = {method: config_fields(config)[name] for method, config in configs.items()}
    # One of PEFT's is a tuple with a string in it.
    texts = {method: " ".join("".join(field.metadata.get("help", "")).split()) for method, field in fields.items()}
    defaults = {m: f.default for m, f in fields.items() if f.default is not dataclasses.MISSING}
    if len(set(texts.values())) == 1:
        text = texts[next(iter(texts))]
    else:
        parts = {help_text: [m for m in texts if texts[m] == help_text] for help_text in texts.values()}
        text = " ".join(f"{', '.join(of)}: {_SENTENCE.split(help_text)[0]}" for help_text, of in parts.items())
    if len(set(map(repr, defaults.values()))) == 1:
        text += f" (default: {next(iter(defaults.values()))})"
    elif defaults:
        text += f" (default: {', '.join(f'{method} {value}' for method, value in defaults.items())})"
    return text.replace("%", "%%")
