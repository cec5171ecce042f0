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
# "3½" and "3\frac{1}{2}" are three and a half, "①②" no twelve: keep the parts apart
CIRCLED = "①-⓿㉈-㉟㊱-㊿"
MIXED = re.compile(rf"(?<=[\d{CIRCLED}])(?=[¼½¾⅐-⅞↉{CIRCLED}]|\\[dt]?frac)|(?<=[{CIRCLED}])(?=\d)")
DOLLARS = re.compile(r"\$\$?([^$]*)\$\$?|\\\(|\\\)|\\\[|\\\]")
LATEX = {
    r"\quad": " ",
    "\\ ": " ",
    "~": " ",
    r"\%": "%",
    r"\$": "$",
    "{,}": ",",
    r"\,": " ",
    r"\;": " ",
    r"^{\circ}": "°",
    r"^\circ": "°",
    r"\degree": "°",
}


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


DECORATION = " \t\r\n\xa0\u200b()[]{}<>.,:;!?*_`'\"“”‘’«»$-–•。、【】「」『』"
LEAD = re.compile(
    r"(?:(?:the|best|correct|final|answer|ans|option|choice|is|it['’]s|it|so|then|maybe)\b[\s:]*"
    r"|(?:正确|正確|答案|选项|選項|选择|選擇|故选|故選"
    r"|选|選|是|为|為|答え|正解|は|정답)[\s:]*)*",
    re.IGNORECASE,
)
SEPARATOR = re.compile(r"[,;/|&\n]|\b(?:or|and)\b|[或和]|(?<!\bMr|\bMs|\bDr)\. (?=[A-J]$)", re.IGNORECASE)


# a letter alone or "B) x", or an option's letter and what ends it; "e.g. this", "U.S. Navy", "A cat" have none
LABEL = re.compile(
    r"([A-Za-z])($|(?<=[A-Z])[.:)] ?[a-z]$|[)\]}】」、,\n]|[.:](?![A-Za-z]\.)| [-–—→]+ | \(|(?i: because )"
    r"|(?i: is (?:the |also )?(?:correct|right|best|answer))\b"
    r"| ?(?:选项|選項|项|項)?[是也]*(?:正确|正確|对|對)(?![A-Za-z])| ?(?:选项|選項|项|項)(?=$|[:,]))"
)
# a label inside of the text after one, as in "A) left B) right"; after a dot only of the letters that options usually
# have, as in "A. left B. right"
INNER_LABEL = re.compile(r"(?<=\s)\(?(?:([A-Z])[):]|([A-J])\.)(?=\s)|(?i:answer is:? )\(?([A-Z])\b")
# the text of an option about others, as in "C. A and B"
COMBINATION = re.compile(r"(?:\(?[A-Z]\)?, ?)*\(?[A-Z]\)?(?:,? and | ?& ?| ?和 ?)\(?[A-Z]\)?(?: only)?")


def split_label(text):
    """("B", ")", " the cat") for "(B) the cat", ("B", "", "") for "B", (None, "", "") for a text without a label."""
    core = text.strip(DECORATION)
    label = LABEL.match(core)
    if not label:
        return None, "", ""
    return label[1].upper(), label[2], core[label.end() :]


def parse_letter(text):
    """The option letter that `text` names, "A" to "Z"; None if it names none or several.

    A lone letter in any punctuation or LaTeX, or a letter before the option's text ("B.left", "B - left") or before "is
    correct", "because", "选项"; "the answer is", "option", "答案：" may precede it. Else only a lone letter counts ("A
    cat" has an article). The text after the letter may not name a second option, unless it begins with an initial or is
    a list of earlier options ("C. A and B").

    >>> texts = ("b", "(B)", "**B.**", "B. E. coli", "(b) the cat", "Option B", "The answer is B.", "答案：B")
    >>> [parse_letter(text) for text in texts]
    ['B', 'B', 'B', 'B', 'B', 'B', 'B', 'B']
    >>> [parse_letter(t) for t in ("A or B", "A, B", "A. B", "A) or B)", "A. cat, B. dog", "A cat", "")]
    [None, None, None, None, None, None, None]
    """
    core = without_latex(text).replace("*", "").strip(DECORATION)
    core = core[LEAD.match(core).end() :]
    letter, label_mark, description = split_label(core)
    parts = [part.strip(DECORATION) for part in SEPARATOR.split(description)]
    parts = [part[LEAD.match(part).end() :].strip(DECORATION) for part in parts]
    parts = [part for part in parts if part]
    labels = [split_label(part) for part in parts]
    # as in "B. E. coli" or "B. U.S.A", but not "A. B. C. D"
    if labels and labels[0][1] == "." and re.search(r"[^\W\d_]{2}|^[^\W\d_]$", labels[0][2]):
        return letter
    # of options before it; "A. B and C" and "C, A and B" name three
    others = re.findall("[A-Z]", description)
    is_of_earlier = others == sorted({*others, letter})[:-1]
    if is_of_earlier and COMBINATION.fullmatch(description.strip(DECORATION)) and label_mark not in ",、\n":
        return letter
    # letters in the other case are the option's text, as in "A. x, y"
    named = set()
    for i, (part, (other, mark, _)) in enumerate(zip(parts, labels)):
        # an order, as in "B. C → A", names no second option
        is_order = mark.strip(" -–—→") == "" != mark
        # nor does a list, as in "A. vitamins C, D", or a letter that is rarely an option's, as in "B. he and I"
        follows_letter = i > 0 and re.search(r"(?<![A-Za-z])[A-Z]\d*$", parts[i - 1])
        is_listed = i > 0 and not mark and (follows_letter or re.fullmatch("[IK-Z]", part))
        if part[0].isupper() == core[0].isupper() and not is_listed and not is_order:
            named.add(other)
    named |= {"".join(groups) for groups in INNER_LABEL.findall(description)}
    return letter if named <= {letter, None} else None


def one_letter(text):
    """The letter that the text of a solution names. Raises ValueError if it names none or several."""
    letter = parse_letter(text)
    if letter is None:
        raise ValueError(f"not one option's letter: {text[:80]!r}")
    return letter


MONEY_FIRST = re.compile(r"^([+-]?)(?:US)?([$€£¥₹]) ?")
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
# What may follow a number. Any other word is refused, because it may change the number: "4 million", "2 pi", "12 AM".
MONEY = "cent dollar euro yuan rmb usd eur gbp cny jpy 元 美元 欧元 歐元 日元 人民币 块 塊 円 원"
UNITS = f"""
m meter metre nm μm um mm cm dm km in inch inches ft foot feet yd yard mi mile Å 米 毫米 厘米 公分 分米 千米 公里 英里
英尺 英寸 センチ メートル キロ 미터 acre ha hectare 公顷 亩 L l ml cl dl liter litre gallon cup tsp tbsp 升 毫升 g kg mg
gram kilogram t ton tonne lb pound oz ounce 克 千克 公斤 斤 吨 噸 s ms us μs ns h sec second min minute hr hour day week
month yr year 秒 秒钟 秒鐘 分 分钟 分鐘 小时 小時 時間 天 日 周 週 星期 个月 個月 年 岁 歲 歳 초 분 시간 일 년 살 %
percent pct ° deg degree rad radian °C °F C F celsius fahrenheit kelvin 度 摄氏度 攝氏度 mph kmh kph knot rpm fps Hz kHz
MHz GHz N kN J kJ cal kcal kWh eV W kW MW V mV kV A mA Ω Pa kPa MPa bar atm psi mol dB newton joule volt watt ohm bit
byte KB MB GB TB px pixel 个 個 人 次 只 隻 名 位 件 张 張 条 條 辆 輛 本 头 頭 匹 枚 台 回 种 種 棵 颗 顆 根 朵 座 把
层 層 步 页 頁 つ 개 명 번 마리 {MONEY}"""
# a single letter counts as it is written: 5 m, but not 5 M
LONG_UNITS = "|".join(re.escape(unit) for unit in UNITS.split() if len(unit) > 1)
SHORT_UNITS = "".join(unit for unit in UNITS.split() if len(unit) == 1)
WORD = rf"(?:(?i:(?:{LONG_UNITS})s?)|[{SHORT_UNITS}])(?:\^[23]|(?<=m)[23])?"
UNIT = re.compile(rf"(?:(?i:square|sq|cubic|degrees?) |平方|立方)?{WORD}(?:(?:[/·每]| per ){WORD})*")
SCRIPTS = str.maketrans({character: f"^{digit}" for digit, character in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}) | str.maketrans(
    {character: f"_{digit}" for digit, character in enumerate("₀₁₂₃₄₅₆₇₈₉")}
)


def parse_number(text):
    """The one number that `text` is, as a finite float; a currency sign before it and a unit after it are dropped.

    Thousands commas in threes ("1,00", "3,5", "0,500" are errors). "50%" is 50. A unit is one of UNITS, "square
    meters", "km/h", or "miles per hour". Fractions, full-width digits, LaTeX, parentheses and "x =" are read. Raises
    ValueError for anything else: several numbers, other words ("4 million", "$1.2M", "12 AM", "4 chairs"), nan, inf,
    and numbers too large for a float.

    >>> [parse_number(t) for t in ("4.0", "1,000", "1e3", "-3", "50%", "$5", "3.5 square meters.")]
    [4.0, 1000.0, 1000.0, -3.0, 50.0, 5.0, 3.5]
    >>> [parse_number(t) for t in ("3/4", r"\\frac{3}{4}", "x = 5", "(5)", "５", r"$\\boxed{5\\text{ cm}}$")]
    [0.75, 0.75, 5.0, 5.0, 5.0, 5.0]
    """
    # "m²" is "m^2" and "4²" no 42
    core = " ".join(without_latex(text.translate(SCRIPTS)).split())
    # "**4**", "4 m.", "5€", "`5`"
    core = core.lstrip("*`'\"“”\u200b").rstrip("*.;`'\"“”\u200b$€£¥₹。").replace("−", "-")
    core = core[NUMBER_LEAD.match(core).end() :]
    if core[:1] + core[-1:] in ("()", "[]", "{}"):
        core = core[1:-1].strip()
    # "–5", "-$5", "US$ 5"
    core = MONEY_FIRST.sub(r"\2\1", re.sub("^–", "-", core))
    ratio = RATIO.match(core)
    match = ratio or NUMBER.match(core)
    # "5 (cm)", "5 km / h"
    unit = core[match.end() :].strip(" ()").replace(" / ", "/") if match else ""
    is_known = unit.lower().removesuffix("s") in MONEY.split() if core[:1] in "$€£¥₹" else UNIT.fullmatch(unit)
    if not match or (unit and not is_known):
        raise ValueError(f"not a number: {text[:40]!r}")
    if ratio:
        sign, whole, above, below = ratio.groups()
        fraction = float(above) / float(below) if float(below) else math.inf
        value = float(f"{sign}1") * (float(whole or 0) + fraction)
    else:
        # float, not int: no limit on digits, and linear
        value = float(match[1].replace(",", ""))
    if not math.isfinite(value):
        raise ValueError(f"not a finite number: {text[:40]!r}")
    return value


# the label of an option: "A. text", "(A) text", "A、text"
OPTION_LABEL = re.compile(r"\s*[(（]?([A-Z])[.):、．：）]")


def option_letters(options):
    """Letters of options like "A. text" or "(A) text"; A, B, C … by position unless every option has its own.

    Its own letters ascend, and start at A or have no gaps: not those of "E. coli", "S. aureus", "B. subtilis".
    """
    own = [match[1] for match in map(OPTION_LABEL.match, options) if match]
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
    if letters == [match[1] for match in map(OPTION_LABEL.match, options) if match]:
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
