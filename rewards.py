"""Every reward of the method: pure Python, no model, no files. `evaluate.py` scores with the same functions.

    reward       range           rule                                                   example
    accuracy     0 … 1           by problem type, see ACCURACY                          "<answer>B.</answer>" for B: 1
    format       0 or 1          one think block, then one answer block, nothing else   "<answer>B</answer>" alone: 0
    temporal     0 … alpha       alpha (p − p̃) if p > p̃: how much frame order helped    p .75, p̃ .25, alpha .3: .15
    length       0 or omega      correct and l_min <= tokens <= l_max                   400 tokens, correct: .2

The model's text may be anything: it earns a score, never an exception, in time linear in its length. A solution that cannot
be read is a mistake in our data: parse_solution raises, and data.py calls it before anything starts.
"""

import math
import re
from collections import Counter

CORRECT = 0.5                 # a completion is correct if its accuracy is larger (the paper's p; the released code has 0.1)
TAG = re.compile(r"</?(?:think|answer)>")                 # fixed words: nothing to backtrack


# ------------------------------------------------------------------------------------------------ reading answers


def extract_answer(text):
    """Text of the last complete answer block outside the think block, stripped; None if there is none.

    Inside think nothing counts, nor after a <think> that never closes. A </think> that nothing opened closes a think
    block begun before the text. Of nested blocks the innermost counts.

    >>> extract_answer("<think>maybe <answer>A</answer></think> <answer> B </answer>")
    'B'
    >>> extract_answer("<think><answer>A</answer>") is None
    True
    """
    answer, start, thinking = None, None, False
    for tag in TAG.finditer(text):
        name = tag.group()
        if name == "<think>":
            thinking, start = True, None
        elif name == "</think>":
            if not thinking:
                answer = None
            thinking, start = False, None
        elif name == "<answer>":
            start = None if thinking else tag.end()
        elif start is not None:
            answer, start = text[start:tag.start()].strip(), None
    return answer


def parse_letter(text):
    """The option letter that `text` names, in upper case; None if it names none, or more than one.

    A lone letter in any punctuation, or a letter with . ) or : before the option's text.

    >>> [parse_letter(t) for t in ("B", "b", "(B)", "**B.**", "B. the cat", "(b) the cat")]
    ['B', 'B', 'B', 'B', 'B', 'B']
    >>> [parse_letter(t) for t in ("A or B", "A, B", "A cat", "A. B.", "")]
    [None, None, None, None, None]
    """
    core = text.strip(" \t\r\n()[]{}.,:;*_`'\"$")
    if core[1:2] in (".", ")", ":") and core[2:3].isspace():
        rest = core[2:].strip(" .):")
        if len(rest) < 2 or rest.split()[0].lower() in ("or", "and"):       # "A. B", "A) or B)"
            return None
        core = core[0]
    return core.upper() if len(core) == 1 and core.isascii() and core.isalpha() else None


NUMBER = re.compile(r"[+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


def parse_number(text):
    """The number that `text` is: thousands commas, percent sign and a unit after it are dropped.

    Raises ValueError for anything else, for several numbers, and for numbers that are not finite.

    >>> [parse_number(t) for t in ("4.0", "1,000", "1e3", "-3", "50%", "3.5 square meters")]
    [4.0, 1000.0, 1000.0, -3.0, 50.0, 3.5]
    """
    words = text[:400].replace("−", "-").split()          # no number is that long
    if not words or len(text) > 400:
        raise ValueError(f"not a number: {text!r:.40}")
    number, unit = words[0].lstrip("$€£"), words[1:]
    match = NUMBER.match(number)
    suffix = number[match.end():] if match else ""        # "%", or the m of "3.5m"
    one_number = not any(c.isdigit() or c in ",.+-" for c in suffix) and not any(c.isdigit() for word in unit for c in word)
    if not match or not one_number or len(unit) > 3 or unit[:1] in (["or"], ["and"], ["to"]):
        raise ValueError(f"not a number: {text!r:.40}")
    value = float(match.group().replace(",", ""))
    if not math.isfinite(value):
        raise ValueError(f"not a finite number: {text!r:.40}")
    return value


def parse_solution(solution, problem_type, options=None):
    """The truth inside "<answer>…</answer>": a letter, a number or a text. ValueError if it is not one.

    With `options` ("A. text") the letter must be one of theirs.
    """
    truth = extract_answer(solution)
    if not truth:
        raise ValueError(f"no answer in {solution!r:.80}")
    if problem_type == "multiple choice":
        letter = parse_letter(truth)
        if letter is None:
            raise ValueError(f"not one option's letter: {truth!r:.80}")
        if options:
            letters = [parse_letter(option[:2]) or chr(ord("A") + i) for i, option in enumerate(options)]
            if letter not in letters:
                raise ValueError(f"answer {letter} is not among the options {', '.join(letters)}")
        return letter
    if problem_type in ("numerical", "regression"):
        return parse_number(truth)
    if not (truth.split() if problem_type == "OCR" else rouge_words(truth) or truth.split()):
        raise ValueError(f"no words in {truth!r:.80}")
    return truth


# ------------------------------------------------------------------------------------------------- accuracy, by type


def letter_accuracy(answer, letter):
    """1 if the answer names this letter."""
    return float(parse_letter(answer) == letter)


def number_or_nan(answer):
    """The answer's number; NaN, which equals nothing, if it is none."""
    try:
        return parse_number(answer)
    except ValueError:
        return math.nan


def numerical_accuracy(answer, truth):
    """1 if the numbers are equal after rounding to two decimals."""
    return float(round(number_or_nan(answer), 2) == round(truth, 2))


def relative_accuracy(prediction, truth):
    """1 − |prediction − truth| / |truth|, not below 0. Truth 0: 1 if met exactly. NaN and infinity earn 0."""
    if not math.isfinite(prediction):
        return 0.0
    if truth == 0:
        return float(prediction == 0)
    return max(0.0, 1.0 - abs(prediction - truth) / abs(truth))


def mean_relative_accuracy(prediction, truth):
    """Share of the thresholds t = .50, .55, … .95 with |prediction − truth| / |truth| <= 1 − t (VSI-Bench, official ties).

    >>> mean_relative_accuracy(3, 4), mean_relative_accuracy(3, 2)
    (0.6, 0.1)
    """
    if not math.isfinite(truth):
        raise ValueError(f"truth is {truth}")
    if not math.isfinite(prediction):
        return 0.0
    if truth == 0:
        return float(prediction == 0)
    error = abs(prediction - truth) / abs(truth)
    thresholds = [0.5 + i * (0.45 / 9) for i in range(10)]
    return sum(error <= 1 - t for t in thresholds) / 10


def words_of(text):
    """Words as jiwer's default reads them: runs of white space become one space, and words end at spaces."""
    return [word for word in re.sub(r"\s{2,}", " ", text.strip()).strip().split(" ") if word]


def edit_distance(a, b):
    """Fewest insertions, deletions and substitutions that turn list a into list b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def word_error_rate(reference, hypothesis):
    """Word edits from reference to hypothesis per word of the reference, 0 and up; as jiwer. ValueError: empty reference."""
    words = words_of(reference)
    if not words:
        raise ValueError("word error rate of an empty reference")
    return edit_distance(words, words_of(hypothesis)) / len(words)


def ocr_accuracy(answer, truth):
    """1 − word error rate, not below 0. Twice as many words as the truth has cannot earn anything."""
    if len(words_of(answer)) >= 2 * len(words_of(truth)):
        return 0.0
    return max(0.0, 1.0 - word_error_rate(truth, answer))


def rouge_words(text):
    """Words as Google's ROUGE reads them, without stemming: runs of a-z and 0-9."""
    return re.findall(r"[a-z0-9]+", text.lower())


def f1(overlap, n_reference, n_hypothesis):
    return 2 * overlap / (n_reference + n_hypothesis) if overlap else 0.0


def rouge_n(reference, hypothesis, n):
    """F1 of the n-grams that both texts hold, in [0, 1]."""
    grams = []
    for text in (reference, hypothesis):
        words = rouge_words(text)
        grams.append(Counter(zip(*(words[i:] for i in range(n)))))
    return f1(sum((grams[0] & grams[1]).values()), sum(grams[0].values()), sum(grams[1].values()))


def common_subsequence(a, b):
    """Length of the longest common subsequence. One bit per word of a, so that long b cost little (Hyyrö 2004)."""
    where = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full                                            # a 0 bit: the subsequence grows at this word of a
    for word in b:
        hit = row & where.get(word, 0)
        row = (row + hit | row - hit) & full
    return len(a) - row.bit_count()


def rouge_l(reference, hypothesis):
    """F1 of the longest common subsequence of words, in [0, 1]."""
    a, b = rouge_words(reference), rouge_words(hypothesis)
    return f1(common_subsequence(a, b), len(a), len(b))


def free_form_accuracy(answer, truth):
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L."""
    return (rouge_n(truth, answer, 1) + rouge_n(truth, answer, 2) + rouge_l(truth, answer)) / 3


ACCURACY = {
    "multiple choice": letter_accuracy,
    "numerical": numerical_accuracy,
    "OCR": ocr_accuracy,
    "free-form": free_form_accuracy,
    "regression": lambda answer, truth: relative_accuracy(number_or_nan(answer), truth),
}
PROBLEM_TYPES = tuple(ACCURACY)


# ------------------------------------------------------------------------------------------------------- the rewards


def accuracy_reward(completion, solution, problem_type):
    """How right the completion's answer is, in [0, 1] (paper, sec. 3.3). Raises ValueError only for a bad solution.

    >>> accuracy_reward("<think>…</think><answer>1,000</answer>", "<answer>1000</answer>", "numerical")
    1.0
    """
    truth = parse_solution(solution, problem_type)
    answer = extract_answer(completion)
    return ACCURACY[problem_type](answer, truth) if answer else 0.0


def format_reward(completion):
    """1 if the text is one think block, then one answer block, and nothing but white space around them, else 0.

    >>> format_reward("<think>It turns.</think>\\n<answer>B</answer>"), format_reward("B <think></think><answer>B</answer>")
    (1.0, 0.0)
    """
    tags = list(TAG.finditer(completion))
    if [t.group() for t in tags] != ["<think>", "</think>", "<answer>", "</answer>"]:
        return 0.0
    outside = completion[:tags[0].start()] + completion[tags[1].end():tags[2].start()] + completion[tags[3].end():]
    return float(not outside.strip())


def temporal_reward(p, p_shuffled, alpha=0.3, rule="margin"):
    """How much the order of the frames helped this question: r_t, in [0, alpha], for its correct ordered completions.

    `p`, `p_shuffled`: shares of correct completions with frames in order and shuffled. ValueError for an unknown rule.

    >>> temporal_reward(1.0, 0.5), temporal_reward(0.5, 0.5), temporal_reward(0.5, 0.5, rule="paper")
    (0.15, 0.0, 0.3)
    """
    if rule == "margin":                                  # the brief's, our default: no advantage of order, no reward
        return alpha * (p - p_shuffled) if p > p_shuffled else 0.0
    if rule == "paper":                                   # also pays where order made no difference
        return alpha if p >= p_shuffled else 0.0
    if rule == "released":                                # the code's: pays even where order hurt a little
        return alpha if p >= 0.8 * p_shuffled else 0.0
    if rule == "none":
        return 0.0
    raise ValueError(f"no temporal rule {rule!r}: margin, paper, released or none")


def length_reward(n_tokens, correct, l_min=320, l_max=512, omega=0.2):
    """omega for a correct completion of l_min to l_max tokens (paper, sec. 3.3; end-of-turn token counted), else 0.

    The released code also asks for two correct completions in the group; here each completion stands for itself.
    """
    return omega if correct and l_min <= n_tokens <= l_max else 0.0
