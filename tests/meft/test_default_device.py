"""`torch.set_default_device`: what MEFT makes in host memory stays there, and results are those without one."""

import ast
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

import meft
from meft import RowAdamW
from meft.transport.streams import HostStreams
from tests.support.thread_streams import ThreadStreams
from tests.support.tiny_meft import STRATEGIES

CPU = torch.device("cpu")
STREAMS = {"in place": lambda: None, "host streams": lambda: HostStreams(CPU), "late streams": ThreadStreams}


def run(tiny, folder, default, streams, optimizer_of, **fields):
    """Everything that a short life of an adapter leaves: losses, state, moments, and what loads from its file."""
    base, again = (tiny.base(2, torch.bfloat16) for _ in range(2))
    config = tiny.config(**fields)
    batches = [tiny.batch(seed=seed) for seed in range(4)]
    torch.manual_seed(3)
    losses = []
    with torch.device(default) if default else nullcontext():
        model = get_peft_model(base, config)
        if (given := streams()) is not None:
            for engine in model.base_model.engines.values():
                engine.use(given)
        optimizer = optimizer_of(model)
        for i, batch in enumerate(batches):
            loss = model(input_ids=batch, labels=batch).loss
            torch.autograd.backward(loss)  # in `loss.backward()` the default device does not hold
            losses.append(loss.detach())
            if i % 2:  # two micro-batches a step
                torch.nn.utils.clip_grad_norm_(tiny.trainable(model), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        model.save_pretrained(folder)
        state = tiny.whole_state(model)
        for i, entry in enumerate(optimizer.state.values()):
            state |= {f"{i}.{key}": value for key, value in entry.items() if isinstance(value, torch.Tensor)}
        loaded = PeftModel.from_pretrained(again, folder)
        loss = loaded(input_ids=batches[0], labels=batches[0]).loss
    assert not [name for name, t in (state | tiny.state(loaded)).items() if t.device != CPU]
    return torch.stack([*losses, loss.detach()]), state, tiny.state(loaded)


def row_adamw(model):
    return RowAdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)


CASES = [(streams, strategy) for strategy in STRATEGIES for streams in ("host streams", "late streams")]


@pytest.mark.parametrize(("streams", "strategy"), [("in place", "auto"), *CASES])
def test_a_life_is_the_same_bit_for_bit(tiny, tmp_path, streams, strategy):
    fields = {"retrieval": strategy, "router_aux_loss_coef": 0.1}
    losses, *states = run(tiny, tmp_path / "without", None, STREAMS[streams], row_adamw, **fields)
    again, *others = run(tiny, tmp_path / "with", "meta", STREAMS[streams], row_adamw, **fields)
    assert torch.equal(losses, again)
    for state, other in zip(states, others, strict=True):
        tiny.assert_equal(other, state)


FACTORIES = {
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "logspace",
    "normal",
}
FACTORIES |= {"ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices"}
FACTORIES |= {"zeros", "sparse_coo_tensor", "sparse_csr_tensor"}


def test_whatever_makes_a_tensor_says_where():
    """Of the packages' own code: what a default device would take elsewhere on paths that no test here goes."""
    root, silent = Path(meft.__file__).parents[1], []
    folders = [root / name for name in ("meft", "aslora", "peft_bridge", "kernels/adapter_kernels")]
    for file in sorted(path for folder in folders for path in folder.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            by_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if by_torch and node.func.attr in FACTORIES and "device" not in {each.arg for each in node.keywords}:
                silent.append(f"{file.relative_to(root)}:{node.lineno}: torch.{node.func.attr}")
    assert not silent
