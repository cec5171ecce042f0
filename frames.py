"""Frames of clips, of folders of stills, and pictures, as arrays.

    read_clip      the frames of a clip on display at even times
    read_folder    the same of a folder of stills
    read_picture   one picture: RGB, upright, on white where it was transparent

For n frames of a clip that is shown for D seconds (from its first to its last frame, plus one interval) these are the
frames on display at (i + 1/2) D / n. Frame times come from the file, and only frames that a player shows count. So
the distance between two frames is D / n seconds, the one distance per clip that Qwen2.5-VL knows. docs/frames.md says
why.

Every function raises ValueError or OSError, or an error of PyAV or Pillow, for a file that cannot be read. A clip
that is not read after READ_SECONDS raises too: nothing hangs.

Axes: F frames · H height · W width · C channels
"""

import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

# A clip that takes longer than this is unusable. It is looked at between two packets, each of which takes moments.
READ_SECONDS = 300
# The rate of a folder of stills whose record names none.
FOLDER_FPS = 3.0
# A clip is taken for half a download if it is shorter than this share of what its header promises.
LEAST_SHARE = 0.9
STILLS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Larger frames are shrunk to this as they are decoded: 64 frames of 8K would take 6 GB. The model sees far fewer
# pixels.
MOST_PIXELS = 1920 * 1080
# How files begin that only name other files. libav waits for ever for the end of a live stream.
PLAYLISTS = (b"#EXTM3U", b"ffconcat version")
# Containers that store when each frame is shown. In others (avi, wmv, mpeg) libav guesses it, often wrongly.
TIMED = {"mov", "matroska", "flv", "mpegts"}
# Containers whose index finds key frames by their times. All others are decoded from their start.
SEEKABLE = {"mov", "matroska"}
# Containers whose header states how long the clip is. The others (MPEG streams, say) leave libav to estimate it.
PROMISING = {"mov", "matroska", "avi", "flv", "asf"}


class Shown(NamedTuple):
    """Frames of a clip, and what their times follow from."""

    # uint8, 0 to 255, RGB
    frames_FHWC: np.ndarray
    # of those frames, counted from 0 in the order of display
    indices: list
    # how many frames of the file they are spread over
    total: int
    # the mean rate of these `total` frames: the F frames are total / fps / F seconds apart
    fps: float


# --------------------------------------------------------------------------------------------------- which frames


def select(ticks, tick_seconds, n, start=None, end=None, interval=None):
    """(indices of the n frames on display at even times, how many frames they are spread over, the seconds those last).

    ticks: when each frame appears, increasing whole numbers, in units of `tick_seconds` (a Fraction). start, end:
    take only this part, in seconds from the first frame; beyond the end of the clip it is the last frame. All frames
    are taken if there are fewer than n. interval: ticks that the last frame lasts, held to the range of the other
    frames' intervals.

    A clip of 4 frames a second, then one that shows its first frame for three of its four seconds:

    >>> select([0, 1, 2, 3, 4, 5, 6, 7], Fraction(1, 4), 2)
    ([2, 6], 8, Fraction(2, 1))
    >>> select([0, 12, 13, 14, 15], Fraction(1, 4), 4)
    ([0, 0, 0, 3], 5, Fraction(4, 1))
    >>> select([0, 1, 2, 3, 4, 5, 6, 7], Fraction(1, 4), 16, start=0.5, end=1.25)
    ([2, 3, 4], 3, Fraction(3, 4))
    """
    ticks = np.asarray(ticks, dtype=np.int64)
    gaps = np.diff(ticks)
    if len(gaps):
        # a last frame that stands for long is no part of the motion; some files tell no length, or nonsense
        interval = int(np.clip(interval or np.median(gaps), gaps.min(), gaps.max()))
    clip_end = int(ticks[-1]) + (interval or 1)
    low = Fraction(int(ticks[0]))
    high = Fraction(clip_end)
    if start is not None:
        # 0.3 stands for 3/10, not for the binary number a little below it
        start, end = (Fraction(x).limit_denominator(10**6) / tick_seconds for x in (start, end))
        high = min(high, low + end)
        low = min(low + max(start, Fraction(0)), Fraction(int(ticks[-1])))
    first = frame_at(ticks, low)
    last = max(first, frame_at(ticks, math.ceil(high) - 1))
    shown = last - first + 1
    if shown < n:
        indices = list(range(first, last + 1))
        length = Fraction((int(ticks[last + 1]) if last + 1 < len(ticks) else clip_end) - int(ticks[first]))
    elif start is None and is_even(gaps):
        # counted, as a container that rounds times (Matroska: to milliseconds) may put a frame just after its moment
        indices = [int((i + 0.5) * shown / n) for i in range(n)]
        length = high - low
    else:
        indices = [frame_at(ticks, low + (2 * i + 1) * (high - low) / (2 * n)) for i in range(n)]
        length = high - low
    return indices, shown, length * tick_seconds


def frame_at(ticks, moment):
    """The frame on display at a moment (in ticks): the last that appears no later."""
    return max(0, int(np.searchsorted(ticks, math.floor(moment), side="right")) - 1)


def is_even(gaps):
    """Whether frames are evenly spaced, as far as the container's clock can tell."""
    if not len(gaps):
        return True
    shortest, longest = int(gaps.min()), int(gaps.max())
    rounding = 1 if shortest >= 10 else 0
    return longest - shortest <= rounding


# ---------------------------------------------------------------------------------------------------------- clips


def read_clip(path, n, start=None, end=None, last_frame=False, reader="exact"):
    """At most n frames of a clip as Shown. last_frame: the last of them is the last of the clip.

    reader: "exact", or "decord" as in the released pipeline. That one counts frames instead of reading their times,
    and gives other frames than asked for in many files. start and end are seconds from the first frame.
    """
    # a pipe or a device would be waited for
    if not os.path.isfile(path):
        raise ValueError("not a file" if os.path.exists(path) else "no such file")
    if os.path.getsize(path) == 0:
        raise ValueError("empty file")
    with open(path, "rb") as file:
        beginning = file.read(4096)
    if beginning.startswith(PLAYLISTS) or b"<MPD" in beginning:
        raise ValueError("a playlist, not a clip")
    if reader == "decord":
        return run_decord(path, n, start, end, last_frame)
    return read_exactly(path, n, start, end, last_frame)


def read_exactly(path, n, start, end, last_frame):
    """Frames by the times of displayed frames. The packets tell these times without decoding, in most files.

    Where a packet's frame does not come out of the decoder at its time (damaged files, frames that are never shown,
    containers without times), the file is decoded from its start instead, once for the times and once for the frames.
    """
    deadline = time.monotonic() + READ_SECONDS
    with open_clip(path) as container:
        stream = video_stream(container)
        tick_seconds = stream.time_base
        ticks, keys, interval, problem = packet_table(container, stream, deadline)
        is_timed = bool(TIMED & kinds_of(container))
    if problem:
        raise ValueError(problem)
    frames = None
    if ticks and is_timed:
        chosen = select(ticks, tick_seconds, n, start, end, interval)
        indices, total, seconds = with_last(chosen, last_frame, len(ticks))
        frames = fetch(path, [ticks[i] for i in indices], keys, deadline)
    if frames is None:
        decoded = decoded_ticks(path, deadline)
        grows = None not in decoded and all(a < b for a, b in zip(decoded, decoded[1:]))
        if not grows and (not is_timed or None in decoded or len(set(decoded)) < len(decoded)):
            # no times to go by: the frames are taken for evenly spaced
            decoded = [i * (interval or 1) for i in range(len(decoded))]
        # a damaged file may leave the decoder out of order
        order = sorted(range(len(decoded)), key=decoded.__getitem__)
        shown = [decoded[i] for i in order]
        if ticks and shown[-1] - shown[0] < LEAST_SHARE * (ticks[-1] - ticks[0]):
            decoded_seconds, told_seconds = (float((t[-1] - t[0]) * tick_seconds) for t in (shown, ticks))
            raise ValueError(f"damaged: {decoded_seconds:.1f} s of {told_seconds:.1f} s can be decoded")
        chosen = select(shown, tick_seconds, n, start, end, interval)
        indices, total, seconds = with_last(chosen, last_frame, len(shown))
        frames = fetch_by_count(path, [order[i] for i in indices], deadline)
    frames_FHWC = np.stack(frames)
    check_sides(*frames_FHWC.shape[1:3])
    return Shown(frames_FHWC, indices, total, float(total / seconds))


def open_clip(path):
    """The open container. Its single calls end in time too: opening, and reading a packet."""
    return av.open(path, timeout=max(1, READ_SECONDS))


def with_last(chosen, last_frame, n_frames):
    indices, total, seconds = chosen
    if last_frame:
        indices = [*indices[:-1], n_frames - 1]
    return indices, total, seconds


def video_stream(container):
    """The first video stream that is no cover picture. Decoded in this thread: a DataLoader has workers enough."""
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    for stream in container.streams.video:
        if not stream.disposition & pictures:
            stream.codec_context.thread_count = 1
            return stream
    raise ValueError("no video in this file")


def kinds_of(container):
    """The container's names in libav: {"mov", "mp4", ...} of an mp4 file."""
    return set(container.format.name.split(","))


def packet_table(container, stream, deadline):
    """(ticks of the frames to be shown, of the key frames, how many ticks the last frame lasts, what is wrong or None).

    All from packets, undecoded. The first is empty if the packets do not tell: no times, or one time twice. Packets
    that an edit list hides are not shown.
    """
    ticks, keys, ends = [], [], {}
    rate = stream.average_rate or stream.guessed_rate
    interval = max(1, round(1 / (rate * stream.time_base))) if rate else None
    last_tick = None
    told = True
    for packet in timed(container.demux(), deadline):
        if packet.pts is None:
            told = told and not (packet.size and packet.stream is stream)
            continue
        packet_end = packet.pts + (packet.duration or 0)
        ends[packet.stream.index] = max(ends.get(packet.stream.index, packet_end), packet_end)
        if packet.stream is not stream or not packet.size:
            continue
        if packet.is_keyframe:
            keys.append(packet.pts)
        if not packet.is_discard:
            ticks.append(packet.pts)
            if packet.duration and (last_tick is None or packet.pts > last_tick):
                last_tick = packet.pts
                interval = packet.duration
    ticks.sort()
    if not told or len(set(ticks)) < len(ticks):
        ticks = []
    return ticks, sorted(keys), interval, shortfall(container, stream, ticks, ends)


def shortfall(container, stream, ticks, ends):
    """What is missing of a file that holds less than LEAST_SHARE of what its header promises; None if nothing is.

    ends: the last tick of each stream by its index. A promise is the stream's duration, or else that of the whole
    file, which all streams together must keep: the sound may be longer than the picture.
    """
    if not PROMISING & kinds_of(container):
        return None
    # of an avi's length libav makes what the file's size allows; its count of frames (a tick each) is the header's
    promised_ticks = stream.frames if "avi" in kinds_of(container) else stream.duration
    if promised_ticks:
        promised = float(promised_ticks * stream.time_base)
        first = ticks[0] if ticks else 0
        held = float((ends.get(stream.index, first) - first) * stream.time_base)
    elif container.duration:
        promised = container.duration / av.time_base
        held = max((float(tick * container.streams[i].time_base) for i, tick in ends.items()), default=0.0)
    else:
        return None
    if held < LEAST_SHARE * promised:
        return f"incomplete: {held:.1f} s of the {promised:.1f} s that its header promises"
    return None


def timed(items, deadline):
    """The items, until the deadline; then ValueError."""
    for item in items:
        if time.monotonic() > deadline:
            raise ValueError(f"not read after {READ_SECONDS} s")
        yield item


def decode(container, stream, deadline):
    """The frames from here on, in order of display. A damaged packet has no frame: the one before stays on display."""
    for packet in timed(container.demux(stream), deadline):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            continue
        yield from frames


def fetch(path, wanted, keys, deadline):
    """RGB arrays of the frames at the ticks `wanted`. None if one of them does not come out of the decoder at its tick.

    Seeks to the last key frame before a wanted frame only if that key frame is still ahead, else decodes on. The key
    frame is never later than the wanted one, so the leading frames of an open group of pictures are decoded with the
    group before.
    """
    arrays = {}
    with open_clip(path) as container:
        stream = video_stream(container)
        to_rgb = UprightRGB(stream)
        seekable = SEEKABLE & kinds_of(container)
        frames = decode(container, stream, deadline)
        position = keys[0] if keys else wanted[0]
        for tick in sorted(set(wanted)):
            i = int(np.searchsorted(keys, tick, side="right")) - 1
            if seekable and i >= 0 and keys[i] > position:
                container.seek(keys[i], stream=stream)
                frames = decode(container, stream, deadline)
            frame = next((frame for frame in frames if frame.pts is None or frame.pts >= tick), None)
            if frame is None or frame.pts != tick or frame.is_corrupt:
                return None
            position = tick
            arrays[tick] = to_rgb(frame)
    return [arrays[tick] for tick in wanted]


def decoded_ticks(path, deadline):
    """Ticks of all frames in the order the decoder gives them, None where a frame has none."""
    with open_clip(path) as container:
        ticks = [frame.pts for frame in decode(container, video_stream(container), deadline)]
    if not ticks:
        raise ValueError("no frame can be decoded")
    return ticks


def fetch_by_count(path, indices, deadline):
    """RGB arrays of the frames at `indices`, counted from 0 in the order the decoder gives them."""
    arrays = {}
    with open_clip(path) as container:
        stream = video_stream(container)
        to_rgb = UprightRGB(stream)
        for i, frame in enumerate(decode(container, stream, deadline)):
            if i in indices:
                arrays[i] = to_rgb(frame)
            if i == max(indices):
                break
    return [arrays[i] for i in indices]


class UprightRGB:
    """Turns frames of one clip into (H, W, C) uint8 arrays: upright, square pixels, all of the first one's size.

    Frames of more than MOST_PIXELS are shrunk to that.

    One thread: a converter with threads of its own that is still around when a DataLoader forks would hang its workers.
    """

    def __init__(self, stream):
        self.aspect = stream.sample_aspect_ratio or 1
        self.reformatter = VideoReformatter()
        self.size = None

    def __call__(self, frame):
        if self.size is None:
            width, height = frame.width * self.aspect, frame.height
            shrink = min(1.0, math.sqrt(MOST_PIXELS / (width * height)))
            self.size = {"width": max(1, round(width * shrink)), "height": max(1, round(height * shrink))}
            self.matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
        has_alpha = any(component.is_alpha for component in frame.format.components)
        form = "rgba" if has_alpha else "rgb24"
        frame_HWC = self.reformatter.reformat(frame, **self.size, format=form, threads=1).to_ndarray()
        if has_alpha:
            frame_HWC = np.asarray(on_white(Image.fromarray(frame_HWC)))
        return turned(frame_HWC, self.matrix) if self.matrix else frame_HWC


def turned(frame_HWC, matrix):
    """The frame turned by quarters and mirrored as its display matrix (bytes of 3 x 3 whole numbers) says.

    A pixel at (x, y) of the file is shown at (a x + c y, b x + d y).
    """
    a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32)[:5].tolist()
    if abs(a) + abs(d) < abs(b) + abs(c):
        frame_HWC = frame_HWC.transpose(1, 0, 2)
        a, d = c, b
    if a < 0:
        frame_HWC = frame_HWC[:, ::-1]
    if d < 0:
        frame_HWC = frame_HWC[::-1]
    return frame_HWC


# --------------------------------------------------------------------------------------- the released pipeline's reader


def run_decord(path, n, start, end, last_frame):
    """Shown, by decord in a process of its own: it never returns from some damaged files, and only killing helps."""
    request = json.dumps([str(path), n, start, end, last_frame])
    try:
        done = subprocess.run([sys.executable, __file__, request], capture_output=True, timeout=READ_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"decord has not read it after {READ_SECONDS} s") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(f"decord: {lines[-1] if lines else f'exit status {done.returncode}'}")
    return Shown(*pickle.loads(done.stdout))


def read_with_decord(path, n, start, end, last_frame):
    """Shown, of a clip whose frames decord takes for evenly spaced."""
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    rate = Fraction(reader.get_avg_fps()).limit_denominator(10**6)
    chosen = select(range(len(reader)), 1 / rate, n, start, end)
    indices, total, seconds = with_last(chosen, last_frame, len(reader))
    frames_FHWC = reader.get_batch(indices).asnumpy()
    check_sides(*frames_FHWC.shape[1:3])
    return Shown(frames_FHWC, indices, total, float(total / seconds))


# ------------------------------------------------------------------------------------------------ stills and pictures


def read_folder(path, n, fps=None, start=None, end=None, last_frame=False):
    """At most n stills of a folder as Shown, all of the size of the first. fps: their rate, FOLDER_FPS if None."""
    visible = [p for p in Path(path).iterdir() if not p.name.startswith(".")]
    files = [p for p in visible if p.suffix.lower() in STILLS and p.is_file()]
    if not files:
        raise ValueError("no stills (.jpg, .png, .webp, .bmp) in this folder")
    files.sort(key=natural_order)
    tick_seconds = 1 / Fraction(fps or FOLDER_FPS).limit_denominator(10**6)
    chosen = select(range(len(files)), tick_seconds, n, start, end)
    indices, total, seconds = with_last(chosen, last_frame, len(files))
    stills = [read_picture(files[i]) for i in indices]
    size = stills[0].size
    stills = [still if still.size == size else still.resize(size, Image.Resampling.BICUBIC) for still in stills]
    return Shown(np.stack([np.asarray(still) for still in stills]), indices, total, float(total / seconds))


def natural_order(path):
    """A key that sorts numbers in names by their value.

    >>> sorted([Path("frame_10_t4s.png"), Path("frame_9_t3s.png")], key=natural_order)[0].name
    'frame_9_t3s.png'
    """
    parts = re.split(r"(\d+)", path.stem)
    return [int(part) if part.isdecimal() else part for part in parts], path.name


def read_picture(path):
    """One picture as a PIL image: RGB, upright, on white where it was transparent."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("not a file")
    with Image.open(path) as image:
        image = on_white(ImageOps.exif_transpose(in_8_bits(image)))
    check_sides(*image.size)
    return image


def in_8_bits(image):
    """The image; greys of more bits and floats scaled to 8 bits. ValueError if it is unknown which grey is white."""
    if not image.mode.startswith(("I", "F")):
        return image
    grey_HW = np.asarray(image, dtype=np.float64)
    low, high = grey_HW.min(), grey_HW.max()
    if image.mode.startswith("I;16"):
        brightest = 65535
    elif image.mode == "I":
        brightest = 255 if image.format != "PNG" and high <= 255 else 65535
    else:
        brightest = 1 if high <= 1 else 255
    if not (0 <= low and high <= brightest):
        raise ValueError(f"greys from {low:g} to {high:g}: which of them is white is not known")
    grey = Image.fromarray((grey_HW * (255 / brightest) + 0.5).astype(np.uint8))
    if "exif" in image.info:
        # it says which way is up
        grey.info["exif"] = image.info["exif"]
    return grey


def on_white(image):
    """RGB; what was transparent is white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def check_sides(a, b):
    if max(a, b) > 200 * min(a, b):
        raise ValueError(f"{a} x {b} pixels: Qwen2.5-VL takes no picture more than 200 times as long as wide")


if __name__ == "__main__":
    sys.stdout.buffer.write(pickle.dumps(tuple(read_with_decord(*json.loads(sys.argv[1])))))
