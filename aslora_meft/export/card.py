"""The model card of an export."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from peft import PeftConfig

from aslora_meft import __version__
from aslora_meft.export.base_model import BaseModel

_PAPERS = {"MEFT": "https://arxiv.org/abs/2406.04984", "ASLORA": "https://arxiv.org/abs/2412.10135"}
_NAMES = {"MEFT": "MEFT", "ASLORA": "ASLoRA"}
_WHAT = {
    "model": "{base} with a {method} adapter beside its FFNs, as one model folder.",
    "merged": "{base} with {method} adapters merged into its weights: a plain model.",
    "lora": "A LoRA adapter for {base}, equal to the {method} adapter that it was exported from.",
}
_LOAD = {
    "model": """
The folder has its own modelling file, so that `trust_remote_code=True` is needed. Read the file first: it is short.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
```

```
vllm serve FOLDER --trust-remote-code --model-impl transformers
```
""",
    "merged": """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

```
vllm serve FOLDER
```
""",
    "lora": """
```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(FOLDER)
```

```
vllm serve BASE --enable-lora --max-lora-rank RANK --lora-modules adapter=FOLDER
```
""",
}


def model_card(
    adapter: Path,
    config: PeftConfig,
    base: BaseModel | None,
    *,
    form: str,
    details: dict[str, Any],
    tokenizer: bool,
) -> str:
    """README.md of an export: front matter that a hub reads, and how to load it.

    Args:
        adapter: folder of the adapter; its results.json, which `train` writes, gives the metrics.
        base: where its licence is read, from README.md; None: it is not known.
        form: "model", "merged" or "lora".
        details: hyperparameters to list.
        tokenizer: whether the export has one.
    """
    method = str(getattr(config.peft_type, "value", config.peft_type))
    given = config.base_model_name_or_path or "the base model"
    is_folder = Path(given).is_absolute() or Path(given).exists()
    name = Path(given).name if is_folder else given  # a path of this machine tells a reader nothing
    front: dict[str, Any] = {
        "library_name": "peft" if form == "lora" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [_NAMES[method].lower(), "lora" if form == "lora" else "aslora-meft"],
    }
    if not is_folder:
        front["base_model"] = name
    if base is not None and (known := _front_matter(base.folder).get("license")):
        front["license"] = known
    linked = f"[{_NAMES[method]}]({_PAPERS[method]})"
    lines = ["---", yaml.safe_dump(front, sort_keys=True).strip(), "---", ""]
    lines += [f"# {Path(name).name} with {_NAMES[method]}", "", _WHAT[form].format(base=f"`{name}`", method=linked), ""]
    if "license" not in front:
        lines += ["The base model's card names no licence; the base model's licence holds for this model too.", ""]
    lines += ["## Load and serve", _LOAD[form].replace("BASE", name).replace("RANK", str(details.get("r", "")))]
    if not tokenizer:
        lines += ["The base model's folder had no tokenizer, so there is none here.", ""]
    lines += ["## Training", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in details.items()]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return "\n".join([*lines, *_metrics(adapter), "", f"Written by aslora-meft {__version__} ({versions}).", ""])


def _front_matter(folder: Path) -> dict[str, Any]:
    """Of a folder's README.md; empty where there is none that can be read."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        found = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, UnicodeError, IndexError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _metrics(adapter: Path) -> list[str]:
    """Held-out metrics before and after training, where `train` has written them."""
    try:
        results = json.loads((adapter / "results.json").read_text(encoding="utf-8"))
        before, after = results["before"], results["after"]
        rows = [f"| {key} | {before[key]:.4g} | {after[key]:.4g} |" for key in ("loss", "perplexity", "accuracy")]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return ["", "| held out | base model | with the adapter |", "|---|---|---|", *rows]
