"""The search for the likeliest reply to one question; it runs no model.

Log-probabilities only fall as a reply grows. So hypotheses are taken from a queue, likeliest first,
and the first complete one to come off it is the best: beam search's answer, for the model calls of
a single reply where the model is sure (best-first beam search, Meister, Vieira and Cotterell 2020,
https://aclanthology.org/2020.tacl-1.51). ``num_beams`` bounds how many hypotheses of one length are
taken, so the worst case is beam search's, too.
"""

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from llama_squad.decoding.cache import Branch

SPECULATION = 0.7
"""Partial replies this close (in nats) to the likeliest one are run along with it: they will
probably be wanted next, and a pass over two tokens costs little more than over one."""

N_BEST_BEAMS = 20
"""Once its answer is found, a search for more spans takes so many partial replies of a length for
each of them."""


State = tuple[int, ...]
"""Where a reply stands in its grammar; what it means is the grammar's own."""


@dataclass(frozen=True)
class Successors:
    """The tokens that may follow (None: any): the i-th comes with ``targets[i]``.

    A target is what the grammar's ``step`` is told beside the token. ``guess`` is the place of the
    token that most probably follows, if the grammar can tell: it is run ahead of need.
    """

    ids: list[int] | None
    targets: Sequence[Any] = ()
    guess: int | None = None


class Closing(NamedTuple):
    """The end of what is searched for: tokens that are forced after it, and what the reply says.

    Of several complete replies of one text only the best counts; without a text each counts.
    """

    tail: Sequence[int] = ()
    text: str = ""


class Ahead(NamedTuple):
    """What a guessed token's run gave, kept until the search wants it."""

    branch: Branch
    following: Successors
    likeliest: list[tuple[float, int, Any]]


@dataclass
class Hypothesis:
    """A partial reply: tokens after the prompt (in span decoding: after the header)."""

    log_prob: float
    ids: tuple[int, ...]
    length: int
    stem: Branch
    kind: Literal["open", "closing", "complete"] = "open"
    state: State = ()
    forced_suffix: Sequence[int] = ()  # tokens that follow (closing)
    text: str = ""  # the span (closing, complete)
    branch: Branch | None = None  # once it was run
    children: "list[Hypothesis] | None" = None
    ahead: Sequence[Ahead] = ()  # of this one and of the guesses that follow it, where it was run


class BestFirstSearch:
    """Best-first beam search for one question.

    It tells which nodes it needs run (``advance``), and is told their logits' outcome by setting
    ``children``; what it has done so far is the same whatever else was run ahead of need.
    """

    def __init__(self, root: Hypothesis, num_beams: int, n_best: int, ranked: bool) -> None:
        self._beams, self._n_best = num_beams, n_best
        self._ranked = ranked  # a complete reply must be among its length's num_beams best
        self._order = itertools.count()
        self._queue: list[tuple[float, int, Hypothesis]] = []
        self._taken: Counter[tuple[int, str]] = Counter()
        self._spare: list[Hypothesis] = []  # given up for the answer; the other spans may need them
        self.pruned_log_prob = -math.inf  # log P of the best partial reply that was given up
        self.found: dict[str | int, Hypothesis] = {}
        self._push(root)

    def advance(self) -> list[Hypothesis]:
        """Go on as far as known; return the nodes to run next, or none where all is found."""
        while len(self.found) < self._n_best:
            if self._spare and self.found:  # the answer is found as if it alone were asked for
                self._widen()
            if not self._queue:
                break
            node = self._queue[0][2]
            full = self._taken[node.length, node.kind] >= self._beams
            if full and node.kind != "complete":
                self._pop()
                self.prune(node.log_prob)
                if self._n_best > 1 and not self.found:
                    self._spare.append(node)
            elif node.kind == "complete":
                self._pop()
                rank = sum(self._taken[node.length, kind] for kind in ("open", "complete"))
                if not self._ranked or rank <= self._beams:
                    self.found.setdefault(node.text or len(self.found), node)
            elif node.children is None:
                return self._wanted(node.log_prob)
            else:
                self._pop()
                for child in node.children:
                    self._push(child)
        return []

    def set_aside(self, nodes: Sequence[Hypothesis]) -> None:
        """Keep nodes that the answer's search gives up, for the other spans."""
        self._spare += nodes

    def prune(self, log_prob: float) -> None:
        """Note that a partial reply of this log-probability was given up."""
        self.pruned_log_prob = max(self.pruned_log_prob, log_prob)

    @property
    def branches(self) -> list[Branch]:
        """The branches that may yet grow."""
        return _growing([*self._spare, *(node for _, _, node in self._queue)])

    def _widen(self) -> None:
        self._beams = max(self._beams, N_BEST_BEAMS * self._n_best)
        for node in self._spare:
            self._push(node)
        self._spare.clear()

    def _push(self, node: Hypothesis) -> None:
        heapq.heappush(self._queue, (-node.log_prob, next(self._order), node))

    def _pop(self) -> None:
        node = heapq.heappop(self._queue)[2]
        self._taken[node.length, node.kind] += 1

    def _wanted(self, best: float) -> list[Hypothesis]:
        nearest = heapq.nsmallest(self._beams, self._queue)
        return [
            node
            for _, _, node in nearest
            if node.children is None
            and node.kind != "complete"
            and node.log_prob >= best - SPECULATION
            and self._taken[node.length, node.kind] < self._beams
        ]


class BeamSearch:
    """Synchronous beam search, with a length penalty, for one question in free decoding.

    A complete reply counts log P / tokens ** ``length_penalty``. That does not fall as a reply
    grows, so the search ends as ``generate`` ends it (early_stopping=False): when no open reply, at
    its length, beats the worst of ``num_beams`` complete ones.
    """

    pruned_log_prob = -math.inf

    def __init__(self, root: Hypothesis, num_beams: int, length_penalty: float, stops: int) -> None:
        self._beams, self._penalty = num_beams, length_penalty
        self._kept = num_beams * max(2, 1 + stops)
        self._running = [root]
        self._complete: list[tuple[float, Hypothesis]] = []

    def advance(self) -> list[Hypothesis]:
        """Go on as far as known; return the nodes to run next, or none where all is found."""
        while self._running:
            unknown = [node for node in self._running if node.children is None]
            if unknown:
                return unknown
            children = [child for node in self._running for child in node.children or []]
            children.sort(key=lambda child: -child.log_prob)
            done = [child for child in children[: self._beams] if child.kind == "complete"]
            pool = [*self._complete, *((self._score(child), child) for child in done)]
            self._complete = sorted(pool, key=lambda pair: -pair[0])[: self._beams]
            still = [child for child in children[: self._kept] if child.kind == "open"]
            self._running = still[: self._beams] if self._may_improve(still) else []
        return []

    @property
    def found(self) -> dict[int, Hypothesis]:
        """The best complete reply."""
        return dict(enumerate(node for _, node in self._complete[:1]))

    @property
    def branches(self) -> list[Branch]:
        """The branches that may yet grow."""
        return _growing(self._running)

    def set_aside(self, nodes: Sequence[Hypothesis]) -> None:
        """Forget nodes: one reply is looked for."""

    def prune(self, log_prob: float) -> None:
        """Note nothing: what a search by length gave up is not comparable."""

    def _score(self, node: Hypothesis) -> float:
        return node.log_prob / node.length**self._penalty

    def _may_improve(self, still: Sequence[Hypothesis]) -> bool:
        if len(self._complete) < self._beams:
            return True
        return bool(still) and self._score(still[0]) > self._complete[-1][0]


def _growing(nodes: Sequence[Hypothesis]) -> list[Branch]:
    """Return the branches of hypotheses, and those that were run ahead of them."""
    guessed = (one for node in nodes for one in (node, *(node.children or ())))
    return [
        *(node.branch or node.stem for node in nodes),
        *(ahead.branch for node in guessed for ahead in node.ahead),
    ]
