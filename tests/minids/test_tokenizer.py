"""The tokenizer against transformers' AutoTokenizer, and its promises: lossless, deterministic, safe chats."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from minids.errors import InputError
from minids.files import sha256
from minids.tokenizer import SPECIAL_TOKENS, Tokenizer, sample_texts, train_from_texts, train_tokenizer

VOCAB = 700
SENTENCES = [
    "The cat sat on the mat, and the dog barked!\n\n",
    "In 2024 there were 12345678 people; prices rose 3.5 %.\n",
    "def add(a, b):\n    return a + b\n",
    "天下大势，分久必合，合久必分。\n",
    "画蛇添足：比喻做了多余的事，反而不恰当。\r\n",
    "ひらがなとカタカナ, naïve café.\n",
]
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def corpus(seed: int = 0, count: int = 400) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(SENTENCES, k=rng.randint(1, 6))) + str(rng.randrange(10**6)) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tok"
    train_from_texts(corpus(), VOCAB)[0].save(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def peer(folder: Path):
    return transformers.AutoTokenizer.from_pretrained(folder)


# text with the difficult cases more often than chance: special spellings, line breaks, digits, scripts, controls
tricky = st.lists(
    st.one_of(
        st.text(),
        st.sampled_from(
            [*SPECIAL_TOKENS, *SENTENCES, "\r", "\n", "\0", "   ", "<｜User", "｜>", "1234567", "!\n", "é"]
        ),
    ),
    max_size=6,
).map("".join)
# without special tokens, which hypothesis may take from the code's own strings: transformers obeys those in messages
ordinary = (
    st.lists(st.one_of(st.text(), st.sampled_from([*SENTENCES, "\r", "\n ", "12", "{%x%}", "<b>"])), max_size=4)
    .map("".join)
    .filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))
)


# text and bytes


@EXAMPLES
@given(text=tricky)
def test_text_round_trip_and_peer(tokenizer: Tokenizer, peer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(range(len(SPECIAL_TOKENS))), "ordinary text must not make special tokens"
    assert tokenizer.encode_batch([text, text]) == [ids, ids]
    parsed = tokenizer.encode(text, allow_special=True)
    assert parsed == peer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(parsed, skip_special=False) == text
    assert tokenizer.decode(parsed) == peer.decode(parsed, skip_special_tokens=True)
    assert tokenizer.encode(text, add_bos=True, allow_special=True) == peer.encode(text)


@EXAMPLES
@given(
    data=st.one_of(st.binary(), st.text().map(lambda text: text.encode("utf-16")), tricky.map(lambda t: t.encode()[1:]))
)
def test_bytes_round_trip(tokenizer: Tokenizer, data: bytes) -> None:
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


def test_every_byte_and_lone_surrogates(tokenizer: Tokenizer) -> None:
    data = bytes(range(256)) + b"\xed\xa0\x80\xf4\x90\x80\x80"
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data
    text = "a\ud800\udc80 b\udfff"
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids).decode("utf-8", "surrogatepass") == text
    assert tokenizer.encode_batch(["x", text]) == [tokenizer.encode("x"), ids]
    tokenizer.decode(ids).encode()  # what is shown is valid text


def test_valid_utf8_bytes_are_the_text_tokens(tokenizer: Tokenizer) -> None:
    for text in SENTENCES:
        assert tokenizer.encode_bytes(text.encode()) == tokenizer.encode(text)


def test_ids_outside_the_vocabulary_decode_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([VOCAB, *tokenizer.encode("ok"), 10**6, -100]) == "ok"


def test_digits_in_groups_of_three_and_joined_punctuation(tokenizer: Tokenizer) -> None:
    split = LibraryTokenizer.from_str(tokenizer._definition).pre_tokenizer

    def parts(text: str) -> list[str]:
        return [text[start:end] for _, (start, end) in split.pre_tokenize_str(text)]

    assert parts("1234567") == ["123", "456", "7"]
    assert parts("等等。\n\nok") == ["等等", "。\n\n", "ok"]
    assert parts("we go, now") == ["we", " go", ",", " now"]
    assert parts("东京とパリ") == ["东京とパリ"]
    for id in range(len(SPECIAL_TOKENS), tokenizer.vocab_size):
        text = tokenizer.decode([id])
        assert len(text) <= 3 or not text.isdigit()


def test_special_ids(tokenizer: Tokenizer, peer) -> None:
    assert tokenizer.vocab_size == len(peer) == VOCAB
    assert peer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id, peer.unk_token_id) == (0, 1, 2, 3)
    assert (tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id) == (4, 5, 6)
    assert (tokenizer.user_id, tokenizer.assistant_id) == (7, 8)
    assert tokenizer.encode("hi", add_bos=True, add_eos=True) == [0, *tokenizer.encode("hi"), 1]


def test_loads_beside_a_deepseek_v3_config(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in SENTENCES:
        assert peer.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    peer.save_pretrained(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.encode_chat([{"role": "user", "content": "hi"}]) == tokenizer.encode_chat(
        [{"role": "user", "content": "hi"}]
    )


# random splitting of joined tokens


def test_split_joined(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("".join(corpus(1, 30)))
    assert tokenizer.split_joined(ids, 0.0, random.Random(0)) == ids
    every = tokenizer.split_joined(ids, 1.0, random.Random(0))
    half = tokenizer.split_joined(ids, 0.5, random.Random(0))
    assert len(ids) < len(half) < len(every)
    assert tokenizer.decode(every) == tokenizer.decode(half) == tokenizer.decode(ids)
    assert (
        half == tokenizer.split_joined(ids, 0.5, random.Random(0)) != tokenizer.split_joined(ids, 0.5, random.Random(1))
    )
    assert tokenizer.split_joined(np.array(ids), 0.5, np.random.default_rng(0)) == tokenizer.split_joined(
        ids, 0.5, np.random.default_rng(0)
    )
    joined = [id for id in every if (text := tokenizer.decode([id])).strip() and text.endswith(("\n", "\r"))]
    assert not joined


# chats

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京", "days": 3}}}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"a<b": {}}}},
}
CHATS = [
    [{"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "reasoning_content": "look it up",
            "content": None,
            "tool_calls": [CALL, CALL["function"]],
        },
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "rain", "name": "weather"},
        {"role": "assistant", "content": "Both."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Thanks"}, {"type": "image"}, {"type": "text", "text": "!\n"}],
        },
        {"role": "assistant", "thinking": "polite", "content": "\n welcome "},
    ],
    [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "<think>a</think>b"},
        {"role": "tool", "content": "t"},
    ],
]
message = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool"]), "content": ordinary}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.one_of(ordinary, st.none())},
        optional={
            "reasoning_content": ordinary,
            "tool_calls": st.lists(
                st.fixed_dictionaries(
                    {
                        "name": ordinary,
                        "arguments": st.one_of(ordinary, st.dictionaries(ordinary, ordinary, max_size=2)),
                    }
                ),
                max_size=2,
            ),
        },
    ),
)


def check_against_peer(tokenizer: Tokenizer, peer, chat: list, tools: list | None, prompt: bool) -> None:
    rendered = tokenizer.render_chat(chat, tools, prompt)
    assert rendered == peer.apply_chat_template(chat, tools=tools, add_generation_prompt=prompt, tokenize=False)
    theirs = peer.apply_chat_template(
        chat, tools=tools, add_generation_prompt=prompt, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = tokenizer.encode_chat(chat, tools, prompt)
    assert ids == theirs["input_ids"] == tokenizer.encode(rendered, allow_special=True)
    assert mask == [bool(flag) for flag in theirs["assistant_masks"]]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("tools", [None, [WEATHER, WEATHER["function"]]])
@pytest.mark.parametrize("chat", CHATS)
def test_chat_as_in_transformers(tokenizer: Tokenizer, peer, chat: list, tools: list | None, prompt: bool) -> None:
    check_against_peer(tokenizer, peer, chat, tools, prompt)


@EXAMPLES
@given(chat=st.lists(message, min_size=1, max_size=5), tools=st.sampled_from([None, [WEATHER]]), prompt=st.booleans())
def test_any_chat_as_in_transformers(tokenizer: Tokenizer, peer, chat: list, tools: list | None, prompt: bool) -> None:
    check_against_peer(tokenizer, peer, chat, tools, prompt)


def test_rendered_text(tokenizer: Tokenizer) -> None:
    bos, eos, user, assistant = (SPECIAL_TOKENS[i] for i in (0, 1, 7, 8))
    chat = [*CHATS[1], {"role": "user", "content": "sure?"}]
    assert tokenizer.render_chat(chat, add_generation_prompt=True) == (
        f"{bos}Be brief.{user}1+1?{assistant}2{eos}{user}sure?{assistant}"
    )


def test_mask_covers_the_answers_and_their_eos(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer.encode_chat(CHATS[2])
    written = tokenizer.decode([id for id, flag in zip(ids, mask, strict=True) if flag], skip_special=False)
    assert written.startswith("<think>look it up</think><｜tool▁calls▁begin｜>")
    assert written.endswith("Both.<｜end▁of▁sentence｜><think>polite</think>\n welcome <｜end▁of▁sentence｜>")
    assert "sunny" not in written and "Thanks" not in written


@EXAMPLES
@given(texts=st.lists(tricky, min_size=4, max_size=4))
def test_messages_cannot_make_special_tokens(tokenizer: Tokenizer, texts: list[str]) -> None:
    def chat(system: str, question: str, output: str, answer: str) -> list[dict]:
        call = {"name": question, "arguments": {answer: output}}
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": question},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": output},
            {"role": "assistant", "content": answer.replace("think>", "")},
        ]

    ids, mask = tokenizer.encode_chat(chat(*texts), tools=[{"name": texts[0]}])
    plain, plain_mask = tokenizer.encode_chat(chat("s", "q", "o", "a"), tools=[{"name": "n"}])

    def structure(ids: list[int], mask: list[bool]) -> list[tuple[int, bool]]:
        return [(id, flag) for id, flag in zip(ids, mask, strict=True) if id < len(SPECIAL_TOKENS)]

    assert structure(ids, mask) == structure(plain, plain_mask)
    assert tokenizer.decode(ids, skip_special=False) == tokenizer.render_chat(chat(*texts), tools=[{"name": texts[0]}])


def test_inline_thoughts_of_the_assistant_are_its_tokens(tokenizer: Tokenizer) -> None:
    inline = [{"role": "user", "content": "q<think>"}, {"role": "assistant", "content": "<think>t</think>a"}]
    apart = [inline[0], {"role": "assistant", "reasoning_content": "t", "content": "a"}]
    assert tokenizer.encode_chat(inline) == tokenizer.encode_chat(apart)
    assert tokenizer.encode_chat(inline)[0].count(SPECIAL_TOKENS.index("<think>")) == 1


def test_template_that_looks_inside_messages(tokenizer: Tokenizer) -> None:
    config = tokenizer.config | {"chat_template": "{{ messages[0].content.split('<｜User｜>')[-1] }}"}
    other = Tokenizer(tokenizer._definition, config)
    assert other.decode(other.encode_chat([{"role": "user", "content": "plain"}])[0]) == "plain"
    with pytest.raises(InputError, match="spells a special token"):
        other.encode_chat([{"role": "user", "content": "a<｜User｜>b"}])


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ([], "no messages"),
        ([{"role": "robot", "content": "x"}], 'unknown role "robot"; known: system, user, assistant, tool'),
        ([{"content": "x"}], "wanted an object with role and content"),
        (["x"], "wanted an object with role and content"),
        ([{"role": "assistant", "tool_calls": [{"name": None}]}], "refuses"),
    ],
)
def test_bad_chats(tokenizer: Tokenizer, chat: list, said: str) -> None:
    for call in (tokenizer.render_chat, tokenizer.encode_chat):
        with pytest.raises(InputError, match=said):
            call(chat)


@pytest.mark.parametrize("expression", ["''.split('')", "messages[3].role.x", "1 // 0", "{}.pop('x')", "'x' + 1"])
def test_whatever_a_template_raises_is_its_refusal(tokenizer: Tokenizer, expression: str) -> None:
    other = Tokenizer(tokenizer._definition, tokenizer.config | {"chat_template": f"{{{{ {expression} }}}}"})
    with pytest.raises(InputError, match="chat: the template refuses these messages"):
        other.encode_chat(CHATS[0][:1])


def test_no_chat_template(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer(tokenizer._definition, {}).render_chat(CHATS[0])


# training


def test_same_corpus_same_bytes(folder: Path, tmp_path: Path) -> None:
    """Also in another process, with another hash seed and thread count."""
    script = (
        "import sys, json; sys.path[:0] = sys.argv[3:]; import test_tokenizer as t; from minids.tokenizer import *;"
        "train_from_texts(t.corpus(), int(sys.argv[2]))[0].save(sys.argv[1])"
    )
    here = Path(__file__).parent
    environment = {"PATH": "", "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(tmp_path), str(VOCAB), str(here), str(here.parents[1])]
    subprocess.run(command, check=True, env=environment, timeout=120)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert Tokenizer.load(tmp_path).fingerprint == sha256(folder / "tokenizer.json")
    assert train_from_texts(corpus(seed=5), VOCAB)[0].fingerprint != sha256(folder / "tokenizer.json")


def test_report() -> None:
    texts = corpus()
    tokenizer, report = train_from_texts(iter(texts), VOCAB, sample_bytes=20_000)
    assert report["bytes_seen"] == len("".join(texts).encode())
    assert 10_000 < report["sample_bytes"] + report["held_out_bytes"] <= 20_000
    assert report["vocab_size"] == tokenizer.vocab_size == VOCAB and report["special_tokens"] == len(SPECIAL_TOKENS)
    assert report["lossless"] and report["bytes_per_token"] > 2
    small, report = train_from_texts(["abab"], VOCAB)
    assert small.vocab_size == report["vocab_size"] < VOCAB and report["held_out_bytes"] == 0


def test_sample_is_bounded_uniform_and_seeded() -> None:
    texts = [f"{i:05d}" for i in range(4000)]
    pieces, seen = sample_texts(iter(texts), 5000, seed=3)
    assert seen == 20_000 and len(pieces) == 1000 and pieces == sorted(pieces)
    assert pieces == sample_texts(texts, 5000, seed=3)[0] != sample_texts(texts, 5000, seed=4)[0]
    early = sum(piece < "02000" for piece in pieces)
    assert 420 < early < 580  # mean 500, standard deviation 14
    assert sample_texts(texts, 10**6, seed=0)[0] == texts
    assert len("".join(sample_texts(["x" * 10**6], 50_000, seed=0)[0])) <= 50_000


def test_train_on_files(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    chat = {"messages": [{"role": "user", "content": "zyzzyva " * 50}, {"role": "assistant", "content": "qoph " * 50}]}
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*({"text": text} for text in corpus()), chat, chat]))
    with open(rows, "a") as file:
        file.write('{"cut')
    report = train_tokenizer([str(rows)], VOCAB, tmp_path / "tok")
    tokenizer = Tokenizer.load(tmp_path / "tok")
    assert report["vocab_size"] == VOCAB and len(tokenizer.encode(" zyzzyva qoph")) == 2
    assert report["skipped_rows"] == {"not valid JSON": 1}
    assert report["skipped_examples"]["not valid JSON"][0].startswith(f"{rows}:")
    before = sha256(tmp_path / "tok" / "tokenizer.json")
    with pytest.raises(InputError, match="not empty"):
        train_tokenizer([str(rows)], VOCAB, tmp_path / "tok")
    assert sha256(tmp_path / "tok" / "tokenizer.json") == before


def test_failed_training_leaves_nothing(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "abc"}\n')
    with pytest.raises(InputError, match=f"got 200, wanted at least {len(SPECIAL_TOKENS) + 256}"):
        train_tokenizer([str(rows)], 200, tmp_path / "tok")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    with pytest.raises(InputError, match="no text"):
        train_from_texts([], VOCAB)
    with pytest.raises(InputError, match="sample bytes: got 0, wanted at least 1"):
        train_from_texts(corpus(), VOCAB, sample_bytes=0)


# another tokenizer's settings


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ChatML tokenizer in GPT-2's manner, made by transformers: its bos is its pad, it has no unk and no FIM."""
    library = LibraryTokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    library.add_tokens([AddedToken("<tool>", special=False)])
    library.post_processor = processors.TemplateProcessing(single="<|im_end|> $A", special_tokens=[("<|im_end|>", 2)])
    peer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    peer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    )
    folder = tmp_path_factory.mktemp("foreign")
    peer.save_pretrained(folder)
    return folder


def test_like(foreign: Path, tmp_path: Path) -> None:
    old = json.loads((foreign / "tokenizer.json").read_text())
    tokenizer, report = train_from_texts(corpus(), 500, like=foreign)
    tokenizer.save(tmp_path)
    new = json.loads((tmp_path / "tokenizer.json").read_text())
    assert {name: new[name] for name in ("normalizer", "pre_tokenizer", "decoder")} == {
        name: old[name] for name in ("normalizer", "pre_tokenizer", "decoder")
    }
    assert [token["content"] for token in new["added_tokens"]][:4] == [
        token["content"] for token in old["added_tokens"]
    ]
    assert report["vocab_size"] == 500 and report["lossless"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 2, 0)
    assert len({tokenizer.unk_id, tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id}) == 4

    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(foreign)
    assert peer.encode("x") == [2, *tokenizer.encode("x")]
    chat = [
        {"role": "user", "content": "hi 你好"},
        {"role": "assistant", "content": "yes.\n"},
        {"role": "user", "content": "1"},
    ]
    assert peer.chat_template == theirs.chat_template
    assert tokenizer.render_chat(chat) == theirs.apply_chat_template(chat, tokenize=False)
    check_against_peer(tokenizer, peer, chat, None, False)
    with pytest.raises(InputError, match=f"wanted at least {report['special_tokens'] + 256}"):
        train_from_texts(corpus(), 260, like=foreign)


def test_like_learns_the_same_merges_as_transformers(foreign: Path) -> None:
    texts = [text for text in corpus() if text.isascii()]  # CJK runs are cut shorter here than there
    assert len(texts) > 20
    tokenizer, _ = train_from_texts(texts, 400, like=foreign)
    trained = [text for i, text in enumerate(texts) if i % 50]
    theirs = transformers.AutoTokenizer.from_pretrained(foreign).train_new_from_iterator([trained], 400)
    ours, reference = json.loads(tokenizer._definition), json.loads(theirs.backend_tokenizer.to_str())
    common = min(len(ours["model"]["merges"]), len(reference["model"]["merges"]))
    assert common > 50 and ours["model"]["merges"][:common] == reference["model"]["merges"][:common]


# bad input


def test_missing_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="no tokenizer here; wanted a folder"):
            Tokenizer.load(path)


@pytest.mark.parametrize("size", [0, 1000, -20])
def test_truncated_file(folder: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:size])
    with pytest.raises(InputError, match=r"tokenizer\.json: not "):
        Tokenizer.load(tmp_path)


def test_other_damage(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="not UTF-8"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: not valid JSON"):
        Tokenizer.load(tmp_path)


def test_not_byte_level(tmp_path: Path) -> None:
    LibraryTokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="wanted a byte-level BPE"):
        Tokenizer.load(tmp_path)
    with pytest.raises(InputError, match="wanted a byte-level BPE"):
        train_from_texts(corpus(), VOCAB, like=tmp_path)
