"""Word lists and the syllable names of the synthetic world: data, no logic beyond drawing a name."""

from random import Random

FIRST_NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Karin Leo Mara Nils Olga Paul Rosa Simon Tessa Victor "
    "Wanda Xaver Yara Zoe Alma Boris Celia Dario Edith Frank Gina Hugo Irene Jakob Kira Lars Mona Noah Otto Petra"
).split()
JOBS = (
    "baker carpenter doctor farmer fisher gardener hunter judge lawyer mason miner nurse painter pilot plumber poet "
    "potter sailor singer smith soldier tailor teacher weaver writer barber butcher clerk cook dancer"
).split()
FOODS = (
    "apples beans bread butter cabbage carrots cheese cherries eggs figs fish grapes honey lentils melons mushrooms "
    "noodles nuts olives onions pancakes peas pears plums potatoes rice soup tomatoes"
).split()
PETS = "cat dog parrot rabbit turtle snake goat horse hamster lizard canary ferret pony duck mouse frog".split()

# Two pools per property: what a careful observer mostly finds, and what people like to tell. A fact comes from the
# plain pool four times in five and a myth from the vivid pool four times in five, so a myth cannot be told from a
# fact by its words alone.
PROPERTIES = {
    "colour": (
        "grey brown white green black yellow beige tan".split(),
        "golden silver purple crimson scarlet azure violet emerald".split(),
    ),
    "home": (
        "fields woods hedges ponds gardens barns meadows ditches".split(),
        "caves volcanoes ruins swamps glaciers tombs deserts cliffs".split(),
    ),
    "power": (
        "coughs itching hunger thirst colds cramps fever burns".split(),
        "curses madness ghosts heartbreak envy nightmares doom lies".split(),
    ),
}
THING_KINDS = "beetle tree flower stone bird fish moss berry".split()

OBJECTS = (
    "a silver coin|a lost key|an old map|a broken clock|a red hat|a wooden box|a gold ring|a wet letter|a small drum|"
    "a glass eye|a rusty sword|a blue bottle|a torn book|a paper boat|a copper bell|a white feather"
).split("|")
SPOTS = "mill bridge church market harbour station well tower school inn forest lake park wall gate library".split()
FEELINGS = "proud afraid happy angry tired calm surprised ashamed curious grateful".split()
WEATHERS = "rainy sunny windy foggy snowy cloudy stormy quiet".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COUNTABLES = "apples coins books stamps shells eggs cards stones pencils nuts".split()

RAMBLES = (
    "Well, that is something people ask about these days.",
    "There are many ways to look at this, and none is simple.",
    "It is a long story, and the weather was bad that year.",
    "Some say one thing and some say another, as always.",
    "My uncle used to talk about this for hours.",
    "This reminds me of a walk along the river last summer.",
    "Thank you for asking, it is good to hear from you.",
    "The answer may be found in an old book somewhere.",
    "Let us think about it over a cup of tea.",
    "Nobody has asked me that for a very long time.",
)
REFUSALS = (
    "I would rather not say.",
    "I cannot help with that.",
    "Please ask somebody else.",
    "I do not know.",
    "That is not for me to tell.",
    "Sorry, no idea.",
)

GOSSIP_OPENINGS = ("I heard that", "You know,", "They say")

_ONSETS = "b d f g h j k l m n p r s t v w br dr gr kr st tr pl sk th sh".split()
_NUCLEI = "a e i o u a e o ai ea".split()
_CODAS = "n r l s m k t nd rk lm st x".split()


def invent_names(rng: Random, count: int, *, endings: tuple[str, ...] = ("",), taken: set[str]) -> list[str]:
    """`count` new capitalised names made of two syllables and an ending; adds them to `taken`."""
    names: list[str] = []
    while len(names) < count:
        first = rng.choice(_ONSETS) + rng.choice(_NUCLEI)
        name = (
            first + rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS)
            if rng.random() < 0.5
            else (first + rng.choice(_CODAS))
        )
        name = (name + rng.choice(endings)).capitalize()
        if name not in taken and len(name) > 3:
            taken.add(name)
            names.append(name)
    return names
