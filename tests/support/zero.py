"""DeepSpeed's ZeRO with its CPU accelerator and gloo, in a process that is one of several ranks.

Tests that use it run where DeepSpeed is installed: `make test-deepspeed`.
"""

import gc
import importlib.util
import logging
import os

import pytest
import torch
import torch.distributed as dist

from peft_bridge.deepspeed_private import gathered, is_partitioned

MISSING = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: make test-deepspeed"
)
CLIP = 0.05


def start(rank, world=2):
    """Let DeepSpeed use the process group that there is. Building its own operations takes minutes: none is needed."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "DS_ACCELERATOR": "cpu"}
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__ |= dict.fromkeys(deepspeed.ops.__compatible_ops__, False)
    deepspeed.init_distributed("gloo")
    deepspeed.get_accelerator().is_fp16_supported = lambda: True  # a CPU multiplies float16, slowly


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model, kind=torch.optim.AdamW):
    return kind(trainable(model), lr=1e-2, weight_decay=0.1)


def falling(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda steps: 1 / (1 + steps))


def config(stage, accumulate=1, precision=None, **zero):
    """A configuration of DeepSpeed for two samples a rank and micro-batch."""
    made = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": accumulate, "gradient_clipping": CLIP}
    made |= {"zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True, **zero}}
    made |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    if precision is not None:
        made[precision] = {"enabled": True} | ({"initial_scale_power": 8} if precision == "fp16" else {})
    return made


def engine(model, *settings, optimizer=None, **fields):
    import deepspeed

    optimizer = adamw(model) if optimizer is None else optimizer
    given = {"model": model, "optimizer": optimizer, "config": config(*settings, **fields)}
    return deepspeed.initialize(**given, lr_scheduler=falling(optimizer))[0]


def loaded_in_parts(model, rank, folder):
    """The same model as transformers loads it for stage 3: each rank keeps a part of each parameter."""
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    if rank == 0:
        model.save_pretrained(folder)
    dist.barrier()
    kept = HfDeepSpeedConfig(config(3))
    try:
        loaded = type(model).from_pretrained(folder, dtype=torch.float32)
    finally:
        del kept
        unset_hf_deepspeed_config()
    assert all(is_partitioned(p) for p in loaded.parameters())
    return loaded


def full(model):
    """Name -> whole value of each trained parameter; all ranks call it."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and not name.endswith(".rows")]
    return {name: gathered(p) if is_partitioned(p) else p.detach().clone() for name, p in named}


def same_on_all_ranks(state):
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, state)
    return all(torch.equal(state[name], other[name]) for other in everywhere for name in other)


def refusal(make):
    """What an engine's construction says, and nothing else of it is left."""
    try:
        make()
    except ValueError as error:
        message = str(error)
        del error
        gc.collect()
        return message
    return "it was not refused"


def let_accelerate_take_gloo():
    """accelerate knows DeepSpeed of several processes where it finds GPUs alone."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)


def run_trainer(model, folder, samples, resume=None, stage=None, ranks=2, **sections):
    """Six steps of a Trainer with four samples each, a checkpoint every second one; the losses.

    Args:
        stage: of ZeRO; None: one process without DeepSpeed.
        sections: of DeepSpeed's configuration.
    """
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    fields = {"use_cpu": True}
    if stage is not None:
        let_accelerate_take_gloo()
        automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        fields = {"deepspeed": config(stage) | dict.fromkeys(automatic, "auto") | sections}
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4 // ranks, max_steps=6, save_steps=2, logging_steps=1, report_to=[],
        learning_rate=1e-2, weight_decay=0.1, warmup_steps=1, max_grad_norm=CLIP, disable_tqdm=True, log_level="error",
        **fields,
    )  # fmt: skip
    trainer = InOrder(model=model, args=arguments, train_dataset=samples)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
