"""Reading answers: the answer block of a completion, and the letter or number that its text means.

    extract_answer                 the text of the answer block
    parse_letter, parse_number     what a person would read in it; anything else is None or a ValueError
    without_latex                  the text without LaTeX and full-width forms
    lettered, option_letters       the options of a question

Every function takes linear time, because a model may write anything.
"""

import math
import re
import unicodedata
from decimal import ROUND_HALF_UP, Decimal

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

    A think block that is never closed contains all that follows; a </think> without an opening tag, all before it. Of
    nested answer blocks the innermost counts. The last block counts, not the first as in the released code: a model
    that corrects itself means the last.

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


def without_latex(text):
    """The text in NFKC (full-width forms, ligatures) and without LaTeX boxes, fonts, dollars and fractions.

    >>> without_latex(r"$\\boxed{\\text{B}}$"), without_latex("Ｂ"), without_latex(r"3\\frac{1}{2}")
    ('B', 'B', '3 1/2')
    """
    text = normalized("NFKC", MIXED.sub(" ", text))
    if any(sign in text for sign in "\\${"):
        for command, replacement in LATEX.items():
            text = text.replace(command, replacement)
        text = DOLLARS.sub(lambda match: match[1] or "", text)
        # wrappers inside each other, as in \boxed{\text{B}}
        for _ in range(4):
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
    """("B", ")", " the cat") for "(B) the cat", ("B", "", "") for "B", (None, "", "") for a text without a label."""
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
    """The option letter that `text` names, "A" to "Z"; None if it names none or several.

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
    core = without_latex(text).replace("*", "").strip(DECORATION)
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


def one_letter(text):
    """The letter that the text of a solution names. Raises ValueError if it names none or several."""
    letter = parse_letter(text)
    if letter is None:
        raise ValueError(f"not one option's letter: {text[:80]!r}")
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
# words that change the number ("4 million") or turn it into something else ("12 AM")
SCALES = set(
    "k b bn bln tn trn mn mln mio mil mrd dozen score gross hundred thousand million billion trillion lakh lac crore "
    "millionen milliarden millones milliard quarter half halve third fourth fifth sixth seventh eighth ninth tenth "
    "hundredth thousandth millionth squared cubed am pm noon midnight oclock bc bce x e or and to plus minus".split()
)
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
    core = " ".join(without_latex(text.translate(SCRIPTS)).split())
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
    if after_currency and word in ("m", "mm", "t"):
        return True
    return CJK_SCALE.match(unit) is not None


def option_letters(options):
    """Letters of options like "A. text" or "(A) text"; A, B, C … by position unless every option has its own.

    Its own letters ascend, and start at A or have no gaps: not those of "E. coli", "S. aureus", "B. subtilis".
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
