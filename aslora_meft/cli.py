"""The command ``aslora-meft``."""

import argparse
import sys
import warnings

from aslora_meft import __version__
from aslora_meft.errors import RaisingParser, UsageError, as_usage_error
from aslora_meft.text import local_path


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0; 2 after bad input, and 130 after Ctrl-C, each with one sentence on stderr.
    """
    try:
        with warnings.catch_warnings():
            # Those of the libraries below are for whoever writes code, not for whoever runs a command.
            warnings.simplefilter("ignore", FutureWarning)
            _run(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        print(f"aslora-meft: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"aslora-meft: {interrupt or 'interrupted; nothing was saved'}", file=sys.stderr)
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
        dest="command", required=True, metavar="{train,generate,evaluate,export,run,estimate,doctor}"
    )
    # Most have many arguments, made from dataclasses: see arguments.py, use.py and planner/command.py.
    commands.add_parser("train", help="fine-tune an adapter and save it", add_help=False)
    commands.add_parser("estimate", help="predict memory, traffic and time without GPU or weights", add_help=False)
    commands.add_parser("generate", help="answer prompts with a saved adapter", add_help=False)
    commands.add_parser("evaluate", help="measure a saved adapter on data", add_help=False)
    commands.add_parser("run", help="run another Python program with both methods known to PEFT", add_help=False)
    export = commands.add_parser(
        "export",
        help="write a saved adapter in another format",
        description="Write a saved adapter in another format; its outputs stay the same.",
        epilog=_example("aslora-meft export out --to lora out-lora"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("adapter_dir", metavar="ADAPTER_DIR", help="folder of a saved ASLoRA or MEFT adapter")
    export.add_argument(
        "--to",
        required=True,
        choices=["lora", "resident", "dense"],
        help="lora: ASLoRA as an equal adapter that stock PEFT loads; resident: MEFT as plain tensors; dense: MEFT "
        "without routing as the dense adapter it equals",
    )
    export.add_argument("out_dir", metavar="OUT_DIR", help="new or empty folder")
    doctor = commands.add_parser(
        "doctor",
        help="what this machine has and reaches",
        description="Print versions, devices, and the speed of memory, links and updates by which MEFT chooses.",
        epilog=_example("aslora-meft doctor --anew"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("--anew", action="store_true", help="measure again what was measured before")
    if argv[:1] == ["run"]:
        from aslora_meft.runner import run as run_program

        run_program(argv[1:])
        return
    options, rest = parser.parse_known_args(argv)
    if options.command == "train":
        # Only here: transformers takes seconds to import.
        from aslora_meft.arguments import parse_train
        from aslora_meft.train import train

        train(parse_train(rest))
    elif options.command == "estimate":
        from aslora_meft.planner.command import run

        run(rest)
    elif options.command == "generate":
        from aslora_meft.generate import run as generate

        generate(rest)
    elif options.command == "evaluate":
        from aslora_meft.evaluate_command import run as evaluate

        evaluate(rest)
    elif rest:
        raise UsageError(f"unknown argument {rest[0]!r} (see aslora-meft {options.command} --help)")
    elif options.command == "doctor":
        from aslora_meft.doctor import report

        print(report(anew=options.anew))
    else:
        _export(options.adapter_dir, options.to, options.out_dir)


def _example(command: str) -> str:
    return f"example:\n  {command}"


def _export(adapter_dir: str, form: str, out_dir: str) -> None:
    from aslora_meft.checks import check_output
    from aslora_meft.saved import check_saved_adapter

    check_saved_adapter("ADAPTER_DIR", adapter_dir)
    check_output("OUT_DIR", out_dir)
    if form == "lora":
        from aslora import export_to_lora as export
    elif form == "resident":
        from meft import export_resident as export
    else:
        from meft import export_dense as export

    with (
        as_usage_error(ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError),
        as_usage_error(OSError, prefix=f"OUT_DIR={out_dir!r} cannot be written: "),
    ):
        export(local_path("ADAPTER_DIR", adapter_dir), local_path("OUT_DIR", out_dir))
    written = {"lora": "LoRA adapter", "resident": "Resident tensors", "dense": "Dense adapter"}[form]
    print(f"{written}: {local_path('OUT_DIR', out_dir).resolve()}")


if __name__ == "__main__":
    raise SystemExit(main())
