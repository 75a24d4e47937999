"""The command ``aslora-meft``."""

import argparse
import errno
import os
import sys
import warnings

from aslora_meft import __version__
from aslora_meft.errors import RaisingParser, UsageError, as_usage_error


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0; 2 after bad input, and 130 after Ctrl-C, each with one sentence on stderr; 141 where nobody
        reads the output any more (`| head`).
    """
    try:
        with warnings.catch_warnings():
            # Those of the libraries below are for whoever writes code, not for whoever runs a command.
            warnings.simplefilter("ignore", FutureWarning)
            _run(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
    except UsageError as error:
        print(f"aslora-meft: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # Of the standard output. What is still to be written goes nowhere, or the interpreter would fail as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            return 141
        print("aslora-meft: error: the standard output cannot be written: its disk is full", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"aslora-meft: {str(interrupt) or 'interrupted; nothing was saved'}", file=sys.stderr)
        return 130
    return 0


def _run(argv: list[str]) -> None:
    parser = RaisingParser(
        prog="aslora-meft",
        description="Fine-tune language models with ASLoRA and MEFT, methods of PEFT.",
        epilog=_example("aslora-meft train --model MODEL --data train.jsonl --output_dir out"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"aslora-meft {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{train,generate,evaluate,report,export,run,estimate,count-rows,doctor}"
    )
    # Most have many arguments, made from dataclasses: see arguments/, use/, */command.py.
    commands.add_parser("train", help="fine-tune an adapter and save it", add_help=False)
    commands.add_parser("estimate", help="predict memory, traffic and time without GPU or weights", add_help=False)
    commands.add_parser("generate", help="answer prompts with a saved adapter", add_help=False)
    commands.add_parser("evaluate", help="measure a saved adapter on data", add_help=False)
    commands.add_parser("report", help="show what happened in a run, or in two, on one page", add_help=False)
    commands.add_parser(
        "run",
        help="run another Python program with both methods known to PEFT",
        usage="aslora-meft run -- PROGRAM [ARGUMENTS]",
        description="Import both methods, then run a Python file, a module (-m NAME) or the command of a package.",
        epilog=_example(
            "aslora-meft run -- lm_eval run --model hf --model_args pretrained=MODEL,peft=out --tasks TASK"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands.add_parser("count-rows", help="count how often a corpus uses each row of a MEFT adapter", add_help=False)
    commands.add_parser("export", help="write saved adapters in another format", add_help=False)
    doctor = commands.add_parser(
        "doctor",
        help="what this machine has and reaches",
        description="Print versions, devices, and the speed of memory, links and updates by which MEFT chooses.",
        epilog=_example("aslora-meft doctor --anew"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("--anew", action="store_true", help="measure again what was measured before")
    if argv[:1] == ["run"] and argv[1:2] not in (["-h"], ["--help"]):
        from aslora_meft.runner import run as run_program

        run_program(argv[1:])
        return
    options, rest = parser.parse_known_args(argv)
    if options.command == "train":
        # Only here: transformers takes seconds to import.
        from aslora_meft.arguments.groups import parse_train
        from aslora_meft.train import train
        from aslora_meft.training.ranks import lost_ranks_in_one_sentence

        with lost_ranks_in_one_sentence():
            train(parse_train(rest))
    elif options.command == "estimate":
        from aslora_meft.planner.command import run

        run(rest)
    elif options.command == "generate":
        from aslora_meft.use.generate import run as generate

        generate(rest)
    elif options.command == "evaluate":
        from aslora_meft.use.evaluate import run as evaluate

        evaluate(rest)
    elif options.command == "count-rows":
        from aslora_meft.use.count_rows import run as count_rows

        count_rows(rest)
    elif options.command == "report":
        from aslora_meft.report.command import run as run_report

        run_report(rest)
    elif options.command == "export":
        from aslora_meft.export.command import run as run_export

        run_export(rest)
    elif rest:
        raise UsageError(f"unknown argument {rest[0]!r} (see aslora-meft {options.command} --help)")
    else:
        from aslora_meft.doctor import report

        with as_usage_error(ValueError):  # of the environment's variables
            told = report(anew=options.anew)
        print(told)


def _example(command: str) -> str:
    return f"example:\n  {command}"


if __name__ == "__main__":
    raise SystemExit(main())
