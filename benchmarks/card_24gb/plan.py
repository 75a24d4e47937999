"""What the 24 GB benchmark measures, in the order of what tells most: cells, and groups of those that are compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product

# Contestant -> MEFTConfig.retrieval.
HOST_STRATEGIES = {f"meft {name}": name for name in ("host", "stream", "device-keys", "device-rows", "auto")}
DENSE = tuple(f"dense {name}" for name in ("adamw", "adamw8bit", "paged", "torchao"))
OFFLOADING = ("dense paged", "dense torchao")
ROUTINGS = ("0.26", "0.6", "1.0", "0.1", "recorded")
SHAPES = ((2, 256), (1, 256), (4, 256), (8, 256), (1, 2048))
R = (6400, 3072, 8464)
LORA_R = 64
FLAT_ROWS, FLAT_R = 1024, (1024, 4096, 6400, 16384)


@dataclass(frozen=True)
class Cell:
    """One row to be.

    Attributes:
        r: neurons, or LoRA's rank. routing: as in `card_24gb.routing.Routing`; "-" for those that do not route.
    """

    model: str
    base: str
    batch: int
    length: int
    accumulation: int
    clip: bool
    r: int
    contestant: str
    routing: str = "-"

    @property
    def key(self) -> dict[str, object]:
        return asdict(self)

    @property
    def family(self) -> str:
        """Cells of one family, base and r share a worker where all of them are MEFT's."""
        if self.contestant in HOST_STRATEGIES or self.contestant == "null":
            return "meft"
        return "lora" if self.contestant in ("lora", "qlora") else self.contestant

    def title(self) -> str:
        clip = "clip" if self.clip else "no clip"
        return (
            f"{self.model} {self.base} {self.batch}x{self.length} x{self.accumulation} {clip} r {self.r} "
            f"{self.contestant} {self.routing}"
        )


@dataclass(frozen=True)
class Group:
    """Cells that are compared with each other: one model, one shape, one r."""

    cells: tuple[Cell, ...]

    def jobs(self) -> list[list[Cell]]:
        """What one worker does: the MEFT cells together, each other contestant alone."""
        found: dict[tuple[str, str], list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(("meft" if cell.family == "meft" else cell.contestant, cell.base), []).append(cell)
        return list(found.values())


def group(
    model: str, base: str, shape: tuple[int, int], accumulation: int, clip: bool, r: int,
    routings: Iterable[str] = ROUTINGS, meft: Iterable[str] = HOST_STRATEGIES, peers: bool = True,
) -> Group:  # fmt: skip
    """All contestants at one shape."""
    own = Cell(model, base, *shape, accumulation, clip, r, "null")
    cells = [replace(own, contestant=name, routing=routing) for name in (*meft, "null") for routing in routings]
    if peers:
        cells += [replace(own, contestant=name) for name in DENSE]
        if base == "bf16":
            cells.append(replace(own, contestant="lora", r=LORA_R))
        cells.append(replace(own, contestant="qlora", base="nf4", r=LORA_R))
    return Group(tuple(cells))


def plan(full: bool = False) -> Iterator[Group]:
    """Everything, the most telling first: the main group, its changes one by one, the targets' own; then the rest."""
    main = ("llama-2-7b", "bf16", SHAPES[0], 1, True, R[0])
    yield group(*main)
    for r in R[1:]:
        yield group(*main[:5], r)
    yield group(*main[:3], 16, True, R[0])
    yield group(*main[:4], False, R[0])
    for shape in SHAPES[1:]:
        yield group(*main[:2], shape, *main[3:])
    yield group(main[0], "nf4", *main[2:])
    yield group("mistral-7b", *main[1:])
    yield group("mistral-7b", "nf4", *main[2:])
    yield group(*main[:5], 6144, ("0.26",), ("meft host",), peers=False)
    for r in FLAT_R:
        yield group(*main[:5], r, (f"rows:{FLAT_ROWS}",), ("meft host", "meft stream"), peers=False)
    if full:
        for setting in product(("llama-2-7b", "mistral-7b"), ("bf16", "nf4"), SHAPES, (1, 16), (True, False), R):
            yield group(*setting)


def quick_plan() -> Iterator[Group]:
    """The main group at two shares."""
    yield group("llama-2-7b", "bf16", SHAPES[0], 1, True, R[0], ("0.26", "0.6"))


def dry_plan() -> Iterator[Group]:
    """Every contestant, routing, base, model, and both settings of accumulation and clipping, on tiny shapes."""
    yield group("tiny-llama", "bf16", (2, 16), 1, True, 64)
    yield group("tiny-mistral", "nf4", (1, 32), 2, False, 128, ("rows:24",), ("meft stream", "meft device-keys"))


def rotated(items: list, by: int) -> list:
    """The list, begun at another place: who ran first before runs last now."""
    by %= max(1, len(items))
    return items[by:] + items[:by]
