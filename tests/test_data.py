"""Records, frames, shuffling, prompts: hostile files get a name and a reason, never a replacement."""

import json
import random
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data
from support import record_files
from support.settings import SharedConfig, UserError
from support.storage import read_jsonl
from tools import check_data

GOOD = {
    "problem_id": 1,
    "problem": "Which way?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. left", "B. right"],
    "solution": "<answer>B</answer>",
    "process": "<think>It does.</think>",
    "path": "./clip.mp4",
    "data_source": "test",
}


def write_video(
    path, n_frames, fps=4, size=(56, 56), codec="libx264", options=(("crf", "5"),), brighter=20, **container_options
):
    """Frame i is a grey of brightness 10 + 20 i, so that a read frame tells its number."""
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=dict(options))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(n_frames):
            frame = np.full((size[1], size[0], 3), min(10 + brighter * i, 250), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def config(root, **settings):
    return SharedConfig(data_root=str(root), **settings)


def numbers(frames):
    return [round((float(f.mean()) - 10) / 20) for f in frames]


# --------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize(
    "change, message",
    [
        ({"problem_type": "maths"}, "problem_type: expected one of"),
        ({"data_type": "audio"}, "data_type: expected one of video, image, frame, got 'audio'"),
        ({"options": []}, "options: a multiple choice question without options"),
        ({"options": "A. left"}, "options: expected a list"),
        ({"solution": "<answer>C</answer>"}, "solution:"),
        ({"solution": "<answer>B"}, "solution:"),
        ({"solution": True}, "solution: expected"),
        ({"solution": 2}, "solution:"),
        ({"solution": float("nan"), "problem_type": "regression"}, "solution:"),
        ({"start": 4, "end": 2}, "start, end: 4 to 2 is no part of a clip"),
        ({"start": -1, "end": -1}, "start, end: -1 to -1 is no part of a clip"),
        ({"start": 0, "end": 0}, "start, end: 0 to 0 is no part of a clip"),
        ({"start": 4}, "start, end: expected two numbers"),
        ({"start": float("nan"), "end": 2}, "start, end: expected two"),
        ({"data_type": "frame", "fps": 0}, "fps: expected"),
        ({"problem": " <video>\n"}, "problem: missing"),
        (
            {"solution": "about 4 s", "problem_type": "numerical"},
            "solution: not a number: 'about 4 s'; write digits",
        ),
        (
            {"solution": "3,5", "problem_type": "regression"},
            "solution: not a number: '3,5'; write digits, as in 3.5",
        ),
        ({"solution": "yes"}, "solution: not one option's letter: 'yes'; write one letter, as in B"),
        ({"path": "../../secret.mp4"}, "path: leaves the data root"),
        ({"path": "/etc/x"}, "path: leaves the data root {}: '/etc/x'; data_root must be above all media"),
        ({"path": ""}, "path: missing"),
        ({"problem": None}, "problem: missing"),
        ({"process": " "}, "process: missing"),
        ({"problem_id": [1]}, "problem_id: expected text"),
        ({"problem": "What is <|video_pad|> for?"}, "problem: holds <|video_pad|>"),
        ({"options": ["A. <|im_end|>", "B. right"]}, "options: holds <|im_end|>"),
        ({"process": "<think><|image_pad|></think>"}, "process: holds <|image_pad|>"),
        ({"note": "half \ud800"}, "half of a surrogate pair"),
    ],
)
def test_bad_records_are_named_with_row_and_field(tmp_path, change, message):
    """Guards: a bad record that is scored 0 or trained on, instead of an error before anything starts."""
    file = tmp_path / "records.json"
    file.write_text(json.dumps([GOOD, GOOD | change]))
    with pytest.raises(UserError) as error:
        data.load_records(file, tmp_path, need_process=True)
    assert (
        f"row 2: {message.format(tmp_path)}" in str(error.value)
        and "row 1" not in str(error.value)
        and str(file) in str(error.value)
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no records"),
        ("[]", "no records"),
        ("{", "line 1: not JSON"),
        ("\ufeff[]", "no records"),
        ('{"problem_id": 1}\n{"a"', "line 2: not JSON"),
        ("[" + "9" * 5000 + "]", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[3,\n]", "not JSON: .*comma"),
        ("[3]", "row 1: expected a record, got 3"),
        ('{"train": [{"problem_id": 1}], "test": []}', "row 1: problem_id: missing"),
        ('{\n "problem_id": 1\n}', "line 1: not JSON: .*; expected a list, or one record per line"),
    ],
)
def test_broken_record_files_give_one_clear_error(tmp_path, text, message):
    """Guards: a traceback, a misleading message, or a training run without data."""
    file = tmp_path / "records.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        data.load_records(file, tmp_path, max_unreadable=0.5)


def test_json_and_jsonl_give_equal_records_with_unknown_keys(tmp_path):
    """Guards: a reader that drops unknown keys; a byte order mark, as Windows programs write it, that is "not JSON"."""
    rows = [GOOD | {"problem_id": i, "mine": [i], "fps": "25"} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")
    for name in ("a.json", "a.jsonl"):
        assert data.load_records(tmp_path / name, tmp_path) == (rows, {})


def test_a_few_bad_rows_are_skipped_and_named(tmp_path):
    """Guards: bad rows beyond the limit, or dropped silently; one error per run, so that ten bad rows take ten runs."""
    odd = {3: {"solution": "<answer>C</answer>"}, 50: {"problem_type": "maths"}, 99: {"path": ""}}
    rows = [GOOD | {"problem_id": i} | odd.get(i, {}) for i in range(1, 101)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    records, bad_rows = data.load_records(tmp_path / "a.json", tmp_path, max_unreadable=0.03)
    assert [r["problem_id"] for r in records] == [i for i in range(1, 101) if i not in odd]
    assert list(bad_rows) == ["row 3", "row 50", "row 99"] and bad_rows["row 99"] == "path: missing"
    way_on = "3 of 100 rows are bad, more than max_unreadable 0.02(?s:.*)tools.check_data (?s:.*)--out FILE$"
    with pytest.raises(UserError, match=way_on) as error:
        data.load_records(tmp_path / "a.json", tmp_path, max_unreadable=0.02)
    assert all(f"row {i}: " in str(error.value) for i in odd)


def test_solutions_without_tags_get_them(tmp_path):
    """Guards: an SFT target without answer tags, or a row refused because its solution is 3, "3" or "B"."""
    rows = [
        GOOD | {"solution": "B"},
        GOOD | {"solution": 3, "problem_type": "numerical"},
        GOOD | {"solution": " 2.5 ", "problem_type": "regression"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    records, _ = data.load_records(tmp_path / "a.json", tmp_path)
    assert [r["solution"] for r in records] == ["<answer>B</answer>", "<answer>3</answer>", "<answer>2.5</answer>"]


def test_check_writes_the_usable_rows_unchanged(tmp_path, monkeypatch, capsys):
    """Guards: a partial download that has to be sorted by hand; rows changed in the process."""
    write_video(tmp_path / "clip.mp4", 4)
    rows = [GOOD | {"solution": "B", "mine": 1}, GOOD | {"path": "gone.mp4"}, GOOD | {"solution": "Z"}, GOOD]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    out = tmp_path / "readable.json"
    paths = ["--records", str(tmp_path / "a.json"), "--data_root", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["check_data", "--num_workers", "0", "--max_unreadable", "0.01", *paths])
    with pytest.raises(SystemExit) as exit:
        check_data.main()
    printed = capsys.readouterr().out
    assert exit.value.code == 0 and f"2 of 4 rows of {tmp_path / 'a.json'} can be used by tgrpo" in printed
    name = f"(problem_id {GOOD['problem_id']})"
    assert f"row 2 {name}: gone.mp4: no such file" in printed and f"row 3 {name}: solution:" in printed
    assert json.loads(out.read_text()) == [rows[0], rows[3]]


def test_the_check_reads_each_clip_once(tmp_path, monkeypatch, capsys):
    """Guards: a clip decoded for each of its questions; a picture as a video, which has no order, without a word."""
    write_video(tmp_path / "clip.mp4", 8)
    Image.new("RGB", (56, 56)).save(tmp_path / "b.jpg")
    changes = [{}, {"path": "clip.mp4", "problem": "!"}, {"start": 0, "end": 0.5}]
    changes += [{"path": "b.jpg"}, {"path": "gone.mp4"}, {"path": "gone.mp4"}]
    read = []
    load_media = data.load_media
    monkeypatch.setattr(data, "load_media", lambda row, cfg: read.append(row["path"]) or load_media(row, cfg))
    rows = {number: GOOD | change for number, change in enumerate(changes, 1)}
    reasons = check_data.check_media(rows, config(tmp_path, num_workers=0))
    assert read == ["./clip.mp4", "./clip.mp4", "b.jpg", "gone.mp4"]
    assert reasons == dict.fromkeys((5, 6), "gone.mp4: no such file")
    assert "1 of 6 rows show a video of one frame, which has no order: [4]\n" in capsys.readouterr().out


def test_a_set_with_a_few_bad_rows_trains_and_names_them(tmp_path, world, run, capsys):
    """Guards: 6 bad rows that block 3,000 others, go unnamed, or are missing from the count of skipped records."""
    texts = json.loads((world / "world/rl.json").read_text())
    rows = [texts[i % len(texts)] for i in range(3000)]
    odd = range(100, 3000, 500)
    for i in odd:
        rows[i] = texts[0] | {"solution": "<answer>many</answer>", "problem_type": "numerical"}
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run("tgrpo", records=tmp_path / "all.jsonl", batch_size=1, micro_batch_size=1, steps=1)
    printed = capsys.readouterr().out
    assert all(f"skipped row {i + 1}: solution: not a number" in printed for i in odd)
    assert "6 unusable records were skipped" in printed
    assert [row["data/skipped"] for row in read_jsonl(out / "metrics.jsonl")] == [6]


def test_a_folder_whose_name_starts_like_the_root_is_outside(tmp_path):
    """Guards: paths compared as text, where /data/media2 starts with /data/media."""
    with pytest.raises(ValueError, match="leaves the data root"):
        record_files.media_path("../media2/clip.mp4", tmp_path / "media")
    assert record_files.media_path("./a/../b.mp4", tmp_path) == str(tmp_path / "b.mp4")


# ------------------------------------------------------------------------------------------------------ media


def bad_file(kind, path):
    if kind == "zero-byte":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is no video " * 50)
    elif kind == "audio-only":
        write_audio(path)
    # the index is at the end of an mp4
    elif kind == "index cut off":
        write_video(path, 40)
        path.write_bytes(path.read_bytes()[:-700])
    # here it is at the beginning, and frames are missing
    elif kind == "frames cut off":
        write_video(path, 40, movflags="faststart")
        path.write_bytes(path.read_bytes()[:-600])
    elif kind == "folder":
        path.mkdir()


@pytest.mark.parametrize(
    "kind", ["zero-byte", "text", "audio-only", "index cut off", "frames cut off", "folder", "missing"]
)
@pytest.mark.parametrize("data_type", ["video", "image", "frame"])
def test_unreadable_media_are_named_and_nothing_else_is_shown(tmp_path, kind, data_type):
    """Guards: an unreadable clip replaced by another one, while question and answer stay."""
    bad_file(kind, tmp_path / "clip.mp4")
    record = GOOD | {"data_type": data_type}
    with pytest.raises(data.Unusable, match="clip.mp4: .+"):
        data.load_media(record, config(tmp_path))
    sample = data.Samples([record], None, config(tmp_path), ("ordered", "shuffled"))[0]
    assert "ordered" not in sample.inputs and "shuffled" not in sample.inputs and "clip.mp4" in sample.error


@pytest.mark.parametrize("total, expected", [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (12, [1, 4, 7, 10])])
def test_frames_are_uniform_and_have_their_true_times(tmp_path, total, expected):
    """Guards: frames from the beginning only; frame times that assume 2 fps, so that M-RoPE disagrees with the clip."""
    write_video(tmp_path / "clip.mp4", total, fps=5)
    frames, metadata = data.load_media(GOOD, config(tmp_path, max_frames=4))
    assert numbers(frames) == expected == pytest.approx(metadata.frames_indices)
    assert metadata.fps == pytest.approx(5) and metadata.total_num_frames == total


def test_a_picture_is_read_upright(tmp_path):
    """Guards: a phone's photo on its side, so that left and right become up and down."""
    image = Image.new("RGB", (60, 40))
    exif = image.getexif()
    # turn by 90 degrees to see it upright
    exif[0x0112] = 6
    image.save(tmp_path / "clip.mp4", format="jpeg", exif=exif)
    assert data.load_media(GOOD | {"data_type": "image"}, config(tmp_path))[0].size == (40, 60)


def test_a_picture_that_the_processor_refuses_is_unusable(tmp_path):
    """Guards: a worker that fails after days of training, at a picture that --check called readable."""
    Image.new("RGB", (4020, 20)).save(tmp_path / "clip.mp4", format="png")
    with pytest.raises(data.Unusable, match="4020 x 20 pixels"):
        data.load_media(GOOD | {"data_type": "image"}, config(tmp_path))


# --------------------------------------------------------------------------------------------------- shuffling


@pytest.mark.parametrize("unit", ["frame", "patch"])
@pytest.mark.parametrize("n", range(2, 12))
def test_shuffling_is_a_permutation_and_never_the_identity(unit, n):
    """Guards: a shuffled group that is in order; lost frames; an incomplete last pair."""
    seen = set()
    for seed in range(60):
        order = data.shuffled_order(n, random.Random(seed), unit)
        if n <= (2 if unit == "patch" else 1):
            assert order is None
            continue
        padded = list(range(n)) + [n - 1] * (unit == "patch" and n % 2)
        assert sorted(order) == padded and order != padded
        seen.add(tuple(order))
        # the motion inside a pair stays
        if unit == "patch":
            pairs = set(zip(order[::2], order[1::2]))
            assert pairs == set(zip(padded[::2], padded[1::2]))
    assert not seen or len(seen) >= {2: 1, 3: 5, 4: 20}.get(n if unit == "frame" else (n + 1) // 2, 20)
    assert data.shuffled_order(1, random.Random(0), unit) is None


def test_the_shuffled_order_depends_on_its_seed_only():
    """Guards: a permutation that cannot be reproduced, or the same one for every clip."""
    orders = [data.shuffled_order(8, random.Random(f"0/{i}/frames")) for i in range(20)]
    assert orders == [data.shuffled_order(8, random.Random(f"0/{i}/frames")) for i in range(20)]
    assert len({tuple(o) for o in orders}) > 15


# ---------------------------------------------------------------------------------------------------- prompts


def test_the_prompt_is_exactly_the_template():
    """Guards: options or the hint missing from the prompt; the config's template ignored."""

    def text(record, **settings):
        (video, words) = data.messages(record, SharedConfig(**settings))[0]["content"]
        assert video == {"type": "video"}
        return words["text"]

    assert text(GOOD) == (
        "Which way?\nA. left\nB. right\n\n"
        "Look at the frames and think it through step by step between <think> and </think>. "
        "Then state the result between <answer> and </answer>. The result is the letter of one option."
    )
    hint = "Which way? The result is the letter of one option."
    assert text(GOOD, prompt="{problem} {hint}") == hint
    bare = GOOD | {"problem": "<video>\nWhich <image> way?", "options": ["left", "right"]}
    assert text(bare).startswith("Which way?\nA. left\nB. right\n\n")
    assert text(GOOD | {"problem": "What is {x} or {0}?"}).startswith("What is {x} or {0}?")


def test_prompts_are_padded_on_the_left_with_pixels_in_order():
    """Guards: right padding in sampling; pixels in another order than their prompts."""

    def prompt(ids, kinds, pixel):
        return {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids)),
            "mm_token_type_ids": torch.tensor([kinds]),
            "pixel_values_videos": torch.full((1, 3), pixel),
            "video_grid_thw": torch.tensor([[1, 1, 1]]),
        }

    a = prompt([5, 6], [0, 2], 1.0)
    b = prompt([7, 8, 9], [0, 2, 0], 2.0)
    c = prompt([5, 6], [0, 2], 3.0)
    batch = data.collate_prompts([a, b, c], 0)
    assert batch["input_ids"].tolist() == [[0, 5, 6], [7, 8, 9], [0, 5, 6]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1], [0, 1, 1]]
    assert batch["pixel_values_videos"][:, 0].tolist() == [1, 2, 3]
