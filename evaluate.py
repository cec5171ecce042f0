"""Evaluation: answers to benchmarks or a record file, with frames in order, shuffled, or both; their scores; a page to look at.

    accelerate launch evaluate.py --config configs/toy.yaml                          # the config's model and records
    accelerate launch evaluate.py --config configs/7b.yaml --benchmarks vsibench mvbench --root DIR     # see benchmarks.py
    python evaluate.py --score predictions.jsonl                                     # scores again, without a model
    python evaluate.py --score predictions.jsonl --annotations DIR                   # rows of benchmark, id, prediction alone
    python evaluate.py --score predictions.jsonl --report report.html --data_root DIR

`--shuffle_frames` shuffles the frames of videos; `--temporal_gap` answers every question both ways, with the same decoding,
and says what the order of frames is worth. Greedy by default: temperature 0.

Writes into output_dir `predictions.jsonl`, one row a question and frame order, with its text, scores and settings, and
`summary.json`: {benchmark: {"score": percent, "n", "answered", "by_task": {…}, …}, "settings": {…}}. Questions are answered in
fixed batches, shared out over the processes; a killed run goes on with the batches that are missing, and asks those again whose
media could not be read. Torch and the model's code are not loaded to score, unless for --annotations or --report.
"""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import settings
from benchmarks import (
    NAMES,
    benchmarks_in,
    join_annotations,
    judge_rows,
    load_benchmark,
    missing_media,
    print_table,
    score_benchmark,
)
from rewards import accuracy_reward, extract_answer, format_reward
from settings import UserError, option

RESAMPLES = 2000  # of the bootstrap


@dataclass
class EvalConfig(settings.SharedConfig):
    """Settings of evaluation."""

    benchmarks: list = option([], "benchmarks to answer in place of `records`", choices=NAMES)
    root: str = option("", "folder that holds the benchmarks' folders (layout: see benchmarks.py)")
    clip_segments: bool = option(
        True, "show only the part that MVBench's five clipped tasks ask about; false: the whole video"
    )
    batch_size: int = option(32, "questions decoded together on one GPU; one question alone takes about as long", low=1)
    max_new_tokens: int = option(1024, "longest completion", low=1)
    temperature: float = option(0.0, "sampling temperature; 0: greedy", low=0)
    top_p: float = option(1.0, "nucleus sampling; 1: the whole distribution", low=0, high=1)
    shuffle_frames: bool = option(False, "show the frames of videos in a random order")
    temporal_gap: bool = option(False, "answer every question twice, frames in order and shuffled, and report the gap")
    score: str = option("", "score this predictions file, without a model, and write summary.json beside it")
    annotations: str = option("", "with --score: folder of the benchmarks' files, for rows that have no solution")
    report: str = option("", "write the scores and a gallery of questions into this HTML file")

    def __post_init__(self):
        super().__post_init__()
        if self.benchmarks and not self.root:
            raise UserError("evaluate.root: missing; --root says where the benchmarks' folders are")
        if self.annotations and not self.score:
            raise UserError("evaluate.annotations: only goes with --score predictions.jsonl")
        if self.shuffle_frames and self.temporal_gap:
            raise UserError(
                "evaluate.shuffle_frames: temporal_gap shows both orders; for shuffled frames alone add --temporal_gap false"
            )
        self.data_root = self.root or self.data_root


def settings_of(cfg):
    """What the numbers depend on; it stands in every row and in the summary."""
    names = (
        "model",
        "max_frames",
        "video_reader",
        "min_pixels",
        "max_pixels",
        "max_prompt_tokens",
        "prompt",
        "shuffle_unit",
        "temperature",
        "top_p",
        "max_new_tokens",
        "batch_size",
        "seed",
        "bf16",
        "records",
        "benchmarks",
        "clip_segments",
        "shuffle_frames",
        "temporal_gap",
    )
    found = {name: getattr(cfg, name) for name in names} | {"weights": settings.fingerprint(cfg.model)}
    return found | ({"records": ""} if cfg.benchmarks else {})


# ----------------------------------------------------------------------------------------------------- questions


def load_questions(cfg):
    """(records with `benchmark`, `id` and `task`: those of the benchmarks, or of the record file, whose name is then the benchmark's;
    missing files; how many questions miss theirs). Raises UserError for bad rows, and where none of the media is there.
    """
    import data

    if cfg.benchmarks:
        records = [
            r for name in dict.fromkeys(cfg.benchmarks) for r in load_benchmark(name, cfg.root, cfg.clip_segments)
        ]
    else:
        records, bad_rows = data.load_records(cfg.records, cfg.data_root, cfg.max_unreadable)
        times = Counter(r["problem_id"] for r in records)  # an id that comes twice gets its row's number
        records = [
            {
                **r,
                "benchmark": Path(cfg.records).stem,
                "task": r.get("task") or r.get("data_source") or r["problem_type"],
                "id": r["problem_id"] if times[r["problem_id"]] == 1 else f"{r['problem_id']} (row {i})",
            }
            for i, r in enumerate(records, 1)
        ]
    judge_rows([{**r, "prediction": ""} for r in records])  # what could not be scored is said before hours of answering
    if not cfg.benchmarks:
        # bad rows are not asked, but counted with the unusable ones
        records += [unusable_question(cfg, name, reason) for name, reason in bad_rows.items()]
    missing = set(missing_media(records, cfg.data_root))
    n_missing = sum(r["path"] in missing or r.get("image_path") in missing for r in records)
    if n_missing == len(records):
        raise UserError(
            f"evaluate.{'root' if cfg.benchmarks else 'data_root'}: none of the media is in {cfg.data_root}, "
            f"where {records[0]['path']} was looked for"
        )
    return records, sorted(missing), n_missing


def unusable_question(cfg, name, reason):
    """What stands for a bad row of the record file among the questions."""
    names = {"benchmark": Path(cfg.records).stem, "id": name, "problem_id": name, "task": None}
    texts = dict.fromkeys(("problem", "solution", "path"), "")
    kinds = {"data_type": "video", "problem_type": "free-form", "options": []}
    return {**names, **texts, **kinds, "error": reason}


def asked(record):
    """What of a record goes into its prediction row: all but its chain of thought."""
    return {k: v for k, v in record.items() if k != "process"}


def answer_batch(model, samples, order, processor, cfg):
    """Rows of one batch with its frames in `order`; a question without that order (a still, shuffled) has no row."""
    from policy import eos_ids, rollout

    samples = [s for s in samples if getattr(s, order) is not None]
    completions = (
        rollout(
            model,
            [getattr(s, order) for s in samples],
            [1] * len(samples),
            processor.tokenizer,
            cfg.temperature,
            cfg.max_new_tokens,
            cfg.top_p,
        )
        if samples
        else []
    )
    texts = processor.tokenizer.batch_decode(completions, skip_special_tokens=True)
    ends = eos_ids(model, processor.tokenizer)
    rows = []
    for sample, ids, text in zip(samples, completions, texts):
        record = sample.record
        row = {
            **asked(record),
            "index": sample.position,
            "frames": order,
            "prediction": text,
            "accuracy": accuracy_reward(text, record["solution"], record["problem_type"]),
            "format": format_reward(text),
            "answered": extract_answer(text) is not None,
            "n_tokens": len(ids),
            "truncated": int(ids[-1]) not in ends,
            "settings": settings_of(cfg),
        }
        rows.append(row | ({"frame_order": sample.frame_order} if order == "shuffled" else {}))
    return rows


def finished_batches(folder, records, cfg):
    """{batch: rows} of the batches answered in full, from every process's file. UserError if they are of other settings or questions."""
    by_batch = {}
    for file in sorted(folder.glob("predictions*.jsonl")):
        try:
            for row in settings.read_jsonl(file):
                changed = [f"{k} {v!r}" for k, v in row["settings"].items() if settings_of(cfg).get(k) != v]
                if changed:
                    raise UserError(
                        f"{folder}: holds answers made with {', '.join(changed)}; choose another --output_dir"
                    )
                record = records[row["index"]]
                if any(
                    row.get(key) != record.get(key)
                    for key in ("benchmark", "id", "problem", "options", "solution", "path")
                ):
                    raise UserError(f"{folder}: holds answers to other questions; choose another --output_dir")
                by_batch.setdefault(row["batch"], {})[row["index"], row.get("frames")] = row
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise UserError(f"{file}: holds no answers of this evaluation; choose another --output_dir") from None
    parts = [(b, list(rows.values())) for b, rows in by_batch.items()]
    return {b: rows for b, rows in parts if len(rows) == rows[0]["batch_rows"]}  # all of a batch, not a part


def answer(cfg):
    """Answer every question that has no answer yet; all rows, in order, on the main process, None on the others."""
    import common
    import data
    import policy

    policy.check_model(
        cfg, "evaluate", made_by="accelerate launch tgrpo.py --config " + settings.given("config", "CONFIG")
    )
    records, missing, n_missing = load_questions(cfg)
    accelerator = common.make_accelerator(cfg, shard=False)  # every process answers with a whole model
    folder = Path(cfg.output_dir)
    if accelerator.is_main_process:
        common.lock_folder(folder)
    for r in records:
        if "error" in r:
            accelerator.print(f"skipped {r['id']}: {r['error']}")
    if missing:
        accelerator.print(
            "\n".join([f"{n_missing} of {len(records)} questions cannot be asked; these files are missing:", *missing])
        )
    processor = policy.load_processor(cfg)
    model = policy.load_policy(cfg, common.compute_dtype(cfg), device=accelerator.device).eval()

    orders = ("ordered", "shuffled") if cfg.temporal_gap else ("shuffled",) if cfg.shuffle_frames else ("ordered",)
    if cfg.shuffle_frames and (stills := sum(r["data_type"] == "image" for r in records)):
        accelerator.print(f"{stills} of {len(records)} questions are on pictures: nothing to shuffle, not asked")
    batches = [list(range(i, min(i + cfg.batch_size, len(records)))) for i in range(0, len(records), cfg.batch_size)]
    done = {
        b: rows for b, rows in finished_batches(folder, records, cfg).items() if not any("error" in r for r in rows)
    }
    if done:
        accelerator.print(
            f"{sum(len(batches[b]) for b in done)} of {len(records)} questions were answered before, by the same weights"
        )
    accelerator.wait_for_everyone()  # all have read before anyone writes
    if accelerator.is_main_process:  # from here on every batch is in one file, whole or not at all
        kept = folder / "predictions.0.jsonl"
        settings.write_atomic(kept, "".join(json.dumps(row) + "\n" for rows in done.values() for row in rows))
        for file in set(folder.glob("predictions*.jsonl")) - {kept}:
            os.remove(file)
    accelerator.wait_for_everyone()
    mine = [b for b in range(len(batches)) if b not in done][accelerator.process_index :: accelerator.num_processes]
    samples = data.Samples(records, processor, cfg, orders, shuffle=False)
    part = folder / f"predictions.{accelerator.process_index}.jsonl"
    with tqdm(
        total=sum(len(batches[b]) for b in mine),
        desc="evaluate",
        unit="question",
        unit_scale=accelerator.num_processes,
        disable=not accelerator.is_main_process,
    ) as bar:
        for b, batch in zip(mine, data.loader(samples, [batches[b] for b in mine], cfg)):
            rows = [
                {**asked(s.record), "index": s.position, "error": s.error, "settings": settings_of(cfg)}
                for s in batch
                if s.error
            ]
            for order in orders:
                common.seed_everything(
                    cfg.seed, b
                )  # sampled answers do not depend on what ran before, nor on the order
                rows += answer_batch(model, [s for s in batch if not s.error], order, processor, cfg)
            settings.append_rows(part, [{**row, "batch": b, "batch_rows": len(rows)} for row in rows])
            bar.update(len(batch))

    accelerator.wait_for_everyone()
    rows = None
    if accelerator.is_main_process:
        done = finished_batches(folder, records, cfg)
        if len(done) < len(batches):  # say, a process of a run believed dead that still works here
            raise UserError(
                f"{folder}: {len(batches) - len(done)} of {len(batches)} batches are not there; start this command again"
            )
        rows = sorted(
            (row for rows in done.values() for row in rows), key=lambda r: (r["index"], r.get("frames") or "")
        )
        settings.write_atomic(folder / "predictions.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
        for file in folder.glob("predictions.*.jsonl"):
            os.remove(file)
    accelerator.end_training()
    return rows


# -------------------------------------------------------------------------------------------------------- scores


def mean_and_se(values):
    """Mean and its standard error (0 for one value)."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def summarise(rows):
    """Scores of every benchmark (see benchmarks.score_benchmark); where rows have both frame orders, `shuffled` and `gap` beside them.

    Raises what judge_rows raises, numbers being those of `rows`.
    """
    judged, summary = judge_rows(rows), {}
    for name in benchmarks_in(judged):
        mine = [r for r in judged if r["benchmark"] == name]
        ordered, shuffled = (
            [r for r in mine if (r.get("frames") or "ordered") == order] for order in ("ordered", "shuffled")
        )
        if all(r["place"] == "unusable" for r in ordered):  # frames were only shown shuffled
            ordered, shuffled = mine, []
        part = summary[name] = score_benchmark(name, ordered)
        part["frames"] = sorted({r.get("frames") or "ordered" for r in ordered})[-1]
        if shuffled:
            part["shuffled"] = {key: score_benchmark(name, shuffled)[key] for key in ("score", "se", "n", "by_task")}
            part["gap"] = temporal_gap(ordered, shuffled)
    if distinct := list({json.dumps(r["settings"]): r["settings"] for r in rows if "settings" in r}.values()):
        summary["settings"] = distinct[0] if len(distinct) == 1 else distinct
    return summary


def temporal_gap(ordered, shuffled):
    """p and p̃ (percent, plain means over the questions that have both), their gap and its 95 % interval; by task below.

    Judged rows in; questions on a still (VideoMMMU's question_only) and unscored ones are left out. None if no question is left.
    """
    scores = lambda rows: {
        str(r["id"]): (r, 100 * r["judged"][0])
        for r in rows
        if r["place"] == "scored" and r.get("task") != "question_only"
    }
    again = scores(shuffled)
    pairs = [
        (str(r.get("task")), r.get("path") or id, p, again[id][1])
        for id, (r, p) in scores(ordered).items()
        if id in again
    ]
    describe = lambda part: {
        "p": float(np.mean([p for *_, p, _ in part])),
        "p_shuffled": float(np.mean([q for *_, q in part])),
        **bootstrap([p - q for *_, p, q in part], [clip for _, clip, *_ in part]),
    }
    tasks = sorted({task for task, *_ in pairs})
    return (
        {**describe(pairs), "by_task": {t: describe([x for x in pairs if x[0] == t]) for t in tasks}} if pairs else None
    )


def bootstrap(differences, clips, seed=0):
    """Mean of paired differences with its 95 % bootstrap interval. Whole clips are drawn: questions on one clip are not independent.

    `low` and `high` are None for a single clip, which says nothing of its spread.

    >>> bootstrap([1, 0, 1, 0], ["a", "a", "b", "b"])                 # both clips say the same
    {'gap': 0.5, 'low': 0.5, 'high': 0.5, 'n': 4, 'clips': 2}
    """
    names, place = np.unique([str(c) for c in clips], return_inverse=True)
    sums, counts = np.bincount(place, differences), np.bincount(place)
    result = {
        "gap": float(sums.sum() / counts.sum()),
        "low": None,
        "high": None,
        "n": len(differences),
        "clips": len(names),
    }
    if len(names) == 1:
        return result
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(names), size=len(names))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return result | {"low": float(low), "high": float(high)}


def print_gaps(summary):
    """Which benchmarks and tasks need the order of frames: p, p̃, and the gap with its interval."""
    parts = {name: part["gap"] for name, part in summary.items() if isinstance(part, dict) and part.get("gap")}
    if parts:
        print(
            f"\n{'videos, percent':<34} {'n':>6} {'in order':>9} {'shuffled':>9} {'gap':>6}   95 % interval (bootstrap over clips)"
        )
    for name, gap in parts.items():
        for label, line in {name: gap, **{f"  {t}": g for t, g in gap["by_task"].items()}}.items():
            interval = "–" if line["low"] is None else f"{line['low']:+.1f} to {line['high']:+.1f}"
            print(
                f"{label:<34.34} {line['n']:>6} {line['p']:>9.1f} {line['p_shuffled']:>9.1f} {line['gap']:>+6.1f}   {interval}"
            )


def main():
    cfg = settings.load_config(EvalConfig, "evaluate", doc=__doc__)
    if cfg.score:
        rows, folder = settings.read_rows(cfg.score), Path(cfg.score).parent
        rows = join_annotations(rows, cfg.annotations) if cfg.annotations else rows
    else:
        settings.require(cfg, "evaluate", "model", "output_dir", *([] if cfg.benchmarks else ["records"]))
        rows, folder = answer(cfg), Path(cfg.output_dir)
        if rows is None:  # not the main process
            return
    summary = summarise(rows)
    settings.write_atomic(folder / "summary.json", json.dumps(summary, indent=2))
    print_table(summary)
    print_gaps(summary)
    print(f"every answer: {cfg.score or folder / 'predictions.jsonl'}\nall numbers:  {folder / 'summary.json'}")
    if cfg.report:
        from tools.report import write_report

        write_report(cfg.report, rows, summary, cfg)
        print(f"page:         {cfg.report}")


if __name__ == "__main__":
    main()
