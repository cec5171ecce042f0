"""What the files of the benchmarks share: fields of a row, records, the answer in a text, mean scores."""

import math

from support.parsing import extract_answer, lettered, number_or_nan, tags_in
from support.tables import mean_and_se

# the orders of frames in which evaluate.py asks a question
ORDERS = ("ordered", "shuffled", "reversed", "single", "blind")


def text_field(row, name):
    """The field as text. Raises ValueError if it is missing or empty."""
    if row.get(name) in (None, ""):
        raise ValueError(f"{name}: missing")
    return str(row[name])


def one_of(name, value, values):
    """The value of the field `name`. Raises ValueError if it is not one of `values`, which are texts."""
    if value not in values:
        raise ValueError(f"{name}: expected one of {', '.join(values)}, got {value!r:.80}")
    return value


def choice_field(row, name, values):
    """The field as text, which must be one of `values`. Raises ValueError otherwise."""
    return one_of(name, text_field(row, name), values)


def make_record(row_id, task, problem, answer, path, options=(), problem_type="", **extra):
    """A record (see data.py). The default problem type is multiple choice with options, else numerical or free-form."""
    if not problem_type:
        without_options = "numerical" if math.isfinite(number_or_nan(answer)) else "free-form"
        problem_type = "multiple choice" if options else without_options
    return {
        "id": row_id,
        "task": task,
        "problem": problem,
        "data_type": "video",
        "problem_type": problem_type,
        "options": lettered(options),
        "solution": f"<answer>{answer}</answer>",
        "path": path,
        "data_source": "",
        **extra,
    }


def answer_of(prediction):
    """The answer in a prediction: its answer block, or all of the text if it has no tags. Empty if there is none.

    >>> answer_of("<think>A?</think><answer>B</answer>"), answer_of(" B "), answer_of("<think>B")
    ('B', 'B', '')
    """
    text = prediction or ""
    answer = extract_answer(text)
    if answer is not None:
        return answer
    if any(tags_in(text)):
        return ""
    return text.strip()


def with_error(score, se):
    """A score with its standard error, as text; "–" is a missing number, or the error of scores that are all equal."""
    return f"{percent(score)} ± {percent(se or None)}"


def percent(value):
    return "–" if value is None else f"{value:.1f}"


def mean_score(rows):
    """Mean score of scored rows in percent, its standard error (None for fewer than two), and their number."""
    return mean_percent([row["result"][0] for row in rows])


def mean_percent(scores):
    """Mean of scores in [0, 1], as mean_score gives it."""
    if not scores:
        return {"score": None, "n": 0, "se": None}
    mean, se = mean_and_se([100 * score for score in scores])
    return {"score": mean, "n": len(scores), "se": se if len(scores) > 1 else None}


def mean_score_by(rows, key):
    """{value of `key`: mean_score of its rows}."""
    names = sorted({row[key] for row in rows if row.get(key) is not None})
    return {name: mean_score([row for row in rows if row.get(key) == name]) for name in names}


def mean_of_parts(parts):
    """Plain mean of mean scores, each with equal weight, and its standard error. None without parts."""
    if not parts:
        return {"score": None, "se": None}
    se = None
    if all(part["se"] is not None for part in parts):
        se = math.sqrt(sum(part["se"] ** 2 for part in parts)) / len(parts)
    return {"score": sum(part["score"] for part in parts) / len(parts), "se": se}
