"""Rows that DeepSpeed does not see: buffers while it has the model, stepped by settings of its optimizer's groups.

DeepSpeed itself is in `test_deepspeed.py`; here nothing but torch is needed.
"""

import copy

import pytest
import torch
from torch.optim import SGD, Adam, AdamW
from transformers import GPT2LMHeadModel

from meft import MEFTConfig, RowAdamW
from meft.optim.zero_rows import RowsOfEngine
from meft.targets import default_targets
from tests.support import models
from tests.support.tiny_meft import Tiny


def grouped(model, kind):
    """Rows of keys with the routers, those of values with what else could train; other rates and decay."""
    named = dict(model.named_parameters())
    keys = [p for n, p in named.items() if "meft_keys" in n or "layers.0.mlp.meft_router" in n]
    others = [p for n, p in named.items() if "meft_values" in n or "layers.1.mlp.meft_router" in n]
    first = {"params": keys, "lr": 1e-2, "weight_decay": 0.1}
    return kind([first, {"params": others, "lr": 5e-2, "betas": (0.8, 0.9)}])


@pytest.mark.parametrize("kind", [AdamW, Adam])
def test_rows_take_the_settings_of_the_groups_that_they_were_taken_from(kind):
    alone, model = Tiny.adapted(), Tiny.adapted()
    optimizer, given = grouped(alone, kind), grouped(model, kind)
    rows = RowsOfEngine(given, model.base_model.steps)
    assert [len(group["params"]) for group in given.param_groups] == [1, 1]
    assert len(rows.rows) == 4
    for step in range(3):
        for group, other in zip(optimizer.param_groups, given.param_groups, strict=True):
            group["lr"] = other["lr"] = 1e-2 / (1 + step)
        Tiny.loss(alone, step).backward()
        (8 * Tiny.loss(model, step)).backward()  # as a loss scale does
        assert rows.norm() == pytest.approx(
            8 * float(torch.stack([t.rows.grad.norm() for t in Tiny.tables(alone)]).norm())
        )
        optimizer.step()
        optimizer.zero_grad()
        for group in given.param_groups:
            for parameter in group["params"]:
                parameter.grad.div_(8)
        given.step()
        rows.step(8.0)
        given.zero_grad()
        assert all(table.rows.grad is None for table in Tiny.tables(model))
    Tiny.assert_equal(Tiny.whole_state(model), Tiny.whole_state(alone))
    assert not any(len(state) and parameter.shape == (Tiny.R, Tiny.WIDTH) for parameter, state in given.state.items())


@pytest.mark.parametrize(
    ("kind", "sentence"), [(SGD, "SGD is neither"), (RowAdamW, "RowAdamW cannot step rows in DeepSpeed")]
)
def test_an_optimizer_that_rows_cannot_follow_is_refused(kind, sentence):
    model = Tiny.adapted()
    optimizer = kind(Tiny.trainable(model), lr=0.1)
    with pytest.raises(ValueError, match=sentence):
        RowsOfEngine(optimizer, model.base_model.steps)
    assert len(optimizer.param_groups[0]["params"]) == 6  # nothing is taken


def test_a_group_of_rows_alone_is_refused():
    """ZeRO would flatten nothing, and schedules count groups."""
    model = Tiny.adapted()
    rows = [table.rows for table in Tiny.tables(model)]
    others = [p for p in Tiny.trainable(model) if all(p is not row for row in rows)]
    optimizer = AdamW([{"params": rows}, {"params": others}])
    with pytest.raises(ValueError, match=r"nothing but MEFT's rows.*put the routers"):
        RowsOfEngine(optimizer, model.base_model.steps)
    assert len(optimizer.param_groups[0]["params"]) == 4


@pytest.mark.parametrize("placement", ["host", "device"])
def test_hidden_rows_are_no_parameters_and_everything_else_is_as_before(placement):
    model, seen = Tiny.adapted(placement=placement), Tiny.adapted(placement=placement)
    Tiny.train(model, 1)
    Tiny.train(seen, 1)
    named = [name for name, _ in model.named_parameters()]
    before = Tiny.state(model)
    for table in Tiny.tables(model):
        table.hide()
        table.hide()  # a second engine
    assert not any(name.endswith(".rows") for name, _ in model.named_parameters())
    Tiny.assert_equal(Tiny.state(model), before)
    model.to(torch.device("cpu"))
    assert torch.equal(Tiny.loss(model), Tiny.loss(seen))
    Tiny.loss(model).backward()
    assert all(table.rows.grad is not None for table in Tiny.tables(model))
    copied = copy.deepcopy(model)
    Tiny.assert_equal(Tiny.state(copied), before)
    halved = {name: value / 2 for name, value in before.items()}
    copied.load_state_dict(halved, strict=False)
    Tiny.assert_equal(Tiny.state(copied), halved)
    for table in Tiny.tables(model):
        table.show()
    assert [name for name, _ in model.named_parameters()] == named
    Tiny.assert_equal(Tiny.state(model), before)


def test_deepspeeds_cast_of_a_model_changes_what_is_read_and_rounds_no_master():
    model = Tiny.adapted(dtype=torch.float32)
    masters = [table.masters.clone() for table in Tiny.tables(model)]
    code = "for parameter in model.parameters(): parameter.data = parameter.data.to(dtype)"
    exec(code, {"__name__": "deepspeed.runtime.engine", "model": model, "dtype": torch.bfloat16})
    for table, master in zip(Tiny.tables(model), masters, strict=True):
        assert table.compute_dtype == torch.bfloat16
        assert torch.equal(table.masters, master)
        assert torch.equal(table.current(), master.bfloat16())


def test_ffns_are_found_where_each_rank_has_a_part_of_their_weights():
    """As ZeRO-3 leaves parameters: empty, with their shape beside them."""
    base = models.model(GPT2LMHeadModel)
    found = default_targets(MEFTConfig(), "gpt2", base)
    for parameter in base.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert default_targets(MEFTConfig(), "gpt2", base) == found
    assert found


def test_a_choice_of_rows_is_refused():
    model = Tiny.adapted(train_rows={"top": 5})
    with pytest.raises(ValueError, match=r"not supported with DeepSpeed, .* use DistributedDataParallel or FSDP2"):
        RowsOfEngine(AdamW(Tiny.trainable(model)), model.base_model.steps)
