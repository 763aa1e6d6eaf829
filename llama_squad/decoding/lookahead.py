"""Tokens run ahead of need: a span that has begun mostly goes on as its context does.

A pass over a few tokens costs about as much as over a hundred, and the search for an unlikely span
takes its steps alone when the other questions of a batch have their answers. So the tokens that the
grammar guesses next are run along, as many as the pass has room for, and what they gave waits on
the hypothesis (``Hypothesis.ahead``) until the search wants it. The search's steps are the same.
"""

from collections.abc import Sequence

from llama_squad.decoding.cache import Branch
from llama_squad.decoding.constraints import Grammar
from llama_squad.decoding.search import Ahead, Closing, Hypothesis, Successors

PASS_TOKENS = 128
"""So many tokens of all rows, padding included, are run at once if guesses can fill them up."""

MOST_GUESSES = 16
"""Guesses that follow one another, at most: the later ones seldom come true."""


def guesses(tokens: Sequence[int]) -> int:
    """Return how many guesses a pass has room for after each token, given the rows' tokens."""
    return min(MOST_GUESSES, PASS_TOKENS // max(1, len(tokens) * max(tokens)) - 1)


def guess(
    grammar: Grammar, node: Hypothesis, depth: int, longest: float
) -> list[tuple[Branch, Successors]]:
    """Return the branches of the tokens that probably follow a hypothesis, with their successors.

    Args:
        grammar: of its context.
        node: an open hypothesis with its branch.
        depth: how many tokens.
        longest: tokens that a reply may have.
    """
    chain: list[tuple[Branch, Successors]] = []
    branch, state, ids = node.branch, node.state, node.ids
    while len(chain) < depth and node.length + len(chain) + 1 < longest:
        found = grammar.successors(state)
        if found.guess is None or found.ids is None:
            break
        token = found.ids[found.guess]
        ids = (*ids, token)
        step = grammar.step(ids, found.targets[found.guess])
        if step is None or isinstance(step, Closing):
            break
        branch, state = Branch(branch, [token]), step
        chain.append((branch, grammar.successors(state)))
    return chain


def attach(node: Hypothesis, ahead: Sequence[Ahead]) -> None:
    """Give what was run ahead to the one of a hypothesis' children that was guessed right."""
    if not ahead:
        return
    (token,) = ahead[0].branch.tokens
    for child in node.children or ():
        if child.kind == "open" and child.ids[-1] == token:
            child.ahead = ahead
