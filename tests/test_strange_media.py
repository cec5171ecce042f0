"""Media and records as strangers have them (issue 27): shown as they are, or named in one line."""

import functools
import struct
import unicodedata
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from test_media import config, edit_list_hides, number_of, on_display, painted, ramp, record, write_clip

import data
from support import frames

DOUBTFUL = """
t_0.0.png t_0.25.png t_0.5.png | 0_25s.png 0_5s.png | -1.png 0.png | -2.png -1.png | t_-2.png t_-1.png | 09.png 0a.png
| 1.png thumb.jpg | 00000.jpg 00000.png | 0.color.jpg 0.depth.png | 1.png 01.png | 0.png 0(1).png | a.png b.png
"""
CERTAIN = """
01.png 02.png 10.png | 1.png 2.png 10.png | frame_9_t3s.png frame_10_t4s.png frame_100_t33s.png
| t_0.9.png t_1.0.png t_10.1.png | 00-59-59.png 01-00-00.png | a-001.PNG a-002.png | _9.png _10.png | only.png
"""


def write_stills(folder, names):
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(painted(i)).save(folder / name)


@pytest.mark.parametrize("names", DOUBTFUL.split("|"))
def test_stills_whose_order_would_be_a_guess_are_named(tmp_path, names):
    """Guards: frames "in order" that are out of order, to a method about order; masks among the colours."""
    write_stills(tmp_path / "stills", names.split())
    with pytest.raises(data.Unusable, match="stills: stills without a certain order (.*): their names must"):
        data.load_media(record("stills", "frame"), config(tmp_path))


@pytest.mark.parametrize("names", CERTAIN.split("|"))
def test_stills_with_a_certain_order_are_shown_in_it(tmp_path, names):
    """Guards: a rule against doubtful names that refuses sound ones."""
    write_stills(tmp_path / "stills", names.split())
    shown, _ = data.load_media(record("stills", "frame"), config(tmp_path))
    assert [number_of(frame) for frame in shown] == list(range(len(names.split())))


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libvpx"])
def test_transparency_in_webm_is_pasted_on_white(tmp_path, codec):
    """Guards: a black drawing on a transparent background, of which nothing is visible."""
    with av.open(str(tmp_path / "a.webm"), "w") as container:
        stream = container.add_stream(codec, rate=5, options={"auto-alt-ref": "0"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuva420p"
        stream.metadata["alpha_mode"] = "1"
        for i in range(8):
            drawing = np.zeros((64, 64, 4), np.uint8)
            drawing[8 * i : 8 * i + 8, :, 3] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(drawing, format="rgba")))
        container.mux(stream.encode())
    shown = frames.read_clip(tmp_path / "a.webm", functools.partial(data.even_frames, n=4)).frames_FHWC
    assert [frame.mean((1, 2)).argmin() // 8 for frame in shown] == [1, 3, 5, 7] and shown.max() > 250


def test_a_stream_without_packets_is_not_the_clip(tmp_path):
    """Guards: a whole file called incomplete, because its first video stream is empty."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        streams = [container.add_stream("mpeg4", rate=25) for _ in range(2)]
        for stream in streams:
            stream.width = 128
            stream.height = 96
            stream.pix_fmt = "yuv420p"
        for i in range(4):
            container.mux(streams[1].encode(av.VideoFrame.from_ndarray(painted(i), format="rgb24")))
        container.mux(streams[1].encode())
    assert len(data.load_media(record("a.mkv"), config(tmp_path))[0]) == 4


@pytest.mark.parametrize("name, step", [("a.mkv", 0), ("a.flv", 0), ("a.mp4", 1)])
@pytest.mark.parametrize("bframes", ["0", "2"])
def test_joined_clips_are_shown_by_time(tmp_path, name, step, bframes):
    """Guards: hidden frames of a cut that all share one moment after a join without re-encoding, but are counted as if
    each was shown for as long as the others.
    """
    write_clip(tmp_path / "part.mp4", range(22), options={"g": "24", "bf": bframes, "crf": "10", "sc_threshold": "0"})
    edit_list_hides(tmp_path / "part.mp4", 17)
    (tmp_path / "list.txt").write_text("ffconcat version 1.0\nfile part.mp4\nfile part.mp4\n")
    with av.open(str(tmp_path / "list.txt"), format="concat") as parts, av.open(str(tmp_path / name), "w") as joined:
        source = parts.streams.video[0]
        target = joined.add_stream_from_template(source)
        last = -(2**60)
        for packet in parts.demux(source):
            if packet.dts is None:
                continue
            # as `ffmpeg -f concat -c copy` makes decoding times increase
            if packet.dts < last + step:
                packet.pts = max(packet.pts, last + step)
                packet.dts = last + step
            last = packet.dts
            packet.stream = target
            joined.mux(packet)
    shown, _ = data.load_media(record(name), config(tmp_path, max_frames=9))
    # only mp4 stores the edit list of the first part
    seen = [*range(17 if name == "a.mp4" else 0, 22), *range(17, 22)]
    assert [number_of(frame) for frame in shown] == [seen[int((i + 0.5) * len(seen) / 9)] for i in range(9)]


@pytest.mark.parametrize("codec, bframes", [("libx264", "2"), ("libx264", "0"), ("mpeg4", "2")])
def test_an_avi_that_leaves_out_frames_is_shown_by_time(tmp_path, codec, bframes):
    """Guards: "damaged: 4.0 s of 9.6 s can be decoded" for H.264 with B-frames, whose decoder gives times out of order;
    moments that are counted in frames.
    """
    ticks = [*range(0, 100, 3), *range(100, 240)]
    write_clip(tmp_path / "a.avi", ticks, codec=codec, options={"g": "24", "bf": bframes, "b": "2M"})
    shown, metadata = data.load_media(record("a.avi"), config(tmp_path, max_frames=5))
    expected = on_display([tick / 25 for tick in ticks], 5)
    # an avi stores the times of packets, which are some frames early
    assert np.abs(np.subtract([number_of(frame) for frame in shown], expected)).max() <= 2
    assert metadata.timestamps == pytest.approx([ticks[i] / 25 for i in expected], abs=0.13)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.ts"])
def test_decoding_times_are_not_taken_for_the_frames_own(tmp_path, name):
    """Guards: frames out of order (0, 1, 3, 2, 4, 7, 5, 6), in a file made of an avi with B-frames."""
    write_clip(tmp_path / "timed.mp4", range(60), options={"bf": "3", "crf": "10"})
    with av.open(str(tmp_path / "timed.mp4")) as source, av.open(str(tmp_path / name), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        first = packets[0].dts
        for packet in packets:
            packet.pts = packet.dts = packet.dts - first
            packet.stream = stream
            copy.mux(packet)
    for n in (6, 60):
        shown, _ = data.load_media(record(name), config(tmp_path, max_frames=n))
        assert [number_of(frame) for frame in shown] == [int((i + 0.5) * 60 / n) for i in range(n)]


def test_a_still_recording_is_told_as_such(tmp_path):
    """Guards: "its clock jumps" for a recorded screen on which nothing moves for a minute."""
    write_clip(tmp_path / "a.mkv", [0, 1, *range(2000, 2040)])
    with pytest.raises(data.Unusable, match="jumps, or hardly anything moves: one of 42 frames .* all 16 moments"):
        data.load_media(record("a.mkv"), config(tmp_path))
    assert number_of(data.load_media(record("a.mkv"), config(tmp_path, max_frames=64))[0][-1]) == 41


@pytest.mark.parametrize("second_start", [100, 101, 60, 20])
def test_a_clock_that_jumps_back_neither_loses_nor_moves_frames(tmp_path, second_start):
    """Guards: the first of two segments that disappears, because its frames share their moments with the second's; the
    second that is shown first, or frame by frame between those of the first.
    """
    write_clip(tmp_path / "first.ts", range(100, 150))
    write_clip(tmp_path / "second.ts", range(second_start, second_start + 50))
    joined = (tmp_path / "first.ts").read_bytes() + (tmp_path / "second.ts").read_bytes()
    (tmp_path / "a.ts").write_bytes(joined)
    shown, _ = data.load_media(record("a.ts"), config(tmp_path, max_frames=4))
    assert [number_of(frame) for frame in shown] == [12, 37, 12, 37]


def test_a_broadcast_cut_inside_a_group_begins_at_its_first_key_frame(tmp_path):
    """Guards: moments counted from frames that no player can show, seconds off and others for each number of frames."""
    write_clip(tmp_path / "whole.ts", range(100), options={"g": "40", "bf": "0", "sc_threshold": "0"})
    content = (tmp_path / "whole.ts").read_bytes()
    # without the packets of the first key frame
    (tmp_path / "cut.ts").write_bytes(content[188 * 20 :])
    for n in (1, 3):
        shown, _ = data.load_media(record("cut.ts"), config(tmp_path, max_frames=n))
        assert [number_of(frame) for frame in shown] == [40 + int((i + 0.5) * 60 / n) for i in range(n)]


def test_a_rate_that_changes_by_a_millisecond_is_not_even(tmp_path):
    """Guards: frames chosen by number, seconds off, because no two distances differ by more than the clock's tick."""
    ticks = [*range(0, 10_000, 10), *range(10_000, 21_000, 11)]
    assert not frames.evenly_spaced(ticks) and frames.evenly_spaced([round(i * 1000 / 60) for i in range(600)])
    assert ticks[data.even_frames(ticks, Fraction(1, 1000), 1)[0][0]] == 10_495


@pytest.mark.parametrize("data_type", ["video", "frame"])
def test_a_part_behind_the_end_is_named(tmp_path, data_type):
    """Guards: times in milliseconds or frame numbers, for which the last frame is shown."""
    path = "a.mp4" if data_type == "video" else "stills"
    write_clip(tmp_path / "a.mp4", range(50))
    write_stills(tmp_path / "stills", [f"{i}.png" for i in range(6)])
    for start in (100, 3.1):
        with pytest.raises(data.Unusable, match=rf"start {start} is after the end of the clip \(2.0 s\)"):
            data.load_media(record(path, data_type, start=start, end=200), config(tmp_path))
    # benchmarks round times
    shown, _ = data.load_media(record(path, data_type, start=2.9, end=4), config(tmp_path))
    assert [number_of(frame) for frame in shown] == [49 if data_type == "video" else 5]


def write_tiff(path, packed, bits, photometric, sample_format=1):
    """An uncompressed grey TIFF of 64 x 32 pixels from its packed bytes."""
    values = {256: 64, 257: 32, 258: bits, 259: 1, 262: photometric, 273: 134, 277: 1, 278: 32, 279: len(packed)}
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in (values | {339: sample_format}).items())
    path.write_bytes(struct.pack("<2sHIH", b"II", 42, 8, 10) + tags + bytes(4) + packed)


@pytest.mark.parametrize(
    "bits, photometric, sample_format, greys",
    [
        (16, 0, 1, ramp(np.uint16, 65535)),
        (32, 0, 3, ramp(np.float32, 1)),
        (16, 1, 2, ramp(np.int16, 32767)),
        (12, 1, 1, np.full((32, 48), 255, np.uint16)),
        (8, 0, 1, ramp(np.uint8, 255)),
        (16, 1, 1, ramp(np.uint16, 65535)),
    ],
)
def test_greys_whose_white_pillow_ignores_are_named(tmp_path, bits, photometric, sample_format, greys):
    """Guards: a negative, or a picture that is half or 16 times too dark, for a TIFF of more than 8 bits."""
    write_tiff(tmp_path / "a.tif", greys.tobytes(), bits, photometric, sample_format)
    if (photometric, bits) == (0, 8) or (photometric, bits, sample_format) == (1, 16, 1):
        pixels = np.asarray(data.load_media(record("a.tif", "image"), config(tmp_path))[0])[0, :, 0].astype(int)
        assert np.abs(pixels - np.linspace(0, 255, 64)[:: 1 if photometric else -1]).max() <= 1
        return
    with pytest.raises(data.Unusable, match="a.tif: greys of 12 or 15 bits, with white as 0"):
        data.load_media(record("a.tif", "image"), config(tmp_path))


def test_a_transparent_grey_of_16_bits_is_named(tmp_path):
    """Guards: a black ground where the drawing was transparent."""
    Image.fromarray(ramp(np.uint16, 65535)).save(tmp_path / "a.png", transparency=0)
    with pytest.raises(data.Unusable, match="a.png: greys of .* or with transparency: save it with 8 bits"):
        data.load_media(record("a.png", "image"), config(tmp_path))


# ------------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    "meant, path",
    [
        ("stills/0.png", "stills\\0.png"),
        ("stills/0.png", "stills/0.png "),
        ("stills/0.png", "Stills/0.PNG"),
        ("stills/A0.png", "stills/A0.PNG"),
        ("caf\xe9/0.png", unicodedata.normalize("NFD", "caf\xe9/0.png")),
    ],
)
def test_a_missing_file_names_the_one_that_is_meant(tmp_path, meant, path):
    """Guards: "no such file", for a name that looks like the existing one's."""
    write_stills((tmp_path / meant).parent, [Path(meant).name])
    with pytest.raises(data.Unusable) as error:
        data.load_media(record(path, "image"), config(tmp_path))
    assert str(error.value) == f"{path}: no such file; did you mean {meant!a}?"


@pytest.mark.parametrize(
    "path, line",
    [("page.mp4", "it begins with b'<!DOCTYPE html>'"), ("data:image/png;base64," + "A" * 66_000, "no such file")],
)
def test_no_message_is_a_librarys_or_endless(tmp_path, path, line):
    """Guards: "[Errno 1094995529] Invalid data"; 66 kB per line for a picture inside the record."""
    (tmp_path / "page.mp4").write_text("<!DOCTYPE html><title>Sign in</title>")
    with pytest.raises(data.Unusable, match=line) as error:
        data.load_media(record(path), config(tmp_path))
    assert len(str(error.value)) < 450
