"""axolotl's plug-in in the real axolotl: its reading of the example files, and its loader of adapters.

Not a part of CI: axolotl pins other versions and asks for Python 3.12. No training run is started.

    pip install --no-deps --target AXOLOTL axolotl==0.21.0   # by Python 3.12; its source also runs on 3.11
    pip install --no-deps --target AXOLOTL addict posthog backoff distro colorama art fire termcolor \\
        python-dotenv nvidia-ml-py
    PYTHONPATH=AXOLOTL python tests/accept/axolotl_plugin.py [--out FILE]
"""

import argparse
import importlib.metadata
import platform
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from axolotl.integrations.base import PluginManager
from axolotl.loaders.adapter import load_adapter
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.support.models import llama

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "axolotl"
SMALL = {
    "aslora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "meft": {"r": 64, "num_experts": 8, "experts_per_token": 2, "top_k": 8},
}
IDS = torch.arange(2, 34).view(2, 16)


def read(method: str, **fields: object) -> DictDefault:
    """An example file, changed, read as axolotl's command line reads it."""
    cfg = DictDefault(yaml.safe_load((EXAMPLES / f"{method}.yaml").read_text()) | {"bf16": False} | fields)
    prepare_plugins(cfg)
    return validate_config(cfg)


def refused(method: str, **fields: object) -> str:
    """What axolotl says of a file with a mistake, before it loads a model."""
    try:
        read(method, **fields)
    except ValueError as error:
        line = next(line for line in str(error).splitlines() if "Value error" in line)
        return line.strip().partition(" [type=")[0]
    raise AssertionError(f"{fields} was accepted")


def train(model: torch.nn.Module, steps: int = 20) -> tuple[float, float]:
    """First and last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def check(method: str, folder: Path) -> list[str]:
    """Rows of the table: what was done, and what came of it."""
    full = read(method)
    cfg = read(method, **{method: SMALL[method]})
    rows = [f"| axolotl reads examples/axolotl/{method}.yaml | r {full[method]['r']} |"]
    model, config = load_adapter(llama(), cfg, cfg.adapter)
    rows.append(f"| `load_adapter`, new | {type(config).__name__}, {type(model).__name__} |")
    first, last = train(model)
    assert last < first - 0.1, (first, last)
    rows.append(f"| 20 AdamW steps of our own | loss {first:.2f} to {last:.2f} |")
    model.save_pretrained(folder)
    cfg.lora_model_dir = str(folder)
    loaded, _ = load_adapter(llama(), cfg, cfg.adapter, inference=True)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    rows.append("| `load_adapter` with `lora_model_dir`, inference | bit-equal logits |")
    nothing, only = load_adapter(llama(), read(method), method, config_only=True)
    assert nothing is None
    assert only.r == full[method]["r"]
    rows.append("| `load_adapter`, `config_only` | no model, the configuration |")
    rows.append(f"| an unknown field | {refused(method, **{method: {'rank': 2}})} |")
    rows.append(f"| a field of axolotl's LoRA | {refused(method, lora_r=8)} |")
    return rows


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = ("axolotl", "torch", "transformers", "peft")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    text = [
        "# The plug-in in axolotl",
        "",
        f"`python tests/accept/axolotl_plugin.py`: {versions}, Python {platform.python_version()}",
        "(axolotl asks for 3.12); a random Llama of 2 layers. axolotl was installed without its dependencies. A whole",
        "training run was not run.",
        "",
    ]
    for method in SMALL:
        with tempfile.TemporaryDirectory() as folder:
            text += [f"## `adapter: {method}`", "", "| step | result |", "|---|---|", *check(method, Path(folder)), ""]
    capabilities = PluginManager.get_instance().adapter_capabilities()
    assert {"aslora", "meft"} <= capabilities.keys()
    text += [f"`adapter_capabilities()`: {', '.join(str(capabilities[name]) for name in SMALL)}", ""]
    plain = llama()
    cfg = DictDefault(adapter="lora", lora_r=2, lora_alpha=4, lora_target_modules=["q_proj"], lora_dropout=0.0)
    _, config = load_adapter(plain, cfg, "lora")
    assert type(config).__name__ == "LoraConfig"
    text += ["With the plug-in listed, `adapter: lora` still gives a LoraConfig.", ""]
    print("\n".join(text))
    if options.out:
        options.out.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
