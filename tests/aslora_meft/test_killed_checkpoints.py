"""A Trainer that is killed while it writes a checkpoint and deletes the older one: what is left resumes exactly."""

import os

import pytest

from tests.support.processes import run_code

RUN = """
import os, random, signal, sys
import torch
from pathlib import Path
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments
from aslora import ASLoRAConfig
from meft import MEFTConfig
from tests.support.models import llama

torch.set_num_threads(1)
method, root, samples = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate"}
armed, seen, fatal = False, 0, None

def watch(event, arguments):
    # Ends the process at the n-th thing that it does to the checkpoints' folder, once it is armed.
    global seen
    if armed and event in EVENTS and any(str(root) in str(a) for a in arguments[:1]):
        seen += 1
        if seen == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)

class Armed(Trainer):
    def _save_checkpoint(self, *args, **kwargs):
        global armed
        armed = self.state.global_step == 4
        super()._save_checkpoint(*args, **kwargs)
        armed = False

def train(folder, resume=None):
    base = llama(intermediate_size=64, max_position_embeddings=64, pad_token_id=0)
    if method == "meft":
        config = MEFTConfig(r=48, num_experts=8, experts_per_token=3, top_k=5, init_weights=False)
    else:
        config = ASLoRAConfig(r=4, target_modules=["q_proj", "v_proj"], total_steps=6, merge_start=2, merge_interval=1)
    model = get_peft_model(base, config)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(2, 64, (24, 8))]
    arguments = TrainingArguments(
        str(folder), max_steps=6, save_steps=2, save_total_limit=1, per_device_train_batch_size=2, learning_rate=1e-2,
        use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )
    Armed(model=model, args=arguments, train_dataset=data).train(resume_from_checkpoint=resume)
    return {name: value.clone() for name, value in model.state_dict().items() if "aslora_" in name or ".meft_" in name}

def in_child(work):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]

def uninterrupted():
    torch.save(train(root / "whole"), root / "wanted.pt")
    (root / "events").write_text(str(seen))

def killed(number, folder):
    global fatal
    fatal = number
    train(folder)

def resumed(folder, checkpoint):
    wanted, found = torch.load(root / "wanted.pt"), train(folder, str(checkpoint))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)

assert in_child(uninterrupted) == 0
events = int((root / "events").read_text())
assert events > 15, events
numbers = sorted(random.Random(0).sample(range(1, events + 1), min(samples, events)))
for number in numbers:
    folder = root / f"killed-{number}"
    assert in_child(lambda: killed(number, folder)) == signal.SIGKILL
    whole = [p for p in sorted(folder.glob("checkpoint-*")) if (p / "trainer_state.json").exists()]
    assert whole, f"no checkpoint is left after event {number}"
    assert in_child(lambda: resumed(folder, whole[-1])) == 0, f"event {number}, {whole[-1].name}"
print("resumed", len(numbers), "of", events)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes that are killed are forked")
@pytest.mark.parametrize("method", ["meft", "aslora"])
def test_a_killed_checkpoint_resumes_exactly(tmp_path, method):
    assert "resumed 6 of" in run_code(RUN, method, tmp_path, 6, timeout=600)
