"""A result file: one row a run, replaced atomically after each, looked up on a rerun."""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Rows:
    """Rows kept in one JSON file: `data`, `environments` (each distinct one once) and `rows`, one line each.

    Several processes may add to one file; each addition reads it anew under a lock.

    Args:
        path: of the file.
        data: file of a data set -> digest of what it holds (`data_files.rows_of`), of the rows that will be added.
    """

    KEYS = ("task", "method", "seed", "split")

    def __init__(self, path: Path, data: Mapping[str, str] | None = None):
        self.path, self._data = path, dict(data or {})

    def read(self) -> dict[str, Any]:
        """The whole file; where there is none, one without rows."""
        if self.path.exists():
            return json.loads(self.path.read_text())
        return {"data": {}, "environments": [], "rows": []}

    def find(self, key: dict, settings: dict) -> dict | None:
        """The row with these keys whose settings are equal, as JSON sees them; None if there is none."""
        wanted = json.loads(json.dumps(key | {"settings": settings}))
        return next((row for row in self.read()["rows"] if all(row.get(name) == wanted[name] for name in wanted)), None)

    def take(self, key: dict, settings: dict, others: Iterable[Path]) -> dict | None:
        """As `find`, in other files with rows of the same data; the row is added here, and says where it was made."""
        for path in others:
            row = Rows(path).find(key, settings)
            other = Rows(path).read()
            data = other.get("data", {})
            common = data.keys() & self._data.keys()
            if row is not None and common and all(data[name] == self._data[name] for name in common):
                return self.add({"made_for": path.stem} | row, other["environments"][row["environment"]])
        return None

    def add(self, row: dict, environment: dict) -> dict:
        """Append a row and replace the file whole.

        It takes the place of one of the same run with the same settings; runs that choose a learning rate differ by it,
        of the runs for the table there is one per task, method and seed. Rows with other settings stay: they may be
        of another model, which would take hours to run again.
        """
        keys = (*self.KEYS, "settings", *([] if row["split"] == "test" else ["learning_rate"]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            held = self.read()
            data = json.dumps(held.get("data", {}) | self._data)
            if environment not in held["environments"]:
                held["environments"].append(environment)
            row = json.loads(json.dumps(row | {"environment": held["environments"].index(environment)}))
            rows = [old for old in held["rows"] if any(old[key] != row[key] for key in keys)] + [row]
            lines = ",\n".join(json.dumps(line) for line in rows)
            temporary = self.path.with_suffix(".partial")
            environments = json.dumps(held["environments"])
            temporary.write_text(f'{{"data": {data},\n"environments": {environments},\n"rows": [\n{lines}\n]}}\n')
            os.replace(temporary, self.path)
        finally:
            os.close(folder)
        return row
