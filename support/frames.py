"""Reading clips, folders of stills, and pictures. data.even_frames decides which frames of a clip are shown.

    read_clip      the chosen frames of a clip, by the times in the file
    read_folder    the chosen stills of a folder
    read_picture   one picture: RGB, upright, on white where it was transparent

`choose(ticks, tick_seconds, last_duration=None)` is data.even_frames with its other arguments: it gets the times at
which the frames appear, and returns the numbers of those to show. Only frames that a player shows count
(docs/frames.md).

Every function raises ValueError or OSError, or an error of PyAV or Pillow, for a file that cannot be read. A clip
that takes longer than READ_SECONDS raises too: nothing hangs.

Axes: F frames · H height · W width · C channels
A tick is a whole number of a clip's time base (`tick_seconds`, a Fraction), the unit of all frame times in a file.
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
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

# A clip that takes longer than this is unusable. Checked between packets, each of which takes moments.
READ_SECONDS = 300
# A clip shorter than this share of what its header promises counts as a partial download.
LEAST_SHARE = 0.9
# Larger frames are shrunk to this while decoding: 64 frames of 8K would take 6 GB, and the model sees far fewer pixels.
MOST_PIXELS = 1920 * 1080
# How files begin that only name other files. libav would wait forever for the end of a live stream.
PLAYLISTS = (b"#EXTM3U", b"ffconcat version")
# Containers that store when each frame is shown. In others (avi, wmv, mpeg) libav guesses it, often wrongly.
TIMED = {"mov", "matroska", "flv", "mpegts"}
# Containers whose index finds key frames by their times. All others are decoded from their start.
SEEKABLE = {"mov", "matroska"}
# Containers whose header states how long the clip is. For others (MPEG streams, for example) libav estimates it.
PROMISING = {"mov", "matroska", "avi", "flv", "asf"}
# libav's own decoders of these codecs leave transparency out.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


class Shown(NamedTuple):
    """Frames of a clip and their times. On average the frames are total / fps / F seconds apart."""

    # uint8, 0 to 255, RGB
    frames_FHWC: np.ndarray
    # how many frames of the file they are spread over
    total: int
    # the mean rate of these `total` frames
    fps: float
    # when each appears or, shown again, is still on display; from the beginning of the clip or part (F,)
    seconds: list


def display_times(ticks, last_duration):
    """(ticks, ends): when each frame appears and disappears. last_duration: ticks for which the last one is shown.

    It is limited to the range of the other frames' durations (None: their median): a still at the end is not part of
    the motion, and some files give no length, or a wrong one.
    """
    ticks = np.asarray(ticks, dtype=np.int64)
    gaps = np.diff(ticks)
    if len(gaps):
        last_duration = int(np.clip(last_duration or np.median(gaps), gaps.min(), gaps.max()))
    return ticks, np.append(ticks[1:], ticks[-1] + (last_duration or 1))


def part(ticks, display_ends, tick_seconds, start, end):
    """The moments (in ticks) between which a clip, or its part from `start` to `end` (seconds), is shown.

    Benchmarks round times: up to a second after the end, the last frame is shown. Raises ValueError for a later start.
    """
    clip_start = Fraction(int(ticks[0]))
    clip_end = Fraction(int(display_ends[-1]))
    if start is None:
        return clip_start, clip_end
    # 0.3 means 3/10, not the binary number slightly below it
    low, high = (clip_start + Fraction(t).limit_denominator(10**6) / tick_seconds for t in (start, end))
    if low > clip_end + 1 / tick_seconds:
        seconds = float((clip_end - clip_start) * tick_seconds)
        raise ValueError(f"start {start} is after the end of the clip ({seconds:.1f} s)")
    return min(low, Fraction(int(ticks[-1]))), min(high, clip_end)


def frame_at(ticks, moment):
    """The frame on display at a moment (in ticks): the last one that appears no later."""
    return max(0, int(np.searchsorted(ticks, math.floor(moment), side="right")) - 1)


def evenly_spaced(ticks):
    """Whether frames are evenly spaced, as far as the container's clock can tell."""
    even_ticks = np.linspace(ticks[0], ticks[-1], len(ticks))
    rounding = 1 if np.diff(ticks).min(initial=10) >= 10 else 0
    return np.abs(ticks - even_ticks).max() < rounding + 1e-3


def read_clip(path, choose, reader="exact"):
    """The chosen frames of a clip as Shown. reader: "exact" or, as released and often wrong, "decord"."""
    # opening a pipe or a device would block
    if not os.path.isfile(path):
        raise ValueError("not a file")
    with open(path, "rb") as file:
        beginning = file.read(4096)
    if beginning.startswith(PLAYLISTS) or b"<MPD" in beginning:
        raise ValueError("a playlist, not a clip")
    try:
        frames_FHWC, chosen = read_with_decord(path, choose) if reader == "decord" else read_exactly(path, choose)
    except av.error.InvalidDataError:
        raise ValueError(f"not a video, or only a part of one: it begins with {beginning[:15]}") from None
    check_sides(*frames_FHWC.shape[1:3])
    indices, total, fps, seconds = chosen
    if len(set(indices)) == 1 < len(indices) <= total / 2:
        shown = f"one of {total} frames is on display at all {len(indices)} moments"
        raise ValueError(f"its clock jumps, or hardly anything moves: {shown}")
    return Shown(frames_FHWC, total, fps, seconds)


def read_exactly(path, choose):
    """(frames, chosen), by the times of displayed frames. In most files the packets give these times without decoding.

    If not (damaged files, frames that are never shown, containers without times), the file is decoded from its start,
    once for the times and once for the frames.
    """
    deadline = time.monotonic() + READ_SECONDS
    packets = read_packets(path, deadline)
    frames = None
    if packets.ticks and packets.is_timed:
        chosen = choose(packets.ticks, packets.tick_seconds, last_duration=packets.interval)
        wanted = [packets.ticks[i] for i in chosen[0]]
        frames = fetch(path, wanted, packets.keys, deadline)
    if frames is None:
        ticks, order = decoded_times(path, packets, deadline)
        chosen = choose(ticks, packets.tick_seconds, last_duration=packets.interval)
        frames = fetch_by_count(path, [order[i] for i in chosen[0]], deadline)
    return np.stack(frames), chosen


def open_clip(path):
    """The open container. The timeout covers what checks between packets cannot: opening, and reading one packet."""
    return av.open(path, timeout=max(1, READ_SECONDS))


def video_stream(container):
    """The first video stream that is not a cover picture. One decoding thread: a DataLoader has enough workers."""
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        raise ValueError("no video in this file")
    # libav reads the pixel format from a stream's packets, so streams without one have none
    streams = [stream for stream in streams if stream.codec_context.pix_fmt] or streams
    # what a player shows: the default stream, which need not be the first
    stream = next((stream for stream in streams if stream.disposition & Disposition.default), streams[0])
    stream.codec_context.thread_count = 1
    return stream


def format_names(container):
    """The container's names in libav: {"mov", "mp4", ...} for an mp4 file."""
    return set(container.format.name.split(","))


class Packets(NamedTuple):
    """What a clip's packets say about its frames, undecoded."""

    # of the frames to be shown, sorted; empty if the packets give no times, or one time twice
    ticks: list
    # of the key frames, sorted
    keys: list
    # ticks for which the last frame is shown; None if unknown
    interval: int | None
    tick_seconds: Fraction
    # whether the container stores frame times, and whether these are of one clock
    is_timed: bool
    has_one_clock: bool


def read_packets(path, deadline):
    """The Packets of a clip, without those that an edit list hides. Raises ValueError for a partial download."""
    ticks = []
    keys = []
    # stream index -> the tick at which its last packet ends
    stream_ends = {}
    all_have_times = True
    last_dts = -math.inf
    with open_clip(path) as container:
        stream = video_stream(container)
        names = format_names(container)
        rate = stream.average_rate or stream.guessed_rate
        interval = max(1, round(1 / (rate * stream.time_base))) if rate else None
        last_tick = -math.inf
        for packet in until(deadline, container.demux()):
            is_frame = packet.stream is stream and packet.size
            if is_frame and packet.dts is not None:
                # the clock of joined recordings may jump back
                all_have_times &= packet.dts >= last_dts
                last_dts = packet.dts
            if packet.pts is None:
                if is_frame:
                    all_have_times = False
                continue
            packet_end = packet.pts + (packet.duration or 0)
            stream_ends[packet.stream.index] = max(stream_ends.get(packet.stream.index, packet_end), packet_end)
            if is_frame and packet.is_keyframe:
                keys.append(packet.pts)
            # a broadcast that was cut begins with frames that need an earlier one
            is_decodable = keys or "mpegts" not in names
            if is_frame and is_decodable and not packet.is_discard:
                ticks.append(packet.pts)
                if packet.duration and packet.pts > last_tick:
                    last_tick = packet.pts
                    interval = packet.duration
        # decoding times, as in a Matroska file made of an avi: the decoder moves frames, and no packet says so
        are_of_decoding = stream.codec_context.has_b_frames and ticks == sorted(ticks)
        ticks.sort()
        if not all_have_times or len(set(ticks)) < len(ticks):
            ticks = []
        check_complete(container, stream, ticks, stream_ends)
        is_timed = bool(TIMED & names) and not are_of_decoding
        has_one_clock = bool(SEEKABLE & names)
        return Packets(ticks, sorted(keys), interval, stream.time_base, is_timed, has_one_clock)


def check_complete(container, stream, ticks, stream_ends):
    """Raises ValueError if a file holds less than LEAST_SHARE of what its header promises.

    The promise is the duration of the video stream, or else that of the file, which any stream may reach.
    """
    names = format_names(container)
    if not PROMISING & names or stream.index not in stream_ends:
        return
    # libav derives an avi's duration from the file size; its frame count (a tick each) is the header's
    promised_ticks = stream.frames if "avi" in names else stream.duration
    if promised_ticks:
        promised = float(promised_ticks * stream.time_base)
        first = ticks[0] if ticks else 0
        found = float((stream_ends.get(stream.index, first) - first) * stream.time_base)
    elif container.duration:
        promised = container.duration / av.time_base
        ends = [tick * container.streams[index].time_base for index, tick in stream_ends.items()]
        found = float(max(ends, default=0))
    else:
        return
    if found < LEAST_SHARE * promised:
        raise ValueError(f"incomplete: {found:.1f} s of the {promised:.1f} s that its header promises")


def until(deadline, items):
    """Yields the items until the deadline, then raises ValueError."""
    for item in items:
        if time.monotonic() > deadline:
            raise ValueError(f"not read after {READ_SECONDS} s")
        yield item


def decode(container, stream, deadline):
    """Yields the frames from here on, in display order. A damaged packet gives none: the frame before it stays."""
    decoder = stream.codec_context
    if decoder.name in ALPHA_DECODERS and {"alpha_mode", "ALPHA_MODE"} & stream.metadata.keys():
        decoder = av.CodecContext.create(ALPHA_DECODERS[decoder.name], "r")
    for packet in until(deadline, container.demux(stream)):
        try:
            frames = decoder.decode(packet)
        except av.error.InvalidDataError:
            continue
        yield from frames


def fetch(path, wanted, keys, deadline):
    """RGB arrays of the frames at the ticks `wanted`. None if the decoder does not return one of them at its tick.

    Seeks to the last key frame before a wanted frame if it is still ahead, and otherwise decodes on: the leading frames
    of an open group of pictures are decoded with the group before.
    """
    arrays = {}
    with open_clip(path) as container:
        stream = video_stream(container)
        to_rgb = UprightRGB(stream)
        is_seekable = bool(SEEKABLE & format_names(container))
        frames = decode(container, stream, deadline)
        position = keys[0] if keys else wanted[0]
        for tick in sorted(set(wanted)):
            i = int(np.searchsorted(keys, tick, side="right")) - 1
            if is_seekable and i >= 0 and keys[i] > position:
                container.seek(keys[i], stream=stream)
                frames = decode(container, stream, deadline)
            frame = next((frame for frame in frames if frame.pts is None or frame.pts >= tick), None)
            if frame is None or frame.pts != tick or frame.is_corrupt:
                return None
            position = tick
            arrays[tick] = to_rgb(frame)
    return [arrays[tick] for tick in wanted]


def decoded_times(path, packets, deadline):
    """(ticks of all frames, in display order; for each its number in decoding order). ValueError for only a part."""
    with open_clip(path) as container:
        ticks = [frame.pts for frame in decode(container, video_stream(container), deadline)]
    if not ticks:
        raise ValueError("no frame can be decoded")
    if not are_times(ticks, packets):
        # an avi stores times in decoding order; without times, the frames are taken for evenly spaced
        even_ticks = [i * (packets.interval or 1) for i in range(len(ticks))]
        ticks = packets.ticks if len(packets.ticks) == len(ticks) else even_ticks
    order = sorted(range(len(ticks)), key=ticks.__getitem__)
    if len(set(ticks)) < len(ticks):
        # where clips were joined without re-encoding, frames that come late are hidden frames of the next cut
        order = [0, *(np.flatnonzero(np.diff(np.maximum.accumulate(ticks))) + 1)]
    ticks = [ticks[i] for i in order]
    if packets.ticks:
        decoded = float((ticks[-1] - ticks[0]) * packets.tick_seconds)
        promised = float((packets.ticks[-1] - packets.ticks[0]) * packets.tick_seconds)
        if decoded < LEAST_SHARE * promised:
            raise ValueError(f"damaged: {decoded:.1f} s of {promised:.1f} s can be decoded")
    return ticks, order


def are_times(ticks, packets):
    """Whether the ticks of the decoded frames, in decoding order, say when they are shown."""
    if None in ticks:
        return False
    # guessed times must increase
    if not packets.is_timed:
        return ticks == sorted(set(ticks))
    # a damaged file may leave the decoder out of order
    if packets.has_one_clock and len(set(ticks)) == len(ticks):
        return True
    # frames share moments where clips were joined without re-encoding, or the clock starts again
    setback = (np.maximum.accumulate(ticks) - ticks).max() * packets.tick_seconds
    return len(set(ticks)) > 1 and setback < 1


def fetch_by_count(path, numbers, deadline):
    """RGB arrays of the frames with these numbers, counted from 0 in decoding order."""
    arrays = {}
    with open_clip(path) as container:
        stream = video_stream(container)
        to_rgb = UprightRGB(stream)
        for number, frame in enumerate(decode(container, stream, deadline)):
            if number in numbers:
                arrays[number] = to_rgb(frame)
            if number == max(numbers):
                break
    return [arrays[number] for number in numbers]


class UprightRGB:
    """Converts frames of one clip to (H, W, C) uint8 arrays: upright, square pixels, all of the first one's size."""

    def __init__(self, stream):
        self.aspect = stream.sample_aspect_ratio or 1
        self.reformatter = VideoReformatter()
        self.size = None

    def __call__(self, frame):
        if self.size is None:
            width = frame.width * self.aspect
            scale = min(1.0, math.sqrt(MOST_PIXELS / (width * frame.height)))
            self.size = {"width": max(1, round(width * scale)), "height": max(1, round(frame.height * scale))}
            matrix = frame.side_data.get("DISPLAYMATRIX")
            self.matrix = bytes(matrix) if matrix else None
        has_alpha = any(component.is_alpha for component in frame.format.components)
        pixel_format = "rgba" if has_alpha else "rgb24"
        # one thread: a converter with threads of its own would hang the workers that a DataLoader forks
        frame_HWC = self.reformatter.reformat(frame, **self.size, format=pixel_format, threads=1).to_ndarray()
        if has_alpha:
            frame_HWC = np.asarray(on_white(Image.fromarray(frame_HWC)))
        return upright(frame_HWC, self.matrix) if self.matrix else frame_HWC


def upright(frame_HWC, matrix):
    """The frame turned and mirrored by its display matrix: a pixel at (x, y) is shown at (a x + c y, b x + d y)."""
    a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32)[:5].tolist()
    if abs(a) + abs(d) < abs(b) + abs(c):
        frame_HWC = frame_HWC.transpose(1, 0, 2)
        a = c
        d = b
    if a < 0:
        frame_HWC = frame_HWC[:, ::-1]
    if d < 0:
        frame_HWC = frame_HWC[::-1]
    return frame_HWC


def read_with_decord(path, choose):
    """(frames, chosen) of a clip whose frames decord takes for evenly spaced."""
    n_frames, rate = run_decord(path)
    chosen = choose(range(n_frames), 1 / Fraction(rate).limit_denominator(10**6))
    return run_decord(path, chosen[0]), chosen


def run_decord(path, indices=None):
    """What decord_process returns, from a process of its own: on some damaged files decord must be killed."""
    request = json.dumps([str(path), indices])
    try:
        done = subprocess.run([sys.executable, __file__, request], capture_output=True, timeout=READ_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"decord has not read it after {READ_SECONDS} s") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(f"decord: {lines[-1] if lines else f'exit status {done.returncode}'}")
    return pickle.loads(done.stdout)


def decord_process(path, indices):
    """(number of frames, rate) of a clip, or its frames with these numbers."""
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    if indices is None:
        return len(reader), reader.get_avg_fps()
    return reader.get_batch(indices).asnumpy()


def read_folder(path, choose, fps=None):
    """The chosen stills of a folder as Shown, all of the size of the first. fps: their rate, 3 if None."""
    suffixes = ".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .avif .jp2 .ppm .pgm".split()
    visible = [file for file in Path(path).iterdir() if not file.name.startswith(".")]
    files = [file for file in visible if file.suffix.lower() in suffixes and file.is_file()]
    if not files:
        raise ValueError("no stills in this folder")
    tick_seconds = 1 / Fraction(fps or 3.0).limit_denominator(10**6)
    indices, *times = choose(range(len(files)), tick_seconds)
    files = in_order(files)
    stills = [read_picture(files[i]) for i in indices]
    size = stills[0].size
    stills = [still if still.size == size else still.resize(size, Image.Resampling.BICUBIC) for still in stills]
    return Shown(np.stack([np.asarray(still) for still in stills]), *times)


def with_picture(clip, path):
    """A clip with one more frame at the end, the picture at `path`, at the same distance as the other frames."""
    height, width = clip.frames_FHWC.shape[1:3]
    picture_HWC = np.asarray(ImageOps.pad(read_picture(path), (width, height)))
    frames_FHWC = np.concatenate([clip.frames_FHWC, picture_HWC[None]])
    n_frames = len(clip.seconds)
    next_moment = clip.seconds[-1] + clip.total / clip.fps / n_frames
    return Shown(frames_FHWC, clip.total * (1 + 1 / n_frames), clip.fps, [*clip.seconds, next_moment])


def in_order(stills):
    """The files sorted by the numbers in their names: frame_9_t3s.png is before frame_10_t4s.png.

    Raises ValueError if their order would be a guess: the names must differ in unsigned whole numbers only.
    """
    by_numbers = {}
    shapes = set()
    for still in stills:
        by_numbers[tuple(map(int, re.findall(r"\d+", still.stem)))] = still
        # of decimal places the count matters, too: 0.25 is before 0.5
        shape = re.sub(r"(?<!\d)(?<!\d[.,])(?<!^0_)(?<!\D0_)\d+", "#", still.stem)
        shapes.add(re.sub(r"\d", "0", shape) + still.suffix.lower())
    # -3 has a sign, a-3 a dash
    is_signed = re.search(r"(^|_|[^\w#])-#", shape)
    if len(shapes) > 1 or len(by_numbers) < len(stills) or is_signed:
        names = " and ".join(sorted(shapes)[:2])
        raise ValueError(f"stills without a certain order ({names}): their names must differ in whole numbers only")
    return [by_numbers[numbers] for numbers in sorted(by_numbers)]


def read_picture(path):
    """One picture as a PIL image: RGB, upright, on white where it was transparent."""
    # opening a pipe or a device would block
    if not os.path.isfile(path):
        raise ValueError("not a file")
    with Image.open(path) as image:
        # MPO: a phone's picture with its preview or depth
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise ValueError(f"{image.n_frames} pictures in one file")
        # with more than 8 bits, Pillow ignores which grey a TIFF calls white, and which one a PNG calls transparent
        tags = getattr(image, "tag_v2", {})
        bits = (image.mode, *tags.get(BITSPERSAMPLE, ()))
        is_odd = bits in (("I;16", 12), ("I", 16)) or tags.get(PHOTOMETRIC_INTERPRETATION) == 0
        if image.mode.startswith(("I", "F")) and (is_odd or "transparency" in image.info):
            raise ValueError("greys of 12 or 15 bits, with white as 0, or with transparency: save it with 8 bits")
        image = on_white(in_8_bits(ImageOps.exif_transpose(image)))
    check_sides(*image.size)
    return image


def in_8_bits(image):
    """The image, with greys of more bits and floats scaled to 8 bits. Raises ValueError if white is unknown."""
    if not image.mode.startswith(("I", "F")):
        return image
    grey_HW = np.asarray(image, dtype=np.float64)
    low = grey_HW.min()
    high = grey_HW.max()
    if image.mode.startswith("I;16"):
        white = 65535
    elif image.mode == "I":
        white = 255 if high <= 255 else 65535
    else:
        white = 1 if high <= 1 else 255
    # this way round, NaN is refused too
    if not (0 <= low and high <= white):
        raise ValueError(f"greys from {low:g} to {high:g}: it is not known which of them is white")
    return Image.fromarray((grey_HW * (255 / white) + 0.5).astype(np.uint8))


def on_white(image):
    """The image in RGB, on white where it was transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def check_sides(a, b):
    """Raises ValueError for a shape that the processors refuse."""
    if max(a, b) > 200 * min(a, b):
        raise ValueError(f"{a} x {b} pixels: a Qwen-VL takes no picture more than 200 times as long as wide")


if __name__ == "__main__":
    sys.stdout.buffer.write(pickle.dumps(decord_process(*json.loads(sys.argv[1]))))
