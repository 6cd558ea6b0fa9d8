from __future__ import annotations

import functools
import itertools
import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minids import tasks
from minids.corpus import Idiom
from minids.data.shapes import as_row

FAMILIES = {f"{family.name} {family.language}": family for family in tasks.FAMILIES}


def pattern(form: str) -> re.Pattern[str]:
    """A regular expression for all questions in the phrasing `form`."""
    parts = re.split(r"\{\d\}", form)
    return re.compile(".+".join(map(re.escape, parts)))


@functools.cache
def training_texts(count: int = 6000) -> list[str]:
    """What pretraining, SFT and DPO see as questions."""
    rows = list(tasks.sft_rows(count))
    texts = [message["content"] for row in rows for message in row["messages"] if message["role"] == "user"]
    texts += [row["prompt"] for row in tasks.preference_rows(count // 4, heldout=False)]
    lines = "\n".join(itertools.islice(tasks.task_text(), count // 10)).splitlines()
    return texts + lines


@pytest.mark.parametrize("name", FAMILIES)
def test_no_training_row_uses_the_held_out_phrasing(name):
    heldout = pattern(FAMILIES[name].forms[-1])
    assert not [text for text in training_texts() if heldout.match(text)]


@pytest.mark.parametrize("name", FAMILIES)
def test_all_other_phrasings_are_trained_on(name):
    texts = training_texts()
    for form in FAMILIES[name].forms[:-1]:
        assert any(pattern(form).search(text) for text in texts), form


@pytest.mark.parametrize("name", ["larger en", "larger zh"])
def test_held_out_operands_are_in_no_training_question(name):
    family = FAMILIES[name]
    forms = [pattern(form) for form in family.forms]
    asked = [text for text in training_texts(12000) if any(form.search(text) for form in forms)]
    trained = {tuple(re.findall(r"\d+", text)) for text in asked}
    heldout = {fact[0][:2] for fact in family.facts_of(heldout=True)}
    assert len(heldout) > 100 and len(trained) > 200
    assert not trained & heldout


@pytest.mark.parametrize("name", ["sum en", "sum zh"])
def test_sums_are_right(name):
    for (a, b), answer in FAMILIES[name].facts:
        assert int(a) + int(b) == int(answer)


@pytest.mark.parametrize("name", ["larger en", "larger zh"])
def test_the_larger_number_is_the_larger(name):
    for (a, b, other), answer in FAMILIES[name].facts:
        assert int(answer) == max(int(a), int(b)) > int(other) == min(int(a), int(b))


def test_opposites_and_translations_lead_back():
    for one, other in (
        ("opposite en", "opposite en"),
        ("opposite zh", "opposite zh"),
        ("translate en", "translate zh"),
    ):
        back = {operands[0]: answer for operands, answer in FAMILIES[other].facts}
        for (word,), answer in FAMILIES[one].facts:
            assert back[answer] == word


@pytest.mark.parametrize("name", FAMILIES)
def test_a_question_has_one_answer(name):
    facts = FAMILIES[name].facts
    assert len({operands for operands, _ in facts}) == len(facts)


def test_known_answers():
    answers = {(name, fact[0]): fact[1] for name, family in FAMILIES.items() for fact in family.facts}
    assert answers["next en", ("December",)] == "January"
    assert answers["next zh", ("星期日",)] == "星期一"
    assert answers["capital zh", ("法国",)] == "巴黎"
    assert answers["kind en", ("apple",)] == "a fruit"
    assert answers["idiom zh", ("画蛇",)] == "添足"
    assert answers["opposite en", ("cold",)] == "hot"


@given(st.integers(0, 2**32))
def test_a_wrong_answer_is_wrong_and_right_ones_are_right(seed):
    for question in itertools.islice(tasks.training_questions(seed), 20):
        assert question.is_right(question.full) and question.is_right(f" {question.bare}\n")
        assert question.is_full(question.full) and not question.is_full(question.bare)
        assert not question.is_right(question.wrong)
        assert not question.is_right("") and not question.is_right(question.full + question.full)


def test_held_out_questions_are_different_and_spread_over_all_families():
    questions = tasks.heldout_questions(160)
    assert len({question.text for question in questions}) == 160
    counts = Counter((question.family, question.language) for question in questions)
    assert len(counts) == len(FAMILIES) and min(counts.values()) >= 10


def test_the_same_seed_gives_the_same_rows():
    def rows(seed):
        return json.dumps(
            [*tasks.sft_rows(300, seed=seed), *tasks.preference_rows(50, False, seed)], ensure_ascii=False
        )

    assert rows(1) == rows(1) != rows(2)


def test_rows_have_shapes_that_the_reader_knows():
    idioms = [Idiom("画蛇添足", "比喻做了多余的事。", "", "")]
    chats = [["Hi", "Hello", "x" * 200], ["How are you?", "Fine", "Good", "Yes", "later"], ["only one"]]
    rows = [as_row(row) for row in tasks.sft_rows(400, idioms, chats)]
    assert {row.kind for row in rows} == {"chat"}
    contents = {tuple(message["content"] for message in row.messages) for row in rows}
    assert ("Hi", "Hello") in contents and ("How are you?", "Fine", "Good", "Yes") in contents
    assert ("“画蛇添足”是什么意思？", "比喻做了多余的事。") in contents
    assert all(row.messages[-1]["role"] == "assistant" for row in rows)
    assert {as_row(row).kind for row in tasks.preference_rows(20, True)} == {"preference"}


def test_held_out_pairs_share_no_operands_with_training_pairs():
    def facts(heldout):
        return {row["chosen"] for row in tasks.preference_rows(4000, heldout)}

    training, heldout = facts(False), facts(True)
    common = {answer for answer in training & heldout if "larger" not in answer and "更大" not in answer}
    assert not common and len(heldout) > 50


def test_pairs_prefer_the_full_right_answer():
    rows = list(tasks.preference_rows(500, False))
    bare = sum(row["rejected"].startswith(("It is", "是")) for row in rows)
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert 0.5 < bare / len(rows) < 0.7
