"""The same text in another form: other Unicode form, spaces, line ends, quotes, byte-order marks.

Uses nothing of ours.
"""

import re
import unicodedata
from functools import lru_cache
from typing import Literal

_INVISIBLE = "\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff"
"""Soft hyphen, zero-width spaces and joiners, marks of direction and of byte order."""
_GAP = re.compile(rf"[\s{_INVISIBLE}]+")
_DROPPED = re.compile(f"[{_INVISIBLE}]")
_ALIKE = str.maketrans("‘’‚‛′“”„‟″«»‐‑‒–—−", '\'\'\'\'\'"""""""------')

Form = Literal["NFC", "NFD"]
Span = tuple[int, int]
"""Where a text begins and ends in its context, in characters."""


def context_key(context: str) -> str:
    """Return what is equal for contexts that differ in white space or Unicode form only."""
    if not context.isascii():
        context = _DROPPED.sub("", unicodedata.normalize("NFKC", context))
    return " ".join(context.split())


def find_spans(context: str, text: str) -> list[Span]:
    """Return the spans of the context that are ``text``, letter for letter; else in another form.

    The other form of a text is one that differs in Unicode form, white space, line ends, invisible
    characters, or the shape of quotes and dashes. [] where there is none.
    """
    spans: list[Span] = []
    at = context.find(text)
    while at >= 0:
        spans.append((at, at + len(text)))
        at = context.find(text, at + 1)
    return spans or _find_folded(context, text)


def nearest_span(context: str, spans: list[Span], start: int) -> Span:
    """Return the span that begins nearest to an offset that may count something else.

    Offsets are also tried as counted in UTF-8 bytes, in UTF-16 units, in the other Unicode form,
    with a line end as one character where the context has two, and without a byte-order mark.
    """
    starts = [start, start + context.startswith("\ufeff")]
    for encoding, size in (("utf-8", 1), ("utf-16-le", 2)):
        units = context.encode(encoding)[: start * size]
        starts.append(len(units.decode(encoding, errors="ignore")))
    forms: tuple[tuple[Form, Form], ...] = (("NFC", "NFD"), ("NFD", "NFC"))
    for counted, form in forms:
        if unicodedata.is_normalized(form, context):
            before = unicodedata.normalize(counted, context)[:start]
            starts.append(len(unicodedata.normalize(form, before)))
    line_ends = [match.start() - n for n, match in enumerate(re.finditer("\r\n", context))]
    starts.append(start + sum(at < start for at in line_ends))

    def distances(span: Span) -> tuple[int, int]:
        # of two that are as near by different counts, the one nearer to the offset as it stands
        return min(abs(span[0] - at) for at in starts), abs(span[0] - start)

    return min(spans, key=distances)


def _find_folded(context: str, text: str) -> list[Span]:
    wanted = _fold(text)[0].strip()
    if not wanted:
        return []
    folded, pieces = _fold(context)
    spans: list[Span] = []
    at = folded.find(wanted)
    while at >= 0:
        end = at + len(wanted)
        # whole pieces only: no half of what folds into several characters
        whole = (at == 0 or pieces[at - 1] != pieces[at]) and (
            end == len(folded) or pieces[end - 1] != pieces[end]
        )
        if whole:
            spans.append((pieces[at][0], pieces[end - 1][1]))
        at = folded.find(wanted, at + 1)
    return spans


@lru_cache(maxsize=2)  # a context's questions come one after the other
def _fold(text: str) -> tuple[str, list[Span]]:
    """Return the text in its plainest form, and for each character of that the span it is from."""
    characters: list[str] = []
    pieces: list[Span] = []
    start = 0
    while start < len(text):
        gap = _GAP.match(text, start)
        if gap:
            end = gap.end()
            plain = " " if _DROPPED.sub("", gap.group()) else ""
        else:
            end = start + 1
            while end < len(text) and _joins(text[end]):
                end += 1
            plain = unicodedata.normalize("NFKC", text[start:end]).translate(_ALIKE)
        characters.append(plain)
        pieces += [(start, end)] * len(plain)
        start = end
    return "".join(characters), pieces


def _joins(character: str) -> bool:
    """Tell whether a character composes with the one before: a mark, a Hangul vowel or end."""
    return character > "\u02ff" and (
        unicodedata.category(character)[0] == "M" or "\u1160" <= character <= "\u11ff"
    )
