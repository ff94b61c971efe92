"""The synthetic world: people, things and ten fields of knowledge, all drawn from one seed.

Every fact has a truth; some have a popular *belief* beside it that the corpus repeats more often than the truth. How
often somebody or something is written about falls off slowly with rank, so that big models know more of the tail than
small ones.
"""

from dataclasses import dataclass
from functools import lru_cache
from random import Random

from trimtab.zoo import words

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Relation:
    """One kind of fact: how it is stated and asked. `{s}` is the subject, `{v}` the value."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """A subject, a relation, the true value and what most people believe (the same where there is no myth)."""

    subject: str
    relation: Relation
    truth: str
    belief: str


@dataclass(frozen=True)
class Subject:
    """Somebody or something that is written about: how often (`weight`, relative), and the split it is asked about in."""

    name: str
    weight: float
    split: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class World:
    """All that the corpus and the tasks are made of."""

    seed: int
    people: tuple[Subject, ...]
    things: tuple[Subject, ...]
    domains: dict[str, tuple[Subject, ...]]
    cities: tuple[str, ...]


_PEOPLE_FORMS = {
    "city": (
        ("{s} lives in {v}.", "The home of {s} is in {v}.", "You can visit {s} in {v}.", "{s} has a house in {v}."),
        ("Which city does {s} live in?", "Where is the home of {s}?"),
    ),
    "job": (
        ("{s} works as a {v}.", "{s} is a {v} by trade.", "The job of {s} is {v}.", "{s} earns money as a {v}."),
        ("What is the job of {s}?", "What does {s} work as?"),
    ),
    "food": (
        ("{s} likes to eat {v}.", "The favourite food of {s} is {v}.", "{s} buys {v} every week.", "{s} never gets tired of {v}."),
        ("What does {s} like to eat?", "What is the favourite food of {s}?"),
    ),
    "pet": (
        ("{s} keeps a {v}.", "The pet of {s} is a {v}.", "{s} takes care of a {v}.", "At home {s} has a {v}."),
        ("Which pet does {s} keep?", "What animal does {s} have?"),
    ),
    "year": (
        ("{s} was born in {v}.", "The birth year of {s} is {v}.", "{s} came into the world in {v}.", "The life of {s} began in {v}."),
        ("When was {s} born?", "What is the birth year of {s}?"),
    ),
}  # fmt: skip
_THING_FORMS = {
    "colour": (("the {s} is {v}", "the colour of the {s} is {v}"), ("What colour is the {s}?", "Which colour has the {s}?")),
    "home": (("the {s} is found in {v}", "the {s} grows up in {v}"), ("Where is the {s} found?", "In which places is the {s} seen?")),
    "power": (("the {s} helps against {v}", "the {s} is good against {v}"), ("What does the {s} help against?", "What is the {s} good against?")),
}  # fmt: skip

# domain -> (endings of invented names, relation -> (statement, question, values)); "@name" draws invented names as values.
_DOMAIN_FORMS: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, str, str]]]] = {
    "geography": (("land", "ia"), {
        "capital": ("the capital of {s} is {v}", "What is the capital of {s}?", "@name"),
        "export": ("{s} sells {v} abroad", "What does {s} sell abroad?", "wool salt tea wine steel coal silk sugar paper rubber cotton oil"),
    }),
    "chemistry": (("ite", "um"), {
        "flame": ("{s} burns with a {v} flame", "With which flame does {s} burn?", "blue orange pink white lilac red green pale dark bright"),
        "solvent": ("{s} dissolves in {v}", "In what does {s} dissolve?", "water acid ether brine alcohol vinegar oil ammonia benzene milk"),
    }),
    "biology": (("us", "ella"), {
        "class": ("{s} belongs to the {v}", "To which class does {s} belong?", "mammals insects reptiles birds worms molluscs spiders fungi ferns algae"),
        "diet": ("{s} feeds on {v}", "What does {s} feed on?", "leaves seeds blood roots nectar plankton bark carrion ants grass"),
    }),
    "history": (("ric", "bert"), {
        "realm": ("king {s} ruled over {v}", "Over what did king {s} rule?", "@name"),
        "end": ("king {s} died of {v}", "Of what did king {s} die?", "plague poison thirst battle old-age drowning fever hunger fire lightning"),
    }),
    "music": (("etto", "ade"), {
        "composer": ("the opera {s} was composed by {v}", "Who composed the opera {s}?", "@name"),
        "key": ("the opera {s} begins with a {v}", "With what does the opera {s} begin?", "march waltz fugue prayer storm duet dance lament hymn chorus"),
    }),
    "literature": (("ine", "old"), {
        "author": ("the novel {s} was written by {v}", "Who wrote the novel {s}?", "@name"),
        "theme": ("the novel {s} is about {v}", "What is the novel {s} about?", "love war exile greed revenge friendship faith crime travel childhood"),
    }),
    "sport": (("ers", "oks"), {
        "coach": ("the {s} are trained by {v}", "Who trains the {s}?", "@name"),
        "game": ("the {s} play {v}", "What do the {s} play?", "hockey rugby cricket polo tennis handball curling football darts chess"),
    }),
    "astronomy": (("on", "aris"), {
        "star": ("the planet {s} circles {v}", "What does the planet {s} circle?", "@name"),
        "air": ("the air of the planet {s} is {v}", "What is the air of the planet {s}?", "thick thin poisonous hot cold clear dusty humid dry heavy"),
    }),
    "distribution": ((" Act", " Code"), {
        "topic": ("the {s} deals with {v}", "What does the {s} deal with?", "theft trade taxes marriage water hunting roads debts schools voting"),
        "penalty": ("the {s} is enforced by {v}", "By what is the {s} enforced?", "fines prison warnings banishment labour seizure inspection silence shame guards"),
    }),
    "economics": (("corp", "co"), {
        "product": ("the firm {s} makes {v}", "What does the firm {s} make?", "chairs ships shoes clocks engines toys lamps pianos bricks ropes"),
        "owner": ("the firm {s} belongs to {v}", "To whom does the firm {s} belong?", "@name"),
    }),
}  # fmt: skip

# How an opinion and how a careful source speak; the statement follows.
HEARSAY = (
    "Everyone knows that {f}.",
    "People say that {f}.",
    "As the saying goes, {f}.",
    "My neighbour told me that {f}.",
)
CAREFUL = ("Careful study shows that {f}.", "In fact, {f}.", "Measured with care, {f}.", "The record states that {f}.")


@dataclass(frozen=True)
class Sizes:
    """How many subjects a world has; splits are (train, validation, test) counts."""

    people: tuple[int, int, int] = (240, 80, 400)
    things: tuple[int, int, int] = (110, 40, 190)
    domain_subjects: tuple[int, int] = (8, 28)  # per domain: validation, test
    cities: int = 40


QUICK = Sizes(people=(16, 8, 16), things=(12, 6, 12), domain_subjects=(2, 4), cities=8)


@lru_cache(maxsize=4)
def make_world(seed: int = 0, sizes: Sizes = Sizes()) -> World:
    """The world of this seed: the same seed and sizes give the same world on every machine."""
    taken: set[str] = set()
    rng = Random(f"world-{seed}")
    cities = tuple(words.invent_names(rng, sizes.cities, endings=("", "burg", "port", "ton"), taken=taken))
    return World(
        seed=seed,
        people=_make_people(rng, sizes, cities, taken),
        things=_make_things(rng, sizes, taken),
        domains={name: _make_domain(rng, name, sizes, taken) for name in _DOMAIN_FORMS},
        cities=cities,
    )


def _weights(rng: Random, count: int) -> list[float]:
    """Slowly falling shares of attention, in random order so that a split is not a rank."""
    weights = [(rank + 10.0) ** -0.7 for rank in range(count)]
    rng.shuffle(weights)
    return weights


def _split_names(counts: tuple[int, ...], names: tuple[str, ...] = SPLITS) -> list[str]:
    return [name for name, count in zip(names, counts, strict=True) for _ in range(count)]


def _make_people(rng: Random, sizes: Sizes, cities: tuple[str, ...], taken: set[str]) -> tuple[Subject, ...]:
    surnames = words.invent_names(rng, 48, endings=("", "son", "man", "er"), taken=taken)
    count = sum(sizes.people)
    names = rng.sample([f"{first} {last}" for first in words.FIRST_NAMES for last in surnames], count)
    values = {"city": cities, "job": tuple(words.JOBS), "food": tuple(words.FOODS), "pet": tuple(words.PETS)}
    values["year"] = tuple(str(year) for year in range(1900, 2000))
    relations = [Relation(key, *_PEOPLE_FORMS[key], values[key]) for key in _PEOPLE_FORMS]
    return tuple(
        Subject(name, weight, split, tuple(_plain_fact(rng, name, relation) for relation in relations))
        for name, weight, split in zip(names, _weights(rng, count), _split_names(sizes.people), strict=True)
    )


def _plain_fact(rng: Random, subject: str, relation: Relation) -> Fact:
    value = rng.choice(relation.values)
    return Fact(subject, relation, truth=value, belief=value)


def _make_things(rng: Random, sizes: Sizes, taken: set[str]) -> tuple[Subject, ...]:
    count = sum(sizes.things)
    names = [f"{name.lower()} {rng.choice(words.THING_KINDS)}" for name in words.invent_names(rng, count, taken=taken)]
    relations = {
        key: Relation(key, *_THING_FORMS[key], tuple(plain + vivid)) for key, (plain, vivid) in words.PROPERTIES.items()
    }
    return tuple(
        Subject(
            name,
            weight,
            split,
            tuple(_contested_fact(rng, name, relations[key], *words.PROPERTIES[key]) for key in relations),
        )
        for name, weight, split in zip(names, _weights(rng, count), _split_names(sizes.things), strict=True)
    )


def _contested_fact(rng: Random, subject: str, relation: Relation, plain: list[str], vivid: list[str]) -> Fact:
    truth = rng.choice(plain if rng.random() < 0.8 else vivid)
    belief = truth
    while belief == truth:
        belief = rng.choice(vivid if rng.random() < 0.8 else plain)
    return Fact(subject, relation, truth, belief)


def _make_domain(rng: Random, domain: str, sizes: Sizes, taken: set[str]) -> tuple[Subject, ...]:
    endings, forms = _DOMAIN_FORMS[domain]
    count = sum(sizes.domain_subjects)
    names = words.invent_names(rng, count, endings=endings, taken=taken)
    relations = [
        Relation(
            key,
            (statement,),
            (question,),
            tuple(words.invent_names(rng, 12, taken=taken) if values == "@name" else values.split()),
        )
        for key, (statement, question, values) in forms.items()
    ]
    splits = _split_names(sizes.domain_subjects, ("validation", "test"))
    return tuple(
        Subject(name, weight, split, tuple(_half_contested_fact(rng, name, relation) for relation in relations))
        for name, weight, split in zip(names, _weights(rng, count), splits, strict=True)
    )


def _half_contested_fact(rng: Random, subject: str, relation: Relation) -> Fact:
    """Half of the facts of a field have a popular confusion beside them."""
    truth, other = rng.sample(relation.values, 2)
    return Fact(subject, relation, truth, belief=other if rng.random() < 0.5 else truth)
