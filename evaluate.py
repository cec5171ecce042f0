"""Evaluation: answer benchmarks or a record file, with the frames in up to five orders, and score the answers.

    accelerate launch evaluate.py --config configs/toy.yaml                          # the config's model and records
    accelerate launch evaluate.py --config configs/7b.yaml --benchmarks vsibench mvbench --root DIR    # see benchmarks/
    python evaluate.py --score predictions.jsonl                                     # score again, without a model
    python evaluate.py --score predictions.jsonl --annotations DIR                   # rows without solutions

`--orders ordered shuffled reversed single blind` (any of them; ordered alone is the default) asks each question about
the frames in order, shuffled, backwards, about the middle frame only, and without any frame, with the same decoding.
The paired difference from `ordered` shows whether a benchmark needs the order of frames, more than one frame,
or frames at all. Decoding is greedy by default (temperature 0).

output_dir gets `predictions.jsonl`, one row per question and frame order with its text, scores and settings, and
`summary.json`: {benchmark: {"score": percent, "n", "answered", "by_task": {…}, …}, "settings": {…}}. The questions are
shared out over the processes. A killed run continues with the questions that have no answer yet, and repeats those
whose media could not be read. Sampled answers (temperature > 0) depend on which questions are in a batch.

Scoring imports neither torch nor the model's code, except for --annotations.
"""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tqdm import tqdm

import policy
import rewards
from benchmarks import (
    NAMES,
    ORDERS,
    benchmarks_in,
    join_annotations,
    load_benchmark,
    missing_media,
    print_table,
    score_benchmark,
    scored_benchmarks,
    scored_rows,
)
from support import checkpoints, distributed, model_files, parsing, record_files, settings, storage, tables, workers

# What the answers depend on. It is written into every row and into the summary.
ANSWER_SETTINGS = (
    "model max_frames video_reader min_pixels max_pixels max_prompt_tokens prompt shuffle_unit temperature top_p "
    "max_new_tokens batch_size seed bf16 records benchmarks clip_segments orders"
).split()
# What makes a question the same one in a resumed run.
QUESTION_FIELDS = ("benchmark", "id", "problem", "options", "solution", "path")
# 97.5 % quantile of the normal distribution
Z = 1.96


@dataclass
class EvalConfig(settings.SharedConfig):
    """Settings of evaluation."""

    benchmarks: list = settings.option([], "benchmarks to answer instead of `records`", choices=NAMES)
    root: str = settings.option("", "folder that has the benchmarks' folders (layout: see benchmarks/)")
    clip_segments: bool = settings.option(
        True, "show only the part that MVBench's five clipped tasks ask about; false: the whole video"
    )
    batch_size: int = settings.option(
        32, "questions decoded together on one GPU; one question alone takes about as long", low=1
    )
    max_new_tokens: int = settings.option(1024, "longest completion", low=1)
    temperature: float = settings.option(0.0, "sampling temperature; 0: greedy", low=0)
    top_p: float = settings.option(1.0, "nucleus sampling; 1: the whole distribution", low=0, high=1)
    orders: list = settings.option(
        ["ordered"], "orders of the frames in which each question is asked; single: the middle frame", choices=ORDERS
    )
    score: str = settings.option("", "score this predictions file, without a model, and write summary.json beside it")
    annotations: str = settings.option(
        "", "with --score: folder of the benchmarks' files, for rows that have no solution"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.benchmarks and not self.root:
            raise settings.UserError(
                "evaluate.root: missing; set --root to the folder that has the benchmarks' folders"
            )
        if self.annotations and not self.score:
            raise settings.UserError("evaluate.annotations: only goes with --score predictions.jsonl")
        if not self.orders:
            raise settings.UserError(f"evaluate.orders: empty; choose from {', '.join(ORDERS)}")
        self.orders = [order for order in ORDERS if order in self.orders]
        # paths of benchmark records are relative to the benchmarks' folder
        if self.benchmarks:
            self.data_root = self.root


def answer_settings(cfg):
    """{name: value} of everything that the answers depend on."""
    values = {name: getattr(cfg, name) for name in ANSWER_SETTINGS}
    values["weights"] = storage.fingerprint(cfg.model)
    if cfg.benchmarks:
        values["records"] = ""
    return values


# ----------------------------------------------------------------------------------------------------------- questions


def load_questions(cfg):
    """Records with `benchmark`, `id` and `task`. Bad rows of a record file become questions with an `error`.

    Raises UserError for bad rows of benchmarks or too many of a record file, and for what no rule can score.
    """
    if cfg.benchmarks:
        records = []
        for name in dict.fromkeys(cfg.benchmarks):
            records += load_benchmark(name, cfg.root, cfg.clip_segments)
        bad_rows = {}
    else:
        records, bad_rows = load_own_questions(cfg)
    # what cannot be scored is an error before hours of answering
    scored_rows([{**record, "prediction": ""} for record in records])
    return records + [unusable_question(cfg, name, reason) for name, reason in bad_rows.items()]


def load_own_questions(cfg):
    """(questions, bad rows) of the record file cfg.records, whose name becomes that of the benchmark."""

    import data

    records, bad_rows = data.load_records(cfg.records, cfg.data_root, cfg.max_unreadable)
    times = Counter(record["problem_id"] for record in records)
    questions = []
    for number, record in enumerate(records, 1):
        row_id = record["problem_id"]
        if times[row_id] > 1:
            row_id = f"{row_id} (row {number})"
        task = record.get("task") or record.get("data_source") or record["problem_type"]
        questions.append({**record, "benchmark": Path(cfg.records).stem, "task": task, "id": row_id})
    return questions, bad_rows


def unusable_question(cfg, name, reason):
    """A question that stands for a bad row of the record file: it is counted but not asked."""
    return {
        "benchmark": Path(cfg.records).stem,
        "id": name,
        "problem_id": name,
        "task": None,
        "problem": "",
        "solution": "",
        "path": "",
        "data_type": "video",
        "problem_type": "free-form",
        "options": [],
        "error": reason,
    }


def report_missing(accelerator, records, cfg):
    """Print the questions that cannot be asked. Raises UserError if none of the media exists."""
    for record in records:
        if "error" in record:
            accelerator.print(f"skipped {record['id']}: {record['error']}")
    missing = set(missing_media(records, cfg.data_root))
    n_missing = sum(record["path"] in missing or record.get("image_path") in missing for record in records)
    if n_missing == len(records):
        setting = "root" if cfg.benchmarks else "data_root"
        raise settings.UserError(
            f"evaluate.{setting}: none of the media is in {cfg.data_root}; for example, {records[0]['path']} is missing"
        )
    if missing:
        accelerator.print(f"{n_missing} of {len(records)} questions cannot be asked; these files are missing:")
        accelerator.print("\n".join(sorted(missing)))
    n_pictures = sum(record["data_type"] == "image" for record in records)
    if n_pictures and not {"ordered", "blind"} & set(cfg.orders):
        accelerator.print(f"{n_pictures} of {len(records)} questions are on pictures, which have no order: not asked")


# ------------------------------------------------------------------------------------------------------------- answers


def answer(cfg):
    """Answer the questions that have no answer yet. Returns all rows on the main process, None on the others."""
    from accelerate.utils import gather_object

    import data
    import policy

    made_by = f"accelerate launch tgrpo.py --config {settings.given('config', 'CONFIG')}"
    model_files.check_model(cfg, "evaluate", made_by=made_by)
    records = load_questions(cfg)
    # every process has a whole model
    accelerator = distributed.make_accelerator(cfg, shard=False)
    folder = Path(cfg.output_dir)
    if accelerator.is_main_process:
        checkpoints.lock_folder(folder)
    report_missing(accelerator, records, cfg)
    processor = model_files.load_processor(cfg)
    model = policy.load_policy(cfg, distributed.compute_dtype(cfg), device=accelerator.device).eval()

    answered = {}
    for index, rows in read_answers(folder, records, cfg).items():
        if not any("error" in row for row in rows):
            answered[index] = rows
    if answered:
        accelerator.print(f"{len(answered)} of {len(records)} questions were answered before, by the same weights")
    # no process writes before all have read
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        merge_files(folder, "predictions.0.jsonl", answered)
    accelerator.wait_for_everyone()

    questions = [index for index in by_length(records) if index not in answered]
    mine = questions[accelerator.process_index :: accelerator.num_processes]
    batches = [mine[first : first + cfg.batch_size] for first in range(0, len(mine), cfg.batch_size)]
    samples = data.Samples(records, processor, cfg, cfg.orders, in_file_order=True)
    bar = tqdm(
        total=len(mine),
        desc="evaluate",
        unit="question",
        unit_scale=accelerator.num_processes,
        disable=not accelerator.is_main_process,
    )
    written = list(answered)
    for batch in workers.loader(samples, batches, cfg):
        rows = answer_batch(model, batch, processor, cfg)
        storage.append_rows(folder / f"predictions.{accelerator.process_index}.jsonl", rows)
        written += [row["index"] for row in rows]
        bar.update(len(batch))
    bar.close()

    # a question without rows has none of these orders: a picture, or a clip of one frame
    written = gather_object(written)
    rows = None
    if accelerator.is_main_process:
        answered = read_answers(folder, records, cfg)
        lost = set(written) - set(answered)
        if lost:
            raise settings.UserError(
                f"{folder}: {len(lost)} of {len(records)} answers are missing; start this command again"
            )
        rows = merge_files(folder, "predictions.jsonl", answered)
    accelerator.end_training()
    return rows


def by_length(records):
    """The numbers of the records, in groups of one kind of media and of questions of about the same length.

    A batch is padded to its longest prompt, and waits for its longest answer.
    """

    def kind_and_length(index):
        record = records[index]
        text = record["problem"] + "".join(record.get("options") or [])
        return record["benchmark"], record["data_type"], len(text), index

    return sorted(range(len(records)), key=kind_and_length)


def answer_batch(model, samples, processor, cfg):
    """Rows of some questions: one per frame order, or one with an `error`. Rows of one question are adjacent."""

    rows = {sample.draw: [] for sample in samples}
    for sample in samples:
        if sample.error:
            rows[sample.draw].append({**prediction_row(sample, cfg), "error": sample.error})
    for order in cfg.orders:
        # sampled answers do not depend on what ran before, nor on the order
        distributed.seed_everything(cfg.seed, samples[0].draw)
        # a picture or a clip of one frame can be asked in order and blind only
        asked = [sample for sample in samples if order in sample.inputs]
        for sample, answer_fields in zip(asked, answer_in_order(model, asked, order, processor, cfg)):
            rows[sample.draw].append({**prediction_row(sample, cfg), "frames": order, **answer_fields})
    complete = []
    for question_rows in rows.values():
        complete += [{**row, "question_rows": len(question_rows)} for row in question_rows]
    return complete


def prediction_row(sample, cfg):
    """What every row has, answered or not: the record without its chain of thought, and the settings."""
    record = {name: value for name, value in sample.record.items() if name != "process"}
    return {**record, "index": sample.draw, "settings": answer_settings(cfg)}


def answer_in_order(model, samples, order, processor, cfg):
    """The answer to each sample with its frames in `order`: a list of dicts with text, scores and length."""

    if not samples:
        return []
    prompts = [sample.inputs[order] for sample in samples]
    counts = [1] * len(samples)
    completions = policy.rollout(
        model, prompts, counts, processor.tokenizer, cfg.temperature, cfg.max_new_tokens, cfg.top_p
    )
    texts = processor.tokenizer.batch_decode(completions, skip_special_tokens=True)
    ends = policy.eos_ids(model, processor.tokenizer)
    answers = []
    for sample, ids, text in zip(samples, completions, texts):
        fields = {
            "prediction": text,
            "accuracy": rewards.accuracy_reward(text, sample.record["solution"], sample.record["problem_type"]),
            "format": rewards.format_reward(text),
            "answered": parsing.extract_answer(text) is not None,
            "n_tokens": len(ids),
            "truncated": int(ids[-1]) not in ends,
        }
        if order == "shuffled":
            fields["frame_order"] = sample.frame_order
        answers.append(fields)
    return answers


def read_answers(folder, records, cfg):
    """{index: rows} of the questions that are answered completely, from the files of all processes.

    Raises UserError if the answers were given with other settings, or to other questions.
    """
    found = {}
    for file in sorted(folder.glob("predictions*.jsonl")):
        try:
            for row in storage.read_jsonl(file):
                check_same_evaluation(folder, row, records[row["index"]], cfg)
                found.setdefault(row["index"], {})[row.get("frames")] = row
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise settings.UserError(
                f"{file}: has no answers of this evaluation; choose another --output_dir"
            ) from None
    answered = {}
    for index, by_order in found.items():
        rows = list(by_order.values())
        if len(rows) == rows[0].get("question_rows"):
            answered[index] = rows
    return answered


def check_same_evaluation(folder, row, record, cfg):
    """Raise UserError if a row was made with other settings, or from another question."""
    expected = answer_settings(cfg)
    changed = [f"{name} {value!r}" for name, value in row["settings"].items() if expected.get(name) != value]
    if changed:
        raise settings.UserError(f"{folder}: has answers made with {', '.join(changed)}; choose another --output_dir")
    if any(row.get(name) != record.get(name) for name in QUESTION_FIELDS):
        raise settings.UserError(f"{folder}: has answers to other questions; choose another --output_dir")


def merge_files(folder, name, answered):
    """Write all rows, in the order of the questions, into one file, and remove the other ones. Returns the rows."""
    rows = []
    for index in sorted(answered):
        rows += sorted(answered[index], key=place_of)
    storage.write_atomic(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
    for file in folder.glob("predictions*.jsonl"):
        if file.name != name:
            os.remove(file)
    return rows


# -------------------------------------------------------------------------------------------------------------- scores


def frames_of(row):
    """The frame order of a row; a row of another program has none, and counts as ordered."""
    return row.get("frames") or "ordered"


def place_of(row):
    return ORDERS.index(frames_of(row))


def rows_by_order(scored):
    """{order: its scored rows}, for the orders that were asked. Questions that could not be asked are in the first."""
    found = {frames_of(row) for row in scored if row["status"] != "unusable"} or {"ordered"}
    asked = {order: [] for order in ORDERS if order in found}
    first = next(iter(asked))
    for row in scored:
        asked[first if row["status"] == "unusable" else frames_of(row)].append(row)
    return asked


def summarise(rows):
    """Scores of every benchmark (benchmarks.score_benchmark), in the first of ORDERS that was asked.

    `orders` has those in the others: {order: {"score", "se", "n", "by_task", "difference": from the first}}.
    Raises UserError for bad rows, with their numbers in `rows`.
    """
    scored = scored_rows(rows)
    summary = {}
    for name in benchmarks_in(scored):
        asked = rows_by_order([row for row in scored if row["benchmark"] == name])
        first, *others = asked
        part = score_benchmark(name, asked[first])
        part["frames"] = first
        part["orders"] = {}
        for order in others:
            scores = score_benchmark(name, asked[order])
            part["orders"][order] = {key: scores[key] for key in ("score", "se", "n", "by_task")}
            part["orders"][order]["difference"] = paired_difference(asked[order], asked[first])
        summary[name] = part
    distinct = {json.dumps(row["settings"]): row["settings"] for row in rows if "settings" in row}
    if distinct:
        summary["settings"] = list(distinct.values()) if len(distinct) > 1 else next(iter(distinct.values()))
    return summary


def paired_difference(rows, other_rows):
    """Mean score of `rows` minus that of `other_rows`, in percent, with a 95 % interval; by task below.

    Over the questions that both have. Unscored questions and stills (VideoMMMU's question_only) are left out. Rows are
    scored rows of one benchmark, one per question. None without pairs.
    """
    scores = question_scores(rows)
    other_scores = question_scores(other_rows)
    pairs = []
    for row_id, (row, score) in scores.items():
        if row_id in other_scores:
            difference = score - other_scores[row_id][1]
            clip = str(row.get("path") or row_id)
            pairs.append({"task": str(row.get("task")), "clip": clip, "difference": difference})
    if not pairs:
        return None
    by_task = {}
    for task in sorted({pair["task"] for pair in pairs}):
        by_task[task] = mean_of_pairs([pair for pair in pairs if pair["task"] == task])
    return {**mean_of_pairs(pairs), "by_task": by_task}


def question_scores(rows):
    """{id: (row, score in percent)} of the scored questions on videos."""
    scores = {}
    for row in rows:
        if row["status"] == "scored" and row.get("task") != "question_only":
            scores[str(row["id"])] = (row, 100 * row["result"][0])
    return scores


def mean_of_pairs(pairs):
    return clustered_mean([pair["difference"] for pair in pairs], [pair["clip"] for pair in pairs])


def clustered_mean(differences, clips):
    """Mean of paired differences with its 95 % interval, mean ± 1.96 standard errors, clustered by clip.

    Questions on one clip are not independent, so their deviations are summed before they are squared. With few clips
    (fewer than 30) the interval is too narrow. `low` and `high` are None for a single clip.

    >>> clustered_mean([1, 0, 1, 0], ["a", "a", "b", "b"])                 # both clips agree
    {'mean': 0.5, 'low': 0.5, 'high': 0.5, 'n': 4, 'clips': 2}
    """
    n = len(differences)
    mean = sum(differences) / n
    deviations = {}
    for difference, clip in zip(differences, clips):
        deviations[clip] = deviations.get(clip, 0.0) + difference - mean
    n_clips = len(deviations)
    low = high = None
    if n_clips > 1:
        variance = n_clips / (n_clips - 1) * sum(deviation**2 for deviation in deviations.values()) / n**2
        low = mean - Z * math.sqrt(variance)
        high = mean + Z * math.sqrt(variance)
    return {"mean": mean, "low": low, "high": high, "n": n, "clips": n_clips}


def print_orders(summary):
    """Print, by benchmark and task, the score in each order and what it differs from the first with a 95 % interval."""
    parts = {name: part for name, part in scored_benchmarks(summary).items() if part["orders"]}
    asked = set(chain.from_iterable(part["orders"] for part in parts.values()))
    others = [order for order in ORDERS if order in asked]
    rows = []
    for name, part in parts.items():
        rows.append(order_row(name, part, others))
        for task in part["by_task"]:
            rows.append(order_row(f"  {task}", part, others, task))
    if rows:
        first = next(iter(parts.values()))["frames"]
        print()
        print(tables.table(["percent", first, *others], rows))
        print(f"in brackets: paired difference from {first}, and its 95 % interval (clustered by video)")


def order_row(label, part, others, task=None):
    """One row of the table of orders: of a benchmark, or of one of its tasks."""

    def of(scores):
        return scores if task is None else scores["by_task"].get(task, {})

    cells = [percent(of(part).get("score"))]
    for order in others:
        scores = part["orders"].get(order)
        cells.append("" if scores is None else order_cell(of(scores), of(scores["difference"] or {"by_task": {}})))
    return [label, *cells]


def order_cell(scores, difference):
    """ "48.4 (-48.8, -52.1 to -45.5)" """
    text = percent(scores.get("score"))
    if "mean" in difference:
        text += f" ({interval_text(difference)})"
    return text


def interval_text(difference):
    """A mean difference with its interval, as text."""
    text = f"{difference['mean']:+.1f}"
    if difference["low"] is not None:
        text += f", {difference['low']:+.1f} to {difference['high']:+.1f}"
    return text


def percent(value):
    return "–" if value is None else f"{value:.1f}"


def main():
    cfg = settings.load_config(EvalConfig, "evaluate", doc=__doc__)
    if cfg.score:
        folder = Path(cfg.score).parent
        rows = record_files.read_rows(cfg.score)
        if cfg.annotations:
            rows = join_annotations(rows, cfg.annotations)
    else:
        settings.require(cfg, "evaluate", "model", "output_dir")
        if not cfg.benchmarks:
            settings.require(cfg, "evaluate", "records")
        folder = Path(cfg.output_dir)
        rows = answer(cfg)
        # not the main process
        if rows is None:
            return
    summary = summarise(rows)
    storage.write_atomic(folder / "summary.json", json.dumps(summary, indent=2))
    print_table(summary)
    print_orders(summary)
    print(f"every answer: {cfg.score or folder / 'predictions.jsonl'}\nall numbers:  {folder / 'summary.json'}")


if __name__ == "__main__":
    main()
