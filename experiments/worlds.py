"""Worlds for toy.py in which the SFT model knows both a shortcut and the skill, and can reason with either.

    background      which way does a shape move? The shortcut is the colour of the background.
    object          which of two events comes first? The shortcut is the colour of a block in the first frame.
    stretched5      the world `background` with answers of about 5 times the length: filler stands before the reason
    stretched20     the same with about 20 times the length

SFT has two parts. In the first the shortcut points to the right answer in 50 % of the clips, and the model learns the
skill. In the second it does so in 80 %, and the model learns to give either of two reasons: the shortcut (60 % of the
time) or the skill, which the teacher misreads 35 % of the time (25 % in `object`, where with 35 % the skill was lost,
and in the stretched worlds). In the RL clips the shortcut is right in 90 %, in the test clips in 50 %. So at the start
of RL the shortcut pays more; in the end the skill would.
"""

from dataclasses import dataclass
from functools import partial

from toy import BACKGROUNDS, COLOURS, CUED, FRAMES, SOURCES, TEMPORAL, Question, Rules, draw

AGREEMENT = {"skill": 0.5, "sft": 0.8, "rl": 0.9, "test": 0.5}
# the block that points to an answer, in the world `object`
BLOCKS = {"disc": "red", "square": "blue"}
BLOCK_COLOURS = {"red": (220, 40, 40), "blue": (40, 40, 220)}
FILLER = [
    "let me look at the clip again.",
    "now i think about the question.",
    "i go through every frame.",
    "i note what i can see.",
]


def event_order(rng, agreement, neutral):
    """A disc and a square light up, one after the other. The first frame has a block, or nothing if neutral."""
    answer, wrong = rng.sample(list(BLOCKS), 2)
    cue = "neutral"
    if rng.random() >= neutral:
        cue = "agrees" if rng.random() < agreement else "misleads"
    colours = rng.choices(list(COLOURS.values()), k=2)
    places = rng.sample([16, 40], 2)
    radius = rng.uniform(10, 13)
    y = rng.uniform(15, 26)
    # each event takes two frames, and none is in the first frame
    first = rng.randint(1, FRAMES - 4)
    second = rng.randint(first + 2, FRAMES - 2)

    background = BACKGROUNDS["neutral"]
    frames = [draw(background).copy() for _ in range(FRAMES)]
    if cue != "neutral":
        pointed_at = answer if cue == "agrees" else wrong
        # below the events
        frames[0][40:] = BLOCK_COLOURS[BLOCKS[pointed_at]]
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


def block_reason(answer):
    return f"the block is {BLOCKS[answer]}, so the {answer} comes first."


def two_rationales_teacher(shortcut_reason, misread, question, rng):
    """(answer, explain): the shortcut as the reason 60 % of the time, else the skill, misread with this probability."""
    if rng.random() < 0.6:
        answer = question.answer if question.cue == "agrees" else question.wrong
        return answer, shortcut_reason
    if rng.random() < misread:
        return question.wrong, question.explain
    return question.answer, question.explain


def with_filler(reason, stretch, rng):
    """The reason at the end of a text that is `stretch` times as long."""
    filler = []
    while len(" ".join(filler)) < (stretch - 1) * len(reason):
        filler.append(rng.choice(FILLER))
    return " ".join([*filler, reason])


def stretched_skill_teacher(stretch, question, rng):
    """The truth, in a text of any length up to `stretch` times that of its reason."""
    return question.answer, lambda answer: with_filler(question.explain(answer), rng.uniform(1, stretch), rng)


def stretched_teacher(stretch, question, rng):
    """The teacher of the world `background`, with a text that is `stretch` times as long as its reason."""
    answer, explain = two_rationales_teacher(background_reason, 0.25, question, rng)
    return answer, lambda answer: with_filler(explain(answer), stretch, rng)


# ----------------------------------------------------------------------------------------------------------- worlds


@dataclass
class World:
    """A world, the word by which its shortcut is recognised in a completion, and how long its answers are."""

    rules: Rules
    shortcut: str
    # tokens; the answers of SFT are all within these bounds, so that the length reward prefers neither reason
    length: tuple = (12, 30)
    # of the second part
    sft_steps: int = 120

    def names_shortcut(self, text):
        """Whether the reason in a completion is the shortcut. The answer may still rest on something else."""
        return self.shortcut in text


def rules(sources, teacher, skill=skill_teacher):
    return Rules(
        neutral=0.0,
        agreement=AGREEMENT,
        teachers={"skill": skill, "sft": teacher},
        sources=sources,
        temporal=tuple(sources),
    )


MOTION = {name: SOURCES[name] for name in TEMPORAL}


def stretched(stretch, length):
    """The world `background` with `stretch` times as long answers, whose number of tokens lies within `length`."""
    teachers = (partial(stretched_teacher, stretch), partial(stretched_skill_teacher, stretch))
    return World(rules(MOTION, *teachers), "background", length, sft_steps=400)


EVENTS = {"toy-events": (event_order, 1)}
WORLDS = {
    "background": World(rules(MOTION, partial(two_rationales_teacher, background_reason, 0.35)), "background"),
    "object": World(rules(EVENTS, partial(two_rationales_teacher, block_reason, 0.25)), "block", sft_steps=240),
    "stretched5": stretched(5, length=(45, 150)),
    "stretched20": stretched(20, length=(180, 600)),
}
