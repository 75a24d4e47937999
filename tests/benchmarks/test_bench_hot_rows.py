"""The replay of a trace through the choice of rows, with the bytes of its rows."""

import torch

from benchmarks.hot_rows.replay import replay

D = 10


def test_rows_that_every_step_uses_do_not_cross_once_they_have_places():
    used = torch.zeros(2, 6, 20, dtype=torch.bool)
    used[:, :, :5] = True  # 5 of 20 rows of each layer
    counts = replay(used, 0.25, D)
    assert counts.shares() == {
        "host-updated rows": 0.0,
        "row bytes": (3 * 2 * 15 * D * 2 + 3 * 10 * 4) / (3 * 2 * (20 * D * 2 + 5 * D * 6)),  # keys, and ids
        "swaps": 0.0,
    }
    assert replay(used, 0.0, D).shares()["host-updated rows"] == 1.0
