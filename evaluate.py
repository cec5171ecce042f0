"""Evaluation: answers to a record file, with frames in order, shuffled, or both, scored by the training's own rewards.

    accelerate launch evaluate.py --config configs/toy.yaml                          # the config's model and records
    accelerate launch evaluate.py --config configs/toy.yaml --shuffle_frames         # frames shuffled
    accelerate launch evaluate.py --config configs/toy.yaml --temporal_gap           # both, and the gap between them

Writes into output_dir: `predictions.jsonl`, one row a question and frame order, with text, rewards and settings; and
`summary.json`. Questions are answered in fixed batches, shared out over the processes; a killed run goes on with the
batches that are missing. Greedy by default: temperature 0.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import common
import data
from common import UserError, option
from rewards import CORRECT, accuracy_reward, extract_answer, format_reward
from tgrpo import eos_ids, rollout


@dataclass
class EvalConfig(common.SharedConfig):
    """Settings of evaluation."""

    batch_size: int = option(8, "questions decoded together on one GPU", low=1)
    max_new_tokens: int = option(1024, "longest completion", low=1)
    temperature: float = option(0.0, "sampling temperature; 0: greedy", low=0)
    top_p: float = option(1.0, "nucleus sampling; 1: the whole distribution", low=0, high=1)
    shuffle_frames: bool = option(False, "show the frames of videos in a random order")
    temporal_gap: bool = option(False, "answer every question twice, frames in order and shuffled, and report the gap")


def settings_of(cfg):
    """What the numbers depend on; it stands in every row."""
    names = ("model", "max_frames", "min_pixels", "max_pixels", "prompt", "shuffle_unit", "temperature", "top_p",
             "max_new_tokens", "batch_size", "seed", "bf16", "records", "shuffle_frames", "temporal_gap")
    return {name: getattr(cfg, name) for name in names}


def answer_batch(model, samples, order, processor, cfg):
    """Rows of one batch with its frames in `order`; a question without that order (a still, shuffled) has no row."""
    asked = [s for s in samples if s.get(order) is not None]
    completions = rollout(model, [s[order] for s in asked], [1] * len(asked), processor.tokenizer, cfg.temperature,
                          cfg.max_new_tokens, cfg.top_p) if asked else []
    texts = processor.tokenizer.batch_decode(completions, skip_special_tokens=True)
    ends = eos_ids(model, processor.tokenizer)
    rows = []
    for sample, ids, text in zip(asked, completions, texts):
        record = {k: v for k, v in sample["record"].items() if k not in ("process", "problem_id")}
        rows.append({
            "benchmark": Path(cfg.records).stem, "id": sample["record"]["problem_id"], "index": sample["position"],
            "frames": order, "prediction": text, **record, "task": record.get("data_source") or record["problem_type"],
            "accuracy": accuracy_reward(text, record["solution"], record["problem_type"]), "format": format_reward(text),
            "answered": extract_answer(text) is not None, "n_tokens": len(ids), "truncated": int(ids[-1]) not in ends,
            "settings": settings_of(cfg)})
    return rows


def mean_and_se(values):
    """Mean and its standard error (0 for one value)."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def summarise(rows):
    """Accuracy with standard error of each frame order: overall, by task and by problem type; and the paired gap."""
    summary = {}
    for order in sorted({row["frames"] for row in rows if "frames" in row}):
        mine = [row for row in rows if row.get("frames") == order]
        describe = lambda part: dict(zip(("accuracy", "se"), mean_and_se([r["accuracy"] for r in part])), n=len(part))
        summary[order] = describe(mine) | {
            "correct": sum(r["accuracy"] > CORRECT for r in mine) / len(mine),
            "format": sum(r["format"] for r in mine) / len(mine),
            "unanswered": sum(not r["answered"] for r in mine) / len(mine),
            "by_task": {t: describe([r for r in mine if r["task"] == t]) for t in sorted({r["task"] for r in mine})},
            "by_problem_type": {t: describe([r for r in mine if r["problem_type"] == t])
                                for t in sorted({r["problem_type"] for r in mine})}}
    pairs = {}
    for row in rows:
        if "frames" in row:
            pairs.setdefault(row["index"], {})[row["frames"]] = row["accuracy"]
    gaps = [pair["ordered"] - pair["shuffled"] for pair in pairs.values() if len(pair) == 2]
    if gaps:
        summary["gap"] = dict(zip(("accuracy", "se"), mean_and_se(gaps)), n=len(gaps))
    summary["unusable"] = [row["error"] for row in rows if "error" in row]
    return summary


def print_summary(summary):
    print(f"{'frames':<10} {'questions':<28} {'n':>6} {'accuracy':>18}")
    for order in [o for o in ("ordered", "shuffled") if o in summary]:
        lines = {"all": summary[order], **summary[order]["by_task"]}
        for name, part in lines.items():
            print(f"{order:<10} {name:<28.28} {part['n']:>6} {100 * part['accuracy']:>10.1f} ± {100 * part['se']:.1f}")
    if "gap" in summary:
        print(f"{'gap':<10} {'videos, paired':<28} {summary['gap']['n']:>6} "
              f"{100 * summary['gap']['accuracy']:>10.1f} ± {100 * summary['gap']['se']:.1f}")
    for reason in summary["unusable"]:
        print(f"not answered, media unusable: {reason}")


def finished_batches(folder, cfg):
    """{batch: rows} of the batches already answered, from every process's file. UserError if settings differ."""
    rows = {}
    for file in sorted(folder.glob("predictions*.jsonl")):
        for row in common.read_jsonl(file):
            rows[row["index"], row.get("frames")] = row
    for row in rows.values():
        changed = [f"{k} {v!r}" for k, v in row["settings"].items() if settings_of(cfg)[k] != v]
        if changed:
            raise UserError(f"{folder}: holds answers made with {', '.join(changed)}; choose another --output_dir")
    by_batch = {}
    for row in rows.values():
        by_batch.setdefault(row["batch"], []).append(row)
    return {b: rows for b, rows in by_batch.items() if len(rows) == rows[0]["batch_rows"]}     # all, not a part


def main():
    cfg = common.load_config(EvalConfig, "evaluate", doc=__doc__)
    common.require(cfg, "evaluate", "model", "records", "output_dir")
    common.check_model(cfg, "evaluate", made_by="accelerate launch tgrpo.py --config " + common.config_path())
    records = data.load_records(cfg.records, cfg.data_root)
    accelerator = common.make_accelerator(cfg)
    processor = common.load_processor(cfg)
    model = common.load_model(cfg).eval().to(accelerator.device)

    orders = ("ordered", "shuffled") if cfg.temporal_gap else ("shuffled",) if cfg.shuffle_frames else ("ordered",)
    batches = [list(range(i, min(i + cfg.batch_size, len(records)))) for i in range(0, len(records), cfg.batch_size)]
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    done = finished_batches(folder, cfg)
    accelerator.wait_for_everyone()                       # all have read before anyone writes
    mine = [b for b in range(len(batches)) if b not in done][accelerator.process_index::accelerator.num_processes]
    samples = data.Samples(records, processor, cfg, orders, shuffle=False)
    part = folder / f"predictions.{accelerator.process_index}.jsonl"
    common.write_atomic(part, "".join(json.dumps(row) + "\n" for row in common.read_jsonl(part)))     # drops a torn last line
    with open(part, "a") as file, tqdm(total=sum(len(batches[b]) for b in mine), desc="evaluate", unit="question",
                                       disable=not accelerator.is_main_process) as bar:
        for b, batch in zip(mine, data.loader(samples, [batches[b] for b in mine], cfg)):
            common.seed_everything(cfg.seed, b)           # sampled answers do not depend on what ran before
            rows = [{"index": s["position"], "error": s["error"], "settings": settings_of(cfg)} for s in batch if "error" in s]
            for order in orders:
                rows += answer_batch(model, [s for s in batch if "error" not in s], order, processor, cfg)
            file.write("".join(json.dumps({**row, "batch": b, "batch_rows": len(rows)}) + "\n" for row in rows))
            file.flush()
            bar.update(len(batch))

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        done = finished_batches(folder, cfg)
        rows = sorted((row for rows in done.values() for row in rows), key=lambda r: (r["index"], r.get("frames") or ""))
        common.write_atomic(folder / "predictions.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
        for file in folder.glob("predictions.*.jsonl"):
            os.remove(file)
        summary = summarise(rows)
        common.write_atomic(folder / "summary.json", json.dumps({**summary, "settings": settings_of(cfg)}, indent=2))
        print_summary(summary)
        print(f"every answer: {folder / 'predictions.jsonl'}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
