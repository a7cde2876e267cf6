"""Damaged copies of sentences, which a language model should find less fluent."""

from __future__ import annotations

import random

KINDS = {
    "shuffled": "all characters shuffled",
    "swapped": "two neighbouring words swapped",
    "replaced": "one character replaced",
    "deleted": "one character deleted",
}
# Common characters, so that a replacement is wrong by its place and not by being rare.
COMMON = "的一是了我不人在他有这个上们来到时大地为子中你说生国年着就那和要她出也得里后自以会家可下而过天去"


def damaged(sentence: str, kind: str, seed: int) -> str | None:
    """A damaged copy.

    Args:
        sentence: Of at least a few characters.
        kind: One of KINDS.
        seed: Decides on the place; the same for each model that is compared.

    Returns:
        Another text, or None if there is none (all characters the same, a single word).
    """
    generator = random.Random(f"{kind} {seed}")
    hanzi = [place for place, character in enumerate(sentence) if "\u4e00" <= character <= "\u9fff"]
    if kind == "shuffled":
        if len(set(sentence)) < 2:
            return None
        characters = list(sentence)
        while "".join(characters) == sentence:
            generator.shuffle(characters)
        return "".join(characters)
    if kind == "swapped":
        return _swapped(sentence, generator)
    if len(hanzi) < 2:
        return None
    place = generator.choice(hanzi)
    if kind == "deleted":
        return sentence[:place] + sentence[place + 1 :]
    other = generator.choice([character for character in COMMON if character != sentence[place]])
    return sentence[:place] + other + sentence[place + 1 :]


def _swapped(sentence: str, generator: random.Random) -> str | None:
    import jieba

    jieba.setLogLevel(60)
    words = jieba.lcut(sentence)
    places = [
        place
        for place, (first, second) in enumerate(zip(words, words[1:], strict=False))
        if first != second and first.isalpha() and second.isalpha()
    ]
    if not places:
        return None
    place = generator.choice(places)
    words[place], words[place + 1] = words[place + 1], words[place]
    return "".join(words)
