"""Launch configurations by compute capability: small tables, read at each call, never tuned at a user's first step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import cache

import torch

# What a kernel takes by keyword: its block sizes, num_warps, num_stages.
Config = dict[str, int]

_tables: dict[str, Table] = {}
_overrides: dict[str, Config] = {}


class Table:
    """The configurations of one kernel.

    Args:
        name: `op.kernel`, by which `override` finds it.
        default: for capabilities without an entry; it must fit the smallest shared memory (99 KiB a block).
        by_capability: 80, 86, 89, 90: fields that differ from the default.
    """

    def __init__(self, name: str, default: Config, by_capability: Mapping[int, Config] | None = None) -> None:
        self.name = name
        self._default = default
        self._by_capability = dict(by_capability or {})
        _tables[name] = self

    def at(self, capability: int | None) -> Config:
        """The configuration for a compute capability (10 * major + minor; None: unknown, or the interpreter)."""
        special = self._by_capability.get(capability, {}) if capability is not None else {}
        return self._default | special | _overrides.get(self.name, {})

    def on(self, device: torch.device) -> Config:
        """The configuration for a device."""
        return self.at(capability(device))


def capability(device: torch.device) -> int | None:
    """Compute capability of an NVIDIA device as 10 * major + minor, None of any other."""
    return _cuda_capability(device.index or 0) if device.type == "cuda" and torch.version.hip is None else None


@cache
def _cuda_capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@contextlib.contextmanager
def override(name: str, **fields: int) -> Iterator[None]:
    """Other block sizes, warps or stages for one kernel, as a benchmark or a test tries them.

    Raises:
        ValueError: no such table, or no such field in it.
    """
    if name not in _tables:
        raise ValueError(f"name: no kernel {name!r}; there are {sorted(_tables)}")
    unknown = fields.keys() - _tables[name].at(None).keys()
    if unknown:
        raise ValueError(f"fields: {name} has no {sorted(unknown)}; it has {sorted(_tables[name].at(None))}")
    before = _overrides.get(name)
    _overrides[name] = (before or {}) | fields
    try:
        yield
    finally:
        if before is None:
            del _overrides[name]
        else:
            _overrides[name] = before
