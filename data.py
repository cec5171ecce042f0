"""From a record to the tensors that the model sees: frames, prompt, shuffling, batches.

One record, in the format that Video-R1 released; unknown keys are kept:

    {"problem_id": 7, "problem": "Which way does the disc move?", "data_type": "video",
     "problem_type": "multiple choice", "options": ["A. left", "B. right"], "solution": "<answer>B</answer>",
     "process": "<think>It starts left and ends right.</think>", "path": "./clips/7.mp4", "data_source": "toy"}

The prompt is the frames, then PROMPT filled with the problem, its options and a hint. SFT learns to answer with
`process`, a newline, `solution`. docs/own_clips.md describes every field, and `python -m tools.check_data` shows one
example and checks all files.

A record whose media cannot be read is skipped, counted and named, up to the fraction `max_unreadable`. No clip ever
replaces another, and no question is trained without its pixels.

"Order" always means the order of frames. Training is an endless sequence of draws; draw d is one record.

Axes: F frames · H height · W width · C channels · P tokens of a prompt · L tokens of a row · B rows
"""

import functools
import math
import random
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.video_utils import VideoMetadata

import rewards
from support import families, frames, parsing, record_files, settings

PROMPT = """{problem}
{options}

Look at the frames and think it through step by step between <think> and </think>. Then state the result between \
<answer> and </answer>. {hint}"""

# The value of mm_token_type_ids at the tokens of a clip (0 at text).
VIDEO = 2
# Consecutive frames that the vision tower merges into one temporal patch.
TEMPORAL_PATCH = 2
# For a rank that has no readable record, and for a bad row in an evaluation.
EMPTY_RECORD = {"path": "empty text", "problem": "", "problem_type": "free-form", "data_type": "video", "solution": ""}

# load_records(path, data_root, max_unreadable, need_process): (records, bad rows) of a file
load_records = functools.partial(record_files.load_records, rewards.parse_solution)


class Unusable(settings.UserError):
    """The media of a record cannot be read, or its prompt is too long. The record is skipped, counted and named."""


# ------------------------------------------------------------------------------------------------------------- frames


def even_frames(ticks, tick_seconds, n, start=None, end=None, last_frame=False, last_duration=None):
    """Which n frames of a clip are shown: those on display at evenly spaced times, or all frames if there are fewer.

    A clip, or its part from `start` to `end` (seconds from the first frame, both or neither), lasts for D seconds.
    Frame i is the one on display at (i + 1/2) D / n. So frames are D / n seconds apart: Qwen2.5-VL assumes one constant
    distance (ours; the released code spaces the frame numbers evenly, whatever their times).

    ticks: when each frame appears, increasing, in units of tick_seconds (a Fraction) · last_frame: if true, the last
    frame shown is the clip's last · last_duration: for how many ticks that one is on display (None: the others' median)
    Returns (frame numbers, total, fps, seconds). The frames are spread over `total` frames of the file, whose mean rate
    is fps. seconds: when each appears, from the beginning of the clip or part; when it is shown again, a later moment.

    At 4 frames per second; a clip that shows its first frame for three of its four seconds; the part from 0.5 to 1.25 s
    of the first clip, which has fewer than 16 frames:

    >>> even_frames([0, 1, 2, 3, 4, 5, 6, 7], Fraction(1, 4), 2)
    ([2, 6], 8, 4.0, [0.5, 1.5])
    >>> even_frames([0, 12, 13, 14, 15], Fraction(1, 4), 4)
    ([0, 0, 0, 3], 5, 1.25, [0.0, 1.0, 2.0, 3.5])
    >>> even_frames([0, 1, 2, 3, 4, 5, 6, 7], Fraction(1, 4), 16, start=0.5, end=1.25)
    ([2, 3, 4], 3, 4.0, [0.0, 0.25, 0.5])
    """
    ticks, display_ends = frames.display_times(ticks, last_duration)
    low, high = frames.part(ticks, display_ends, tick_seconds, start, end)
    first = frames.frame_at(ticks, low)
    # the last frame that appears before `high`
    last = max(first, frames.frame_at(ticks, math.ceil(high) - 1))
    total = last - first + 1
    length = high - low
    if total < n:
        indices = list(range(first, last + 1))
        length = Fraction(int(display_ends[last] - ticks[first]))
    elif start is None and frames.evenly_spaced(ticks):
        # picked by number, not by time: a container that rounds times (Matroska: to ms) may put a frame just after its
        # moment
        indices = [int((i + 0.5) * total / n) for i in range(n)]
    else:
        indices = [frames.frame_at(ticks, low + (2 * i + 1) * length / (2 * n)) for i in range(n)]
    if last_frame:
        indices[-1] = len(ticks) - 1
    moments = [max(low, int(ticks[i])) for i in indices]
    for i in range(1, len(indices)):
        # shown again: it is still on display where the i-th of n equal parts begins
        if indices[i] == indices[i - 1]:
            moments[i] = low + i * length / n
    seconds = [float((moment - low) * tick_seconds) for moment in moments]
    return indices, total, float(total / (length * tick_seconds)), seconds


def load_media(record, cfg):
    """(frames, metadata) of a video: uint8 (F, H, W, C), F <= max_frames; of an image: (PIL image, None).

    From the metadata, Qwen2.5-VL's processor computes the seconds between two frames, total_num_frames / fps / F, and
    Qwen3-VL's the time of each frame, frames_indices / fps. All stages use these. Raises Unusable with file and reason.
    """
    try:
        path = record_files.existing_path(record["path"], cfg.data_root)
        if record["data_type"] == "image":
            return frames.read_picture(path), None
        return load_clip(record, path, cfg)
    except Exception as error:
        # a damaged file may raise anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise Unusable(f"{record['path']:.200}: {reason:.200}") from error


def load_clip(record, path, cfg):
    """(frames, metadata) of a video or a folder of stills, from `start` to `end` if the record has them.

    If the record has `last_frame`, its question is about the last frame of the file, which is then always shown.
    `image_path` names a separate picture that the question is about: it becomes one more frame at the end.
    """
    picture_path = record.get("image_path")
    n_frames = max(1, cfg.max_frames - 1) if picture_path else cfg.max_frames
    part = {name: record.get(name) for name in ("start", "end", "last_frame")}
    choose = functools.partial(even_frames, n=n_frames, **part)
    if record["data_type"] == "frame":
        clip = frames.read_folder(path, choose, record.get("fps"))
    else:
        clip = frames.read_clip(path, choose, cfg.video_reader)
    if picture_path:
        clip = frames.with_picture(clip, record_files.existing_path(picture_path, cfg.data_root))
    # fractions, because the processor computes a frame's time as index / fps, even if the rate is uneven
    indices = [seconds * clip.fps for seconds in clip.seconds]
    return clip.frames_FHWC, VideoMetadata(total_num_frames=clip.total, fps=clip.fps, frames_indices=indices)


# ------------------------------------------------------------------------------------------------- orders of the frames


def shuffled_order(n_frames, rng, unit="frame", whole_units=False):
    """A random order of the frames that differs from the given one, as a list of frame numbers; None for one unit.

    unit="frame" permutes single frames (paper): a temporal patch then blends two distant moments. unit="patch" (ours)
    moves whole pairs, which keeps the motion inside a pair. An odd last frame then fills its pair by repeating itself,
    as the processor would pad it; with `whole_units` it stays at the end, to share its pair with a frame that follows.
    """
    size = TEMPORAL_PATCH if unit == "patch" else 1
    n_units = n_frames // size if whole_units else -(-n_frames // size)
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
    return [*frame_order, *range(len(frame_order), n_frames)]


def frame_orders(names, n_frames, keep_last, rng, unit):
    """{order: frame numbers} for the orders in `names`: ordered, shuffled, reversed, single (the middle frame).

    Each other name that begins with "shuffled" is one more random order. With `keep_last` the last frame is the
    question's own picture, which stays at the end. A clip of one frame has only the order "ordered".
    """
    n_moving = n_frames - 1 if keep_last else n_frames
    orders = {}
    for name in names:
        order = None
        if name == "ordered":
            order = range(n_moving)
        elif n_moving < 2:
            continue
        elif name.startswith("shuffled"):
            order = shuffled_order(n_moving, rng, unit, whole_units=keep_last)
        elif name == "reversed":
            order = reversed(range(n_moving))
        elif name == "single":
            # repeated to fill a temporal patch
            order = [n_moving // 2] * TEMPORAL_PATCH
        # None: one temporal patch has no order, and "blind" shows no frames
        if order is not None:
            orders[name] = [*order, *range(n_moving, n_frames)]
    return orders


# ------------------------------------------------------------------------------------------------------------- prompts


def messages(record, cfg, with_media=True):
    """The record as a conversation of one turn: the clip or picture, then the question."""
    question = (cfg.prompt or PROMPT).format(
        problem=record_files.plain_problem(record),
        options="\n".join(parsing.lettered(record.get("options") or [])),
        hint=rewards.PROBLEM_TYPES[record["problem_type"]].hint,
    )
    media_type = "image" if record["data_type"] == "image" else "video"
    content = [{"type": media_type}] if with_media else []
    return [{"role": "user", "content": [*content, {"type": "text", "text": question.strip()}]}]


def encode(processor, record, media, metadata, cfg, n_target=0):
    """Model inputs of one prompt, as tensors: input_ids, attention_mask and mm_token_type_ids (1, P); of its clip,
    pixel_values_videos (patches, values of a patch), video_grid_thw (1, 3) in patches and, for Qwen2.5-VL,
    second_per_grid_ts (1,), the seconds per temporal patch. With `media` None the prompt is the question alone.

    Raises Unusable if these and the `n_target` tokens that SFT learns exceed max_prompt_tokens; nothing is truncated.
    """
    conversation = messages(record, cfg, with_media=media is not None)
    family = families.BY_PROCESSOR[type(processor).__name__]
    text = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    text = text.replace(families.CLIP, family.clip)
    # despite their names, these are the smallest and the largest area of a frame, in pixels
    size = {"shortest_edge": cfg.min_pixels, "longest_edge": cfg.max_pixels}
    if media is None:
        inputs = processor(text=[text], return_tensors="pt")
        inputs["mm_token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    elif record["data_type"] == "image":
        inputs = processor(text=[text], images=[media], images_kwargs={"size": size}, return_tensors="pt")
        inputs = as_clip(inputs, processor)
    else:
        # an odd last frame fills its temporal patch here, because Qwen3-VL's processor refuses a single frame
        if len(media) % TEMPORAL_PATCH:
            media = np.concatenate([media, media[-1:]])
        video_settings = {
            "size": family.area_limits(size, len(media)),
            # the processor would give the frames of long clips fewer pixels than max_pixels
            "cap_pixels_per_frame": False,
            "video_metadata": [metadata],
            "do_sample_frames": False,
            # a clip three pixels high would be taken for channels
            "input_data_format": "channels_last",
        }
        inputs = processor(text=[text], videos=[media], videos_kwargs=video_settings, return_tensors="pt")
    inputs = dict(inputs)
    length = inputs["input_ids"].shape[1] + n_target
    if length > cfg.max_prompt_tokens:
        raise Unusable(f"{record['path']}: {length} tokens, max_prompt_tokens is {cfg.max_prompt_tokens}")
    return inputs


def as_clip(inputs, processor):
    """A picture's inputs as those of a clip of one moment. The model computes the same from both (test_pictures.py).

    So a batch has one kind of media, and the vision tower runs exactly once per batch. FSDP requires this, because all
    ranks gather the tower's weights together.
    """
    ids = inputs["input_ids"]
    is_picture = ids == processor.image_token_id
    return {
        "input_ids": ids.masked_fill(is_picture, processor.video_token_id),
        "attention_mask": inputs["attention_mask"],
        "mm_token_type_ids": is_picture * VIDEO,
        "pixel_values_videos": inputs["pixel_values"],
        "video_grid_thw": inputs["image_grid_thw"],
    }


def target_ids(processor, record):
    """What SFT learns to generate after the prompt: process, newline, solution, end of turn. 1-D tensor of token ids.

    What the chat template writes is not learned: "<|im_start|>assistant", a newline and, in Thinking variants, <think>.
    """
    text = record["process"].strip() + "\n" + record["solution"].strip() + processor.tokenizer.eos_token
    text = text.removeprefix(families.opening(processor).strip()).lstrip()
    return processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]


# ------------------------------------------------------------------------------------------------------------- samples


@dataclass
class Sample:
    """One record, encoded for the model; or the record and the `error` that makes it unusable."""

    record: dict
    # which draw of the training sequence it is; in evaluation, which question
    draw: int = -1
    # {order of the frames: model inputs from encode()}; "blind" is the question without frames. A picture and a clip
    # of one frame have only "ordered" and "blind"
    inputs: dict = field(default_factory=dict)
    # the frame numbers of inputs["shuffled"]
    frame_order: list | None = None
    # the token ids that SFT learns
    target: torch.Tensor | tuple = ()
    error: str | None = None


class Samples(Dataset):
    """Item i is the Sample of draw i of the training sequence or, with `in_file_order`, of record i of the file.

    `orders` names the orders of frames that are encoded. Shuffling depends on the seed and the draw; in evaluation on
    the seed and the question, so that a question's frames do not depend on which other questions are asked.
    """

    def __init__(self, records, processor, cfg, orders=("ordered",), targets=False, in_file_order=False):
        self.records = records
        self.processor = processor
        self.cfg = cfg
        self.orders = orders
        self.targets = targets
        self.in_file_order = in_file_order

    def __getitem__(self, draw):
        # the batch sampler also asks for draws beyond the number of records: those are of later epochs
        index = draw if self.in_file_order else record_of_draw(draw, len(self.records), self.cfg.seed)
        record = self.records[index]
        # evaluation keeps bad rows, to count them
        if "error" in record:
            return Sample(record, draw, error=record["error"])
        try:
            return self.encoded(record, draw)
        except Unusable as error:
            return Sample(record, draw, error=str(error))

    def encoded(self, record, draw):
        """The Sample of a record. Raises Unusable."""
        media, metadata = load_media(record, self.cfg)
        target = target_ids(self.processor, record) if self.targets else ()
        sample = Sample(record, draw, target=target)
        if "blind" in self.orders:
            sample.inputs["blind"] = encode(self.processor, record, None, None, self.cfg)
        # a picture has no order
        if metadata is None:
            sample.inputs["ordered"] = encode(self.processor, record, media, None, self.cfg, len(target))
            return sample
        seed_key = draw
        # evaluate.py gives every question both names
        if self.in_file_order and "benchmark" in record:
            seed_key = f"{record['benchmark']}/{record['id']}"
        rng = random.Random(f"{self.cfg.seed}/{seed_key}/frames")
        keep_last = bool(record.get("image_path") or record.get("last_frame"))
        orders = frame_orders(self.orders, len(media), keep_last, rng, self.cfg.shuffle_unit)
        for name, order in orders.items():
            # by default only the pixels move: the times stay in order, one per frame shown
            time_order = order if self.cfg.shuffle_stamps or name == "single" else sorted(order)
            indices = [metadata.frames_indices[i] for i in time_order]
            # so that the seconds between two frames, total / fps / F, do not depend on F, the number of frames shown
            total = metadata.total_num_frames * (len(order) / len(media))
            times = replace(metadata, total_num_frames=total, frames_indices=indices)
            sample.inputs[name] = encode(self.processor, record, media[order], times, self.cfg, len(target))
        sample.frame_order = orders.get("shuffled")
        return sample


def dummy_sample(processor, cfg):
    """Two black frames. A rank without readable samples runs this one instead, with weight 0."""
    frames_FHWC = np.zeros((2, 28, 28, 3), dtype=np.uint8)
    metadata = VideoMetadata(total_num_frames=2, fps=1.0, frames_indices=[0, 1])
    inputs = encode(processor, EMPTY_RECORD, frames_FHWC, metadata, cfg)
    return Sample(EMPTY_RECORD, inputs={"ordered": inputs}, target=torch.tensor([processor.tokenizer.eos_token_id]))


# --------------------------------------------------------------------------------------- the training sequence, batches


def record_of_draw(draw, n_records, seed):
    """The number of the record at this draw of the endless training sequence: each epoch is a new permutation."""
    return epoch_permutation(draw // n_records, n_records, seed)[draw % n_records]


@functools.lru_cache(maxsize=1)
def epoch_permutation(epoch, n_records, seed):
    return np.random.default_rng([seed, epoch]).permutation(n_records)


def rank_batches(cfg, start_step, rank, ranks):
    """Yields the draws of this rank's share of each step's batch. To resume, the number of the step is enough."""
    share = cfg.batch_size // ranks
    for step in range(start_step, cfg.steps):
        first = step * cfg.batch_size + rank * share
        yield list(range(first, first + share))


def join_media(prompts):
    """The pixels and patch grids of several prompts, concatenated; {} if none has any."""
    joined = {}
    for name in ("pixel_values_videos", "video_grid_thw"):
        parts = [prompt[name] for prompt in prompts if name in prompt]
        if parts:
            joined[name] = torch.cat(parts)
    return joined


def pad(rows, value, side):
    """Tensors (L,) or (L, …) of unequal length as one (B, L, …) tensor, padded on the left or right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


def collate_prompts(prompts, pad_id):
    """Prompts of unequal length as one left-padded batch, ready for generate()."""
    batch = join_media(prompts)
    for name, fill in (("input_ids", pad_id), ("attention_mask", 0)):
        batch[name] = pad([prompt[name][0] for prompt in prompts], fill, "left")
    return batch
