"""What four ranks of one machine take for MEFT's rows that they share, against one rank.

    python -m benchmarks.node_rows --out benchmarks/results/node_rows.json

Processes on the CPU with gloo, each with one thread. Proportional memory (`Pss` of /proc/PID/smaps_rollup) is added up
over the ranks after a step, before `zero_grad`, less what the same run takes with r 8. The union of the touched rows is
the same whatever the number of ranks; of several, each touches half of it. One rank updates with a thread for each
core. Runs of one and of four ranks take turns, and times are the least of all their steps, since other processes may
run: look at the CPU time, too, and at the load. The C library is told to give freed memory
back (MALLOC_MMAP_THRESHOLD_), so that what is in use is measured. Bytes between ranks are counted
by the code that writes them, and compared with masks and own rows. "Private" is what a rank has for itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch

D, LAYERS, STEPS, ROUNDS = 4096, 2, 8, 3  # two layers of Llama-2-7B


def work(rank: int, world: int, r: int, folder: Path) -> None:
    """One rank: steps of gradients of random rows, and what it has taken."""
    import meft
    from meft.gradient.row_gradient import RowGradient
    from meft.optim.node import Node
    from meft.table.row_table import RowTable

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    wrote = []
    write = RowTable.write_shared
    RowTable.write_shared = lambda self, masters: (wrote.append(masters.nbytes), write(self, masters))[1]  # type: ignore[method-assign]
    tables = []
    for _ in range(2 * LAYERS):
        table = RowTable((r, D), master=torch.float32, compute_dtype=torch.bfloat16, on_host=True, pin=False)
        table.fill(0.02)
        tables.append(table)
    began = time.perf_counter()
    node = Node.join(tables, torch.distributed.group.WORLD) if world > 1 else None
    joined = time.perf_counter() - began
    optimizer = meft.RowAdamW([table.rows for table in tables], lr=1e-3)
    generator, common = torch.Generator().manual_seed(rank), torch.Generator().manual_seed(-1)
    formula, summing, updating, unions = 0, [], [], 0

    share = slice(r * rank // world, r * (rank + 1) // world)
    for table in tables:  # a rank's first look at a page of shared memory takes longer than those that follow
        entry = table.moments_in(optimizer).held
        with table.reading() as rows:
            for values in (table.masters, rows, *entry.tensors().values()):
                values[share].max()

    def spent() -> tuple[float, float]:
        """Wall time, and CPU time of all threads of this process."""
        return time.perf_counter(), time.process_time()

    def since(start: tuple[float, float]) -> tuple[float, float]:
        now = spent()
        return now[0] - start[0], now[1] - start[1]

    for _ in range(STEPS):
        optimizer.zero_grad()
        for table in tables:
            touched = torch.rand(r, generator=common) < 0.3
            if world > 1:
                own = torch.rand(r, generator=generator) < 0.5
                own[rank::world] = True
                touched &= own
            rows = touched.nonzero().flatten()
            table.rows.grad = RowGradient(rows, torch.randn(len(rows), D, generator=generator), table.rows)
            formula += r + 1 + 4 * D * len(rows)
        torch.distributed.barrier()
        start, barriers = spent(), node.ranks.barriers if node is not None else 0
        if node is not None:
            node.average_gradients()
            barriers = node.ranks.barriers - barriers
        summing.append(since(start))
        unions = sum(len(table.rows.grad.rows) for table in tables)
        torch.distributed.barrier()
        start = spent()
        optimizer.step()
        for table in tables:
            table.synchronize()
        updating.append(since(start))
    torch.distributed.barrier()
    memory = {
        line.split(":")[0]: 1024 * int(line.split()[1])
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines()
        if line.startswith(("Pss:", "Private_Dirty:"))
    }
    torch.distributed.barrier()
    result = {
        "pss": memory["Pss"],
        "private": memory["Private_Dirty"],
        "bytes_between_ranks": node.sum.bytes_between_ranks if node is not None else 0,
        "formula": formula if node is not None else 0,
        "tables_written_at_start": sum(wrote),
        "seconds_to_join": joined,
        "seconds_to_sum": min(summing)[0],
        "seconds_to_update": min(updating)[0],
        "cpu_seconds_to_sum": min(cpu for _, cpu in summing),
        "cpu_seconds_to_update": min(cpu for _, cpu in updating),
        "barriers_of_a_sum": barriers,
        "union_rows": unions,
    }
    (folder / f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def run(world: int, r: int) -> list[dict[str, float]]:
    """The results of the ranks."""
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "LOCAL_WORLD_SIZE": str(world),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    variables["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", __file__, "--world", str(world), "--r", str(r), "--folder", folder]
        ranks = [subprocess.Popen([*command, "--rank", str(rank)], env=variables) for rank in range(world)]
        for process in ranks:
            process.wait()
        assert not any(process.returncode for process in ranks)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--r", type=int, default=6400)
    for name in ("--rank", "--world"):
        parser.add_argument(name, type=int)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.rank is not None:
        work(given.rank, given.world, given.r, given.folder)
        return
    runs = {world: {8: [run(world, 8)]} for world in (1, 4)}
    for _ in range(ROUNDS):
        for world, by_r in runs.items():
            by_r.setdefault(given.r, []).append(run(world, given.r))

    def total(world: int) -> float:
        """Bytes of all ranks for tables and gradients."""
        entries = zip(runs[world][given.r][-1], runs[world][8][-1], strict=True)
        return sum(large["pss"] - small["pss"] for large, small in entries)

    def least(world: int, name: str) -> list[float]:
        """Of each rank."""
        return [min(entry[name] for entry in of_rank) for of_rank in zip(*runs[world][given.r], strict=True)]

    tables = 2 * LAYERS * given.r * (D * 14 + 4)
    ranks = runs[4][given.r][-1]
    wall, cpu = "seconds_to_update", "cpu_seconds_to_update"
    result = {
        "cores": os.cpu_count(),
        "load_average_at_the_end": os.getloadavg()[0],
        "torch": torch.__version__,
        "r": given.r,
        "d": D,
        "tables": 2 * LAYERS,
        "bytes_of_tables": tables,
        "pss_of_1_rank": total(1),
        "pss_of_4_ranks": total(4),
        "ratio": total(4) / total(1),
        "update_over_1_rank": max(least(4, wall)) / least(1, wall)[0],
        "cpu_of_update_over_1_rank": sum(least(4, cpu)) / least(1, cpu)[0],
        "bytes_between_ranks_over_formula": [entry["bytes_between_ranks"] / entry["formula"] for entry in ranks],
        "bytes_of_tables_written_at_start": [entry["tables_written_at_start"] for entry in ranks],
        "runs": {f"{world} ranks, r {r}": entries for world, by_r in runs.items() for r, entries in by_r.items()},
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if given.out is not None:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
