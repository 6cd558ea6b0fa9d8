"""What cleaning keeps, changes and drops; near-duplicates against edits whose similarity is computed exactly."""

from __future__ import annotations

import pickle
import random
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.data import clean
from minids.data.clean import BANDS, Cleaner, CleanRules, examine, normalise
from minids.errors import InputError

SETTINGS = settings(max_examples=200, deadline=None, derandomize=True)
ENGLISH = (
    "the of river and to mountain in old is letter that it was house for window on are as with his they at be this "
    "from have or by one had not but what all were when we there can an your which their said if do will each about "
    "how up out them then she many some so these would other into has more her two like him see time could no make "
    "than first been its who now people my made over did down only way find use may water long little very after words"
)
CHINESE = "话说天下大势分久必合合久必分周末七国争并入于秦及灭之后楚汉又高祖斩白蛇而起义一统来光武中兴传至献帝遂为三"


def english(rng: random.Random, words: int = 300) -> list[str]:
    return rng.choices(ENGLISH.split(), k=words)


def chinese(rng: random.Random, characters: int = 600) -> list[str]:
    return rng.choices(CHINESE, k=characters)


# normalisation


@SETTINGS
@given(st.text(max_size=80))
def test_normalise_twice_is_once(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)


@SETTINGS
@given(st.text(st.characters(categories=["L", "N", "P", "S", "M"]), max_size=80))
def test_visible_text_only_changes_as_nfc_does(text: str) -> None:
    assert normalise(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("given_text", "wanted"),
    [
        ("你好，世界！（测试）：“引号”", "你好，世界！（测试）：“引号”"),  # NFKC would make this ASCII
        ("e\u0301", "\u00e9"),
        ("\ufeffa\u200bb\u00adc\x00\x07", "abc"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("a\r\nb\rc\u2028d\x0ce", "a\nb\nc\nd\ne"),
        ("\n\n a  \n\n\n\n\tb\u3000\n", " a\n\n\tb"),
        ("a\u00a0b", "a b"),
        ("👩\u200d👩\u200d👧 می\u200cخواهم", "👩\u200d👩\u200d👧 می\u200cخواهم"),  # joiners carry meaning
    ],
)
def test_normalise(given_text: str, wanted: str) -> None:
    assert normalise(given_text) == wanted


# rules


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "too short"),
        ("\u200b \n\ufeff", "too short"),
        ("abcd", "too short"),
        ("abcde", None),
        ("mojibake \ufffd\ufffd and more", "undecodable characters"),
        ("x" + "good text is kept, one lost letter in it or not " * 2 + "\ufffd", "undecodable characters"),
        ("lone \ud800 surrogate", "undecodable characters"),
        ("哈" * 20, "repetition"),
        ("哈" * 2000, "repetition"),
        ("买一送一快来买！" * 50, "repetition"),
        ("click here to win a prize. " * 30, "repetition"),
        ("abc " * 12, "repetition"),
        ("同样的一行\n" * 3 + "不同的一行\n", "repeated lines"),
        ("宴桃园豪杰三结义，斩黄巾英雄首立功。", None),
        ("\n".join(["滚滚长江东逝水", "浪花淘尽英雄", "是非成败转头空", "青山依旧在", "几度夕阳红"]), None),
    ],
)
def test_reasons(text: str, reason: str | None) -> None:
    examined = examine(text)
    assert examined.reason == reason and (examined.text is None) == (reason is not None)


def test_limits_can_be_set() -> None:
    assert examine("abcdef", CleanRules(max_chars=5)).reason == "too long"
    assert examine("哈" * 20, CleanRules(max_repeated=1.0)).reason is None
    with pytest.raises(InputError, match="wanted 0 <= min <= max"):
        CleanRules(min_chars=5, max_chars=4)
    with pytest.raises(InputError, match=r"max_repeated: got 1\.5"):
        CleanRules(max_repeated=1.5)


def test_varied_text_is_kept() -> None:
    rng = random.Random(0)
    for _ in range(50):
        assert examine(" ".join(english(rng))).reason is None
        assert examine("".join(chinese(rng))).reason is None


# copies


def test_exact_copies_also_beyond_the_recent_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean._Digests, "RECENT", 7)
    cleaner = Cleaner()
    texts = [f"sentence number {i}" for i in range(100)]
    assert [cleaner.clean(text) for text in texts] == texts
    assert [cleaner.clean(f"{text} \r\n") for text in reversed(texts)] == [None] * 100
    assert cleaner.counts == {"duplicate": 100} and cleaner.kept == 100


@SETTINGS
@given(st.lists(st.integers(0, 2**64 - 1), max_size=60))
def test_digests_are_a_set(numbers: list[int]) -> None:
    digests, known = clean._Digests(), set()
    digests.RECENT = 4
    for number in numbers + numbers:
        assert digests.add(number) == (number not in known)
        known.add(number)


def similarity(one: str, two: str) -> float:
    """Jaccard similarity of the windows, counted with plain sets of bytes."""

    def windows(text: str) -> set[bytes]:
        data = "".join(text.split()).lower().encode()
        starts = [i for i in range(len(data) - clean.WINDOW + 1) if data[i] & 0xC0 != 0x80]
        return {data[i : i + clean.WINDOW] for i in starts}

    a, b = windows(one), windows(two)
    return len(a & b) / len(a | b)


@pytest.mark.parametrize(("make", "join"), [(english, " "), (chinese, "")])
def test_near_duplicates_are_caught_as_their_similarity_says(make, join: str) -> None:
    rng = random.Random(1)
    outcomes: dict[str, list[bool]] = {"near": [], "far": [], "unrelated": []}
    probability: dict[str, list[float]] = {"near": [], "far": []}
    for _ in range(150):
        units = make(rng)
        for name, edits in (("near", 2), ("far", 24)):
            changed = list(units)
            for _ in range(edits):
                changed[rng.randrange(len(units))] = rng.choice(make(rng, 5))
            one, two = join.join(units), join.join(changed)
            cleaner = Cleaner()
            assert cleaner.clean(one) is not None
            outcomes[name].append(cleaner.clean(two) is None)
            probability[name].append(1 - (1 - similarity(one, two) ** 8) ** BANDS)
    shared = Cleaner()
    for _ in range(300):
        outcomes["unrelated"].append(shared.clean(join.join(make(rng))) is None)
    assert np.mean(outcomes["near"]) > 0.97  # recall
    assert not any(outcomes["unrelated"])  # precision
    for name, expected in probability.items():
        assert abs(np.mean(outcomes[name]) - np.mean(expected)) < 0.12, name


def test_case_and_spacing_do_not_hide_a_copy() -> None:
    text = " ".join(english(random.Random(2)))
    cleaner = Cleaner()
    assert cleaner.clean(text) == text
    assert cleaner.clean(text.upper().replace(" ", "  ")) is None
    assert cleaner.counts == {"near-duplicate": 1}


def test_short_texts_of_one_template_are_not_copies() -> None:
    cleaner = Cleaner()
    texts = [f"User: how much is {a} + {b}?\nAssistant: {a + b}" for a in range(30) for b in range(30)]
    assert [cleaner.clean(text) for text in texts] == texts


def test_near_duplicates_can_be_left_in() -> None:
    text = " ".join(english(random.Random(3)))
    cleaner = Cleaner(CleanRules(near_duplicates=False))
    assert cleaner.clean(text) and cleaner.clean(text + " end") and cleaner.clean(text) is None


def test_band_table_grows_and_keeps_to_its_memory() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(1, 2**64, (5000, BANDS), dtype=np.uint64)
    grown = clean._Bands(64 << 20)
    assert all(grown.add(key) for key in keys)
    assert np.mean([grown.add(key) for key in keys]) < 0.01  # found again; a few lost all their places
    small = clean._Bands(1 << 18)
    assert all(small.add(key) for key in keys)
    assert small._table.nbytes <= 1 << 18
    assert not any(small.add(key) for key in keys[-200:])  # the newest are still known


# workers


def test_examine_in_a_worker_and_admit_in_the_parent_is_clean() -> None:
    rng = random.Random(4)
    texts = [" ".join(english(rng, 60)) for _ in range(40)] + ["".join(chinese(rng, 80)) for _ in range(40)]
    texts += [texts[3], texts[50] + "！", "哈" * 99, "no"]
    rng.shuffle(texts)
    whole, split = Cleaner(), Cleaner()
    shipped = [pickle.loads(pickle.dumps(examine(text))) for text in texts]
    assert [split.admit(examined) for examined in shipped] == [whole.clean(text) for text in texts]
    assert split.counts == whole.counts == {"duplicate": 1, "near-duplicate": 1, "repetition": 1, "too short": 1}


def test_signature_does_not_depend_on_the_process() -> None:
    text = "".join(chinese(random.Random(5), 200))
    examined = examine(text)
    assert examined.signature is not None
    assert (examined.digest, int(examined.signature[0])) == (5470330718409111119, 2007414358434008398)


def test_speed() -> None:
    """5 MB/s and more is the aim (10 measured); a loaded machine gets half of that."""
    rng = random.Random(6)
    texts = [" ".join(english(rng, 400)) for _ in range(400)] + ["".join(chinese(rng, 800)) for _ in range(400)]
    cleaner, start = Cleaner(), time.process_time()
    for text in texts:
        cleaner.clean(text)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    assert megabytes / (time.process_time() - start) > 2.5
