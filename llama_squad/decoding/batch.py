"""Paragraphs on their way from prompts to replies: what the searches ask for, run on one tree."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from llama_squad.decoding.cache import Branch, TokenTree
from llama_squad.decoding.constraints import Constraint, Grammar
from llama_squad.decoding.replies import Paragraph, Reply
from llama_squad.decoding.search import BeamSearch, BestFirstSearch, Closing, Hypothesis, Successors
from llama_squad.tree import adapted_alike, common_prefix

STEM_ALONE = 1024
"""A longer context is run before its questions: a pass of its own needs no mask."""

COMPACT_AFTER = 256
"""The tree drops its dead branches when it has grown by so many tokens."""


@dataclass
class DecodingOptions:
    """What all batches of a generator have in common; see ``Generator`` for what is not said."""

    model: PreTrainedModel
    constraint: Constraint
    num_beams: int
    n_best: int
    max_new_tokens: int
    length_penalty: float
    stops: int
    """How many tokens end a reply."""

    @property
    def positions(self) -> int | None:
        """How many tokens the model has positions for; None where it does not say."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    def room(self, prompt: int) -> float:
        """Return how many tokens a reply (a span) may have after a prompt of so many tokens."""
        if self.positions is None:
            return math.inf
        return self.positions - prompt - self.constraint.reserve

    def search(self, root: Hypothesis) -> "BestFirstSearch | BeamSearch":
        """Return a new search for the reply to one question."""
        ranked = self.constraint.ranked
        if ranked and self.length_penalty and self.num_beams > 1:
            return BeamSearch(root, self.num_beams, self.length_penalty, self.stops)
        return BestFirstSearch(root, self.num_beams, 1 if ranked else self.n_best, ranked)


@dataclass
class _Question:
    root: Hypothesis
    search: "BestFirstSearch | BeamSearch"
    grammar: Grammar
    longest: float
    """Tokens of its longest reply (in span decoding: of the span)."""
    alternative: float = 0.0
    """Log P of the constraint's alternative."""


class DecodingBatch:
    """Some paragraphs on their way from prompts to replies."""

    def __init__(self, options: DecodingOptions, paragraphs: Sequence[Paragraph]) -> None:
        self._options, self._constraint = options, options.constraint
        # Each paragraph's context and questions are run by themselves: in 16 bits a pass of another
        # shape gives slightly other figures, and what stands beside a paragraph is chance.
        trees = [TokenTree(options.model) for _ in paragraphs]
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
                return [[_finish(question) for question in row] for row in self._rows]
            self._compact()
            self._run(wanted)

    def _ask(self, tree: TokenTree, paragraph: Paragraph) -> list[_Question]:
        """Run a paragraph's questions, and beside each the constraint's alternative and opening.

        A context that is not too long is run in the same pass.
        """
        cut = min(common_prefix(paragraph.prompts), *(len(ids) - 1 for ids in paragraph.prompts))
        cut = adapted_alike(cut, paragraph.adapter_from)
        acts = min(paragraph.adapter_from, default=None)
        branches: list[Branch] = []
        if cut > STEM_ALONE:
            stem = tree.prefill([paragraph.prompts[0][:cut]], acts)[0]
        else:
            stem = Branch(None, paragraph.prompts[0][:cut], wanted=0, adapter_from=acts)
            branches.append(stem)
        questions = self._questions(paragraph, stem, cut)
        alternative, opening = list(self._constraint.alternative), list(self._constraint.opening)
        openings = []
        for question in questions:
            root = question.root.branch
            assert root is not None
            branches.append(root)
            if alternative:
                branches.append(Branch(root, alternative[:-1], len(alternative) - 1))
            if opening:
                openings.append(Branch(root, opening))
                branches.append(openings[-1])
        logits = tree.extend([branches]).unflatten(0, (len(questions), -1))
        roots = [(question, question.root) for question in questions]
        self._expand(roots, logits[:, 0], _norms(logits[:, 0]))
        if alternative:
            totals = _score(logits[:, : len(alternative)], alternative).sum(1).tolist()
            for question, total in zip(questions, totals, strict=True):
                question.alternative = total
        if openings:
            self._open(questions, openings, logits[:, -1])
        return questions

    def _questions(self, paragraph: Paragraph, stem: Branch, cut: int) -> list[_Question]:
        """Make the empty replies to a paragraph's questions; the header is forced on them."""
        options, constraint = self._options, self._constraint
        grammar = constraint.grammar(paragraph.context)
        questions = []
        nowhere: Sequence[int | None] = [None] * len(paragraph.prompts)
        starts = paragraph.adapter_from or nowhere
        for prompt, acts in zip(paragraph.prompts, starts, strict=True):
            branch = Branch(stem, [*prompt[cut:], *constraint.header], adapter_from=acts)
            root = Hypothesis(0.0, (), 0, stem, state=grammar.start, branch=branch)
            longest = min(options.max_new_tokens, options.room(len(prompt)))
            questions.append(_Question(root, options.search(root), grammar, longest))
        return questions

    def _open(
        self, questions: Sequence[_Question], branches: Sequence[Branch], logits: torch.Tensor
    ) -> None:
        """Read what the openings gave that were run beside the questions, a branch and row each."""
        opened, chosen = [], []
        for index, (question, branch) in enumerate(zip(questions, branches, strict=True)):
            for child in question.root.children or []:
                if list(child.ids) == branch.tokens and child.kind == "open":
                    child.branch = branch
                    opened.append((question, child))
                    chosen.append(index)
        if opened:
            last = logits[chosen]
            self._expand(opened, last, _norms(last))

    def _run(self, wanted: Sequence[Sequence[tuple[_Question, Hypothesis]]]) -> None:
        """Run hypotheses, a list of them a row, and find how each may go on."""
        for row in wanted:
            for _, node in row:
                forced = [*node.ids[-1:], *node.forced_suffix[:-1]]
                node.branch = Branch(node.stem, forced, max(1, len(node.forced_suffix)))
        branches = [[node.branch for _, node in row if node.branch] for row in wanted]
        pairs = [pair for row in wanted for pair in row]
        logits = self._tree.extend(branches)
        norms = _norms(logits)
        opened, rows, offset = [], [], 0
        for question, node in pairs:
            if node.kind == "open":
                opened.append((question, node))
                rows.append(offset)
            offset += max(1, len(node.forced_suffix))
        if opened:
            every = len(rows) == offset
            self._expand(opened, logits if every else logits[rows],
                         norms if every else norms[rows])  # fmt: skip
        if len(opened) < len(pairs):
            _close(pairs, logits, norms)

    def _expand(
        self,
        nodes: Sequence[tuple[_Question, Hypothesis]],
        logits: torch.Tensor,
        norms: torch.Tensor,
    ) -> None:
        """Find the likeliest tokens that may follow each hypothesis, given its logits, a row each.

        ``norms`` are the rows' log-sums of exponentials, of shape (hypotheses, 1).
        """
        options = self._options
        most = self._constraint.width(options.num_beams)
        following = [question.grammar.successors(node.state) for question, node in nodes]
        rows = _likeliest(following, logits, norms, most if options.n_best == 1 else None)
        for (question, node), found, row in zip(nodes, following, rows, strict=True):
            if found.ids is not None and len(found.ids) > most:
                question.search.prune(node.log_prob + row[most - 1][0])
            children = [self._child(question, node, *item) for item in row]
            # The answer must be the same whatever n_best is: the rest waits until it is found.
            node.children = [child for child in children[:most] if child is not None]
            question.search.set_aside([child for child in children[most:] if child is not None])

    def _child(
        self, question: _Question, node: Hypothesis, score: float, token_id: int, target: Any
    ) -> Hypothesis | None:
        assert node.branch is not None
        ids, length = (*node.ids, token_id), node.length + 1
        child = Hypothesis(node.log_prob + score, ids, length, node.branch)
        step = question.grammar.step(ids, target)
        if step is None:
            return None
        if isinstance(step, Closing):
            child.kind = "closing" if step.tail else "complete"
            child.forced_suffix, child.text = step.tail, step.text
        elif length < question.longest:
            child.state = step
        elif self._constraint.truncates:
            child.kind = "complete"
        else:
            question.search.prune(child.log_prob)
            return None
        return child

    def _compact(self) -> None:
        """Drop what no hypothesis needs any more, where that is most of the tree."""
        if self._tree.grown < COMPACT_AFTER:
            return
        live = [[b for q in row for b in q.search.branches] for row in self._rows]
        if all(live):
            self._tree.compact(live)


def _finish(question: _Question) -> Reply:
    search = question.search
    return question.grammar.read(
        list(search.found.values()), question.alternative, search.pruned_log_prob
    )


def _close(
    pairs: Sequence[tuple[_Question, Hypothesis]], logits: torch.Tensor, norms: torch.Tensor
) -> None:
    """Complete the closing ones of some hypotheses: their tails' log-probabilities are added."""
    # One transfer for all of them; an open hypothesis has one row, of which nothing is read.
    tails = [node.forced_suffix or (0,) for _, node in pairs]
    ids = torch.tensor([[i] for tail in tails for i in tail], device=logits.device)
    scores = (logits.gather(1, ids) - norms).flatten().tolist()
    offset = 0
    for (_, node), tail in zip(pairs, tails, strict=True):
        if node.kind == "closing":
            total = math.fsum(scores[offset : offset + len(tail)])
            node.children = [
                replace(node, log_prob=node.log_prob + total, ids=(*node.ids, *tail),
                        kind="complete", forced_suffix=())
            ]  # fmt: skip
        offset += len(tail)


def _likeliest(
    following: Sequence[Successors],
    logits: torch.Tensor,
    norms: torch.Tensor,
    most: int | None,
) -> list[list[tuple[float, int, Any]]]:
    """Return the likeliest of the tokens that may follow: log P, token and target, best first.

    Args:
        following: of each hypothesis; either all of them admit any token, or none does.
        logits: of shape (hypotheses, vocabulary), and
        norms: their log-sums of exponentials, of shape (hypotheses, 1).
        most: how many of each; None: all.
    """
    if following[0].ids is None:
        top = logits.topk(min(most or logits.shape[-1], logits.shape[-1]))
        rows = zip((top.values - norms).tolist(), top.indices.tolist(), strict=True)
        return [[(value, i, None) for value, i in zip(*row, strict=True)] for row in rows]
    listed = [found.ids or [] for found in following]
    width = max(map(len, listed))
    padded = torch.tensor([ids + [-1] * (width - len(ids)) for ids in listed])
    padded = padded.to(logits.device)
    allowed = logits.gather(1, padded.clamp(min=0)) - norms
    allowed.masked_fill_(padded < 0, -math.inf)
    top = allowed.topk(min(most or width, width))
    return [
        [
            (value, ids[i], found.targets[i])
            for value, i in zip(values, indices, strict=True)
            if value > -math.inf
        ]
        for found, ids, values, indices in zip(
            following, listed, top.values.tolist(), top.indices.tolist(), strict=True
        )
    ]


def _norms(logits: torch.Tensor) -> torch.Tensor:
    """Return the log-sum of exponentials of each row of logits, of shape (rows, 1)."""
    return logits.logsumexp(-1, keepdim=True)


def _score(logits: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """Return the log-probability of each token, given logits of shape (..., tokens, vocabulary)."""
    index = torch.tensor(ids, device=logits.device).expand(logits.shape[:-1])
    return logits.gather(-1, index[..., None]).squeeze(-1) - logits.logsumexp(-1)
