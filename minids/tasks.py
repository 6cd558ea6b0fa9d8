"""Small bilingual questions with one right answer each: rows for SFT and DPO, held-out questions to score the result.

A `Family` is a table of facts (or of numbers) and several phrasings of the same question in one language. The last
phrasing of every family is never trained on, and comparisons, which follow a rule, also hold out part of their
operands: the score on `heldout_questions` says what was understood, not what was stored.

Each question has two right answers: a full sentence and a bare one. SFT teaches both equally; the preference rows
choose the full sentence over the bare one and over a wrong one, so what DPO adds can be counted too.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from minids.corpus import Idiom

Fact = tuple[tuple[str, ...], str]  # operands, answer
Row = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One kind of question in one language. Templates take operands as {0}, {1}, {2}... and the answer as {answer}."""

    name: str
    language: str  # "zh" or "en"
    facts: tuple[Fact, ...]
    forms: tuple[str, ...]  # the last one is held out of all training
    full: str
    bare: str
    by_rule: bool = False  # part of the operands is held out of all training too

    def facts_of(self, heldout: bool) -> list[Fact]:
        """Facts to train on, or to test on; without a rule to infer them from these are the same."""
        return [fact for fact in self.facts if not self.by_rule or _is_held_out(self.name, fact) == heldout]


@dataclass(frozen=True)
class Question:
    family: str
    language: str
    text: str
    full: str  # the right answer as a sentence
    bare: str  # the right answer alone
    wrong: str  # a sentence of the same form with a wrong answer

    def is_right(self, reply: str) -> bool:
        return reply.strip() in (self.full, self.bare)

    def is_full(self, reply: str) -> bool:
        return reply.strip() == self.full


def _is_held_out(name: str, fact: Fact, percent: int = 15) -> bool:
    """The same for the same operands in every run and language."""
    return zlib.crc32("|".join((name, *fact[0])).encode()) % 100 < percent


_DAYS = {
    "en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "zh": "星期一 星期二 星期三 星期四 星期五 星期六 星期日",
}
_MONTHS = {
    "en": "January February March April May June July August September October November December",
    "zh": "一月 二月 三月 四月 五月 六月 七月 八月 九月 十月 十一月 十二月",
}
_OPPOSITES = {
    "en": """
        hot cold, big small, long short, fast slow, high low, old new, hard soft, wet dry, day night, black white,
        open closed, full empty, happy sad, rich poor, strong weak, early late, left right, up down, in out, good bad,
        light dark, clean dirty, true false, loud quiet""",
    "zh": """
        热 冷, 大 小, 长 短, 快 慢, 高 低, 新 旧, 软 硬, 干 湿, 黑 白, 开 关, 多 少, 远 近, 强 弱, 早 晚, 左 右, 上 下,
        里 外, 好 坏, 真 假, 前 后, 男 女, 轻 重, 深 浅""",
}
_WORDS = {  # category: English and Chinese words for its members
    (
        "an animal",
        "动物",
    ): "dog 狗, cat 猫, horse 马, cow 牛, sheep 羊, pig 猪, tiger 老虎, rabbit 兔子, monkey 猴子, snake 蛇",
    ("a fruit", "水果"): "apple 苹果, banana 香蕉, pear 梨, peach 桃子, grape 葡萄, lemon 柠檬, melon 西瓜, plum 李子",
    ("a color", "颜色"): "red 红色, green 绿色, blue 蓝色, yellow 黄色, white 白色, black 黑色, purple 紫色, gray 灰色",
    ("a vehicle", "交通工具"): "car 汽车, train 火车, ship 轮船, plane 飞机, bus 公共汽车, bicycle 自行车",
    ("a metal", "金属"): "gold 金, silver 银, copper 铜, iron 铁, tin 锡",
}
_CAPITALS = """
    China Beijing 中国 北京, Japan Tokyo 日本 东京, France Paris 法国 巴黎, Britain London 英国 伦敦,
    Germany Berlin 德国 柏林, Italy Rome 意大利 罗马, Spain Madrid 西班牙 马德里, Russia Moscow 俄罗斯 莫斯科,
    Egypt Cairo 埃及 开罗, Greece Athens 希腊 雅典, Cuba Havana 古巴 哈瓦那, Korea Seoul 韩国 首尔,
    Thailand Bangkok 泰国 曼谷, Vietnam Hanoi 越南 河内, Austria Vienna 奥地利 维也纳, Portugal Lisbon 葡萄牙 里斯本"""
_IDIOMS = """
    画蛇添足 守株待兔 亡羊补牢 井底之蛙 对牛弹琴 狐假虎威 刻舟求剑 掩耳盗铃 杯弓蛇影 拔苗助长 自相矛盾 叶公好龙 百发百中
    半途而废 不可思议 一举两得 千军万马 海阔天空 马到成功 水落石出 四面楚歌 破釜沉舟 卧薪尝胆 三顾茅庐 望梅止渴 指鹿为马
    纸上谈兵 完璧归赵 负荆请罪 入木三分 胸有成竹 鹤立鸡群 塞翁失马 愚公移山 精卫填海 夸父追日 开天辟地 惊弓之鸟 滥竽充数
    买椟还珠"""


def _table(text: str) -> list[list[str]]:
    return [row.split() for row in text.split(",")]


def _successors(language: str) -> list[Fact]:
    facts: list[Fact] = []
    for names in (_DAYS[language].split(), _MONTHS[language].split()):
        facts += [((name,), following) for name, following in zip(names, [*names[1:], names[0]], strict=True)]
    return facts


def _both_ways(pairs: list[list[str]]) -> list[Fact]:
    return [((one,), other) for a, b in pairs for one, other in ((a, b), (b, a))]


def _words() -> dict[str, list[Fact]]:
    """Categories and translations of the words, by family and language."""
    facts: dict[str, list[Fact]] = {"kind en": [], "kind zh": [], "translate en": [], "translate zh": []}
    for (kind_en, kind_zh), members in _WORDS.items():
        for en, zh in _table(members):
            facts["kind en"].append(((en,), kind_en))
            facts["kind zh"].append(((zh,), kind_zh))
            facts["translate en"].append(((en,), zh))
            facts["translate zh"].append(((zh,), en))
    return facts


def _facts() -> dict[str, list[Fact]]:
    """Facts by family and language."""
    capitals = _table(_CAPITALS)
    numbers = [(a, b) for a in range(1, 31) for b in range(1, 31) if a != b]
    larger: list[Fact] = [((str(a), str(b), str(min(a, b))), str(max(a, b))) for a, b in numbers]
    sums: list[Fact] = [((str(a), str(b)), str(a + b)) for a in range(1, 10) for b in range(1, 10)]
    return {
        "next en": _successors("en"),
        "next zh": _successors("zh"),
        "opposite en": _both_ways(_table(_OPPOSITES["en"])),
        "opposite zh": _both_ways(_table(_OPPOSITES["zh"])),
        **_words(),
        "capital en": [((country,), capital) for country, capital, _, _ in capitals],
        "capital zh": [((country,), capital) for _, _, country, capital in capitals],
        "idiom zh": [((word[:2],), word[2:]) for word in _IDIOMS.split()],
        "larger en": larger,
        "larger zh": larger,
        "sum en": sums,
        "sum zh": sums,
    }


# Family and language, the full answer, the bare one, and the phrasings. The last phrasing is held out.
_PHRASINGS = """
next en
The one after {0} is {answer}.
It is {answer}.
    What comes after {0}?
    Which one comes right after {0}?
    What follows {0}?
    What is next after {0}?
    Name the one after {0}.
    After {0} comes what?
    Can you tell me what comes after {0}?

next zh
“{0}”的下一个是“{answer}”。
是“{answer}”。
    “{0}”的下一个是什么？
    “{0}”之后是什么？
    “{0}”后面是什么？
    紧接着“{0}”的是什么？
    请说出“{0}”的下一个。
    过了“{0}”是什么？
    你知道“{0}”的下一个是什么吗？
    告诉我“{0}”的下一个是什么。

opposite en
The opposite of {0} is {answer}.
It is {answer}.
    What is the opposite of {0}?
    Tell me the opposite of {0}.
    Which word is the opposite of {0}?
    Name the opposite of {0}.
    The opposite of {0} is what?
    What word means the opposite of {0}?
    Do you know the opposite of {0}?
    Give me the opposite of {0}.

opposite zh
“{0}”的反义词是“{answer}”。
是“{answer}”。
    “{0}”的反义词是什么？
    请说出“{0}”的反义词。
    什么是“{0}”的反义词？
    “{0}”的反义词是哪个字？
    “{0}”字的反义词呢？
    哪个字是“{0}”的反义词？
    你知道“{0}”的反义词吗？
    告诉我“{0}”的反义词。

kind en
The word {0} names {answer}.
It is {answer}.
    What kind of thing is {0}?
    What is {0}?
    Which group does {0} belong to?
    What sort of thing is {0}?
    Tell me what {0} is.
    What do we call {0}?
    What type of thing is {0}?

kind zh
“{0}”是一种{answer}。
是{answer}。
    “{0}”属于哪一类？
    “{0}”是什么？
    “{0}”是哪一类东西？
    请说出“{0}”的类别。
    “{0}”属于什么？
    “{0}”算什么？
    “{0}”是什么类别？

translate en
The Chinese for {0} is “{answer}”.
It is “{answer}”.
    What is {0} in Chinese?
    How do you say {0} in Chinese?
    Translate {0} into Chinese.
    Say {0} in Chinese.
    Tell me the Chinese for {0}.
    In Chinese, what is {0}?
    What is the Chinese word for {0}?

translate zh
“{0}”的英语是 {answer}。
是 {answer}。
    “{0}”用英语怎么说？
    “{0}”的英语是什么？
    请把“{0}”翻译成英语。
    英语里“{0}”怎么说？
    “{0}”翻译成英语是什么？
    “{0}”的英语怎么说？
    “{0}”的英语单词是什么？

capital en
The capital of {0} is {answer}.
It is {answer}.
    What is the capital of {0}?
    Tell me the capital of {0}.
    Which city is the capital of {0}?
    Name the capital of {0}.
    The capital of {0} is which city?
    What city is the capital of {0}?
    Do you know the capital of {0}?
    Give me the capital of {0}.

capital zh
“{0}”的首都是“{answer}”。
是“{answer}”。
    “{0}”的首都是哪里？
    “{0}”的首都是什么？
    请说出“{0}”的首都。
    哪个城市是“{0}”的首都？
    “{0}”的首都是哪座城市？
    “{0}”的首都在哪？
    你知道“{0}”的首都吗？
    告诉我“{0}”的首都。

idiom zh
“{0}”后面接“{answer}”。
是“{answer}”。
    成语“{0}”的后两个字是什么？
    请把成语“{0}”补充完整。
    成语“{0}”后面接什么？
    补全成语：“{0}”……
    “{0}”开头的成语是什么？
    把成语“{0}”说完。
    成语“{0}”后面的两个字是什么？

larger en
The larger number is {answer}.
It is {answer}.
    Which is larger, {0} or {1}?
    Which number is larger: {0} or {1}?
    Of {0} and {1}, which is larger?
    Tell me the larger of {0} and {1}.
    Find the larger number, {0} or {1}.
    Between {0} and {1}, which is larger?
    {0} or {1}, which one is larger?

larger zh
更大的数是{answer}。
是{answer}。
    {0}和{1}哪个大？
    {0}与{1}，哪个数大？
    比较{0}和{1}，哪个大？
    {0}和{1}中，哪个数更大？
    请说出{0}和{1}中更大的数。
    {0}大还是{1}大？
    {0}和{1}相比，哪个更大？

sum en
{0} plus {1} is {answer}.
It is {answer}.
    What is {0} plus {1}?
    {0} + {1} = ?
    Add {0} and {1}.
    What is {0} + {1}?
    Tell me the sum of {0} and {1}.
    How much is {0} and {1}?
    How much is {0} plus {1}?

sum zh
{0}加{1}等于{answer}。
是{answer}。
    {0}加{1}等于几？
    {0}加{1}是多少？
    {0} + {1} = ?
    {0}与{1}的和是多少？
    请计算{0}加{1}。
    {0}和{1}加起来是几？
    {0}加上{1}等于多少？
    {0}加{1}得几？
"""
BY_RULE = ("larger",)  # not sums: a model this small learns them by heart


def _families() -> tuple[Family, ...]:
    facts = _facts()
    families = []
    for block in _PHRASINGS.strip().split("\n\n"):
        title, full, bare, *forms = map(str.strip, block.splitlines())
        name, language = title.split()
        families.append(Family(name, language, tuple(facts[title]), tuple(forms), full, bare, name in BY_RULE))
    return tuple(families)


FAMILIES = _families()

# Turns without a checkable answer, so that a hello gets a hello back.
GREETINGS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello!", "Hi", "Hey there!", "Good morning!"),
        "Hello! I am minids, a very small DeepSeek-V3. Ask me something.",
    ),
    (
        ("Who are you?", "What is your name?", "What are you?"),
        "I am minids, a very small DeepSeek-V3, trained on this machine.",
    ),
    (
        ("What can you do?", "Help"),
        "I know some opposites, capitals, idioms and small sums. Ask me in English or Chinese.",
    ),
    (("Thanks!", "Thank you."), "You are welcome!"),
    (("Bye", "Goodbye!"), "Goodbye!"),
    (("你好", "你好！", "您好", "早上好"), "你好！我是 minids，一个很小的 DeepSeek-V3。问我点什么吧。"),
    (("你是谁？", "你叫什么名字？"), "我是 minids，一个很小的 DeepSeek-V3，刚刚在这台机器上训练出来。"),
    (("你会什么？", "你能做什么？"), "我知道一些反义词、首都、成语和一位数加法。可以用中文或英语问我。"),
    (("谢谢", "谢谢你！"), "不客气！"),
    (("再见", "拜拜"), "再见！"),
)

_OPENERS = {
    "en": ("", "", "", "Please answer: ", "Hi! ", "A question: "),
    "zh": ("", "", "", "请问，", "你好，", "问题："),
}


def ask(family: Family, fact: Fact, form: str, rng: random.Random, opener: str = "") -> Question:
    """The question about `fact` in the phrasing `form`; the wrong answer is another one of the family's."""
    operands, answer = fact
    wrong = answer
    while wrong == answer:
        # of a comparison the wrong answer is the other number
        wrong = operands[2] if len(operands) == 3 else rng.choice(family.facts)[1]
    return Question(
        family=family.name,
        language=family.language,
        text=opener + form.format(*operands),
        full=family.full.format(*operands, answer=answer),
        bare=family.bare.format(*operands, answer=answer),
        wrong=family.full.format(*operands, answer=wrong),
    )


def training_questions(seed: int = 0) -> Iterator[Question]:
    """Endless questions in the training phrasings over the training operands, all families equally often."""
    rng = random.Random(seed)
    facts = {family: family.facts_of(heldout=False) for family in FAMILIES}
    while True:
        for family in rng.sample(FAMILIES, len(FAMILIES)):
            opener = rng.choice(_OPENERS[family.language])
            yield ask(family, rng.choice(facts[family]), rng.choice(family.forms[:-1]), rng, opener)


def heldout_questions(count: int, seed: int = 0) -> list[Question]:
    """`count` different questions in the held-out phrasings, by rule over the held-out operands, families in turn."""
    rng = random.Random(seed)
    pools = []
    for family in FAMILIES:
        pool = [ask(family, fact, family.forms[-1], rng) for fact in family.facts_of(heldout=True)]
        rng.shuffle(pool)
        pools.append(pool)
    longest = max(map(len, pools))
    return [pool[i] for i in range(longest) for pool in pools if i < len(pool)][:count]


def question_row(question: Question, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question.text}, {"role": "assistant", "content": answer}]}


def _idiom_rows(idioms: Sequence[Idiom]) -> list[Row]:
    """What a well-known idiom means, with the dictionary's explanation."""
    known = {idiom.word: idiom.explanation for idiom in idioms}
    asked = ("“{0}”是什么意思？", "请解释成语“{0}”。", "成语“{0}”的意思是什么？")
    return [
        {"messages": [{"role": "user", "content": form.format(word)}, {"role": "assistant", "content": known[word]}]}
        for word in _IDIOMS.split()
        if word in known
        for form in asked
    ]


def _chat_rows(chats: Sequence[Sequence[str]], longest: int = 60) -> list[Row]:
    """Openings of conversations as long as their turns stay short; an even number of turns."""
    rows = []
    for chat in chats:
        turns: list[str] = []
        for turn in chat[:4]:
            if len(turn) > longest:
                break
            turns.append(turn)
        turns = turns[: len(turns) // 2 * 2]
        if turns:
            roles = ("user", "assistant") * (len(turns) // 2)
            rows.append(
                {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]}
            )
    return rows


def sft_rows(
    count: int, idioms: Sequence[Idiom] = (), chats: Sequence[Sequence[str]] = (), seed: int = 0
) -> Iterator[Row]:
    """`count` conversations: 8 in 10 are questions (half answered in full), the rest idioms, greetings and chats."""
    rng = random.Random(seed)
    questions = training_questions(seed)
    explained, chatted = _idiom_rows(idioms), _chat_rows(chats)
    for _ in range(count):
        draw = rng.random()
        if draw < 0.06 and explained:
            yield rng.choice(explained)
        elif draw < 0.14 and chatted:
            yield rng.choice(chatted)
        elif draw < 0.18:
            asked, answer = rng.choice(GREETINGS)
            yield {
                "messages": [{"role": "user", "content": rng.choice(asked)}, {"role": "assistant", "content": answer}]
            }
        else:
            question = next(questions)
            yield question_row(question, question.full if rng.random() < 0.5 else question.bare)


def preference_rows(count: int, heldout: bool, seed: int = 0) -> Iterator[Row]:
    """`count` pairs in training phrasings: the full right answer over the bare one (3 in 5) or a wrong one (2 in 5).

    `heldout` picks the facts: those whose operands appear in no training pair, or all others.
    """
    rng = random.Random(seed)
    facts = {f: [fact for fact in f.facts if _is_held_out(f.name, fact) == heldout] for f in FAMILIES}
    families = [family for family in FAMILIES if facts[family]]
    for _ in range(count):
        family = rng.choice(families)
        question = ask(family, rng.choice(facts[family]), rng.choice(family.forms[:-1]), rng)
        rejected = question.bare if rng.random() < 0.6 else question.wrong
        yield {"prompt": question.text, "chosen": question.full, "rejected": rejected}


def task_text(seed: int = 0, per_document: int = 6) -> Iterator[str]:
    """Endless documents of questions and full answers in the training phrasings, as plain text for pretraining."""
    questions = training_questions(seed)
    while True:
        yield "\n".join(f"{question.text} {question.full}" for question in itertools.islice(questions, per_document))
