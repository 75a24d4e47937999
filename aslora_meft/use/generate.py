"""``aslora-meft generate``: answers to prompts, or a chat, by saved adapters."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import TextStreamer, set_seed

from aslora_meft.arguments.checks import check_range
from aslora_meft.arguments.parser import CommandParser
from aslora_meft.arguments.text import is_encodable
from aslora_meft.errors import UsageError, as_usage_error
from aslora_meft.use.loaded import BASE, Loaded, UseArguments, activate, load_adapters


@dataclass
class GenerateArguments:
    """What is asked, and how answers are drawn."""

    _argument_group_name = "generation"
    prompt: list[str] | None = field(
        default=None, metadata={"help": "Prompts to answer. None: one a line from the standard input."}
    )
    chat: bool = field(
        default=False, metadata={"help": "A conversation in the model's chat template; each adapter has its own."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Length of an answer, at most."})
    temperature: float = field(default=0.0, metadata={"help": "0: the likeliest token each time; else sampled."})
    seed: int = field(default=0, metadata={"help": "Of the sampling."})


def run(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UsageError: bad input, in one sentence.
    """
    parser = CommandParser(
        (GenerateArguments, UseArguments),
        prog="aslora-meft generate",
        usage="aslora-meft generate ADAPTER_DIR [ADAPTER_DIR ...] [--name value ...]",
        description="Answer prompts with saved adapters, token by token as they come.\n"
        "Prompts have the form that `train` gave them, where its results.json is in the first folder.",
        example="aslora-meft generate out --prompt 'Why is the sky blue?' --compare",
        common=("prompt", "chat", "compare", "max_new_tokens", "temperature", "model", "load_in_4bit"),
    )
    parser.add_argument("adapter_dir", metavar="ADAPTER_DIR", nargs="+", help="Folders of saved adapters.")
    values = parser.read(argv)
    options = GenerateArguments(**{name: values.pop(name) for name in GenerateArguments.__dataclass_fields__})
    folders = values.pop("adapter_dir")
    _check(options)
    loaded = load_adapters(folders, UseArguments(**values))
    if options.chat and loaded.tokenizer.chat_template is None:
        raise UsageError("chat=True needs a chat template, which the model's tokenizer has not; give --prompt instead")
    names = [BASE] * bool(values["compare"]) + loaded.names
    turns: dict[str, list[dict[str, str]]] = {name: [] for name in names}
    for prompt in _prompts(options):
        for name in names:
            if len(names) > 1:
                print(f"--- {name}", flush=True)
            turn = {"role": "user", "content": prompt}
            ids = _encoded(loaded, [*turns[name], turn] if options.chat else prompt)
            answer = _answer(loaded, name, ids, options)
            turns[name] += [turn, {"role": "assistant", "content": answer}]


def _check(options: GenerateArguments) -> None:
    check_range("max_new_tokens", options.max_new_tokens, 1, 2**31)
    check_range("seed", options.seed, 0, 2**32 - 1)
    if options.temperature:  # logits are divided by it
        check_range("temperature", options.temperature, 1e-3, 1e6)
    for prompt in options.prompt or []:
        if not prompt.strip():
            raise UsageError(f"prompt={prompt!r} is empty; write what shall be answered")
        if not is_encodable(prompt):
            raise UsageError(f"prompt={prompt!r} is no valid text; write it in UTF-8")


def _prompts(options: GenerateArguments) -> Iterator[str]:
    if options.prompt is not None:
        yield from options.prompt
        return
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        with as_usage_error(UnicodeDecodeError, prefix="the standard input is no valid text, give it in UTF-8: "):
            line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _encoded(loaded: Loaded, asked: str | list[dict[str, str]]) -> torch.Tensor:
    """Token ids [1, length] of a prompt, or of a conversation that ends with one."""
    tokenizer: Any = loaded.tokenizer
    form = loaded.results.get("prompt_form") or loaded.results.get("data_form", {})  # 0.1 wrote the second alone
    if isinstance(asked, str) and form.get("apply_chat_template") and tokenizer.chat_template is not None:
        asked = [{"role": "user", "content": asked}]
    if isinstance(asked, str):
        ids = tokenizer(asked + form.get("separator", ""), add_special_tokens=False)["input_ids"]
        # As in training: BOS only where the tokenizer begins its texts with it by itself.
        if tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
            ids = [tokenizer.bos_token_id, *ids]
    else:
        try:
            text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise UsageError(f"the model's chat template refuses the conversation: {error}") from error
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids])


def _answer(loaded: Loaded, name: str, ids: torch.Tensor, options: GenerateArguments) -> str:
    """Print an answer while it is made, and return it."""
    model: Any = loaded.model
    tokenizer: Any = loaded.tokenizer
    ids = ids.to(model.device)
    sampled = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and ids.shape[1] >= longest:
        raise UsageError(f"the prompt has {ids.shape[1]} tokens, and the model takes {longest}; shorten it")
    room = options.max_new_tokens if longest is None else min(options.max_new_tokens, longest - ids.shape[1])
    set_seed(options.seed)  # each adapter draws by the same numbers
    activate(model, name)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=room,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampled,
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
