"""Python processes that tests start: each imports what the test's own process can import."""

import atexit
import json
import os
import subprocess
import sys
import tempfile
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


def print_ends_of_children(touches):
    """How a forked process ends that does each: 7 where it is told that rows are not in its memory."""
    for touch in touches:
        child = os.fork()
        if child == 0:
            try:
                touch()
            except RuntimeError as error:
                os._exit(7 if "not in the memory of a forked process" in str(error) else 8)
            os._exit(9)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


_server = None  # of `forking`


def run_together(code, processes, seconds, file="<program>", ends=None, bare=False):
    """Run a program in forked processes at the same time, which have imported PEFT, transformers and our packages.

    Args:
        processes: of each its arguments, and the file that gets what it prints.
        file: the program's name.
        ends: exit codes that are not 0; then each process ends by itself, and as the interpreter ends.
        bare: they have imported torch and transformers alone, with neither PEFT nor anything of ours.

    Raises:
        AssertionError: one has failed, with what it said; the others were killed.
    """
    global _server
    if _server is None:
        command = [sys.executable, "-W", "ignore", "-m", "tests.support.forking"]
        _server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
        )
        atexit.register(_server.communicate)  # which closes its stdin, and so ends it
    processes = [([str(argument) for argument in arguments], str(output)) for arguments, output in processes]
    request = {"code": code, "file": str(file), "processes": processes, "seconds": seconds, "bare": bare}
    request |= {"environment": environment(), "folder": os.getcwd(), "alone": ends is not None}
    _server.stdin.write(json.dumps(request) + "\n")
    _server.stdin.flush()
    codes = json.loads(_server.stdout.readline())
    said = "\n".join(Path(output).read_text()[-8000:] for _, output in processes)
    assert codes == (ends or [0] * len(processes)), f"exit codes {codes}\n{said}"


def run_code(code, *arguments, timeout=120, fresh=False, bare=False):
    """Run a program that is given as text; what it has printed.

    Args:
        fresh: in a process that has imported nothing yet.
        bare: in one that has imported torch and transformers alone, with neither PEFT nor anything of ours.

    Raises:
        AssertionError: it has failed, with what it said.
    """
    if not fresh and hasattr(os, "fork"):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "output"
            run_together(code, [(arguments, output)], timeout, bare=bare)
            return output.read_text()
    code = "import gc; gc.disable()  # imports are faster\n" + code
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
    """Run the script with arguments RANK FOLDER for each rank, which saves what `saved_by_ranks` reads."""
    ranks = [((rank, folder), folder / f"rank{rank}.log") for rank in range(world)]
    run_together(Path(script).read_text(encoding="utf-8"), ranks, seconds, file=script)


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
