"""The tree of questions, the search and the grammar of spans, against plain ways to do the same."""

import copy
import itertools
import math
import random
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal, Never

import pytest
import torch
from helpers import TOKENIZERS, load_encoder, read_quickstart, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from llama_squad.answers import NO_ANSWER, answer_is_closed, extract_answer, format_answer
from llama_squad.decoding.batch import DecodingBatch
from llama_squad.decoding.boundaries import Boundaries, is_span
from llama_squad.decoding.cache import LONGEST_BRANCH, WATCHED, Branch, TokenTree, check_tree
from llama_squad.decoding.constraints import FreeSpeech
from llama_squad.decoding.generator import Generator, stop_ids
from llama_squad.decoding.replies import Paragraph
from llama_squad.decoding.search import BestFirstSearch, Hypothesis, State, Successors
from llama_squad.decoding.spans import SpanGrammar, reply_ids, span_vocabulary
from llama_squad.encoding import ChatEncoder
from llama_squad.prompts import build_messages

# Double spaces, line ends, quotes, a backslash, a control character, composed and decomposed
# accents, wide characters, an abstention's own sign, punctuation that merges with the quotes.
ODD = ('Née  in 1990s, "Zoë" (é\\n)\n\tsaid: 中文 “ok”?\x07 '
       + unicodedata.normalize("NFD", "é") + " ✨ x.")  # fmt: skip

each_tokenizer = pytest.mark.parametrize(
    ("name", "template", "end"), TOKENIZERS, ids=lambda x: x,
    scope="module",  # one after the other, as a vocabulary takes longer to make than to test
)  # fmt: skip


@pytest.fixture(scope="module", params=TOKENIZERS[:2], ids="-".join)
def encoder(request: pytest.FixtureRequest) -> Any:
    """A SentencePiece-like and a byte-level one: what the model's tests need."""
    name, template, _ = request.param
    return load_encoder(name, template)


@pytest.fixture(scope="module")
def model(encoder: ChatEncoder) -> Any:
    return tiny_model(
        vocab_size=len(encoder.tokenizer), intermediate_size=64, initializer_range=0.4
    )


@pytest.fixture(scope="module")
def paragraphs(encoder: ChatEncoder) -> Any:
    """Three questions each of two paragraphs of different lengths."""
    groups = itertools.groupby(read_quickstart("test"), key=lambda record: record["context"])
    found = [[record["question"] for record in group][:3] for _, group in groups]
    contexts = list(dict.fromkeys(record["context"] for record in read_quickstart("test")))
    return [make_paragraph(encoder, contexts[index], found[index]) for index in (0, 1)]


def make_paragraph(encoder: ChatEncoder, context: str, questions: Any) -> Any:
    records = [{"context": context, "question": question} for question in questions]
    messages = [build_messages(record, answer=False) for record in records]
    return Paragraph(context, encoder.encode_prompts(messages))


@torch.inference_mode()
def teacher_force(model: Any, prompt: list[int], reply: list[int]) -> float:
    """Log P(reply | prompt), by one plain pass."""
    ids = torch.tensor([[*prompt, *reply]])
    scores = model(ids).logits[0].float().log_softmax(-1)[len(prompt) - 1 : -1]
    return scores.gather(1, torch.tensor(reply)[:, None]).sum().item()


# Free decoding -------------------------------------------------------------------------------


def generate(model: Any, prompt: list[int], num_beams: int, length: int) -> Any:
    more = {"length_penalty": 0.0} if num_beams > 1 else {}
    output = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=num_beams, do_sample=False, max_new_tokens=length, pad_token_id=0,
        output_scores=True, return_dict_in_generate=True, **more,
    )  # fmt: skip
    ids = output.sequences[0, len(prompt) :].tolist()
    stop = [i for i, token in enumerate(ids) if token in stop_list(model)]
    return ids[: stop[0] + 1] if stop else ids, output.get("sequences_scores")


def stop_list(model: Any) -> Any:
    eos = model.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [eos]


@pytest.mark.parametrize("num_beams", [1, 10])
@pytest.mark.parametrize("stops", [0, 25], ids=["to the limit", "with ends of turn"])
def test_free_decoding_equals_generate(
    model: Any,
    encoder: ChatEncoder,
    paragraphs: Any,
    num_beams: int,
    stops: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if stops:  # tokens that this model likes, so that replies end, at all lengths and beams
        liked = model.lm_head.weight.norm(dim=1).topk(stops).indices.tolist()
        eos = [*liked, encoder.tokenizer.eos_token_id]
        monkeypatch.setattr(model.generation_config, "eos_token_id", eos)
    generator = Generator(model, encoder, decoding="free", num_beams=num_beams, max_new_tokens=8)
    replies = generator.reply(paragraphs)
    ended = 0
    for paragraph, row in zip(paragraphs, replies, strict=True):
        for prompt, reply in zip(paragraph.prompts, row, strict=True):
            ids, score = generate(model, prompt, num_beams, 8)
            assert reply.token_ids == ids
            ended += len(ids) < 8
            if score is not None:
                assert reply.score == pytest.approx(score.item(), abs=1e-4)
    assert ended or not stops


def test_free_replies_lose_their_end_of_turn(
    model: Any, encoder: ChatEncoder, paragraphs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(model, encoder, decoding="free", max_new_tokens=1)
    reply = generator.reply(paragraphs)[0][0]
    assert reply.completion == encoder.tokenizer.decode(reply.token_ids)
    ends = FreeSpeech(encoder.tokenizer, frozenset(reply.token_ids))
    generator = Generator(model, encoder, decoding=ends, max_new_tokens=1)
    assert generator.reply(paragraphs)[0][0].completion == ""


class Scripted(FreeSpeech):
    """Says what it is told to, token by token."""

    script: Sequence[int] = ()

    def successors(self, state: Any) -> Successors:
        return Successors([self.script[len(state)]], [None])

    def step(self, ids: Any, target: Any) -> Any:
        end = super().step(ids, target)
        return tuple(ids) if end == () else end


SAID_BEFORE, SAID_AFTER = "It says:\n", "\n\nThat is `it`. ```json"


@pytest.mark.parametrize("apart", [False, True], ids=["fence", "backticks apart"])
@pytest.mark.parametrize("stop", [True, False])
def test_replies_end_with_the_fence_of_the_answer(
    model: Any, encoder: ChatEncoder, paragraphs: Any, apart: bool, stop: bool
) -> None:
    tokenizer = encoder.tokenizer
    answer = SAID_BEFORE + format_answer("an `answer`")
    if apart:
        script = tokenizer(answer[:-3], add_special_tokens=False)["input_ids"]
        script += [tokenizer.convert_tokens_to_ids("`")] * 3
        script += tokenizer(SAID_AFTER, add_special_tokens=False)["input_ids"]
    else:
        script = tokenizer(answer + SAID_AFTER, add_special_tokens=False)["input_ids"]
    speech = Scripted(tokenizer, frozenset({tokenizer.eos_token_id}), stop)
    speech.script = [*script, tokenizer.eos_token_id]
    replies = Generator(model, encoder, decoding=speech).reply(paragraphs)
    ends = [n for n in range(len(script)) if answer_is_closed(str(tokenizer.decode(script[:n])))]
    assert 0 < ends[0] < len(script) - 5
    for reply in itertools.chain(*replies):
        assert reply.token_ids == (script[: ends[0]] if stop else speech.script)
        assert extract_answer(reply.completion).text == "an `answer`"


# The tree ------------------------------------------------------------------------------------


def test_no_answer_probability_equals_teacher_forcing(
    model: Any, encoder: ChatEncoder, paragraphs: Any
) -> None:
    generator = Generator(model, encoder)
    header, tail = span_vocabulary(encoder).header, span_vocabulary(encoder).no_answer
    assert extract_answer(str(encoder.tokenizer.decode(header + tail))).state == "no_answer"
    for paragraph, row in zip(paragraphs, generator.reply(paragraphs), strict=True):
        for prompt, reply in zip(paragraph.prompts, row, strict=True):
            expected = teacher_force(model, prompt + header, tail)
            assert reply.no_answer_score == pytest.approx(expected, abs=1e-4)
            ids = reply.token_ids[len(header) :]
            assert reply.score == pytest.approx(
                teacher_force(model, prompt + header, ids), abs=1e-4
            )


@pytest.mark.parametrize("fault", ["position_ids", "attention_mask"])
def test_tree_needs_its_positions_and_its_mask(
    model: Any, encoder: ChatEncoder, paragraphs: Any, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Generator(model, encoder).reply(paragraphs)
    forward = type(model).forward

    def wrong(self: Any, **kwargs: Any) -> Any:
        kwargs.pop(fault, None)
        return forward(self, **kwargs)

    monkeypatch.setattr(type(model), "forward", wrong)
    broken = Generator(model, encoder).reply(paragraphs)
    pairs = zip(itertools.chain(*right), itertools.chain(*broken), strict=True)
    assert any(a.no_answer_score != pytest.approx(b.no_answer_score, abs=1e-3) for a, b in pairs)


def test_paragraphs_together_equal_paragraphs_alone(
    model: Any, encoder: ChatEncoder, paragraphs: Any
) -> None:
    generator = Generator(model, encoder, num_beams=3)
    assert len(paragraphs[0].prompts[0]) != len(paragraphs[1].prompts[0])
    together = itertools.chain(*generator.reply(paragraphs))
    alone = [
        generator.reply([Paragraph(paragraph.context, [prompt])])[0][0]
        for paragraph in paragraphs
        for prompt in paragraph.prompts
    ]
    for a, b in zip(together, alone, strict=True):
        assert a.token_ids == b.token_ids
        assert a.spans[0].text == b.spans[0].text
        assert a.no_answer_score == pytest.approx(b.no_answer_score, abs=1e-4)


def test_eager_attention_gives_the_same(
    model: Any, encoder: ChatEncoder, paragraphs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Generator(model, encoder).reply(paragraphs)
    monkeypatch.setattr(model.config, "_attn_implementation", "eager")
    for a, b in zip(Generator(model, encoder).reply(paragraphs), expected, strict=True):
        assert [reply.token_ids for reply in a] == [reply.token_ids for reply in b]


def test_dropping_dead_branches_changes_nothing(
    model: Any, encoder: ChatEncoder, paragraphs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(model, encoder, decoding="free", num_beams=4, max_new_tokens=12)
    expected = generator.reply(paragraphs)
    lengths = []
    compact = TokenTree.compact

    def watched(tree: Any, branches: Any) -> None:
        lengths.append(tree.grown)
        compact(tree, branches)

    monkeypatch.setattr(TokenTree, "compact", watched)
    monkeypatch.setattr("llama_squad.decoding.batch.COMPACT_AFTER", 4)
    again = generator.reply(paragraphs)
    assert lengths
    for a, b in zip(itertools.chain(*again), itertools.chain(*expected), strict=True):
        assert a.token_ids == b.token_ids
        assert a.score == pytest.approx(b.score, abs=1e-4)


def test_out_of_memory_halves_the_batch_and_loses_no_row(
    model: Any, encoder: ChatEncoder, paragraphs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Generator(model, encoder).reply(paragraphs)
    grow, sizes = TokenTree.extend, []

    def small(tree: Any, rows: Any) -> Any:
        # a question with its header: the abstention and the end of a reply are shorter
        questions = sum(len(branch.tokens) > 9 for row in rows for branch in row)
        sizes.append(questions)
        if questions > 1 + 2:  # the context and its questions
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return grow(tree, rows)

    monkeypatch.setattr(TokenTree, "extend", small)
    generator = Generator(model, encoder)
    replies = generator.reply(paragraphs)
    assert [len(row) for row in replies] == [3, 3]
    assert max(sizes) == 1 + 3
    for a, b in zip(itertools.chain(*replies), itertools.chain(*expected), strict=True):
        assert a.token_ids == b.token_ids
    sizes.clear()
    generator.reply(paragraphs)
    assert max(sizes) <= 1 + 2  # it has learned what does not fit


def test_a_long_context_that_memory_does_not_hold_leaves_short_ones_whole(
    model: Any, encoder: ChatEncoder, paragraphs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, sizes = Generator(model, encoder), []
    long = make_paragraph(encoder, paragraphs[0].context * 3, ["When?", "Who?"])
    batch = DecodingBatch

    def counting(options: Any, parts: Any) -> Any:
        sizes.append(sum(len(part.prompts) for part in parts))
        if len(parts[0].prompts[0]) == len(long.prompts[0]) and sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return batch(options, parts)

    monkeypatch.setattr("llama_squad.decoding.generator.DecodingBatch", counting)
    generator.reply([long])
    assert sizes == [2, 1, 1]
    generator.reply(paragraphs[1:])
    assert sizes[3:] == [3]


def test_the_check_of_a_long_context_reads_few_logits(
    encoder: ChatEncoder, paragraphs: Any
) -> None:
    model = tiny_model(vocab_size=len(encoder.tokenizer), intermediate_size=64)
    (prompt, *_) = make_paragraph(encoder, paragraphs[0].context * 4, ["Who?"]).prompts
    rows: list[int] = []
    model.register_forward_hook(lambda *args: rows.append(args[2].logits[..., 0].numel()))
    check_tree(model, prompt)
    assert len(prompt) > 4 * WATCHED
    assert max(rows) == 2 * WATCHED


def test_the_check_of_a_long_context_holds_no_square_of_it(
    encoder: ChatEncoder, paragraphs: Any
) -> None:
    """Its branches are short, and the stem needs no mask."""
    model = tiny_model(vocab_size=len(encoder.tokenizer), intermediate_size=64)
    (prompt, *_) = make_paragraph(encoder, paragraphs[0].context * 16, ["Who?"]).prompts
    sizes: list[int] = []

    def watch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs["attention_mask"]
        sizes.append(0 if mask is None or mask.dim() < 4 else mask.numel())

    model.model.layers[0].self_attn.register_forward_pre_hook(watch, with_kwargs=True)
    check_tree(model, prompt)
    assert len(prompt) > 4 * LONGEST_BRANCH
    longest = len(prompt) + LONGEST_BRANCH
    assert 0 < max(sizes) <= 2 * LONGEST_BRANCH * longest


def test_an_alternative_of_one_token(model: Any, encoder: ChatEncoder, paragraphs: Any) -> None:
    class OneToken(FreeSpeech):
        alternative: Sequence[int] = (5,)

    stops = stop_ids(model, encoder)
    plain = Generator(model, encoder, decoding="free", max_new_tokens=3).reply(paragraphs)
    constraint = OneToken(encoder.tokenizer, stops)
    found = Generator(model, encoder, decoding=constraint, max_new_tokens=3).reply(paragraphs)
    for a, b in zip(itertools.chain(*found), itertools.chain(*plain), strict=True):
        assert a.token_ids == b.token_ids


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_end_where_rotary_embeddings_would_change(kind: str, encoder: Any) -> None:
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0,
            "original_max_position_embeddings": 512}  # fmt: skip
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = tiny_model(
        vocab_size=len(encoder.tokenizer), max_position_embeddings=2048, rope_parameters=rope
    )
    assert Generator(model, encoder).positions == 512
    plain = tiny_model(vocab_size=len(encoder.tokenizer), max_position_embeddings=2048)
    assert Generator(plain, encoder).positions == 2048


def test_other_errors_are_not_taken_for_out_of_memory(
    model: Any, encoder: ChatEncoder, paragraphs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(tree: Any, rows: Any) -> Never:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(TokenTree, "extend", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        Generator(model, encoder).reply(paragraphs)


# The grammar ---------------------------------------------------------------------------------


def in_form_of(vocabulary: Any, text: str) -> str:
    """Return the text as the vocabulary's tokenizer reads it."""
    return unicodedata.normalize(vocabulary.form, text) if vocabulary.form else text


def spell_out(grammar: Any, vocabulary: Any, text: str) -> Any:
    """Find some tokens that spell the reply that holds ``text``, or None."""
    text = in_form_of(vocabulary, text)
    target = vocabulary.lead_text + format_answer(text).encode().partition(b'": "')[2]

    def walk(state: Any, offset: Any) -> Any:
        found = grammar.successors(state)
        for token_id, following in zip(found.ids, found.targets, strict=True):
            spelled = vocabulary.to_bytes([token_id])
            if not target.startswith(spelled, offset):
                continue
            if isinstance(following, int):
                return [token_id, *vocabulary.tails[following]]
            rest = walk(tuple(following), offset + len(spelled))
            if rest is not None:
                return [token_id, *rest]
        return None

    return walk(grammar.start, 0)


@each_tokenizer
@pytest.mark.parametrize("boundaries", ["any", "word"])
def test_every_span_can_be_spelled_and_nothing_else(
    name: str, template: str, end: Any, boundaries: Boundaries
) -> None:
    encoder = load_encoder(name, template)
    tokenizer, vocabulary = encoder.tokenizer, span_vocabulary(encoder)
    grammar = SpanGrammar(vocabulary, ODD, boundaries)
    texts = {ODD[i:j] for i in range(len(ODD)) for j in range(i + 1, min(i + 8, len(ODD)) + 1)}
    spans = {text for text in texts if is_span(ODD, text, boundaries)}
    # To a tokenizer that normalises texts a letter and its accent are one character.
    whole = in_form_of(vocabulary, ODD)
    spans = {text for text in spans if in_form_of(vocabulary, text) in whole}
    parts = {"Z", "é\\n)\n\tsa", "\x07", '"', "“", "990"}
    assert {"in", "1990s", "“ok”", "ok", '"Zoë"', "(é\\n)", "said: 中文", "x."} <= spans
    assert parts & spans == (parts if boundaries == "any" else set())
    assert not {"", "?", " x", "in ", "zoë"} & spans
    for text in spans:
        ids = spell_out(grammar, vocabulary, text)
        assert ids is not None, text
        assert grammar.accepts(ids)
        reply = tokenizer.decode(vocabulary.header + ids, clean_up_tokenization_spaces=False)
        assert extract_answer(str(reply)).text == in_form_of(vocabulary, text)
    for text in [*(texts - spans - {"?"}), "", "not there", "Zoë (é"]:
        assert spell_out(grammar, vocabulary, text) is None, text


@each_tokenizer
def test_random_walks_give_spans(name: str, template: str, end: Any) -> None:
    encoder = load_encoder(name, template)
    vocabulary, chance = span_vocabulary(encoder), random.Random(0)
    grammar = SpanGrammar(vocabulary, ODD)
    seen = set()
    for _ in range(150):
        state, ids = grammar.start, []
        while True:
            found = grammar.successors(state)
            assert found.ids
            index = chance.randrange(len(found.ids))
            ids.append(found.ids[index])
            closing = found.targets[index]
            if isinstance(closing, int):
                said = list(ids)
                ids += vocabulary.tails[closing]
                break
            state = tuple(found.targets[index])
            if not grammar.successors(state).ids:  # white space at the context's end
                break
        else:
            continue
        if not grammar.accepts(ids):
            continue
        answer = extract_answer(vocabulary.to_bytes(vocabulary.header + ids).decode())
        text = grammar.read_span(said, closing)
        assert in_form_of(vocabulary, text) == answer.text
        assert answer.text == NO_ANSWER or is_span(ODD, text)
        seen.add(answer.text)
    assert len(seen) > 25


@each_tokenizer
def test_grammar_takes_the_tokens_of_training(name: str, template: str, end: Any) -> None:
    encoder = load_encoder(name, template)
    vocabulary = span_vocabulary(encoder)
    context = 'The "Beyoncé" tour (1990s, U.S.) grossed $5\\10 — “twice” as much; it\'s 中文.'
    grammar = SpanGrammar(vocabulary, context)
    for text in ["Beyoncé", '"Beyoncé"', "1990s", "(1990s", "U.S.)", "990s", "$5\\10", "“twice”",
                 "it's", "中文.", "our", context]:  # fmt: skip
        ids = reply_ids(encoder, text)
        size = len(vocabulary.header)
        assert ids[:size] == vocabulary.header
        assert grammar.accepts(ids[size:]), text
    assert not grammar.accepts(reply_ids(encoder, "Beyonce")[len(vocabulary.header) :])


@each_tokenizer
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_context_in_any_unicode_form_is_answered_in_its_own(
    name: str, template: str, end: Any, form: Literal["NFC", "NFD"]
) -> None:
    encoder = load_encoder(name, template)
    vocabulary = span_vocabulary(encoder)
    context = unicodedata.normalize(form, "Phở is from Nam Định, or Hà Nội: “Việt”, 한국 é\n2.")
    grammar = SpanGrammar(vocabulary, context, "word")
    for text in ["Phở", "Nam Định", "Hà Nội", "“Việt”", "한국", "국", "é\n2"]:
        text = unicodedata.normalize(form, text)
        ids = reply_ids(encoder, text)[len(vocabulary.header) :]
        assert grammar.accepts(ids), text  # the tokens of training
        count, closing = close(grammar, ids)
        assert grammar.read_span(ids[:count], closing) == text


def close(grammar: Any, ids: Sequence[int]) -> tuple[int, int]:
    """Return how many tokens a reply has through the one that closes it, and its target."""
    state = grammar.start
    for count, token_id in enumerate(ids, 1):
        found = grammar.successors(state)
        target = found.targets[found.ids.index(token_id)]
        if isinstance(target, int):
            return count, target
        state = tuple(target)
    raise AssertionError("never closed")


@pytest.mark.parametrize("context", ["", " \n ", "?", " ? "])
def test_a_context_without_spans_is_answered_by_abstaining(
    model: Any, encoder: ChatEncoder, context: str
) -> None:
    reply = Generator(model, encoder).reply([make_paragraph(encoder, context, ["Who?"])])[0][0]
    assert reply.completion == format_answer(NO_ANSWER)
    assert (reply.na_prob, reply.spans) == (1.0, ())


@pytest.mark.parametrize("decoding", ["span", "free"])
def test_logits_that_are_no_numbers_are_no_abstention(encoder: ChatEncoder, decoding: Any) -> None:
    """A model in float16 may overflow on one prompt and not on another."""
    model = tiny_model(vocab_size=len(encoder.tokenizer), intermediate_size=64)
    fine, bad = (make_paragraph(encoder, "Ann left.", [q]) for q in ("Who?", "Whom or zqx?"))
    (token, *_) = {*bad.prompts[0]} - {*fine.prompts[0]}
    model.get_input_embeddings().weight.data[token] = math.inf
    generator = Generator(model, encoder, decoding=decoding, max_new_tokens=4)
    assert generator.reply([fine])[0][0].completion
    with pytest.raises(ValueError, match="logits that are no numbers"):
        generator.reply([bad])
    with pytest.raises(ValueError, match="logits that are no numbers"):
        check_tree(copy.deepcopy(model), bad.prompts[0])  # which has passed no check


# The search ----------------------------------------------------------------------------------


def all_replies(grammar: Any, vocabulary: Any) -> Any:
    """Every token sequence that the grammar admits, with the text that it spells."""
    stack: list[tuple[State, tuple[int, ...]]] = [(grammar.start, ())]
    while stack:
        state, ids = stack.pop()
        found = grammar.successors(state)
        for token_id, target in zip(found.ids, found.targets, strict=True):
            if isinstance(target, int):
                whole = [*ids, token_id, *vocabulary.tails[target]]
                text = extract_answer(vocabulary.to_bytes(vocabulary.header + whole).decode()).text
                if text != NO_ANSWER:
                    yield whole, text
            else:
                stack.append((tuple(target), (*ids, token_id)))


@pytest.mark.parametrize("boundaries", ["word", "any"])
@pytest.mark.parametrize("context", ["Ab c", "x?", 'a"b'])
def test_search_finds_the_best_of_all_spans(
    model: Any, encoder: ChatEncoder, context: str, boundaries: Boundaries
) -> None:
    paragraph = make_paragraph(encoder, context, ["What is it?", "Who are you?"])
    generator = Generator(model, encoder, num_beams=1000, n_best=1000, span_boundaries=boundaries)
    vocabulary = span_vocabulary(encoder)
    candidates = list(all_replies(SpanGrammar(vocabulary, context, boundaries), vocabulary))
    texts = {context[i:j] for i in range(len(context)) for j in range(i + 1, len(context) + 1)}
    spans = {text for text in texts if is_span(context, text, boundaries)}
    assert {text for _, text in candidates} == spans
    for prompt, reply in zip(paragraph.prompts, generator.reply([paragraph])[0], strict=True):
        best: dict[str, float] = {}
        for ids, text in candidates:
            score = teacher_force(model, prompt + vocabulary.header, ids)
            best[text] = max(score, best.get(text, score))
        expected = sorted(best.items(), key=lambda item: -item[1])
        assert [span.text for span in reply.spans] == [text for text, _ in expected]
        assert [span.score for span in reply.spans] == pytest.approx(
            [score for _, score in expected], abs=1e-4
        )
        assert reply.proven_best


def test_threshold_decides_between_span_and_abstention(
    model: Any, encoder: ChatEncoder, paragraphs: Any
) -> None:
    low = Generator(model, encoder, na_prob_thresh=0.0).reply(paragraphs)[0][0]
    high = Generator(model, encoder, na_prob_thresh=1.0).reply(paragraphs)[0][0]
    assert low.completion == format_answer(NO_ANSWER)
    assert high.completion == format_answer(high.spans[0].text)
    assert low.score == low.no_answer_score
    assert low.no_answer_score is not None
    odds = torch.tensor(low.no_answer_score - low.spans[0].score, dtype=torch.float64)
    assert low.na_prob == high.na_prob == pytest.approx(torch.sigmoid(odds).item(), rel=1e-6)


def node(log_prob: float, level: int, text: str = "", children: Any = ()) -> Hypothesis:
    kind: Literal["open", "complete"] = "complete" if text else "open"
    stem = Branch(None, [])
    return Hypothesis(log_prob, (level,), level, stem, kind, text=text, children=[*children])


def test_more_spans_than_the_answer_are_found_without_changing_it() -> None:
    """One beam takes the likelier opening, and misses the likeliest span; the list has it."""
    worse = node(-3.0, 2, "answer")
    best = node(-1.1, 2, "missed")
    root = node(0.0, 0, children=[node(-0.5, 1, children=[worse]), node(-1.0, 1, children=[best])])
    for n_best, beams, found in (
        (1, 1, ["answer"]), (2, 1, ["answer", "missed"]), (9, 1, ["answer", "missed"]),
        (1, 2, ["missed"]),
    ):  # fmt: skip
        search = BestFirstSearch(root, beams, n_best, ranked=False)
        assert search.advance() == []
        assert list(search.found) == found
    assert search.pruned_log_prob == -math.inf


def test_n_best_widens_nothing_before_the_answer_is_found(
    model: Any, encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The passes of a search for one span come first, and none of them is wider."""
    paragraph = make_paragraph(encoder, "Ab c, 12 d. Ef gh (ij).", ["When?"])
    Generator(model, encoder).reply([paragraph])  # which checks the model, once
    passes: list[list[list[int]]] = []
    forward = type(model).forward

    def watched(self: Any, **kwargs: Any) -> Any:
        passes.append(kwargs["input_ids"].tolist())
        return forward(self, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    for beams in (1, 3):
        passes.clear()
        Generator(model, encoder, num_beams=beams).reply([paragraph])
        alone = passes[:]
        passes.clear()
        Generator(model, encoder, num_beams=beams, n_best=5).reply([paragraph])
        assert len(passes) > len(alone) > 1
        assert passes[: len(alone)] == alone


def test_n_best_spans_are_distinct_and_in_order(model: Any, encoder: ChatEncoder) -> None:
    paragraph = make_paragraph(encoder, "Ab c, 12 d.", ["When?", "Who?", "Why?"])
    (alone,) = Generator(model, encoder).reply([paragraph])
    (found,) = Generator(model, encoder, n_best=5).reply([paragraph])
    for reply, single in zip(found, alone, strict=True):
        assert reply.best and single.best
        assert (reply.completion, reply.best.text) == (single.completion, single.best.text)
        assert reply.na_prob == pytest.approx(single.na_prob, abs=1e-6)
        scores = [span.score for span in reply.spans]
        assert len({span.text for span in reply.spans}) == 5
        assert scores == sorted(scores, reverse=True)


WINDOWED = {
    "mistral": {}, "gemma3_text": {"head_dim": 8}, "qwen2": {"use_sliding_window": True,
    "max_window_layers": 1}, "gemma2": {"head_dim": 8},
}  # fmt: skip


@pytest.mark.parametrize("kind", WINDOWED)
def test_outgrown_sliding_windows(kind: str, encoder: ChatEncoder) -> None:
    """Prompts longer than the window: each layer's own mask, as in a plain pass."""
    tiny = {"vocab_size": len(encoder.tokenizer), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "sliding_window": 24, "initializer_range": 0.3, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **tiny | WINDOWED[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    paragraph = make_paragraph(
        encoder, "Velmor was walled in 1654 by Edda. " * 3, ["When?", "Who?"]
    )
    assert min(map(len, paragraph.prompts)) > 48
    vocabulary = span_vocabulary(encoder)
    for reply, prompt in zip(Generator(model, encoder).reply([paragraph])[0], paragraph.prompts,
                             strict=True):  # fmt: skip
        expected = teacher_force(model, prompt + vocabulary.header, vocabulary.no_answer)
        assert reply.no_answer_score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_architectures_that_cannot_share_contexts_are_refused(
    kind: str, encoder: ChatEncoder
) -> None:
    config = AutoConfig.for_model(kind, vocab_size=len(encoder.tokenizer))
    for name, value in {"hidden_size": 32, "d_model": 32, "n_layer": 2, "n_layers": 2,
                        "n_head": 4, "n_heads": 4}.items():  # fmt: skip
        if hasattr(config, name):
            setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    paragraph = make_paragraph(encoder, "Velmor was walled in 1654.", ["When?", "Who?"])
    with pytest.raises(ValueError, match="share"):
        Generator(model, encoder).reply([paragraph])


def test_a_batch_that_memory_would_not_hold_is_parted(
    model: Any, encoder: ChatEncoder, paragraphs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Generator(model, encoder).reply(paragraphs)
    generator = Generator(model, encoder)
    sizes = []
    batch = DecodingBatch

    def counting(generator: Any, parts: Any) -> Any:
        sizes.append(sum(len(part.prompts) for part in parts))
        return batch(generator, parts)

    monkeypatch.setattr("llama_squad.decoding.generator.DecodingBatch", counting)
    most = generator.memory_needed(paragraphs[:1])
    monkeypatch.setattr("llama_squad.decoding.generator.free_memory", lambda _: most * 0.7)
    found = generator.reply(paragraphs)
    assert max(sizes) < len(paragraphs[0].prompts)
    for a, b in zip(found, expected, strict=True):
        assert [reply.token_ids for reply in a] == [reply.token_ids for reply in b]
