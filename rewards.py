"""The rewards of T-GRPO: pure Python, no model. `evaluate.py` scores answers with the same functions.

    reward      range        rule                                                       example
    accuracy    0 to 1       depends on the problem type, see PROBLEM_TYPES             "B." for B: 1
    format      0 or 1       one think block, then one answer block, nothing else       an answer block alone: 0
    length      0 or omega   correct and l_min <= tokens <= l_max                       400 tokens, correct: 0.2
    temporal    0 to alpha   alpha (p - p̃) if p > p̃: how much the order helped         p 3/4, p̃ 1/4, alpha 0.3: 0.15

Any model output can be scored: scoring never raises an exception, and its time is linear in the output's length. A
solution that cannot be read is a mistake in the data: parse_solution raises ValueError, and data.load_records runs it
on every record before training.

Sources: "paper" is Video-R1 (arXiv 2503.21776), "released" its published code, "ours" a choice of this project.

>>> accuracy_reward("<answer>B.</answer>", "<answer>B</answer>", "multiple choice"), format_reward("<answer>B</answer>")
(1.0, 0.0)
>>> temporal_reward(3/4, 1/4), length_reward(400, correct=True)
(0.15, 0.2)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from support import parsing, text_scores

# A completion counts as correct above this accuracy (ours; the released code uses 0.1). p and p̃ are the fractions of
# completions that are correct, with the frames in order and shuffled.
CORRECT = 0.5


# ---------------------------------------------------------------------------------------------------- the four rewards


def accuracy_reward(completion, solution, problem_type):
    """How correct the completion's answer is, in [0, 1] (paper); 0 without an answer block or with an empty one.

    Raises ValueError only for an unknown problem type or a bad solution.

    >>> accuracy_reward("<think>…</think><answer>1,000</answer>", "<answer>1000</answer>", "numerical")
    1.0
    """
    truth = parse_solution(solution, problem_type)
    answer = parsing.extract_answer(completion)
    if not answer:
        return 0.0
    return PROBLEM_TYPES[problem_type].accuracy(answer, truth)


def format_reward(completion):
    """1 if the text is one think block, then one answer block, and otherwise only white space, else 0 (paper).

    Blocks may be empty. Each tag must occur once; the pattern of the released code lets tags nest.

    >>> format_reward("<think>It turns.</think>\\n<answer>B</answer>")
    1.0
    >>> format_reward("B <think></think><answer>B</answer>")
    0.0
    """
    tags = list(parsing.tags_in(completion))
    if [tag for tag, _, _ in tags] != list(parsing.TAGS):
        return 0.0
    think_open, think_close, answer_open, answer_close = [(start, end) for _, start, end in tags]
    before = completion[: think_open[0]]
    between = completion[think_close[1] : answer_open[0]]
    after = completion[answer_close[1] :]
    return float(not (before + between + after).strip())


def length_reward(n_tokens, correct, l_min=320, l_max=512, omega=0.2):
    """omega for a correct completion of l_min to l_max tokens, both included (paper), else 0. End-of-turn counts.

    The released code also requires two correct completions in the group; here completions are independent (ours).
    """
    return omega if correct and l_min <= n_tokens <= l_max else 0.0


def temporal_reward(p, p_shuffled, alpha=0.3, rule="margin"):
    """How much the order of the frames helped with this question: r_t, in [0, alpha]. Correct completions earn it.

    `p` and `p_shuffled` are fractions in [0, 1]. The rules: "margin" (ours), "paper" (its equation 1), "released",
    and "none", which is GRPO. Raises ValueError for another rule.

    >>> temporal_reward(1.0, 0.5), temporal_reward(0.5, 0.5), temporal_reward(0.5, 0.5, rule="paper")
    (0.15, 0.0, 0.3)
    """
    if rule == "margin":
        return alpha * (p - p_shuffled) if p > p_shuffled else 0.0
    if rule == "paper":
        # pays even if the order made no difference, and if both fractions are 0
        return alpha if p >= p_shuffled else 0.0
    if rule == "released":
        # pays even if the order hurt a little; the released code has mean accuracies in place of p and p̃
        return alpha if p >= 0.8 * p_shuffled else 0.0
    if rule == "none":
        return 0.0
    raise ValueError(f"no temporal rule {rule!r}: margin, paper, released or none")


# ------------------------------------------------------------------------------------ accuracy of an answer, by type


def letter_accuracy(answer, letter):
    """1 if the answer names this option and no other. The released code compares the texts."""
    return float(parsing.parse_letter(answer) == letter)


def numerical_accuracy(answer, truth):
    """1 if both numbers are equal after rounding to two decimals (paper), so .001 counts as .004."""
    return float(parsing.two_decimals(parsing.number_or_nan(answer)) == parsing.two_decimals(truth))


def ocr_accuracy(answer, truth):
    """1 − word error rate, at least 0 (paper). Any white space ends a word, so a line break is no error (ours).

    Texts are compared in NFC: composed and decomposed accents are equal, full-width and ordinary letters are not.
    """
    answer_words = parsing.normalized("NFC", answer).split()
    truth_words = parsing.normalized("NFC", truth).split()
    # at least len(truth_words) insertions: the score is 0, and the edit distance would take quadratic time
    if len(answer_words) >= 2 * len(truth_words):
        return 0.0
    return max(0.0, 1.0 - text_scores.word_error_rate(truth_words, answer_words))


def free_form_accuracy(answer, truth):
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L (paper). A truth of one word has no 2-grams, so its best score is 2/3."""
    answer = parsing.without_latex(answer)
    truth = parsing.without_latex(truth)
    rouge_1 = text_scores.rouge_n(truth, answer, 1)
    rouge_2 = text_scores.rouge_n(truth, answer, 2)
    return (rouge_1 + rouge_2 + text_scores.rouge_l(truth, answer)) / 3


def regression_accuracy(answer, truth):
    """1 − relative error, in [0, 1] (paper). The released code gives 1 to "nan", and 0 to a correct 0."""
    return max(0.0, 1.0 - relative_error(parsing.number_or_nan(answer), truth))


def relative_error(prediction, truth):
    """|prediction − truth| / |truth|, at least 0; infinite if the prediction is not finite or misses a truth of 0.

    Raises ValueError if the truth is not finite.
    """
    if not math.isfinite(truth):
        raise ValueError(f"the truth is not a finite number: {truth}")
    if prediction == truth:
        return 0.0
    if truth == 0 or not math.isfinite(prediction):
        return math.inf
    return abs(prediction - truth) / abs(truth)


# ------------------------------------------------------------------------------------------------------- problem types


@dataclass(frozen=True)
class ProblemType:
    """What a problem type consists of. A new one is one more entry of PROBLEM_TYPES."""

    # how correct an answer is, in [0, 1]: a function of the answer's text and the parsed truth
    accuracy: Callable
    # reads the text of a solution; raises ValueError if it cannot be read
    read_truth: Callable
    # the last sentence of the prompt
    hint: str


PROBLEM_TYPES = {
    "multiple choice": ProblemType(letter_accuracy, parsing.one_letter, "The result is the letter of one option."),
    "numerical": ProblemType(numerical_accuracy, parsing.parse_number, "The result is one number."),
    "regression": ProblemType(regression_accuracy, parsing.parse_number, "The result is one number."),
    "OCR": ProblemType(ocr_accuracy, str, "The result is the text exactly as it is written in the picture."),
    "free-form": ProblemType(free_form_accuracy, text_scores.require_words, "The result is a short text."),
}


def parse_solution(solution, problem_type, options=None):
    """The truth inside "<answer>…</answer>" or without tags: a letter, a number or a text.

    With `options`, the letter must belong to one of them. Raises ValueError that names the wrong field.
    """
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type: expected one of {', '.join(PROBLEM_TYPES)}, got {problem_type!r:.80}")
    text = parsing.extract_answer(parsing.tagged_solution(solution))
    if not text:
        raise ValueError(f"solution: no answer in {solution!r:.80}")
    try:
        truth = PROBLEM_TYPES[problem_type].read_truth(text)
    except ValueError as error:
        raise ValueError(f"solution: {error}") from None
    letters = parsing.option_letters(options or [])
    if problem_type == "multiple choice" and options and truth not in letters:
        raise ValueError(f"solution: answer {truth} is not among the options {', '.join(letters)}")
    return truth
