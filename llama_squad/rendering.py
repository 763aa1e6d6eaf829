"""Messages → text, by a tokenizer's own chat template; where each content stands in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from llama_squad.prompts import Message

Place = tuple[int, int]
"""A message of a conversation, and a character of its content."""

# Llama 3.1's template prints the date: training and evaluation must not differ by the day.
_DATE = "26 Jul 2024"

# What stands for a message's content while the template is rendered; private-use characters occur
# in no template. A wide space each side tells whether the template strips that side: Llama 2's
# strips a first user turn on the right only, since its system prompt stands on the left. The two
# differ, so that one message's right space is not taken for the next one's left.
_SLOT_OPEN, _SLOT_CLOSE = "\ue000", "\ue001"
_LEFT_SPACE, _RIGHT_SPACE = "\u2003", "\u2002"

_STRIP: dict[tuple[bool, bool], Callable[[str], str]] = {
    (False, False): str,
    (True, False): str.lstrip,
    (False, True): str.rstrip,
    (True, True): str.strip,
}
"""What a template does to a content, by the sides (left, right) that it strips."""


@dataclass(frozen=True)
class _Skeleton:
    """A rendered template, cut at its messages' contents."""

    texts: tuple[str, ...]  # what stands before each content, and after the last
    strips: tuple[Callable[[str], str], ...]  # what the template does to each content
    fold_system: bool  # the template has no system role: it joins the first user turn


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[tuple[int, int], ...]  # each message's content, in characters
    place: int | None = None  # where the adapter begins to act


class ChatTemplate:
    """A tokenizer's chat template, rendered once for each sequence of roles.

    So it cannot act on what a content says.

    Args:
        tokenizer: which has a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._skeletons: dict[tuple[str, ...], _Skeleton] = {}

    def render(self, messages: Sequence[Message], place: Place | None = None) -> Rendered:
        """Render a conversation.

        Args:
            messages: the conversation.
            place: where in it an activated adapter begins to act.

        Raises:
            ValueError: the template does not render every message of such roles.
        """
        roles = tuple(message["role"] for message in messages)
        if roles not in self._skeletons:
            self._skeletons[roles] = self._make_skeleton(roles)
        skeleton = self._skeletons[roles]
        contents = [message["content"] for message in messages]
        if skeleton.fold_system:
            contents = [contents[0] + "\n\n" + contents[1], *contents[2:]]
            if place is not None:
                moved = len(contents[0]) - len(messages[1]["content"]) if place[0] == 1 else 0
                place = place[0] - 1, place[1] + moved
        text, spans = skeleton.texts[0], []
        at = None
        for index, (content, strip, after) in enumerate(
            zip(contents, skeleton.strips, skeleton.texts[1:], strict=True)
        ):
            if place is not None and place[0] == index:
                before = strip(content[: place[1]] + "|")[:-1]  # stripped on the left at most
                at = len(text) + min(len(before), len(strip(content)))
            content = strip(content)
            spans.append((len(text), len(text) + len(content)))
            text += content + after
        return Rendered(text, tuple(spans), at)

    def _make_skeleton(self, roles: tuple[str, ...]) -> _Skeleton:
        skeleton = self._cut_template(roles, fold_system=False)
        if skeleton is None and roles[:2] == ("system", "user"):
            skeleton = self._cut_template(roles[1:], fold_system=True)
        if skeleton is None:
            raise ValueError(
                f"the chat template of {self._tokenizer.name_or_path or 'this tokenizer'} does not "
                f"render every message of a conversation of {', '.join(roles)}: "
                "give another one with --chat_template FILE"
            )
        return skeleton

    def _cut_template(self, roles: tuple[str, ...], fold_system: bool) -> _Skeleton | None:
        slots = [f"{_SLOT_OPEN}{index}{_SLOT_CLOSE}" for index in range(len(roles))]
        probe = [
            {"role": role, "content": _LEFT_SPACE + slot + _RIGHT_SPACE}
            for role, slot in zip(roles, slots, strict=True)
        ]
        try:
            rendered = self._tokenizer.apply_chat_template(probe, tokenize=False, date_string=_DATE)
        except TemplateError:
            return None
        text = str(rendered)
        texts, strips = [], []
        for slot in slots:
            before, found, text = text.partition(slot)
            if not found or slot in text:
                return None
            sides = not before.endswith(_LEFT_SPACE), not text.startswith(_RIGHT_SPACE)
            strips.append(_STRIP[sides])
            texts.append(before.removesuffix(_LEFT_SPACE))
            text = text.removeprefix(_RIGHT_SPACE)
        return _Skeleton((*texts, text), tuple(strips), fold_system)
