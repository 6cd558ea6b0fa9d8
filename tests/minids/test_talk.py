from __future__ import annotations

import pytest
import torch

from minids.errors import InputError
from minids.infer.decoder import Decoder
from minids.infer.generate import LanguageModel
from minids.infer.sampling import Sampling
from minids.talk import Conversation, Voice
from tests.minids.tiny import model_config, tokenizer


def voice(max_new_tokens: int | None = 8, **sampling: float) -> Voice:
    torch.manual_seed(1)
    model = LanguageModel(model_config(tokenizer().vocab_size))
    return Voice(model, tokenizer(), Sampling(**sampling), max_new_tokens, seed=0)


def fresh_answer(speaker: Voice, turns: list[dict[str, str]]) -> str:
    """What the model says to a conversation computed from its beginning."""
    ids, _ = speaker.tokenizer.encode_chat(turns, add_generation_prompt=True)
    return "".join(speaker.stream(ids, []))


def test_stream_is_generate_in_pieces() -> None:
    speaker = voice()
    ids = speaker.tokenizer.encode("The red fox", add_bos=True)
    said: list[int] = []
    text = "".join(speaker.stream(ids, said))
    expected = speaker.model.generate(torch.tensor([ids]), max_new_tokens=8)[0, len(ids) :].tolist()
    assert said == expected
    assert text == speaker.tokenizer.decode(expected)


def test_pieces_are_whole_characters() -> None:
    """A tokenizer of bytes gives half characters; what is yielded never ends in the middle of one."""
    speaker = voice()
    data = "狐狸🦊"
    ids = speaker.tokenizer.encode_bytes(data.encode())
    assert len(ids) > len(data)
    speaker.model.stream = lambda *args, **options: ([token] for token in ids)  # type: ignore[method-assign]
    pieces = list(speaker.stream([1], []))
    assert "".join(pieces) == data
    assert not any("\ufffd" in piece for piece in pieces)
    ids.pop()
    assert "".join(speaker.stream([1], [])).endswith("\ufffd")


def test_cached_turns_answer_like_fresh_ones() -> None:
    speaker = voice(repetition_penalty=1.0)
    conversation = Conversation(speaker, "Be kind.")
    turns = [{"role": "system", "content": "Be kind."}]
    for question in ("3 and 1?", "狐狸?", "ok"):
        turns.append({"role": "user", "content": question})
        answer = "".join(conversation.say(question))
        assert answer == fresh_answer(speaker, turns)
        turns.append({"role": "assistant", "content": answer})
    assert conversation.turns == turns[1:]
    assert conversation.cache.length > 0


def test_a_conversation_prepares_its_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Decoder] = []
    monkeypatch.setattr("minids.infer.generate.Decoder.__init__", lambda self, model: made.append(self))
    monkeypatch.setattr("minids.infer.generate.Decoder.step", lambda self, ids, cache: torch.ones(1, 400))
    conversation = Conversation(voice())
    for question in ("3 and 1?", "ok"):
        assert "".join(conversation.say(question))
    assert len(made) == 1


def test_an_answer_may_be_left_early() -> None:
    speaker = voice()
    conversation = Conversation(speaker)
    pieces = conversation.say("3 and 1?")
    begun = next(pieces)
    pieces.close()
    assert conversation.turns[-1] == {"role": "assistant", "content": begun}
    turns = [*conversation.turns, {"role": "user", "content": "and?"}]
    assert "".join(conversation.say("and?")) == fresh_answer(speaker, turns)


def test_oldest_turns_are_forgotten_when_positions_run_out() -> None:
    speaker = voice()
    conversation = Conversation(speaker, "Be kind.")
    for _ in range(12):  # 128 positions hold only some of these
        list(conversation.say("tell me about the fox"))
        assert len(conversation.ids) <= speaker.positions
    assert 2 <= len(conversation.turns) < 24
    assert conversation.turns[0]["role"] == "user"


def test_a_message_that_is_too_long_is_refused_and_forgotten() -> None:
    speaker = voice()
    conversation = Conversation(speaker)
    list(conversation.say("hello"))
    before = list(conversation.turns)
    with pytest.raises(InputError, match="128"):
        list(conversation.say("x" * 500))
    assert conversation.turns == before
    turns = [*before, {"role": "user", "content": "hello"}]
    assert "".join(conversation.say("hello")) == fresh_answer(speaker, turns)


def test_a_message_that_the_template_refuses_is_forgotten() -> None:
    speaker = voice()
    template = speaker.tokenizer.config["chat_template"]
    refusal = "{% if messages[-1]['content'] == 'no' %}{{ raise_exception('not that') }}{% endif %}"
    speaker.tokenizer.config["chat_template"] = refusal + template
    conversation = Conversation(speaker)
    list(conversation.say("hello"))
    before = list(conversation.turns)
    with pytest.raises(InputError, match="not that"):
        list(conversation.say("no"))
    assert conversation.turns == before
    assert "".join(conversation.say("hello")) == fresh_answer(speaker, [*before, {"role": "user", "content": "hello"}])


def test_without_a_limit_a_full_context_is_refused() -> None:
    speaker = voice(max_new_tokens=None)
    with pytest.raises(InputError, match="leaves no room for an answer"):
        list(speaker.stream([5] * 128, []))


def test_sampling_repeats_with_its_seed() -> None:
    ids = tokenizer().encode("The red fox", add_bos=True)
    first, second = ("".join(voice(temperature=2.0).stream(ids, [])) for _ in range(2))
    assert first == second
