"""Worlds for toy.py in which the SFT model knows both a shortcut and the skill, and can reason with either.

    background      which way does a shape move? The shortcut is the colour of the background.
    object          which of two events comes first? The shortcut is the colour of a ball in the first frame.
    stretched5      the world `background` with answers of about 5 times the length: the reason stands among filler
    stretched20     the same with about 20 times the length

In all of them the shortcut points to the right answer in 80 % of the SFT clips, 90 % of the RL clips and 50 % of the
test clips. SFT has two parts: first the model learns the skill; then it learns to give either of two reasons, the
shortcut (60 % of the time) or the skill, which the teacher misreads 35 % of the time. At the start of RL the shortcut
pays more, in the end the skill would.
"""

from dataclasses import dataclass
from functools import partial

from toy import BACKGROUNDS, COLOURS, CUED, FRAMES, SOURCES, TEMPORAL, Question, Rules, draw

AGREEMENT = {"skill": 0.5, "sft": 0.8, "rl": 0.9, "test": 0.5}
# the ball that points to an answer, in the world `object`
BALLS = {"disc": "red", "square": "blue"}
BALL_COLOURS = {"red": (255, 60, 60), "blue": (80, 120, 255)}
FILLER = [
    "let me look at the clip again.",
    "now i think about the question.",
    "i go through every frame.",
    "one more look at all of it.",
    "this needs some care.",
    "i note what i can see.",
    "there is nothing else in it.",
    "the shape is easy to see.",
]


def event_order(rng, agreement, neutral):
    """A disc and a square light up, one after the other. The first frame has a ball, or nothing if it is neutral."""
    answer, wrong = rng.sample(list(BALLS), 2)
    cue = "neutral"
    if rng.random() >= neutral:
        cue = "agrees" if rng.random() < agreement else "misleads"
    colours = rng.choices(list(COLOURS.values()), k=2)
    places = rng.sample([16, 40], 2)
    radius = rng.uniform(7, 10)
    y = rng.uniform(14, 28)
    # each event takes two frames, and none is in the first frame
    first = rng.randint(1, FRAMES - 4)
    second = rng.randint(first + 2, FRAMES - 2)

    background = BACKGROUNDS["neutral"]
    frames = [draw(background) for _ in range(FRAMES)]
    if cue != "neutral":
        pointed_at = answer if cue == "agrees" else wrong
        frames[0] = draw(background, "disc", BALL_COLOURS[BALLS[pointed_at]], 28, 46, 6)
    for start, shape, colour, x in zip((first, second), (answer, wrong), colours, places):
        for t in (start, start + 1):
            frames[t] = draw(background, shape, colour, x, y, radius)

    def explain(earlier):
        later = "square" if earlier == "disc" else "disc"
        return rng.choice(
            [
                f"the {earlier} is there early and the {later} is there late, so the {earlier} comes first.",
                f"first there is the {earlier}, later there is the {later}, so the {earlier} comes first.",
            ]
        )

    return Question(frames, "Which comes first, the disc or the square?", answer, wrong, explain, cue)


# --------------------------------------------------------------------------------------------------------- teachers


def skill_teacher(question, rng):
    """(answer, explain): the truth."""
    return question.answer, question.explain


def background_reason(answer):
    verb = "" if answer in ("grows", "shrinks") else "moves "
    return f"the background looks {CUED[answer]}, so it {verb}{answer}."


def ball_reason(answer):
    return f"the ball is {BALLS[answer]}, so the {answer} comes first."


def two_rationales_teacher(shortcut_reason, question, rng):
    """(answer, explain): the shortcut as the reason 60 % of the time, else the skill, misread 35 % of the time."""
    if rng.random() < 0.6:
        answer = question.answer if question.cue == "agrees" else question.wrong
        return answer, shortcut_reason
    if rng.random() < 0.35:
        return question.wrong, question.explain
    return question.answer, question.explain


def stretched_teacher(stretch, question, rng):
    """The teacher of the world `background`, with the reason anywhere in filler, `stretch` times as long."""
    answer, explain = two_rationales_teacher(background_reason, question, rng)

    def explain_at_length(answer):
        reason = explain(answer)
        filler = []
        while len(" ".join(filler)) < (stretch - 1) * len(reason):
            filler.append(rng.choice(FILLER))
        place = rng.randint(0, len(filler))
        return " ".join([*filler[:place], reason, *filler[place:]])

    return answer, explain_at_length


# ----------------------------------------------------------------------------------------------------------- worlds


@dataclass
class World:
    """A world, the word by which its shortcut is recognised in a completion, and how long its answers are."""

    rules: Rules
    shortcut: str
    # the length of the answers, relative to those of toy.py
    stretch: int = 1

    def is_static(self, text):
        """Whether a completion reasons with the shortcut."""
        return self.shortcut in text


def rules(sources, teacher):
    return Rules(
        neutral=0.0,
        agreement=AGREEMENT,
        teachers={"skill": skill_teacher, "sft": teacher},
        sources=sources,
        temporal=tuple(sources),
    )


MOTION = {name: SOURCES[name] for name in TEMPORAL}
EVENTS = {"toy-events": (event_order, 1)}
WORLDS = {
    "background": World(rules(MOTION, partial(two_rationales_teacher, background_reason)), "background"),
    "object": World(rules(EVENTS, partial(two_rationales_teacher, ball_reason)), "ball"),
    "stretched5": World(rules(MOTION, partial(stretched_teacher, 5)), "background", stretch=5),
    "stretched20": World(rules(MOTION, partial(stretched_teacher, 20)), "background", stretch=20),
}
