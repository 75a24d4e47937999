"""`torch.compile` of a model with MEFT: it breaks the graph, and trains as without."""

import pytest
import torch


def test_a_compiled_model_trains_as_the_model(tiny):
    losses = []
    for compiled in (False, True):
        model = tiny.adapted(layers=1)
        forward = torch.compile(model, backend="eager") if compiled else model
        optimizer = tiny.adamw(model)
        for step in range(2):
            loss = tiny.loss(forward, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[2:] == losses[:2]
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager", fullgraph=True)(input_ids=tiny.batch())
