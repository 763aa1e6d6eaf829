"""Two small elements: a text with spans marked in it, and the spans' bars that light up in it.

Texts reach the browser as data and are shown as text nodes, so markup in them stays text. Offsets
count characters as Python does.
"""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from llama_squad.page.desk import Share, shares
from llama_squad.page.style import percent
from llama_squad.reader import Reading

TEXT_JS = """
let chars = [], words = [], lit = null, picked = null;
const box = () => element.querySelector('.text');
const value = () => props.value || {};
const isSpace = (c) => /\\s/.test(c);

function render() {
  chars = Array.from(value().text || '');
  lit = picked = null;
  words = [];
  for (let at = 0; at < chars.length; at++) {
    if (isSpace(chars[at])) continue;
    const start = at;
    while (at < chars.length && !isSpace(chars[at])) at++;
    words.push([start, at]);
  }
  draw(true);
}

function draw(scroll) {
  const marks = (value().marks || []).slice();
  if (lit) marks.push({start: lit[0], end: lit[1], kind: 'lit'});
  if (picked) marks.push({start: picked[0], end: picked[1], kind: 'picked'});
  const ends = marks.flatMap((m) => [m.start, m.end]);
  const cuts = [...new Set([0, ...ends, chars.length])].sort((a, b) => a - b);
  const pieces = [];
  for (let n = 0; n + 1 < cuts.length; n++) {
    const piece = chars.slice(cuts[n], cuts[n + 1]).join('');
    const kinds = marks.filter((m) => m.start <= cuts[n] && cuts[n + 1] <= m.end);
    if (!kinds.length) { pieces.push(piece); continue; }
    const mark = document.createElement('mark');
    mark.className = kinds.map((m) => m.kind).join(' ');
    mark.textContent = piece;
    pieces.push(mark);
  }
  if (value().selectable) tell();
  const top = box().scrollTop;
  box().replaceChildren(...pieces);
  box().scrollTop = top;
  const seen = scroll ? box().querySelector('mark')
    : box().querySelector('mark.lit') || box().querySelector('mark.picked');
  if (scroll) box().scrollTop = 0;
  if (seen) {
    const place = seen.offsetTop, view = box();
    if (place < view.scrollTop || place > view.scrollTop + view.clientHeight - 30)
      view.scrollTop = place - view.clientHeight / 3;
  }
}

function pick(start, end) {
  while (start < end && isSpace(chars[start])) start++;
  while (end > start && isSpace(chars[end - 1])) end--;
  if (start >= end) return;
  picked = [start, end];
  draw(false);
}

function tell() {
  // what is marked is told, and kept for the button, here: keys come faster than servers answer
  window.spanMarked = picked;
  const told = element.querySelector('.marked');
  if (!told) return;
  told.className = 'marked card' + (picked ? ' good' : '');
  told.querySelector('.span').textContent = picked ? chars.slice(...picked).join('') : '';
  told.querySelector('.note').textContent = picked ? told.dataset.keep : told.dataset.how;
}

function offset(node, at) {
  const range = document.createRange();
  range.selectNodeContents(box());
  range.setEnd(node, at);
  return Array.from(range.toString()).length;
}

function pickSelection() {
  const selection = window.getSelection();
  if (!value().selectable || !element.isConnected || !selection.rangeCount) return;
  if (selection.isCollapsed) return;
  const range = selection.getRangeAt(0);
  if (!box().contains(range.startContainer) || !box().contains(range.endContainer)) return;
  const start = offset(range.startContainer, range.startOffset);
  const end = offset(range.endContainer, range.endOffset);
  selection.removeAllRanges();
  pick(start, end);
}

document.addEventListener('mouseup', () => setTimeout(pickSelection));
document.addEventListener('touchend', () => setTimeout(pickSelection));
document.addEventListener('span-lit', (event) => {
  if (event.detail.name !== value().name) return;
  lit = event.detail.span;
  draw(false);
});
element.addEventListener('keydown', (event) => {
  if (!value().selectable || !words.length || event.ctrlKey || event.metaKey) return;
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step) return;
  event.preventDefault();
  if (!picked) return pick(...words[step > 0 ? 0 : words.length - 1]);
  const first = words.findIndex((w) => w[1] > picked[0]);
  let last = first;
  while (last + 1 < words.length && words[last + 1][0] < picked[1]) last++;
  if (event.shiftKey) {
    const end = Math.min(Math.max(last + step, first), words.length - 1);
    return pick(words[first][0], words[end][1]);
  }
  const next = Math.min(Math.max((step > 0 ? last : first) + step, 0), words.length - 1);
  pick(...words[next]);
});
watch('value', render);
render();
"""

BARS_JS = """
const light = (span) => document.dispatchEvent(
  new CustomEvent('span-lit', {detail: {name: (props.value || {}).name, span: span}}));

function row(bar, number) {
  const button = document.createElement('button');
  button.type = 'button';
  button.className = 'bar' + (bar.chosen ? ' chosen' : '');
  button.style.setProperty('--part', 100 * bar.probability + '%');
  for (const [kind, text] of [['key', number || ''], ['what', bar.label], ['part', bar.percent]]) {
    const cell = document.createElement('span');
    cell.className = kind + (kind === 'what' && !bar.span ? ' none' : '');
    cell.textContent = text;
    button.append(cell);
  }
  button.addEventListener('mouseenter', () => light(bar.span));
  button.addEventListener('mouseleave', () => light(null));
  button.addEventListener('focus', () => light(bar.span));
  button.addEventListener('blur', () => light(null));
  button.addEventListener('click', () => {
    light(bar.span);
    if ((props.value || {}).pick && bar.span) trigger('select', {rank: bar.rank});
  });
  if (number) button.id = 'pick-' + number;
  return button;
}

function render() {
  const value = props.value || {}, bars = value.bars || [];
  let number = 0;
  const rows = bars.map((bar) => row(bar, bar.span && value.pick ? ++number : 0));
  element.querySelector('.bars').replaceChildren(...rows);
}
watch('value', render);
render();
"""

KEYS_JS = """
document.addEventListener('keydown', (event) => {
  if (!element.isConnected || !element.offsetParent) return;
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const at = event.target;
  if (at.closest && at.closest('input, textarea, select, [contenteditable=true]')) return;
  const id = /^[1-9]$/.test(event.key) ? 'pick-' + event.key : 'key-' + event.key.toLowerCase();
  const found = document.getElementById(id);
  const button = found && (found.matches('button') ? found : found.querySelector('button'));
  if (button && !button.disabled) { event.preventDefault(); button.click(); }
});
"""
"""Presses the button ``#key-r`` for R and ``#pick-1`` for 1, while the keys' line is in sight."""


MARKED_JS = "(at, ...rest) => [JSON.stringify(window.spanMarked || null), ...rest]"
"""Puts what is marked, "[start, end]" or "null", in the place of an event's first input."""

HOW_TO_MARK = "Select words in the text, or go to it with Tab and use ← → and Shift."


def text_element(name: str, label: str, selectable: bool = False, **options: Any) -> Any:
    """Return the element that shows a text; see ``text_value``.

    With ``selectable`` it also tells what is marked in it; ``MARKED_JS`` brings that to an event.
    """
    template = (
        f'<p class="label">{label}</p><div class="text" tabindex="0" role="document" '
        f'aria-label="{label}"></div>'
    )
    if selectable:
        template += (
            f'<div class="marked card" data-how="nothing yet. {HOW_TO_MARK}" '
            'data-keep="M keeps it as the right answer."><h2>Marked</h2>'
            '<p class="span"></p><p class="note"></p></div>'
        )
    return gr.HTML(
        text_value(name, ""), html_template=template, js_on_load=TEXT_JS, elem_id=name, **options
    )


def bars_element(name: str, label: str) -> Any:
    """Return the element that shows spans as bars; see ``bars_value``."""
    template = f'<p class="label">{label}</p><div class="bars"></div>'
    return gr.HTML({"name": name, "bars": []}, html_template=template, js_on_load=BARS_JS)


def keys_element(keys: Sequence[tuple[str, str]]) -> Any:
    """Return the line that names the keys, and makes them work."""
    line = " · ".join(f"<kbd>{key}</kbd> {what}" for key, what in keys)
    return gr.HTML(f'<p class="keys">{line}</p>', js_on_load=KEYS_JS)


def text_value(
    name: str,
    text: str,
    marks: Sequence[dict[str, Any]] = (),
    selectable: bool = False,
    about: Sequence[str] = (),
) -> dict[str, Any]:
    """Return what a text element shows.

    Args:
        name: its own: bars of the same name light up in it.
        text: as it stands.
        marks: ``mark(…)`` of each span.
        selectable: spans can be selected, by mouse, touch, or arrow keys.
        about: what it is shown for: the browser draws anew, and forgets what is selected, where
            anything of this value is another.
    """
    value = {"name": name, "text": text, "marks": list(marks), "selectable": selectable}
    return value | {"about": list(about)}


def mark(reading: Reading, kind: str = "answer") -> list[dict[str, Any]]:
    """Return the mark of a reading's answer; [] where it has none."""
    if reading.start is None:
        return []
    return [{"start": reading.start, "end": reading.end, "kind": kind}]


def bars_value(name: str, reading: Reading, answer: Reading, pick: bool = False) -> dict[str, Any]:
    """Return the bars of a reading, the chosen one told apart; ``pick``: keys and clicks choose."""
    bars = []
    for share in shares(reading):
        span = share.span
        chosen = span is None if answer.answer is None else _same(span, answer)
        bars.append({
            "label": _label(share), "probability": share.probability,
            "percent": percent(share.probability), "chosen": chosen,
            "span": None if span is None else [span.start, span.end],
            "rank": None if span is None else reading.n_best.index(span),
        })  # fmt: skip
    return {"name": name, "bars": bars, "pick": pick}


def _same(span: Any, answer: Reading) -> bool:
    return span is not None and (span.start, span.end) == (answer.start, answer.end)


def _label(share: Share) -> str:
    return "no answer in the text" if share.span is None else share.span.text
