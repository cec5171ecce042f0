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
import unicodedata
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal

CORRECT = 0.5  # a completion is correct if its accuracy is larger (the paper's p; the released code has 0.1)

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
    answer, opened, thinking = None, None, False  # opened: where the content of an open answer block starts
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


# ------------------------------------------------------------------------------------------- reading what was written


def normalized(form, text):
    """The text in this Unicode normal form; as it is if more than 30 combining marks follow each other.

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
    """The text without its dress: NFKC (full-width forms, ligatures), and LaTeX's boxes, fonts, dollars and fractions.

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
    r"|(?:正确|正確|答案|选项|選項|选择|選擇|故选|故選|选|選|是|为|為|答え|正解|は|정답)[\s:]*)*",
    re.IGNORECASE,
)
SEPARATOR = re.compile(r"[,;/&\n]|\b(?:or|and)\b|[或和]", re.IGNORECASE)


def split_label(text):
    """("B", ")", " the cat") of "(B) the cat", ("B", "", "") of a lone letter, (None, "", "") of all else."""
    core = text.strip(DECORATION)
    letter, mark, rest = core[:1], core[1:2], core[2:]
    if not (letter.isascii() and letter.isalpha()):
        return None, "", ""
    # "e.g. this" has no label; scripts without spaces put none after it
    parted = rest[:1].isspace() or not rest[:1].isascii()
    if mark in ("", ")", "、") or mark in (".", ":") and parted:
        return letter.upper(), mark, rest
    return None, "", ""


def parse_letter(text):
    """The option letter that `text` names, "A" to "Z"; None if it names none, or more than one (ours; released: equal text).

    A lone letter in any punctuation or LaTeX, or a letter with ) or : or . before the option's text; "the answer is",
    "option", "答案：" may lead. Without punctuation only a lone letter counts ("A cat" has an article). The text after the
    letter may not begin with a second lone letter, nor hold a second labelled option, unless it begins with an initial.

    >>> [parse_letter(t) for t in ("b", "(B)", "**B.**", "B. 3", "(b) the cat", "Option B", "The answer is B.", "答案：B")]
    ['B', 'B', 'B', 'B', 'B', 'B', 'B', 'B']
    >>> [parse_letter(t) for t in ("A or B", "A, B", "A. B", "A) or B)", "A. cat, B. dog", "A cat", "")]
    [None, None, None, None, None, None, None]
    >>> parse_letter("B. E. coli")
    'B'
    """
    core = plain(text).replace("*", "").strip(DECORATION)
    letter, _, rest = split_label(core[LEAD.match(core).end() :])
    pieces = [split_label(piece) for piece in SEPARATOR.split(rest) if piece.strip(DECORATION)]
    if pieces:
        first, mark, first_text = pieces[0]
        initial = mark == "." and first_text
        if first and not initial:
            return None
        if not initial and any(other and other_text for other, _, other_text in pieces[1:]):
            return None
    return letter


VALUE = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
NUMBER = re.compile(rf"[$€£¥₹]?([+-]?(?:{VALUE})(?:e[+-]?\d+)?)", re.ASCII | re.IGNORECASE)
# "3/4", "1 3/4"; not the dates "3/4/2020"
PART = r"(\d{1,9}(?:\.\d{1,9})?)"
RATIO = re.compile(rf"([+-]?)(?:(\d{{1,9}}) )?{PART} ?[/⁄∕] ?{PART}(?![\d.,/])", re.ASCII)
# what may stand before the number: "the answer is", "答案:", "x ="
NUMBER_LEAD = re.compile(
    r"(?:(?:the |final |correct )*answer(?: is)?\s?:?|答案(?:是|为|為)?\s?:?|答えは?\s?:?)?\s?(?:\\?[^\W\d]\w{0,15}\s?=|=)?\s?",
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
    unit = core[match.end() :].strip() if match else ""
    if not match or unit and is_scale(unit, after_currency=core[0] in "$€£¥₹") or unit and not UNIT.fullmatch(unit):
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
    if {word, word.rstrip("s")} & SCALES or unit in ("M", "B", "T"):
        return True
    return (after_currency and word in SHORT_SCALES) or bool(CJK_SCALE.match(unit))


def option_letters(options):
    """Letters of options like "A. text" or "(A) text"; A, B, C … by position unless every option has its own.

    Their own letters must go up, from A or without gaps: those of "E. coli", "S. aureus", "B. subtilis" are no labels.
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
    """The truth inside "<answer>…</answer>", or a bare one: a letter, a number or a text. Else ValueError, in one line.

    With `options` the letter must be one of theirs. A free-form truth needs a word that ROUGE can see.
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
        raise ValueError(f"no word that ROUGE can see (letters, digits) in {truth[:80]!r}")
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
    if not abs(x) < 2**52:  # NaN, or so large that it has no decimals
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
    thresholds = [0.5 + i * ((0.95 - 0.5) / 9) for i in range(10)]  # numpy.linspace to the bit, as ties depend on it
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
    words, others = (
        [w for w in re.sub(r"\s\s+", " ", text).strip().split(" ") if w] for text in (reference, hypothesis)
    )
    return edit_distance(words, others) / max(len(words), 1)


def ocr_accuracy(answer, truth):
    """1 − word error rate, not below 0 (paper). Any white space ends a word here: a line break is no error (ours).

    Texts are compared in NFC: an accent may be a character of its own or not, but a full-width letter is another
    letter.
    """
    answer = normalized("NFC", answer).split()
    truth = normalized("NFC", truth).split()
    if len(answer) >= 2 * len(truth):  # at least len(truth) insertions: cannot earn, so do not compute
        return 0.0
    return max(0.0, 1.0 - word_error_rate(" ".join(truth), " ".join(answer)))


# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters.
SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def rouge_words(text):
    """Words as ROUGE reads them: runs of letters, marks and digits; each character alone in a script without spaces.

    Of ASCII text these are Google's, without stemming (the released code stems: "cats" meets "cat" there).

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
            # Cf: joiners and the like, which no one sees
            pieces.append(character)
    return "".join(pieces).split()


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
        row = ((row + hit) | (row - hit)) & full  # the carry moves each growth to the first match after the last one
    return len(a) - row.bit_count()


def rouge_l(reference, hypothesis):
    """F1 of the longest common subsequence of words, in [0, 1]; Google's."""
    a, b = rouge_words(reference), rouge_words(hypothesis)
    return f1(common_subsequence(a, b), len(a), len(b))


def free_form_accuracy(answer, truth):
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L (paper). A truth of one word has no pairs: met exactly it earns 2/3."""
    answer = plain(answer)
    truth = plain(truth)
    return (rouge_n(truth, answer, 1) + rouge_n(truth, answer, 2) + rouge_l(truth, answer)) / 3


ACCURACY = {  # each: (the model's answer, the parsed truth) -> [0, 1]
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
    if rule == "paper":  # also pays where order made no difference, and where both are 0
        return alpha if p >= p_shuffled else 0.0
    if rule == "released":  # pays even where order hurt a little
        return alpha if p >= 0.8 * p_shuffled else 0.0
    if rule == "none":
        return 0.0
    raise ValueError(f"no temporal rule {rule!r}: margin, paper, released or none")


def length_reward(n_tokens, correct, l_min=320, l_max=512, omega=0.2):
    """omega for a correct completion of l_min to l_max tokens, both included (paper; end-of-turn token counted), else 0.

    The released code also asks for two correct completions in the group; here each completion stands for itself.
    """
    return omega if correct and l_min <= n_tokens <= l_max else 0.0
