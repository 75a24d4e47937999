"""Parts of `device_check.py --rehearse`: forked from one process that has imported what most of them need.

These imports take seconds in a new interpreter. On a device each part has its own one: CUDA does not outlive a fork. So
the rehearsal does not show, for a part that is forked, whether it imports all that it uses, whether variables of its
environment work that are read when Python or a library starts, nor how its interpreter ends.
"""

import functools
import gc
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys

FORKED = ("probe", "engine", "sleepy", "tier", "headline")  # the others run the kernels interpreted, or import little
MODULES = ("transformers.models.llama", "peft", "benchmarks.card_24gb.__main__", "benchmarks.device.engine")


@functools.cache
def prepare() -> None:
    """Import what the parts need, once."""
    gc.disable()
    for name in MODULES:
        importlib.import_module(name)
    gc.enable()
    gc.freeze()  # else a collection in a forked process copies all that lies there


def become(command: list[str], folder: str, output: int) -> None:
    """Run a module as `python -m` does, in a process group of its own."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


class Forked:
    """A module that runs in a forked process, as far as `subprocess.Popen` is used here."""

    def __init__(self, command: list[str], folder: str, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        sys.path[1:1] = [path for path in environment["PYTHONPATH"].split(os.pathsep) if path not in sys.path]
        prepare()
        there, output = os.pipe()
        sys.stdout.flush()
        self.process = multiprocessing.get_context("fork").Process(target=become, args=(command, folder, output))
        self.process.start()
        os.close(output)
        assert self.process.pid is not None
        self.pid, self.stdout = self.process.pid, os.fdopen(there, errors="replace")

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: it has not ended.
        """
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout or 0.0)
        return self.process.exitcode
