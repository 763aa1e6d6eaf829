"""Texts with their answers marked, as one HTML file that loads nothing (``--html FILE``).

Uses answers as plain data, as ``reader.as_json`` gives them; knows nothing of models.
"""

import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COLOURS = 6
"""How many colours take turns; the style below has one rule for each."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --page: #fff; --line: #8886; --soft: #5c5c66;
  --c0: #ffe08a; --c1: #b5e3c4; --c2: #bcd9ff; --c3: #ffc9c2; --c4: #dccbff; --c5: #bfe9ec; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6ea; --page: #17171b; --soft: #a3a3ad;
    --c0: #66510a; --c1: #1d5532; --c2: #1f4577; --c3: #70302a; --c4: #4d3583; --c5: #145257; } }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 46rem; color: var(--ink);
  background: var(--page); font: 1.05rem/1.65 system-ui, sans-serif; }
h1, h2 { font-size: 1.2rem; line-height: 1.3; }
section + section { border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: 1rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
mark { color: inherit; border-radius: .2em; padding: .08em 0; }
:target + mark, :target + span + mark { outline: 2px solid; outline-offset: 2px; }
sup { font-size: .7em; line-height: 0; }
a { color: inherit; }
ol { padding-left: 1.6rem; }
li { margin: .45rem 0; overflow-wrap: anywhere; }
.of, .none { color: var(--soft); }
.swatch { padding: 0 .3em; border-radius: .2em; }
.c0 { background: var(--c0); } .c1 { background: var(--c1); } .c2 { background: var(--c2); }
.c3 { background: var(--c3); } .c4 { background: var(--c4); } .c5 { background: var(--c5); }
"""


def render(answers: Iterable[Mapping[str, Any]], title: str = "Answers") -> str:
    """Return an HTML document: each text once, its answers marked, its questions below it.

    Args:
        answers: one per question, with "question", "context", "answer" (None: not in the text),
            "start" and "end" in characters of the context, "na_prob" (or None), and "failure"
            where the question could not be asked.
        title: of the document.
    """
    by_context: dict[str, list[Mapping[str, Any]]] = {}
    for answer in answers:
        by_context.setdefault(answer["context"], []).append(answer)
    sections = "\n".join(
        _section(number, context, asked)
        for number, (context, asked) in enumerate(by_context.items(), start=1)
    )
    return (
        '<!DOCTYPE html>\n<html>\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{sections}\n</body>\n</html>\n"
    )


def _section(number: int, context: str, asked: Sequence[Mapping[str, Any]]) -> str:
    items = "\n".join(_item(number, index, answer) for index, answer in enumerate(asked, start=1))
    return (
        f'<section>\n<div class="text" dir="auto">{_marked(number, context, asked)}</div>\n'
        f"<ol>\n{items}\n</ol>\n</section>"
    )


def _marked(number: int, context: str, asked: Sequence[Mapping[str, Any]]) -> str:
    """Return the text with its answers marked, each followed by the number of its question.

    Answers may overlap: the text is cut wherever one begins or ends, and a piece that several
    share has the colour of the first of them.
    """
    spans = [(a["start"], a["end"], i) for i, a in enumerate(asked, 1) if a["answer"] is not None]
    cuts = sorted({0, len(context), *(place for start, end, _ in spans for place in (start, end))})
    parts = []
    for begin, end in itertools.pairwise(cuts):
        piece = html.escape(context[begin:end])
        inside = [i for start, stop, i in spans if start <= begin and end <= stop]
        if inside:
            piece = f'<mark class="c{(inside[0] - 1) % COLOURS}">{piece}</mark>'
        begun = "".join(f'<span id="a{number}-{i}"></span>' for s, _, i in spans if s == begin)
        ended = [f'<a href="#q{number}-{i}">{i}</a>' for _, stop, i in spans if stop == end]
        parts.append(begun + piece + (f"<sup>{'&#8201;'.join(ended)}</sup>" if ended else ""))
    return "".join(parts)


def _item(number: int, index: int, answer: Mapping[str, Any]) -> str:
    question = html.escape(answer["question"])
    if answer.get("failure"):
        said = f'<span class="none">could not be asked: {html.escape(answer["failure"])}</span>'
    elif answer["answer"] is None:
        said = '<span class="none">not in the text</span>'
    else:
        said = (
            f'<a class="swatch c{(index - 1) % COLOURS}" href="#a{number}-{index}">'
            f"{html.escape(answer['answer'])}</a>"
        )
    probability = answer.get("na_prob")
    doubt = (
        ""
        if probability is None
        else (f' <span class="of">(no answer: {100 * probability:.1f} %)</span>')
    )
    return f'<li id="q{number}-{index}" dir="auto">{question} {said}{doubt}</li>'
