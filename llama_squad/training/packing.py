"""From encoded examples to rows that share contexts, and to what an optimizer step holds."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llama_squad.encoding import Encoded
from llama_squad.tree import shareable_prefix


def row_dataset(examples: Any, rows: Sequence[Sequence[Sequence[int]]]) -> Any:
    """Return a dataset of ``{"paragraphs": [[example, ...], ...]}``, read when it is asked for."""
    from datasets import Dataset

    known = ("input_ids", "labels", "adapter_from", "hidden", "chat")
    columns = [column for column in known if column in examples.column_names]
    examples = examples.select_columns(columns)

    def read(batch: dict[str, list[list[list[int]]]]) -> dict[str, list[list[list[Encoded]]]]:
        wanted = [index for row in batch["paragraphs"] for group in row for index in group]
        found = iter(examples.select(wanted))
        return {
            "paragraphs": [
                [[next(found) for _ in group] for group in row] for row in batch["paragraphs"]
            ]
        }

    held = [[list(group) for group in row] for row in rows]
    return Dataset.from_dict({"paragraphs": held}).with_transform(read)


def count_questions(dataset: Any) -> int:
    """Count the questions of a dataset of rows, or of plain examples."""
    if "paragraphs" not in dataset.column_names:
        return len(dataset)
    held = dataset.with_format(None)["paragraphs"]  # without reading the examples
    return sum(len(paragraph) for row in held for paragraph in row)


@dataclass(frozen=True)
class Group:
    """Questions of a paragraph that fit into one row together."""

    examples: tuple[int, ...]  # indices into the encoded dataset
    tokens: int  # of the tree: its prefix once, and its branches


@dataclass(frozen=True)
class Plan:
    """How the examples are laid out in rows, and rows in steps."""

    rows: list[list[tuple[int, ...]]]
    rows_per_step: int  # a process's micro-batches of one row each
    paragraphs_per_step: int  # of all processes
    questions_per_step: float  # of all processes, on average
    steps: float  # an epoch; a broken number where the last one holds fewer rows
    tokens: int  # in the rows
    plain_tokens: int  # in the separate examples
    plain_paragraphs: int = 0  # whose examples have a row each

    def row_to_try(self, lengths: Sequence[int], windows: Iterable[int]) -> int | None:
        """Return a row that shares much, and outgrows the windows where one does; None: no row.

        Args:
            lengths: of all examples, and
            windows: how far the model's layers see, in tokens.
        """
        sharing = [i for i, row in enumerate(self.rows) if sum(map(len, row)) > 1]
        sharing = sharing or ([] if self.plain_paragraphs else list(range(len(self.rows))))
        for window in sorted(windows, reverse=True):
            beyond = [i for i in sharing if _longest(self.rows[i], lengths) > window]
            if beyond:
                sharing = beyond
                break
        return max(sharing[:64], key=lambda i: sum(map(len, self.rows[i])), default=None)

    def describe(self) -> str:
        """Say what a step holds, for the log."""
        saved = 1 - self.tokens / self.plain_tokens
        rest = "; the last of an epoch what is left" if self.steps % 1 else ""
        if self.steps == 1:
            rest = ": all that there are"
        text = (
            f"Shared contexts: {self.tokens:,} tokens per epoch instead of {self.plain_tokens:,} "
            f"({saved:.0%} saved). A step holds {self.paragraphs_per_step} paragraphs, "
            f"{self.questions_per_step:.1f} questions on average{rest}."
        )
        if self.plain_paragraphs:
            text += (
                f" {self.plain_paragraphs:,} paragraphs with examples too long for this model to "
                "share are trained plainly."
            )
        if self.paragraphs_per_step < 8 and self.steps > 1:
            text += (
                " Fewer than 8 paragraphs make a noisy step, as the questions of a paragraph come "
                "together: raise --gradient_accumulation_steps if training is unstable."
            )
        return text


def group_paragraphs(encoded: Any, max_length: int | None) -> list[Group]:
    """Group the examples by paragraph; one that outgrows ``max_length`` is split, never cut."""
    members: dict[str, list[int]] = {}
    for index, key in enumerate(encoded["paragraph"]):
        members.setdefault(key, []).append(index)
    paragraphs = []
    ordered = [index for indices in members.values() for index in indices]
    examples = iter(encoded.select(ordered))
    for indices in members.values():
        group = [next(examples) for _ in indices]
        prefix = shareable_prefix(group)
        part: list[int] = []
        tokens = prefix
        for index, example in zip(indices, group, strict=True):
            branch = len(example["input_ids"]) - prefix
            if part and max_length is not None and tokens + branch > max_length:
                paragraphs.append(Group(tuple(part), tokens))
                part, tokens = [], prefix
            part.append(index)
            tokens += branch
        paragraphs.append(Group(tuple(part), tokens))
    return paragraphs


def plan_rows(
    encoded: Any,
    *,
    questions_per_step: int,
    processes: int,
    row_tokens: int,
    max_length: int | None,
    seed: int,
    longest_shared: int | None = None,
) -> Plan:
    """Lay the examples out in rows so that a step holds about ``questions_per_step`` questions.

    A step takes the nearest whole number of paragraphs, at least one per process. Paragraphs are
    shuffled (so that a row's come from different articles), then put together long with short, so
    that all rows are about as long; a row is one micro-batch. The number of rows is a multiple of
    ``processes``, so that no question is seen twice in an epoch on any number of them.

    A paragraph with an example of more than ``longest_shared`` tokens is trained plainly: each of
    its examples has a row to itself.

    Raises:
        ValueError: there are too few questions for the processes.
    """
    paragraphs = group_paragraphs(encoded, max_length)
    questions, lengths = sum(len(p.examples) for p in paragraphs), encoded["length"]
    if questions < processes:
        raise ValueError("fewer training questions than processes: start fewer processes")
    wanted = max(1, round(questions_per_step * len(paragraphs) / questions / processes))
    fitting = max(1, int(row_tokens * len(paragraphs) / sum(p.tokens for p in paragraphs)))
    rows_per_step = -(-wanted // fitting)
    per_row = wanted / rows_per_step  # on average: five paragraphs in two rows are 2.5
    most, rng = max_length or 1 << 62, random.Random(seed)
    sharing, alone = _set_long_apart(encoded, paragraphs, longest_shared)
    rows = _balanced_rows(sharing, per_row, most, rng)
    plain: list[list[tuple[int, ...]]] = [[(i,)] for p in alone for i in p.examples]
    rows = _divisible(rows, processes, most, lengths, len(plain)) if sharing else []
    if plain:
        rng.shuffle(rows := rows + plain)
    # an epoch ends a step, however few rows it has
    in_step = min(rows_per_step, len(rows) // processes)
    return Plan(
        rows=rows,
        rows_per_step=rows_per_step,
        paragraphs_per_step=round(in_step * len(paragraphs) / len(rows) * processes),
        questions_per_step=questions / len(rows) * in_step * processes,
        steps=len(rows) / processes / in_step,
        tokens=_tokens(encoded, sharing, len(rows) - len(plain), plain),
        plain_tokens=sum(lengths),
        plain_paragraphs=len({encoded["paragraph"][p.examples[0]] for p in alone}),
    )


def _set_long_apart(
    encoded: Any, paragraphs: Sequence[Group], longest: int | None
) -> tuple[list[Group], list[Group]]:
    """Return those without and those with an example of more than ``longest`` tokens."""
    if longest is None:
        return list(paragraphs), []
    names = encoded["paragraph"]
    pairs = zip(names, encoded["length"], strict=True)
    beyond = {name for name, length in pairs if length > longest}
    parts: tuple[list[Group], list[Group]] = [], []
    for paragraph in paragraphs:  # all parts of one that was split go the same way
        parts[names[paragraph.examples[0]] in beyond].append(paragraph)
    return parts


def _tokens(
    encoded: Any,
    sharing: Sequence[Group],
    rows: int,
    plain: Sequence[Sequence[Sequence[int]]],
) -> int:
    """Count the tokens of so many ``rows`` of paragraphs, a prefix once, and of the ``plain``."""
    every = max(1, len(sharing) // 50)  # chat is at the end
    firsts = [encoded[p.examples[0]] for p in sharing[::every]]
    shared = shareable_prefix(firsts) if firsts else 0
    trees = sum(p.tokens for p in sharing) - shared * (len(sharing) - rows)
    return trees + sum(_length(row, encoded["length"]) for row in plain)


def _balanced_rows(
    paragraphs: Sequence[Group], per_row: float, max_length: int, rng: random.Random
) -> list[list[tuple[int, ...]]]:
    shuffled = list(paragraphs)
    rng.shuffle(shuffled)
    rows = []
    most = math.ceil(per_row)
    window = most * 64  # sorting all of them would put the same paragraphs together each time
    for start in range(0, len(shuffled), window):
        batch = sorted(shuffled[start : start + window], key=lambda p: -p.tokens)
        bins: list[tuple[list[Group], int]] = [
            ([], 0) for _ in range(math.ceil(len(batch) / per_row))
        ]
        for paragraph in batch:  # longest first, each into the emptiest row that has room for it
            open_bins = [
                b for b in bins if len(b[0]) < most and b[1] + paragraph.tokens <= max_length
            ]
            target = min(open_bins, key=lambda b: b[1], default=None)
            if target is None:
                bins.append(([paragraph], paragraph.tokens))
            else:
                bins[bins.index(target)] = ([*target[0], paragraph], target[1] + paragraph.tokens)
        rows += [[p.examples for p in held] for held, _ in bins if held]
    rng.shuffle(rows)
    return rows


def _divisible(
    rows: list[list[tuple[int, ...]]],
    processes: int,
    max_length: int,
    lengths: Sequence[int],
    others: int = 0,
) -> list[list[tuple[int, ...]]]:
    """Split rows until their number, with the ``others``, is a multiple of ``processes``.

    Where none can be split, some are put together.

    Raises:
        ValueError: rows of one question each cannot be put together within ``max_length``.
    """
    rows = list(rows)
    index = 0
    while (len(rows) + others) % processes and index < len(rows):
        paragraphs = rows[index]
        flat = [(number, example) for number, p in enumerate(paragraphs) for example in p]
        if len(flat) > 1:
            halves = flat[: len(flat) // 2], flat[len(flat) // 2 :]
            rows[index], extra = (_regroup(half) for half in halves)
            rows.append(extra)
        index += 1
    surplus = (len(rows) + others) % processes
    if surplus:  # one question per row: none can be split
        rows.sort(key=lambda row: _length(row, lengths))
        for _ in range(surplus):
            short, longer = (rows.pop(0) if rows else [] for _ in range(2))
            if not longer or _length(short, lengths) + _length(longer, lengths) > max_length:
                raise ValueError(
                    f"{len(rows) + 2 + others} rows of a question each cannot be dealt out to "
                    f"{processes} processes: raise --max_seq_length, or start more or fewer"
                )
            rows.append([*short, *longer])
    return rows


def _longest(row: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    return max(lengths[example] for paragraph in row for example in paragraph)


def _length(row: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    return sum(lengths[example] for paragraph in row for example in paragraph)


def _regroup(flat: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    groups: dict[int, tuple[int, ...]] = {}
    for number, example in flat:
        groups[number] = (*groups.get(number, ()), example)
    return list(groups.values())
