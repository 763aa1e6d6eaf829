"""How the page looks: its colours, for light and dark, its widths, and the cards of its answers."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CSS = """
.gradio-container { width: 100%; max-width: 1280px !important; margin: 0 auto !important; }
.html-container { padding: 0 !important; }
body { --faint: color-mix(in srgb, var(--body-text-color) 72%, transparent);
  --block-info-text-color: var(--faint); --body-text-color-subdued: var(--faint); }
:root { --answer: #fde68a; --answer-ink: #1c1917; --base: #bfdbfe; --lit: #fdba74; }
.dark { --answer: #a16207; --answer-ink: #fefce8; --base: #1d4ed8; --lit: #c2410c; }
#title h1 { font-size: 1.4rem; margin: 0; }
#title p { margin: .2rem 0 0; color: var(--faint); overflow-wrap: anywhere; }
.chat .md, .chat .message { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .95rem; }
.card { --tone: #71717a; border-left: 4px solid var(--tone); border-radius: 4px;
  background: color-mix(in srgb, var(--tone) 9%, transparent);
  padding: .6rem .9rem .7rem; overflow-wrap: anywhere; }
.card + .card, .marked { margin-top: .5rem; }
.card .span:empty { display: none; }
.card h2 { font-size: .85rem; font-weight: 500; margin: 0; color: var(--faint); }
.card p { margin: .25rem 0 0; }
.card .span { font-size: 1.1rem; font-weight: 600; white-space: pre-wrap; }
.card .note { font-size: .9rem; color: var(--faint); }
.card.good { --tone: #16a34a; } .card.bad { --tone: #dc2626; } .card.plain { --tone: #2563eb; }
.label { font-size: .85rem; color: var(--faint); margin: 0 0 .3rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; overflow-y: auto; line-height: 1.6;
  max-height: 26rem; min-height: 8rem; padding: .7rem .9rem; position: relative;
  border: 1px solid var(--border-color-primary); border-radius: 6px;
  background: var(--input-background-fill); color: var(--body-text-color); }
.text:focus-visible, .bar:focus-visible { outline: 2px solid #2563eb; outline-offset: 1px; }
.text mark { background: none; color: inherit; border-radius: 3px; padding: 1px 0; }
.text mark.base { background: var(--base); color: var(--body-text-color); }
.text mark.answer { background: var(--answer); color: var(--answer-ink); font-weight: 600; }
.text mark.lit { background: var(--lit); color: var(--answer-ink); }
.text mark.picked { outline: 2px solid #16a34a; }
.bars { display: grid; gap: .3rem; }
.bar { display: flex; gap: .5rem; align-items: baseline; width: 100%; text-align: left;
  padding: .25rem .6rem; font-weight: 400; font-size: .95rem; border-radius: 5px; cursor: pointer;
  border: 1px solid var(--border-color-primary); color: var(--body-text-color);
  background: linear-gradient(to right, color-mix(in srgb, #2563eb 22%, transparent) var(--part),
    transparent var(--part)); }
.bar.chosen { border-color: #2563eb; font-weight: 600; }
.bar .what { flex: 1; overflow-wrap: anywhere; white-space: pre-wrap; }
.bar .none { font-style: italic; }
.bar .part { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.bar .key:empty { display: none; }
.bar .key, .keys kbd { opacity: .75; }
.keys { font-size: .85rem; color: var(--faint); margin: 0; }
.keys kbd { border: 1px solid var(--border-color-primary); border-radius: 4px; padding: 0 .3rem; }
@media (max-width: 640px) {
  .gradio-container { padding: .5rem !important; }
  .text { max-height: 18rem; }
}
"""


def theme() -> Any:
    """Return the page's theme; nothing of it comes from another machine."""
    import gradio as gr

    return gr.themes.Default(
        primary_hue="blue",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def card(title: str, spans: Sequence[str] = (), note: str = "", tone: str = "") -> str:
    """Return a small box as HTML; all texts are escaped."""
    lines = [f'<p class="span">{html.escape(span)}</p>' for span in spans]
    lines += [f'<p class="note">{html.escape(note)}</p>'] if note else []
    return f'<div class="card {tone}"><h2>{html.escape(title)}</h2>{"".join(lines)}</div>'


def percent(probability: float) -> str:
    """Write a probability, and never as more certain than it is."""
    if 0 < probability < 0.001:
        return "< 0.1 %"
    if 0.999 < probability < 1:
        return "> 99.9 %"
    return f"{probability:.1%}".replace("%", " %")


def header(desk: Any) -> str:
    """Return the page's heading: what answers, and how it is asked."""
    args, answering = desk.args, desk.answering
    parts = [_shortened(answering.adapter or answering.model)]
    if answering.adapter and answering.adapter != answering.model:
        parts.append(f"on {_shortened(answering.model)}")
    parts += ["in 4 bits"] if args.quantize else []
    parts.append(f"{args.prompt} prompt · {desk.session.model.device.type}")
    return f"<h1>Llama SQuAD</h1><p>{html.escape(' · '.join(parts))}</p>"


def _shortened(name: str) -> str:
    """Write a folder below the working one without the way there."""
    path = Path(name)
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else name
