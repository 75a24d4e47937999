# %% [markdown]
# # ASLoRA, step by step
#
# Fine-tunes a small model with ASLoRA in its own loop, looks at what the layers share, saves and loads the adapter, and
# exports it to plain LoRA. Run it as a script, or cell by cell in an editor that knows `# %%`.
#
# `MODEL` and `STEPS` are read from the environment. With the default model it takes a few minutes on a CPU.

# %%
import os
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from aslora import ASLoRAConfig, export_to_lora

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M")
STEPS = int(os.environ.get("STEPS", "40"))
TEXTS = [
    "The lighthouse keeper of Arden counts the boats at dawn and writes their names into a green book.",
    "The green book of Arden lies on the third shelf, between the almanac and the box of spare wicks.",
    "Every boat of Arden carries a bell, and every bell has a tone that no other boat may use.",
    "When fog comes to Arden the keeper rings all tones in turn, and each boat answers with its own.",
]

# %% [markdown]
# ## The model
#
# One line is new: `ASLoRAConfig` instead of `LoraConfig`. Merges come at fractions of the run, so your own loop needs
# `total_steps`. A Trainer knows it.

# %%
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
model = get_peft_model(base, ASLoRAConfig(r=8, lora_alpha=16, total_steps=STEPS, task_type="CAUSAL_LM"))
model.print_trainable_parameters()

# %% [markdown]
# ## Training
#
# The loop is the usual one. Merges happen after `optimizer.step()`; there is nothing to call.

# %%
batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
losses = []
model.train()
for step in range(1, STEPS + 1):
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step % max(1, STEPS // 8) == 0:
        print(f"step {step}: loss {losses[-1]:.3f}")

# %% [markdown]
# ## What the layers share
#
# The report names the groups of layers and their sizes. `to_dict()` has each merge with its step and distance. In a run
# as short as this one it warns that merges come early.

# %%
report = model.base_model.sharing_report()
print(report)

# %% [markdown]
# ## Saving and loading
#
# `finish_sharing` ends merging, so that the file holds no running averages. A process that loads the file must
# `import aslora` first.

# %%
folder = Path(tempfile.mkdtemp())
model.base_model.finish_sharing()
model.save_pretrained(folder / "aslora")
loaded = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), folder / "aslora"
).eval()
with torch.no_grad():
    expected = model.eval()(**batch).logits
    same = torch.equal(loaded(**batch).logits, expected)
print("the loaded adapter computes the same:", same)

# %% [markdown]
# ## Export to LoRA
#
# The export is exact, and loads with stock PEFT. Logits may differ by rounding.

# %%
export_to_lora(folder / "aslora", folder / "lora")
lora = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), folder / "lora"
).eval()
with torch.no_grad():
    difference = (lora(**batch).logits - expected).abs().max().item()
sizes = {name: (folder / name / "adapter_model.safetensors").stat().st_size for name in ("aslora", "lora")}
print(f"largest difference of a logit: {difference:.2g}")
print(f"bytes: ASLoRA {sizes['aslora']:,}, the LoRA export {sizes['lora']:,}")
