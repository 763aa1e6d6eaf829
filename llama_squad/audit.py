"""Does the search find the best span? A sample of questions against an exhaustive search."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from llama_squad.arguments import EvalArguments
from llama_squad.decoding.replies import Reply
from llama_squad.predictors.base import Predictor, Record, batch_paragraphs

AUDIT_BEAMS = 1000
"""So many partial replies of a length are rarely wanted: then the audit's answer is proven best."""


@dataclass(frozen=True)
class Audit:
    """How the search's answers compare with the best of all spans.

    ``noise``: log-probabilities that differ by no more are not told apart, in nats.
    """

    questions: int
    best: int
    unproven: int
    noise: float

    def __str__(self) -> str:
        text = (
            f"Audit of {self.questions:,} questions: the search found the best of all spans for "
            f"{self.best:,} ({100 * self.best / max(1, self.questions):.1f} %)."
        )
        if self.noise > LEAST_NOISE:
            text += (
                f" The same tokens' log-probabilities differ by up to {self.noise:.2g} between its "
                "passes: spans within that of the best one count as found."
            )
        if self.unproven:
            text += (
                f" For {self.unproven:,} of the others the best one is not known: the model is so "
                f"unsure that more than {AUDIT_BEAMS:,} partial replies of a length were open."
            )
        return text


LEAST_NOISE = 1e-4
"""Differences of log-probabilities that float32 makes."""


def audit(
    model: Predictor, exhaustive: Predictor, records: Sequence[Record], args: EvalArguments
) -> Audit:
    """Compare a model's best spans with the best of all spans, for a sample of the questions.

    ``exhaustive`` gives up next to nothing. Its answer counts where it is proven: every span that
    it did not finish had already become less likely, which is as good as scoring each. Texts must
    agree, or log-probabilities to within the noise: that is how far the same tokens' differ between
    the two searches, whose passes have other shapes (next to nothing in float32). Neither may
    abstain (a threshold of 1).
    """
    assert args.batch_size is not None
    sample = random.Random(args.seed).sample(list(records), min(args.audit, len(records)))
    pairs: list[tuple[Reply, Reply]] = []
    for batch in tqdm(list(batch_paragraphs(sample, args.batch_size)), "Audit", unit=" batches"):
        answers = zip(model.answer(batch), exhaustive.answer(batch), strict=True)
        pairs += [(found.reply, true.reply) for found, true in answers]
    noise = LEAST_NOISE
    for found, true in pairs:
        if found.best and found.token_ids == true.token_ids:
            assert found.score is not None and true.score is not None
            noise = max(noise, abs(found.score - true.score))
    best = unproven = 0
    for found, true in pairs:
        ours, theirs = found.best, true.best
        if ours is None or theirs is None:
            best += ours is theirs
        elif not true.proven_best:
            unproven += 1
        else:
            best += ours.text == theirs.text or theirs.log_prob - ours.log_prob <= noise
    return Audit(len(sample), best, unproven, noise)
