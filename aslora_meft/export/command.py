"""The command `aslora-meft export`."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError

from aslora_meft.arguments.checks import check_output
from aslora_meft.arguments.text import local_path
from aslora_meft.errors import RaisingParser, UsageError, as_usage_error
from aslora_meft.use.saved import check_saved_adapter

_FORMS = {
    "model": "MEFT: adapter and base model as one folder that transformers and servers load",
    "dense": "MEFT without routing: the dense adapter that it equals",
    "lora": "ASLoRA: an equal adapter that stock PEFT and LoRA servers load",
    "merged": "ASLoRA: the base model with the adapters in its weights",
}
_WRITTEN = {"model": "Model", "dense": "Dense adapter", "lora": "LoRA adapter", "merged": "Merged model"}


def run(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        UsageError: one sentence: bad arguments, folders or files, or a full disk. Nothing is half-written.
    """
    options = _parser().parse_intermixed_args(argv)
    *adapters, out = options.folders
    if not adapters:
        raise UsageError("export needs an adapter's folder and OUT_DIR (see aslora-meft export --help)")
    if len(adapters) > 1 and options.to in ("model", "dense"):
        raise UsageError(f"--to {options.to} takes one adapter, and {len(adapters)} are given")
    if options.dtype is not None and options.to in ("lora", "dense"):
        raise UsageError(f"--dtype is for --to model and --to merged, --to {options.to} keeps the adapter's")
    for folder in adapters:
        check_saved_adapter("ADAPTER_DIR", folder)
    check_output("OUT_DIR", out)
    folders = [local_path("ADAPTER_DIR", folder) for folder in adapters]
    write, target = _writer(options.to, options.dtype), local_path("OUT_DIR", out)
    with (
        as_usage_error(ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError),
        as_usage_error(OSError, SafetensorError, prefix=f"OUT_DIR={out!r} cannot be written: "),
    ):
        write(folders, target)
    print(f"{_WRITTEN[options.to]}: {target.resolve()}")


def _parser() -> RaisingParser:
    lines = "\n".join(f"  {form:<8}{what}" for form, what in _FORMS.items())
    parser = RaisingParser(
        prog="aslora-meft export",
        usage="aslora-meft export ADAPTER_DIR [ADAPTER_DIR ...] --to {model,dense,lora,merged} OUT_DIR [--dtype DTYPE]",
        description=f"Write saved adapters in another format; their outputs stay the same.\n\nformats:\n{lines}",
        epilog="example:\n  aslora-meft export out --to model out-model\n"
        "  aslora-meft export first second --to merged out-merged --dtype bfloat16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help="ADAPTER_DIR, several for lora and merged, and at last OUT_DIR, new"
    )
    parser.add_argument("--to", required=True, choices=list(_FORMS), help="the format")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the model's tensors (default: the base model's)",
    )
    return parser


def _writer(form: str, dtype: str | None) -> Callable[[list[Path], Path], None]:
    if form == "model":
        from aslora_meft.export.meft_model import export_model

        return lambda adapters, out: export_model(adapters[0], out, dtype=dtype)
    if form == "dense":
        from meft import export_dense

        return lambda adapters, out: export_dense(adapters[0], out)
    if form == "lora":
        from aslora_meft.export.aslora_lora import export_lora

        return export_lora
    from aslora_meft.export.aslora_merged import export_merged

    return lambda adapters, out: export_merged(adapters, out, dtype=dtype)
