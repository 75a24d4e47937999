"""Which columns of a data set are learnt, and what each kind of row becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aslora_meft.arguments.groups import DataArguments
from aslora_meft.arguments.text import is_encodable
from aslora_meft.data.files import Row
from aslora_meft.errors import UsageError

Turn = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """What the rows of one source are.

    Attributes:
        kind: 'messages', 'prompt' (prompt and completion) or 'text'.
        name: what the summary calls it.
        used: the columns that are learnt from.
        ignored: the columns that are not.
    """

    kind: str
    name: str
    used: tuple[str, ...]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        ignored = f"; ignores {', '.join(self.ignored)}" if self.ignored else ""
        return f"{self.name}: uses {', '.join(self.used)}{ignored}"


def recognise(rows: list[Row], args: DataArguments, where: str) -> Format:
    """Tell the format of a source from the columns of its first row.

    Raises:
        UsageError: no known format, named with the columns that there are.
    """
    columns = list(dict.fromkeys(str(name) for row in rows for name in row))
    first = rows[0]
    asked = [args.prompt_column, args.completion_column]
    named = [name for name in asked if name not in ("prompt", "completion")]

    def found(kind: str, name: str, *used: str) -> Format:
        return Format(kind, name, used, tuple(column for column in columns if column not in used))

    for column in (*named, *([args.text_column] if args.text_column != "text" else [])):
        if column not in columns:
            raise UsageError(f"{where} has no column {column!r}; its columns are {listed(columns)}")
    if all(column in first for column in asked):
        conversational = any(isinstance(first[column], list) for column in asked)
        if conversational or args.apply_chat_template:
            return found("messages", "prompt and completion as a conversation", *asked)
        return found("prompt", "prompt and completion", *asked)
    if args.text_column != "text":
        return found("text", "text", args.text_column)
    if "messages" in first:
        return found("messages", "conversation", "messages")
    if "conversations" in first:
        return found("messages", "ShareGPT conversation", "conversations")
    if "instruction" in first and "output" in first:
        used = ("instruction", "input", "output") if "input" in columns else ("instruction", "output")
        return found("messages" if args.apply_chat_template else "prompt", "alpaca", *used)
    if args.text_column in first:
        return found("text", "text", args.text_column)
    if "chosen" in columns and "rejected" in columns:
        raise UsageError(
            f"{where} holds preference pairs (chosen, rejected); use --task dpo or reward, or train on rows with "
            "a single answer"
        )
    raise UsageError(
        f"{where} has the columns {listed(columns)} but neither messages, conversations, {asked[0]} and {asked[1]}, "
        f"instruction and output, nor {args.text_column}; name yours with --prompt_column and --completion_column, or "
        "with --text_column"
    )


def listed(columns: list[str]) -> str:
    """Names of columns for a message, a dozen at most."""
    shown = ", ".join(map(repr, columns[:12]))
    return f"{shown} and {len(columns) - 12} more" if len(columns) > 12 else shown


def prompt_and_completion(row: Row, fmt: Format, args: DataArguments, where: str) -> tuple[str, str]:
    """The two texts of a row of kind 'prompt', the separator included."""
    if "instruction" in fmt.used:
        return _instruction(row, where) + args.separator, text_of(row, "output", where)
    prompt, completion = fmt.used
    return text_of(row, prompt, where) + args.separator, text_of(row, completion, where)


def _instruction(row: Row, where: str) -> str:
    """Alpaca's instruction, with its input below it where there is one."""
    instruction = text_of(row, "instruction", where)
    given = row.get("input")
    if given is None or (isinstance(given, str) and not given.strip()):
        return instruction
    return f"{instruction}\n\n{text_of(row, 'input', where)}"


def conversation(row: Row, fmt: Format, where: str) -> tuple[list[Turn], int]:
    """The turns of a row of kind 'messages', and the number of those at its start that are only context.

    Raises:
        UsageError: no list of turns, or trl, whose converter of ShareGPT is used, is not installed.
    """
    if len(fmt.used) == 1:
        column = fmt.used[0]
        return turns_of(row.get(column), f"{where}: {column}"), 0
    if "instruction" in fmt.used:
        prompt: Any = _instruction(row, where)
        completion: Any = text_of(row, "output", where)
    else:
        prompt, completion = (row.get(column) for column in fmt.used)
        prompt, completion = (
            value if isinstance(value, list) else text_of(row, column, where)
            for column, value in zip(fmt.used, (prompt, completion), strict=True)
        )
    before = turns_of(prompt, f"{where}: {fmt.used[0]}") if isinstance(prompt, list) else [_turn("user", prompt)]
    after = (
        turns_of(completion, f"{where}: {fmt.used[-1]}")
        if isinstance(completion, list)
        else [_turn("assistant", completion)]
    )
    return before + after, len(before)


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


# ShareGPT's names of those who speak.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


def turns_of(value: Any, where: str) -> list[Turn]:
    """The turns of a conversation, with role and content, also from ShareGPT's form.

    Raises:
        UsageError: no list of turns, or trl, whose converter of ShareGPT is used, is not installed.
    """
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise UsageError(f"{where} is not a list of turns with role and content; correct it")
    turns = [dict(turn) for turn in value]
    if any("from" in turn for turn in turns):
        try:
            from trl import maybe_convert_to_chatml
        except ImportError as error:
            raise UsageError(
                f"{where} is in ShareGPT's form, which trl converts; pip install 'aslora-meft[trl]', or name the turns "
                "role and content"
            ) from error
        turns = maybe_convert_to_chatml({"messages": turns})["messages"]
        for turn in turns:
            turn["role"] = _ROLES.get(str(turn.get("role")), turn.get("role"))
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn.get("role"), str):
            raise UsageError(f"{where}, turn {number} has no role; name one such as user or assistant")
        text_of(turn, "content", f"{where}, turn {number}")
    # Parquet and the hub give every turn all keys that any of them has.
    return [{name: part for name, part in turn.items() if part is not None} for turn in turns]


def text_of(row: Row, column: str, where: str) -> str:
    """A text that is not empty.

    Raises:
        UsageError: it is absent, empty, no string, or cannot be encoded.
    """
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UsageError(f"{where}: column {column!r} is empty; fill it or delete the row")
    if not isinstance(value, str):
        raise UsageError(f"{where}: column {column!r} holds {type(value).__name__}, not text; make it a string")
    if not is_encodable(value):
        raise UsageError(f"{where}: column {column!r} holds half of a surrogate pair, which is no text; correct it")
    return value
