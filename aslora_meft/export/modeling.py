"""The modelling file of an exported MEFT model: the one for Llama, with the names of another family."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from transformers import PreTrainedModel

_TEMPLATE = Path(__file__).with_name("modeling_meft_llama.py")
# Families whose FFN is one module, y = FFN(x), the same in each layer, and whose files have the model's own names.
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "gptj",
    "gpt_neo",
    "gpt_bigcode",
    "starcoder2",
    "stablelm",
    "falcon",
    "bloom",
    "cohere",
    "cohere2",
    "olmo",
    "olmo2",
    "olmo3",
    "granite",
    "smollm3",
    "glm",
    "glm4",
    "nemotron",
    "codegen",
    "mpt",
    "persimmon",
)


@dataclass(frozen=True)
class Modelling:
    """What a modelling file names.

    Attributes:
        model_type: of the base model.
        config, base, head: names of transformers' classes.
        prefix: attribute of the head that holds the base model. layers: path in the base model of the list of layers.
        ffn: attribute of a layer that is its FFN. numbers: the layers that have MEFT. whole: whether all have it.
    """

    model_type: str
    config: str
    base: str
    head: str
    prefix: str
    layers: str
    ffn: str
    numbers: tuple[int, ...]
    whole: bool

    @property
    def file(self) -> str:
        """Name of the file, without its ending."""
        return f"modeling_meft_{self.model_type}"

    def auto_map(self) -> dict[str, str]:
        """Of config.json: transformers' automatic classes -> what stands for them in the file."""
        names = {"AutoConfig": self.config, "AutoModel": self.base, "AutoModelForCausalLM": self.head}
        return {auto: f"{self.file}.Meft{name}" for auto, name in names.items()}

    def served_name(self, name: str) -> str:
        """The name in the exported model of a tensor of the base model."""
        for number in self.numbers:
            path = f"{self.prefix}.{self.layers}.{number}.{self.ffn}."
            if name.startswith(path):
                return f"{path}ffn.{name.removeprefix(path)}"
        return name

    def source(self) -> str:
        """The file's text."""
        text = _TEMPLATE.read_text(encoding="utf-8")
        text = text.replace("A Llama whose", f"A {self.head.removesuffix('ForCausalLM')} whose")
        text = text.replace("self.model = ", f"self.{self.prefix} = ")
        text = text.replace("self.layers[i].mlp", f"self.{self.layers}[i].{self.ffn}")
        text = text.replace('".mlp."', f'".{self.ffn}."').replace('".mlp.ffn."', f'".{self.ffn}.ffn."')
        if not self.whole:
            plan = "LlamaConfig.base_model_tp_plan or {}"
            text = text.replace(f"({plan}).items()\n    }}\n", f"({plan}).items()\n    }} | ({plan})\n")
        text = text.replace("meft_llama", f"meft_{self.model_type}")
        theirs = {"LlamaForCausalLM": self.head, "LlamaModel": self.base, "LlamaConfig": self.config}
        for ours, name in theirs.items():
            text = text.replace(ours, name)
        names = (self.config, self.head, self.base)
        return text.replace(f"import {', '.join(names)}\n", f"import {', '.join(sorted(names))}\n")


def check_family(model_type: object) -> None:
    """Check that there is a modelling file for a model type.

    Raises:
        ValueError: there is none.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"model type '{model_type}' cannot be exported by --to model, which knows {', '.join(FAMILIES)}: load the "
            "adapter with PEFT instead."
        )


def modelling_of(model: PreTrainedModel, ffns: Iterable[str]) -> Modelling:
    """What the modelling file for a base model must name.

    Args:
        model: the base model, of a family that is known; its tensors may be on the meta device.
        ffns: paths of the FFNs that have MEFT.

    Raises:
        ValueError: one sentence: an FFN is at no usual place.
    """
    config: Any = model.config
    prefix = model.base_model_prefix
    places = [path.rsplit(".", 2) for path in ffns]
    layers = {place[0] for place in places}
    names = {place[-1] for place in places}
    list_of_layers = next(iter(layers), "")
    if (
        len(layers) != 1
        or len(names) != 1
        or not list_of_layers.startswith(f"{prefix}.")
        or not all(len(place) == 3 and place[1].isdecimal() for place in places)
    ):
        raise ValueError(
            f"MEFT stands beside {', '.join(sorted(ffns)[:3])}, and --to model knows one FFN a layer, called "
            f"'{prefix}.<layers>.<number>.<name>': load the adapter with PEFT instead."
        )
    classes = (type(config).__name__, type(getattr(model, prefix)).__name__, type(model).__name__)
    if missing := [name for name in classes if not hasattr(transformers, name)]:
        raise ValueError(
            f"transformers {transformers.__version__} has no public class {missing[0]}: install another one."
        )
    numbers = tuple(sorted(int(place[1]) for place in places))
    whole = len(numbers) == len(model.get_submodule(list_of_layers))  # type: ignore[arg-type]
    inner = list_of_layers.removeprefix(f"{prefix}.")
    return Modelling(config.model_type, *classes, prefix, inner, names.pop(), numbers, whole)


def imported(file: Path) -> ModuleType:
    """Import a modelling file by its path."""
    spec = importlib.util.spec_from_file_location(f"aslora_meft_exported_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
