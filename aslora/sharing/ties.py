"""Which rows of a stacked B are tied: rows with equal bits that one gradient and one optimizer step serve.

Pure functions and one immutable class; a row is tied to its owner, the row that takes the gradient of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .merge_math import is_sharing_map

_SAMPLES = 32  # values of a row that are looked at before two rows are compared in full
_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(values: Tensor) -> Tensor:
    """The values as integers, several in one where they fit: then nan equals itself, and 0 differs from -0."""
    size, values = values.element_size(), values.detach()
    if values.is_contiguous() and values.shape[-1] * size % 8 == 0 and values.storage_offset() * size % 8 == 0:
        return values.view(torch.int64)
    return values.view(_INTS[size])


def on_host(tensor: Tensor) -> bool:
    """Whether a look at its values waits for no device."""
    return tensor.device.type in ("cpu", "meta")


def equal_rows(B: Tensor, one: int, other: int) -> bool:
    """Whether two rows of B [n, out_features, r] have equal bits."""
    return torch.equal(bits(B[one]), bits(B[other]))


def matches_values(B: Tensor, recorded: Sequence[int]) -> bool:
    """Whether `recorded` is a sharing map of the rows of B [n, out_features, r] and each row has its owner's bits."""
    return (
        len(recorded) == len(B)
        and is_sharing_map(recorded)
        and all(row == owner or equal_rows(B, row, owner) for row, owner in enumerate(recorded))
    )


def confirmed_map(B: Tensor, recorded: Sequence[int]) -> list[int]:
    """The owner of each row that `recorded` names, where their bits agree; the row itself elsewhere."""
    if not is_sharing_map(recorded):
        return list(range(len(recorded)))
    return [owner if row == owner or equal_rows(B, row, owner) else row for row, owner in enumerate(recorded)]


def map_by_value(B: Tensor, recorded: Sequence[int] = ()) -> list[int]:
    """The map that the values of B [n, out_features, r] give.

    Rows share if their bits are equal and not all of them are zero. A row stays with the owner that `recorded` names
    where their bits agree; a group without such an owner, or with several, gets its highest row.
    """
    rows = list(range(len(B)))
    if len(recorded) == len(B) and is_sharing_map(recorded):
        rows = confirmed_map(B, recorded)
    alike: dict[bytes, list[list[int]]] = {}
    for row, sample in enumerate(bits(_sample(B)).cpu().numpy()):
        if rows[row] != row or not bool(B[row].any()):
            continue
        classes = alike.setdefault(sample.tobytes(), [])
        for members in classes:
            if equal_rows(B, row, members[0]):
                members.append(row)
                break
        else:
            classes.append([row])
    for members in (members for classes in alike.values() for members in classes if len(members) > 1):
        owners = [row for row in members if rows.count(row) > 1]
        layers = [layer for layer, owner in enumerate(rows) if owner in members]
        survivor = owners[0] if len(owners) == 1 else max(layers)
        for layer in layers:
            rows[layer] = survivor
    return rows


def filled(B: Tensor, recorded: Sequence[int]) -> Tensor:
    """B [n, out_features, r] with owners' values in rows that are zero: 0.1 kept the rows that it dropped so."""
    if len(recorded) != len(B) or not is_sharing_map(recorded):
        return B
    zero = [row for row, owner in enumerate(recorded) if row != owner and not bool(B[row].any())]
    if not any(bool(B[recorded[row]].any()) for row in zero):
        return B
    sources = [recorded[row] if row in zero else row for row in range(len(B))]
    return B.index_select(0, torch.tensor(sources, device=B.device))


def fill(rows: Tensor, owners: list[int]) -> None:
    """Write what `filled` gives into `rows`, where it is not `rows` itself."""
    full = filled(rows, owners)
    if full is not rows:
        rows.copy_(full)


def _sample(B: Tensor) -> Tensor:
    """Some values of each row, [n, up to 32]; a copy, since storage that numpy has seen cannot be resized (FSDP2)."""
    flat = B.detach().flatten(1)
    return flat[:, :: max(1, flat.shape[1] // _SAMPLES)][:, :_SAMPLES].clone(memory_format=torch.contiguous_format)


def any_of(flags: Iterable[bool | Tensor]) -> bool:
    """Whether a flag is set; those on a device cost one synchronisation for each device."""
    flags = list(flags)
    if any(flag for flag in flags if not isinstance(flag, Tensor)):
        return True
    on_device: dict[torch.device, list[Tensor]] = {}
    for flag in flags:
        if isinstance(flag, Tensor):
            on_device.setdefault(flag.device, []).append(flag)
    return any(bool(torch.stack(tensors).any()) for tensors in on_device.values())


class Ties:
    """A sharing map in force, with what is derived from it.

    Attributes:
        owners: row -> the row that takes its gradient.
        mirrored: the rows that are not their own owners.
    """

    def __init__(self, owners: Sequence[int]) -> None:
        self.owners = list(owners)
        self.mirrored = [row for row, owner in enumerate(self.owners) if row != owner]
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._on:
            owners = torch.tensor(self.owners, device=device)
            self._on[device] = (owners, torch.tensor(self.mirrored, dtype=torch.int64, device=device),
                                owners[:, None] == owners)  # fmt: skip
        return self._on[device]

    def mirror(self, rows: Tensor) -> None:
        """Give each mirrored row of [n, ...] its owner's values, in place."""
        if on_host(rows):  # without a second copy of them
            for row in self.mirrored:
                rows[row].copy_(rows[self.owners[row]])
        elif self.mirrored:
            owners, mirrored, _ = self._tensors(rows.device)
            rows.index_copy_(0, mirrored, rows.index_select(0, owners[mirrored]))

    def collect(self, gradient: Tensor | None) -> None:
        """Add the gradients [n, ...] of mirrored rows to their owners', and leave zeros there; not of shards."""
        if type(gradient) is not Tensor or gradient.is_sparse:
            return
        if on_host(gradient) and not any(int(bits(gradient[row]).count_nonzero()) for row in self.mirrored):
            return
        owners, mirrored, _ = self._tensors(gradient.device)
        if self.mirrored:
            gradient.index_add_(0, owners[mirrored], gradient.index_select(0, mirrored))
            gradient.index_fill_(0, mirrored, 0)

    def broken(self, B: Tensor) -> bool | Tensor:
        """Whether the bits of a mirrored row differ from its owner's: on a device as a tensor, without waiting."""
        if not self.mirrored:
            return False
        if on_host(B):
            return not all(equal_rows(B, row, self.owners[row]) for row in self.mirrored)
        owners, mirrored, _ = self._tensors(B.device)
        ints = bits(B)
        return (ints.index_select(0, mirrored) != ints.index_select(0, owners[mirrored])).any()

    def incomplete(self, B: Tensor) -> bool | Tensor:
        """Whether rows that are not tied look equal (some values are compared, not all), and not like zero."""
        sample = _sample(B)
        if on_host(B):
            nonzero = (sample != 0).any(-1).tolist()
            codes = bits(sample).numpy()
            seen = [codes[row].tobytes() for row in dict.fromkeys(self.owners) if nonzero[row]]
            return len(set(seen)) < len(seen)
        _, _, known = self._tensors(B.device)
        ints = bits(sample)
        return ((ints[:, None] == ints).all(-1) & (sample != 0).any(-1) & ~known).any()

    def misses(self, rows: Tensor) -> bool | Tensor:
        """Whether the buffer `rows` says something else than these ties."""
        if on_host(rows):
            return rows.tolist() != self.owners
        return (rows != self._tensors(rows.device)[0]).any()
