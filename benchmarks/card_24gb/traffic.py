"""What has to cross the link in a step, by formula; the benchmark holds MEFT's counters against it."""

from benchmarks.card_24gb.plan import Cell

ELEMENT = 2  # bytes of a bf16 value; ids and logits, of four bytes, count as two elements


def expected_bytes(
    strategy: str | None, cell: Cell, *, d: int, layers: int, experts: int, top_k: int, union: float,
    stepped: float | None, refetch: bool = False,
) -> tuple[float, float] | None:  # fmt: skip
    """Bytes to the device and to the host of a step; None: no formula.

    Per layer and micro-batch, u = |U|, rows of d bf16 values: `host` x and logits down, 2 u rows, ids and places up;
    `stream` all r keys and u values up, ids down; `device-keys` u values up, ids down; `device-rows` ids down. Ids that
    go down have room for as many as there can be, and their number. All: 2 u row gradients down. Once a step
    `device-keys` brings the keys that the step before has changed, `device-rows` the values too. With
    `refetch`, rows that are not on the device are brought once more.

    Args:
        strategy: the one in use. union: mean |U| of a layer and micro-batch. stepped: share of r changed in a step.
    """
    T, row = cell.batch * cell.length, ELEMENT * d
    gradients, ids = 2 * union * row, 4 * (1 + min(cell.r, T * top_k))
    stepped = stepped or 0.0
    changed = stepped * cell.r * (row + (4 if stepped < 1 else 0))  # with their ids, unless all have changed
    if strategy == "resident":
        return 0.0, 0.0
    if strategy == "host":
        up, down, once = union * (2 * row + 4) + 4 * T * top_k, T * row + 4 * T * experts, 0.0
    elif strategy == "stream":
        up, down, once = (cell.r + union) * row, ids, 0.0
    elif strategy == "device-keys":
        up, down, once = union * row, ids, changed
    elif strategy == "device-rows":
        up, down, once = 0.0, ids, 2 * changed
    else:
        return None
    if refetch:
        up += {"device-keys": 1, "device-rows": 0}.get(strategy, 2) * union * row
    passes = layers * cell.accumulation
    return passes * up + layers * once, passes * (down + gradients)


def growing_bytes(strategy: str | None, r: int, d: int, layers: int, experts: int) -> int:
    """Device memory that grows with r at fixed |U|: fp32 routers, gradients and two moments; `stream`'s two buffers."""
    return 16 * layers * experts * d + (2 * r * d * ELEMENT if strategy == "stream" else 0)
