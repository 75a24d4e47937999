"""Torch's GradScaler with rows on the host, while the stream sleeps: its scale and its flag come late then.

torch brings both to the CPU by `Tensor.to(..., non_blocking=True)`: whoever reads them at once may read what was there.
"""

import torch

from benchmarks.device.chain import Setting, adapted, whole_numbers
from benchmarks.device.findings import UNMEASURED, say
from meft.transport.streams import HostStreams

SCALE = 1024.0
ASLEEP = 2e8  # cycles, some 100 ms: later than whatever the host does next


def sleep(cuda: bool) -> None:
    """Let the current stream sleep."""
    if cuda:
        torch.cuda._sleep(int(ASLEEP))


def late_copies(device: torch.device) -> None:
    """Whether a copy to the CPU that does not block is read before it is there, on this machine."""
    stale = 0
    for value in range(1, 6):
        source = torch.full((1,), float(value), device=device)
        torch.cuda.synchronize()
        sleep(True)
        source.add_(100)
        there = source.to("cpu", non_blocking=True, copy=True)
        read = float(there)
        torch.cuda.synchronize()
        stale += read != value + 100
    say("copies to the CPU that do not block, read at once", f"{stale} of 5 too early", stale=stale)


def step(device: torch.device, overflow: bool, cuda: bool) -> tuple[float, bool]:
    """How far unscaled row gradients are from what they must be, and whether the step was taken.

    Args:
        overflow: one value of one table's gradient is not finite, and nothing on the device.
        cuda: the stream sleeps.
    """
    model = adapted(Setting("stream", compute_dtype="float32")).to(device)
    if device.type != "cuda":
        for engine in model.base_model.engines.values():
            engine.use(HostStreams(device))
    tables = [table for found in model.base_model.steps.tables.values() for table in found]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0)
    layer = next(iter(model.base_model.adapted_ffns().values()))
    x = whole_numbers(0, torch.float32).to(device)
    layer(x).sum().backward()
    expected = {id(t): t.rows.grad.to_dense().clone() for t in tables if t.rows.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    scaler = torch.amp.GradScaler(device.type, init_scale=SCALE)
    trained, worst = [p for p in model.parameters() if p.requires_grad], 0.0
    before = [parameter.detach().clone() for parameter in trained]
    scaler.scale(layer(x).sum()).backward()
    if overflow:
        gradient = tables[0].rows.grad
        gradient.to_dense()  # waits until it is there
        gradient.row_values[0, 0] = float("inf")
    else:
        sleep(cuda)
        scaler.unscale_(optimizer)
        found = {id(t): t.rows.grad.to_dense() for t in tables if t.rows.grad is not None}
        worst = max(float((found[key] - expected[key]).abs().max()) for key in expected)
    sleep(cuda)
    scaler.step(optimizer)
    scaler.update()
    for table in tables:
        table.synchronize()
    # Routers tell too, and the scale: MEFT leaves its rows alone for a value that is not finite, whoever has seen it.
    moved = any(not torch.equal(new.detach(), old) for new, old in zip(trained, before, strict=True))
    return worst, moved or (overflow and scaler.get_scale() == SCALE)


def check(device: torch.device, cuda: bool) -> None:
    """Findings: late copies; gradients that are unscaled by the right scale; an overflow that is not lost."""
    if cuda:
        late_copies(device)
    else:
        say("copies to the CPU that do not block, read at once", UNMEASURED)
    where = "with the stream asleep" if cuda else "on the CPU: not the race"
    worst, moved = step(device, False, cuda)
    said = f"off by {worst:.3g}, {'stepped' if moved else 'not stepped'} {where}"
    say("GradScaler: row gradients on the host", said, worst == 0 and moved, "unscaled exactly", off_by=worst)
    _, moved = step(device, True, cuda)
    said = f"the step was {'taken' if moved else 'skipped'} {where}"
    say(
        "GradScaler: an overflow in rows on the host",
        said,
        not moved,
        "rows and routers are left, the scale falls",
        stepped=moved,
    )
