"""Answer the questions of a paragraph: its context is run once, and one search decodes them all.

**One tree a paragraph.** The prompts of a paragraph's questions begin with the same tokens. They
are run once into a key/value cache; the questions branch off it, and so does every partial reply
that the search looks at. Each token attends to its own ancestors (a 4D mask) at its own depth
(position ids), so nothing is copied and nothing is run twice (``TokenTree``).

**One search.** Log-probabilities only fall as a reply grows. So partial replies are taken from a
queue, likeliest first, and the first complete one to come off it is the best: beam search's answer,
for the model calls of a single reply where the model is sure (best-first beam search, Meister,
Vieira and Cotterell 2020, https://aclanthology.org/2020.tacl-1.51). ``num_beams`` bounds how many
partial replies of one length are taken, so the worst case is beam search's, too (``_Search``).

- ``free``: any tokens; the sequences of ``model.generate(num_beams=N, length_penalty=0.0,
  do_sample=False)`` on each prompt alone.
- ``span``: a span of the context or no answer (``llama_squad.spans``). The envelope is forced and
  costs no steps: the header is part of the prompt, the tail is one pass.
"""

import heapq
import itertools
import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from llama_squad.answers import NO_ANSWER, format_answer
from llama_squad.collator import ConversationEncoder
from llama_squad.spans import (
    Boundaries,
    SpanGrammar,
    State,
    find_span,
    reply_ids,
    span_vocabulary,
)
from llama_squad.tree import Branch, TokenTree, check_tree, common_prefix, is_out_of_memory

SPECULATION = 0.7
"""Partial replies this close (in nats) to the likeliest one are run along with it: they will
probably be wanted next, and a pass over two tokens costs little more than over one."""

N_BEST_BEAMS = 20
"""Once its answer is found, a search for more spans takes so many partial replies of a length for
each of them."""

SEARCHED_TOKENS = 16
"""About so many tokens a beam and question are in the tree at once, to estimate its memory."""

STEM_ALONE = 1024
"""A longer context is run before its questions: a pass of its own needs no mask."""

LEAST_QUESTIONS, MOST_QUESTIONS = 32, 512
"""Bounds of the default batch size."""

COMPACT_AFTER = 256
"""The tree drops its dead branches when it has grown by so many tokens."""


@dataclass(frozen=True)
class Span:
    """A span and log P(reply that holds it), from after the forced header to the end of turn.

    ``start`` is the character of the context at which it first stands as a span may.
    """

    text: str
    log_prob: float
    start: int | None = None


@dataclass(frozen=True)
class Reply:
    """What the model says to one question.

    Attributes:
        completion: the whole reply, without the token that ends the turn.
        token_ids: its tokens, with the token that ends the turn.
        score: its log-probability: in span decoding given the forced header (the tokens of
            ``ANSWER_HEADER`` up to the colon), through the end of the turn; in free decoding of
            all its tokens. None where nobody tells (servers).
        best: the span that the search found first (span decoding; None where the context holds
            none). Its log-probability is that of its likeliest tokens; other ways to spell it are
            not added.
        spans: the ``n_best`` likeliest spans, best first. Of more than one, the first may beat
            ``best``, where ``num_beams`` was too few to find it.
        no_answer_log_prob: log P of the reply that abstains, scored over the same stretch.
        na_prob: sigmoid(no_answer_log_prob - best.log_prob): the chance of "no answer" if it is
            that or the best span. None in free decoding.
        certain: no reply that ``num_beams`` cut off could have been better.
    """

    completion: str
    token_ids: list[int]
    score: float | None
    best: Span | None = None
    spans: tuple[Span, ...] = ()
    no_answer_log_prob: float | None = None
    na_prob: float | None = None
    certain: bool = False


@dataclass(frozen=True)
class Paragraph:
    """The questions of one context: the ids of each one's prompt, ready for the reply."""

    context: str
    prompts: Sequence[list[int]]


# The search ----------------------------------------------------------------------------------


@dataclass
class _Node:
    """A partial reply: tokens after the prompt (in span decoding: after the header)."""

    log_prob: float
    ids: tuple[int, ...]
    level: int
    stem: Branch
    kind: Literal["open", "closing", "complete"] = "open"
    state: State = ()
    tail: Sequence[int] = ()  # forced tokens that follow (closing)
    text: str = ""  # the span (closing, complete)
    branch: Branch | None = None  # once it was run
    children: "list[_Node] | None" = None


class _Search:
    """Best-first beam search for one question.

    It tells which nodes it needs run (``advance``), and is told their logits' outcome by setting
    ``children``; what it has done so far is the same whatever else was run ahead of need.
    """

    def __init__(self, root: _Node, num_beams: int, n_best: int, ranked: bool) -> None:
        self._beams, self._n_best = num_beams, n_best
        self._ranked = ranked  # a complete reply must be among its length's num_beams best
        self._order = itertools.count()
        self._queue: list[tuple[float, int, _Node]] = []
        self._taken: Counter[tuple[int, str]] = Counter()
        self._spare: list[_Node] = []  # given up for the answer; the other spans may need them
        self.cut_off = -math.inf  # log P of the best partial reply that was given up
        self.found: dict[str | int, _Node] = {}
        self._push(root)

    def advance(self) -> list[_Node]:
        """Go on as far as known; return the nodes to run next, or none where all is found."""
        while len(self.found) < self._n_best:
            if self._spare and self.found:  # the answer is found as if it alone were asked for
                self._widen()
            if not self._queue:
                break
            node = self._queue[0][2]
            full = self._taken[node.level, node.kind] >= self._beams
            if full and node.kind != "complete":
                self._pop()
                self.cut(node.log_prob)
                if self._n_best > 1 and not self.found:
                    self._spare.append(node)
            elif node.kind == "complete":
                self._pop()
                rank = sum(self._taken[node.level, kind] for kind in ("open", "complete"))
                if not self._ranked or rank <= self._beams:
                    self.found.setdefault(node.text or len(self.found), node)
            elif node.children is None:
                return self._wanted(node.log_prob)
            else:
                self._pop()
                for child in node.children:
                    self._push(child)
        return []

    def set_aside(self, nodes: Sequence[_Node]) -> None:
        """Keep nodes that the answer's search gives up, for the other spans."""
        self._spare += nodes

    def cut(self, log_prob: float) -> None:
        """Note that a partial reply of this log-probability was given up."""
        self.cut_off = max(self.cut_off, log_prob)

    @property
    def branches(self) -> list[Branch]:
        """The branches that may yet grow."""
        nodes = [*self._spare, *(node for _, _, node in self._queue)]
        return [node.branch or node.stem for node in nodes]

    def _widen(self) -> None:
        self._beams = max(self._beams, N_BEST_BEAMS * self._n_best)
        for node in self._spare:
            self._push(node)
        self._spare.clear()

    def _push(self, node: _Node) -> None:
        heapq.heappush(self._queue, (-node.log_prob, next(self._order), node))

    def _pop(self) -> None:
        node = heapq.heappop(self._queue)[2]
        self._taken[node.level, node.kind] += 1

    def _wanted(self, best: float) -> list[_Node]:
        nearest = heapq.nsmallest(self._beams, self._queue)
        return [
            node
            for _, _, node in nearest
            if node.children is None
            and node.kind != "complete"
            and node.log_prob >= best - SPECULATION
            and self._taken[node.level, node.kind] < self._beams
        ]


class _BeamSearch:
    """Beam search in lockstep, with a length penalty, for one question in free decoding.

    A complete reply counts log P / tokens ** ``length_penalty``. That does not fall as a reply
    grows, so the search ends as ``generate`` ends it (early_stopping=False): when no open reply, at
    its length, beats the worst of ``num_beams`` complete ones.
    """

    cut_off = -math.inf

    def __init__(self, root: _Node, num_beams: int, length_penalty: float, stops: int) -> None:
        self._beams, self._penalty = num_beams, length_penalty
        self._kept = num_beams * max(2, 1 + stops)
        self._running = [root]
        self._complete: list[tuple[float, _Node]] = []

    def advance(self) -> list[_Node]:
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
    def found(self) -> dict[int, _Node]:
        """The best complete reply."""
        return dict(enumerate(node for _, node in self._complete[:1]))

    @property
    def branches(self) -> list[Branch]:
        """The branches that may yet grow."""
        return [node.branch or node.stem for node in self._running]

    def cut(self, log_prob: float) -> None:
        """Note nothing: what a search by length gave up is not comparable."""

    def _score(self, node: _Node) -> float:
        return node.log_prob / node.level**self._penalty

    def _may_improve(self, still: Sequence[_Node]) -> bool:
        if len(self._complete) < self._beams:
            return True
        return bool(still) and self._score(still[0]) > self._complete[-1][0]


# The generator -------------------------------------------------------------------------------


class Generator:
    """Decode the replies to the questions of paragraphs.

    Args:
        model: a causal language model with ``sdpa`` or ``eager`` attention, on any device.
        encoder: the tokenizer's, with the chat template.
        decoding: "span" or "free"; see the module.
        num_beams: partial replies of one length that the search takes at most.
        max_new_tokens: length limit of a reply (in span decoding of the span).
        na_prob_thresh: the reply abstains where na_prob is above it (span decoding).
        n_best: how many distinct spans to find (span decoding). The answer is the same for any.
        length_penalty: a complete reply of several beams counts log P / tokens ** this, as with
            ``generate`` (free decoding; 0: the likeliest reply).
        span_boundaries: "word": a span begins and ends at word boundaries and holds a letter or
            digit; "any": every substring is a span.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: ConversationEncoder,
        *,
        decoding: Literal["span", "free"] = "span",
        num_beams: int = 1,
        max_new_tokens: int = 256,
        na_prob_thresh: float = 0.5,
        n_best: int = 1,
        length_penalty: float = 0.0,
        span_boundaries: Boundaries = "word",
    ) -> None:
        self.model = model
        self.tokenizer = encoder.tokenizer
        self.num_beams = num_beams
        self.max_new_tokens = max_new_tokens
        self.na_prob_thresh = na_prob_thresh
        self.n_best = n_best
        self.length_penalty = length_penalty
        self.span_boundaries = span_boundaries
        self.vocabulary = span_vocabulary(encoder) if decoding == "span" else None
        self.stop_ids = stop_ids(model, encoder)
        config = model.config.get_text_config()
        self.positions: int | None = getattr(config, "max_position_embeddings", None)
        self._too_many = math.inf  # questions that memory did not hold

    def reply(self, paragraphs: Sequence[Paragraph]) -> list[list[Reply]]:
        """Answer all questions of several paragraphs at once: a list of replies a paragraph.

        A batch that is not likely to fit into free memory is halved, and so is one that did not
        after all; later ones of its size are, beforehand.

        Raises:
            ValueError: this architecture cannot share contexts (see ``check_tree``).
        """
        check_tree(self.model, paragraphs[0].prompts[0])
        halves = _halve(paragraphs)
        questions = sum(len(paragraph.prompts) for paragraph in paragraphs)
        fits = questions < self._too_many and self._memory_needed(paragraphs) < free_memory()
        if fits or not halves:
            try:
                return _Batch(self, paragraphs).replies()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if not halves:
                    error.add_note("One question alone does not fit: --quantize the model.")
                    raise
                self._too_many = questions
            # Out of the handler, which kept the failed pass's tensors alive.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        replies = [row for half in halves for row in self.reply(half)]
        if len(paragraphs) == 1:  # the questions of one paragraph were parted
            return [[reply for row in replies for reply in row]]
        return replies

    def search(self, root: _Node) -> "_Search | _BeamSearch":
        """Return a new search for the reply to one question."""
        if self.vocabulary:
            return _Search(root, self.num_beams, self.n_best, ranked=False)
        if self.length_penalty and self.num_beams > 1:
            return _BeamSearch(root, self.num_beams, self.length_penalty, len(self.stop_ids))
        return _Search(root, self.num_beams, 1, ranked=True)

    def room(self, prompt: int) -> float:
        """Return how many tokens a reply (a span) may have after a prompt of so many tokens."""
        if self.positions is None:
            return math.inf
        forced = 0
        if self.vocabulary:
            tail = max(len(self.vocabulary.no_answer), *map(len, self.vocabulary.tails.values()))
            forced = len(self.vocabulary.header) + tail
        return self.positions - prompt - forced

    def batch_size(self) -> int:
        """Return how many questions to answer at once: 32, on a GPU more as its memory allows.

        Reckoned for paragraphs of ten questions and 400 tokens, for half of what is free, and a
        power of two, so that the same card gives the same number.
        """
        if not torch.cuda.is_available():
            return LEAST_QUESTIONS
        paragraph = Paragraph("", [[0] * 400 + [question + 1] * 40 for question in range(10)])
        fit = 10 * 0.5 * free_memory() / self._memory_needed([paragraph])
        power = 2 ** int(math.log2(max(fit, LEAST_QUESTIONS)))
        return min(power, MOST_QUESTIONS)

    def _memory_needed(self, paragraphs: Sequence[Paragraph]) -> float:
        """Estimate the bytes of a batch: keys and values, activations and logits of a pass."""
        config = self.model.config.get_text_config()
        size = self.model.dtype.itemsize
        attention_heads = config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // attention_heads
        stems = [common_prefix(p.prompts) for p in paragraphs]
        branches = [
            sum(len(ids) - stem + self.num_beams * SEARCHED_TOKENS for ids in p.prompts)
            for p, stem in zip(paragraphs, stems, strict=True)
        ]
        length = max(map(operator.add, stems, branches))  # positions of a row, and of its one pass
        cache = 2 * config.num_hidden_layers * heads * width * length * size
        activations = length * (8 * config.hidden_size * size + length * 4)
        questions = sum(len(p.prompts) for p in paragraphs)
        logits = 8 * questions * config.vocab_size * (size + 8)
        return len(paragraphs) * cache + activations + logits


def free_memory() -> float:
    """Return the bytes that a batch may take: on a GPU, else of the machine where it tells."""
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
        return 0.9 * (free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 0.9 * next(1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return math.inf


def stop_ids(model: PreTrainedModel, encoder: ConversationEncoder) -> frozenset[int]:
    """Return the tokens that end a reply: the model's own, and the chat template's end of turn."""
    found: set[int] = set()
    for source in (model.generation_config, encoder.tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    end_of_turn = reply_ids(encoder, NO_ANSWER)[-1]
    if end_of_turn in encoder.tokenizer.added_tokens_decoder:
        found.add(end_of_turn)
    return frozenset(found)


def _halve(paragraphs: Sequence[Paragraph]) -> list[list[Paragraph]]:
    """Part a batch, by paragraphs or, where there is one, by its questions; [] if it cannot be."""
    if len(paragraphs) > 1:
        middle = len(paragraphs) // 2
        return [list(paragraphs[:middle]), list(paragraphs[middle:])]
    context, prompts = paragraphs[0].context, paragraphs[0].prompts
    middle = len(prompts) // 2
    return [[Paragraph(context, part)] for part in (prompts[:middle], prompts[middle:])] * (
        middle > 0
    )


@dataclass
class _Question:
    root: _Node
    search: "_Search | _BeamSearch"
    grammar: SpanGrammar | None
    context: str
    longest: float
    """Tokens of its longest reply (in span decoding: of the span)."""
    no_answer_log_prob: float = 0.0


class _Batch:
    """Some paragraphs on their way from prompts to replies."""

    def __init__(self, generator: Generator, paragraphs: Sequence[Paragraph]) -> None:
        self._generator = generator
        self._vocabulary = generator.vocabulary
        # Each paragraph's context and questions are run by themselves: in 16 bits a pass of another
        # shape gives slightly other figures, and what stands beside a paragraph is chance.
        trees = [TokenTree(generator.model) for _ in paragraphs]
        pairs = zip(trees, paragraphs, strict=True)
        self._rows = [self._ask(tree, paragraph) for tree, paragraph in pairs]
        self._tree = TokenTree.join(trees)

    def replies(self) -> list[list[Reply]]:
        """Search until every question has its reply."""
        while True:
            wanted = [
                [(question, node) for question in row for node in question.search.advance()]
                for row in self._rows
            ]
            if not any(wanted):
                return [[self._finish(question) for question in row] for row in self._rows]
            self._compact()
            self._run(wanted)

    def _ask(self, tree: TokenTree, paragraph: Paragraph) -> list[_Question]:
        """Run a paragraph's questions, and in span decoding two ways in which replies may go on.

        One is the reply that abstains, whole, for its log-probability. The other is the lead, with
        which most answers begin. A context that is not too long is run in the same pass.
        """
        vocabulary = self._vocabulary
        cut = min(common_prefix(paragraph.prompts), *(len(ids) - 1 for ids in paragraph.prompts))
        branches: list[Branch] = []
        if cut > STEM_ALONE:
            stem = tree.plant([paragraph.prompts[0][:cut]])[0]
        else:
            stem = Branch(None, paragraph.prompts[0][:cut], wanted=0)
            branches.append(stem)
        questions = self._questions(paragraph, stem, cut)
        for question in questions:
            root = question.root.branch
            assert root is not None
            branches.append(root)
            if vocabulary:
                abstain, lead = vocabulary.no_answer[:-1], vocabulary.lead
                branches.append(Branch(root, abstain, len(abstain)))
                branches.append(Branch(root, lead))
        logits = tree.grow([branches]).unflatten(0, (len(questions), -1))
        roots = [(question, question.root) for question in questions]
        self._expand(roots, logits[:, 0], _norms(logits[:, 0]))
        if vocabulary:
            self._open(questions, branches[-3 * len(questions) :], logits)
        return questions

    def _questions(self, paragraph: Paragraph, stem: Branch, cut: int) -> list[_Question]:
        """Make the empty replies to a paragraph's questions; the header is forced on them."""
        generator, vocabulary = self._generator, self._vocabulary
        grammar = None
        if vocabulary:
            grammar = SpanGrammar(vocabulary, paragraph.context, generator.span_boundaries)
        questions = []
        for prompt in paragraph.prompts:
            tokens = prompt[cut:] + (vocabulary.header if vocabulary else [])
            branch = Branch(stem, tokens)
            root = _Node(0.0, (), 0, stem, state=grammar.start if grammar else (), branch=branch)
            longest = min(generator.max_new_tokens, generator.room(len(prompt)))
            search = generator.search(root)
            questions.append(_Question(root, search, grammar, paragraph.context, longest))
        return questions

    def _open(
        self, questions: Sequence[_Question], branches: Sequence[Branch], logits: torch.Tensor
    ) -> None:
        """Read what the abstentions and the leads of questions gave.

        ``branches`` are the root, the abstention and the lead of each question; ``logits`` theirs,
        of shape (questions, wanted tokens of the three, vocabulary).
        """
        vocabulary = self._vocabulary
        assert vocabulary is not None
        totals = _score(logits[:, :-1], vocabulary.no_answer).sum(1).tolist()
        opened, chosen = [], []
        for index, (question, total) in enumerate(zip(questions, totals, strict=True)):
            question.no_answer_log_prob = total
            for child in question.root.children or []:
                if list(child.ids) == vocabulary.lead:
                    child.branch = branches[3 * index + 2]
                    opened.append((question, child))
                    chosen.append(index)
        if opened:
            last = logits[chosen, -1]
            self._expand(opened, last, _norms(last))

    def _run(self, wanted: Sequence[Sequence[tuple[_Question, _Node]]]) -> None:
        """Run partial replies, a list of them a row, and find how each may go on."""
        for row in wanted:
            for _, node in row:
                forced = [*node.ids[-1:], *node.tail[:-1]]
                node.branch = Branch(node.stem, forced, max(1, len(node.tail)))
        branches = [[node.branch for _, node in row if node.branch] for row in wanted]
        pairs = [pair for row in wanted for pair in row]
        logits = self._tree.grow(branches)
        norms = _norms(logits)
        opened, rows, offset = [], [], 0
        for question, node in pairs:
            if node.kind == "open":
                opened.append((question, node))
                rows.append(offset)
            offset += max(1, len(node.tail))
        if opened:
            every = len(rows) == offset
            self._expand(opened, logits if every else logits[rows],
                         norms if every else norms[rows])  # fmt: skip
        if len(opened) < len(pairs):
            self._close(pairs, logits, norms)

    def _close(
        self, pairs: Sequence[tuple[_Question, _Node]], logits: torch.Tensor, norms: torch.Tensor
    ) -> None:
        """Complete the closing ones of some nodes: their tails' log-probabilities are added."""
        # One transfer for all of them; an open node has one row, of which nothing is read.
        tails = [node.tail or (0,) for _, node in pairs]
        ids = torch.tensor([[i] for tail in tails for i in tail], device=logits.device)
        scores = (logits.gather(1, ids) - norms).flatten().tolist()
        offset = 0
        for (_, node), tail in zip(pairs, tails, strict=True):
            if node.kind == "closing":
                total = math.fsum(scores[offset : offset + len(tail)])
                node.children = [
                    replace(node, log_prob=node.log_prob + total, ids=(*node.ids, *tail),
                            kind="complete", tail=())
                ]  # fmt: skip
            offset += len(tail)

    def _expand(
        self, nodes: Sequence[tuple[_Question, _Node]], logits: torch.Tensor, norms: torch.Tensor
    ) -> None:
        """Find the likeliest tokens that may follow each node, given its logits, a row each.

        ``norms`` are the rows' log-sums of exponentials, of shape (nodes, 1).
        """
        beams, vocabulary = self._generator.num_beams, self._vocabulary
        if vocabulary is None:
            top = logits.topk(min(beams + len(self._generator.stop_ids), logits.shape[-1]))
            scores, ids = (top.values - norms).tolist(), top.indices.tolist()
            for (question, node), row, tokens in zip(nodes, scores, ids, strict=True):
                pairs = zip(row, tokens, strict=True)
                node.children = [self._free_child(question, node, *pair) for pair in pairs]
            return
        following = [q.grammar.successors(node.state) for q, node in nodes if q.grammar]
        width = max(len(found.ids) for found in following)
        padded = torch.tensor([found.ids + [-1] * (width - len(found.ids)) for found in following])
        padded = padded.to(logits.device)
        allowed = logits.gather(1, padded.clamp(min=0)) - norms
        allowed.masked_fill_(padded < 0, -math.inf)
        most = 4 * beams
        top = allowed.topk(min(most, width) if self._generator.n_best == 1 else width)
        for (question, node), found, values, indices in zip(
            nodes, following, top.values.tolist(), top.indices.tolist(), strict=True
        ):
            assert isinstance(question.search, _Search)  # the only one of span decoding
            if len(found.ids) > most:
                question.search.cut(node.log_prob + values[most - 1])
            children = [
                self._span_child(question, node, value, found.ids[i], found.targets[i])
                for value, i in zip(values, indices, strict=True)
                if value > -math.inf
            ]
            # The answer must be the same whatever n_best is: the rest waits until it is found.
            node.children = [child for child in children[:most] if child is not None]
            question.search.set_aside([child for child in children[most:] if child is not None])

    def _free_child(self, question: _Question, node: _Node, score: float, token_id: int) -> _Node:
        assert node.branch is not None
        level = node.level + 1
        last = token_id in self._generator.stop_ids or level >= question.longest
        return _Node(
            node.log_prob + score, (*node.ids, token_id), level, node.branch,
            kind="complete" if last else "open",
        )  # fmt: skip

    def _span_child(
        self, question: _Question, node: _Node, score: float, token_id: int, target: list[int] | int
    ) -> _Node | None:
        vocabulary = self._vocabulary
        assert node.branch is not None and vocabulary is not None and question.grammar is not None
        level = node.level + 1
        child = _Node(node.log_prob + score, (*node.ids, token_id), level, node.branch)
        if not isinstance(target, int):
            if level >= question.longest:
                question.search.cut(child.log_prob)
                return None
            child.state = tuple(target)
            return child
        child.kind, child.tail = "closing", vocabulary.tails[target]
        child.text = question.grammar.read_span(child.ids, target)
        return child if child.text != NO_ANSWER else None

    def _compact(self) -> None:
        """Drop what no partial reply needs any more, where that is most of the tree."""
        if self._tree.grown < COMPACT_AFTER:
            return
        live = [[b for q in row for b in q.search.branches] for row in self._rows]
        if all(live):
            self._tree.compact(live)

    def _finish(self, question: _Question) -> Reply:
        found = list(question.search.found.values())
        if self._vocabulary is None:
            ids = list(found[0].ids)
            text = self._generator.tokenizer.decode(
                ids[:-1] if ids[-1] in self._generator.stop_ids else ids, skip_special_tokens=True
            )
            return Reply(str(text), ids, found[0].log_prob)
        abstain = question.no_answer_log_prob
        context, boundaries = question.context, self._generator.span_boundaries
        spans = [
            Span(node.text, node.log_prob, find_span(context, node.text, boundaries))
            for node in found
        ]
        best = spans[0] if spans else None
        na_prob = _sigmoid(abstain - best.log_prob) if best else 1.0
        text, ids, score = NO_ANSWER, list(self._vocabulary.no_answer), abstain
        if best and na_prob <= self._generator.na_prob_thresh:
            text, ids, score = best.text, list(found[0].ids), best.log_prob
        certain = best is not None and question.search.cut_off <= best.log_prob
        ranked = sorted(spans, key=lambda span: -span.log_prob)
        return Reply(
            format_answer(text), self._vocabulary.header + ids, score,
            best, tuple(ranked), abstain, na_prob, certain,
        )  # fmt: skip


def _norms(logits: torch.Tensor) -> torch.Tensor:
    """Return the log-sum of exponentials of each row of logits, of shape (rows, 1)."""
    return logits.logsumexp(-1, keepdim=True)


def _score(logits: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """Return the log-probability of each token, given logits of shape (..., tokens, vocabulary)."""
    index = torch.tensor(ids, device=logits.device).expand(logits.shape[:-1])
    return logits.gather(-1, index[..., None]).squeeze(-1) - logits.logsumexp(-1)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
