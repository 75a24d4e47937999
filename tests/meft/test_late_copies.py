"""What other people's code copies to the host without waiting is waited for before it is read."""

from unittest import mock

import pytest
import torch


class Late:
    """A device whose copies to the host, queued with `non_blocking=True`, arrive when a stream is waited for."""

    def __init__(self, monkeypatch):
        self.waiting, self.real = [], torch.Tensor.to
        stream = mock.Mock(synchronize=self.deliver)
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **kwargs: self.to(tensor, *args, **kwargs))
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor, *args: True)
        for name, value in {
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "current_stream": lambda device=None: stream,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def to(self, tensor, *args, **kwargs):
        if not kwargs.get("non_blocking"):
            return self.real(tensor, *args, **kwargs)
        target = torch.full_like(tensor, 123.0)
        self.waiting.append((target, tensor.clone()))
        return target

    def deliver(self):
        while self.waiting:
            target, value = self.waiting.pop(0)
            target.copy_(value)


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("unscale", [False, True], ids=["in step", "unscaled first"])
def test_the_scale_and_the_flag_of_a_scaler_arrive_late(tiny, monkeypatch, unscale, overflow):
    model = tiny.adapted(dtype=torch.float32)
    optimizer, scaler = tiny.adamw(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(tiny.loss(model)).backward()
    before = tiny.whole_state(model)
    plain = tiny.adapted(dtype=torch.float32)
    if overflow:
        tiny.tables(model)[1].rows.grad.row_values[0, 0] = torch.inf
    else:
        tiny.loss(plain).backward()
        tiny.adamw(plain).step()
    late = Late(monkeypatch)
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    late.deliver()  # at the latest
    monkeypatch.undo()
    scaler.update()
    assert scaler.get_scale() == (512.0 if overflow else 1024.0)
    expected = before if overflow else tiny.whole_state(plain)
    tiny.assert_equal(tiny.whole_state(model), expected)
