"""Every reward of the method: pure Python, no model, no files. `evaluate.py` scores with the same functions.

    reward       range         rule                                                 example
    accuracy     0 … 1         by problem type, see ACCURACY                        "B." for B: 1
    format       0 or 1        one think block, one answer block, nothing else      an answer block alone: 0
    temporal     0 … alpha     alpha (p − p̃) if p > p̃: how much frame order helped  p 3/4, p̃ 1/4, alpha .3: .15
    length       0 or omega    correct and l_min <= tokens <= l_max                 400 tokens, correct: .2

The model's text may be anything: it earns a score, never an exception, in time linear in its length. A solution that cannot
be read is a mistake in our data: parse_solution raises, and data.py calls it before anything starts.

>>> accuracy_reward("<answer>B.</answer>", "<answer>B</answer>", "multiple choice"), format_reward("<answer>B</answer>")
(1.0, 0.0)
>>> temporal_reward(3/4, 1/4), length_reward(400, correct=True)
(0.15, 0.2)
"""

import math
import re
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal

CORRECT = 0.5                 # a completion is correct if its accuracy is larger (the paper's p; the released code has 0.1)

# ------------------------------------------------------------------------------------------------ reading answers


TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def tags_in(text):
    """Yield (tag, start, end) for every think and answer tag, in order. str.find looks at each character once."""
    start = text.find("<")
    while start >= 0:
        if text.startswith(TAGS, start):
            end = text.index(">", start) + 1
            yield text[start:end], start, end
        start = text.find("<", start + 1)


def extract_answer(text):
    """Text of the last complete answer block outside the think block, stripped; None if there is none. Lower-case tags only.

    A think block ends at the next </think>; one that never closes holds all that follows. A </think> that nothing opened
    ends a think block begun before the text (in the prompt, say), so blocks before it do not count. Of nested answer blocks
    the innermost counts. The last block, not the first as in the released code: a model that corrects itself means the last.

    >>> extract_answer("<think>maybe <answer>A</answer></think> <answer> B </answer>")
    'B'
    >>> extract_answer("<think><answer>A</answer>") is None
    True
    """
    answer, opened, thinking = None, None, False          # opened: where the content of an open answer block starts
    for tag, start, end in tags_in(text):
        if tag == "</answer>":
            if opened is not None:
                answer = text[opened:start].strip()
            opened = None
        elif tag == "<answer>":
            opened = None if thinking else end
        else:
            if tag == "</think>" and not thinking:
                answer = None
            opened, thinking = None, tag == "<think>"
    return answer


DECORATION = " \t\r\n\xa0()[]{}.,:;!*_`'\"$"
LEAD = re.compile(r"(?:(?:the|correct|final|answer|option|choice|is)\b[\s:]*)*", re.IGNORECASE)
SEPARATOR = re.compile(r"[,;/&\n]|\b(?:or|and)\b", re.IGNORECASE)


def split_label(text):
    """("B", " the cat") of "(B) the cat", ("B", "") of a lone letter in any decoration, (None, "") of anything else."""
    core = text.strip(DECORATION)
    letter, mark, rest = core[:1], core[1:2], core[2:]
    labelled = mark in ("", ")") or mark in (".", ":") and rest[:1].isspace()             # "e.g. this" has no label
    return (letter.upper(), rest) if letter.isascii() and letter.isalpha() and labelled else (None, "")


def parse_letter(text):
    """The option letter that `text` names, "A" to "Z"; None if it names none, or more than one (ours; released: equal text).

    A lone letter in any punctuation, or a letter with ) or : or . before the option's text; "the answer is", "option" may
    lead. Without punctuation only a lone letter counts ("A cat" has an article). The text after the letter may not begin
    with a second lone letter, nor hold a second labelled option.

    >>> [parse_letter(t) for t in ("b", "(B)", "**B.**", "B. 3", "(b) the cat", "Option B", "The answer is B.")]
    ['B', 'B', 'B', 'B', 'B', 'B', 'B']
    >>> [parse_letter(t) for t in ("A or B", "A, B", "A. B", "A) or B)", "A. cat, B. dog", "A cat", "")]
    [None, None, None, None, None, None, None]
    """
    core = text.replace("*", "").strip(DECORATION)
    letter, rest = split_label(core[LEAD.match(core).end():])
    pieces = [split_label(piece) for piece in SEPARATOR.split(rest) if piece.strip(DECORATION)]
    second = any(other and (i == 0 or text) for i, (other, text) in enumerate(pieces))
    return None if second else letter


NUMBER = re.compile(r"[$€£]?([+-]?(?:(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)", re.ASCII | re.IGNORECASE)
WORD = r"[a-z%°µ][a-z°µ/·]*(?:\^[23]|(?<=m)[23]|[²³])?"    # "meters", "%", "km/h", "m^2", "m2", "m²"; not the "x3" of "2x3"
UNIT = re.compile(rf"(?:(?:square|cubic|degrees) )?{WORD}(?: per {WORD})?", re.IGNORECASE)
SCALES = {"k", "bn", "dozen", "hundred", "thousand", "million", "billion", "trillion", "quarter", "half", "x", "e", "or"}   # "4 million" is not 4


def parse_number(text):
    """The one number that `text` is, as a finite float; a currency sign before it and one unit after it are dropped.

    Thousands commas in threes ("1,00", "3,5", "0,500" are errors). "50%" is 50. A unit is one word, "square meters", or
    "miles per hour". ASCII digits and "−" only. Raises ValueError for anything else: several numbers, words before the
    number, fractions, scales ("4 million"), nan, inf, and numbers too large for a float.

    >>> [parse_number(t) for t in ("4.0", "1,000", "1e3", "-3", "50%", "$5", "3.5 square meters.")]
    [4.0, 1000.0, 1000.0, -3.0, 50.0, 5.0, 3.5]
    """
    core = text.strip().lstrip("*").rstrip("*.$€£").replace("−", "-")                     # "**4**", "$4$", "4 m.", "5€"
    match = NUMBER.match(core)
    unit = " ".join(core[match.end():].split()) if match else ""
    if not match or unit and ({unit.lower(), unit.lower().rstrip("s")} & SCALES or not UNIT.fullmatch(unit)):
        raise ValueError(f"not a number: {text[:40]!r}")
    value = float(match[1].replace(",", ""))              # float, not int: no limit on digits, and linear
    if not math.isfinite(value):
        raise ValueError(f"not a finite number: {text[:40]!r}")
    return value


def option_letters(options):
    """Letters of options like "A. text"; A, B, C … by position unless every option has its own (VideoMMMU's have none)."""
    own = [option[0] if re.match(r"[A-Z][.):]", option) else None for option in options]
    return own if all(own) else [chr(ord("A") + i) for i in range(len(options))]


def parse_solution(solution, problem_type, options=None):
    """The truth inside "<answer>…</answer>": a letter, a number or a text. ValueError, in one line, if it is not one.

    With `options` the letter must be one of theirs. Free-form truths need a word of a-z or 0-9: ROUGE sees no other.
    """
    if problem_type not in ACCURACY:
        raise ValueError(f"no problem type {problem_type!r}: {', '.join(ACCURACY)}")
    truth = extract_answer(solution)
    if not truth:
        raise ValueError(f"no answer in {solution[:80]!r}")
    if problem_type == "multiple choice":
        letter = parse_letter(truth)
        if letter is None:
            raise ValueError(f"not one option's letter: {truth[:80]!r}")
        if options and letter not in option_letters(options):
            raise ValueError(f"answer {letter} is not among the options {', '.join(option_letters(options))}")
        return letter
    if problem_type in ("numerical", "regression"):
        return parse_number(truth)
    if problem_type == "free-form" and not rouge_words(truth):
        raise ValueError(f"no word that ROUGE can see (a-z, 0-9) in {truth[:80]!r}")
    return truth


# ------------------------------------------------------------------------- accuracy, by type: answer is the model's text


def letter_accuracy(answer, letter):
    """1 if the answer names this letter and no other."""
    return float(parse_letter(answer) == letter)


def number_or_nan(answer):
    """The answer's number; NaN, which equals nothing and earns nothing, if it is none."""
    try:
        return parse_number(answer)
    except ValueError:
        return math.nan


def two_decimals(x):
    """x to two decimals, halves away from zero as on paper. round() goes by the binary value: round(2.675, 2) is 2.67."""
    if not abs(x) < 2**52:                                # NaN, or so large that it has no decimals
        return x
    return float(Decimal(repr(x)).quantize(Decimal("0.01"), ROUND_HALF_UP))


def numerical_accuracy(answer, truth):
    """1 if the numbers are equal after rounding to two decimals (paper); small ones coincide: .001 answers .004."""
    return float(two_decimals(number_or_nan(answer)) == two_decimals(truth))


def relative_error(prediction, truth):
    """|prediction − truth| / |truth|, 0 and up; infinite if the prediction is not finite, or misses a truth of 0.

    Raises ValueError if the truth is not finite.
    """
    if not math.isfinite(truth):
        raise ValueError(f"the truth is not a finite number: {truth}")
    if prediction == truth:
        return 0.0
    return abs(prediction - truth) / abs(truth) if truth and math.isfinite(prediction) else math.inf


def relative_accuracy(prediction, truth):
    """1 − relative error, in [0, 1] (paper). The released code pays 1 for "nan", and 0 for a truth of 0 met exactly."""
    return max(0.0, 1.0 - relative_error(prediction, truth))


def mean_relative_accuracy(prediction, truth):
    """Share of the thresholds t = .50, .55, … .95 with relative error <= 1 − t (VSI-Bench's code; its paper says <).

    >>> mean_relative_accuracy(3, 4), mean_relative_accuracy(3, 2)
    (0.6, 0.1)
    """
    error = relative_error(prediction, truth)
    thresholds = [0.5 + i * ((0.95 - 0.5) / 9) for i in range(10)]       # numpy.linspace to the bit, as ties depend on it
    return sum(error <= 1 - t for t in thresholds) / 10


def edit_distance(a, b):
    """Fewest insertions, deletions and substitutions that turn list a into list b; time len(a) · len(b)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def word_error_rate(reference, hypothesis):
    """Word edits from reference to hypothesis per reference word, 0 and up; jiwer 4.0's, also for an empty reference: edits.

    Words end at spaces and at runs of white space; jiwer keeps a single tab or line break inside a word.
    """
    words, others = ([w for w in re.sub(r"\s\s+", " ", text).strip().split(" ") if w] for text in (reference, hypothesis))
    return edit_distance(words, others) / max(len(words), 1)


def ocr_accuracy(answer, truth):
    """1 − word error rate, not below 0 (paper). Any white space ends a word here: a line break is no error (ours)."""
    answer, truth = answer.split(), truth.split()
    if len(answer) >= 2 * len(truth):                     # at least len(truth) insertions: cannot earn, so do not compute
        return 0.0
    return max(0.0, 1.0 - word_error_rate(" ".join(truth), " ".join(answer)))


def rouge_words(text):
    """Words as Google's ROUGE reads them, without stemming: runs of a-z and 0-9."""
    return re.findall(r"[a-z0-9]+", text.lower())


def f1(overlap, n_reference, n_hypothesis):
    """Harmonic mean of overlap / n_reference and overlap / n_hypothesis; 0 for empty texts."""
    return 2 * overlap / (n_reference + n_hypothesis) if overlap else 0.0


def rouge_n(reference, hypothesis, n):
    """F1 of the n-grams (n words in a row) that both texts hold, in [0, 1]; Google's. ValueError if n < 1."""
    if n < 1:
        raise ValueError(f"rouge_n needs n >= 1, got {n}")
    words = rouge_words(reference), rouge_words(hypothesis)
    a, b = (Counter(zip(*(w[i:] for i in range(n)))) for w in words)
    return f1((a & b).total(), a.total(), b.total())


def common_subsequence(a, b):
    """Length of the longest common subsequence of two lists (Hyyrö 2004).

    The textbook table, a row per word of b, in the bits of one integer: bit i is 0 where the row grows at a[i]. So a step
    costs one addition for all of a, and a long b costs little.
    """
    where = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        hit = row & where.get(word, 0)
        row = ((row + hit) | (row - hit)) & full          # the carry moves each growth to the first match after the last one
    return len(a) - row.bit_count()


def rouge_l(reference, hypothesis):
    """F1 of the longest common subsequence of words, in [0, 1]; Google's."""
    a, b = rouge_words(reference), rouge_words(hypothesis)
    return f1(common_subsequence(a, b), len(a), len(b))


def free_form_accuracy(answer, truth):
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L (paper). A truth of one word has no pairs: met exactly it earns 2/3."""
    return (rouge_n(truth, answer, 1) + rouge_n(truth, answer, 2) + rouge_l(truth, answer)) / 3


ACCURACY = {                                              # each: (the model's answer, the parsed truth) -> [0, 1]
    "multiple choice": letter_accuracy,
    "numerical": numerical_accuracy,
    "OCR": ocr_accuracy,
    "free-form": free_form_accuracy,
    "regression": lambda answer, truth: relative_accuracy(number_or_nan(answer), truth),
}


# ------------------------------------------------------------------------------------------------------- the rewards


def accuracy_reward(completion, solution, problem_type):
    """How right the completion's answer is, in [0, 1] (paper). No answer block or an empty one: 0.

    ValueError only for an unknown type or a bad solution.

    >>> accuracy_reward("<think>…</think><answer>1,000</answer>", "<answer>1000</answer>", "numerical")
    1.0
    """
    truth = parse_solution(solution, problem_type)
    answer = extract_answer(completion)
    return ACCURACY[problem_type](answer, truth) if answer else 0.0


def format_reward(completion):
    """1 if the text is one think block, then one answer block, and only white space around them, else 0 (paper).

    The blocks may be empty: this reward judges the form. No tag may come twice (the released pattern lets tags nest).

    >>> format_reward("<think>It turns.</think>\\n<answer>B</answer>"), format_reward("B <think></think><answer>B</answer>")
    (1.0, 0.0)
    """
    tags = list(tags_in(completion))
    if tuple(tag for tag, _, _ in tags) != TAGS:
        return 0.0
    (_, first, _), (_, _, think_end), (_, answer_start, _), (_, _, last) = tags
    return float(not (completion[:first] + completion[think_end:answer_start] + completion[last:]).strip())


def temporal_reward(p, p_shuffled, alpha=0.3, rule="margin"):
    """How much the order of the frames helped this question: r_t, in [0, alpha], for its correct ordered completions.

    p, p_shuffled: shares in [0, 1] of correct completions with frames in order and shuffled. The sources differ:
    "margin" (ours) alpha (p − p̃) if p > p̃ · "paper" (eq. 1) alpha if p >= p̃ · "released" alpha if p >= 0.8 p̃,
    where that code has mean accuracies for the shares · "none" 0, which is GRPO. Another rule: ValueError.

    >>> temporal_reward(1.0, 0.5), temporal_reward(0.5, 0.5), temporal_reward(0.5, 0.5, rule="paper")
    (0.15, 0.0, 0.3)
    """
    if rule == "margin":
        return alpha * (p - p_shuffled) if p > p_shuffled else 0.0
    if rule == "paper":                                   # also pays where order made no difference, and where both are 0
        return alpha if p >= p_shuffled else 0.0
    if rule == "released":                                # pays even where order hurt a little
        return alpha if p >= 0.8 * p_shuffled else 0.0
    if rule == "none":
        return 0.0
    raise ValueError(f"no temporal rule {rule!r}: margin, paper, released or none")


def length_reward(n_tokens, correct, l_min=320, l_max=512, omega=0.2):
    """omega for a correct completion of l_min to l_max tokens, both included (paper; end-of-turn token counted), else 0.

    The released code also asks for two correct completions in the group; here each completion stands for itself.
    """
    return omega if correct and l_min <= n_tokens <= l_max else 0.0
