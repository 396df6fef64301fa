"""Drawing values: cities, dates, names, numbers. What a user writes, and what a tool call or JSON has to say."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lfm.train.synthetic.agreement import agree
from lfm.train.synthetic.tables import (
    Split,
    cities,
    common_words,
    language_table,
    listed_for_tests,
    part_of,
    shared_words,
    split_of,
    words,
)

Item = TypeVar("Item")
JsonValue = str | int | float | bool | None

# Which kind of value a slot of a template takes; a slot that is not listed is a kind itself.
_KIND_OF_SLOT = {
    "origin": "city",
    "destination": "city",
    "place": "city",
    "currency2": "currency",
    "title2": "title",
    "subject": "title",
    "query": "title",
    "artist": "coined",
    "arrival": "date",
}
_SLOT = re.compile(r"\{(\w+)(?:=(\w+))?\}")
_SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
_LETTERS, _DIGITS = "ABCDEFGHJKLMNPQRSTUVWXYZ", "0123456789"
_LANGUAGE_CODES = ("en", "ar", "zh", "fr", "de", "ja", "ko", "es", "pt")  # in the order of each table's `languages`
_MONTH_DAYS = 28
_INVENTED = 0.4
_LOOSE_MESSAGES = 0.4  # of those in training: any words in a row, so that a message is copied and not recalled
_UNSPACED = ("zh", "ja")
# Letters of random names: vowels and consonants, or characters of a script without that distinction.
_VOWELS = {"en": "aeiou", "de": "aeiouäöü", "fr": "aeiouéèô", "es": "aeiouáéí", "pt": "aeiouãçô"}
_CONSONANTS = "bcdfghjklmnprstvwxz"
_CHARACTERS = {
    "zh": range(0x4E00, 0x8FFF),
    "ja": range(0x30A2, 0x30F3),
    "ko": range(0xAC00, 0xD7A4),
    "ar": [*range(0x0628, 0x063B), *range(0x0641, 0x064B)],
}


@dataclass(frozen=True, slots=True)
class Value:
    """A value as people write it and as a machine wants it."""

    text: str
    data: JsonValue


class Draw:
    """Everything that is random about one conversation: a generator, a language, a split."""

    def __init__(self, generator: random.Random, language: str, split: Split) -> None:
        self.generator, self.language, self.split = generator, language, split
        self.table = language_table(language)

    def chance(self, probability: float) -> bool:
        return self.generator.random() < probability

    def one(self, items: Sequence[Item]) -> Item:
        """Any entry."""
        return items[int(self.generator.random() * len(items))]

    def phrase(self, items: Sequence[Item]) -> Item:
        """An entry of this split."""
        return self.one(part_of(items, self.split))

    def integer(self, low: int, high: int) -> int:
        return low + int(self.generator.random() * (high - low + 1))

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        return self.generator.sample(items, len(items))

    def value(self, slot: str) -> Value:
        """A value for a slot of a template, or of a kind."""
        kind = _KIND_OF_SLOT.get(slot, slot)
        drawn = _KINDS[kind](self)
        return drawn if isinstance(drawn, Value) else Value(str(drawn), drawn)

    def invents(self) -> bool:
        """Whether a name shall be random characters instead of a known one: in training now and then, so that copying
        is learnt, and not a list of names."""
        return self.split == "train" and self.chance(_INVENTED)

    def unseen(self, make: Callable[[], str]) -> str:
        """A made-up string of this split."""
        while True:
            text = make()
            if split_of(text) == self.split:
                return text

    def letters(self, alphabet: str, count: int) -> str:
        return "".join(self.one(alphabet) for _ in range(count))


def slots_of(template: str) -> list[str]:
    """The slots that a template names, constants included."""
    return [match[1] for match in _SLOT.finditer(template)]


def constants_of(template: str) -> dict[str, JsonValue]:
    """What a template says of slots without a value of their own, such as {unit=celsius} or {on=true}."""
    booleans: dict[str, JsonValue] = {"true": True, "false": False}
    return {match[1]: booleans.get(match[2], match[2]) for match in _SLOT.finditer(template) if match[2]}


def render(template: str, texts: Mapping[str, str]) -> str:
    """Fill a template. Constants leave nothing behind, and endings agree with what now stands beside them."""
    return agree(_SLOT.sub(lambda match: "" if match[2] else texts[match[1]], template))


def _invented(draw: Draw) -> str:
    """Something that stands in no list of names: made up, or a word of whatever kind, of this or another language."""
    if draw.chance(0.5):
        return _made_up(draw)
    language = draw.language if draw.chance(0.6) else draw.one(_LANGUAGE_CODES)
    return draw.unseen(lambda: _some_word(draw, language))


def _some_word(draw: Draw, language: str) -> str:
    while True:
        word = draw.one(common_words(language))
        if language in _UNSPACED:
            begin = draw.integer(0, len(word) - 2)
            word = word[begin : begin + draw.integer(2, 4)]
        if word.casefold() not in listed_for_tests(language):
            return word


def _made_up(draw: Draw) -> str:
    """Two to seven random characters of the language's script."""
    if draw.language in _CHARACTERS:
        count = draw.integer(2, 3) if draw.language in ("zh", "ko") else draw.integer(3, 6)
        return draw.unseen(lambda: "".join(chr(draw.one(_CHARACTERS[draw.language])) for _ in range(count)))
    vowels = _VOWELS[draw.language]
    return draw.unseen(
        lambda: (
            "".join(draw.one(_CONSONANTS) + draw.one(vowels) for _ in range(draw.integer(1, 3))) + draw.one(_CONSONANTS)
        )
    )


def _known(draw: Draw, names: Sequence[str]) -> str:
    return _invented(draw).capitalize() if draw.invents() else draw.one(names)


def _title(draw: Draw) -> str:
    first, second = draw.generator.sample(words(draw.language, "words", draw.split), 2)
    if draw.invents():
        first = _invented(draw)
    if draw.invents():
        second = _invented(draw)
    text = render(draw.table["title"], {"w1": first, "w2": second})
    return f"{text} {draw.integer(2, 30)}" if draw.chance(0.2) else text


def _person(draw: Draw) -> str:
    given, family = (_known(draw, words(draw.language, key, draw.split)) for key in ("given", "family"))
    return render(draw.table["person"], {"given": given, "family": family})


def _coined(draw: Draw) -> str:
    if draw.invents():
        return _invented(draw).capitalize()
    syllables = draw.table["syllables"].split()
    return draw.unseen(lambda: "".join(draw.one(syllables) for _ in range(draw.integer(2, 3))).capitalize())


def _date(draw: Draw) -> Value:
    year, month, day = draw.integer(2025, 2029), draw.integer(1, 12), draw.integer(1, _MONTH_DAYS)
    iso = f"{year}-{month:02d}-{day:02d}"
    texts = {
        "iso": iso,
        "year": str(year),
        "month": draw.table["months"].split()[month - 1],
        "day": str(day),
        "mm": f"{month:02d}",
        "dd": f"{day:02d}",
        "m": str(month),
    }
    return Value(render(draw.phrase(draw.table["dates"]), texts), iso)


def _message(draw: Draw) -> str:
    if draw.split == "train" and draw.chance(_LOOSE_MESSAGES):
        words = [_invented(draw) for _ in range(draw.integer(2, 6))]
        if draw.chance(0.3):
            words.insert(draw.integer(0, len(words)), str(draw.integer(2, 30)))
        return ("" if draw.language in _UNSPACED else " ").join(words)
    return render(draw.phrase(draw.table["messages"]), {"n": str(draw.integer(2, 30))})


def _language(draw: Draw) -> Value:
    names = draw.table["languages"].split()
    others = [i for i, code in enumerate(_LANGUAGE_CODES) if code != draw.language]
    index = draw.one(others)
    return Value(names[index], _LANGUAGE_CODES[index])


def _translation(draw: Draw) -> str:
    """What a translation tool returns: a sentence of another language, whichever."""
    other = draw.one([code for code in _LANGUAGE_CODES if code != draw.language])
    return _message(Draw(draw.generator, other, draw.split))


def latin_word(draw: Draw) -> str:
    """A made-up word for names of tools, addresses and such, which hold no other letters than a to z."""
    english = Draw(draw.generator, "en", draw.split)
    while True:
        word = _coined(english).lower()
        if word.isascii() and word.isalpha():
            return word


def _email(draw: Draw) -> str:
    return f"{latin_word(draw)}{draw.integer(1, 99) if draw.chance(0.3) else ''}@{draw.one(shared_words('domains'))}"


def _code(draw: Draw) -> str:
    def make() -> str:
        if draw.chance(0.5):
            return f"{draw.letters(_LETTERS, draw.integer(1, 3))}-{draw.letters(_DIGITS, draw.integer(3, 6))}"
        return draw.letters(_LETTERS + _DIGITS, draw.integer(6, 10))

    return draw.unseen(make)


def _amount(draw: Draw) -> Value:
    number = draw.integer(1, 9999) if draw.chance(0.7) else draw.integer(100, 99_999) / 100
    return Value(f"{number}", number)


def _expression(draw: Draw) -> Value:
    operation, x, y, _ = sum_of(draw)
    return expression_of(draw, _SIGNS[operation], x, y)


def expression_of(draw: Draw, sign: str, x: int, y: int) -> Value:
    """A sum as people write it, in words or in signs, and as a calculator takes it."""
    expression = f"{x} {sign} {y}"
    if draw.chance(0.5):
        operation = next(name for name, known in _SIGNS.items() if known == sign)
        return Value(render(draw.phrase(draw.table["sums"][operation]), {"x": str(x), "y": str(y)}), expression)
    written = {"*": ("*", "x", "\u00d7"), "/": ("/", "\u00f7"), "-": ("-",), "+": ("+",)}[sign]
    spelled = draw.one(written)
    return Value(draw.one([f"{x} {spelled} {y}", f"{x}{spelled}{y}"]), expression)


def sum_of(draw: Draw) -> tuple[str, int, int, int]:
    """An operation, two numbers and what comes out."""
    operation = draw.one(list(_SIGNS))
    x, y = draw.integer(2, 999), draw.integer(2, 99)
    if operation == "divide":
        return operation, x * y, y, x
    if operation == "subtract" and x < y:
        x, y = y, x
    return operation, x, y, {"add": x + y, "subtract": x - y, "multiply": x * y}[operation]


_KINDS: dict[str, Callable[[Draw], Value | JsonValue]] = {
    "amount": _amount,
    "city": lambda d: _known(d, cities(d.language, d.split)),
    "code": _code,
    "coined": _coined,
    "count": lambda d: d.integer(2, 900),
    "cuisine": lambda d: _known(d, part_of(d.table["cuisines"], d.split)),
    "currency": lambda d: d.one(shared_words("currencies")),
    "date": _date,
    "days": lambda d: d.integer(2, 14),
    "email": lambda d: d.unseen(lambda: _email(d)),
    "expression": _expression,
    "domain": lambda d: d.one(shared_words("domains")),
    "fee": lambda d: d.integer(4, 39),
    "flight": lambda d: d.unseen(lambda: f"{d.letters(_LETTERS, 2)} {d.integer(100, 9999)}"),
    "height": lambda d: d.integer(900, 7900),
    "language": _language,
    "length": lambda d: d.integer(60, 2900),
    "message": _message,
    "minutes": lambda d: d.integer(2, 90),
    "money": lambda d: d.integer(100, 999_999) / 100,
    "nights": lambda d: d.integer(2, 14),
    "order": _code,
    "percent": lambda d: d.integer(1, 99),
    "person": _person,
    "phone": lambda d: d.unseen(lambda: f"+{d.integer(20, 99)} {d.integer(100, 999)} {d.letters(_DIGITS, 6)}"),
    "price": lambda d: f"{d.integer(15, 1999)} {d.one(shared_words('currencies'))}",
    "rating": lambda d: d.integer(31, 50) / 10,
    "room": lambda d: _known(d, part_of(d.table["rooms"], d.split)),
    "salary": lambda d: d.integer(24, 180) * 1000,
    "temperature": lambda d: d.integer(-15, 41),
    "ticker": lambda d: d.unseen(lambda: d.letters(_LETTERS, d.integer(3, 4))),
    "time": lambda d: f"{d.integer(0, 23):02d}:{d.integer(0, 59):02d}",
    "title": _title,
    "tracking": _code,
    "translation": _translation,
    "visitors": lambda d: d.integer(2, 990) * 1000,
    "weight": lambda d: d.integer(2, 300) / 10,
    "year": lambda d: d.integer(1820, 2019),
}
