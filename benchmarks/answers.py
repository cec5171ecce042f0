"""Scores of answers, by the rules of each benchmark's authors.

The prompt differs from the authors' harnesses, and so do three rules: the answer is the text of the answer block, or
all of a text without tags; a letter is read by support.parsing.parse_letter ("A or B" names none); and an empty or
unreadable answer is wrong (some harnesses drop it, MVBench's counts it as correct). Standard errors treat questions as
independent; they are too small if several questions share a video.
"""

import re
from itertools import chain

from benchmarks import MODULES, NAMES
from benchmarks.shared import ORDERS, answer_of, choice_field, mean_score, mean_score_by, text_field
from rewards import PROBLEM_TYPES, parse_solution
from support.parsing import extract_answer
from support.settings import UserError

# fields of the records by which scores are listed beside the tasks
GROUPS = tuple(chain.from_iterable(getattr(module, "GROUPS", ()) for module in MODULES.values()))
# what an answer that is written as asked consists of
STRICT = {"multiple choice": "[A-Z]", "numerical": r"-?\d+(\.\d+)?", "regression": r"-?\d+(\.\d+)?"}
# fields of a prediction row that must be texts
TEXT_FIELDS = ("benchmark", "prediction", "solution", "problem_type", "problem", "task", "path", "error", *GROUPS)


def hook(benchmark, name, default):
    """A function of the benchmark's file (see __init__.py), or the default if it has none or is not ours."""
    return getattr(MODULES.get(benchmark), name, default)


def score_answer(row):
    """(score in [0, 1], whether the answer could be read) of a prediction. Raises ValueError if its solution is bad."""
    truth = parse_solution(row["solution"], row["problem_type"], row.get("options"))
    answer = answer_of(row["prediction"])
    if not answer:
        return 0.0, False
    own_rule = hook(row["benchmark"], "score_answer", score_by_type)
    return own_rule(row, answer, truth) or score_by_type(row, answer, truth)


def is_strict(row):
    """Whether the answer is written as asked: between answer tags, and a letter or a number alone if it should be one.

    Harnesses that compare strings, as Video-R1's does, read only such answers.
    """
    answer = extract_answer(row["prediction"] or "")
    pattern = STRICT.get(row["problem_type"])
    return answer is not None and (pattern is None or re.fullmatch(pattern, answer) is not None)


def score_by_type(row, answer, truth):
    """The rule of most benchmarks: the accuracy reward of the problem type. What could be a truth can be read."""
    problem_type = PROBLEM_TYPES[row["problem_type"]]
    try:
        problem_type.read_truth(answer)
        is_readable = True
    except ValueError:
        is_readable = False
    return float(problem_type.accuracy(answer, truth)), is_readable


def scored_rows(rows):
    """The rows with their `status` (see status_of) and, if it is "scored", `result`: (score, whether it could be read).

    Raises UserError with the number of every row that is bad, or whose benchmark, id and frame order occurred before.
    """
    scored = []
    problems = []
    first_seen = {}
    for number, row in enumerate(rows, 1):
        try:
            status = status_of(row)
            key = (row["benchmark"], str(row["id"]), frames_of(row))
            if key in first_seen:
                raise ValueError(f"{key[0]} {key[1]!r} is used twice, first in row {first_seen[key]}")
            first_seen[key] = number
            result = score_answer(row) if status == "scored" else None
            scored.append({**row, "status": status, "result": result})
        except ValueError as error:
            problems.append(f"  row {number}: {error}")
        # fields that a benchmark's rule needs, in a row of another program
        except (KeyError, TypeError, AttributeError) as error:
            problems.append(f"  row {number}: {row.get('benchmark')} cannot score it: {error!r}")
    if problems:
        raise UserError(f"{len(problems)} of {len(rows)} predictions are bad:\n" + "\n".join(problems))
    return scored


def frames_of(row):
    """The order of frames of a row; a row of another program has none, and counts as ordered."""
    return row.get("frames") or "ordered"


def status_of(row):
    """Whether a row is "scored", "unscored" (it needs a judge model) or "unusable" (it has an error).

    Raises ValueError for a bad row.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a prediction, got {row!r:.80}")
    for name in TEXT_FIELDS:
        if not isinstance(row.get(name), str | None):
            raise ValueError(f"{name}: expected text, got {row[name]!r:.80}")
    text_field(row, "benchmark")
    text_field(row, "id")
    if row.get("frames") is not None:
        choice_field(row, "frames", ORDERS)
    if row.get("error") and "prediction" not in row:
        return "unusable"
    is_unscored = hook(row["benchmark"], "is_unscored", lambda _: False)
    if is_unscored(row):
        return "unscored"
    if not row.get("solution"):
        raise ValueError("solution: missing; join the official files with --annotations DIR")
    text_field(row, "problem_type")
    options = row.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError(f"options: expected a list of texts, got {options!r:.80}")
    if "prediction" not in row:
        raise ValueError("prediction: missing")
    check_row = hook(row["benchmark"], "check_row", lambda _: None)
    check_row(row)
    return "scored"


def benchmarks_in(rows):
    """Names of the rows' benchmarks: ours in their order, then others by name."""
    found = {row["benchmark"] for row in rows}
    return [name for name in NAMES if name in found] + sorted(found - set(NAMES))


def score_benchmark(name, rows):
    """{"score": percent, "se", "n", "answered", "unparsed", "by_task", …} of scored rows, one per question.

    Shares of the answers: `unparsed` could not be read, `lenient` were read although they are not written as asked (see
    is_strict), `truncated` were cut off at max_new_tokens (None if the rows do not say). Not counted in n, but listed:
    `unscored` (they need a judge model) and `unusable` (rows with an `error`, as for missing media).
    """
    scored = [row for row in rows if row["status"] == "scored"]
    by_task = mean_score_by(scored, "task")
    extra_scores = hook(name, "extra_scores", lambda *_: {})
    result = mean_score(scored) | extra_scores(scored, by_task)
    result["answered"] = sum(answer_of(row["prediction"]) != "" for row in scored)
    result["unparsed"] = share(not row["result"][1] for row in scored)
    result["lenient"] = share(row["result"][1] and not is_strict(row) for row in scored)
    result["truncated"] = share(row["truncated"] for row in scored if "truncated" in row)
    result["by_task"] = by_task
    for group in GROUPS:
        if any(row.get(group) for row in scored):
            result[f"by_{group}"] = mean_score_by(scored, group)
    for status in ("unscored", "unusable"):
        result[status] = [str(row["id"]) for row in rows if row["status"] == status]
    return result


def share(values):
    """Share of the values that are true; None if there are none."""
    values = list(values)
    return sum(map(bool, values)) / len(values) if values else None
