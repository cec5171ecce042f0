"""Evaluation: answer benchmarks or a record file, with the frames in up to five orders, and score the answers.

    accelerate launch evaluate.py --config configs/toy.yaml                          # the config's model and records
    accelerate launch evaluate.py --config configs/7b.yaml --benchmarks vsibench mvbench --root DIR    # see benchmarks/

`--orders ordered shuffled reversed single blind` (any of them; ordered alone is the default) asks each question about
the frames in order, shuffled, backwards, about the middle frame only, and without any frame, with the same decoding.
The paired difference from `ordered` shows whether a benchmark needs the order of frames, more than one frame,
or frames at all. Decoding is greedy by default (temperature 0).

output_dir gets `predictions.jsonl`, one row per question and frame order with its text, scores and settings, and
`summary.json` (see benchmarks/score.py, which also scores saved answers without a model). The questions are shared out
over the processes. A killed run continues with the questions that have no answer yet, and repeats those whose media
could not be read. Sampled answers (temperature > 0) depend on which questions are in a batch.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import data
import policy
import rewards
from benchmarks import NAMES, answers, load_benchmark, missing_media, score
from benchmarks.shared import ORDERS
from support import answer_files, checkpoints, distributed, families, model_files, parsing, settings, storage, workers

# What the answers depend on. It is written into every row and into the summary.
ANSWER_SETTINGS = (
    "model max_frames video_reader min_pixels max_pixels max_prompt_tokens prompt shuffle_unit shuffle_stamps "
    "temperature top_p max_new_tokens batch_size seed bf16 vision_attention records data_root benchmarks "
    "clip_segments orders"
).split()


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

    def __post_init__(self):
        super().__post_init__()
        if self.benchmarks and not self.root:
            raise settings.UserError(
                "evaluate.root: missing; set --root to the folder that has the benchmarks' folders"
            )
        if not self.orders:
            raise settings.UserError(f"evaluate.orders: empty; choose from {', '.join(ORDERS)}")
        self.orders = [order for order in ORDERS if order in self.orders]
        if not self.benchmarks and Path(self.records).stem in NAMES:
            name = Path(self.records).stem
            raise settings.UserError(f"evaluate.records: {self.records}: {name} is a benchmark's name; rename the file")
        # paths of benchmark records are relative to the benchmarks' folder
        if self.benchmarks:
            self.data_root = self.root


def answer_settings(cfg):
    """{name: value} of everything that the answers depend on."""
    values = {name: getattr(cfg, name) for name in ANSWER_SETTINGS}
    values["weights"] = storage.fingerprint(cfg.model)
    values["data_root"] = str(Path(cfg.data_root).absolute())
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
    answers.scored_rows([{**record, "prediction": ""} for record in records])
    return records + [unusable_question(cfg, name, reason) for name, reason in bad_rows.items()]


def load_own_questions(cfg):
    """(questions, bad rows) of the record file cfg.records, whose name becomes that of the benchmark."""
    records, bad_rows = data.load_records(cfg.records, cfg.data_root, cfg.max_unreadable)
    times = Counter(str(record["problem_id"]) for record in records)
    questions = []
    for number, record in enumerate(records, 1):
        row_id = record["problem_id"]
        if times[str(row_id)] > 1:
            row_id = f"{row_id} (row {number})"
        task = str(record.get("task") or record.get("data_source") or record["problem_type"])
        questions.append({**record, "benchmark": Path(cfg.records).stem, "task": task, "id": row_id})
    return questions, bad_rows


def unusable_question(cfg, name, reason):
    """A question that stands for a bad row of the record file: it is counted but not asked."""
    names = {"benchmark": Path(cfg.records).stem, "id": name, "problem_id": name}
    return {**data.EMPTY_RECORD, **names, "path": "", "task": None, "error": reason}


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
    model_files.check_model(cfg, "evaluate", made_by="tgrpo.py")
    records = load_questions(cfg)
    made_with = answer_settings(cfg)
    # answers are saved as they are given
    if distributed.LAUNCHED:
        workers.leave_with_parent()
    # every process has a whole model
    accelerator = distributed.make_accelerator(cfg, shard=False)
    folder = Path(cfg.output_dir)
    if accelerator.is_main_process:
        checkpoints.lock_folder(folder)
    report_missing(accelerator, records, cfg)
    answered = answer_files.answered_before(accelerator, folder, records, made_with)
    processor = model_files.load_processor(cfg)
    model = policy.load_policy(cfg, distributed.compute_dtype(cfg), device=accelerator.device).eval()
    answer_files.start(accelerator, folder, answered)

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
        rows = answer_batch(model, batch, processor, cfg, made_with)
        storage.append_rows(folder / f"predictions.{accelerator.process_index}.jsonl", rows)
        written += [row["index"] for row in rows]
        bar.update(len(batch))
    bar.close()
    rows = answer_files.finish(accelerator, folder, records, made_with, written)
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


def answer_batch(model, samples, processor, cfg, made_with):
    """Rows of some questions: one per frame order, or one with an `error`. Rows of one question are adjacent."""
    rows = {sample.draw: [] for sample in samples}
    for sample in samples:
        if sample.error:
            rows[sample.draw].append({**prediction_row(sample, made_with), "error": sample.error})
    for order in cfg.orders:
        # sampled answers do not depend on what ran before, nor on the order
        distributed.seed_everything(cfg.seed, samples[0].draw)
        # a picture or a clip of one frame can be asked in order and blind only
        asked = [sample for sample in samples if order in sample.inputs]
        for sample, fields in zip(asked, answer_in_order(model, asked, order, processor, cfg)):
            rows[sample.draw].append({**prediction_row(sample, made_with), "frames": order, **fields})
    complete = []
    for question_rows in rows.values():
        complete += [{**row, "question_rows": len(question_rows)} for row in question_rows]
    return complete


def prediction_row(sample, made_with):
    """What every row has, answered or not: the record without its chain of thought, and the settings."""
    record = {name: value for name, value in sample.record.items() if name != "process"}
    return {**record, "index": sample.draw, "settings": made_with}


def answer_in_order(model, samples, order, processor, cfg):
    """The answer to each sample with its frames in `order`: a list of dicts with text, scores and length."""
    if not samples:
        return []
    prompts = [sample.inputs[order] for sample in samples]
    counts = [1] * len(samples)
    completions = policy.rollout(
        model, prompts, counts, processor.tokenizer, cfg.temperature, cfg.max_new_tokens, cfg.top_p
    )
    texts = families.texts(processor, completions)
    ends = policy.eos_ids(model, processor.tokenizer)
    rows = []
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
        rows.append(fields)
    return rows


def main():
    cfg = settings.load_config(EvalConfig, "evaluate", doc=__doc__, required=("model", "output_dir"))
    if not cfg.benchmarks:
        settings.require(cfg, "evaluate", "records")
    try:
        rows = answer(cfg)
    except KeyboardInterrupt:
        raise settings.UserError("stopped; the same command continues after the answers that are saved") from None
    # None: not the main process
    if rows is not None:
        score.write_summary(rows, Path(cfg.output_dir) / answer_files.MERGED)


if __name__ == "__main__":
    main()
