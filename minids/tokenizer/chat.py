"""The chat template, and rendering of chats the way transformers does it (utils/chat_template_utils.py there)."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from minids.errors import InputError

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

# System text and tools first, then the turns. `{% generation %}` encloses what the assistant writes, its closing eos
# included. An answer to tool outputs follows them without another <｜Assistant｜>, as in DeepSeek's own template.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string %}{{ content }}
{%- elif content %}{% for part in content if part.type == 'text' %}{{ part.text }}{% endfor %}
{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(system='', outputs=false) -%}
{%- for message in messages if message.role == 'system' -%}
{%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + text(message.content) -%}
{%- endfor -%}
{{- bos_token + ns.system -}}
{%- if tools -%}
{{- ('\\n\\n' if ns.system else '') + '## Tools\\nYou have access to the following tools:\\n' -}}
{%- for tool in tools %}{{ '\\n' + (tool.function or tool) | tojson }}{% endfor -%}
{{- '\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{- '' if ns.outputs else '<｜tool▁outputs▁begin｜>' -}}
{{- '<｜tool▁output▁begin｜>' + text(message.content) + '<｜tool▁output▁end｜>' -}}
{%- set ns.outputs = true -%}
{%- else -%}
{{- '<｜tool▁outputs▁end｜>' if ns.outputs -}}
{%- if message.role == 'user' -%}
{{- '<｜User｜>' + text(message.content) -}}
{%- elif message.role == 'assistant' -%}
{{- '' if ns.outputs else '<｜Assistant｜>' -}}
{%- generation -%}
{{- '<think>' + message.reasoning_content + '</think>' if message.reasoning_content -}}
{{- text(message.content) -}}
{%- if message.tool_calls -%}
{{- '<｜tool▁calls▁begin｜>' -}}
{%- for call in message.tool_calls -%}
{%- set function = call.function or call -%}
{{- ('' if loop.first else '\\n') + '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + function.name + '\\n```json\\n' -}}
{{- function.arguments if function.arguments is string else function.arguments | tojson -}}
{{- '\\n```<｜tool▁call▁end｜>' -}}
{%- endfor -%}
{{- '<｜tool▁calls▁end｜>' -}}
{%- endif -%}
{{- eos_token -}}
{%- endgeneration -%}
{%- elif message.role != 'system' -%}
{{- raise_exception('unknown role ' + message.role | tojson + '; known: system, user, assistant, tool') -}}
{%- endif -%}
{%- set ns.outputs = false -%}
{%- endif -%}
{%- endfor -%}
{{- '<｜tool▁outputs▁end｜>' if ns.outputs -}}
{{- '<｜Assistant｜>' if add_generation_prompt and not ns.outputs -}}
"""


def normalise(messages: Messages) -> list[dict[str, Any]]:
    """As transformers prepares messages: keys without a value are dropped, other names of the reasoning understood."""
    if not messages:
        raise InputError("chat: no messages; wanted at least one")
    normalised = []
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise InputError(f"chat: got the message {message!r}, wanted an object with role and content")
        message = {key: value for key, value in message.items() if value is not None}
        names = (name for name in ("reasoning_content", "thinking", "reasoning") if name in message)
        reasoning = next(names, None)
        if reasoning is not None:
            message = {"thinking": message[reasoning], **message, "reasoning_content": message[reasoning]}
        normalised.append(message)
    return normalised


def map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """`value` (nested lists and dicts) with `function` applied to every string, dict keys included."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {map_strings(key, function): map_strings(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_strings(item, function) for item in value]
    return value


def unused_characters(text: str, count: int) -> list[str]:
    """The first `count` characters for private use (Unicode planes 15 and 16) that `text` does not hold."""
    unused = (chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in text)
    return [next(unused) for _ in range(count)]


# how transformers looks for the block, too
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %}`: its content, between the two `generation_marks` of the context."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it an instance variable

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        start, end = context["generation_marks"]
        return f"{start}{caller()}{end}"


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@functools.lru_cache
def compile_template(template: str) -> jinja2.Template:
    """The template in the environment that transformers gives chat templates (utils/chat_template_utils.py)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(template)
