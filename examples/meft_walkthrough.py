# %% [markdown]
# # MEFT, step by step
#
# Fine-tunes a small model with MEFT in its own loop, looks at what was used and moved, continues from a checkpoint, and
# exports model and adapter as one folder. Run it as a script, or cell by cell in an editor that knows `# %%`.
#
# `MODEL`, `STEPS` and `R` are read from the environment. With the default model it takes a few minutes on a CPU.

# %%
import os
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from aslora_meft.export.meft_model import export_model
from meft import MEFTConfig

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M")
STEPS = int(os.environ.get("STEPS", "20"))
R = int(os.environ.get("R", "1024"))
TEXTS = [
    "The lighthouse keeper of Arden counts the boats at dawn and writes their names into a green book.",
    "The green book of Arden lies on the third shelf, between the almanac and the box of spare wicks.",
    "Every boat of Arden carries a bell, and every bell has a tone that no other boat may use.",
    "When fog comes to Arden the keeper rings all tones in turn, and each boat answers with its own.",
]


def load_base() -> torch.nn.Module:
    """The base model in float32."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


# %% [markdown]
# ## The model
#
# `r` is the number of neurons beside each FFN. They stay in host memory, wherever the model is.

# %%
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
config = MEFTConfig(r=R, task_type="CAUSAL_LM")
model = get_peft_model(load_base(), config)
model.print_trainable_parameters()

# %% [markdown]
# ## Training
#
# torch's AdamW updates the neurons too. Their gradients hold the touched rows only, and clipping understands them.

# %%
batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Train on the texts; gives the losses."""
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of this page."""
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)


optimizer = adamw(model)
losses = train(model, optimizer, STEPS)
print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")

# %% [markdown]
# ## What was used and moved
#
# The report names the strategy, the bytes between host and device, and how evenly the router uses the neurons. On a CPU
# rows are read in place.

# %%
report = model.base_model.transfer_report()
print(report)

# %% [markdown]
# ## A checkpoint
#
# `save_pretrained` writes the weights. The moments of the rows are in the optimizer's state dict, as those of all other
# parameters. A run that goes on from both is the uninterrupted run.

# %%
folder = Path(tempfile.mkdtemp())
model.save_pretrained(folder / "meft")
torch.save(optimizer.state_dict(), folder / "optimizer.pt")
resumed = PeftModel.from_pretrained(load_base(), folder / "meft", is_trainable=True)
resumed_optimizer = adamw(resumed)
resumed_optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
same = train(model, optimizer, 2) == train(resumed, resumed_optimizer, 2)
print("the resumed run has the same losses:", same)

# %% [markdown]
# ## Export
#
# A routed adapter cannot be merged. The export is a model folder with its own small modelling file, which transformers
# loads without this package. Logits are compared at the tokens of the texts: in the export, padding uses neurons too.

# %%
export_model(folder / "meft", folder / "model")
exported = AutoModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=True, dtype=torch.float32).eval()
saved = PeftModel.from_pretrained(load_base(), folder / "meft").eval()
with torch.no_grad():
    apart = (exported(**batch).logits - saved(**batch).logits).abs()
difference = apart[batch["attention_mask"].bool()].max().item()
print(f"largest difference of a logit: {difference:.2g}")
