"""Paragraphs on their way from prompts to replies: what the searches ask for, run on one tree."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from llama_squad.answers import NO_ANSWER, format_answer
from llama_squad.decoding.boundaries import find_span
from llama_squad.decoding.cache import Branch, TokenTree
from llama_squad.decoding.generator import Generator
from llama_squad.decoding.replies import Paragraph, Reply, Span
from llama_squad.decoding.search import _BeamSearch, _Node, _Search
from llama_squad.decoding.spans import SpanGrammar
from llama_squad.tree import common_prefix

STEM_ALONE = 1024
"""A longer context is run before its questions: a pass of its own needs no mask."""

COMPACT_AFTER = 256
"""The tree drops its dead branches when it has grown by so many tokens."""


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
