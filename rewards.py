"""Every reward of the method: pure Python, no model, no files. `evaluate.py` scores with the same functions.

    reward       range         rule                                                 example
    accuracy     0 … 1         by problem type, see ACCURACY                        "B." for B: 1
    format       0 or 1        one think block, one answer block, nothing else      an answer block alone: 0
    temporal     0 … alpha     alpha (p − p̃) if p > p̃: how much frame order helped  p 3/4, p̃ 1/4, alpha .3: .15
    length       0 or omega    correct and l_min <= tokens <= l_max                 400 tokens, correct: .2

The model's text may be anything: it gets a score, never an exception, in time linear in its length. A solution that
cannot be read is a mistake in the data: parse_solution raises, and data.py calls it before anything starts.

>>> accuracy_reward("<answer>B.</answer>", "<answer>B</answer>", "multiple choice"), format_reward("<answer>B</answer>")
(1.0, 0.0)
>>> temporal_reward(3/4, 1/4), length_reward(400, correct=True)
(0.15, 0.2)
"""

import math
import re
import unicodedata
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal

# A completion is correct if its accuracy is larger (used for the paper's p; the released code has 0.1).
CORRECT = 0.5

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
    """Text of the last complete answer block outside the think block, stripped; None if there is none.

    A think block ends at the next </think>; one that is never closed contains all that follows. A </think> without an
    opening tag ends a think block that began before the text (in the prompt, for example), so blocks before it do not
    count. Of nested answer blocks the innermost counts. The last block counts, not the first as in the released code: a
    model that corrects itself means the last.

    >>> extract_answer("<think>maybe <answer>A</answer></think> <answer> B </answer>")
    'B'
    >>> extract_answer("<think><answer>A</answer>") is None
    True
    """
    answer = None
    # where the content of the open answer block starts; None if no block is open
    content_start = None
    thinking = False
    for tag, start, end in tags_in(text):
        if tag == "</answer>":
            if content_start is not None:
                answer = text[content_start:start].strip()
            content_start = None
        elif tag == "<answer>":
            content_start = None if thinking else end
        else:
            if tag == "</think>" and not thinking:
                answer = None
            thinking = tag == "<think>"
            content_start = None
    return answer


# ----------------------------------------------------------------------------------------------- letters and numbers


def normalized(form, text):
    """The text in this Unicode normal form, or unchanged if more than 30 combining marks follow each other.

    Sorting a run of marks takes quadratic time. No language needs more than 30 (UAX #15, "stream-safe").
    """
    if text.isascii():
        return text
    marks = "".join(character for character in set(text) if unicodedata.combining(character))
    if marks and re.search(f"[{marks}]{{31}}", text):
        return text
    return unicodedata.normalize(form, text)


WRAPPER = re.compile(r"\\(?:[fm]?box|boxed|text(?:bf|it|rm)?|math(?:rm|bf|it|sf)|operatorname)\s?\{([^{}]*)\}")
FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}|\\[dt]?frac (\d) ?(\d)|\\[dt]?frac(\d)(\d)")
# "3½" and "3\frac{1}{2}" are three and a half: keep the parts apart
MIXED = re.compile(r"(?<=\d)(?=[¼½¾⅐-⅞↉]|\\[dt]?frac)")
DOLLARS = re.compile(r"\$\$?([^$]*)\$\$?|\\\(|\\\)|\\\[|\\\]")
LATEX = {r"\%": "%", r"\$": "$", "{,}": ",", r"\,": " ", r"\;": " ", r"^{\circ}": "°", r"^\circ": "°", r"\degree": "°"}
# wrappers inside wrappers, as in \boxed{\text{B}}
NESTED = 4


def plain(text):
    """The text in NFKC (full-width forms, ligatures) and without LaTeX boxes, fonts, dollars and fractions.

    >>> plain(r"$\\boxed{\\text{B}}$"), plain("Ｂ"), plain(r"3\\frac{1}{2}")
    ('B', 'B', '3 1/2')
    """
    text = normalized("NFKC", MIXED.sub(" ", text))
    if any(sign in text for sign in "\\${"):
        for command, replacement in LATEX.items():
            text = text.replace(command, replacement)
        text = DOLLARS.sub(lambda match: match[1] or "", text)
        for _ in range(NESTED):
            text = FRACTION.sub(lambda match: "/".join(part for part in match.groups() if part), text)
            text = WRAPPER.sub(r"\1", text)
    return text.strip()


DECORATION = " \t\r\n\xa0()[]{}.,:;!*_`'\"$。、【】「」『』"
LEAD = re.compile(
    r"(?:(?:the|best|correct|final|answer|option|choice|is)\b[\s:]*"
    r"|(?:正确|正確|答案|选项|選項|选择|選擇|故选|故選"
    r"|选|選|是|为|為|答え|正解|は|정답)[\s:]*)*",
    re.IGNORECASE,
)
SEPARATOR = re.compile(r"[,;/&\n]|\b(?:or|and)\b|[或和]", re.IGNORECASE)


def split_label(text):
    """(letter, mark, description) of an option: ("B", ")", " the cat") for "(B) the cat", ("B", "", "") for "B".

    The letter is None, and the others are empty, if the text does not begin with a labelled option.
    """
    core = text.strip(DECORATION)
    letter = core[:1]
    mark = core[1:2]
    description = core[2:]
    if not (letter.isascii() and letter.isalpha()):
        return None, "", ""
    # "e.g. this" has no label; scripts without spaces have no space after one
    is_separate = description[:1].isspace() or not description[:1].isascii()
    if mark in ("", ")", "、") or (mark in (".", ":") and is_separate):
        return letter.upper(), mark, description
    return None, "", ""


def parse_letter(text):
    """The option letter that `text` names, "A" to "Z"; None if it names none or several (ours; released: equal text).

    A lone letter in any punctuation or LaTeX, or a letter with ) or : or . before the option's text; "the answer is",
    "option", "答案：" may precede it. Without punctuation only a lone letter counts ("A cat" has an article). The text
    after the letter may not begin with a second lone letter, nor contain a second labelled option, unless it begins
    with an initial.

    >>> texts = ("b", "(B)", "**B.**", "B. 3", "(b) the cat", "Option B", "The answer is B.", "答案：B")
    >>> [parse_letter(text) for text in texts]
    ['B', 'B', 'B', 'B', 'B', 'B', 'B', 'B']
    >>> [parse_letter(t) for t in ("A or B", "A, B", "A. B", "A) or B)", "A. cat, B. dog", "A cat", "")]
    [None, None, None, None, None, None, None]
    >>> parse_letter("B. E. coli")
    'B'
    """
    core = plain(text).replace("*", "").strip(DECORATION)
    letter, _, description = split_label(core[LEAD.match(core).end() :])
    parts = [split_label(part) for part in SEPARATOR.split(description) if part.strip(DECORATION)]
    if not parts:
        return letter
    second_letter, mark, second_description = parts[0]
    # as in "B. E. coli"
    if mark == "." and second_description:
        return letter
    if second_letter or any(other_letter and other_text for other_letter, _, other_text in parts[1:]):
        return None
    return letter


VALUE = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
NUMBER = re.compile(rf"[$€£¥₹]?([+-]?(?:{VALUE})(?:e[+-]?\d+)?)", re.ASCII | re.IGNORECASE)
# "3/4", "1 3/4"; not the dates "3/4/2020"
PART = r"(\d{1,9}(?:\.\d{1,9})?)"
RATIO = re.compile(rf"([+-]?)(?:(\d{{1,9}}) )?{PART} ?[/⁄∕] ?{PART}(?![\d.,/])", re.ASCII)
# what may precede the number: "the answer is", "答案:", "x ="
NUMBER_LEAD = re.compile(
    r"(?:(?:the |final |correct )*answer(?: is)?\s?:?|答案(?:是|为|為)?\s?:?|答えは?\s?:?)?\s?"
    r"(?:\\?[^\W\d]\w{0,15}\s?=|=)?\s?",
    re.IGNORECASE,
)
# units: "meters", "%", "km/h", "m^2", "m2", "个"; not the "x3" of "2x3"
LETTERS = r"a-z\u00c0-\u024fμω一-鿿ぁ-ヿ가-힣"
WORD = rf"[{LETTERS}%°][{LETTERS}°/·]*(?:\^[23]|(?<=m)[23])?"
UNIT = re.compile(rf"(?:(?:square|cubic|degrees) )?{WORD}(?: per {WORD})?", re.IGNORECASE)
# words that make another number of it, or none: "4 million" is not 4, nor is "12 AM" 12
SCALES = set(
    "k b bn bln tn trn mn mln mio mil mrd dozen score gross hundred thousand million billion trillion lakh lac crore "
    "millionen milliarden millones milliard quarter half halve third fourth fifth sixth seventh eighth ninth tenth "
    "hundredth thousandth millionth squared cubed am pm noon midnight oclock bc bce x e or and to plus minus".split()
)
# after a currency sign also these; capital letters always
SHORT_SCALES = set("m mm t".split())
# ten … trillion, a half, more than, o'clock
CJK_SCALE = re.compile("(?!百分|千[克米瓦])[十百千万亿萬億兆几多半余点點时時만억천시]")
SCRIPTS = str.maketrans({character: f"^{digit}" for digit, character in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}) | str.maketrans(
    {character: f"_{digit}" for digit, character in enumerate("₀₁₂₃₄₅₆₇₈₉")}
)


def parse_number(text):
    """The one number that `text` is, as a finite float; a currency sign before it and one unit after it are dropped.

    Thousands commas in threes ("1,00", "3,5", "0,500" are errors). "50%" is 50. A unit is one word, "square meters", or
    "miles per hour". Fractions, full-width digits, LaTeX, parentheses and "x =" are read. Raises ValueError for
    anything else: several numbers, other words before the number, scales ("4 million", "$1.2M", "3 lakh"), times ("12
    AM"), nan, inf, and numbers too large for a float.

    >>> [parse_number(t) for t in ("4.0", "1,000", "1e3", "-3", "50%", "$5", "3.5 square meters.")]
    [4.0, 1000.0, 1000.0, -3.0, 50.0, 5.0, 3.5]
    >>> [parse_number(t) for t in ("3/4", r"\\frac{3}{4}", "x = 5", "(5)", "５", r"$\\boxed{5\\text{ cm}}$")]
    [0.75, 0.75, 5.0, 5.0, 5.0, 5.0]
    """
    # "m²" is "m^2" and "4²" no 42
    core = " ".join(plain(text.translate(SCRIPTS)).split())
    # "**4**", "4 m.", "5€", "(5)"
    core = core.lstrip("*").rstrip("*.$€£¥₹。").replace("−", "-")
    core = core[NUMBER_LEAD.match(core).end() :]
    if core[:1] + core[-1:] in ("()", "[]"):
        core = core[1:-1].strip()
    ratio = RATIO.match(core)
    match = ratio or NUMBER.match(core)
    if not match:
        raise ValueError(f"not a number: {text[:40]!r}")
    unit = core[match.end() :].strip()
    if unit and (is_scale(unit, after_currency=core[0] in "$€£¥₹") or not UNIT.fullmatch(unit)):
        raise ValueError(f"not a number: {text[:40]!r}")
    if ratio:
        sign, whole, above, below = ratio.groups()
        if not float(below):
            raise ValueError(f"not a number: {text[:40]!r}")
        value = float(f"{sign}1") * (float(whole or 0) + float(above) / float(below))
    else:
        # float, not int: no limit on digits, and linear
        value = float(match[1].replace(",", ""))
    if not math.isfinite(value):
        raise ValueError(f"not a finite number: {text[:40]!r}")
    return value


def is_scale(unit, after_currency):
    """Whether the word after a number changes which number it is, or makes it a time."""
    word = unit.lower()
    if word in SCALES or word.rstrip("s") in SCALES or unit in ("M", "B", "T"):
        return True
    if after_currency and word in SHORT_SCALES:
        return True
    return CJK_SCALE.match(unit) is not None


def option_letters(options):
    """Letters of options like "A. text" or "(A) text"; A, B, C … by position unless every option has its own.

    Their own letters must go up, from A or without gaps: those of "E. coli", "S. aureus", "B. subtilis" are not labels.
    """
    found = [re.match(r"([A-Z])[.):]|\(([A-Z])\)", option) for option in options]
    own = [match[1] or match[2] for match in found if match]
    if own and len(own) == len(options) and own == sorted(set(own)):
        if own[0] == "A" or ord(own[-1]) - ord(own[0]) == len(own) - 1:
            return own
    return [chr(ord("A") + i) for i in range(len(options))]


def lettered(options):
    """Options as "A. text"; those that have their letters stay as they are.

    >>> lettered(["left", "right"]), lettered(["(A) left", "(B) right"])
    (['A. left', 'B. right'], ['(A) left', '(B) right'])
    """
    letters = option_letters(options)
    if all(re.match(rf"{letter}[.):]|\({letter}\)", option) for letter, option in zip(letters, options)):
        return list(options)
    return [f"{letter}. {option}" for letter, option in zip(letters, options)]


def tagged_solution(solution):
    """A solution with its tags: "<answer>3</answer>" of 3, "3" or itself."""
    text = str(solution)
    return text if any(tags_in(text)) else f"<answer>{text.strip()}</answer>"


def parse_solution(solution, problem_type, options=None):
    """The truth inside "<answer>…</answer>" or without tags: a letter, a number or a text. Else raises ValueError.

    With `options` the letter must be one of theirs. A free-form truth needs a word that ROUGE can read.
    """
    if problem_type not in ACCURACY:
        raise ValueError(f"no problem type {problem_type!r}: {', '.join(ACCURACY)}")
    truth = extract_answer(tagged_solution(solution))
    if not truth:
        raise ValueError(f"no answer in {solution!r:.80}")
    if problem_type == "multiple choice":
        letter = parse_letter(truth)
        if letter is None:
            raise ValueError(f"not one option's letter: {truth[:80]!r}")
        if options and letter not in option_letters(options):
            raise ValueError(f"answer {letter} is not among the options {', '.join(option_letters(options))}")
        return letter
    if problem_type in ("numerical", "regression"):
        return parse_number(truth)
    if problem_type == "free-form" and not rouge_words(plain(truth)):
        raise ValueError(f"no word that ROUGE can read (letters, digits) in {truth[:80]!r}")
    return truth


# ----------------------------------------------------------------------------------- accuracy of an answer, by type


def letter_accuracy(answer, letter):
    """1 if the answer names this letter and no other."""
    return float(parse_letter(answer) == letter)


def number_or_nan(answer):
    """The answer's number, or NaN, which equals nothing and earns nothing."""
    try:
        return parse_number(answer)
    except ValueError:
        return math.nan


def two_decimals(x):
    """x to two decimals, halves away from zero. round() uses the binary value: round(2.675, 2) is 2.67."""
    # NaN, or so large that it has no decimals
    if not abs(x) < 2**52:
        return x
    return float(Decimal(repr(x)).quantize(Decimal("0.01"), ROUND_HALF_UP))


def numerical_accuracy(answer, truth):
    """1 if the numbers are equal after rounding to two decimals (paper); small ones coincide: .001 answers .004."""
    return float(two_decimals(number_or_nan(answer)) == two_decimals(truth))


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


def relative_accuracy(prediction, truth):
    """1 − relative error, in [0, 1] (paper). The released code gives 1 to "nan", and 0 to a correct 0."""
    return max(0.0, 1.0 - relative_error(prediction, truth))


def edit_distance(a, b):
    """Fewest insertions, deletions and substitutions that turn list a into list b (Levenshtein)."""
    # row[j]: the distance of the words of a so far from the first j words of b
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        new_row = [i]
        for j, y in enumerate(b, 1):
            substitution = row[j - 1] if x == y else row[j - 1] + 1
            new_row.append(min(row[j] + 1, new_row[j - 1] + 1, substitution))
        row = new_row
    return row[-1]


def word_error_rate(reference, hypothesis):
    """Word edits from reference to hypothesis per reference word, at least 0; as in jiwer 4.0.

    For an empty reference it is the number of edits.
    """
    reference_words = jiwer_words(reference)
    return edit_distance(reference_words, jiwer_words(hypothesis)) / max(len(reference_words), 1)


def jiwer_words(text):
    """Words end at spaces and at runs of white space; like jiwer, a single tab or line break stays inside a word."""
    return [word for word in re.sub(r"\s\s+", " ", text).strip().split(" ") if word]


def ocr_accuracy(answer, truth):
    """1 − word error rate, at least 0 (paper). Any white space ends a word here: a line break is not an error (ours).

    Texts are compared in NFC: composed and decomposed accents are equal, full-width and ordinary letters are not.
    """
    answer = normalized("NFC", answer).split()
    truth = normalized("NFC", truth).split()
    # at least len(truth) insertions: the score is 0, and computing it would take long
    if len(answer) >= 2 * len(truth):
        return 0.0
    return max(0.0, 1.0 - word_error_rate(" ".join(truth), " ".join(answer)))


# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters.
SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def rouge_words(text):
    """Words for ROUGE: runs of letters, marks and digits; in a script without spaces each character is a word.

    For ASCII text these are the words of Google's rouge_score without stemming (the released code stems).

    >>> rouge_words("The cat's 2 mats"), rouge_words("naïve 猫が")
    (['the', 'cat', 's', '2', 'mats'], ['naïve', '猫', 'が'])
    """
    if text.isascii():
        return re.findall(r"[a-z0-9]+", text.lower())
    pieces = []
    for character in normalized("NFKC", text).lower():
        kind = unicodedata.category(character)
        if kind[0] not in "LMN" and kind != "Cf":
            pieces.append(" ")
        elif SPACELESS.match(character):
            pieces.append(f" {character} ")
        elif kind != "Cf":
            # Cf: invisible characters such as joiners
            pieces.append(character)
    return "".join(pieces).split()


def f1(overlap, n_reference, n_hypothesis):
    """Harmonic mean of overlap / n_reference and overlap / n_hypothesis; 0 for empty texts."""
    if not overlap:
        return 0.0
    return 2 * overlap / (n_reference + n_hypothesis)


def n_grams(words, n):
    """Counter of the runs of n words. Raises ValueError if n < 1."""
    if n < 1:
        raise ValueError(f"rouge_n needs n >= 1, got {n}")
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def rouge_n(reference, hypothesis, n):
    """F1 of the n-grams of two texts, in [0, 1]; as in rouge_score. Raises ValueError if n < 1."""
    a = n_grams(rouge_words(reference), n)
    b = n_grams(rouge_words(hypothesis), n)
    return f1((a & b).total(), a.total(), b.total())


def common_subsequence(a, b):
    """Length of the longest common subsequence of two lists."""
    # words that only one list has cannot be in it
    shared = set(a) & set(b)
    a = [word for word in a if word in shared]
    b = [word for word in b if word in shared]
    # row[j]: the length for the words of b so far and the first j words of a
    row = [0] * (len(a) + 1)
    for y in b:
        new_row = [0]
        for j, x in enumerate(a, 1):
            new_row.append(row[j - 1] + 1 if x == y else max(row[j], new_row[j - 1]))
        row = new_row
    return row[-1]


def rouge_l(reference, hypothesis):
    """F1 of the longest common subsequence of words, in [0, 1]; as in rouge_score."""
    a = rouge_words(reference)
    b = rouge_words(hypothesis)
    return f1(common_subsequence(a, b), len(a), len(b))


def free_form_accuracy(answer, truth):
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L (paper). A truth of one word has no 2-grams, so its best score is 2/3."""
    answer = plain(answer)
    truth = plain(truth)
    return (rouge_n(truth, answer, 1) + rouge_n(truth, answer, 2) + rouge_l(truth, answer)) / 3


def regression_accuracy(answer, truth):
    """Relative accuracy of the number in an answer, in [0, 1] (paper)."""
    return relative_accuracy(number_or_nan(answer), truth)


# {problem type: function of the model's answer and the parsed truth, with a value in [0, 1]}
ACCURACY = {
    "multiple choice": letter_accuracy,
    "numerical": numerical_accuracy,
    "OCR": ocr_accuracy,
    "free-form": free_form_accuracy,
    "regression": regression_accuracy,
}


# ------------------------------------------------------------------------------------------------------- the rewards


def accuracy_reward(completion, solution, problem_type):
    """How correct the completion's answer is, in [0, 1] (paper). Without an answer block, or with an empty one: 0.

    Raises ValueError only for an unknown problem type or a bad solution.

    >>> accuracy_reward("<think>…</think><answer>1,000</answer>", "<answer>1000</answer>", "numerical")
    1.0
    """
    truth = parse_solution(solution, problem_type)
    answer = extract_answer(completion)
    if not answer:
        return 0.0
    return ACCURACY[problem_type](answer, truth)


def format_reward(completion):
    """1 if the text is one think block, then one answer block, and only white space around them, else 0 (paper).

    The blocks may be empty: this reward is about form. No tag may occur twice (the released pattern lets tags nest).

    >>> format_reward("<think>It turns.</think>\\n<answer>B</answer>")
    1.0
    >>> format_reward("B <think></think><answer>B</answer>")
    0.0
    """
    tags = list(tags_in(completion))
    if [tag for tag, _, _ in tags] != list(TAGS):
        return 0.0
    think_open, think_close, answer_open, answer_close = [(start, end) for _, start, end in tags]
    before = completion[: think_open[0]]
    between = completion[think_close[1] : answer_open[0]]
    after = completion[answer_close[1] :]
    return float(not (before + between + after).strip())


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
    # also pays if the order made no difference, and if both are 0
    if rule == "paper":
        return alpha if p >= p_shuffled else 0.0
    # pays even if the order hurt a little
    if rule == "released":
        return alpha if p >= 0.8 * p_shuffled else 0.0
    if rule == "none":
        return 0.0
    raise ValueError(f"no temporal rule {rule!r}: margin, paper, released or none")


def length_reward(n_tokens, correct, l_min=320, l_max=512, omega=0.2):
    """omega for a correct completion of l_min to l_max tokens, both included (paper), else 0. The end-of-turn counts.

    The released code also asks for two correct completions in the group; here completions are independent.
    """
    return omega if correct and l_min <= n_tokens <= l_max else 0.0
