"""Batches, steps and optimizers; ways to run a model that several files test; states that must be equal."""

import torch

GENERATION = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beam": {"num_beams": 3},
    "beam with several": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
}


def trainable(model):
    """The parameters that train."""
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model, **fields):
    """AdamW over what trains; with weight decay, so that rows without a gradient move too."""
    return torch.optim.AdamW(trainable(model), **({"lr": 1e-2, "weight_decay": 0.1} | fields))


def tokens(rows=2, length=8, vocab=64, seed=0, low=0):
    """Random ids [rows, length] of `low` to `vocab` - 1."""
    return torch.randint(low, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def train(model, batches, optimizer=None):
    """A step for each batch of ids, which are the labels too, of AdamW where no optimizer is given; their losses."""
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=1e-2)
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def checkpointed(tiny, reentrant, **fields):
    """A model of three adapted layers that trains with gradient checkpointing."""
    model = tiny.adapted(3, **fields)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


def integers(model):
    """Integer values, so that every sum is exact in whatever order."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 8).round().clamp(-4, 4))


def assert_equal(state, expected):
    """The same tensors under the same names, bit by bit."""
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def assert_close(state, expected):
    """The same tensors but for float64's rounding: the mean of a joint batch is summed in another order, and AdamW
    divides by small square roots.
    """
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(state[name], value, rtol=1e-7, atol=1e-10, msg=name)
        else:
            assert torch.equal(state[name], value), name
