"""README.md of an adapter's folder: what the adapter is, how to load and serve it, how it was trained.

The text is made from the folder alone: `adapter_config.json`, the weights, and `results.json` where the command line
has written one. It stands between two marks, so that what a user writes before or after it stays.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import peft
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.utils import CONFIG_NAME as MODEL_CONFIG

from .atomic_files import replace_file

CARD, RESULTS = "README.md", "results.json"
BEGIN, END = "<!-- aslora-meft: written at each save -->", "<!-- aslora-meft: end -->"
_TEMPLATE = "# Model Card for Model ID"  # PEFT's, with every entry left blank
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "SEQ_2_SEQ_LM": "text2text-generation",
}
_ORIGIN = {field.name for field in dataclasses.fields(peft.PeftConfig)}  # about model and version, no option


class MethodCard(NamedTuple):
    """What a method says about its adapters.

    Attributes:
        name: of the method.
        about: one or two sentences.
        serve: how to serve an adapter, in Markdown.
        describe: Markdown sections from the folder of an adapter, of its weights.
    """

    name: str
    about: str
    serve: str
    describe: Callable[[Path], list[str]]


_methods: dict[str, MethodCard] = {}


def describe_in_cards(method: str, card: MethodCard) -> None:
    """Let the folders of a method's adapters (by the name of its `PeftType`) have cards; repeated calls change nothing.

    The method's package has the lower-case form of that name.
    """
    _methods[method] = card


def write_card(folder: str | Path) -> None:
    """Write, or bring up to date, the card of a saved adapter.

    A README.md that a user wrote keeps its text; it is left alone where the folder has no weights.
    """
    folder = Path(folder)
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    method = _methods.get(str(config.get("peft_type")))
    if method is None:
        return
    path = folder / CARD
    written = path.read_text(encoding="utf-8") if path.is_file() else ""
    if written and not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        return
    card: Any = ModelCard(written, ignore_metadata_errors=True)
    if not written:  # by transformers' save; PEFT's names the base model where it is one of transformers
        card.data.base_model = config.get("base_model_name_or_path")
    _set_head(card, config, str(config["peft_type"]).lower())
    text = "\n".join([BEGIN, *_lines(folder, config, method), END])
    if BEGIN in card.text and END in card.text:
        before, _, rest = card.text.partition(BEGIN)
        text = before + text + rest.partition(END)[2]
    elif _TEMPLATE not in card.text:
        text = f"{card.text.rstrip()}\n\n{text}\n"
    card.text = text.strip() + "\n"
    replace_file(path, str(card).encode())


def read_results(folder: Path) -> dict[str, Any]:
    """What `aslora-meft train` has written about a run; empty where there is nothing that can be read."""
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, dict) else {}


def _set_head(card: Any, config: dict[str, Any], package: str) -> None:
    head: Any = card.data
    head.library_name = "peft"
    head.license = head.license or "unknown"
    base = config.get("base_model_name_or_path")
    tags = set(head.tags or [])
    if base and _is_folder(base):  # which the hub refuses, and which says nothing to others
        head.base_model = head.base_model if head.base_model != base else None
        tags.discard(f"base_model:adapter:{base}")
    if (tag := _PIPELINES.get(str(config.get("task_type")))) is not None:
        head.pipeline_tag = head.pipeline_tag or tag
    head.tags = sorted({*tags, package, "aslora-meft"})


def _is_folder(base: str) -> bool:
    """Whether a base model's name is that of a folder: it cannot be a hub id, or is one word and such a folder is here.

    What may be `owner/name` stays: PEFT takes it for a hub id.
    """
    try:
        validate_repo_id(base)
    except HFValidationError:
        return True
    return base.startswith(".") or ("/" not in base and Path(base).is_dir())


def _lines(folder: Path, config: dict[str, Any], method: MethodCard) -> list[str]:
    package = str(config["peft_type"]).lower()
    base = config.get("base_model_name_or_path") or "its base model"
    base = Path(base).name if _is_folder(base) else base
    run = read_results(folder)
    with_config = (folder / MODEL_CONFIG).is_file()
    sections = [
        f"# {method.name} adapter for {base}",
        method.about,
        "## Load",
        f"```\npip install aslora-meft\n```\n\n```python\n{_snippet(package, config, with_config)}\n```",
        "`pip install aslora-meft` also lets programs that do not import it load this adapter, such as "
        "lm-evaluation-harness with `peft=`. Where that is switched off (`ASLORA_MEFT_AUTOLOAD=0`), start them by "
        "`aslora-meft run -- PROGRAM ...`.",
        "## Serve",
        method.serve,
        "## Hyperparameters",
        _table(("field", "value"), _options(config)),
        *(method.describe(folder) if (folder / SAFETENSORS_WEIGHTS_NAME).is_file() else []),
        *_results(run),
        "## Licence",
        "The field `license` at the head of this file is `unknown` until you set it. The licences of the base model "
        "and of the data apply as well.",
        "### Framework versions",
        "\n".join(f"- {name} {found}" for name, found in _versions()),
    ]
    return [part for section in sections for part in (section, "")][:-1]


_AUTO = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
}


def _snippet(package: str, config: dict[str, Any], with_config: bool) -> str:
    note = f"import {package}  # makes PEFT know the method"
    auto = _AUTO.get(str(config.get("task_type")))
    if auto is not None and config.get("base_model_name_or_path"):
        if with_config:  # which has the size of the head
            load = "fields = {'id2label': head.id2label, 'pad_token_id': head.pad_token_id}\n"
            load += f"model = {auto}.from_pretrained(folder, **fields)"
            imports = f"from peft import {auto}\nfrom transformers import AutoConfig"
            head = "folder = 'PATH_OF_THIS_FOLDER'\nhead = AutoConfig.from_pretrained(folder)"
            return f"{note}\n{imports}\n\n{head}\n{load}"
        load = f"model = {auto}.from_pretrained('PATH_OF_THIS_FOLDER')"
        return f"{note}\nfrom peft import {auto}\n\n{load}"
    load = "model = PeftModel.from_pretrained(base_model, 'PATH_OF_THIS_FOLDER')"
    return f"{note}\nfrom peft import PeftModel\n\n{load}"


def _options(config: dict[str, Any]) -> list[tuple[str, str]]:
    """What was set, and the sizes: fields that are neither about origin nor empty."""
    left_out = {*_ORIGIN, "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type"}
    shown = {name: value for name, value in config.items() if name not in left_out and value not in (None, False, [])}
    return [
        (f"`{name}`", f"`{', '.join(sorted(map(str, value))) if isinstance(value, list) else value}`")
        for name, value in sorted(shown.items())
    ]


def _results(run: dict[str, Any]) -> list[str]:
    sections: list[str] = []
    rows: list[tuple[str, ...]]
    if "before" in run and "after" in run:
        rows = [(name, f"{run['before'][name]:.4g}", f"{run['after'][name]:.4g}") for name in run["after"]]
        sections += ["## Results on held-out data", _table(("metric", "before", "after"), rows)]
    if run.get("data"):
        sections += ["## Training data", _table(("what", "value"), [(k, str(v)) for k, v in run["data"].items()])]
    if run.get("training"):
        rows = [(f"`{name}`", f"`{value}`") for name, value in run["training"].items()]
        sections += ["## Training", _table(("field", "value"), rows)]
    return sections


@cache  # each look reads and parses the packages' metadata
def _versions() -> list[tuple[str, str]]:
    found = []
    for title, name in (("PEFT", "peft"), ("aslora-meft", "aslora-meft"), ("Transformers", "transformers")):
        try:
            found.append((title, version(name)))
        except PackageNotFoundError:
            found.append((title, "unknown"))
    return found


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)
