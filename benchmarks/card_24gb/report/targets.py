"""The targets of the 24 GB benchmark, judged on measured rows alone: met, missed, or not measured."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.card_24gb.plan import FLAT_R, FLAT_ROWS, HOST_STRATEGIES, OFFLOADING

MEASURED = "measured"
MET, MISSED, OPEN = "met", "missed", "not measured"
CARD_GIB = 24.0
OF_NULL = 0.8
Row = dict


@dataclass(frozen=True)
class Target:
    """A limit, and what was found.

    Attributes:
        found: values, each of which has to keep the limit. lacking: how many more are to be measured.
        remark: what the verdict does not say.
    """

    name: str
    limit: float
    at_least: bool
    found: tuple[float, ...] = ()
    lacking: int = 0
    unit: str = ""
    remark: str = ""

    @property
    def verdict(self) -> str:
        """One miss is a miss; met is only what was measured everywhere."""
        if not self.found:
            return OPEN
        if not all(value >= self.limit if self.at_least else value <= self.limit for value in self.found):
            return MISSED
        return OPEN if self.lacking else MET

    def line(self) -> str:
        sign = ">=" if self.at_least else "<="
        worst = (min if self.at_least else max)(self.found, default=None)
        said = "" if worst is None else f": worst of {len(self.found)} is {worst:.3g}{self.unit}"
        lacking = f", {self.lacking} not measured" if self.lacking and self.found else ""
        remark = f" ({self.remark})" if self.remark else ""
        return f"{self.verdict:<12}  {self.name} {sign} {self.limit:g}{self.unit}{said}{lacking}{remark}"


def is_main(row: Row, **changes: object) -> bool:
    """Whether a row is of the main shape, but for some fields."""
    main = {
        "model": "llama-2-7b", "base": "bf16", "batch": 2, "length": 256, "accumulation": 1, "clip": True, "r": 6400,
    }  # fmt: skip
    return all(row[name] == value for name, value in (main | changes).items())


def taken(rows: Iterable[Row], keep: Callable[[Row], bool], value: Callable[[Row], float | None]) -> dict:
    """`found` and `lacking` of a target: at least one row is asked for."""
    kept = [row for row in rows if keep(row)]
    values = [value(row) if row["status"] == MEASURED else None for row in kept]
    found = tuple(v for v in values if v is not None)
    return {"found": found, "lacking": max(len(kept), 1) - len(found)}


def peak(row: Row) -> float | None:
    """Peak of torch's allocator."""
    return row.get("peak_gib")


def traffic_error(row: Row) -> float | None:
    """How far the counters are from the formula, the worse way of the two."""
    ways = [(row.get(f"bytes_to_{way}"), row.get(f"formula_to_{way}")) for way in ("device", "host")]
    if any(counted is None or formula is None for counted, formula in ways):
        return None
    return max(abs(counted - formula) / max(formula, 1) for counted, formula in ways)


def moved_of_omega(row: Row) -> float | None:
    """Elements moved both ways, of 2 L d r."""
    values = row.get("row_values")
    return (row["elements_to_device"] + row["elements_to_host"]) / values if values else None


def times_bound(row: Row) -> float | None:
    """The measured step beside the least time that it can take (`card_24gb/bound.py`)."""
    return row["ms_q50"] / row["bound_ms"] if row.get("bound_ms") else None


def flatness(rows: list[Row], contestant: str) -> dict:
    """Largest peak over smallest at fixed |U|, without what is predicted to grow with r."""
    kept = [
        row for row in rows
        if row["routing"] == f"rows:{FLAT_ROWS}" and row["contestant"] == contestant and is_main(row, r=row["r"])
        and row["r"] in FLAT_R and row["status"] == MEASURED and peak(row) is not None
    ]  # fmt: skip
    lacking = len(FLAT_R) - len(kept)
    if len(kept) < 2:
        return {"found": (), "lacking": lacking}
    peaks = [row["peak_gib"] - row["growing_gib"] for row in kept]
    return {"found": (max(peaks) / min(peaks) - 1,), "lacking": lacking}


def peer_ratio(row: Row) -> float | None:
    """Against the fastest offloading peer that fits, of the same invocation."""
    ratios = [ratio for name, ratio in (row.get("times_peers") or {}).items() if name in OFFLOADING]
    return min(ratios, default=None)


def targets(rows: list[Row]) -> list[Target]:
    """All of the issue's that rows can tell about."""

    def auto(row: Row) -> bool:
        return row["contestant"] == "meft auto"

    def forced(row: Row) -> bool:
        return row["contestant"] in HOST_STRATEGIES and row["accumulation"] in (1, 16)

    def lean(share: str) -> Callable[[Row], bool]:
        return lambda row: (
            is_main(row) and row["contestant"] in ("meft host", "meft stream") and row["routing"] == share
        )

    def permitted(row: Row) -> bool:
        return (row.get("bound_of_null") or 1.0) >= OF_NULL

    forbidden = sum(auto(row) and not permitted(row) for row in rows)
    return [
        Target("step time of auto, times its bound", 1.15, False, **taken(rows, auto, times_bound)),
        Target("auto, of the speed without transport", OF_NULL, True,
               remark=f"{forbidden} rows left out whose bound does not permit it",
               **taken(rows, lambda row: auto(row) and permitted(row), lambda row: row.get("of_null"))),
        *(
            Target(f"torch peak at r 6400, 2x256, |U| = {share} r", limit, False, unit=" GiB",
                   **taken(rows, lean(share), peak))
            for share, limit in (("0.26", 15.5), ("0.6", 17.0))
        ),
        *(
            Target(f"{name}: growth of the peak from r {FLAT_R[0]} to {FLAT_R[-1]} at |U| = {FLAT_ROWS}", 0.03, False,
                   remark="without routers and key buffers, which are predicted", **flatness(rows, name))
            for name in ("meft host", "meft stream")
        ),
        Target("traffic beside the formula, relative error", 0.01, False, **taken(rows, forced, traffic_error)),
        Target("host at r 6144, |U| = 0.26 r: moved, of all values", 0.56, False,
               **taken(rows, lambda row: is_main(row, r=6144) and row["contestant"] == "meft host", moved_of_omega)),
        Target("auto, times as fast as the fastest offloading peer that fits", 1.0, True,
               **taken(rows, lambda row: auto(row) and row["accumulation"] == 1, peer_ratio)),
    ]  # fmt: skip


def reported(rows: list[Row]) -> list[str]:
    """What has no limit: the ratio to offloading peers at accumulation 16."""
    ratios = [peer_ratio(row) for row in rows if row["contestant"] == "meft auto" and row["accumulation"] == 16]
    found = [ratio for ratio in ratios if ratio is not None]
    said = f"{min(found):.2f} to {max(found):.2f}" if found else OPEN
    return [f"at accumulation 16, auto is times as fast as the fastest offloading peer that fits: {said}"]
