"""Records, frames, prompts: everything between a JSON file and the tensors the model sees.

One record (the format Video-R1 released; unknown extra keys are kept):

    {"problem_id": 7, "problem": "Which way does the disc move?", "data_type": "video",
     "problem_type": "multiple choice", "options": ["A. left", "B. right"], "solution": "<answer>B</answer>",
     "process": "<think>It starts left and ends right.</think>", "path": "./clips/7.mp4", "data_source": "toy"}

The prompt is the frames, then PROMPT filled with the problem, its options and a hint. SFT learns to answer with
`process`, a newline, `solution`.

    python data.py --config configs/toy.yaml --stage tgrpo            # print one example, as the model sees it
    python data.py --config configs/toy.yaml --stage tgrpo --check    # decode every file once; list what is unusable
    python data.py --config configs/toy.yaml --stage tgrpo --check --out usable.json    # write the usable rows too

A solution may also be a number or lack its tags ("3", 3, "B"). Options may lack their letters: the prompt adds them.
`<video>` and `<image>`, which other formats put into the problem, are removed. `start` and `end`, in seconds, select a
part of a clip. `fps` is the rate of a folder of stills.

A file that is not a list of records stops the run at once. A bad row, or one whose media cannot be read, is skipped,
counted and named, up to the share `max_unreadable`. No clip ever replaces another, and no question is trained without
its pixels.

Axes: F frames · H height · W width · C channels · P tokens of a prompt · L tokens of a row · B rows
"""

import atexit
import functools
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import ImageOps
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.video_utils import VideoMetadata

import settings
from frames import read_clip, read_folder, read_picture
from rewards import ACCURACY, lettered, parse_solution, tagged_solution, tags_in
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

# The fields that every record has, with their types.
REQUIRED_FIELDS = {
    "problem_id": (str, int),
    "problem": str,
    "data_type": str,
    "problem_type": str,
    "solution": (str, int, float),
    "path": str,
}
# "frame" is a folder of numbered stills.
DATA_TYPES = ("video", "image", "frame")
# Tokens that mean pixels or turns to the model, not words.
CONTROL_TOKEN = re.compile(r"<\|\w+\|>")
SURROGATE = re.compile("[\ud800-\udfff]")
# How other formats mark the position of the pixels in a question.
PLACEHOLDER = re.compile(r"[ \t]*<(?:video|image)>")
# An error lists this many bad rows.
MAX_LISTED = 1000
# Consecutive frames that the vision tower merges into one temporal patch.
TEMPORAL_PATCH = 2


class Unusable(Exception):
    """The media of a record cannot be read, or its prompt is too long. The record is skipped, counted and named."""


# --------------------------------------------------------------------------------------------------- records


def load_records(path, data_root, max_unreadable=0.0, need_process=False):
    """(records, bad rows) of a JSON or JSONL file: a list of dicts in file order, and {"row 7": what is wrong}.

    Rows count from 1. Solutions have their answer tags. Raises UserError, with a list of the bad rows, if they are more
    than the share `max_unreadable` of all rows.
    """
    rows = read_rows(path)
    refuse_conversations(path, rows)
    usable, reasons = split_rows(rows, data_root, need_process)
    bad_rows = {f"row {number}": reason for number, reason in reasons.items()}
    if len(bad_rows) > max_unreadable * len(rows) or not usable:
        lines = [f"  {name}: {reason}" for name, reason in bad_rows.items()]
        if len(lines) > MAX_LISTED:
            lines = [*lines[:MAX_LISTED], f"  and {len(lines) - MAX_LISTED} more"]
        raise UserError(
            f"{path}: {len(bad_rows)} of {len(rows)} rows are bad, more than max_unreadable {max_unreadable} allows:\n"
            + "\n".join(lines)
            + "\nRaise max_unreadable to train without them, or write the usable rows to a file of their own: "
            "python data.py --config CONFIG --stage STAGE --check --out FILE"
        )
    return list(usable.values()), bad_rows


def split_rows(rows, data_root, need_process=False):
    """({row number: record}, {row number: what is wrong}), numbers from 1. Solutions get their answer tags."""
    usable = {}
    reasons = {}
    for number, row in enumerate(rows, 1):
        try:
            check_record(row, data_root, need_process)
            usable[number] = row | {"solution": tagged_solution(row["solution"])}
        except ValueError as error:
            reasons[number] = str(error)
    return usable, reasons


def refuse_conversations(path, rows):
    """Raises UserError, one line, for a file of conversations in the format of LLaVA and other chat data sets."""
    for name in ("conversations", "messages"):
        if isinstance(rows[0], dict) and name in rows[0] and "problem" not in rows[0]:
            raise UserError(
                f"{path}: row 1 is a conversation ({name!r}); a record has problem, solution, path and so on: "
                "see docs/own_clips.md"
            )


def check_record(row, data_root, need_process):
    """Raises ValueError naming the first wrong field of `row` and its value."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a record, got {row!r:.80}")
    check_question(row)
    for name in ("problem", "solution", "process"):
        check_text(name, row.get(name))
    options = row.get("options") or []
    for option_text in options:
        check_text("options", option_text)
    try:
        parse_solution(row["solution"], row["problem_type"], options)
    except ValueError as error:
        raise ValueError(f"solution: {error}") from None
    if need_process:
        check_process(row.get("process"))
    check_times(row)
    media_path(row, data_root)
    picture_path = row.get("image_path")
    if picture_path:
        if not isinstance(picture_path, str):
            raise ValueError(f"image_path: expected text, got {picture_path!r:.80}")
        media_path({"path": picture_path}, data_root)


def check_question(row):
    """Raises ValueError if a required field is missing or has the wrong type, or if the options are wrong."""
    for name, kind in REQUIRED_FIELDS.items():
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
    if not isinstance(options, list) or not all(isinstance(text, str) for text in options):
        raise ValueError(f"options: expected a list of texts, got {options!r:.80}")
    if row["problem_type"] == "multiple choice" and not options:
        raise ValueError("options: a multiple choice question without options")


def check_text(name, text):
    """Raises ValueError if the model would not read the text as words, or if it cannot be encoded."""
    if not isinstance(text, str):
        return
    # this runs on every text of 263,071 rows, so first the quick look
    token = CONTROL_TOKEN.search(text) if "<|" in text else None
    if token:
        raise ValueError(f"{name}: holds {token[0]}, a token that the model takes for pixels or the end of a turn")
    if not text.isascii() and SURROGATE.search(text):
        raise ValueError(f"{name}: half of a surrogate pair is not text: {text!a:.80}")


def check_process(process):
    """Raises ValueError unless `process` is a chain of thought in one think block."""
    if not isinstance(process, str) or not process.strip():
        raise ValueError("process: missing; the SFT stage needs a chain of thought")
    tags = [tag for tag, _, _ in tags_in(process)]
    if tags != ["<think>", "</think>"]:
        raise ValueError(f"process: expected one think block, <think>…</think>, got {process!r:.80}")


def check_times(row):
    """Raises ValueError if `start` and `end` of a clip, or the rate of a folder of stills, make no sense."""
    start = row.get("start")
    end = row.get("end")
    if start is not None or end is not None:
        if not is_number(start) or not is_number(end):
            raise ValueError(f"start, end: expected two numbers of seconds, got {start!r:.40}, {end!r:.40}")
        if start > end:
            raise ValueError(f"start, end: {start} is after {end}")
    rate = row.get("fps")
    if row["data_type"] == "frame" and rate is not None:
        if not is_number(rate) or not 0.001 <= rate <= 1000:
            raise ValueError(f"fps: expected stills per second, got {rate!r:.40}")


def is_number(value):
    """Whether a value from JSON is a number that can be a time in seconds (NaN is not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def media_path(record, data_root):
    """The absolute path of a record's media. Raises ValueError if it escapes data_root (symlinks are allowed)."""
    root = os.path.abspath(data_root)
    path = os.path.abspath(os.path.join(root, record["path"]))
    # with the separator, as /data/media2 also starts with /data/media
    is_inside = path == root or path.startswith(os.path.join(root, ""))
    if "\0" in path or not is_inside:
        raise ValueError(f"path: leaves the data root {data_root}: {record['path']!r:.80}")
    return path


# ---------------------------------------------------------------------------------------------------- frames


def load_media(record, cfg):
    """(frames, metadata) of a video: uint8 (F, H, W, C), F <= max_frames; of an image: (PIL image, None).

    From the metadata the processor derives the true time between two frames, total_num_frames / fps / F seconds. It is
    the same in SFT, rollout, loss and evaluation. Raises Unusable with the file and the reason, and ValueError for a
    path that escapes data_root.
    """
    path = media_path(record, cfg.data_root)
    try:
        if record["data_type"] == "image":
            return read_picture(path), None
        return load_clip(record, path, cfg)
    except Exception as error:
        # a damaged file may raise anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise Unusable(f"{record['path']}: {reason:.200}") from error


def load_clip(record, path, cfg):
    """(frames, metadata) of a video or a folder of stills.

    `start` and `end` (seconds from the first frame) select a part. With `last_frame` the clip ends on the question's
    own picture, which is always shown. `image_path` is a file with that picture: it becomes one more frame at the end.
    """
    picture = None
    n_frames = cfg.max_frames
    if record.get("image_path"):
        picture = read_picture(media_path({"path": record["image_path"]}, cfg.data_root))
        n_frames = max(1, n_frames - 1)
    part = {"start": record.get("start"), "end": record.get("end"), "last_frame": bool(record.get("last_frame"))}
    if record["data_type"] == "frame":
        clip = read_folder(path, n_frames, record.get("fps"), **part)
    else:
        clip = read_clip(path, n_frames, **part, reader=cfg.video_reader)
    frames_FHWC, indices, total, fps = clip
    if picture is not None:
        height, width = frames_FHWC.shape[1:3]
        picture_HWC = np.asarray(ImageOps.pad(picture, (width, height)))
        # one more frame, at the same distance as the others
        total = total * (1 + 1 / len(indices))
        indices = [*indices, indices[-1] + 1]
        frames_FHWC = np.concatenate([frames_FHWC, picture_HWC[None]])
    return frames_FHWC, VideoMetadata(total_num_frames=total, fps=fps, frames_indices=indices)


def shuffled_order(n_frames, rng, unit="frame"):
    """A random order of the frames, never the given one, as a list of indices; None if there is only one unit.

    unit="frame" permutes single frames, as published: a temporal patch then blends two distant moments. unit="patch"
    moves whole pairs, which keeps the motion inside a pair. An odd last frame then fills its pair by repeating itself,
    as the processor would pad it.
    """
    size = TEMPORAL_PATCH if unit == "patch" else 1
    n_units = -(-n_frames // size)
    if n_units < 2:
        return None
    in_order = list(range(n_units))
    unit_order = list(in_order)
    while unit_order == in_order:
        rng.shuffle(unit_order)
    frame_order = []
    for i in unit_order:
        for frame in range(i * size, (i + 1) * size):
            frame_order.append(min(frame, n_frames - 1))
    return frame_order


# --------------------------------------------------------------------------------------------------- prompts


def plain_problem(record):
    """The question without the placeholders for pixels that other formats use.

    >>> plain_problem({"problem": "<video>\\nWhat is in <image> and where?"})
    'What is in and where?'
    """
    return PLACEHOLDER.sub("", record["problem"]).strip()


def messages(record, cfg, with_media=True):
    """The record as a conversation of one turn: the clip or picture, then the question."""
    question = (cfg.prompt or PROMPT).format(
        problem=plain_problem(record),
        options="\n".join(lettered(record.get("options") or [])),
        hint=HINTS[record["problem_type"]],
    )
    media_type = "image" if record["data_type"] == "image" else "video"
    content = [{"type": media_type}] if with_media else []
    return [{"role": "user", "content": [*content, {"type": "text", "text": question.strip()}]}]


def encode(processor, record, media, metadata, cfg):
    """Model inputs of one prompt, as tensors: input_ids, attention_mask and mm_token_type_ids (1, P); the pixels, patch
    grid and seconds per temporal patch of its clip. With `media` None the prompt is the question alone.

    Raises Unusable if the prompt is longer than max_prompt_tokens: truncation would separate pixels from their tokens.
    """
    conversation = messages(record, cfg, with_media=media is not None)
    text = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    # pixels per frame, despite the names
    size = {"shortest_edge": cfg.min_pixels, "longest_edge": cfg.max_pixels}
    if media is None:
        inputs = processor(text=[text], return_tensors="pt")
        inputs["mm_token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    elif record["data_type"] == "image":
        inputs = processor(text=[text], images=[media], images_kwargs={"size": size}, return_tensors="pt")
        inputs = as_clip(inputs, processor)
    else:
        video_settings = {
            "size": size,
            "cap_pixels_per_frame": False,
            "video_metadata": [metadata],
            "do_sample_frames": False,
        }
        inputs = processor(text=[text], videos=[media], videos_kwargs=video_settings, return_tensors="pt")
    inputs = dict(inputs)
    length = inputs["input_ids"].shape[1]
    if length > cfg.max_prompt_tokens:
        raise Unusable(f"{record['path']}: prompt of {length} tokens, max_prompt_tokens is {cfg.max_prompt_tokens}")
    if media is not None:
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
        # its only moment is at time 0, so every value gives the same positions
        "second_per_grid_ts": [1.0],
    }


def target_ids(processor, record):
    """What SFT learns to generate: process, newline, solution, end of turn. 1-D tensor of token ids."""
    text = record["process"].strip() + "\n" + record["solution"].strip() + processor.tokenizer.eos_token
    return processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]


# --------------------------------------------------------------------------------------------------- samples


@dataclass
class Sample:
    """One record, encoded for the model; or the record and the `error` that makes it unusable.

    `ordered`, `shuffled` and each of `extra_shuffles` (for temporal credit) are model inputs from encode(), and so are
    `reversed`, `single` and `blind` (for evaluation). A picture and a clip of one frame have only `ordered` and
    `blind`. `frame_order` is that of `shuffled`. `target` is the token ids SFT learns.
    """

    record: dict
    position: int = -1
    ordered: dict | None = None
    shuffled: dict | None = None
    # the clip backwards
    reversed: dict | None = None
    # its middle frame
    single: dict | None = None
    # the question without any frame
    blind: dict | None = None
    frame_order: list | None = None
    extra_shuffles: list = field(default_factory=list)
    target: torch.Tensor | None = None
    error: str | None = None


class Samples(Dataset):
    """Item `position` of the endless training order (of the file, with shuffle=False) as a Sample.

    `orders` names the inputs of a Sample that are encoded; `n_shuffles` is the number of extra shuffles. The
    generator that shuffles frames depends on the seed and the position; in evaluation on the seed and the question, so
    that the order of frames does not depend on which other questions are in the set.
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
        sample = Sample(record, position)
        if "ordered" in self.orders:
            sample.ordered = encode(self.processor, record, media, metadata, self.cfg)
        if "blind" in self.orders:
            sample.blind = encode(self.processor, record, None, None, self.cfg)
        if self.targets:
            sample.target = target_ids(self.processor, record)
        # a picture has no order
        if metadata is None:
            return sample
        question = position
        if not self.shuffle and "benchmark" in record:
            question = f"{record['benchmark']}/{record['id']}"
        rng = random.Random(f"{self.cfg.seed}/{question}/frames")
        # the question's own picture stays at the end
        n_frames = len(media)
        picture = []
        if record.get("image_path") or record.get("last_frame"):
            n_frames -= 1
            picture = [n_frames]

        def encoded_in(order):
            return encode(self.processor, record, media[[*order, *picture]], metadata, self.cfg)

        # one frame has no order
        if n_frames < 2:
            return sample
        if "shuffled" in self.orders:
            order = shuffled_order(n_frames, rng, self.cfg.shuffle_unit)
            if order is not None:
                sample.frame_order = [*order, *picture]
                sample.shuffled = encoded_in(order)
        if "reversed" in self.orders:
            sample.reversed = encoded_in(range(n_frames)[::-1])
        if "single" in self.orders:
            # twice, to fill a temporal patch
            sample.single = encoded_in([n_frames // 2] * TEMPORAL_PATCH)
        for _ in range(self.n_shuffles):
            order = shuffled_order(n_frames, rng, self.cfg.shuffle_unit)
            if order is not None:
                sample.extra_shuffles.append(encoded_in(order))
        return sample


def dummy_sample(processor, cfg):
    """A sample of two black frames, used with zero weight.

    A rank that is short of samples runs it, so that all ranks make the same number of forward passes.
    """
    record = {"problem": "", "problem_type": "free-form", "data_type": "video", "path": "", "solution": ""}
    frames_FHWC = np.zeros((2, 28, 28, 3), dtype=np.uint8)
    metadata = VideoMetadata(total_num_frames=2, fps=1.0, frames_indices=[0, 1])
    ordered = encode(processor, record, frames_FHWC, metadata, cfg)
    return Sample(record, ordered=ordered, target=torch.tensor([processor.tokenizer.eos_token_id]))


def data_index(position, n_records, seed):
    """The record at `position` of the endless training order: a new permutation of all records in each epoch."""
    epoch = position // n_records
    return epoch_order(epoch, n_records, seed)[position % n_records]


@functools.lru_cache(maxsize=1)
def epoch_order(epoch, n_records, seed):
    return np.random.default_rng([seed, epoch]).permutation(n_records)


def rank_batches(cfg, start_step, rank, ranks):
    """Yields the positions of this rank's share of each step's batch. To resume, the number of the step is enough."""
    share = cfg.batch_size // ranks
    for step in range(start_step, cfg.steps):
        first = step * cfg.batch_size + rank * share
        yield list(range(first, first + share))


# --------------------------------------------------------------------------------------------------- workers


def loader(samples, batches, cfg):
    """Yields the samples of each batch (a list of positions). Worker processes prepare them ahead of the training step.

    Workers return numpy arrays: passing many small tensors through shared memory is slower than copying them.
    """
    prefetch = 4 if cfg.num_workers else None
    for batch in with_workers(samples, cfg, batch_sampler=batches, prefetch_factor=prefetch, collate_fn=as_numpy):
        yield [convert_arrays(sample, np.ndarray, torch.from_numpy) for sample in batch]


def as_numpy(batch):
    """The samples with numpy arrays for tensors. Not a lambda: Python 3.14 pickles what it hands to workers."""
    return [convert_arrays(sample, torch.Tensor, torch.Tensor.numpy) for sample in batch]


def convert_arrays(sample, kind, function):
    """A copy of a Sample with `function` applied to every array of type `kind` in it."""
    return Sample(**tree_map_only(kind, function, vars(sample)))


def with_workers(dataset, cfg, **arguments):
    """A DataLoader whose worker processes ignore signals, and end when this process ends for any reason."""
    # nothing else would end them if this process fails
    atexit.register(kill_workers)
    return DataLoader(dataset, num_workers=cfg.num_workers, worker_init_fn=start_worker, **arguments)


def start_worker(_):
    """Leaves signals to the main process. A scheduler signals all processes, but the current step needs its clips."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()


def leave_with(parent):
    """Ends this worker once its parent is gone: blocked on a full pipe, it would run forever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def kill_workers():
    for child in multiprocessing.active_children():
        child.kill()


# ------------------------------------------------------------------------------------------------- collators


def join_media(inputs):
    """The pixels, patch grids and seconds per temporal patch of several prompts, concatenated in order.

    Prompts without media have none; {} if none of them has.
    """
    names = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    joined = {}
    for name in names:
        parts = [prompt[name] for prompt in inputs if name in prompt]
        if parts:
            joined[name] = torch.cat(parts)
    return joined


def pad(rows, value, side):
    """Tensors (L,) or (L, …) of unequal length as one (B, L, …) tensor, padded on the left or right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


def collate_prompts(inputs, pad_id):
    """Prompts of unequal length as one left-padded batch, ready for generate."""
    batch = join_media(inputs)
    for name, fill in (("input_ids", pad_id), ("attention_mask", 0), ("mm_token_type_ids", 0)):
        batch[name] = pad([x[name][0] for x in inputs], fill, "left")
    return batch


# ------------------------------------------------------------------------------------------------------ main


@dataclass
class DataConfig(settings.SharedConfig):
    """Inspects a stage's records without a model."""

    check: bool = option(False, "decode every file once and list what cannot be read")
    out: str = option("", "with --check: file for the usable rows")


def why_unreadable(record, cfg):
    """Why the media of a record cannot be read, or None."""
    try:
        load_media(record, cfg)
    except Unusable as error:
        return str(error)


def check_media(records, cfg):
    """Reads the media of {row number: record} in worker processes. Returns {row number: why they cannot be read}."""
    read = functools.partial(why_unreadable, cfg=cfg)
    results = with_workers(list(records.values()), cfg, batch_size=None, collate_fn=read)
    results = tqdm(results, total=len(records), desc="reading media", unit="file")
    return {number: reason for number, reason in zip(records, results) if reason}


def check(cfg, stage):
    """Prints the unusable rows, writes the others to cfg.out if it is given. Returns the exit status."""
    rows = read_rows(cfg.records)
    refuse_conversations(cfg.records, rows)
    records, reasons = split_rows(rows, cfg.data_root, need_process=stage == "sft")
    reasons = reasons | check_media(records, cfg)
    for number in sorted(reasons):
        row = rows[number - 1]
        name = f" (problem_id {row['problem_id']})" if isinstance(row, dict) and "problem_id" in row else ""
        print(f"row {number}{name}: {reasons[number]}")
    usable = [row for number, row in enumerate(rows, 1) if number not in reasons]
    print(f"{len(usable)} of {len(rows)} rows of {cfg.records} can be used by {stage}")
    if not cfg.out:
        return int(len(reasons) > cfg.max_unreadable * len(rows))
    if not usable:
        raise UserError(f"{cfg.records}: no row can be used, {cfg.out} is not written")
    settings.write_atomic(cfg.out, json.dumps(usable, indent=1, ensure_ascii=False))
    print(f"they are in {cfg.out}")
    return 0


def main():
    # the stage names the section of the config to read
    parser = settings.SettingsParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--stage", choices=settings.STAGES, default="tgrpo")
    known, others = parser.parse_known_args()
    stage = known.stage
    cfg = settings.load_config(DataConfig, stage, argv=others, doc=__doc__, partial=True)
    settings.require(cfg, stage, "records")
    if cfg.check:
        sys.exit(check(cfg, stage))
    records, bad_rows = load_records(cfg.records, cfg.data_root, cfg.max_unreadable, need_process=stage == "sft")
    for name, reason in bad_rows.items():
        print(f"skipped {name}: {reason}")
    print(json.dumps(records[0], indent=2, ensure_ascii=False))
    print("\nprompt:\n" + messages(records[0], cfg)[0]["content"][1]["text"])


if __name__ == "__main__":
    main()
