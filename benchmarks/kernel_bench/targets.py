"""The targets of the kernels, judged on the measured rows alone."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.kernel_bench.cases_adamw import STEP_DEVICE, STEP_PINNED
from benchmarks.kernel_bench.cases_ffn import BARE, YARDSTICK
from benchmarks.kernel_bench.cases_rows import PINNED, TO_COMPACT, TO_TABLE
from benchmarks.kernel_bench.cases_selection import DENSE
from benchmarks.kernel_bench.inputs import OURS

REACHED, MISSED, OPEN = "reached", "NOT reached", "not measured"
OK = "measured"
BESIDE = "gather_rows beside a GEMM"

Row = dict[str, object]


@dataclass(frozen=True)
class Target:
    """A limit, and the worst of the values that it holds for.

    Attributes:
        values: of the measured rows; those of rows that failed or did not run are counted in `lacking`.
        limit: None where this GPU has none.
        at_least: whether values must not be below the limit, or else not above it.
        strict: whether the limit itself is not enough.
    """

    name: str
    values: tuple[float, ...]
    limit: float | None
    at_least: bool = True
    lacking: int = 0
    strict: bool = False
    unit: str = ""

    @property
    def worst(self) -> float | None:
        return (min if self.at_least else max)(self.values, default=None)

    @property
    def verdict(self) -> str:
        """One measured miss is a miss; reached is only what was measured everywhere."""
        if self.limit is None or self.worst is None:
            return OPEN
        gap = self.worst - self.limit if self.at_least else self.limit - self.worst
        if not (gap > 0 if self.strict else gap >= 0):  # a NaN too
            return MISSED
        return OPEN if self.lacking else REACHED

    def line(self) -> str:
        """As text."""
        word = ("more than " if self.strict else ">= ") if self.at_least else ("less than " if self.strict else "<= ")
        asked = "no target for this GPU" if self.limit is None else f"{word}{self.limit:g}{self.unit}"
        found = (
            "nothing measured" if self.worst is None else f"worst of {len(self.values)}: {self.worst:.3g}{self.unit}"
        )
        lacking = f", {self.lacking} not measured" if self.lacking else ""
        return f"{self.verdict:<12}  {self.name}: {found}{lacking}; {asked}"


def number(row: Row, column: str) -> float:
    """A field that a measured row has."""
    value = row[column]
    if not isinstance(value, int | float):
        raise TypeError(f"{column} of a row is {value!r}")
    return float(value)


def select(rows: Iterable[Row], op: str, contestant: str, keep: Callable[[Row], bool]) -> tuple[list[Row], int]:
    """The measured rows of a contestant, and how many cases of the op have none."""
    mine = [row for row in rows if row["op"] == op and keep(row)]
    measured = [row for row in mine if row["contestant"] == contestant and row["status"] == OK]
    cases, found = ({(place(row), row["dtype"]) for row in some} for some in (mine, measured))
    return measured, len(cases - found)


def rate_limit(capability: int | None) -> float | None:
    """Of cuBLAS' own rate."""
    return {80: 0.85, 86: 0.85, 89: 0.85, 90: 0.65}.get(capability or 0)


def routing_limit(gpu: str) -> float | None:
    """Microseconds."""
    if "H200" in gpu:
        return 40.0
    return 80.0 if "RTX 3090" in gpu or "RTX 4090" in gpu else None


def targets(rows: list[Row], gpu: str, capability: int | None) -> list[Target]:
    """All of them; where an op is missing, its values are."""

    def of(
        name: str, column: str, limit: float | None, op: str, keep: Callable[[Row], bool], contestant: str = OURS,
        scale: float = 1.0, **settings: object,
    ) -> Target:  # fmt: skip
        found, lacking = select(rows, op, contestant, keep)
        values = tuple(scale * number(row, column) for row in found)
        return Target(name, values, limit, lacking=lacking, **settings)  # type: ignore[arg-type]

    def many(row: Row) -> bool:
        return number(row, "U") >= 1024

    def what(*names: str) -> Callable[[Row], bool]:
        return lambda row: row["what"] in names

    both, forward = what("forward", "backward"), what("forward")
    listed = [
        of("gather_rows of 8 KiB rows, of the pinned copy in", "of_ceiling", 0.9, "gather_rows",
           lambda row: row["what"] == PINNED and many(row)),
        of("the same beside a bf16 GEMM", "of_ceiling", 0.8, BESIDE, what("gather")),
        of("that GEMM, times as long as alone", "times_ours", 1.1, BESIDE, what("GEMM"), at_least=False, strict=True),
        of("sparse_ffn, times as fast as the yardstick", "times_ours", 1.0, "sparse_ffn", both, YARDSTICK),
        of("sparse_ffn forward, times as fast as the yardstick", "times_ours", 1.2, "sparse_ffn", forward, YARDSTICK),
        of("sparse_ffn, of the bare GEMMs' rate", "times_ours", rate_limit(capability), "sparse_ffn",
           lambda row: both(row) and many(row), BARE),
        of("expert_topk, times as fast as the dense GEMM with masked top-k", "times_ours", 1.0, "expert_topk",
           lambda row: True, DENSE),
        of("router_topk and row_union at T 512", "ms_q50", routing_limit(gpu), "router_topk + row_union",
           lambda row: row.get("T") == 512, at_least=False, scale=1e3, unit=" us"),
        of("row_adamw on the device, of the device copy", "of_ceiling", 0.85, "row_adamw",
           what(STEP_DEVICE)),
        of("row_adamw over pinned memory, of one direction of both copies at once", "of_ceiling", 0.8, "row_adamw",
           what(STEP_PINNED)),
    ]  # fmt: skip
    return [target for target in listed if target.values or target.lacking or target.limit is not None]


def choices(rows: list[Row]) -> list[str]:
    """Where a rival is faster, so that it is what should run."""
    rivals = {
        "sparse_ffn": (YARDSTICK,),
        "expert_topk": (DENSE,),
        "scatter_rows": (TO_COMPACT, TO_TABLE),
    }
    lines = []
    for row in rows:
        if row["op"] not in rivals or row["status"] != OK or row["contestant"] == OURS or row["what"] == "decoding":
            continue
        names, ratio = rivals[str(row["op"])], number(row, "times_ours")
        if ratio < 1 and (names is None or row["contestant"] in names):
            lines.append(f"{row['contestant']} is faster than {row['op']}: {place(row)}, {ratio:.2f} of its time")
    return lines


def place(row: Row) -> str:
    """Which case a row is of."""
    shape = ", ".join(
        f"{name} {row[name]}" for name in ("r", "E", "T", "share", "U") if row.get(name) not in ("", None)
    )
    return f"{row['what']} ({shape})" if row["what"] and shape else f"{row['what']}{shape}"
