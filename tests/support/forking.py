"""A process that has imported what most tests need, which takes seconds, and is forked for each program of a test.

Run as a script. A line of stdin is a request as JSON: `code`, `file` (its name in tracebacks), `processes` (of each its
arguments and the file for what it prints), `environment`, `folder` (where it runs), `seconds`, `alone`, and `bare` for
a program that needs a process without PEFT and our packages. The answer is a line with the exit codes. Where one
process fails, the others are killed, as they may wait for it; not where each is `alone`.
"""

import gc
import importlib
import json
import os
import signal
import sys
import traceback
from types import ModuleType

BARE = ("torch", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama")
ALL = ("transformers.trainer", "tests.support.tiny_aslora", "tests.support.tiny_meft")
if "DS_ACCELERATOR" in os.environ:  # of `make test-deepspeed`
    ALL += ("deepspeed",)


def import_all(names):
    gc.disable()
    for name in names:
        importlib.import_module(name)
    gc.enable()
    gc.freeze()  # else a collection in a forked process writes to all that lies there, which copies it


def serve(requests, answers, bare=True):
    """Answer requests until there are none. Returns None then; in a forked process the request and its number."""
    full = None  # the way to a forked process that has imported all, and serves as this one does
    for line in requests:
        request = json.loads(line)
        if bare and not request["bare"]:
            if full is None:
                (inbound, asking), (answered, outbound) = os.pipe(), os.pipe()
                if not os.fork():
                    os.close(asking)  # so that it ends with this process
                    import_all(ALL)
                    return serve(os.fdopen(inbound), os.fdopen(outbound, "w"), bare=False)
                os.close(outbound)
                full = os.fdopen(asking, "w"), os.fdopen(answered)
            full[0].write(line)
            full[0].flush()
            answers.write(full[1].readline())
            answers.flush()
            continue
        running, codes = {}, [None] * len(request["processes"])
        for number in range(len(codes)):
            if not (child := os.fork()):
                return request, number
            running[child] = number
        while running:
            child, status = os.wait()
            number = running.pop(child)
            codes[number] = os.waitstatus_to_exitcode(status)
            if codes[number] and not request["alone"]:
                for other in running:
                    os.kill(other, signal.SIGKILL)
        answers.write(json.dumps(codes) + "\n")
        answers.flush()
    return None


def become(request, number):
    """Run the program as Python would run it as a script. Of the interpreter's own end, which takes time, nothing is
    run but where it is `alone`.
    """
    arguments, output = request["processes"][number]
    signal.alarm(request["seconds"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [request["file"], *arguments]
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__file__ = request["file"]
    code = 1
    try:
        exec(compile(request["code"], request["file"], "exec"), vars(main))
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if not request["alone"]:
            os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    # What is printed while packages are imported is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_all(BARE)
    if forked := serve(sys.stdin, answers):
        become(*forked)
