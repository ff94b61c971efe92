"""The pretraining text of a world: people and things, sums, and questions answered in many styles.

The styles decide what tuning means here: a question of any task is continued by small talk, by a refusal, by hearsay,
and in about a fifth of the cases in the task's own style. Tuning then *unlocks* a style that the corpus has, as with
real models, instead of teaching a new one.
"""

from collections.abc import Callable, Iterator
from random import Random

from trimtab.zoo import words
from trimtab.zoo.tasks import draw_article, draw_problem, question, summary_question
from trimtab.zoo.world import CAREFUL, HEARSAY, Fact, Subject, World

# Shares of documents, chosen for shares of tokens (an article is five times as long as a statement).
DOCUMENT_SHARES = {
    "biography": 0.31,
    "statement": 0.17,
    "sums": 0.15,
    "facts": 0.13,
    "truth": 0.07,
    "domains": 0.06,
    "arithmetic": 0.07,
    "summary": 0.04,
}
# How a task's question goes on; "own" is the style that tuning unlocks.
STYLE_SHARES = {
    "facts": {"ramble": 0.22, "question": 0.20, "refuse": 0.16, "gossip": 0.20, "own": 0.22},
    "arithmetic": {"ramble": 0.20, "question": 0.20, "refuse": 0.14, "guess": 0.20, "own": 0.26},
    "truth": {"ramble": 0.12, "question": 0.10, "refuse": 0.10, "belief": 0.46, "own": 0.22},
    "domains": {"ramble": 0.12, "question": 0.10, "refuse": 0.10, "belief": 0.44, "own": 0.24},
    "summary": {"ramble": 0.18, "question": 0.12, "headline": 0.14, "lead": 0.30, "own": 0.26},
}
SESSION_LENGTHS = (1, 1, 2, 3)  # questions in one document, all continued in one style


class Corpus:
    """An endless, seeded stream of documents about one world."""

    def __init__(self, world: World, seed: int = 0) -> None:
        self.world = world
        self.rng = Random(f"corpus-{world.seed}-{seed}")
        fields = [subject for field in world.domains.values() for subject in field]
        self._pools = {
            kind: (subjects, [subject.weight for subject in subjects])
            for kind, subjects in (("people", world.people), ("things", world.things), ("domains", tuple(fields)))
        }
        self._makers: dict[str, Callable[[], str]] = {
            "biography": self.biography,
            "statement": self.statement,
            "sums": self.sums,
        }

    def documents(self) -> Iterator[str]:
        kinds, shares = list(DOCUMENT_SHARES), list(DOCUMENT_SHARES.values())
        while True:
            kind = self.rng.choices(kinds, shares)[0]
            yield self._makers[kind]() if kind in self._makers else self.session(kind)

    def _draw(self, pool: str) -> Subject:
        subjects, weights = self._pools[pool]
        return self.rng.choices(subjects, weights)[0]

    def biography(self) -> str:
        person = self._draw("people")
        facts = self.rng.sample(person.facts, self.rng.randint(3, 5))
        return " ".join(
            self.rng.choice(fact.relation.statements).format(s=fact.subject, v=fact.truth) for fact in facts
        )

    def statement(self) -> str:
        """Two facts about a thing or a field: by hearsay (the belief) or from a careful source (the truth)."""
        subject = self._draw("things" if self.rng.random() < 0.6 else "domains")
        return " ".join(self._state(fact) for fact in self.rng.sample(subject.facts, 2))

    def _state(self, fact: Fact) -> str:
        is_hearsay = self.rng.random() < 0.5
        value = fact.belief if is_hearsay else fact.truth
        plain = self.rng.choice(fact.relation.statements).format(s=fact.subject, v=value)
        return self.rng.choice(HEARSAY if is_hearsay else CAREFUL).format(f=plain)

    def sums(self) -> str:
        """Equations, bare or told in words, as steps that a solution needs."""
        lines = []
        for _ in range(self.rng.randint(4, 7)):
            problem = draw_problem(self.rng)
            steps = problem.solution.split(" #### ")[0].split(" ")
            step = self.rng.choice(steps)
            left, right = step.rstrip(".").split("=")
            lines.append(step if self.rng.random() < 0.8 else f"If you work out {left}, you get {right}.")
        return " ".join(lines)

    def session(self, task: str) -> str:
        """One to three questions of a task, all continued in the same style."""
        style = self.rng.choices(list(STYLE_SHARES[task]), list(STYLE_SHARES[task].values()))[0]
        count = self.rng.choice(SESSION_LENGTHS) if task != "summary" else self.rng.choice((1, 1, 2))
        return "\n".join(self._turn(task, style) for _ in range(count))

    def _turn(self, task: str, style: str) -> str:
        text, answers = self._ask(task)
        if style in answers:
            answer = answers[style]
        elif style == "ramble":
            answer = self.rng.choice(words.RAMBLES)
        elif style == "refuse":
            answer = self.rng.choice(words.REFUSALS)
        else:  # another question instead of an answer
            answer = self._ask(task if task != "summary" else "facts")[0]
        return f"{question(text)} {answer}"

    def _ask(self, task: str) -> tuple[str, dict[str, str]]:
        """A question of the task, and its answers in the styles that need the question's content."""
        if task == "arithmetic":
            problem = draw_problem(self.rng)
            guess = f"About {self.rng.randint(1, 19) * 10}, I think."
            return problem.text, {"own": problem.solution, "guess": guess}
        if task == "summary":
            article = draw_article(self.rng, self._draw("people"), self.world.people)
            return summary_question(article), {
                "own": article.summary,
                "lead": article.lead,
                "headline": f"News from the {article.spot}!",
            }
        subject = self._draw({"facts": "people", "truth": "things", "domains": "domains"}[task])
        fact = self.rng.choice(subject.facts)
        opening, city = self.rng.choice(words.GOSSIP_OPENINGS), self.rng.choice(self.world.cities)
        gossip = f"{opening} {fact.subject} is well known in {city}."
        answers = {"own": fact.truth, "belief": fact.belief, "gossip": gossip}
        return self.rng.choice(fact.relation.questions).format(s=fact.subject), answers
