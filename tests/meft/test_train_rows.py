"""`train_rows`: a step updates the rows that are specific to its data, and no bit of any other row."""

import copy
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import meft
from meft import MEFTConfig, RowAdamW
from meft.memory.choice import top_rows
from meft.routing.reference import chosen_neurons
from tests.support.thread_streams import on_streams
from tests.support.tiny_meft import STRATEGIES
from tests.support.training import assert_close

TOP, CLIP = 6, 0.01


def uses_of(tiny, model, batches):
    """Of each layer, picks of each row by the oracle, float64 [r], on the rows as they are."""
    inputs = {layer: [] for layer in tiny.layers(model)}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: inputs[module].append(args[0].detach().flatten(0, -2)))
        for layer in inputs
    ]
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    for hook in hooks:
        hook.remove()
    found = []
    for layer, seen in inputs.items():
        config, (keys, _) = layer.configs["default"], layer.tables("default")
        router = layer.router("default").detach()
        picks = chosen_neurons(
            torch.cat(seen), router, keys.rows.detach(), experts_per_token=config.probed, top_k=config.top_k,
            router_factor=config.router_factor,
        )  # fmt: skip
        found.append(picks.sum(0))
    return found


def expected_rows(tiny, model, batches, rarity):
    """Of each layer, bool [r]: the largest uses * rarity, by a plain loop."""
    found = []
    for uses, rare in zip(uses_of(tiny, model, batches), rarity, strict=True):
        order = sorted((j for j in range(len(uses)) if uses[j]), key=lambda j: (-float(uses[j] * rare[j]), j))
        chosen = torch.zeros(len(uses), dtype=torch.bool)
        chosen[order[:TOP]] = True
        found.append(chosen)
    return found


@pytest.fixture
def background(tiny, tmp_path):
    """A file of counts of three examples, for all adapters of the same seed, and the rarities in it."""
    path = str(tmp_path / "counts.safetensors")
    model = tiny.adapted()
    corpus = [tiny.batch(1, 5, seed=70 + i) for i in range(3)]
    meft.count_rows(model, [{"input_ids": torch.cat(corpus[:2])}, {"input_ids": corpus[2]}], path)
    seen = [
        sum((uses > 0).double() for uses in of_layer)
        for of_layer in zip(*(uses_of(tiny, model, [b]) for b in corpus), strict=True)
    ]
    return path, [torch.log(4 / (n + 1)) for n in seen]


def adapted(tiny, background, top=TOP, **fields):
    return tiny.adapted(train_rows={"top": top, "background": background[0]}, **fields)


def test_the_counts_are_the_oracles(tiny, background, tmp_path):
    model = tiny.adapted()
    found = load_file(background[0])
    corpus = [tiny.batch(1, 5, seed=70 + i) for i in range(3)]
    for i, uses in enumerate(uses_of(tiny, model, corpus)):
        assert torch.equal(found[f"model.layers.{i}.mlp.uses"], uses)
        rarity = torch.log(4 / (found[f"model.layers.{i}.mlp.examples"].double() + 1))
        assert torch.allclose(rarity, background[1][i], rtol=1e-15)
    # Padding is no use, nothing of the model's own counters changes, and a copy inside of a PeftModel gives the same.
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), torch.cat(corpus)], 1)
    before = model.base_model.transfer_report().totals()
    mask = (padded != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    meft.count_rows(model, [batch], tmp_path / "padded")
    assert model.base_model.transfer_report().totals() == before
    tiny.assert_equal(load_file(tmp_path / "padded"), found)


def step(tiny, model, optimizer, batches):
    for batch in batches:
        (model(input_ids=batch, labels=batch).loss / len(batches)).backward()
    norm = torch.nn.utils.clip_grad_norm_(tiny.trainable(model), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
def test_a_step_updates_the_rows_that_the_oracle_chooses(tiny, background, strategy):
    """Two micro-batches a step; rows, moments and counts of all other rows keep their bits, under weight decay too."""
    fields = {} if strategy is None else {"retrieval": strategy}
    model, plain = adapted(tiny, background, **fields), tiny.adapted(**fields)
    if strategy is not None:
        for one in (model, plain):
            on_streams(one, longest=1e-4)
    optimizer, moved = tiny.adamw(model), False
    for number in range(2):
        batches = [tiny.batch(2, 7, seed=2 * number + i) for i in range(2)]
        chosen = expected_rows(tiny, model, batches, background[1])
        plain.load_state_dict(model.state_dict())
        for batch in batches:
            (plain(input_ids=batch, labels=batch).loss / 2).backward()
        wanted = [
            table.rows.grad.to_dense()[rows]
            for rows, layer in zip(chosen, tiny.layers(plain), strict=True)
            for table in layer.tables("default")
        ]
        plain.zero_grad()
        before = tiny.whole_state(model)
        norm = step(tiny, model, optimizer, batches)
        assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in wanted)), rel=1e-9)
        assert norm > CLIP
        after = tiny.whole_state(model)
        for i, table in enumerate(tiny.tables(model)):
            rows = chosen[i // 2]
            name = next(n for n, t in model.named_modules() if t is table) + ".rows"
            assert torch.equal(after[name][~rows], before[name][~rows])
            assert bool((after[name][rows] != before[name][rows]).any(1).all())
            for part in ("exp_avg", "exp_avg_sq", "counts"):
                old = before.get(f"{i}.{part}", torch.zeros_like(after[f"{i}.{part}"]))
                assert torch.equal(after[f"{i}.{part}"][~rows], old[~rows])
                assert bool(
                    (after[f"{i}.{part}"][rows] != old[rows]).flatten(1).any(1).all()
                    if part != "counts"
                    else (after[f"{i}.{part}"] - old == rows).all()
                )
            moved |= int(rows.sum()) == TOP
    assert moved
    assert all(torch.equal(after[n], before[n]) for n in after if "meft_router" in n)


def test_micro_batches_choose_as_the_joint_batch(tiny, background):
    states = []
    for parts in (1, 2):
        model = adapted(tiny, background)
        optimizer = tiny.adamw(model)
        for number in range(3):
            step(tiny, model, optimizer, tiny.batch(4, 7, seed=number).chunk(parts))
        states.append(tiny.whole_state(model))
    assert_close(*states)


@pytest.mark.parametrize(
    "fields",
    [
        {"moments": "rowwise"},
        {"moments": "float8"},
        {"in_backward": True},
        {"in_backward": True, "moments": "bfloat16"},
        {"zero_copy": True},
    ],
    ids=str,
)
def test_steps_of_other_kinds_update_the_same_rows(tiny, fields):
    """Without clipping; by their counts, which every kind of step keeps exactly."""
    model = tiny.adapted(dtype=torch.float32, train_rows={"top": TOP}, retrieval="stream", row_optimizer=fields)
    on_streams(model, longest=1e-4)
    tiny.train(model, 3)
    assert all(int(table.moments.counts.sum()) == 3 * TOP for table in tiny.tables(model))


@pytest.mark.parametrize("way", ["in_backward", "checkpointed", "reentrant", "row adamw", "scaler"])
def test_each_way_to_step_gives_the_same_bits(tiny, background, way):
    states = []
    for other in (False, True):
        rule = {"in_backward": True} if other and way == "in_backward" else {}
        model = adapted(tiny, background, retrieval="host", row_optimizer=rule)
        on_streams(model, longest=1e-4)
        if other and way in ("checkpointed", "reentrant"):
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
        optimizer = torch.optim.AdamW(tiny.trainable(model), lr=1e-2, weight_decay=0.1)
        if other and way == "row adamw":
            optimizer = RowAdamW(tiny.trainable(model), lr=1e-2, weight_decay=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=other and way == "scaler")
        for number in range(3):
            scaler.scale(tiny.loss(model, number)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=number > 0)
        states.append(tiny.whole_state(model))
    tiny.assert_equal(*states)


def test_a_run_goes_on_from_a_save_to_the_bit(tiny, background, tmp_path):
    model = adapted(tiny, background)
    optimizer = tiny.train(model, 2)
    model.save_pretrained(tmp_path / "saved")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = PeftModel.from_pretrained(tiny.base(), tmp_path / "saved", is_trainable=True)
    assert resumed.peft_config["default"].train_rows == meft.TrainRowsConfig(TOP, background[0])
    other = tiny.adamw(resumed)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    for one, held in ((model, optimizer), (resumed, other)):
        tiny.train(one, 2, held, first=2)
    tiny.assert_equal(tiny.whole_state(resumed), tiny.whole_state(model))


def test_a_gradient_that_was_thrown_away_chooses_nothing(tiny, background):
    model, other = adapted(tiny, background), adapted(tiny, background)
    tiny.loss(model, 50).backward()
    model.zero_grad()
    for one in (model, other):
        tiny.train(one, 1)
    tiny.assert_equal(tiny.whole_state(model), tiny.whole_state(other))
    copied = copy.deepcopy(model)
    for one in (model, copied):
        tiny.train(one, 1, first=5)
    tiny.assert_equal(tiny.state(copied), tiny.state(model))


def test_ties_go_to_the_lower_row_and_rows_of_tasks_are_left_out():
    uses = torch.tensor([2, 0, 1, 4, 2, 9])
    rarity = torch.tensor([1.0, 5.0, 2.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    free = torch.tensor([True, True, True, True, True, False])
    assert top_rows(uses, rarity, free, 2).tolist() == [True, False, True, False, False, False]
    assert top_rows(uses, rarity, free, 9).tolist() == [True, False, True, True, True, False]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top": 0}, "top=0 must be"),
        ({"top": 1.5}, "top=1.5 must be"),
        ({"top": True}, "top=True must be"),
        ({"background": 3}, "background=3 must be"),
        ({"most": 3}, "must be None, a TrainRowsConfig or a dict with some of top, background"),
        (7, "must be None, a TrainRowsConfig"),
    ],
)
def test_a_value_that_cannot_be_is_an_error(given, message):
    with pytest.raises(ValueError, match=message):
        MEFTConfig(train_rows=given)


def test_rows_on_the_device_are_refused():
    with pytest.raises(ValueError, match=r"train_rows does not go with device_rows='auto': set device_rows=0"):
        MEFTConfig(train_rows={"top": 5}, device_rows="auto")
    assert MEFTConfig(r=400, train_rows={"top": 0.05}).most_rows == 20
    assert MEFTConfig(r=400, train_rows={"top": 1}).most_rows == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 96}, "has r=48 and num_experts=8 for model.layers.0.mlp, and this adapter has r=96"),
        ({"num_experts": 16}, "this adapter has r=48 and num_experts=16"),
        ({"layers": 3}, r"other layers \(first difference: model.layers.2.mlp\)"),
        ({"path": "missing"}, "missing' cannot be read"),
    ],
    ids=["r", "experts", "layers", "missing"],
)
def test_counts_of_another_adapter_are_an_error_before_anything_is_trained(tiny, background, fields, message):
    path = fields.pop("path", background[0])
    model = adapted(tiny, (path,), **fields)
    with pytest.raises(ValueError, match=message):
        tiny.loss(model)
    assert tiny.loss(model.eval().requires_grad_(False)) > 0  # what does not train needs no counts


def test_counts_of_other_routers_are_an_error_of_the_first_pass(tiny, background):
    model = adapted(tiny, background, seed=3)
    with pytest.raises(ValueError, match="counted with other routers than this adapter's: count anew"):
        tiny.loss(model)
    with torch.no_grad():
        tiny.loss(model)  # an evaluation chooses nothing


def test_a_file_without_counts_is_an_error(tiny, background, tmp_path):
    model = adapted(tiny, background)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no counts of rows"):
        tiny.loss(adapted(tiny, (str(tmp_path / "adapter_model.safetensors"),)))
    with pytest.raises(ValueError, match="there is no example"):
        meft.count_rows(model, [], tmp_path / "none")
    assert not (tmp_path / "none").exists()
