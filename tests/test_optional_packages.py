"""bitsandbytes, trl, datasets and torchao are used where they are there; nothing of ours needs them to be imported."""

from importlib.util import find_spec

from tests.support.processes import run_code

OPTIONAL = ("bitsandbytes", "trl", "datasets", "torchao")
EVERY_MODULE = """
import importlib, pkgutil
ROOMS = ("adapter_kernels", "peft_bridge", "aslora", "meft", "aslora_meft")
for room in ROOMS:
    for found in pkgutil.walk_packages(importlib.import_module(room).__path__, room + "."):
        # Not what runs when it is imported or what other programs load, nor C++ libraries, which are no modules.
        if not found.name.endswith("__main__") and "._" not in found.name and ".plugins." not in found.name:
            importlib.import_module(found.name)
"""
# As where they are not installed: neither their modules nor what the package index says of them.
HIDDEN = f"""
import importlib.metadata as metadata, sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
real = metadata.version
def version(name):
    if name in {OPTIONAL!r}:
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
"""
# Whoever writes the import, also where another package has imported it before.
IMPORTERS = f"""
import builtins
real, importers = builtins.__import__, set()
def listed(name, globals=None, *rest, **fields):
    if name.partition(".")[0] in {OPTIONAL!r}:
        importers.add((globals or {{}}).get("__name__", "?").partition(".")[0])
    return real(name, globals, *rest, **fields)
builtins.__import__ = listed
"""
USE = """
import sys, tempfile
import torch
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from aslora import ASLoRAConfig
from aslora_meft import doctor
from aslora_meft.adapter import load_model
from aslora_meft.arguments.groups import ModelArguments
from aslora_meft.errors import UsageError
from meft import MEFTConfig
from tests.support.models import llama

def base():
    return llama(vocab_size=32, hidden_size=16, intermediate_size=32)

ids = torch.arange(12).view(2, 6)
for adapter in (
    ASLoRAConfig(r=2, total_steps=4, merge_start=1, merge_interval=1), MEFTConfig(r=32, num_experts=8, top_k=8)
):
    model = get_peft_model(base(), adapter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base(), folder).eval()
    with torch.no_grad():
        found, expected, plain = (m.eval()(input_ids=ids).logits for m in (loaded, model, base()))
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)

doctor.calibrated = lambda *args, **kwargs: ""  # seconds
print(doctor.report())
with tempfile.TemporaryDirectory() as folder:
    base().save_pretrained(folder)
    try:
        load_model(ModelArguments(model=folder, load_in_4bit=True), torch.device("cpu"))
    except UsageError as error:
        print("4-bit:", error)
    try:
        LlamaForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    except ImportError as error:
        print("8-bit:", error)
"""


def output(program, **process):
    return run_code("import warnings; warnings.simplefilter('ignore')\n" + program, timeout=300, **process)


def test_without_them_all_but_quantised_bases_works_and_those_name_bitsandbytes():
    lines = output(HIDDEN + EVERY_MODULE + USE, fresh=True).splitlines()
    said = {line.split()[0]: line for line in lines if line.strip()}
    assert "not installed: needed by 4-bit and 8-bit bases" in said["bitsandbytes"]
    assert "load_in_4bit" not in said["4-bit:"]  # a sentence, no repr of what was given
    assert "could not be loaded: Using `bitsandbytes` 4-bit quantization requires bitsandbytes" in said["4-bit:"]
    assert "requires bitsandbytes" in said["8-bit:"]


def test_nothing_of_ours_imports_them_even_where_they_are_installed():
    importers = set(output(IMPORTERS + EVERY_MODULE + "print(*importers)", bare=True).split())
    if find_spec("bitsandbytes") is not None:
        assert "peft" in importers  # so that this would see it
    assert importers.isdisjoint({"adapter_kernels", "peft_bridge", "aslora", "meft", "aslora_meft"})
