"""Generate the quickstart's small world, in the official SQuAD 2.0 form.

For:    `./quickstart.sh`, which needs a small dataset of our own, adversarial like SQuAD 2.0.
Reads:  quickstart/world.yaml (kinds of things, their attributes, sentences, questions, names).
Writes: quickstart/data/train.json and quickstart/data/test.json; the same seed, the same bytes.
Run:    python quickstart/make_world.py

A paragraph is about one or two made-up things. An unanswerable question is of one of three kinds,
which ends its id: `other` asks for what the text gives for another thing of that kind only, `near`
for a near-miss: of the thing's attributes of that sort (two years, two persons, …) the text gives
another one, `absent` for something else, of which nothing alike is said of the thing. No name of
the test world occurs in the train world.
"""

import json
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
SEED = 20
TRAIN_TITLES, TEST_TITLES, PARAGRAPHS_PER_TITLE = 40, 9, 9
WORDS = 120
"""So many words of the world's own for each form of names, which are combined into names."""
FACTS = {1: (3, 4, 5), 2: (2, 3, 4), 3: (2,), 4: (2,)}
"""How many facts a thing has in a paragraph about so many things."""
NAME_FORMS = ("place", "river", "person")


@dataclass(frozen=True)
class Fact:
    """What the context says of one thing: context[start:][:len(value)] is the value."""

    entity: str
    attribute: str
    value: str
    start: int
    said: str


@dataclass(frozen=True)
class Question:
    """A question; ``fact`` answers it, or (if not ``answerable``) only looks as if it did."""

    text: str
    kind: str
    fact: Fact | None
    reply: str

    @property
    def answerable(self) -> bool:
        return self.kind == "answer"


@dataclass(frozen=True)
class Paragraph:
    """A context, and every question about it that the world knows (one wording each)."""

    context: str
    entities: list[str]
    questions: list[Question]


@cache
def load_world() -> dict[str, Any]:
    """Read world.yaml."""
    world: dict[str, Any] = yaml.safe_load((HERE / "world.yaml").read_text(encoding="utf-8"))
    return world


@cache
def made_up_words(form: str) -> list[str]:
    """Return the words that names of a form of ``NAME_FORMS`` begin (a person's: end) with."""
    pools = load_world()["pools"]
    words = [head + tail for head in pools["head"] for tail in pools["tail"]]
    chosen = random.Random(SEED).sample(words, len(NAME_FORMS) * WORDS)
    return chosen[NAME_FORMS.index(form) :: len(NAME_FORMS)]


@dataclass
class Names:
    """Gives out names: ``taken`` ones never again, and no made-up word twice in a paragraph."""

    taken: set[str]
    words: set[str]

    def draw(self, rng: random.Random, form: str) -> str:
        """Make up a name of one of ``NAME_FORMS``."""
        pools = load_world()["pools"]
        while True:
            word = rng.choice(made_up_words(form))
            name = f"{word} {rng.choice(pools['second'])}"
            if form == "river":
                name = f"{word} {rng.choice(pools['water'])}"
            elif form == "person":
                name = f"{rng.choice(pools['first'])} {word}"
            if word not in self.words and name not in self.taken:
                self.words.add(word)
                self.taken.add(name)
                return name


def make_entity(rng: random.Random, form: str, names: Names) -> str:
    """Fill a name form such as "the {place} Bridge"; the whole was never given out before."""
    pools = load_world()["pools"]
    while True:
        slots = {}
        for slot in re.findall(r"{(\w+)}", form):
            if slot in NAME_FORMS:
                slots[slot] = names.draw(rng, slot)
            else:
                slots[slot] = capitalise(rng.choice(pools[slot]))
        name = form.format(**slots)
        if name not in names.taken or form[1:-1] in NAME_FORMS:
            names.taken.add(name)
            return name


def make_value(rng: random.Random, kind: str, names: Names) -> str:
    """Make a value of a type of world.yaml: a year, a name, "count LOW HIGH UNIT", or a pool."""
    if kind == "year":
        return str(rng.randint(1500, 1799))
    if kind in NAME_FORMS:
        return names.draw(rng, kind)
    if kind.startswith("count "):
        _, low, high, unit = kind.split()
        return f"{rng.randint(int(low), int(high))} {unit}"
    return str(rng.choice(load_world()["pools"][kind]))


def capitalise(text: str) -> str:
    """Return ``text`` with its first letter in upper case and the rest as it is."""
    return text[0].upper() + text[1:]


def state(template: str, entity: str, value: str) -> str:
    """Fill a sentence of world.yaml."""
    return capitalise(template.format(e=entity, v=value))


@dataclass(frozen=True)
class _Thing:
    """A thing that a paragraph is about, with what is to be said of it."""

    name: str
    kind: str
    values: dict[str, str]


def _make_things(rng: random.Random, names: Names, count: int) -> list[_Thing]:
    kinds = load_world()["kinds"]
    kind = rng.choice(list(kinds))
    chosen = [kind] * count
    if count == 2 and rng.random() < 0.15:
        chosen[1] = rng.choice(list(kinds))
    alike = rng.sample(list(kinds[kind]["attributes"]), 3)
    things: list[_Thing] = []
    used = set[str]()
    for kind in chosen:
        attributes = kinds[kind]["attributes"]
        some = rng.sample(list(attributes) if count < 3 else alike, rng.choice(FACTS[count]))
        values = {}
        for attribute in some:
            while (value := make_value(rng, attributes[attribute]["type"], names)) in used:
                pass
            used.add(value)
            values[attribute] = value
        things.append(_Thing(make_entity(rng, kinds[kind]["name"], names), kind, values))
    return things


def _refer(rng: random.Random, thing: _Thing, template: str, again: bool) -> str:
    """Choose how a sentence names its thing: by name, or (if it was the last) "it", "the town"."""
    if not again or rng.random() < 0.85:
        return thing.name
    if template.startswith("{e}") and rng.random() < 0.6:
        return "it"
    return "the " + str(load_world()["kinds"][thing.kind]["nouns"][0])


def _write(rng: random.Random, things: list[_Thing]) -> tuple[str, list[Fact]]:
    """Write the context, and note where each value stands in it."""
    world = load_world()
    plan = [(thing, attribute) for thing in things for attribute in thing.values]
    facts: list[Fact] = []
    context, last = "", None
    for thing, attribute in plan:
        if not any(fact.entity == thing.name for fact in facts):
            noun = rng.choice(world["kinds"][thing.kind]["nouns"])
            if rng.random() < 0.5:
                opening = rng.choice(world["opening"])
                opening = opening.format(e=thing.name, E=capitalise(thing.name), noun=noun)
                context, last = f"{context}{opening} ", thing
        template = rng.choice(world["kinds"][thing.kind]["attributes"][attribute]["says"])
        name = _refer(rng, thing, template, thing is last)
        value = thing.values[attribute]
        start = len(context) + len(template.split("{v}")[0].replace("{e}", name))
        context += state(template, name, value) + " "
        facts.append(Fact(thing.name, attribute, value, start, state(template, thing.name, value)))
        last = thing
        if rng.random() < 0.08:
            context += rng.choice(world["filler"]) + " "
            last = None
    return context.strip(), facts


def _ask(
    rng: random.Random, thing: _Thing, attribute: str, things: list[_Thing], facts: list[Fact]
) -> Question:
    """Ask for an attribute of a thing, and say what kind of question that is here."""
    attributes = load_world()["kinds"][thing.kind]["attributes"]
    text = rng.choice(attributes[attribute]["asks"]).format(e=thing.name)
    wanted = attributes[attribute]["type"]
    own = {fact.attribute: fact for fact in facts if fact.entity == thing.name}
    if attribute in own:
        reply = own[attribute].said
        return Question(text, "answer", own[attribute], reply)
    alike = {other.name for other in things if other.kind == thing.kind}
    for fact in facts:
        if fact.attribute == attribute and fact.entity in alike:
            return Question(text, "other", fact, "")
    for name, fact in own.items():
        if attributes[name]["type"].split()[-1] == wanted.split()[-1]:
            return Question(text, "near", fact, "")
    return Question(text, "absent", None, "")


def make_paragraph(rng: random.Random, taken: set[str], entities: int | None = None) -> Paragraph:
    """Make up a paragraph whose names are not in ``taken`` (they are added there)."""
    count = entities or rng.choices((1, 2), (0.4, 0.6))[0]
    while True:
        things = _make_things(rng, Names(taken, set()), count)
        context, facts = _write(rng, things)
        if all(context.count(fact.value) == 1 for fact in facts) and len(context.split()) <= 95:
            break
    kinds = load_world()["kinds"]
    questions = [
        _ask(rng, thing, attribute, things, facts)
        for thing in things
        for attribute in kinds[thing.kind]["attributes"]
    ]
    return Paragraph(context, [thing.name for thing in things], questions)


def choose_questions(rng: random.Random, paragraph: Paragraph) -> list[Question]:
    """Choose 5 to 8 questions, 3 in 5 of them answerable, the kinds of the others in balance."""
    answerable = [question for question in paragraph.questions if question.answerable]
    chosen = rng.sample(answerable, min(len(answerable), rng.randint(3, 5)))
    for _ in range(rng.randint(2, 3)):
        rest = [q for q in paragraph.questions if not q.answerable and q not in chosen]
        if not rest:
            break
        kind = rng.choice(sorted({question.kind for question in rest}))
        chosen.append(rng.choice([question for question in rest if question.kind == kind]))
    rng.shuffle(chosen)
    return chosen


def squad_question(question: Question, stem: str) -> dict[str, Any]:
    """Return a question as SQuAD 2.0 has it; its kind ends its id."""
    answers = []
    if question.fact is not None:
        answers = [{"text": question.fact.value, "answer_start": question.fact.start}]
    record: dict[str, Any] = {"id": f"{stem}-{question.kind}", "question": question.text}
    record["answers"] = answers if question.answerable else []
    record["is_impossible"] = not question.answerable
    if not question.answerable:
        record["plausible_answers"] = answers
    return record


def make_split(rng: random.Random, name: str, titles: int, taken: set[str]) -> dict[str, Any]:
    """Make a split with fresh names, which are added to ``taken``."""
    data = []
    for title in range(titles):
        form = rng.choice(load_world()["titles"])
        paragraphs = []
        for number in range(PARAGRAPHS_PER_TITLE):
            paragraph = make_paragraph(rng, taken)
            stem = f"{name}-{title:02}-{number}"
            qas = [
                squad_question(question, f"{stem}-{index}")
                for index, question in enumerate(choose_questions(rng, paragraph))
            ]
            paragraphs.append({"qas": qas, "context": paragraph.context})
        data.append(
            {"title": make_entity(rng, form, Names(taken, set())), "paragraphs": paragraphs}
        )
    return {"version": "v2.0", "data": data}


def build(seed: int = SEED) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
    """Return the train world, the test world, and all names made up for the test world."""
    rng = random.Random(seed)
    taken = set[str]()
    train = make_split(rng, "train", TRAIN_TITLES, taken)
    before = set(taken)
    test = make_split(rng, "test", TEST_TITLES, taken)
    return train, test, taken - before


def dump(world: dict[str, Any]) -> str:
    """Return the text of a data file."""
    return json.dumps(world, ensure_ascii=False, separators=(",", ":")) + "\n"


def main(folder: Path = HERE / "data") -> None:
    """Write train.json and test.json."""
    train, test, _ = build()
    folder.mkdir(parents=True, exist_ok=True)
    for name, world in (("train", train), ("test", test)):
        (folder / f"{name}.json").write_text(dump(world), encoding="utf-8")
        paragraphs = [paragraph for article in world["data"] for paragraph in article["paragraphs"]]
        questions = [question for paragraph in paragraphs for question in paragraph["qas"]]
        impossible = sum(question["is_impossible"] for question in questions)
        print(
            f"{name}: {len(world['data'])} titles, {len(paragraphs)} paragraphs, "
            f"{len(questions)} questions, {impossible / len(questions):.0%} of them unanswerable"
        )


if __name__ == "__main__":
    main()
