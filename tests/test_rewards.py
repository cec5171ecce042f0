"""Rewards: what counts as right, against the references of ROUGE and WER, and text nobody expected."""

import math
import random
import time

import pytest

from rewards import (PROBLEM_TYPES, accuracy_reward, extract_answer, format_reward, length_reward, mean_relative_accuracy, parse_letter,
                     parse_number, parse_solution, relative_accuracy, rouge_l, rouge_n, temporal_reward, word_error_rate)


def score(problem_type, answer, truth):
    return accuracy_reward(f"<think>so</think><answer>{answer}</answer>", f"<answer>{truth}</answer>", problem_type)


# --------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("answer, truth, expected", [
    ("B", "B", 1), ("B.", "B", 1), ("(B)", "B", 1), ("b", "B", 1), ("B. the cat", "B", 1), (" B ", "B", 1), ("**B**", "B", 1),
    ("(b) the cat", "B", 1), ("B: the cat", "B", 1), ("B", "(B)", 1), ("B", "B. the cat", 1),
    ("A", "B", 0), ("A or B", "B", 0), ("A or B", "A", 0), ("A, B", "A", 0), ("A and B", "B", 0), ("A. B", "A", 0), ("A) or B)", "A", 0),
    ("", "B", 0), ("the cat", "B", 0), ("Bear", "B", 0), ("A cat", "A", 0), ("BB", "B", 0), ("Ｂ", "B", 0), ("ß", "B", 0), ("e.g. this", "E", 0),
])
def test_letters_with_decoration_count_and_two_letters_do_not(answer, truth, expected):
    """Guards: string equality (released code: "B." earned 0), and leniency that pays for naming every option."""
    assert score("multiple choice", answer, truth) == expected


@pytest.mark.parametrize("answer, truth, expected", [
    ("4.0", "4", 1), ("4", "4.0", 1), ("1,000", "1000", 1), ("1000", "1,000", 1), ("1e3", "1000", 1), ("-3", "-3", 1), ("50%", "50", 1),
    ("0", "0", 1), ("-0.0", "0", 1), ("3.141", "3.14", 1), (".5", "0.5", 1), ("+7", "7", 1), ("3.5 meters", "3.5", 1), ("−3", "-3", 1), ("$12", "12", 1), ("3.5m", "3.5", 1),
    ("4.02", "4", 0), ("3", "-3", 0), ("", "4", 0), ("four", "4", 0), ("nan", "4", 0), ("inf", "4", 0), ("-inf", "4", 0), ("1e999", "4", 0),
    ("4 or 5", "4", 0), ("4, not 5", "4", 0), ("3 to 4", "3", 0), ("1,00", "100", 0), ("1,2,3", "123", 0), ("1.2.3", "1.2", 0), ("12-13", "12", 0),
    ("٤", "4", 0), ("0x10", "16", 0), ("1_000", "1000", 0), ("--3", "3", 0), ("9" * 5000, "4", 0), ("%", "4", 0), ("e3", "1000", 0),
])
def test_numbers_are_compared_as_numbers(answer, truth, expected):
    """Guards: comparing text ("4.0" for "4" earned 0), and float()'s own ideas (nan, 1_000, other digits)."""
    assert score("numerical", answer, truth) == expected


@pytest.mark.parametrize("answer, truth, expected", [
    ("10", "10", 1), ("9", "10", 0.9), ("11", "10", 0.9), ("30", "10", 0), ("0", "0", 1), ("0.1", "0", 0), ("-9", "-10", 0.9), ("nan", "10", 0),
    ("inf", "10", 0), ("many", "10", 0), ("1e308", "-1e-300", 0),
])
def test_regression_pays_for_being_near(answer, truth, expected):
    """Guards: "nan" that earns 1.0, and 0 answered to 0 that earns nothing (both in the released code)."""
    assert score("regression", answer, truth) == pytest.approx(expected)
    if answer not in ("many",):
        assert relative_accuracy(float(answer), float(truth)) == pytest.approx(expected)


@pytest.mark.parametrize("prediction, truth, expected", [
    (4, 4, 1.0), (3, 4, 0.6), (3, 2, 0.1), (5, 2, 0.0), (0, 0, 1.0), (1, 0, 0.0), (math.nan, 4, 0.0), (math.inf, 4, 0.0), (-3, -4, 0.6), (1e9, 1, 0),
])
def test_mean_relative_accuracy_has_the_official_ties(prediction, truth, expected):
    """Guards: < for <=, which moves every tie by 0.1 (3 for 2 is 0.1 officially)."""
    assert mean_relative_accuracy(prediction, truth) == pytest.approx(expected)


@pytest.mark.parametrize("answer, truth, expected", [
    ("no smoking here", "no smoking here", 1), ("no smoking", "no smoking here", 2 / 3), ("yes", "no smoking here", 0), ("", "a", 0),
    ("no  smoking\n\nhere", "no smoking here", 1), ("NO", "no", 0), ("a " * 50_000, "a", 0),
])
def test_ocr_is_one_minus_word_errors(answer, truth, expected):
    """Guards: negative rewards for long answers, and time that grows with them."""
    assert score("OCR", answer, truth) == pytest.approx(expected)


def test_free_form_is_the_mean_of_three_rouges():
    """Guards: a score outside [0, 1]; word order that does not matter."""
    assert score("free-form", "The cat sat.", "the cat sat") == pytest.approx(1)
    assert score("free-form", "dogs run", "the cat sat") == 0
    assert 0 < score("free-form", "sat cat the", "the cat sat") < score("free-form", "the cat sits", "the cat sat") < 1


@pytest.mark.parametrize("problem_type, solution, options", [
    ("multiple choice", "<answer>A or B</answer>", None), ("multiple choice", "<answer>E</answer>", ["A. x", "B. y"]), ("numerical", "<answer>many</answer>", None),
    ("regression", "<answer>nan</answer>", None), ("numerical", "<answer>1e999</answer>", None), ("OCR", "<answer> </answer>", None), ("free-form", "", None),
    ("numerical", "4", None), ("free-form", "<answer>x", None),
])
def test_a_bad_solution_is_our_mistake(problem_type, solution, options):
    """Guards: a truth nobody can meet, scored 0 for ever."""
    with pytest.raises(ValueError):
        parse_solution(solution, problem_type, options)
    if options is None:
        with pytest.raises(ValueError):
            accuracy_reward("<answer>B</answer>", solution, problem_type)


def test_fourteen_options_have_letters_up_to_n():
    """Guards: A to D hard-wired (VideoMMMU has up to 14 options)."""
    options = [f"{chr(65 + i)}. thing" for i in range(14)]
    assert parse_solution("<answer>N</answer>", "multiple choice", options) == "N"
    with pytest.raises(ValueError, match="O is not among"):
        parse_solution("<answer>O</answer>", "multiple choice", options)


# ------------------------------------------------------------------------------------------------ tags and format


@pytest.mark.parametrize("text, answer, form", [
    ("<think>a</think><answer>B</answer>", "B", 1), (" <think>a</think>\n <answer>\nB\n</answer> \n", "B", 1), ("<think></think><answer>B</answer>", "B", 1),
    ("<answer>B</answer>", "B", 0), ("<think>a</think><answer>B", None, 0), ("<think>a</think>B", None, 0), ("B", None, 0), ("", None, 0),
    ("<think>a</think><answer>A</answer><answer>B</answer>", "B", 0), ("<think><answer>A</answer></think><answer>B</answer>", "B", 0),
    ("<think><answer>A</answer></think>", None, 0), ("<think><answer>A</answer>", None, 0), ("<answer>B</answer><think>a</think>", "B", 0),
    ("<think>a<think>b</think><answer>B</answer>", "B", 0), ("<think>a</think>x<answer>B</answer>", "B", 0), ("<think>a</think><answer>B</answer>.", "B", 0),
    ("a</think><answer>B</answer>", "B", 0), ("<answer>A</answer></think><answer>B</answer>", "B", 0), ("<answer>A</answer></think>", None, 0),
    ("<think>a</think><answer></answer>", "", 1), ("<THINK>a</THINK><ANSWER>B</ANSWER>", None, 0), ("<answer><answer>B</answer></answer>", "B", 0),
    ("<think>a</think><answer>A</answer><think>no</think><answer>B</answer>", "B", 0), ("<think>a</think><answer>A</answer><answer>B", "A", 0),
])
def test_the_answer_is_the_last_block_outside_think(text, answer, form):
    """Guards: an answer read from inside the reasoning, and text without tags that matches a solution without tags."""
    assert extract_answer(text) == answer
    assert format_reward(text) == form


# ------------------------------------------------------------------------------------------- references of others


def random_texts(seed, n=300):
    rng = random.Random(seed)
    words = ["the", "cat", "sat", "on", "a", "mat", "Cat", "cats", "running", "it's", "3.5", "e-mail", "naïve", "漢字", "İ", "ﬁ", "x_y", "", "  ", "\n", "\t", "--"]
    for _ in range(n):
        yield tuple(rng.choice([" ", " ", "  "]).join(rng.choices(words, k=rng.randint(1, 25))) for _ in range(2))


def test_rouge_equals_googles():
    """Guards: another tokenizer, stemming, clipped counts, or an LCS that is off by one."""
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    for reference, hypothesis in [*random_texts(0), ("a", ""), ("a b", "b"), ("a b a b", "b a b a b b")]:
        theirs = scorer.score(reference, hypothesis)
        for name, ours in (("rouge1", rouge_n(reference, hypothesis, 1)), ("rouge2", rouge_n(reference, hypothesis, 2)), ("rougeL", rouge_l(reference, hypothesis))):
            assert ours == pytest.approx(theirs[name].fmeasure, abs=1e-9), (name, reference, hypothesis)


def test_word_error_rate_equals_jiwers():
    """Guards: errors per word of the longer text, or words split elsewhere."""
    jiwer = pytest.importorskip("jiwer")
    compared = 0
    for reference, hypothesis in random_texts(1):
        if reference.strip():
            assert word_error_rate(reference, hypothesis) == pytest.approx(jiwer.wer(reference, hypothesis), abs=1e-9), (reference, hypothesis)
            compared += 1
    assert compared > 250
    with pytest.raises(ValueError):
        word_error_rate(" ", "a")


# ---------------------------------------------------------------------------------------------------- hostile text


HOSTILE = ["<answer>" * 12_500, "<think>" * 14_000, "</answer>" * 11_000, "<think></think><answer>" * 4_500, "<answer>" + "B " * 50_000 + "</answer>",
           "<answer>" + "9" * 100_000 + "</answer>", "<answer>" + "1," * 50_000 + "</answer>", "<answer>" + "(" * 100_000 + "</answer>",
           "<answer>" + "the cat " * 12_500 + "</answer>", "<answer>\ud800\x00\u202e\U0010ffff</answer>", "<" * 100_000, "<answer>" + "\u0660" * 1000 + "</answer>",
           "<answer>" + " " * 100_000 + "B</answer>", "<answer>" + "1e" * 50_000 + "</answer>", "<answer>-</answer>", "<answer>.</answer>", "<answer>,</answer>", "<answer>" + "." * 100_000 + "</answer>",
           "<answer>" + "A. " * 33_000 + "</answer>"]
TRUTHS = {"multiple choice": "B", "numerical": "4", "OCR": "no smoking on the deck", "free-form": "the cat sat on the mat", "regression": "4"}


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_any_text_has_a_score_soon(number):
    """Guards: an exception, a score outside [0, 1], or quadratic time: 100 kB would then take minutes, not seconds."""
    text = HOSTILE[number]
    begin = time.perf_counter()
    for problem_type, truth in TRUTHS.items():
        assert 0 <= accuracy_reward(text, f"<answer>{truth}</answer>", problem_type) <= 1
    assert format_reward(text) == 0
    assert time.perf_counter() - begin < 20


def test_random_bytes_of_tags_never_raise():
    """Guards: the one text in a million that stops a night's training."""
    rng = random.Random(0)
    pieces = ["<think>", "</think>", "<answer>", "</answer>", "B", "4", ".", ",", "-", "%", " ", "\n", "or", "é", "\x00", "\ud800", "e", "(", ")"]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 30)))
        answer = extract_answer(text)
        assert answer is None or ("<answer>" not in answer and answer == answer.strip())
        assert format_reward(text) in (0, 1) and (parse_letter(text) is None or len(parse_letter(text)) == 1)
        for problem_type, truth in TRUTHS.items():
            assert 0 <= accuracy_reward(text, f"<answer>{truth}</answer>", problem_type) <= 1
        try:
            assert math.isfinite(parse_number(text))
        except ValueError as error:
            assert "number" in str(error)


# ------------------------------------------------------------------------------------------------ the other rewards


def test_every_problem_type_has_a_rule():
    """Guards: a type of the released data that scores 0 for ever."""
    assert set(PROBLEM_TYPES) == set(TRUTHS)
    for problem_type, truth in TRUTHS.items():
        assert score(problem_type, truth, truth) == pytest.approx(1)


@pytest.mark.parametrize("p, p_shuffled, expected", [
    (1.0, 0.0, {"margin": 0.3, "paper": 0.3, "released": 0.3, "none": 0}), (0.5, 0.25, {"margin": 0.075, "paper": 0.3, "released": 0.3, "none": 0}),
    (0.5, 0.5, {"margin": 0, "paper": 0.3, "released": 0.3, "none": 0}), (0.45, 0.5, {"margin": 0, "paper": 0, "released": 0.3, "none": 0}),
    (0.25, 0.5, {"margin": 0, "paper": 0, "released": 0, "none": 0}), (0.0, 0.0, {"margin": 0, "paper": 0.3, "released": 0.3, "none": 0}),
])
def test_temporal_rules(p, p_shuffled, expected):
    """Guards: one source's rule under another's name."""
    for rule, value in expected.items():
        assert temporal_reward(p, p_shuffled, 0.3, rule) == pytest.approx(value)
    assert temporal_reward(p, p_shuffled) == temporal_reward(p, p_shuffled, 0.3, "margin")
    with pytest.raises(ValueError, match="magic"):
        temporal_reward(p, p_shuffled, rule="magic")


@pytest.mark.parametrize("n, correct, expected", [(319, True, 0), (320, True, 0.2), (512, True, 0.2), (513, True, 0), (400, False, 0)])
def test_length_pays_only_for_correct_completions_in_range(n, correct, expected):
    """Guards: borders, and a reward for long wrong answers."""
    assert length_reward(n, correct) == expected
