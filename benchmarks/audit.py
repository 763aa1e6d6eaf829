"""Does the search find the best span? A sample of questions against an exhaustive search.

Takes the flags of ``test_llama_squad.py``, and writes nothing.

    python benchmarks/audit.py --adapter_name=results/final_checkpoints --questions 200
"""

import dataclasses
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llama_squad.arguments import EvalArguments, ModelArguments, resolve_decoding
from llama_squad.checks import check_evaluation
from llama_squad.config import parse_stage
from llama_squad.data import load_squad
from llama_squad.decoding.replies import Reply
from llama_squad.evaluation import choose_records
from llama_squad.predictors.base import Predictor, batch_paragraphs
from llama_squad.predictors.loading import adapter_settings, load_predictor
from llama_squad.prompts import Record

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
    model: Predictor, exhaustive: Predictor, records: Sequence[Record], batch_size: int
) -> Audit:
    """Compare a model's best spans with the best of all spans.

    ``exhaustive`` gives up next to nothing. Its answer counts where it is proven: every span that
    it did not finish had already become less likely, which is as good as scoring each. Texts must
    agree, or log-probabilities to within the noise: that is how far the same tokens' differ between
    the two searches, whose passes have other shapes (next to nothing in float32). Neither may
    abstain (a threshold of 1).
    """
    pairs: list[tuple[Reply, Reply]] = []
    for batch in tqdm(list(batch_paragraphs(records, batch_size)), "Audit", unit=" batches"):
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
            best += ours.text == theirs.text or theirs.score - ours.score <= noise
    return Audit(len(records), best, unproven, noise)


@dataclass(frozen=True)
class AuditArguments:
    """What the audit takes beside the flags of ``test_llama_squad.py``."""

    questions: int = dataclasses.field(default=200, metadata={"help": "How many, at random."})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the audit."""
    types = (EvalArguments, ModelArguments, AuditArguments)
    try:
        args, model_args, own = parse_stage(
            "test", types, argv, saved=adapter_settings, description=__doc__
        )
        check_evaluation(argv, (args, model_args))
        args = resolve_decoding(args)
        if (args.predictor, args.decoding) != ("local", "span"):
            raise ValueError("the audit is of span decoding: leave --predictor and --decoding out")
        records = choose_records(load_squad(args.dataset_name)[args.split], args)
        sample = random.Random(args.seed).sample(records, min(own.questions, len(records)))
        model = load_predictor(args, model_args)
    except ValueError as error:
        sys.exit(f"audit.py: {error}")
    exhaustive = model(na_prob_thresh=1.0, num_beams=AUDIT_BEAMS)
    print(audit(model(na_prob_thresh=1.0), exhaustive, sample, args.batch_size or 32))


if __name__ == "__main__":
    main()
