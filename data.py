"""Records, frames, prompts: everything between a JSON file and the tensors the model sees.

One record (the format Video-R1 released; unknown extra keys are kept):

    {"problem_id": 7, "problem": "Which way does the disc move?", "data_type": "video",
     "problem_type": "multiple choice", "options": ["A. left", "B. right"], "solution": "<answer>B</answer>",
     "process": "<think>It starts left and ends right.</think>", "path": "./clips/7.mp4", "data_source": "toy"}

and the prompt made from it: the frames, then PROMPT filled with the problem, its options and a hint. For the cold start
the answer is `process`, a newline, `solution`.

    python data.py --config configs/toy.yaml --stage tgrpo            # print one example, as the model sees it
    python data.py --config configs/toy.yaml --stage tgrpo --check    # decode every file once; list what cannot be read
    python data.py --distill predictions.jsonl --out cot.json         # a big model's good answers as chains of thought for sft.py

Broken records (our own files) are an error before anything starts, all at once. Broken media are skipped, counted and
named; they are never replaced by another clip, and no question is ever trained without its pixels.

Axes: F frames · H height · W width · C channels · P tokens of a prompt
"""

import atexit
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
import decord
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.video_utils import VideoMetadata

import settings
from rewards import ACCURACY, CORRECT, accuracy_reward, format_reward, parse_solution
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

DATA_TYPES = ("video", "image", "frame")                  # frame: a folder of numbered stills
FOLDER_FPS = 3.0                                          # the rate of such a folder
# (codecs), (containers) in which decord finds the frame it is asked for. In all others (avi, ts, mpeg, wmv; MPEG-4 part 2
# anywhere) it returns neighbours, and says nothing: those are read from their start.
SEEKABLE = {"h264", "hevc", "vp8", "vp9", "av1"}, {"mov", "matroska", "flv"}
CONTROL = re.compile(r"<\|\w+\|>")                       # tokens that mean pixels or turns to the model, not words


class Unusable(Exception):
    """This record's media cannot be read, or its prompt is too long: skip it, count it, name it."""


# --------------------------------------------------------------------------------------------------- records


def load_records(path, data_root, need_process=False):
    """The records of a JSON or JSONL file as a list of dicts, in the file's order.

    Raises UserError that lists every bad row with its number (from 1) and what is wrong with which field.
    """
    rows = read_rows(path)
    problems = []
    for number, row in enumerate(rows, 1):
        try:
            check_record(row, data_root, need_process)
        except ValueError as error:
            problems.append(f"  row {number}: {error}")
    if problems:
        raise UserError(f"{path}: {len(problems)} of {len(rows)} rows are bad:\n" + "\n".join(problems))
    return rows


def check_record(row, data_root, need_process):
    """ValueError naming the first field of `row` that is wrong, with its value."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a record, got {row!r:.80}")
    for name in ("problem_id", "problem", "data_type", "problem_type", "solution", "path"):
        if row.get(name) in (None, ""):
            raise ValueError(f"{name}: missing")
        if not isinstance(row[name], (str, int) if name == "problem_id" else str):
            raise ValueError(f"{name}: expected text, got {row[name]!r:.80}")
    if row["data_type"] not in DATA_TYPES:
        raise ValueError(f"data_type: expected one of {', '.join(DATA_TYPES)}, got {row['data_type']!r}")
    if row["problem_type"] not in ACCURACY:
        raise ValueError(f"problem_type: expected one of {', '.join(ACCURACY)}, got {row['problem_type']!r}")
    options = row.get("options") or []
    if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
        raise ValueError(f"options: expected a list of texts, got {options!r:.80}")
    if row["problem_type"] == "multiple choice" and not options:
        raise ValueError("options: a multiple choice question without options")
    for name, text in [*((n, row.get(n) or "") for n in ("problem", "process", "solution")), *(("options", o) for o in options)]:
        if found := CONTROL.search(str(text)):
            raise ValueError(f"{name}: holds {found[0]}, a token that the model takes for pixels or the end of a turn")
        if any("\ud800" <= c <= "\udfff" for c in str(text)):
            raise ValueError(f"{name}: half of a surrogate pair is no text: {text!a:.80}")
    try:
        parse_solution(row["solution"], row["problem_type"], options)
    except ValueError as error:
        raise ValueError(f"solution: {error}") from None
    if need_process and not (isinstance(row.get("process"), str) and row["process"].strip()):
        raise ValueError("process: missing; the cold start needs a chain of thought")
    if ("start" in row) != ("end" in row) or not all(isinstance(row.get(k, 0), int | float) for k in ("start", "end")):
        raise ValueError(f"start, end: expected two numbers of seconds, got {row.get('start')!r}, {row.get('end')!r}")
    media_path(row, data_root)
    media_path({"path": row.get("image_path") or ""}, data_root)


def media_path(row, data_root):
    """Where the record's video, image or folder lies. ValueError if the path leaves the data root (but by a link you made)."""
    root = os.path.abspath(data_root)
    path = os.path.abspath(os.path.join(root, row["path"]))
    if "\0" in path or os.path.commonpath([root, path]) != root:
        raise ValueError(f"path: leaves the data root {data_root}: {row['path']!r}")
    return path


# ---------------------------------------------------------------------------------------------------- frames


def frame_indices(total, n):
    """The middle frames of `n` equal parts of a clip of `total` frames; every frame if there are fewer.

    >>> frame_indices(100, 4), frame_indices(3, 8)
    ([12, 37, 62, 87], [0, 1, 2])
    """
    n = min(n, total)
    return [int((i + 0.5) * total / n) for i in range(n)]


def segment(total, fps, start, end, first=0):
    """(lowest, highest) frame between `start` and `end` seconds of a clip of `total` frames; beyond its end: its last frame."""
    last = total - 1 + first
    low = min(max(first, round(start * fps)), last)
    return low, max(low, min(round(end * fps), last))


def segment_indices(total, fps, n, start, end, first=0):
    """MVBench's rule for `n` frames of such a part. first: 1 for folders of stills numbered from 1, 0 for videos.

    >>> segment_indices(100, 10, 4, 2, 6), segment_indices(30, 3, 2, 0, 100, first=1)
    ([25, 35, 45, 55], [8, 22])
    """
    low, high = segment(total, fps, start, end, first)
    size = (high - low) / n
    return [int(low + size / 2 + round(size * i)) for i in range(n)]


def chosen_frames(record, total, fps, n, first=0):
    """(indices of at most `n` frames, from 0; how many frames of the file they are spread over, of which their times follow).

    A record's `start` and `end` (seconds) show a part of its clip. `last_frame`: the clip ends on the question's own
    picture, which is always shown.
    """
    if "start" in record:
        low, high = segment(total, fps, record["start"], record["end"], first)
        span = max(1, high - low)
        indices = [i - first for i in segment_indices(total, fps, min(n, span), record["start"], record["end"], first)]
    else:
        span, indices = total, frame_indices(total, n)
    return (indices[:-1] + [total - 1] if record.get("last_frame") else indices), span


def load_media(record, cfg):
    """(frames, metadata) of a video: uint8 (F, H, W, C), F <= max_frames; of an image: (PIL image, None).

    The metadata hold the true frame rate and indices, from which the processor derives the time between frames.
    Raises Unusable with file and reason. Frame times are the same in SFT, rollout, loss and evaluation.
    """
    path = media_path(record, cfg.data_root)
    try:
        if record["data_type"] == "image":
            return read_image(path), None
        image = read_image(media_path({"path": record["image_path"]}, cfg.data_root)) if record.get("image_path") else None
        read = read_folder if record["data_type"] == "frame" else read_video
        frames_FHWC, fps, indices, span = read(path, record, max(1, cfg.max_frames - (image is not None)))
        if image is not None:                             # the question's picture comes as one more frame, at the end
            image = ImageOps.pad(image, frames_FHWC.shape[2:0:-1])
            frames_FHWC, span = np.concatenate([frames_FHWC, np.asarray(image)[None]]), span * (1 + 1 / len(indices))
            indices = indices + [indices[-1] + 1]
        return frames_FHWC, VideoMetadata(total_num_frames=span, fps=fps, frames_indices=indices)
    except Exception as error:                            # a hostile file may raise anything: name it and go on
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise Unusable(f"{record['path']}: {reason:.200}") from error


def read_video(path, record, n):
    """(frames, frames a second, their indices, how many they are spread over) of a file whose frames are evenly spaced in time.

    A file of uneven spacing is read as if it were even, at its mean rate: Qwen2.5-VL knows one distance between frames a clip.
    """
    if os.path.getsize(path) == 0:
        raise ValueError("empty file")
    with av.open(path) as container:
        if not container.streams.video:
            raise ValueError("no picture in this file")
        stream = container.streams.video[0]
        seekable = stream.codec_context.name in SEEKABLE[0] and SEEKABLE[1] & set(container.format.name.split(","))
        if not seekable:
            total, fps = sum(packet.size > 0 for packet in container.demux(stream)), float(stream.average_rate or 0)
    if seekable:
        reader = decord.VideoReader(path, num_threads=1)
        total, fps = len(reader), float(reader.get_avg_fps())
    if total < 1 or not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"{total} frames at {fps} frames a second")
    indices, span = chosen_frames(record, total, fps, n)
    frames_FHWC = reader.get_batch(indices).asnumpy() if seekable else read_from_start(path, indices)
    check_sides(*frames_FHWC.shape[1:3])
    return frames_FHWC, fps, indices, span


def read_from_start(path, indices):
    """The frames at `indices` of a file in which seeking cannot be trusted: decodes all up to the last of them."""
    with av.open(path) as container:
        kept = {i: frame.to_ndarray(format="rgb24") for i, frame in zip(range(max(indices) + 1), container.decode(video=0)) if i in set(indices)}
    return np.stack([kept[i] for i in indices])


def read_folder(path, record, n):
    stills = [p for p in Path(path).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
    files = sorted(stills, key=lambda p: (int("".join(filter(str.isdecimal, p.stem)) or 0), p.name))      # 2.png before 10.png
    if not files:
        raise ValueError("no .jpg or .png in this folder")
    indices, span = chosen_frames(record, len(files), FOLDER_FPS, n, first=1)
    return np.stack([np.asarray(read_image(files[i])) for i in indices]), FOLDER_FPS, indices, span


def read_image(path):
    """RGB, upright."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
    check_sides(*image.size)
    return image


def check_sides(a, b):
    if max(a, b) > 200 * min(a, b):
        raise ValueError(f"{a} x {b} pixels: Qwen2.5-VL takes no picture more than 200 times as long as wide")


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
    while order == list(range(len(units))):               # never the identity: it would be the ordered group again
        rng.shuffle(order)
    return [frame for u in order for frame in units[u]]


# --------------------------------------------------------------------------------------------------- prompts


def messages(record, cfg):
    """The record as a conversation of one turn: the picture part, then the question."""
    question = (cfg.prompt or PROMPT).format(problem=record["problem"], options="\n".join(record.get("options") or []),
                                             hint=HINTS[record["problem_type"]])
    picture = {"type": "image"} if record["data_type"] == "image" else {"type": "video"}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question.strip()}]}]


def encode(processor, record, media, metadata, cfg):
    """Model inputs of one prompt: input_ids, attention_mask, mm_token_type_ids (1, P), pixels, grid, frame times.

    Raises Unusable if the prompt is longer than max_prompt_tokens: cutting it would part pixels from their tokens.
    """
    text = processor.apply_chat_template(messages(record, cfg), tokenize=False, add_generation_prompt=True)
    size = {"shortest_edge": cfg.min_pixels, "longest_edge": cfg.max_pixels}      # pixels a frame, despite the names
    if record["data_type"] == "image":
        inputs = processor(text=[text], images=[media], images_kwargs={"size": size}, return_tensors="pt")
    else:
        inputs = processor(text=[text], videos=[media], return_tensors="pt", videos_kwargs={
            "size": size, "cap_pixels_per_frame": False, "video_metadata": [metadata], "do_sample_frames": False})
    inputs = dict(inputs)
    length = inputs["input_ids"].shape[1]
    if length > cfg.max_prompt_tokens:
        raise Unusable(f"{record['path']}: prompt of {length} tokens, max_prompt_tokens is {cfg.max_prompt_tokens}")
    if "second_per_grid_ts" in inputs:
        inputs["second_per_grid_ts"] = torch.as_tensor(inputs["second_per_grid_ts"], dtype=torch.float32)
    return inputs


def target_ids(processor, record):
    """What the cold start learns to say: process, newline, solution, end of turn. Tensor of token ids."""
    end = processor.tokenizer.eos_token
    text = record["process"].strip() + "\n" + record["solution"].strip() + end
    return processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]


# ------------------------------------------------------------------------------------------ from files to batches


class Samples(Dataset):
    """Item `position` of the endless training order (or of the file, with shuffle=False), encoded for the model.

    An item is a dict: record, `ordered` inputs, `shuffled` inputs (None for images and one-frame clips) with their
    `frame_order`, `target` for the cold start; or record and `error` if its media are unusable. `shuffles`, for credit, is a
    list of inputs in `n_shuffles` more orders (empty for images and one-frame clips). Frames are shuffled from (seed, position).
    """

    def __init__(self, records, processor, cfg, orders=("ordered",), targets=False, shuffle=True, n_shuffles=0):
        self.records, self.processor, self.cfg = records, processor, cfg
        self.orders, self.targets, self.shuffle, self.n_shuffles = orders, targets, shuffle, n_shuffles

    def __len__(self):
        return len(self.records)

    def __getitem__(self, position):
        record = self.records[data_index(position, len(self.records), self.cfg.seed) if self.shuffle else position]
        sample = {"record": record, "position": position}
        try:
            media, metadata = load_media(record, self.cfg)
            rng = random.Random(f"{self.cfg.seed}/{position}/frames")
            draw = lambda: None if metadata is None else self.permutation(record, len(media), rng)
            if "ordered" in self.orders:
                sample["ordered"] = encode(self.processor, record, media, metadata, self.cfg)
            if "shuffled" in self.orders:
                sample["frame_order"] = permutation = draw()
                sample["shuffled"] = permutation and encode(self.processor, record, media[permutation], metadata, self.cfg)
            if self.n_shuffles:
                drawn = [p for p in (draw() for _ in range(self.n_shuffles)) if p]
                sample["shuffles"] = [encode(self.processor, record, media[p], metadata, self.cfg) for p in drawn]
        except Unusable as error:
            return {"record": record, "position": position, "error": str(error)}
        if self.targets:
            sample["target"] = target_ids(self.processor, record)
        return sample

    def permutation(self, record, n_frames, rng):
        """A shuffled order of a clip's frames (see shuffled_order); a question's own picture stays at the end."""
        own = int(bool(record.get("image_path") or record.get("last_frame")))
        order = shuffled_order(n_frames - own, rng, self.cfg.shuffle_unit)
        return None if order is None else order + [n_frames - 1] * own


def blank_sample(processor, cfg):
    """Two black frames and nothing said: what a rank runs, with weight 0, to keep step with the others."""
    record = {"problem": "", "problem_type": "free-form", "data_type": "video", "path": "", "process": "", "solution": ""}
    frames_FHWC = np.zeros((2, 28, 28, 3), dtype=np.uint8)
    metadata = VideoMetadata(total_num_frames=2, fps=1.0, frames_indices=[0, 1])
    return {"record": record, "ordered": encode(processor, record, frames_FHWC, metadata, cfg),
            "target": torch.tensor([processor.tokenizer.eos_token_id])}


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
    travel = DataLoader(samples, batch_sampler=batches, num_workers=cfg.num_workers, worker_init_fn=start_worker,
                        prefetch_factor=4 if cfg.num_workers else None, collate_fn=as_numpy)
    # workers do not react to signals, so nothing else would end them if this process fails
    atexit.register(kill_workers)
    for batch in travel:
        yield tree_map_only(np.ndarray, torch.from_numpy, batch)


def as_numpy(batch):
    """A function of the module's own: what workers get must be picklable (Python 3.14 starts them by forkserver)."""
    return tree_map_only(torch.Tensor, torch.Tensor.numpy, batch)


def start_worker(_):
    """Leave signals to the training process. A scheduler sends them to all, and the step at hand still needs its clips."""
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
    names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    return {name: torch.cat(parts) for name in names if (parts := [x[name] for x in inputs if name in x])}


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
    out: str = option("", "with --distill: the file to write")
    min_accuracy: float = option(CORRECT, "with --distill: an answer's accuracy must be larger than this", low=0, high=1)


class Media(Dataset):
    """Item i is None where the media of record i can be read, and else the reason, with its row (from 1)."""

    def __init__(self, records, cfg):
        self.records = records
        self.cfg = cfg

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        try:
            load_media(self.records[i], self.cfg)
        except Unusable as error:
            return f"row {i + 1}: {error}"


def check_media(records, cfg):
    """Reads every record's media in worker processes. Returns the reasons of those that cannot be read."""
    results = DataLoader(Media(records, cfg), batch_size=None, num_workers=cfg.num_workers)
    return [reason for reason in tqdm(results, total=len(records), desc="reading media", unit="file") if reason]


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
        elif not (thought := text[text.index("<think>") + 7:text.index("</think>")].strip()):
            reason = "nothing thought"
        elif (accuracy := accuracy_reward(text, row["solution"], row["problem_type"])) <= min_accuracy:
            reason = "answer not accurate enough"
        else:
            reason = "another answer to the same question" if question in best else None
            if reason is None or accuracy > best[question][0]:
                names = ("problem_id", "problem", "data_type", "problem_type", "options", "solution", "path", "data_source")
                best[question] = accuracy, {**{n: row.get(n) for n in names}, "process": f"<think>{thought}</think>"}
        dropped[reason] += reason is not None
    return [record for _, record in best.values()], +dropped


def main():
    stage = settings.given("stage", "tgrpo")              # it says which section of the config to read
    cfg = settings.load_config(DataConfig, stage, doc=__doc__, partial=True)
    if cfg.distill:
        settings.require(cfg, "data", "out")
        rows = read_rows(cfg.distill)
        records, dropped = distill(rows, cfg.data_root, cfg.min_accuracy)
        settings.write_atomic(cfg.out, json.dumps(records, indent=1, ensure_ascii=False))
        print("\n".join([f"{n} dropped: {reason}" for reason, n in dropped.most_common()]))
        return print(f"{len(records)} of {len(rows)} answers kept: {cfg.out}")
    settings.require(cfg, stage, "records")
    records = load_records(cfg.records, cfg.data_root, need_process=stage == "sft")
    if cfg.check:
        unreadable = check_media(records, cfg)
        print("\n".join(unreadable + [f"{len(records) - len(unreadable)} of {len(records)} files can be read"]))
        sys.exit(1 if len(unreadable) > cfg.max_unreadable * len(records) else 0)
    print(json.dumps(records[0], indent=2, ensure_ascii=False))
    print("\nprompt:\n" + messages(records[0], cfg)[0]["content"][1]["text"])


if __name__ == "__main__":
    main()
