"""Real clips and pictures: which frames are shown, at which times and sizes, and what is named unusable.

    python tests/test_media.py          # how many files of tests/media each reader gets right (docs/frames.md)

Painted clips show their frames' numbers: the lower half holds ten vertical bars; bar b is white if bit b of the number
is 1.
"""

import functools
import gc
import json
import multiprocessing
import os
import struct
import sys
from bisect import bisect_right
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent.parent)]

import data
from support import frames, model_files, tables
from support.settings import SharedConfig
from tools import check_data

MEDIA = Path(__file__).parent / "media"
TRUTH = json.loads((MEDIA / "truth.json").read_text(encoding="utf-8"))
TURNED = ("rot90.mp4", "rot90_mpeg4.mp4")


def config(root, **values):
    return SharedConfig(data_root=str(root), **values)


def record(path, data_type="video", **values):
    return {
        "problem_id": 1,
        "problem": "?",
        "data_type": data_type,
        "problem_type": "free-form",
        "options": [],
        "solution": "<answer>x</answer>",
        "path": path,
        **values,
    }


def painted(number, height=96, width=128):
    """An (H, W, C) frame that shows its number in bars, with a red square in the top left corner."""
    frame_HWC = np.zeros((height, width, 3), dtype=np.uint8)
    frame_HWC[: height // 4, : height // 4, 0] = 255
    for bit in range(10):
        left = round(bit * width / 10)
        right = round((bit + 1) * width / 10)
        frame_HWC[height // 2 :, left:right] = 255 * (number >> bit & 1)
    return frame_HWC


def number_of(frame_HWC):
    """The painted number."""
    height, width = frame_HWC.shape[:2]
    bars = frame_HWC[height * 5 // 8 : height * 7 // 8].astype(float).mean((0, 2))
    number = 0
    for bit in range(10):
        left = int((bit + 0.3) * width / 10)
        right = int((bit + 0.7) * width / 10) + 1
        if bars[left:right].mean() > 127:
            number += 1 << bit
    return number


def on_display(times, n):
    """Indices into `times` (seconds) of the frames on display at (i + 1/2) D / n, for 25 fps: the rule itself."""
    times = [Fraction(t).limit_denominator(10**5) for t in times]
    seconds = times[-1] - times[0] + Fraction(1, 25)
    if len(times) < n:
        return list(range(len(times)))
    return [bisect_right(times, times[0] + (2 * i + 1) * seconds / (2 * n)) - 1 for i in range(n)]


def write_clip(path, ticks=range(150), rate=25, codec="libx264", options=None, container_options=None, aspect=(1, 1)):
    """A painted clip; frame i shows i and appears at ticks[i] / rate seconds. aspect: width, height of a pixel."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {"g": "24", "bf": "2", "crf": "10"})
        stream.width = 128
        stream.height = 96
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        stream.codec_context.sample_aspect_ratio = Fraction(*aspect)
        for i, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(painted(i), format="rgb24")
            frame.pts = tick
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# ------------------------------------------------------------------------------------------------- the real files


def check_real_clip(name, n, reader="exact"):
    """Assert that `n` frames of a file in tests/media are those on display; return their metadata."""
    truth = TRUTH[name]
    shown, metadata = data.load_media(record(name), config(MEDIA, max_frames=n, video_reader=reader))
    expected = on_display(truth["times"], n)
    height, width = truth["height_width"]
    if name == "sar.mp4":
        # truth.json has the stored size
        width = round(width * 64 / 45)
    assert shown.shape == (len(expected), height, width, 3)
    for frame, index in zip(shown, expected):
        # up to the first lost key frame, and where the truth counts on again, pictures are sound
        lost = name == "lost_keyframes.mp4" and index >= 110 and not 975 <= truth["numbers"][index] <= 1005
        assert lost or name in TURNED or number_of(frame) == truth["numbers"][index]
    return metadata


def check_times(times, shown, stamps, start=0):
    """Assert that each of the `shown` frames is on display at its time stamp, counted from `start`; `times` of all."""
    ends = [*times[1:], times[-1] + 0.04]
    # tolerance: containers round to milliseconds
    for i, stamp in zip(shown, stamps, strict=True):
        assert times[i] - 0.002 <= times[0] + start + stamp < ends[i] + 0.002
    assert all(a < b for a, b in pairwise(stamps))


@pytest.mark.parametrize("n", [5, 64])
@pytest.mark.parametrize("name", sorted(set(TRUTH) - {"fast_cut_60.mp4"}))
def test_real_clips_show_the_frames_on_display(name, n):
    """Guards: frames counted, not timed: out of order in cuts, 10 s off in open groups, 8 s off in uneven rates; a read
    that never returns (decord), or frames of another time in place of lost ones.
    """
    metadata = check_real_clip(name, n)
    times = TRUTH[name]["times"]
    expected = on_display(times, n)
    check_times(times, expected, metadata.timestamps)
    assert metadata.total_num_frames == len(times)
    assert 1 / metadata.sampled_fps == pytest.approx((times[-1] - times[0] + 0.04) / len(expected), rel=1e-6)


@pytest.mark.parametrize("name", TURNED)
def test_rotated_clips_are_upright(name):
    """Guards: a display matrix that is applied for one codec only, or in the wrong direction."""
    upright_HWC = data.load_media(record(name), config(MEDIA, max_frames=200))[0][0]
    with av.open(str(MEDIA / name)) as container:
        stored_HWC = next(container.decode(video=0)).to_ndarray(format="rgb24")
    # as ffmpeg and players show it: a quarter turn to the left, the red square in the lower left corner
    assert np.array_equal(upright_HWC, np.rot90(stored_HWC))
    rows, columns = np.nonzero(upright_HWC[..., 0].astype(int) - upright_HWC[..., 2] > 100)
    assert upright_HWC.shape[:2] == (128, 96) and rows.mean() > 100 and columns.mean() < 24


def test_a_partial_download_is_named():
    """Guards: 324 of 700 frames taken for the whole clip, so that "what happens at the end" is about its middle."""
    with pytest.raises(data.Unusable, match="fast_cut_60.mp4: incomplete: 13.0 s of the 28.0 s"):
        data.load_media(record("fast_cut_60.mp4"), config(MEDIA))


@pytest.mark.parametrize("reader", ["exact", "decord"])
def test_check_ends_on_a_clip_that_hangs_decord(reader, monkeypatch):
    """Guards: a worker of --check or of training that hangs on one damaged file."""
    if reader == "decord":
        monkeypatch.setattr(frames, "READ_SECONDS", 1)
    records = {7: record("lost_keyframes.mp4")}
    reasons = check_data.check_media(records, config(MEDIA, video_reader=reader, max_frames=64, num_workers=1))
    hung = {"lost_keyframes.mp4: decord has not read it after 1 s"}
    assert set(reasons.values()) <= (hung if reader == "decord" else set())


# ------------------------------------------------------------------------------------- more files of the same kinds


def edit_list_hides(path, n_frames):
    """Patches an mp4's edit list so that it hides `n_frames` more frames at the start, as a cut does."""
    content = bytearray(path.read_bytes())
    place = content.index(b"elst") + 4
    version_flags, n_entries, duration, media_time = struct.unpack_from(">IIIi", content, place)
    assert (version_flags, n_entries) == (0, 1)
    timescale = struct.unpack_from(">I", content, content.index(b"mdhd") + 4 + 12)[0]
    movie_timescale = struct.unpack_from(">I", content, content.index(b"mvhd") + 4 + 12)[0]
    struct.pack_into(
        ">Ii", content, place + 8, duration - n_frames * movie_timescale // 25, media_time + n_frames * timescale // 25
    )
    path.write_bytes(content)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("n_hidden", [17, 24, 40])
def test_frames_that_an_edit_list_hides_are_not_shown(tmp_path, n_hidden, codec):
    """Guards: hidden frames that are counted, so that all other frames are those of another time."""
    write_clip(tmp_path / "a.mp4", codec=codec, options={"g": "24", "bf": "2", "b": "2M"})
    edit_list_hides(tmp_path / "a.mp4", n_hidden)
    for n in (7, 200):
        shown, metadata = data.load_media(record("a.mp4"), config(tmp_path, max_frames=n))
        left = list(range(n_hidden, 150))
        expected = [left[i] for i in on_display([k / 25 for k in range(len(left))], n)]
        assert [number_of(frame) for frame in shown] == expected
        assert metadata.sampled_fps == pytest.approx(len(expected) / (len(left) / 25))


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("a.mp4", "libx264", {"x264-params": "open-gop=1:keyint=24:min-keyint=24:bframes=3:scenecut=0"}),
        ("a.mkv", "libx264", {"x264-params": "open-gop=1:keyint=24:min-keyint=24:bframes=3:scenecut=0"}),
        ("a.mp4", "libx265", {"x265-params": "keyint=24:min-keyint=24:bframes=3:scenecut=0:log-level=none"}),
        ("a.ts", "libx264", {"g": "24", "bf": "2"}),
        ("a.flv", "libx264", {"g": "24", "bf": "2"}),
        ("a.avi", "mpeg4", {"g": "24", "bf": "2", "b": "2M"}),
        ("a.mkv", "mpeg4", {"g": "24", "bf": "2", "b": "2M"}),
        ("a.mov", "mjpeg", {"qmin": "2", "qmax": "2"}),
        ("a.webm", "libvpx", {"g": "24", "auto-alt-ref": "1", "lag-in-frames": "10", "b": "2M"}),
        ("a.mpg", "mpeg2video", {"g": "12", "bf": "2", "b": "4M"}),
        ("a.nut", "libx264", {"g": "24", "bf": "2"}),
        ("a.wmv", "wmv2", {"g": "12", "b": "4M"}),
        ("a.h264", "libx264", {"g": "24", "bf": "2"}),
    ],
)
def test_containers_and_codecs_show_the_frames_asked_for(tmp_path, name, codec, options):
    """Guards: leading frames of an open group decoded after a seek; decoding order; packets without a frame."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    write_clip(tmp_path / name, codec=codec, options=options)
    for n in (6, 150):
        shown, _ = data.load_media(record(name), config(tmp_path, max_frames=n))
        assert [number_of(frame) for frame in shown] == [int((i + 0.5) * 150 / n) for i in range(n)], n


UNEVEN = [*range(0, 300, 6), *range(300, 350)]


@pytest.mark.parametrize(
    "name, ticks, options",
    [
        ("a.mp4", UNEVEN, {}),
        ("a.mkv", UNEVEN, {}),
        ("a.webm", UNEVEN, {}),
        ("a.mp4", [t + 50 for t in range(100)], {}),
        ("a.mkv", [t + 50 for t in UNEVEN], {}),
        ("a.webm", range(100), {"live": "1"}),
        ("a.mkv", UNEVEN, {"live": "1"}),
        ("a.ts", UNEVEN, {}),
        ("a.mp4", UNEVEN, {"movflags": "frag_keyframe+empty_moov"}),
        ("a.mp4", [0, 1, 2, 200], {}),
        ("a.mp4", [0, 1, 3, 4, 5, 8, 9, 100], {}),
    ],
)
def test_frames_are_chosen_by_time_not_by_count(tmp_path, name, ticks, options):
    """Guards: an uneven webm read as 25 fps; a late start that shifts all frames; a file without a duration refused."""
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    write_clip(tmp_path / name, list(ticks), codec=codec, container_options=options)
    times = [t / 25 for t in ticks]
    for n in (5, 16):
        shown, metadata = data.load_media(record(name), config(tmp_path, max_frames=n))
        expected = on_display(times, n)
        assert [number_of(frame) for frame in shown] == expected
        check_times(times, expected, metadata.timestamps)
        seconds = times[-1] - times[0] + 0.04
        assert 1 / metadata.sampled_fps == pytest.approx(seconds / len(expected), rel=1e-3)


@pytest.mark.parametrize("rate", [24, 60])
def test_rounded_times_of_an_even_clip_change_no_frame(tmp_path, rate):
    """Guards: Matroska's whole milliseconds, which put a frame 0.3 ms after its moment."""
    write_clip(tmp_path / "a.mkv", range(120), rate=rate)
    for n in (8, 15, 60):
        shown, metadata = data.load_media(record("a.mkv"), config(tmp_path, max_frames=n))
        expected = [int((i + 0.5) * 120 / n) for i in range(n)]
        assert [number_of(frame) for frame in shown] == expected
        assert metadata.timestamps == pytest.approx([i / rate for i in expected], abs=0.002)
        assert metadata.sampled_fps == pytest.approx(n * rate / 120, rel=0.01)


@pytest.mark.parametrize(
    "ticks, part, n, expected, distance",
    [
        (range(150), (1, 3), 4, [31, 43, 56, 68], 0.5),
        (range(150), (0, 1000), 4, [18, 56, 93, 131], 1.5),
        (range(150), (5, 5.2), 16, [125, 126, 127, 128, 129], 0.04),
        (range(150), (2, 2), 4, [50], None),
        (range(150), (6.5, 200), 4, [149], None),
        (range(150), (0.3, 0.7), 3, [9, 12, 15], 0.4 / 3),
        (UNEVEN, (11, 13), 4, [46, 48, 56, 68], 0.5),
    ],
)
def test_start_and_end_are_seconds(tmp_path, ticks, part, n, expected, distance):
    """Guards: the whole clip for its part; a part counted at the mean rate; frames before it because 0.3 is rounded."""
    write_clip(tmp_path / "a.mkv", ticks)
    shown, metadata = data.load_media(record("a.mkv", start=part[0], end=part[1]), config(tmp_path, max_frames=n))
    assert [number_of(frame) for frame in shown] == expected
    if len(expected) > 1:
        check_times([tick / 25 for tick in ticks], expected, metadata.timestamps, part[0])
    assert distance is None or 1 / metadata.sampled_fps == pytest.approx(distance)


def matrix(a, b, c, d):
    one = 1 << 16
    return (a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize(
    "abcd, turn",
    [
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
        ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
        ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
        ((1, 0, 0, -1), lambda x: x[::-1]),
        ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    ],
)
def test_the_display_matrix_rotates_and_mirrors(tmp_path, codec, abcd, turn):
    """Guards: clips of phones on their side; a mirrored selfie in which left is right."""
    write_clip(tmp_path / "a.mp4", range(3), codec=codec)
    stored = data.load_media(record("a.mp4"), config(tmp_path))[0]
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    # tkhd: the matrix is 40 bytes after the version of a version 0 box
    struct.pack_into(">9i", content, content.index(b"tkhd") + 4 + 40, *matrix(*abcd))
    (tmp_path / "a.mp4").write_bytes(content)
    shown = data.load_media(record("a.mp4"), config(tmp_path))[0]
    assert np.array_equal(shown[1], turn(stored[1]))


@pytest.mark.parametrize("aspect, width", [((64, 45), 182), ((8, 9), 114), ((1, 1), 128)])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_pixels_are_made_square(tmp_path, aspect, width, codec):
    """Guards: people squashed or stretched in clips from television and DVD."""
    write_clip(tmp_path / "a.mp4", range(20), codec=codec, aspect=aspect)
    shown, _ = data.load_media(record("a.mp4"), config(tmp_path, max_frames=4))
    assert shown.shape[1:3] == (96, width) and [number_of(frame) for frame in shown] == [2, 7, 12, 17]


@pytest.mark.parametrize(
    "name, zeros", [("a.mp4", False), ("a.mkv", False), ("a.avi", False), ("a.flv", False), ("a.mp4", True)]
)
def test_half_a_download_is_refused_and_97_percent_is_read(tmp_path, name, zeros):
    """Guards: the first half of a clip, or one whose rest was never written, taken for the whole."""
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    options = {"movflags": "faststart"} if name.endswith("mp4") else {}
    write_clip(tmp_path / name, range(300), codec=codec, container_options=options)
    content = (tmp_path / name).read_bytes()
    for share in (0.5, 0.8):
        kept = content[: int(len(content) * share)]
        (tmp_path / name).write_bytes(kept + bytes(len(content) - len(kept)) if zeros else kept)
        with pytest.raises(data.Unusable, match="incomplete: |damaged: "):
            data.load_media(record(name), config(tmp_path))
    if not zeros:
        (tmp_path / name).write_bytes(content[: int(len(content) * 0.97)])
        assert len(data.load_media(record(name), config(tmp_path, max_frames=8))[0]) == 8


def mux_silence(container, sound, n_frames):
    """Writes silent audio to the end of the stream `sound`."""
    for _ in range(n_frames):
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        samples.sample_rate = 8000
        container.mux(sound.encode(samples))
    container.mux(sound.encode())


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_clip_whose_sound_is_longer_is_complete(tmp_path, name):
    """Guards: whole clips called incomplete because their sound is longer."""
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = 128
        stream.height = 96
        stream.pix_fmt = "yuv420p"
        sound = container.add_stream("aac", rate=8000, layout="mono")
        for i in range(50):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(painted(i), format="rgb24")))
        container.mux(stream.encode())
        mux_silence(container, sound, 40)
    shown, metadata = data.load_media(record(name), config(tmp_path, max_frames=5))
    assert [number_of(frame) for frame in shown] == [5, 15, 25, 35, 45]
    assert metadata.sampled_fps == pytest.approx(2.5)


def test_the_cover_of_an_audio_file_is_not_a_clip(tmp_path):
    """Guards: a song with a cover picture read as a clip of one frame."""
    with av.open(str(tmp_path / "a.mka"), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width = 64
        cover.height = 64
        cover.pix_fmt = "yuvj420p"
        cover.disposition = Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(painted(1, 64, 64), format="rgb24")))
        mux_silence(container, sound, 1)
        container.mux(cover.encode())
    assert av.open(str(tmp_path / "a.mka")).streams.video
    with pytest.raises(data.Unusable, match="no video in this file"):
        data.load_media(record("a.mka"), config(tmp_path))


def test_seeks_skip_decoding_and_nothing_is_decoded_twice(tmp_path, monkeypatch):
    """Guards: the whole clip decoded for four frames; a seek per frame that decodes each group again and again."""
    counted = []
    decode = frames.decode

    def counting_decode(*arguments):
        for frame in decode(*arguments):
            counted.append(frame.pts)
            yield frame

    monkeypatch.setattr(frames, "decode", counting_decode)
    write_clip(tmp_path / "a.mp4", range(600), options={"g": "30", "bf": "2", "sc_threshold": "0"})
    for n, most in ((4, 4 * 34), (600, 600)):
        counted.clear()
        assert len(data.load_media(record("a.mp4"), config(tmp_path, max_frames=n))[0]) == n
        assert n <= len(counted) <= most


def test_a_pipe_is_named_at_once(tmp_path):
    """Guards: a read of a pipe or a device that blocks forever."""
    os.mkfifo(tmp_path / "pipe.mp4")
    for data_type in ("video", "image"):
        with pytest.raises(data.Unusable, match="pipe.mp4: not a file"):
            data.load_media(record("pipe.mp4", data_type), config(tmp_path))


def test_playlists_are_not_clips(tmp_path):
    """Guards: a live stream's playlist that blocks forever; a clip other than the one that the record names."""
    write_clip(tmp_path / "a.ts", range(10))
    (tmp_path / "a.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:24\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:24,\na.ts\n")
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile a.ts\n")
    for name in ("a.m3u8", "a.mp4"):
        with pytest.raises(data.Unusable, match="a playlist, not a clip"):
            data.load_media(record(name), config(tmp_path))


def test_reading_stops_at_the_deadline(tmp_path, monkeypatch):
    """Guards: a file that decodes for hours."""
    write_clip(tmp_path / "a.mp4", range(10))
    monkeypatch.setattr(frames, "READ_SECONDS", -1)
    with pytest.raises(data.Unusable, match="a.mp4: not read after -1 s"):
        data.load_media(record("a.mp4"), config(tmp_path))
    with pytest.raises(data.Unusable, match="decord has not read it after -1 s"):
        data.load_media(record("a.mp4"), config(tmp_path, video_reader="decord"))


def test_a_reader_in_the_parent_does_not_hang_its_forked_workers(tmp_path):
    """Guards: a converter with threads that the garbage collector waits for in a forked DataLoader worker."""
    write_clip(tmp_path / "a.mp4", range(10))
    gc.disable()
    try:
        frames.read_clip(tmp_path / "a.mp4", functools.partial(data.even_frames, n=4))
        worker = multiprocessing.get_context("fork").Process(target=gc.collect)
        worker.start()
        worker.join(10)
        alive = worker.is_alive()
        worker.kill()
        assert not alive
    finally:
        gc.enable()


def test_the_decord_reader_returns_decords_frames(tmp_path):
    """Guards: a reader setting without effect; other frames than decord's own."""
    import decord

    write_clip(tmp_path / "a.mp4", options={"x264-params": "open-gop=1:keyint=24:min-keyint=24:bframes=3:scenecut=0"})
    shown, metadata = data.load_media(record("a.mp4"), config(tmp_path, max_frames=8, video_reader="decord"))
    expected = [int((i + 0.5) * 150 / 8) for i in range(8)]
    assert metadata.timestamps == pytest.approx([i / 25 for i in expected])
    assert metadata.sampled_fps == pytest.approx(8 / 6)
    decords = decord.VideoReader(str(tmp_path / "a.mp4"), num_threads=1)
    assert np.array_equal(shown, decords.get_batch(expected).asnumpy())


def test_the_processor_derives_the_true_distance_between_frames(tmp_path, world):
    """Guards: a rate rounded or guessed on the way to M-RoPE, so that its clock disagrees with the clip."""
    write_clip(tmp_path / "even.mp4")
    write_clip(tmp_path / "uneven.mp4", UNEVEN)
    write_clip(tmp_path / "few.mp4", range(6))
    (tmp_path / "stills").mkdir()
    for i in range(12):
        Image.fromarray(painted(i)).save(tmp_path / f"stills/{i}.png")
    cases = [
        (record("even.mp4"), 6 / 8),
        (record("uneven.mp4"), 14 / 8),
        (record("few.mp4"), 0.04),
        (record("even.mp4", start=1, end=3), 2 / 8),
        (record("stills", "frame"), 4 / 8),
        (record("stills", "frame", fps=2), 6 / 8),
        (record("stills", "frame", start=1, end=3), 1 / 3),
        (record("even.mp4", image_path="stills/0.png"), 6 / 7),
        (record("even.mp4", last_frame=True), 6 / 8),
    ]
    limits = {"max_frames": 8, "min_pixels": 784, "max_pixels": 3136}
    cfg = config(tmp_path, model=str(world / "base"), prompt="{problem}", **limits)
    processor = model_files.load_processor(cfg)
    for row, distance in cases:
        inputs = data.encode(processor, row, *data.load_media(row, cfg), cfg)
        # of two frames in a temporal patch each
        assert inputs["second_per_grid_ts"].tolist() == pytest.approx([2 * distance], rel=1e-5), row


# -------------------------------------------------------------------------------------------------- pictures and stills


def ramp(dtype, high):
    return np.linspace(0, high, 64).astype(dtype)[None].repeat(32, 0)


@pytest.mark.parametrize(
    "name, dtype, high",
    [
        ("a.png", np.uint16, 65535),
        ("a.tif", np.uint16, 65535),
        ("a.tif", np.float32, 1),
        ("a.tif", np.float32, 255),
        ("a.tif", np.int32, 65535),
        ("a.tif", np.int32, 255),
        ("a.png", np.uint8, 255),
    ],
)
def test_greys_of_any_depth_are_scaled(tmp_path, name, dtype, high):
    """Guards: greys of 16 bits or floats clipped at 255 or read as black."""
    Image.fromarray(ramp(dtype, high)).save(tmp_path / name)
    pixels = np.asarray(data.load_media(record(name, "image"), config(tmp_path))[0])[0, :, 0].astype(int)
    assert np.abs(pixels - np.linspace(0, 255, 64)).max() <= 1


@pytest.mark.parametrize(
    "values",
    [ramp(np.float32, 1e6), ramp(np.float32, -1), np.full((32, 64), np.nan, np.float32), ramp(np.int32, 10**6)],
)
def test_greys_of_an_unknown_range_are_named(tmp_path, values):
    """Guards: a depth map that becomes a white picture."""
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(data.Unusable, match="it is not known which of them is white"):
        data.load_media(record("a.tif", "image"), config(tmp_path))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "RGB", "L", "1"])
def test_transparency_is_pasted_on_white(tmp_path, mode):
    """Guards: black writing on a transparent background that turns black, for each way a PNG can be transparent."""
    drawing = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (10, 10, 30, 30))
    options = {}
    if mode in ("RGB", "L", "1"):
        # one colour is the transparent one; the writing is grey here
        image = Image.new(mode, (40, 40))
        image.paste({"RGB": (9, 9, 9), "L": 9, "1": 1}[mode], (10, 10, 30, 30))
        options = {"transparency": {"RGB": (0, 0, 0), "L": 0, "1": 0}[mode]}
        dark = 255 if mode == "1" else 9
    else:
        image = drawing.quantize(4) if mode == "P" else drawing.convert(mode)
        dark = 0
    # a PNG cannot hold a palette with alpha
    name = "a.tif" if mode == "PA" else "a.png"
    image.save(tmp_path / name, **options)
    pixels = np.asarray(data.load_media(record(name, "image"), config(tmp_path))[0])
    assert pixels[0, 0].tolist() == [255] * 3 and pixels[20, 20].tolist() == [dark] * 3


def test_stills_are_in_natural_order_without_hidden_files(tmp_path):
    """Guards: frame 10 before frame 9; a name's time joined to its frame number; a Mac's ._003.png that ends it."""
    for i in (9, 10, 11, 100):
        Image.fromarray(painted(i)).save(tmp_path / f"frame_{i}_t{i // 3}s.png")
    for name in ("._frame_9_t3s.png", ".hidden.png", "Thumbs.db", "notes.txt"):
        (tmp_path / name).write_bytes(b"no picture")
    (tmp_path / "folder.png").mkdir()
    shown, metadata = data.load_media(record(".", "frame"), config(tmp_path))
    assert [number_of(frame) for frame in shown] == [9, 10, 11, 100] and metadata.fps == 3
    assert data.load_media(record(".", "frame", fps=0.5), config(tmp_path))[1].sampled_fps == pytest.approx(0.5)


def test_stills_of_unequal_size_get_the_size_of_the_first(tmp_path):
    """Guards: one odd still that makes its whole folder unusable."""
    for i, size in enumerate([(96, 128), (48, 64), (200, 120)]):
        Image.fromarray(painted(i, *size)).save(tmp_path / f"{i}.png")
    shown, _ = data.load_media(record(".", "frame"), config(tmp_path))
    assert shown.shape == (3, 96, 128, 3) and [number_of(frame) for frame in shown] == [0, 1, 2]


def test_huge_frames_are_shrunk_while_decoding(tmp_path, monkeypatch):
    """Guards: a worker that holds 16 frames of 8K (1.6 GB), of which the model sees a hundredth of the pixels."""
    write_clip(tmp_path / "clip.mp4", range(8))
    choose = functools.partial(data.even_frames, n=4)
    whole = frames.read_clip(tmp_path / "clip.mp4", choose).frames_FHWC
    monkeypatch.setattr(frames, "MOST_PIXELS", 128 * 96 // 4)
    shrunk = frames.read_clip(tmp_path / "clip.mp4", choose).frames_FHWC
    assert whole.shape == (4, 96, 128, 3) and shrunk.shape == (4, 48, 64, 3)
    assert abs(whole.mean((1, 2, 3)) - shrunk.mean((1, 2, 3))).max() < 3


def is_right(name, reader):
    """Whether 16 frames of a file in tests/media are right, or a part of a download is named."""
    try:
        check_real_clip(name, 16, reader)
    except AssertionError:
        return False
    except data.Unusable as error:
        return "incomplete" in str(error) and name == "fast_cut_60.mp4"
    return name != "fast_cut_60.mp4"


if __name__ == "__main__":
    frames.READ_SECONDS = 20
    readers = ("exact", "decord")
    verdicts = [[name, *(is_right(name, reader) for reader in readers)] for name in TRUTH]
    totals = [f"{len(TRUTH)} files", *(sum(column) for column in list(zip(*verdicts))[1:])]
    print(tables.table(["right", *readers], [*verdicts, totals]))
