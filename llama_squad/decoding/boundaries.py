"""Where a span may begin and end: at the boundaries of words, in any script.

Knows text alone: no tokenizer, no model.
"""

import functools
import unicodedata
from typing import Literal

from llama_squad.answers import NO_ANSWER

Boundaries = Literal["word", "any"]
"""Where a span may begin and end: "word": at word boundaries, and it holds a letter or digit;
"any": at any character."""

Form = Literal["NFC", "NFKC"]
"""Unicode forms that tokenizers bring texts into (Unicode Standard Annex 15)."""

# Scripts that put no spaces between words, or tie particles to them: each character is a word.
_UNSPACED = (
    "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "HANGUL",
    "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "YI ",
)  # fmt: skip


@functools.cache
def _word_kind(char: str) -> str:
    """Return what a character is within a word: a "L"etter, a "N"umber, a "M"ark, or "" for none.

    Marks (accents, vowel signs) belong to the letter before them.
    """
    kind = unicodedata.category(char)[0]
    if kind == "M":
        return kind
    unspaced = unicodedata.name(char, "").startswith(_UNSPACED)
    return kind if kind in "LN" and not unspaced else ""


def is_word_boundary(context: str, offset: int) -> bool:
    """Tell whether a word may begin or end before the character at ``offset``.

    That is so where letters or digits meet anything else, digits and letters each other included
    (``1990|s``), and between any two characters that belong to no word (``.|"``), so that
    symbols such as $ and % may stand at a span's ends.
    """
    if offset in (0, len(context)):
        return True
    before, after = _word_kind(context[offset - 1]), _word_kind(context[offset])
    if after == "M":
        return False
    return not before or after != ("L" if before == "M" else before)


def normalized_chars(text: str, form: Form | None) -> list[str]:
    """Return a text's characters in a Unicode form, which joined are the text in that form.

    One string for each character: characters that the form composes, or puts into another order,
    stand at the first of them, and the others are empty (``e``, acute → ``é``, nothing).
    """
    if form is None or unicodedata.is_normalized(form, text):
        return list(text)
    chars: list[str] = []
    first = 0
    for index, char in enumerate(text):
        together = unicodedata.normalize(form, text[first : index + 1])
        alone = unicodedata.normalize(form, char)
        mark = unicodedata.combining(unicodedata.normalize("NFD", char)[0])
        if index and (mark or together != chars[first] + alone):
            chars[first] = together
            chars.append("")
        else:
            first = index
            chars.append(alone)
    return chars


def holds_word(text: str) -> bool:
    """Tell whether a text holds a letter or digit."""
    return any(unicodedata.category(char)[0] in "LN" for char in text)


def find_span(context: str, text: str, boundaries: Boundaries = "any") -> int:
    """Return where ``text`` first stands in the context as a span may, or -1 where it does not.

    A span has no white space at its ends. The text "?" is none, since a reply that holds it
    abstains.
    """
    if text in (NO_ANSWER, "") or text != text.strip():
        return -1
    if boundaries == "any":
        return context.find(text)
    start = context.find(text) if holds_word(text) else -1
    while start >= 0:
        if all(is_word_boundary(context, at) for at in (start, start + len(text))):
            break
        start = context.find(text, start + 1)
    return start


def is_span(context: str, text: str, boundaries: Boundaries = "any") -> bool:
    """Tell whether ``text`` may be the answer (see ``find_span``)."""
    return find_span(context, text, boundaries) >= 0
