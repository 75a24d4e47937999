"""What DeepSpeed's undocumented names do, in two gloo processes, which run this file as a script."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from peft_bridge.deepspeed_private import (
    adam_of,
    before_zero_is_made,
    engine_in_construction,
    is_partitioned,
    steps_parameters,
    unsupported,
)
from tests.support import zero
from tests.support.processes import once, result_of, run_ranks, saved_by_ranks, work_as_rank

pytestmark = [pytest.mark.slow, zero.MISSING]
# field -> what the sentence says; the others need a GPU, a model of a kind of its own or a compiler to be made at all
REFUSED = {
    "stage": ({"stage": 0}, {}, "zero_optimization.stage=0 (set 1, 2 or 3)"),
    "nvme": (
        {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nowhere"}}, {},
        "zero_optimization.offload_param.device=nvme (set 'cpu' or 'none')",
    ),
    "elastic": ({"stage": 2, "elastic_checkpoint": True}, {}, "zero_optimization.elastic_checkpoint=True (set False)"),
    "quantised": ({"stage": 3, "zero_quantized_weights": True}, {}, "zero_optimization.zero_quantized_weights=True"),
    "hpz": ({"stage": 3, "zero_hpz_partition_size": 2}, {}, "zero_optimization.zero_hpz_partition_size=2 (set 1)"),
    "ratio": (
        {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, {},
        "zero_optimization.offload_optimizer.ratio=0.5 (set 1.0)",
    ),
    "autocast": ({"stage": 2}, {"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast.dtype"),
    "sums": (
        {"stage": 1}, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        "data_types.grad_accum_dtype=fp32 with bf16",
    ),
    "norm": (
        {"stage": 2, "compute_grad_norm": False}, {"gradient_clipping": 0.0},
        "zero_optimization.compute_grad_norm=False (set True)",
    ),
    "universal": ({"stage": 2}, {"checkpoint": {"load_universal": True}}, "checkpoint.load_universal=True"),
    "nothing": ({"stage": 2}, {}, None),
    "bf16": ({"stage": 3}, {"bf16": {"enabled": True}}, None),
}  # fmt: skip


class Asked(nn.Module):
    """Seven values, which two ranks cannot halve, and more that nobody trains."""

    def __init__(self, ask):
        super().__init__()
        self.trained = nn.Parameter(torch.arange(7.0) / 3)
        self.frozen = nn.Parameter(torch.arange(5.0) / 3, requires_grad=False)
        self.ask = ask

    def forward(self, x):
        return (self.trained.sum() + self.frozen.sum()) * x

    def set_deepspeed_parallelism(self, *_):
        self.ask(engine_in_construction())


class StopHereError(Exception):
    pass


def run_settings():
    made = {}
    for name, (fields, sections, _) in REFUSED.items():

        def ask(engine, name=name):
            made[name] = (unsupported(engine), steps_parameters(engine))
            raise StopHereError

        import deepspeed

        model = Asked(ask)
        settings = zero.config(2) | sections
        settings["zero_optimization"] = fields
        with pytest.raises(StopHereError):
            deepspeed.initialize(model=model, optimizer=zero.adamw(model), config=settings)
    return made


def run_values(rank, stage, precision):
    """What is read is what was written, and a frozen parameter is read as it is."""
    found = []
    model = Asked(lambda engine: before_zero_is_made(engine, lambda _: None, found.append, lambda: None))
    engine = zero.engine(model, stage, 1, precision)
    (steps,) = found
    begun = steps.read(model.trained).clone()
    value = torch.arange(7.0) / 7 - 1
    steps.write(model.trained, value)
    dtype = next(model.parameters()).dtype
    seen = float(engine(torch.ones((), dtype=dtype)))
    result = {
        "begun": begun, "written": steps.read(model.trained).clone(), "frozen": steps.read(model.frozen).clone(),
        "partitioned": (is_partitioned(model.trained), steps.partitions_parameters), "seen": seen,
        "alive": steps.alive, "adam": adam_of(engine.basic_optimizer),
    }  # fmt: skip
    return result


def work(rank, folder):
    tasks = {"start": partial(zero.start, rank), "settings": run_settings}
    tasks |= {f"values {stage} {p}": partial(run_values, rank, stage, p) for stage in (1, 2, 3) for p in (None, "bf16")}
    work_as_rank(rank, folder, tasks)


@pytest.fixture(scope="module")
def ranks(request):
    return saved_by_ranks(once(request, "deepspeed_private", partial(run_ranks, __file__)))


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_be_followed(ranks, name):
    sentence = REFUSED[name][2]
    for result in result_of(ranks, "settings"):
        said, own = result[name]
        assert said is None if sentence is None else sentence in said, said
        assert own == (name == "stage")


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_values_are_read_and_written_whole(ranks, stage, precision):
    value = torch.arange(7.0) / 7 - 1
    for result in result_of(ranks, f"values {stage} {precision}"):
        narrow = torch.bfloat16 if precision else torch.float32
        assert torch.equal(result["begun"], (torch.arange(7.0) / 3).to(narrow).float())
        assert torch.equal(result["written"], value)  # not rounded
        assert torch.equal(result["frozen"].float(), (torch.arange(5.0) / 3).to(narrow).float())
        assert result["partitioned"] == (stage == 3, stage == 3)
        assert result["seen"] == pytest.approx(float(value.sum() + torch.arange(5.0).sum() / 3), abs=0.05)
        assert result["alive"]
        assert result["adam"] is None  # torch's


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
