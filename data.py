"""Records, frames, prompts: everything between a JSON file and the tensors the model sees.

One record (the format Video-R1 released; unknown extra keys are kept):

    {"problem_id": 7, "problem": "Which way does the disc move?", "data_type": "video",
     "problem_type": "multiple choice", "options": ["A. left", "B. right"], "solution": "<answer>B</answer>",
     "process": "<think>It starts left and ends right.</think>", "path": "./clips/7.mp4", "data_source": "toy"}

and the prompt made from it: the frames, then PROMPT filled with the problem, its options and a hint. For the cold start
the answer is `process`, a newline, `solution`.

    python data.py --config configs/toy.yaml --stage tgrpo            # print one example, as the model sees it
    python data.py --config configs/toy.yaml --stage tgrpo --check    # decode every file once; list what cannot be read
    python data.py --config configs/toy.yaml --stage tgrpo --check --out readable.json    # write the usable rows too
    python data.py --records mine.json --split 0.1 --out my_data      # 10 % of the clips into test.json, the rest
    into train.json python data.py --distill predictions.jsonl --out cot.json         # a big model's good answers as
    chains of thought for sft.py

A solution may also be a number or lack its tags ("3", 3, "B"), options may lack their letters (the prompt gives
them), and `<video>` or `<image>` in a problem, which other formats have, is taken out. `start` and `end` in seconds
show a part of a clip; `fps` is the rate of a folder of stills.

A file that is no list of records is an error at once. A row that is wrong, like media that cannot be read, is skipped,
counted and named, up to `max_unreadable` of the rows. Nothing is ever replaced by another clip, and no question is ever
trained without its pixels.

Axes: F frames · H height · W width · C channels · P tokens of a prompt
"""

import atexit
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from PIL import ImageOps
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.video_utils import VideoMetadata

import settings
from frames import read_clip, read_folder, read_picture
from rewards import (
    ACCURACY,
    CORRECT,
    accuracy_reward,
    format_reward,
    lettered,
    parse_solution,
    tagged_solution,
    tags_in,
)
from settings import UserError, option, read_rows

PROMPT = """{problem}
{options}

Look at the frames and think it through step by step between <think> and </think>. Then state the result between \
<answer> and </answer>. {hint}"""

HINTS = {
    "multiple choice": "The result is the letter of one option.",
    "numerical": "The result is one number.",
    "regression": "The result is one number.",
    "OCR": "The result is the text exactly as it is written in the picture.",
    "free-form": "The result is a short text.",
}

# the fields that every record has
FIELDS = {
    "problem_id": (str, int),
    "problem": str,
    "data_type": str,
    "problem_type": str,
    "solution": (str, int, float),
    "path": str,
}
# frame: a folder of numbered stills
DATA_TYPES = ("video", "image", "frame")
# tokens that mean pixels or turns to the model, not words
CONTROL = re.compile(r"<\|\w+\|>")
SURROGATE = re.compile("[\ud800-\udfff]")
# where other formats put the pixels
PLACEHOLDER = re.compile(r"[ \t]*<(?:video|image)>")
# bad rows that an error lists
LISTED = 1000


class Unusable(Exception):
    """This record's media cannot be read, or its prompt is too long: skip it, count it, name it."""


# --------------------------------------------------------------------------------------------------- records


def load_records(path, data_root, max_unreadable=0.0, need_process=False):
    """(records, bad rows) of a JSON or JSONL file: a list of dicts in the file's order, and {"row 7": its fault}.

    Rows count from 1. Solutions come with their tags. Raises UserError with the list of bad rows if they are more than
    `max_unreadable` of all rows.
    """
    rows = read_rows(path)
    refuse_conversations(path, rows)
    usable, reasons = split_rows(rows, data_root, need_process)
    bad_rows = {f"row {number}": reason for number, reason in reasons.items()}
    if len(bad_rows) > max_unreadable * len(rows) or not usable:
        lines = [f"  {name}: {reason}" for name, reason in bad_rows.items()]
        if len(lines) > LISTED:
            lines = [*lines[:LISTED], f"  and {len(lines) - LISTED} more"]
        raise UserError(
            f"{path}: {len(bad_rows)} of {len(rows)} rows are bad, more than max_unreadable {max_unreadable} allows:\n"
            + "\n".join(lines)
            + "\nRaise max_unreadable to train without them, or write the usable rows into a file of their own: "
            "python data.py --config CONFIG --stage STAGE --check --out FILE"
        )
    return list(usable.values()), bad_rows


def split_rows(rows, data_root, need_process=False):
    """({row number: record}, {row number: what is wrong}), numbers from 1. Records have tags round their solutions."""
    usable, reasons = {}, {}
    for number, row in enumerate(rows, 1):
        try:
            check_record(row, data_root, need_process)
            usable[number] = row | {"solution": tagged_solution(row["solution"])}
        except ValueError as error:
            reasons[number] = str(error)
    return usable, reasons


def refuse_conversations(path, rows):
    """UserError, one line, for a file of conversations as LLaVA and chat data sets have them."""
    for name in ("conversations", "messages"):
        if isinstance(rows[0], dict) and name in rows[0] and "problem" not in rows[0]:
            raise UserError(
                f"{path}: row 1 is a conversation ({name!r}); a record has problem, solution, path and so on: "
                "see README, Train on your own clips"
            )


def check_record(row, data_root, need_process):
    """ValueError naming the first field of `row` that is wrong, with its value."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a record, got {row!r:.80}")
    for name, kind in FIELDS.items():
        if row.get(name) in (None, ""):
            raise ValueError(f"{name}: missing")
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise ValueError(f"{name}: expected text, got {row[name]!r:.80}")
    if not plain_problem(row):
        raise ValueError(f"problem: missing, there is only {row['problem']!r:.80}")
    if row["data_type"] not in DATA_TYPES:
        raise ValueError(f"data_type: expected one of {', '.join(DATA_TYPES)}, got {row['data_type']!r:.80}")
    if row["problem_type"] not in ACCURACY:
        raise ValueError(f"problem_type: expected one of {', '.join(ACCURACY)}, got {row['problem_type']!r:.80}")
    options = row.get("options") or []
    if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
        raise ValueError(f"options: expected a list of texts, got {options!r:.80}")
    if row["problem_type"] == "multiple choice" and not options:
        raise ValueError("options: a multiple choice question without options")
    for name in ("problem", "solution", "process"):
        check_text(name, row.get(name))
    for option_text in options:
        check_text("options", option_text)
    try:
        parse_solution(row["solution"], row["problem_type"], options)
    except ValueError as error:
        raise ValueError(f"solution: {error}") from None
    if need_process and not (isinstance(row.get("process"), str) and row["process"].strip()):
        raise ValueError("process: missing; the SFT stage needs a chain of thought")
    if need_process and [tag for tag, *_ in tags_in(row["process"])] != ["<think>", "</think>"]:
        raise ValueError(f"process: expected one think block, <think>…</think>, got {row['process']!r:.80}")
    check_part(row)
    media_path(row, data_root)
    if row.get("image_path"):
        if not isinstance(row["image_path"], str):
            raise ValueError(f"image_path: expected text, got {row['image_path']!r:.80}")
        media_path({"path": row["image_path"]}, data_root)


def check_text(name, text):
    """ValueError if a text would not reach the model as words."""
    if not isinstance(text, str):
        return
    found = CONTROL.search(text) if "<|" in text else None
    if found:
        raise ValueError(f"{name}: holds {found[0]}, a token that the model takes for pixels or the end of a turn")
    if not text.isascii() and SURROGATE.search(text):
        raise ValueError(f"{name}: half of a surrogate pair is no text: {text!a:.80}")


def check_part(row):
    """ValueError if the part of the clip to show, or the rate of a folder of stills, is no sense in seconds."""
    start, end = row.get("start"), row.get("end")
    if (start, end) != (None, None):
        if not is_number(start) or not is_number(end):
            raise ValueError(f"start, end: expected two numbers of seconds, got {start!r:.40}, {end!r:.40}")
        if start > end:
            raise ValueError(f"start, end: {start} is after {end}")
    rate = row.get("fps")
    if row["data_type"] == "frame" and rate is not None and not (is_number(rate) and 0.001 <= rate <= 1000):
        raise ValueError(f"fps: expected stills per second, got {rate!r:.40}")


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def media_path(row, data_root):
    """The absolute path of the record's media. ValueError if it escapes data_root (symlinks are allowed)."""
    root = os.path.abspath(data_root)
    path = os.path.abspath(os.path.join(root, row["path"]))
    inside = path == root or path.startswith(os.path.join(root, ""))
    if "\0" in path or not inside:
        raise ValueError(f"path: leaves the data root {data_root}: {row['path']!r:.80}")
    return path


# ---------------------------------------------------------------------------------------------------- frames


def load_media(record, cfg):
    """(frames, metadata) of a video: uint8 (F, H, W, C), F <= max_frames; of an image: (PIL image, None).

    The processor derives the time between two frames from the metadata: total_num_frames / fps / F seconds, the true
    one. It is the same in SFT, rollout, loss and evaluation. `start` and `end` (seconds from the first frame) show a
    part of a clip. `last_frame`: the clip ends on the question's own picture, which is always shown. `image_path`:
    that picture is a file and becomes one more frame at the end. Raises Unusable with file and reason.
    """
    path = media_path(record, cfg.data_root)
    try:
        if record["data_type"] == "image":
            return read_picture(path), None
        picture = None
        if record.get("image_path"):
            picture = read_picture(media_path({"path": record["image_path"]}, cfg.data_root))
        n = max(1, cfg.max_frames - (picture is not None))
        part = {"start": record.get("start"), "end": record.get("end"), "last_frame": bool(record.get("last_frame"))}
        if record["data_type"] == "frame":
            clip = read_folder(path, n, record.get("fps"), **part)
        else:
            clip = read_clip(path, n, **part, reader=cfg.video_reader)
        frames_FHWC, indices, total, fps = clip
        if picture is not None:
            height, width = frames_FHWC.shape[1:3]
            picture = ImageOps.pad(picture, (width, height))
            frames_FHWC = np.concatenate([frames_FHWC, np.asarray(picture)[None]])
            # one more frame, at the same distance
            total = total * (1 + 1 / len(indices))
            indices = [*indices, indices[-1] + 1]
        return frames_FHWC, VideoMetadata(total_num_frames=total, fps=fps, frames_indices=indices)
    except Exception as error:
        # a hostile file may raise anything: name it and go on
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise Unusable(f"{record['path']}: {reason:.200}") from error


def shuffled_order(n_frames, rng, unit="frame", patch=2):
    """A random order of the frames that is not the given one, as a list of indices; None if there is only one unit.

    unit="frame" permutes single frames, as published: the pair blended into one temporal patch then holds two distant
    moments. unit="patch" moves whole pairs, which leaves the motion inside a pair readable.
    """
    size = patch if unit == "patch" else 1
    # an odd last frame fills its patch by repeating itself, as the processor would make it do
    units = [[min(i + k, n_frames - 1) for k in range(size)] for i in range(0, n_frames, size)]
    if len(units) < 2:
        return None
    order = list(range(len(units)))
    while order == list(range(len(units))):  # never the identity: it would be the ordered group again
        rng.shuffle(order)
    return [frame for u in order for frame in units[u]]


# --------------------------------------------------------------------------------------------------- prompts


def plain_problem(record):
    """The question without the words that other formats put where the pixels go.

    >>> plain_problem({"problem": "<video>\\nWhat is in <image> and where?"})
    'What is in and where?'
    """
    return PLACEHOLDER.sub("", record["problem"]).strip()


def messages(record, cfg):
    """The record as a conversation of one turn: the picture part, then the question."""
    question = (cfg.prompt or PROMPT).format(
        problem=plain_problem(record),
        options="\n".join(lettered(record.get("options") or [])),
        hint=HINTS[record["problem_type"]],
    )
    picture = {"type": "image"} if record["data_type"] == "image" else {"type": "video"}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question.strip()}]}]


def encode(processor, record, media, metadata, cfg):
    """Model inputs of one prompt: input_ids, attention_mask, mm_token_type_ids (1, P), pixels, grid, frame times.

    Raises Unusable if the prompt is longer than max_prompt_tokens: cutting it would part pixels from their tokens.
    """
    text = processor.apply_chat_template(messages(record, cfg), tokenize=False, add_generation_prompt=True)
    size = {"shortest_edge": cfg.min_pixels, "longest_edge": cfg.max_pixels}  # pixels a frame, despite the names
    if record["data_type"] == "image":
        inputs = processor(text=[text], images=[media], images_kwargs={"size": size}, return_tensors="pt")
        inputs = as_clip(inputs, processor)
    else:
        inputs = processor(
            text=[text],
            videos=[media],
            return_tensors="pt",
            videos_kwargs={
                "size": size,
                "cap_pixels_per_frame": False,
                "video_metadata": [metadata],
                "do_sample_frames": False,
            },
        )
    inputs = dict(inputs)
    length = inputs["input_ids"].shape[1]
    if length > cfg.max_prompt_tokens:
        raise Unusable(f"{record['path']}: prompt of {length} tokens, max_prompt_tokens is {cfg.max_prompt_tokens}")
    inputs["second_per_grid_ts"] = torch.as_tensor(inputs["second_per_grid_ts"], dtype=torch.float32)
    return inputs


def as_clip(inputs, processor):
    """A picture's inputs as those of a clip of one moment. The model computes the same from both (test_pictures.py).

    So a batch has one kind of media, and the vision tower runs once per batch. Under FSDP it must: all ranks gather its
    weights together.
    """
    ids = inputs["input_ids"]
    is_picture = ids == processor.image_token_id
    return {
        "input_ids": ids.masked_fill(is_picture, processor.video_token_id),
        "attention_mask": inputs["attention_mask"],
        "mm_token_type_ids": is_picture * 2,
        "pixel_values_videos": inputs["pixel_values"],
        "video_grid_thw": inputs["image_grid_thw"],
        "second_per_grid_ts": [1.0],
    }


def target_ids(processor, record):
    """What the cold start learns to say: process, newline, solution, end of turn. Tensor of token ids."""
    end = processor.tokenizer.eos_token
    text = record["process"].strip() + "\n" + record["solution"].strip() + end
    return processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]


# ------------------------------------------------------------------------------------------ from files to batches


@dataclass
class Sample:
    """One record, encoded for the model; or its record and the `error` that makes its media unusable.

    `ordered`, `shuffled` and each of `extra_shuffles` (for temporal credit) are model inputs of encode(). `shuffled` is
    None and `extra_shuffles` empty for a picture and for a clip of one frame. `target` holds the token ids that SFT learns.
    """

    record: dict
    position: int = -1
    ordered: dict | None = None
    shuffled: dict | None = None
    frame_order: list | None = None
    extra_shuffles: list = field(default_factory=list)
    target: torch.Tensor | None = None
    error: str | None = None


class Samples(Dataset):
    """Item `position` of the endless training order (or of the file, with shuffle=False) as a Sample.

    `orders` says which of "ordered" and "shuffled" are encoded; `n_shuffles` is the number of extra shuffles. Frames are
    shuffled by the seed and the position; in evaluation by the seed and the question, so that their order does not depend
    on which other questions are asked.
    """

    def __init__(self, records, processor, cfg, orders=("ordered",), targets=False, shuffle=True, n_shuffles=0):
        self.records = records
        self.processor = processor
        self.cfg = cfg
        self.orders = orders
        self.targets = targets
        self.shuffle = shuffle
        self.n_shuffles = n_shuffles

    def __len__(self):
        return len(self.records)

    def __getitem__(self, position):
        index = data_index(position, len(self.records), self.cfg.seed) if self.shuffle else position
        record = self.records[index]
        # evaluation keeps bad rows, to count them
        if "error" in record:
            return Sample(record, position, error=record["error"])
        try:
            return self.encoded(record, position)
        except Unusable as error:
            return Sample(record, position, error=str(error))

    def encoded(self, record, position):
        """The Sample of a record. Raises Unusable."""
        media, metadata = load_media(record, self.cfg)
        question = position
        if not self.shuffle and "benchmark" in record:
            question = f"{record['benchmark']}/{record['id']}"
        rng = random.Random(f"{self.cfg.seed}/{question}/frames")
        sample = Sample(record, position)
        if "ordered" in self.orders:
            sample.ordered = encode(self.processor, record, media, metadata, self.cfg)
        if metadata is not None and "shuffled" in self.orders:
            sample.frame_order = self.permutation(record, len(media), rng)
            if sample.frame_order is not None:
                sample.shuffled = encode(self.processor, record, media[sample.frame_order], metadata, self.cfg)
        for _ in range(self.n_shuffles if metadata is not None else 0):
            order = self.permutation(record, len(media), rng)
            if order is not None:
                sample.extra_shuffles.append(encode(self.processor, record, media[order], metadata, self.cfg))
        if self.targets:
            sample.target = target_ids(self.processor, record)
        return sample

    def permutation(self, record, n_frames, rng):
        """A shuffled order of a clip's frames (see shuffled_order); a question's own picture stays at the end."""
        own = int(bool(record.get("image_path") or record.get("last_frame")))
        order = shuffled_order(n_frames - own, rng, self.cfg.shuffle_unit)
        return None if order is None else order + [n_frames - 1] * own


def blank_sample(processor, cfg):
    """Two black frames and nothing said: what a rank runs, with weight 0, to keep step with the others."""
    record = {
        "problem": "",
        "problem_type": "free-form",
        "data_type": "video",
        "path": "",
        "process": "",
        "solution": "",
    }
    frames_FHWC = np.zeros((2, 28, 28, 3), dtype=np.uint8)
    metadata = VideoMetadata(total_num_frames=2, fps=1.0, frames_indices=[0, 1])
    ordered = encode(processor, record, frames_FHWC, metadata, cfg)
    return Sample(record, ordered=ordered, target=torch.tensor([processor.tokenizer.eos_token_id]))


def data_index(position, n, seed):
    """Which record stands at `position` of the endless order: a new permutation of all `n` each epoch."""
    return epoch_order(position // n, n, seed)[position % n]


@lru_cache(maxsize=1)
def epoch_order(epoch, n, seed):
    return np.random.default_rng([seed, epoch]).permutation(n)


def loader(samples, batches, cfg):
    """Lists of samples for lists of positions, made in worker processes ahead of the training step.

    They travel as numpy arrays: handing over hundreds of small tensors by shared memory takes longer than copying them.
    """
    prefetch = 4 if cfg.num_workers else None
    for batch in with_workers(samples, cfg, batch_sampler=batches, prefetch_factor=prefetch, collate_fn=as_numpy):
        yield [convert_arrays(sample, np.ndarray, torch.from_numpy) for sample in batch]


def convert_arrays(sample, kind, function):
    """A copy of a Sample with `function` applied to every array of type `kind` in it."""
    return Sample(**tree_map_only(kind, function, vars(sample)))


def with_workers(dataset, cfg, **settings):
    """A DataLoader whose worker processes ignore signals, and end with this process, however it ends."""
    # nothing else would end them if this process fails
    atexit.register(kill_workers)
    return DataLoader(dataset, num_workers=cfg.num_workers, worker_init_fn=start_worker, **settings)


def as_numpy(batch):
    """A function of the module's own: what workers get must be picklable (Python 3.14 starts them by forkserver)."""
    return [convert_arrays(sample, torch.Tensor, torch.Tensor.numpy) for sample in batch]


def start_worker(_):
    """Leave signals to the main process. A scheduler sends them to all, and the step at hand still needs its clips."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()


def leave_with(parent):
    """End this worker once its parent is gone: blocked on a full pipe it would stay for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def kill_workers():
    for child in multiprocessing.active_children():
        child.kill()


def rank_batches(cfg, start_step, rank, ranks):
    """Positions of this rank's share of each step's batch, from `start_step` on: resuming needs only the step."""
    share = cfg.batch_size // ranks
    for step in range(start_step, cfg.steps):
        first = step * cfg.batch_size + rank * share
        yield list(range(first, first + share))


# ------------------------------------------------------------------------------------------------- collators


def join_media(inputs):
    """The pixels, grids and frame times of several prompts, concatenated in their order: one call of the vision tower each."""
    names = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    return {name: torch.cat([x[name] for x in inputs]) for name in names}


def pad(rows, value, side):
    """Tensors (L,) or (L, …) of unequal length as one (B, L, …) tensor, padded on the left or right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


def collate_prompts(inputs, pad_id):
    """Prompts of unequal length as one left-padded batch, ready for generate."""
    fill = {"input_ids": pad_id, "attention_mask": 0, "mm_token_type_ids": 0}
    return {name: pad([x[name][0] for x in inputs], value, "left") for name, value in fill.items()} | join_media(inputs)


# ------------------------------------------------------------------------------------------------------ main


@dataclass
class DataConfig(settings.SharedConfig):
    """Looks at a stage's records without a model."""

    stage: str = option("tgrpo", "whose records", choices=settings.STAGES)
    check: bool = option(False, "decode every file once and list what cannot be read")
    distill: str = option("", "predictions of evaluate.py: keep the good chains of thought as records for sft.py")
    split: float = option(
        0.0, "share of the clips to set aside: `records` as train.json and test.json in --out", low=0, high=0.9
    )
    out: str = option(
        "", "file to write: with --check the usable rows, with --distill the records for sft.py; with --split a folder"
    )
    min_accuracy: float = option(
        CORRECT, "with --distill: an answer's accuracy must be larger than this", low=0, high=1
    )


class ReadMedia(Dataset):
    """Item i: why the media of records[i] cannot be read, or None. At module level, so that workers can unpickle it."""

    def __init__(self, records, cfg):
        self.records, self.cfg = records, cfg

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        try:
            load_media(self.records[i], self.cfg)
        except Unusable as error:
            return str(error)


def check_media(records, cfg):
    """Reads the media of {row number: record} in worker processes. Returns {row number: why they cannot be read}."""
    results = with_workers(ReadMedia(list(records.values()), cfg), cfg, batch_size=None)
    results = tqdm(results, total=len(records), desc="reading media", unit="file")
    return {number: reason for number, reason in zip(records, results) if reason}


def check(cfg, need_process):
    """Lists the rows that cannot be used, writes the others to cfg.out if it is given. Returns the exit status."""
    rows = read_rows(cfg.records)
    refuse_conversations(cfg.records, rows)
    records, reasons = split_rows(rows, cfg.data_root, need_process)
    reasons = reasons | check_media(records, cfg)
    usable = [row for number, row in enumerate(rows, 1) if number not in reasons]
    for number in sorted(reasons):
        row = rows[number - 1]
        name = f" (problem_id {row['problem_id']})" if isinstance(row, dict) and "problem_id" in row else ""
        print(f"row {number}{name}: {reasons[number]}")
    print(f"{len(usable)} of {len(rows)} rows of {cfg.records} can be used by {cfg.stage}")
    if cfg.out:
        if not usable:
            raise UserError(f"{cfg.records}: no row can be used, {cfg.out} is not written")
        settings.write_atomic(cfg.out, json.dumps(usable, indent=1, ensure_ascii=False))
        print(f"they are in {cfg.out}")
        return 0
    return int(len(reasons) > cfg.max_unreadable * len(rows))


def distill(rows, data_root, min_accuracy=CORRECT):
    """(records for sft.py, Counter of reasons why the other predictions were dropped). UserError for a row that is no prediction.

    Of each question the most accurate answer is kept, the first of equals. `process` is its think block, `solution` the truth.
    """
    best, dropped = {}, Counter()
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict) and row.get("error"):
            dropped["media unusable"] += 1
            continue
        try:
            check_record(row, data_root, need_process=False)
        except ValueError as error:
            raise UserError(f"row {number} of the predictions: {error}") from None
        text, question, reason = row.get("prediction") or "", (row.get("benchmark"), row.get("id")), None
        if row.get("frames") == "shuffled":
            reason = "frames were shuffled"
        elif not format_reward(text):
            reason = "not one think block and one answer"
        elif not (thought := text[text.index("<think>") + 7 : text.index("</think>")].strip()):
            reason = "nothing thought"
        elif (accuracy := accuracy_reward(text, row["solution"], row["problem_type"])) <= min_accuracy:
            reason = "answer not accurate enough"
        else:
            reason = "another answer to the same question" if question in best else None
            if reason is None or accuracy > best[question][0]:
                names = (
                    "problem_id",
                    "problem",
                    "data_type",
                    "problem_type",
                    "options",
                    "solution",
                    "path",
                    "data_source",
                )
                shown = {n: row[n] for n in ("start", "end", "fps", "image_path", "last_frame") if n in row}
                best[question] = (
                    accuracy,
                    {**{n: row.get(n) for n in names}, **shown, "process": f"<think>{thought}</think>"},
                )
        dropped[reason] += reason is not None
    return [record for _, record in best.values()], +dropped


def clips_of(rows):
    """The clips that these rows are on; "./a.mp4" and "a.mp4" are one."""
    return {os.path.normpath(row["path"]) for row in rows}


def split(rows, share, seed):
    """(training rows, test rows), in their order. All rows on one clip are on the same side; `share` counts clips.

    rows: dicts with a `path`. Each side has at least one clip. UserError for a row without a path, or for fewer than
    two clips.
    """
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("path"), str):
            raise UserError(f"row {number}: path: missing")
    clips = sorted(clips_of(rows))
    if len(clips) < 2:
        raise UserError(f"all {len(rows)} rows are on one clip: nothing to split")
    random.Random(seed).shuffle(clips)
    n_test = min(max(1, round(share * len(clips))), len(clips) - 1)
    test_clips = set(clips[:n_test])
    test = [row for row in rows if os.path.normpath(row["path"]) in test_clips]
    train = [row for row in rows if os.path.normpath(row["path"]) not in test_clips]
    return train, test


def write_split(cfg):
    """Write cfg.records as train.json and test.json into the folder cfg.out, and say how many rows and clips each
    has.
    """
    train, test = split(read_rows(cfg.records), cfg.split, cfg.seed)
    n_all = len(clips_of(train + test))
    for name, rows in (("train", train), ("test", test)):
        path = os.path.join(cfg.out, f"{name}.json")
        settings.write_atomic(path, json.dumps(rows, indent=1, ensure_ascii=False))
        print(f"{path}: {len(rows)} of {len(train + test)} rows, on {len(clips_of(rows))} of {n_all} clips")


def main():
    stage = settings.given("stage", "tgrpo")  # it says which section of the config to read
    cfg = settings.load_config(DataConfig, stage, doc=__doc__, partial=True)
    if cfg.distill:
        settings.require(cfg, "data", "out")
        rows = read_rows(cfg.distill)
        records, dropped = distill(rows, cfg.data_root, cfg.min_accuracy)
        settings.write_atomic(cfg.out, json.dumps(records, indent=1, ensure_ascii=False))
        print("\n".join([f"{n} dropped: {reason}" for reason, n in dropped.most_common()]))
        return print(f"{len(records)} of {len(rows)} answers kept: {cfg.out}")
    settings.require(cfg, stage, "records")
    if cfg.split:
        settings.require(cfg, "data", "out")
        return write_split(cfg)
    if cfg.check:
        sys.exit(check(cfg, need_process=stage == "sft"))
    records, bad_rows = load_records(cfg.records, cfg.data_root, cfg.max_unreadable, need_process=stage == "sft")
    for name, reason in bad_rows.items():
        print(f"skipped {name}: {reason}")
    print(json.dumps(records[0], indent=2, ensure_ascii=False))
    print("\nprompt:\n" + messages(records[0], cfg)[0]["content"][1]["text"])


if __name__ == "__main__":
    main()
