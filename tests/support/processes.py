"""Python processes that tests start: each imports what the test's own process can import."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]


def environment(**variables):
    """Variables for a child: this process's way to modules, and one thread."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


def run_code(code, *arguments, timeout=120):
    """Run a program that is given as text; what it has printed.

    Raises:
        AssertionError: it has failed, with what it said.
    """
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=timeout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stdout


def once(request, name, make):
    """A folder that `make` has filled, once for all workers of a test run: their module fixtures would do it again."""
    base = request.getfixturevalue("tmp_path_factory").getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / name
    done = folder / "done"
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def run_ranks(script, folder, world=2, seconds=240):
    """Run `python SCRIPT RANK FOLDER` for each rank, which saves what `saved_by_ranks` reads."""
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", script, str(rank), str(folder)],
            env=environment(),
            stdout=logs[rank].open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]
    deadline = time.monotonic() + seconds
    # One that fails leaves the other waiting: then neither is worth waiting for.
    while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.wait()
    assert [p.returncode for p in processes] == [0] * world, "\n".join(log.read_text() for log in logs)


def saved_by_ranks(folder, world=2):
    """What each rank has kept: task -> result."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def work_as_rank(rank, folder, tasks, world=2):
    """What each rank does: its tasks, in one process group; results are saved as they come.

    Args:
        tasks: name -> callable, whose result is kept; where it fails, the error's `repr`.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),  # a rank that waits for one that failed
    )
    results = {}
    for name, task in tasks.items():
        began = time.perf_counter()
        try:
            results[name] = task()
        except Exception as error:  # the other tests still have something to say; both ranks fail alike
            results[name] = repr(error)
        print(f"{name}: {time.perf_counter() - began:.2f} s", flush=True)
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def result_of(ranks, name):
    """Of each rank the result of a task; fails where the task did."""
    results = [rank[name] for rank in ranks]
    for entry in results:
        assert not isinstance(entry, str), entry
    return results
