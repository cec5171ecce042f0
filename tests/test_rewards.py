"""rewards.py: each test names the bug that it would catch.

Three kinds: tables of (answer, truth, score); our ROUGE, WER and MRA against the reference programs; hostile text.
"""

import math
import random
import time

import pytest

import rewards
from benchmarks.vsibench import mean_relative_accuracy
from rewards import (
    CORRECT,
    accuracy_reward,
    format_reward,
    length_reward,
    parse_solution,
    temporal_reward,
)
from support import parsing, text_scores
from support.parsing import extract_answer, parse_letter, parse_number
from support.text_scores import edit_distance, rouge_l, rouge_n, word_error_rate


def tagged(answer):
    return f"<think>so it is</think>\n<answer>{answer}</answer>"


def score(problem_type, answer, truth):
    return accuracy_reward(tagged(answer), f"<answer>{truth}</answer>", problem_type)


# ------------------------------------------------------------------------------------------------- finding the answer


# fmt: off
ANSWERS = [
    # one block, stripped; none, or half of one
    ("<answer>B</answer>", "B"), ("<answer>\n B \t</answer>", "B"), ("<answer></answer>", ""), ("", None), ("B", None),
    ("<answer>B", None), ("B</answer>", None),
    # the last complete one
    ("<answer>A</answer><answer>B</answer>", "B"), ("<answer>A</answer><answer>B", "A"),
    # not inside a think block, which may never close
    ("<think><answer>A</answer></think>", None), ("<think><answer>A</answer></think><answer>B</answer>", "B"),
    ("<answer>B</answer><think><answer>A</answer></think>", "B"), ("<think><answer>A</answer>", None),
    ("<answer>A</answer><think><answer>B</answer>", "A"),
    ("<think>x</think><answer>A</answer><think>y</think><answer>B</answer>", "B"),
    ("<think>x</think><answer>A</answer><think>y</think>", "A"),
    # a think block that the prompt opened
    ("<answer>A</answer></think><answer>B</answer>", "B"), ("<answer>A</answer></think>", None),
    # nested blocks: of answers the innermost; opened inside, closed outside
    ("<think><think>x</think><answer>A</answer></think>", None), ("<answer>A<answer>B</answer></answer>", "B"),
    ("<answer>A<think>B</think></answer>", None), ("<think>x<answer></think>A</answer>", None),
    ("<answer>A<think></answer></think>", None),
    # what is no tag
    ("<Answer>A</Answer>", None), ("< answer>A</ answer>", None), ("<<answer>A<</answer>>", "A<"),
    ("<answer>1<2</answer>", "1<2"),
]
# fmt: on


@pytest.mark.parametrize("text, answer", ANSWERS)
def test_extract_answer(text, answer):
    """Guards: an answer tried out in the think block, the first of two answers, or half a block."""
    assert extract_answer(text) == answer


# for each problem type a solution that is its own best answer
TRUTHS = {"multiple choice": "B", "numerical": "4", "OCR": "NO EXIT", "free-form": "the cat sat", "regression": "4"}


@pytest.mark.parametrize("problem_type, truth", TRUTHS.items())
def test_a_text_without_tags_never_matches(problem_type, truth):
    """Guards: whole texts compared if there are no tags, so that "B" matches the solution "B" (released code); one
    record's type used for its neighbours (released code).
    """
    assert score(problem_type, truth, truth) == 1 > CORRECT
    assert accuracy_reward(truth, f"<answer>{truth}</answer>", problem_type) == 0
    assert accuracy_reward(f"<think><answer>{truth}</answer></think>", f"<answer>{truth}</answer>", problem_type) == 0
    # a solution needs no tags, an answer does
    assert accuracy_reward(truth, truth, problem_type) == 0


WELL_FORMED = [
    "<think>a</think><answer>B</answer>",
    "\n <think>a</think> \n\t<answer>B</answer>\n",
    "<think></think><answer></answer>",
    # other angle brackets are text
    "<think>1 < 2, <b></think><answer>x > y</answer>",
]
# fmt: off
BADLY_FORMED = [
    # text outside of the blocks
    "x<think>a</think><answer>B</answer>", "<think>a</think>x<answer>B</answer>", "<think>a</think><answer>B</answer>.",
    "<think>a</think><answer>B</answer>\x00",
    # another order, too few or too many blocks
    "<answer>B</answer><think>a</think>", "<answer>B</answer>", "<think>a</think>", "",
    "<think>a</think><answer>A</answer><answer>B</answer>", "<think>a</think><think>b</think><answer>B</answer>",
    # nested and stray tags
    "<think>a<think></think><answer>B</answer>", "<think>a</think><answer>B</answer></answer>",
    "<think><answer>B</answer></think>", "<think>a<answer></think>B</answer>", "<THINK>a</THINK><answer>B</answer>",
]
# fmt: on


@pytest.mark.parametrize("text, reward", [*[(t, 1) for t in WELL_FORMED], *[(t, 0) for t in BADLY_FORMED]])
def test_format_reward(text, reward):
    """Guards: a pattern like <think>.*</think> that swallows repeated tags, or ignores text outside the blocks."""
    assert format_reward(text) == reward


# ------------------------------------------------------------------------------------------------------ multiple choice


# fmt: off
NAMES_B = [
    # a lone letter
    "B", "b", "B.", "B)", "(B)", "(b)", "[B]", "B:", " B ", "**B**", "**B.**", "`B`", '"B"', "$B$", "\xa0B", "B!",
    # a letter before the option's text
    "B. the cat", "B) the cat", "B: the cat", "(B) the cat", "(B)the cat", "**B.** the cat", "**B**. the cat",
    "B.\nthe cat", "B. 3", "B. x y", "B. the cat, the dog", "B. salt and pepper", "B. George W. Bush",
    # words before it
    "Option B", "option (B)", "Answer: B", "The answer is B.", "The correct option is: B. the cat",
    # the words that Video-MME's extractor strips
    "The best answer is B", "The correct answer is B", "The answer is B", "The answer B", "The best option is B",
    "The correct option is B", "Best answer: B", "Best option: B", "Answer: B", "Option: B",
    # other scripts
    "Ｂ", "ⓑ", "（Ｂ）", "B．猫", "B、猫", "B：猫", "【B】",
]
NAMES_ANOTHER = [("D. Both A and B", "D"), ("n", "N"), ("Z", "Z"), ("I. think", "I")]
NAMES_NONE = [
    # nothing
    "", " ", ".", "()", "best", "The best of B",
    # several
    "A or B", "A and B", "A, B", "A/B", "A & B", "A; B", "A B", "AB", "A\nB", "a or b", "Options A, B", "A. B", "A.B",
    "A) or B)", "(A) and (B)", "A. cat, B. dog", "A. cat\nB. dog", "A. cat or B. dog", "A: cat / B: dog",
    # words
    "A cat", "a cat", "I think B", "not B", "B because", "Bear", "the cat", "e.g. this", "U.S. Navy", "4", "4. B",
    # other scripts
    "ß", "é", "Б", "\ud800", "\x00",
]
# fmt: on


@pytest.mark.parametrize(
    "text, letter",
    [*[(text, "B") for text in NAMES_B], *NAMES_ANOTHER, *[(text, None) for text in NAMES_NONE]],
)
def test_parse_letter(text, letter):
    """Guards: 0 for "B.", "(B)" and "b" (released code); 1 for "A or B" and for the article in "A cat" (others)."""
    assert parse_letter(text) == letter
    if letter:
        assert (
            score("multiple choice", text, letter) == 1
            and parse_solution(f"<answer>{text}</answer>", "multiple choice") == letter
        )
    for wrong in {"A", "B", "C", "I", "E"} - {letter}:
        assert score("multiple choice", text, wrong) == 0


def test_every_letter_is_read():
    """Guards: unknown letters beyond D, or beyond the options of one benchmark."""
    for i in range(26):
        assert parse_letter(f"({chr(97 + i)})") == parse_letter(f"{chr(65 + i)}. text") == chr(65 + i)


# -------------------------------------------------------------------------------------------------------------- numbers


# fmt: off
NUMBERS = [
    ("4", 4), ("4.0", 4), ("4.", 4), ("004", 4), ("+4", 4), ("-3", -3), ("−3", -3), ("0", 0),
    ("-0.0", 0), (".5", 0.5), ("-.5", -0.5), ("1,000", 1000), ("12,345,678.9", 12345678.9), ("1e3", 1000),
    ("1E3", 1000), ("2.5e-1", 0.25), ("1e+2", 100), ("50%", 50), ("50 %", 50), ("$5", 5), ("$1,000.50", 1000.5),
    ("€5", 5), ("$4$", 4), ("**4**", 4), (" 4\n", 4), ("3.5.", 3.5), ("4" + " " * 600, 4), ("1e-999999", 0),
    ("0." + "3" * 9999, 1 / 3), ("3.5 meters", 3.5), ("3.5m", 3.5), ("3.5 m.", 3.5), ("12 m^2", 12),
    ("12 m2", 12), ("12 m²", 12), ("12 square meters", 12), ("9.8 m/s^2", 9.8), ("60 km/h", 60),
    ("60 miles per hour", 60), ("20 °C", 20), ("20 degrees Celsius", 20), ("3\nmeters", 3),
    ("50 percent", 50),
]
NOT_NUMBERS = [
    # no digit
    "", " ", ".", "-", "+", "%", ",", "e", "e3", ".e3", "four", "meters", "nan", "NaN", "inf", "-inf", "Infinity",
    # commas and points in wrong places
    "1,00", "3,5", "1,0000", "1000,000", "1,000,00", "1,,000", ",000", "0,500", "1,000,", "1.000.000", "1 000", "1,2,3",
    "1_000",
    # several numbers
    "4, not 5", "4 not five", "between 3 and 4", "3 and 4", "3 or four", "3 to 4", "3-4", "3–4", "3 4", "3 meters 4",
    "4 5 meters",
    # other words, formulas, times
    "- 3", "about 4", "4 (four)", "4 maybe five", "2x3", "2x", "2 x 3", "2^3", "4²", "5:30", "1e", "1e+", "0x10",
    # scales, signs, numbers too large for a float, other digits
    "4 million", "4 thousand", "4k", "4 dozen", "--4", "+-4", "4-", "1e999", "-1e999999", "9" * 400, "٤", "²", "4₂",
]
# fmt: on


@pytest.mark.parametrize("text, number", [*NUMBERS, *[(text, None) for text in NOT_NUMBERS]])
def test_parse_number(text, number):
    """Guards: 0 for "4.0" if the truth is "4", or "1000" for "1,000" (released code); 1 for "4, not 5"."""
    if number is None:
        with pytest.raises(ValueError, match="number"):
            parse_number(text)
        assert score("numerical", text, "4") == score("regression", text, "4") == 0
    else:
        value = parse_number(text)
        assert isinstance(value, float) and value == pytest.approx(number, rel=1e-15)


def test_numbers_that_python_writes_are_read_back():
    """Guards: a notation that Python itself writes and that is refused or read differently."""
    rng = random.Random(0)
    for _ in range(500):
        x = rng.uniform(-1, 1) * 10 ** rng.randint(-12, 12)
        assert parse_number(repr(x)) == parse_number(f" {x!r} meters.") == parse_number(f"{x:.17e}") == x
        assert parse_number(f"{x:,.6f}") == float(f"{x:.6f}")


# A text, and what is read from it: a letter, a number, or nothing.
# fmt: off
READ = [
    # Unicode forms
    ("Ｂ", "B"), ("（ｂ）", "B"), ("答案：B", "B"), ("答案是B。", "B"), ("正确答案为（C）", "C"), ("故选D", "D"),
    ("选项 B", "B"),
    ("答え：Ｂ", "B"), ("５", 5), ("１，０００", 1000), ("－５", -5), ("答案：5", 5), ("5个", 5), ("３.５米", 3.5),
    ("5千克", 5),
    ("½", 0.5), ("3½", 3.5), ("℃", None), ("5万", None), ("3亿元", None), ("12点", None), ("4²", None), ("10⁻³", None),
    ("12 m²", 12), ("5 ㎝", 5), ("20℃", 20),
    # LaTeX
    (r"\boxed{B}", "B"), (r"$\boxed{B}$", "B"), (r"\boxed{\text{(B)}}", "B"), (r"\text{B}", "B"), (r"$$B$$", "B"),
    (r"\(B\)", "B"), (r"\textbf{B.} cat", "B"), (r"\boxed{5}", 5), (r"$5$", 5), (r"$\boxed{5\text{ cm}}$", 5),
    (r"\(5\)", 5), (r"5\%", 5), (r"\$5", 5), (r"1{,}000", 1000), (r"30^\circ", 30), (r"\mathrm{5}", 5),
    (r"\boxed{\boxed{\boxed{5}}}", 5), (r"\boxed{5", None), (r"\boxed{5} \boxed{6}", None), (r"\sqrt{5}", None),
    # fractions
    ("3/4", 0.75), ("-3/4", -0.75), ("3 / 4", 0.75), (r"\frac{3}{4}", 0.75), (r"$-\frac{3}{4}$", -0.75),
    (r"\dfrac{1}{2}", 0.5), (r"\frac34", 0.75), ("1 3/4", 1.75), (r"1\frac{3}{4}", 1.75), ("3/4 cup", 0.75),
    ("3⁄4", 0.75), ("1.5/2", 0.75), ("3/0", None), ("3/4/2020", None), ("1/2 or 1/3", None), (r"\frac{a}{b}", None),
    (r"\frac{1}{2", None), ("3/", None), ("/4", None), ("1//2", None),
    # names, parentheses, leads
    ("x = 5", 5), ("x=5", 5), ("(5)", 5), ("[5]", 5), ("(-5)", -5), ("x = (5)", 5), ("= 5", 5), (r"\theta = 5", 5),
    ("x_1 = 5", 5), ("Answer: 5", 5), ("The answer is 5.", 5), ("x = 5, y = 3", None), ("x = y", None),
    ("2x = 5", None), ("((5", None), ("x == 5", None),
    # scales and times are other numbers, or none
    ("$1.2M", None), ("$5m", None), ("€3bn", None), ("1.2M", None), ("2 thirds", None), ("two thirds", None),
    ("3 lakh", None), ("3 crore", None), ("₹3 lakh", None), ("5 hundred", None), ("3 halves", None),
    ("3 quarters", None), ("4 squared", None), ("12 AM", None), ("12 a.m.", None), ("3pm", None), ("12 noon", None),
    ("12:30", None), ("300 BC", None), ("3.5m", 3.5), ("3 ms", 3), ("4 MB", 4), ("5 trees", None), ("4 pm2", None),
    ("5 Ω", 5), ("5 μm", 5), ("5 Å", 5),
    # an option's own text may begin with an initial
    ("B. E. coli", "B"), ("B. E. coli and S. aureus", "B"), ("C. J. S. Bach", "C"), ("A. B", None),
    ("A. cat, B. dog", None), ("A) B) cat", None),
]
# fmt: on


@pytest.mark.parametrize("text, read", READ)
def test_what_is_read(text, read):
    """Guards: 0 for a right answer because of its notation; 1 for a wrong one: "$1.2M" for 1.2, "12 AM" for 12."""
    if isinstance(read, str):
        assert parse_letter(text) == parse_solution(text, "multiple choice") == read
    elif read is None:
        assert parse_letter(text) is None or read is not None
        with pytest.raises(ValueError, match="number"):
            parse_number(text)
    else:
        assert (
            parse_number(text)
            == parse_solution(f"<answer>{text}</answer>", "numerical")
            == pytest.approx(read, rel=1e-12)
        )


def test_solutions_without_tags_and_numbers_are_read():
    """Guards: a row refused because its solution is 3, "3" or "B" instead of "<answer>3</answer>"."""
    assert parse_solution(3, "numerical") == parse_solution("3", "numerical") == parse_solution(3.0, "regression") == 3
    assert (
        parse_solution("B", "multiple choice", ["left", "right"]) == "B"
        and parse_solution("NO EXIT", "OCR") == "NO EXIT"
    )
    for solution in ("<answer>3", "3</answer>", "<think>3</think>"):
        with pytest.raises(ValueError, match="no answer"):
            parse_solution(solution, "numerical")


@pytest.mark.parametrize(
    "options, expected",
    [
        (["left", "right"], ["A. left", "B. right"]),
        (["A. left", "B. right"], ["A. left", "B. right"]),
        (["(A) left", "(B) right"], ["(A) left", "(B) right"]),
        (["C) x", "D) y"], ["C) x", "D) y"]),
        (["A. x", "C. y"], ["A. x", "C. y"]),
        (["E. coli", "S. aureus", "B. subtilis"], ["A. E. coli", "B. S. aureus", "C. B. subtilis"]),
        (["A dog", "A cat"], ["A. A dog", "B. A cat"]),
        ([], []),
    ],
)
def test_options_get_letters_only_if_they_have_none(options, expected):
    """Guards: a prompt without letters whose answer is a letter; the genus of "E. coli" taken for option E."""
    assert parsing.lettered(options) == expected == parsing.lettered(expected)
    assert parsing.option_letters(expected) == parsing.option_letters(options)


# fmt: off
NUMERICAL = [
    ("4.0", "4", 1), ("1,000", "1000", 1), ("-0", "0", 1), ("4.01", "4", 0), ("3", "-3", 0), ("0.01", "0", 0),
    # rounded to two decimals, halves away from zero
    ("3.14159", "3.1416", 1), ("0.001", "0.004", 1), ("-0.001", "0", 1), ("2.68", "2.675", 1), ("2.67", "2.675", 0),
    ("0.13", "0.125", 1), ("1.01", "1.005", 1), ("-2.68", "-2.675", 1),
    # large
    ("1e308", "1e308", 1), ("9007199254740993", "9007199254740992", 1), ("4503599627370496.5", "4503599627370496", 1),
    ("123456789012.35", "123456789012.345", 1),
    # no number
    ("nan", "4", 0), ("inf", "4", 0), ("", "4", 0), ("4 or 5", "4", 0),
]
REGRESSION = [
    ("10", "10", 1), ("9", "10", 0.9), ("-9", "-10", 0.9), ("9.0 m", "10 m", 0.9), ("20", "10", 0), ("-10", "10", 0),
    # released code: 0 for 0 earns 0, and nan earns 1
    ("0", "0", 1), ("1e-9", "0", 0), ("nan", "10", 0), ("inf", "10", 0), ("1e999", "10", 0), ("ten", "10", 0),
    # overflow and underflow
    ("1e308", "-1e308", 0), ("1e308", "1e-308", 0), ("5e-324", "5e-324", 1),
]
# fmt: on


@pytest.mark.parametrize("answer, truth, expected", NUMERICAL)
def test_numerical(answer, truth, expected):
    """Guards: texts compared instead of numbers; round(2.675, 2) = 2.67; an overflow for large numbers."""
    assert score("numerical", answer, truth) == expected


@pytest.mark.parametrize("answer, truth, expected", REGRESSION)
def test_regression(answer, truth, expected):
    """Guards: 1 for "nan", and 0 for a correct 0 (released code)."""
    assert score("regression", answer, truth) == pytest.approx(expected, abs=1e-12)


def regression_accuracy(prediction, truth):
    return rewards.regression_accuracy(repr(float(prediction)), truth)


@pytest.mark.parametrize("accuracy", [regression_accuracy, mean_relative_accuracy])
def test_relative_scores_by_their_properties(accuracy):
    """Guards: a score outside [0, 1], one that grows with the error or depends on unit or sign, credit for nan."""
    rng = random.Random(1)
    for _ in range(500):
        truth = rng.choice([-1, 1]) * rng.randint(1, 500)
        error = rng.randint(0, 600)
        near = accuracy(truth + error, truth)
        far = accuracy(truth + error + 1, truth)
        assert 0 <= far <= near <= 1 and (near == 1) >= (error == 0)
        assert accuracy(4 * (truth + error), 4 * truth) == accuracy(-truth - error, -truth) == near
    for prediction in (math.nan, math.inf, -math.inf):
        assert accuracy(prediction, 3.0) == accuracy(prediction, 0.0) == 0
        with pytest.raises(ValueError, match="not a finite"):
            accuracy(3.0, prediction)
        with pytest.raises(ValueError, match="not a finite"):
            accuracy(prediction, prediction)
    assert accuracy(0.0, 0.0) == accuracy(-0.0, 0.0) == 1 and accuracy(1e-300, 0.0) == 0
    assert accuracy(1e308, -1e308) == accuracy(1.0, 5e-324) == 0


def test_mean_relative_accuracy_equals_the_official_one():
    """Guards: < for <= (3 for 2: 0.0); thresholds one float away from numpy's, where 54 of these pairs differ."""
    np = pytest.importorskip("numpy")
    thresholds = np.linspace(0.5, 0.95, int((0.95 - 0.5) / 0.05 + 2))
    for prediction in range(200):
        for truth in range(1, 120):
            assert (
                mean_relative_accuracy(prediction, truth) == (abs(prediction - truth) / truth <= 1 - thresholds).mean()
            )
    assert mean_relative_accuracy(3, 2) == 0.1 and mean_relative_accuracy(3, 4) == mean_relative_accuracy(-3, -4) == 0.6


# ------------------------------------------------------------------------------------------ words: OCR and free-form


# fmt: off
VOCABULARY = [
    "the", "The", "cat", "cat's", "sat", "on", "mats", "3.5", "e-mail", "naïve", "漢字", "İstanbul", "K", "ﬁn", "x_y",
    "ǅ", "\ud800", "--", "", "½",
]
# fmt: on


def text_pairs(seed, n=150):
    """Pairs of random texts: short, long or empty, with few words (which repeat) or many, and all kinds of spaces."""
    rng = random.Random(seed)
    for _ in range(n):
        words = rng.sample(VOCABULARY, rng.choice([1, 2, 5, len(VOCABULARY)]))
        spaces = rng.choice([[" "], [" ", "  ", "\t", "\n", " \n", "\xa0", "\u3000", "\x1f", "\r\n"]])
        yield tuple(
            "".join(rng.choice(words) + rng.choice(spaces) for _ in range(rng.choice([0, 1, 2, 8, 30])))
            for _ in range(2)
        )


def test_rouge_equals_rouge_score_on_ascii():
    """Guards: another tokeniser, stemming, n-grams counted once, precision instead of F1, a wrong LCS."""
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(
        ["rouge1", "rouge2", "rouge3", "rougeL"], use_stemmer=False
    )
    total = 0.0
    for pair in [
        *text_pairs(2),
        ("", ""),
        ("a", ""),
        ("", "a"),
        ("a b a b", "b a b a b"),
        ("a", "a"),
        ("x_y", "x y"),
        ("A-b", "a b"),
    ]:
        reference, hypothesis = ("".join(c for c in text if c.isascii()) for text in pair)
        theirs = scorer.score(reference, hypothesis)
        for n in (1, 2, 3):
            assert rouge_n(reference, hypothesis, n) == pytest.approx(theirs[f"rouge{n}"].fmeasure, abs=1e-9)
        assert rouge_l(reference, hypothesis) == pytest.approx(theirs["rougeL"].fmeasure, abs=1e-9)
        total += rouge_l(reference, hypothesis)
    # the pairs do overlap
    assert total > 20


@pytest.mark.parametrize(
    "text, words",
    [
        ("naïve Straße", ["naïve", "straße"]),
        ("кошка спит", ["кошка", "спит"]),
        ("القطة نائمة", ["القطة", "نائمة"]),
        ("고양이가 잔다", ["고양이가", "잔다"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("猫在睡觉。", ["猫", "在", "睡", "觉"]),
        ("猫が2匹", ["猫", "が", "2", "匹"]),
        ("ＡＢＣ １２", ["abc", "12"]),
        ("nai\u0308ve", ["naïve"]),
        ("a猫b", ["a", "猫", "b"]),
        ("😀 — …", []),
        ("x_y é_z", ["x", "y", "é", "z"]),
    ],
)
def test_rouge_sees_words_of_any_script(text, words):
    """Guards: right answers without a word (rouge_score, released code): "кошка" has none there, "naïve" has two."""
    assert text_scores.rouge_words(text) == words
    if words:
        assert rouge_n(text, text, 1) == 1 and parse_solution(text, "free-form") == text
    else:
        with pytest.raises(ValueError, match="no word that ROUGE can read"):
            parse_solution(text, "free-form")


def test_word_error_rate_equals_jiwers():
    """Guards: edits per word of the longer text, free substitutions, no empty reference."""
    jiwer = pytest.importorskip("jiwer")
    for reference, hypothesis in [*text_pairs(3), ("", ""), ("", "a b"), ("a b", "")]:
        reference = " ".join(reference.split())
        hypothesis = " ".join(hypothesis.split())
        expected = jiwer.wer(reference, hypothesis)
        assert word_error_rate(reference.split(), hypothesis.split()) == pytest.approx(expected, abs=1e-9)


def test_edits_and_common_words_by_their_properties():
    """Guards: an asymmetry or a violated triangle inequality, which random sentences seldom show."""

    def common_subsequence(a, b):
        n_edits = edit_distance(a, b, substitution=2)
        assert (len(a) + len(b) - n_edits) % 2 == 0
        return (len(a) + len(b) - n_edits) // 2

    rng = random.Random(4)
    for _ in range(300):
        a, b, c = ([rng.choice("xyz") for _ in range(rng.randint(0, 12))] for _ in range(3))
        assert edit_distance(a, b) == edit_distance(b, a) == edit_distance(a[::-1], b[::-1]) <= max(len(a), len(b))
        assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c) and (edit_distance(a, b) == 0) == (
            a == b
        )
        common = common_subsequence(a, b)
        assert common == common_subsequence(b, a) == common_subsequence(a[::-1], b[::-1]) <= min(len(a), len(b))
        assert common_subsequence(a, a + b) == len(a) and common_subsequence(a + c, b + c) >= common + len(c)
        assert edit_distance(a, b) <= len(a) + len(b) - 2 * common <= 2 * edit_distance(a, b)
    # longer than a machine word has bits
    long_a, long_b = ([rng.choice("xyz") for _ in range(300)] for _ in range(2))
    assert common_subsequence(long_a, long_a + long_b) == 300


@pytest.mark.parametrize(
    "answer, truth, expected",
    [
        ("NO EXIT", "NO EXIT", 1),
        ("NO\nEXIT", "NO EXIT", 1),
        ("NO EXIT HERE", "NO EXIT", 0.5),
        ("NO", "NO EXIT", 0.5),
        ("no exit", "NO EXIT", 0),
        ("EXIT NO", "NO EXIT", 0),
        ("a b c d e NO EXIT", "NO EXIT", 0),
        ("出口", "出口", 1),
        ("cafe\u0301", "café", 1),
        ("ＮＯ", "NO", 0),
        ("x²", "x2", 0),
    ],
)
def test_ocr(answer, truth, expected):
    """Guards: a negative score for a long answer; a line break counted as an error."""
    assert score("OCR", answer, truth) == pytest.approx(expected)


def test_ocr_shortcut_changes_no_score():
    """Guards: a score of 0 for a long answer that deserves more."""
    for reference, hypothesis in text_pairs(5):
        reference = " ".join(reference.split())
        hypothesis = " ".join(hypothesis.split())
        if reference and hypothesis:
            assert score("OCR", hypothesis, reference) == max(
                0.0, 1 - word_error_rate(reference.split(), hypothesis.split())
            )


def test_free_form():
    """Guards: one of the three ROUGE scores missing, or counted twice."""
    assert score("free-form", "The cat, sat!", "the cat sat") == 1
    # one word: no pairs
    assert score("free-form", "sat", "sat") == pytest.approx(2 / 3)
    assert score("free-form", "dogs", "the cat sat") == score("free-form", "", "the cat sat") == 0
    assert score("free-form", "sat cat the", "the cat sat") == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert score("free-form", "the cat", "the cat sat") == pytest.approx((4 / 5 + 2 / 3 + 4 / 5) / 3)


# ------------------------------------------------------------------------------------------------------ our own data


TEN = [f"{chr(65 + i)}. text {i}" for i in range(14)]


@pytest.mark.parametrize(
    "solution, problem_type, options, truth",
    [
        ("<answer>B</answer>", "multiple choice", ["A. x", "B. y"], "B"),
        ("<answer>(b)</answer>", "multiple choice", None, "B"),
        ("<answer>N</answer>", "multiple choice", TEN, "N"),
        # texts only
        ("<answer>B</answer>", "multiple choice", ["left", "A dog"], "B"),
        ("<answer>D</answer>", "multiple choice", ["C) x", "D) y"], "D"),
        ("<answer>1,000 m</answer>", "numerical", [], 1000.0),
        ("<answer>0</answer>", "regression", None, 0.0),
        ("<answer> NO EXIT </answer>", "OCR", None, "NO EXIT"),
        ("<answer>A cat.</answer>", "free-form", None, "A cat."),
    ],
)
def test_parse_solution(solution, problem_type, options, truth):
    """Guards: a good record refused: options without letters, fourteen of them, or an "A" that is an article."""
    assert parse_solution(solution, problem_type, options) == truth


@pytest.mark.parametrize(
    "solution, problem_type, options, message",
    [
        ("<answer>B", "multiple choice", None, "no answer"),
        ("", "OCR", None, "no answer"),
        ("<answer> </answer>", "free-form", None, "no answer"),
        ("<answer>A or B</answer>", "multiple choice", None, "letter"),
        ("<answer>cat</answer>", "multiple choice", None, "letter"),
        ("<answer>C</answer>", "multiple choice", ["A. x", "B. y"], "C is not among the options A, B"),
        ("<answer>O</answer>", "multiple choice", TEN, "O is not"),
        ("<answer>C</answer>", "multiple choice", ["x", "y"], "C is not"),
        ("<answer>A</answer>", "multiple choice", ["C) x", "D) y"], "A is not"),
        ("<answer>many</answer>", "numerical", None, "number"),
        ("<answer>nan</answer>", "regression", None, "number"),
        ("<answer>1e999</answer>", "numerical", None, "finite"),
        ("<answer>1,00</answer>", "numerical", None, "number"),
        ("<answer>√ 😀</answer>", "free-form", None, "ROUGE"),
        ("<answer>B</answer>", "multiple-choice", None, "problem_type: expected one of"),
        ("<answer>" + "x\n" * 9999 + "</answer>", "numerical", None, "number"),
    ],
)
def test_a_solution_that_no_answer_matches_is_an_error(solution, problem_type, options, message):
    """Guards: a bad record that silently scores 0 forever (released code: every exception is a 0)."""
    with pytest.raises(ValueError, match=message) as caught:
        parse_solution(solution, problem_type, options)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)
    if not options:
        with pytest.raises(ValueError, match=message):
            accuracy_reward("<answer>B</answer>", solution, problem_type)


# ------------------------------------------------------------------------------------------------------ hostile text


# fmt: off
UNITS = [
    "<", "<answer>", "</answer>", "<think>", "</think>", "<think></think>", "<answer></answer>", "<answer>B</answer>",
    "<think><answer>", "<answ", "</", "\\boxed{", "\\text{x}", "\\frac{", "\\frac{1}{2}", "$", "1/2", "x=", "½", "²",
    " ", "\n", "\x00", "\ud800", "é", "９", "0", "9", "1,", ",000", "1e", "e", ".", "-", "+", "%", "$", "*", "(", "B",
    "B ", "B.", "B. ", "A) or ", ",B. x", "the ", "answer is ", "option", "the cat ", "m/", "m^2", "square ",
    " per m", "x y\n", "\t\t", "𝟗", "\u0301\u0327",
]
# fmt: on


def score_all(text):
    scores = [
        accuracy_reward(text, f"<answer>{truth}</answer>", problem_type) for problem_type, truth in TRUTHS.items()
    ]
    parse_letter(text)
    assert (
        all(0 <= s <= 1 for s in scores)
        and format_reward(text) in (0, 1)
        and (extract_answer(text) is None or "</answer>" not in extract_answer(text))
    )


def cpu_seconds(text):
    begin = time.process_time()
    score_all(text)
    return time.process_time() - begin


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_long_repeats_are_scored_in_linear_time(unit):
    """Guards: a pattern that backtracks, or a scan that starts again: 16 times the text then takes 256 times as long.

    Only ratios are compared, and only where the long text takes 0.2 s, which no linear scan of it takes.
    """
    for before, after in (
        ("<answer>", "</answer>"),
        ("<answer>4", "</answer>"),
        ("<answer>B. ", "x</answer>"),
        ("", ""),
    ):
        small, large = (before + unit * (size // len(unit)) + after for size in (20_000 // 16, 20_000))
        if cpu_seconds(large) > 0.2:
            assert min(cpu_seconds(large) for _ in range(3)) < 80 * min(cpu_seconds(small) for _ in range(3))


def test_tags_are_found_in_one_pass(monkeypatch):
    """Guards: a search to the end of the text from each opening tag. Counted, so no clock is needed."""

    class Counting(str):
        looked_at = 0

        def find(self, part, start=0, *rest):
            found = str.find(self, part, start, *rest)
            Counting.looked_at += (found if found >= 0 else len(self)) - start + 1
            return found

    for unit in ("<answer>", "<think>", "</answer>", "<", "<answer>x</answer>", "x"):
        text = Counting(unit * (100_000 // len(unit)))
        Counting.looked_at = 0
        assert len(list(parsing.tags_in(text))) == (0 if unit in "<x" else text.count("<"))
        assert len(text) <= Counting.looked_at <= 3 * len(text)


def test_random_pieces_of_tags_and_text_always_have_a_score():
    """Guards: the one text in a million whose exception ends a night of training."""
    rng = random.Random(6)
    answered = 0
    for _ in range(800):
        text = "".join(rng.choices(UNITS, k=rng.randint(0, 12)))
        score_all(text)
        score_all(f"<answer>{text}</answer>")
        answered += extract_answer(text) is not None
        try:
            assert math.isfinite(parse_number(text))
        except ValueError as error:
            # a lone surrogate must not break the log
            str(error).encode("utf-8")
    assert answered > 40


def test_random_characters_always_have_a_score():
    """Guards: a character (digit, space, foreign letter) that one function accepts and the next cannot read."""
    rng = random.Random(7)
    for _ in range(600):
        characters = "".join(
            chr(rng.choice([rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000)]))
            for _ in range(rng.randint(0, 8))
        )
        score_all(tagged(characters))
        score_all(tagged(f"4{characters}"))
        score_all(tagged(f"B{characters}"))


@pytest.mark.parametrize(
    "answer",
    [
        "9" * 100_000,
        "-" + "9" * 100_000,
        "0." + "9" * 100_000,
        "1e" + "9" * 100_000,
        "1e-" + "9" * 100_000,
        "9" * 100_000 + "e-99999",
    ],
)
def test_huge_numbers_have_a_score(answer):
    """Guards: Python's limit of 4,300 digits for int(), an OverflowError, or inf that equals inf."""
    assert score("numerical", answer, "4") == 0 == score("regression", answer, "-4")


# ----------------------------------------------------------------------------------------------- temporal and length


@pytest.mark.parametrize(
    "p, p_shuffled, margin, paper, released",
    [
        (1.0, 0.0, 0.3, 0.3, 0.3),
        (0.75, 0.25, 0.15, 0.3, 0.3),
        (0.5, 0.5, 0, 0.3, 0.3),
        (0.0, 0.0, 0, 0.3, 0.3),
        (1.0, 1.0, 0, 0.3, 0.3),
        (0.45, 0.5, 0, 0, 0.3),
        (0.4, 0.5, 0, 0, 0.3),
        (0.375, 0.5, 0, 0, 0),
        (0.0, 0.25, 0, 0, 0),
    ],
)
def test_temporal_rules(p, p_shuffled, margin, paper, released):
    """Guards: one source's rule under another's name, especially at ties."""
    assert temporal_reward(p, p_shuffled) == temporal_reward(p, p_shuffled, rule="margin") == pytest.approx(margin)
    assert (
        temporal_reward(p, p_shuffled, rule="paper") == paper
        and temporal_reward(p, p_shuffled, rule="released") == released
    )
    assert temporal_reward(p, p_shuffled, rule="none") == 0
    for rule in ("margin", "paper", "released", "none"):
        assert temporal_reward(p, p_shuffled, 0.6, rule) == pytest.approx(2 * temporal_reward(p, p_shuffled, 0.3, rule))
    with pytest.raises(ValueError, match="no temporal rule 'magic'"):
        temporal_reward(p, p_shuffled, rule="magic")


@pytest.mark.parametrize(
    "n_tokens, correct, expected",
    [(319, True, 0), (320, True, 0.2), (512, True, 0.2), (513, True, 0), (400, False, 0), (0, True, 0)],
)
def test_length_reward(n_tokens, correct, expected):
    """Guards: an end of the range excluded, or wrong answers rewarded for their length."""
    assert length_reward(n_tokens, correct) == expected
    assert length_reward(n_tokens, correct, l_min=n_tokens, l_max=n_tokens, omega=0.5) == (0.5 if correct else 0)
