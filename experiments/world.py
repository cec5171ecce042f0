"""A world for toy.py in which the SFT model knows both a shortcut and the skill, and can reason with either.

Which way does a shape move? The skill is to read the motion. The shortcut is the colour of the background. In the first
part of SFT the model learns the skill. In the second it learns to give either reason, and the teacher misreads the
motion. In the RL clips the shortcut is right more often than such a reading, in the test clips by chance.
"""

from toy import CUED, SOURCES, TEMPORAL, Rules


def names_shortcut(text):
    """Whether the reason in a completion is the shortcut. The answer may still rest on something else."""
    return "background" in text


def background_reason(answer):
    verb = "" if answer in ("grows", "shrinks") else "moves "
    return f"the background looks {CUED[answer]}, so it {verb}{answer}."


def skill_teacher(question, rng):
    """(answer, explain): the truth."""
    return question.answer, question.explain


def two_reasons_teacher(question, rng):
    """(answer, explain): the shortcut as the reason 60 % of the time, else the skill, misread 35 % of the time."""
    if rng.random() < 0.6:
        answer = question.answer if question.cue == "agrees" else question.wrong
        return answer, background_reason
    if rng.random() < 0.35:
        return question.wrong, question.explain
    return question.answer, question.explain


RULES = Rules(
    neutral=0.0,
    agreement={"skill": 0.5, "sft": 0.8, "rl": 0.9, "test": 0.5},
    teachers={"skill": skill_teacher, "sft": two_reasons_teacher},
    sources={name: SOURCES[name] for name in TEMPORAL},
)
