"""Paragraphs on their way from prompts to replies: what the searches ask for, run on one tree."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from llama_squad.decoding.cache import Branch, TokenTree
from llama_squad.decoding.constraints import Constraint, Grammar
from llama_squad.decoding.kept import LONGEST_KEPT, STEM_ALONE, Kept
from llama_squad.decoding.lookahead import attach, guess, guesses
from llama_squad.decoding.replies import Paragraph, Reply
from llama_squad.decoding.scores import complete, likeliest, log_norms, token_scores
from llama_squad.decoding.search import (
    Ahead,
    BeamSearch,
    BestFirstSearch,
    Closing,
    Hypothesis,
    Successors,
)
from llama_squad.tree import adapted_alike, common_prefix, rope_limit

COMPACT_AFTER = 256
"""The tree drops its dead branches when it has grown by so many tokens."""

KEPT_ROWS = 0.75
"""The share of its rows at which the tree drops the finished ones: a pass runs over all it has."""


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
    kept: Kept

    @property
    def positions(self) -> int | None:
        """How many tokens the model has positions for; None where it does not say.

        At most as many as do not depend on what else is in a pass, nor on the tokens to come.
        """
        known = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min(filter(None, (known, rope_limit(self.model.config))), default=None)

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


_Wanted = list[tuple[_Question, Hypothesis]]
"""What a row wants run."""


class DecodingBatch:
    """Some paragraphs on their way from prompts to replies."""

    def __init__(self, options: DecodingOptions, paragraphs: Sequence[Paragraph]) -> None:
        self._options, self._constraint = options, options.constraint
        # Each paragraph's context and questions are run by themselves: in 16 bits a pass of another
        # shape gives slightly other figures, and what stands beside a paragraph is chance.
        trees = [TokenTree(options.model) for _ in paragraphs]
        pairs = zip(trees, paragraphs, strict=True)
        self._paragraphs = [self._ask(tree, paragraph) for tree, paragraph in pairs]
        self._rows = self._paragraphs  # of the tree: those that are not finished
        self._tree = TokenTree.join(trees)

    def replies(self) -> list[list[Reply]]:
        """Search until every question has its reply."""
        while True:
            wanted = [
                [(question, node) for question in row for node in self._advance(question)]
                for row in self._rows
            ]
            if not any(wanted):
                return [[_finish(question) for question in row] for row in self._paragraphs]
            self._run(self._drop_finished(wanted))

    def _ask(self, tree: TokenTree, paragraph: Paragraph) -> list[_Question]:
        """Run a paragraph's questions, and beside each the constraint's alternative and opening.

        A context that is neither kept nor too long is run in the same pass, after what all prompts
        begin with.
        """
        cut = min(common_prefix(paragraph.prompts), *(len(ids) - 1 for ids in paragraph.prompts))
        cut = adapted_alike(cut, paragraph.adapter_from)
        cut = min([cut, *(hidden.start for hidden in paragraph.hidden)])
        acts = min(paragraph.adapter_from, default=None)
        branches: list[Branch] = []
        known = min(paragraph.prefix, cut, *paragraph.adapter_from)
        kept = min(paragraph.stem, cut)
        first, options = paragraph.prompts[0], self._options
        if options.kept.keeps_contexts and known < kept <= LONGEST_KEPT:
            stem, known = options.kept.begin_context(tree, first[:kept], known, acts), kept
        elif cut > STEM_ALONE:
            stem, known = tree.prefill(first[:cut], acts), cut
        else:
            stem = options.kept.begin(tree, first[:known]) if known else tree.prefill([])
        if own := first[known:cut]:
            stem = Branch(stem, own, wanted=0, adapter_from=acts)
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
        self._expand(roots, logits[:, 0], log_norms(logits[:, 0]))
        if alternative:
            totals = token_scores(logits[:, : len(alternative)], alternative).sum(1).tolist()
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
        filler = paragraph.hidden or [range(0)] * len(paragraph.prompts)
        for prompt, acts, hidden in zip(paragraph.prompts, starts, filler, strict=True):
            tokens = [*prompt[cut:], *constraint.header]
            branch = Branch(stem, tokens, adapter_from=acts, hidden=hidden)
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
            self._expand(opened, last, log_norms(last))

    def _advance(self, question: _Question) -> list[Hypothesis]:
        """Advance a question's search, by what was run ahead too; return what it wants run."""
        while True:
            wanted = question.search.advance()
            known = [node for node in wanted if node.ahead]
            if not known:
                return wanted
            for node in known:
                first, *rest = node.ahead
                node.branch, node.ahead = first.branch, ()
                self._set_children(question, node, first.following, first.likeliest)
                attach(node, rest)

    def _run(self, wanted: Sequence[_Wanted]) -> None:
        """Run hypotheses, a list of them a row, and find how each may go on."""
        for row in wanted:
            for _, node in row:
                forced = [*node.ids[-1:], *node.forced_suffix[:-1]]
                node.branch = Branch(node.stem, forced, max(1, len(node.forced_suffix)))
        room = guesses([sum(len(n.branch.tokens) for _, n in row if n.branch) for row in wanted])
        branches: list[list[Branch]] = []
        opened, closing, chains = [], [], []
        offset = 0
        for row in wanted:
            branches.append([])
            for question, node in row:
                assert node.branch is not None
                branches[-1].append(node.branch)
                if node.kind == "open":
                    opened.append((question, node, offset))
                    chain = guess(question.grammar, node, room, question.longest)
                    branches[-1] += [branch for branch, _ in chain]
                    chains.append((node, chain, offset + 1))
                    offset += 1 + len(chain)
                else:
                    closing.append((node, offset))
                    offset += node.branch.wanted
        logits = self._tree.extend(branches)
        norms = log_norms(logits)
        if opened:
            rows = [row for _, _, row in opened]
            every = len(rows) == offset
            self._expand([(question, node) for question, node, _ in opened],
                         logits if every else logits[rows],
                         norms if every else norms[rows])  # fmt: skip
        self._keep_ahead(chains, logits, norms)
        complete(closing, logits, norms)

    def _keep_ahead(
        self,
        chains: Sequence[tuple[Hypothesis, list[tuple[Branch, Successors]], int]],
        logits: torch.Tensor,
        norms: torch.Tensor,
    ) -> None:
        """Keep what guesses gave: of each hypothesis, from a row of the logits on."""
        rows = [first + i for _, chain, first in chains for i in range(len(chain))]
        if not rows:
            return
        following = [found for _, chain, _ in chains for _, found in chain]
        found_rows = iter(likeliest(following, logits[rows], norms[rows], self._most))
        for node, chain, _ in chains:
            attach(node, [Ahead(branch, found, next(found_rows)) for branch, found in chain])

    @property
    def _most(self) -> int | None:
        """How many continuations of a hypothesis are looked at; None: all."""
        options = self._options
        return self._constraint.width(options.num_beams) if options.n_best == 1 else None

    def _expand(
        self,
        nodes: Sequence[tuple[_Question, Hypothesis]],
        logits: torch.Tensor,
        norms: torch.Tensor,
    ) -> None:
        """Find the likeliest tokens that may follow each hypothesis, given its logits.

        Args:
            nodes: the hypotheses, each with its question.
            logits: one row per hypothesis, of shape (hypotheses, vocabulary).
            norms: the rows' log-sums of exponentials, of shape (hypotheses, 1).
        """
        following = [question.grammar.successors(node.state) for question, node in nodes]
        rows = likeliest(following, logits, norms, self._most)
        for (question, node), found, row in zip(nodes, following, rows, strict=True):
            self._set_children(question, node, found, row)

    def _set_children(
        self,
        question: _Question,
        node: Hypothesis,
        found: Successors,
        row: Sequence[tuple[float, int, Any]],
    ) -> None:
        """Give a hypothesis its children, of the likeliest tokens that may follow."""
        most = self._constraint.width(self._options.num_beams)
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

    def _drop_finished(self, wanted: list[_Wanted]) -> list[_Wanted]:
        """Drop rows that want nothing more, and dead branches, where that is much of the tree."""
        live = [row for row, nodes in enumerate(wanted) if nodes]
        if len(live) <= KEPT_ROWS * len(wanted):
            self._tree.keep(live)
            self._rows = [self._rows[row] for row in live]
            wanted = [wanted[row] for row in live]
        self._compact()
        return wanted

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
