"""What `MEFTConfig.device_rows` may say."""

from __future__ import annotations

import re

from peft_bridge import is_number


def check_device_rows(asked: object, on_host: bool) -> None:
    """Raises: ValueError: no number of places can be made of it, or no rows are in host memory."""
    good = 0 <= float(asked) <= 1 if is_number(asked) else asked == "auto" or named_bytes(asked) is not None  # type: ignore[arg-type]
    if not good:
        raise ValueError(f"device_rows={asked!r} must be a number from 0 to 1, a size such as '8GiB', or 'auto'.")
    if asked and not on_host:
        raise ValueError(
            f"device_rows={asked!r} is for rows in host memory, but placement='device' keeps all of them on the "
            "device: set placement='host', or leave device_rows out."
        )


def named_bytes(asked: object) -> int | None:
    """The bytes of a size such as '8GiB'; None of anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?GiB", asked) if isinstance(asked, str) else None
    return int(float(found[1]) * 2**30) if found else None


def places(asked: float | str, rows: int, place_bytes: int, part: float, free: int) -> int:
    """The number of places.

    Args:
        asked: a value that `check_device_rows` allows.
        rows: that there are, of which a place takes `place_bytes`.
        part: the share of all bytes that may be taken. free: the bytes for 'auto'.
    """
    if isinstance(asked, int | float):
        return int(asked * rows)
    named = named_bytes(asked)
    return min(rows, int((free if named is None else named) * part) // place_bytes)
