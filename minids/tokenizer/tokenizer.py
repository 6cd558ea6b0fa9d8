"""Byte-level BPE tokenizer in DeepSeek-V3's manner, with its chat template.

Pre-splitting (arXiv 2412.19437, section 4.1, and llama.cpp's copy of DeepSeek's tokenizer.json): digits in groups of up
to 3, runs of CJK, words, punctuation joined with the line breaks after it. Byte-level: every byte string round-trips.
Saved as `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` reads.

Special tokens are never made from ordinary text: `encode` and the contents of chat messages go through a tokenizer
that knows no special tokens at all, and only what the chat template itself writes becomes special. The one exception
are `<think>` and `</think>` in the content of an assistant's message, since data often has the reasoning inline.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from minids.errors import InputError
from minids.files import atomic_write, read_json, write_json
from minids.tokenizer.chat import (
    GENERATION,
    Messages,
    Tools,
    compile_template,
    map_strings,
    normalise,
    unused_characters,
)

BOS, EOS, PAD, UNK = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜unk｜>"
FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK = ("<think>", "</think>")
TOOLS = (
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)  # fmt: skip
# Roles every tokenizer has a token for, and the tokens, in the order of their ids from 0.
ROLES = {
    "bos": BOS, "eos": EOS, "pad": PAD, "unk": UNK, "fim_begin": FIM_BEGIN, "fim_hole": FIM_HOLE, "fim_end": FIM_END,
    "user": USER, "assistant": ASSISTANT,
}  # fmt: skip
SPECIAL_TOKENS = (*ROLES.values(), *THINK, *TOOLS)

CJK = "[一-龥぀-ゟ゠-ヿ]"
PRE_SPLITS = (
    r"\p{N}{1,3}",
    CJK + "+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


class Random(Protocol):
    """What `split_joined` needs of a generator: `random.Random` and `numpy.random.Generator` both have it."""

    def random(self) -> float: ...


def _byte_letters() -> dict[str, int]:
    """Letter -> byte in GPT-2's spelling of bytes by printable characters, that of all byte-level vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_LETTERS = _byte_letters()


def _token_bytes(token: str) -> bytes:
    try:
        return bytes(BYTE_LETTERS[letter] for letter in token)
    except KeyError:  # not spelled in letters for bytes: stands for itself, as in the library's decoder
        return token.encode()


_SURROGATES = re.compile("([\ud800-\udfff]+)")


class Tokenizer:
    """Text to token ids and back; chats to ids with a mask of what the assistant wrote.

    `definition` is the text of a tokenizer.json, `config` the content of tokenizer_config.json; `source` names the
    tokenizer in error messages. `fingerprint` is the SHA-256 of tokenizer.json, in hex.
    """

    def __init__(self, definition: str, config: dict[str, Any], source: str = "tokenizer"):
        try:
            content = json.loads(definition)
            added = content["added_tokens"]
            self._special = tokenizers.Tokenizer.from_str(definition)
            # no special tokens at all: flagged as special or not, text never becomes one
            self._plain = tokenizers.Tokenizer.from_str(
                json.dumps(content | {"added_tokens": [], "post_processor": None})
            )
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{source}: not a tokenizer.json of the tokenizers library ({error})") from None
        for tokenizer in (self._special, self._plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._definition, self.config, self._source = definition, config, source
        vocab = self._plain.get_vocab(with_added_tokens=False)
        missing = [byte for letter, byte in BYTE_LETTERS.items() if letter not in vocab]
        if missing:
            raise InputError(f"{source}: lacks tokens for {len(missing)} of the 256 bytes; wanted a byte-level BPE")
        self._byte_ids = {byte: vocab[letter] for letter, byte in BYTE_LETTERS.items()}
        self._special_ids = {token["content"]: int(token["id"]) for token in added}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._bytes = {id: _token_bytes(token) for token, id in vocab.items() if token not in self._special_ids}
        self.fingerprint = hashlib.sha256(definition.encode()).hexdigest()
        self.vocab_size = max(max(vocab.values()), *self._special_ids.values(), 0) + 1

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads a folder with tokenizer.json (byte-level BPE) and, when present, tokenizer_config.json.

        Raises InputError naming the file that is missing or damaged.
        """
        folder = Path(folder)
        definition = folder / "tokenizer.json"
        if not definition.is_file():
            raise InputError(f"{folder}: no tokenizer here; wanted a folder with tokenizer.json")
        config_file, template_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = read_json(config_file) if config_file.is_file() else {}
        if template_file.is_file():
            config["chat_template"] = template_file.read_text(encoding="utf-8")
        try:
            return cls(definition.read_bytes().decode(), config, str(definition))
        except UnicodeDecodeError as error:
            raise InputError(f"{definition}: not UTF-8 ({error})") from None

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json into `folder`, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "tokenizer.json", self._definition)
        write_json(folder / "tokenizer_config.json", self.config)

    def __len__(self) -> int:
        return self.vocab_size

    # ids by role

    @property
    def bos_id(self) -> int:
        return self._role_id("bos", "eos")

    @property
    def eos_id(self) -> int:
        return self._role_id("eos")

    @property
    def pad_id(self) -> int:
        return self._role_id("pad", "eos")

    @property
    def unk_id(self) -> int:
        return self._role_id("unk")

    @property
    def fim_begin_id(self) -> int:
        return self._role_id("fim_begin")

    @property
    def fim_hole_id(self) -> int:
        return self._role_id("fim_hole")

    @property
    def fim_end_id(self) -> int:
        return self._role_id("fim_end")

    @property
    def user_id(self) -> int:
        return self._role_id("user")

    @property
    def assistant_id(self) -> int:
        return self._role_id("assistant")

    def role_token(self, role: str) -> str | None:
        """The token for `role` (bos, eos, pad, ...): what tokenizer_config.json says, else DeepSeek's, else None."""
        named = self.config.get(f"{role}_token")
        named = named["content"] if isinstance(named, dict) else named
        return named or (ROLES[role] if ROLES[role] in self._special_ids else None)

    def _role_id(self, *roles: str) -> int:
        """Id of the first of `roles` that has a token: foreign tokenizers often lack a bos or a pad."""
        for role in roles:
            token = self.role_token(role)
            if token in self._special_ids:
                return self._special_ids[token]
        raise InputError(f"{self._source}: has no {roles[0]} token; wanted {ROLES[roles[0]]} among its added tokens")

    # text

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False, allow_special: bool = False) -> list[int]:
        """Token ids of `text`. Spellings of special tokens in it stay text unless `allow_special`.

        `decode` gives `text` back (the bytes of lone surrogates: `decode_bytes(ids).decode("utf-8", "surrogatepass")`).
        """
        ids = self._encode(self._special if allow_special else self._plain, text, "surrogatepass")
        return [self.bos_id] * add_bos + ids + [self.eos_id] * add_eos

    def encode_bytes(self, data: bytes) -> list[int]:
        """Token ids of any bytes (those that are no UTF-8: a token each). `decode_bytes` gives `data` back."""
        return self._encode(self._plain, data.decode("utf-8", "surrogateescape"), "surrogateescape")

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of every text, on all cores, without bos or eos."""
        try:
            return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError:  # a text with a lone surrogate, which the library takes for no str
            return [self.encode(text) for text in texts]

    def _encode(self, tokenizer: tokenizers.Tokenizer, text: str, errors: str) -> list[int]:
        """Ids of `text`; surrogates in it are bytes under the codec error handler `errors` and become byte tokens."""
        try:
            return tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:  # a lone surrogate
            ids: list[int] = []
            for i, piece in enumerate(_SURROGATES.split(text)):
                if i % 2:
                    ids += (self._byte_ids[byte] for byte in piece.encode("utf-8", errors))
                else:
                    ids += tokenizer.encode(piece, add_special_tokens=False).ids
            return ids

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = True) -> bytes:
        """The bytes that `ids` stand for. Ids outside the vocabulary (a padded embedding's) stand for nothing."""
        table = self._bytes if skip_special else self._all_bytes
        return b"".join(table.get(id, b"") for id in ids)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`, U+FFFD where their bytes are not UTF-8 (as those of lone surrogates)."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    @functools.cached_property
    def _all_bytes(self) -> dict[int, bytes]:
        return self._bytes | {id: token.encode() for token, id in self._special_ids.items()}

    @functools.cached_property
    def _joined(self) -> dict[int, list[int]]:
        """Tokens of punctuation joined with line breaks -> the ids of the two parts."""
        joined = {}
        for id, data in self._bytes.items():
            text = data.decode("utf-8", "replace")
            mark = text.rstrip("\r\n")
            if mark.strip() and mark != text and "\ufffd" not in text:
                joined[id] = self.encode(mark) + self.encode(text[len(mark) :])
        return joined

    def split_joined(self, ids: Iterable[int], rate: float, rng: Random) -> list[int]:
        """`ids` with a random share `rate` of the tokens that join punctuation and line breaks split at the join.

        For training data only: it takes away the bias such tokens give to prompts without a final line break
        (DeepSeek-V3 report, section 4.1). The ids decode to the same text; one draw of `rng` per joined token.
        """
        out: list[int] = []
        for id in ids:
            parts = self._joined.get(id)
            if parts is not None and rng.random() < rate:
                out += parts
            else:
                out.append(id)
        return out

    # chats

    def render_chat(self, messages: Messages, tools: Tools | None = None, add_generation_prompt: bool = False) -> str:
        """The chat as text, the same as `apply_chat_template(..., tokenize=False)` of transformers.

        `messages`: {"role", "content"} with role system, user, assistant or tool; an assistant's may have
        "reasoning_content" and "tool_calls". Raises InputError for no messages or what the template refuses.
        """
        return self._render(normalise(messages), tools, add_generation_prompt)

    def encode_chat(
        self, messages: Messages, tools: Tools | None = None, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Token ids of the rendered chat, and for each whether the assistant wrote it (its closing eos included).

        Special tokens spelled out in the messages are protected by a private character before rendering, so that the
        special tokens found afterwards are the template's own; the text between them is encoded as ordinary text.
        """
        messages = normalise(messages)
        strings = json.dumps([messages, tools, self._template], ensure_ascii=False, default=str)
        guard, start, end = unused_characters(strings, 3)
        guarded = [self._guard_message(message, guard) for message in messages]
        rendered = self._render(guarded, self._guard(tools, guard), add_generation_prompt, (start, end))
        if guard in rendered:
            plain = rendered.translate(dict.fromkeys(map(ord, (guard, start, end))))
            if plain != self._render(messages, tools, add_generation_prompt):
                raise InputError(
                    f"{self._source}: a message spells a special token and the chat template looks inside messages; "
                    f"remove the spelling"
                )
        ids: list[int] = []
        mask: list[bool] = []
        written = False
        pattern = re.compile(f"({self._special_pattern.pattern}|{start}|{end})")
        for i, piece in enumerate(pattern.split(rendered)):
            if piece in (start, end):
                written = piece == start
                continue
            ids += [self._special_ids[piece]] if i % 2 else self.encode(piece.replace(guard, ""))
            mask += [written] * (len(ids) - len(mask))
        return ids, mask

    def require_marked_answers(self) -> None:
        """InputError unless the chat template marks what the assistant writes: else `encode_chat` finds no answers."""
        if not GENERATION.search(self._template):
            raise InputError(
                f"{self._source}: its chat template marks no answers with {{% generation %}}, so nothing would count "
                f"as one; enclose what it writes for the assistant, the token that ends the turn included, in "
                f"{{% generation %}} and {{% endgeneration %}} (chat_template in tokenizer_config.json, or "
                f"chat_template.jinja, in the same folder)"
            )

    def _guard(self, value: Any, guard: str, own: tuple[str, ...] = ()) -> Any:
        """`value` with `guard` after every character of the special tokens, `own` excepted, spelled in its strings."""

        def protect(match: re.Match[str]) -> str:
            return match[0] if match[0] in own else guard.join(match[0]) + guard

        return map_strings(value, functools.partial(self._special_pattern.sub, protect))

    def _guard_message(self, message: dict[str, Any], guard: str) -> dict[str, Any]:
        answer = "content" if message["role"] == "assistant" else None
        return {key: self._guard(value, guard, THINK if key == answer else ()) for key, value in message.items()}

    @property
    def _template(self) -> str:
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several named ones
            template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
        if template is None:
            raise InputError(f"{self._source}: has no chat template; wanted chat_template in tokenizer_config.json")
        return template

    def _render(
        self, messages: Messages, tools: Tools | None, add_generation_prompt: bool, marks: tuple[str, str] = ("", "")
    ) -> str:
        named = {f"{role}_token": self.role_token(role) for role in ("bos", "eos", "pad", "unk")}
        try:
            return compile_template(self._template).render(
                {name: token for name, token in named.items() if token is not None},
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                generation_marks=marks,
            )
        except Exception as error:  # a template is a program: besides TemplateError, whatever its expressions raise
            raise InputError(f"chat: the template refuses these messages ({error})") from None
