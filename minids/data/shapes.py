"""Row shapes: one record (a JSON object, a csv or parquet row) becomes one `Row`, whatever its columns are called.

Shapes, tried in this order; the first whose columns are all there decides, other columns are kept in `Row.columns`:

  chosen, rejected [, prompt]          preference pair, strings or message lists (TRL; MiniMind dpo.jsonl)
  messages | conversations [, tools]   role/content (ChatML, MiniMind) or from/value (ShareGPT)
  prompt, completion                   strings or message lists (TRL); with a `label` (KTO) it is a prompt
  instruction, output [, input, history, system]   Alpaca
  q, a [, history]                     old MiniMind csv
  text                                 pretraining
  prompt                               RL prompt, string or message list

A conversation without an answer (its last assistant turn is empty, or it has none) is a prompt, as in MiniMind's
rlaif.jsonl.
`text` is taken as it is: ChatML markers inside it (`<|im_start|>`) stay plain text.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, Any]

ACCEPTED = (
    "text | messages or conversations | prompt, completion | instruction, output | q, a, history | "
    "chosen, rejected, prompt | prompt"
)
WRONG_COLUMNS = "wrong columns"
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class BadRow(ValueError):
    """A row that cannot be used: `reason` is the short name it is counted under, the text says what came."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One training example.

    kind "text": `text`. "chat": `messages`, with at least one answer. "prompt": `messages` up to the answer wanted.
    "preference": `chosen` and `rejected`, whole conversations that both begin with `messages`, the shared prompt.
    A message is {"role": system|user|assistant|tool, "content": str} plus what else it came with (reasoning_content,
    tool_calls as a list, name, ...). `source`:`number` is where it came from: a line (jsonl, csv, tsv, txt) or an
    element (json array, parquet), from 1. `columns` holds the columns that the shape does not use.
    """

    kind: Literal["text", "chat", "preference", "prompt"]
    text: str | None = None
    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    chosen: list[Message] = field(default_factory=list)
    rejected: list[Message] = field(default_factory=list)
    source: str = ""
    number: int = 0
    columns: dict[str, Any] = field(default_factory=dict)


def as_row(record: dict[str, Any], source: str = "", number: int = 0) -> Row:
    """`record` (column -> value; a None counts as absent) as a Row. Raises BadRow."""
    present = {name: value for name, value in record.items() if value is not None}
    shape = find_shape(present)
    if shape is None:
        if find_shape(record):
            raise BadRow("empty", f"null in one of the columns {', '.join(record)}")
        raise BadRow(WRONG_COLUMNS, wrong_columns(list(record)))
    required, optional, build = shape
    columns = {name: value for name, value in present.items() if name not in required and name not in optional}
    fields = build(present)
    columns |= fields.pop("columns", {})
    return Row(**fields, source=source, number=number, columns=columns)


def wrong_columns(found: Sequence[str]) -> str:
    shown = ", ".join(name if len(name) <= 40 else name[:40] + "…" for name in found[:12])
    return f"columns found: {shown or '(none)'}{', …' if len(found) > 12 else ''}; wanted one of: {ACCEPTED}"


def shared_prefix(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How many leading messages (or characters) are the prompt of a pair that does not name it, as TRL's
    extract_prompt counts: up to the first difference; each side keeps at least its last item."""
    shorter = min(len(chosen), len(rejected))
    index = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter - 1)
    if index > 0 and chosen[index - 1] == " ":  # in text, the space belongs to the answers
        index -= 1
    return index


def _parsed(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = ast.literal_eval(text.strip())
    json.dumps(value, ensure_ascii=False).encode()  # raises for what no JSON file could hold: bytes, lone surrogates
    return value


def _literal(value: str, column: str) -> Any:
    """A list written as JSON or as Python literals (old csv files); never evaluated."""
    try:
        return _parsed(value)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise BadRow("bad value", f"{column}: wanted a list in JSON or Python form, got {value[:60]!r}") from None


def _string(record: dict[str, Any], column: str, default: str | None = None) -> str:
    value = record.get(column, default)
    if not isinstance(value, str):
        raise BadRow("bad value", f"{column}: wanted a string, got {type(value).__name__} {str(value)[:60]!r}")
    return value


def _content(value: Any, where: str) -> str:
    """Message content: a string, nothing, or OpenAI's list of text parts."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise BadRow("bad value", f"{where}: wanted a string, got {type(value).__name__} {str(value)[:60]!r}")
    return value


def _object_list(value: Any, where: str) -> list[dict[str, Any]]:
    """tools and tool_calls: a list of objects, or the JSON text of one."""
    if isinstance(value, str):
        value = _literal(value, where) if value.strip() else []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadRow("bad value", f"{where}: wanted a list of objects, got {str(value)[:60]!r}")
    return value


def _messages(value: Any, column: str, role: str = "user") -> list[Message]:
    """Messages with our role names; a plain string is one message of `role`."""
    if isinstance(value, str) and not (column in ("messages", "conversations") or value.lstrip().startswith("[{")):
        return [{"role": role, "content": value}]
    messages = []
    for i, given in enumerate(_object_list(value, column)):
        where = f"{column}[{i}]"
        message = {key: item for key, item in given.items() if item is not None and key not in ("from", "value")}
        name = given.get("role", given.get("from"))
        if not isinstance(name, str) or name.lower() not in ROLES:
            raise BadRow("bad role", f"{where}: role {name!r}; wanted one of {', '.join(ROLES)}")
        message["role"] = ROLES[name.lower()]
        message["content"] = _content(given.get("content", given.get("value")), where)
        if "tool_calls" in message:
            message["tool_calls"] = _object_list(message["tool_calls"], f"{where}.tool_calls")
            if not message["tool_calls"]:
                del message["tool_calls"]
        if message.get("reasoning_content") == "":
            del message["reasoning_content"]
        messages.append(message)
    if not messages:
        raise BadRow("empty", f"{column}: no messages")
    return messages


def _take_tools(record: dict[str, Any], *conversations: list[Message]) -> list[dict[str, Any]] | None:
    """Tools of the row: its own column, or (MiniMind) a key of the system turn, which is removed there."""
    tools = _object_list(record["tools"], "tools") if "tools" in record else []
    for messages in conversations:
        for message in messages:
            if "tools" in message:
                tools = _object_list(message.pop("tools"), "tools") or tools
    return tools or None


def _says_nothing(message: Message) -> bool:
    return not (message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))


def _chat_or_prompt(messages: list[Message], tools: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    if any(message["role"] == "assistant" and _says_nothing(message) for message in messages[:-1]):
        raise BadRow("empty", "an answer of the assistant before the last turn says nothing")
    if messages[-1]["role"] == "assistant" and _says_nothing(messages[-1]):
        messages, kind = messages[:-1], "prompt"
    else:
        kind = "chat" if any(message["role"] == "assistant" for message in messages) else "prompt"
    if all(map(_says_nothing, messages)):
        raise BadRow("empty", "the conversation has no text")
    return {"kind": kind, "messages": messages, "tools": tools}


def _preference(record: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected = record["chosen"], record["rejected"]
    if "prompt" not in record and isinstance(chosen, str) and isinstance(rejected, str):
        cut = shared_prefix(chosen, rejected)
        record = record | {"prompt": chosen[:cut]}
        chosen, rejected = chosen[cut:], rejected[cut:]
    chosen, rejected = _messages(chosen, "chosen", "assistant"), _messages(rejected, "rejected", "assistant")
    if "prompt" in record:
        prompt = _messages(record["prompt"], "prompt")
        # some sets repeat the prompt inside both answers
        chosen, rejected = (side if side[: len(prompt)] == prompt else prompt + side for side in (chosen, rejected))
    else:
        prompt = chosen[: shared_prefix(chosen, rejected)]
    tools = _take_tools(record, chosen, rejected)
    if not prompt or all(map(_says_nothing, prompt)):
        raise BadRow("no prompt", "chosen and rejected share no prompt, and there is no prompt column")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side[-1]["role"] != "assistant" or _says_nothing(side[-1]):
            raise BadRow("empty", f"{name}: wanted an answer of the assistant at the end")
    if chosen == rejected:
        raise BadRow("chosen equals rejected", "chosen and rejected are the same")
    return {"kind": "preference", "messages": prompt, "chosen": chosen, "rejected": rejected, "tools": tools}


def _conversation(record: dict[str, Any]) -> dict[str, Any]:
    column = "messages" if "messages" in record else "conversations"
    messages = _messages(record[column], column)
    return _chat_or_prompt(messages, _take_tools(record, messages))


def _prompt_completion(record: dict[str, Any]) -> dict[str, Any]:
    prompt = _messages(record["prompt"], "prompt")
    if "label" in record:  # a judged answer (KTO) is not one to imitate: kept beside the prompt
        row = _chat_or_prompt(prompt, _take_tools(record, prompt))
        return row | {"kind": "prompt", "columns": {"completion": record["completion"], "label": record["label"]}}
    messages = prompt + _messages(record["completion"], "completion", "assistant")
    return _chat_or_prompt(messages, _take_tools(record, messages))


def _turns(history: Any) -> list[Message]:
    """[[question, answer], ...] as messages; `history` may be its text."""
    pairs = (_literal(history, "history") if history.strip() else []) if isinstance(history, str) else history
    messages: list[Message] = []
    for pair in pairs if isinstance(pairs, list | tuple) else [pairs]:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise BadRow("bad value", f"history: wanted a list of [question, answer] pairs, got {str(history)[:60]!r}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _exchange(history: Any, question: str, answer: str, system: str = "") -> dict[str, Any]:
    start = [{"role": "system", "content": system}] if system.strip() else []
    last = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _chat_or_prompt([*start, *_turns(history), *last])


def _alpaca(record: dict[str, Any]) -> dict[str, Any]:
    parts = [_string(record, "instruction"), _string(record, "input", "")]
    question = "\n".join(part for part in parts if part.strip())
    return _exchange(record.get("history", []), question, _string(record, "output"), _string(record, "system", ""))


def _old_minimind(record: dict[str, Any]) -> dict[str, Any]:
    return _exchange(record.get("history", []), _string(record, "q"), _string(record, "a"))


def _text(record: dict[str, Any]) -> dict[str, Any]:
    text = _string(record, "text")
    if not text.strip():
        raise BadRow("empty", "text: is empty")
    return {"kind": "text", "text": text}


def _prompt(record: dict[str, Any]) -> dict[str, Any]:
    messages = _messages(record["prompt"], "prompt")
    return _chat_or_prompt(messages, _take_tools(record, messages)) | {"kind": "prompt"}


Shape = tuple[frozenset[str], frozenset[str], Callable[[dict[str, Any]], dict[str, Any]]]


def _shape(required: str, optional: str, build: Callable[[dict[str, Any]], dict[str, Any]]) -> Shape:
    return frozenset(required.split()), frozenset(optional.split()), build


SHAPES: tuple[Shape, ...] = (
    _shape("chosen rejected", "prompt tools", _preference),
    _shape("messages", "tools", _conversation),
    _shape("conversations", "tools", _conversation),
    _shape("prompt completion", "tools", _prompt_completion),
    _shape("instruction output", "input history system", _alpaca),
    _shape("q a", "history", _old_minimind),
    _shape("text", "", _text),
    _shape("prompt", "tools", _prompt),
)


def find_shape(columns: Collection[str]) -> Shape | None:
    """The first shape whose required columns are all among `columns`."""
    return next((shape for shape in SHAPES if all(name in columns for name in shape[0])), None)
