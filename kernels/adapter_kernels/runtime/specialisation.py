"""One way in which an op launches a kernel, as the ahead-of-time check compiles it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

TYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

# A dtype, its name and whether rows are unaligned: see `unaligned`. Unaligned rows in fp16 are not compiled, for time:
# the addresses and registers are those of bf16.
KINDS_OF_ROWS = [(dtype, name, False) for dtype, name in TYPE_NAMES.items()] + [
    (dtype, TYPE_NAMES[dtype], True) for dtype in (torch.float32, torch.bfloat16)
]


@dataclass(frozen=True)
class Specialisation:
    """A specialisation of a kernel.

    Attributes:
        kernel: the `@triton.jit` function.
        types: type of each runtime argument: "*bf16", "*i32", "i32", "fp32", ...
        constants: the constexpr arguments.
        launch: num_warps and num_stages.
        aligned: whether the arguments that the kernel names so are multiples of 16, as at the usual sizes; all pointers
            are taken to be aligned to 16 bytes, as torch allocates them.
        wide: whether global memory must be read 16 bytes at a time.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    launch: Mapping[str, int]
    aligned: bool = True
    wide: bool = False

    @property
    def specialised(self) -> list[str]:
        """The integer arguments for whose values (multiples of 16; 1) a launch compiles another kernel."""
        integers = [p for p in self.kernel.params if self.types.get(p.name) in ("i32", "i64")]
        return [p.name for p in integers if not p.do_not_specialize]

    @property
    def label(self) -> str:
        """The kernel, the types of its data and what it is specialised for."""
        data = sorted({kind[1:] for kind in self.types.values() if kind.startswith("*") and not kind.startswith("*i")})
        fields = [f"{name}={value}" for name, value in (*self.constants.items(), *self.launch.items())]
        unaligned = [] if self.aligned else ["unaligned rows"]
        return " ".join([self.kernel.__name__.strip("_").removesuffix("_kernel"), "/".join(data), *fields, *unaligned])


def with_unaligned_rows(variants: list[Specialisation]) -> list[Specialisation]:
    """The variants and, of those that are compiled anew for them, the ones for sizes that are no multiples of 16.

    Those in fp16 are left out, as in KINDS_OF_ROWS.
    """
    again = [v for v in variants if v.specialised and "*fp16" not in v.types.values()]
    return variants + [replace(v, aligned=False, wide=False) for v in again]


def unaligned(*sizes: int) -> bool:
    """Whether rows of these lengths and distances cannot be read 16 bytes at a time."""
    return any(size % 16 for size in sizes)


def split(config: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, int]]:
    """The block sizes of a configuration, and its num_warps and num_stages."""
    options = {name: value for name, value in config.items() if name in ("num_warps", "num_stages")}
    return {name: value for name, value in config.items() if name not in options}, options


# `variants` of an op's Triton module: by compute capability (None: the default configurations).
Variants = Callable[[int | None], list[Specialisation]]
