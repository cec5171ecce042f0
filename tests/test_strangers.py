"""Files and machines of strangers: what was read wrongly, mixed or lost silently is refused or kept, in one line."""

import errno
import fcntl
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image
from processes import free_port
from safetensors.torch import load_file, save_file
from test_media import write_clip

import data
import evaluate
import policy
import rewards
from benchmarks import answers, orders
from support import answer_files, checkpoints, distributed, frames, model_files, record_files, storage, training
from support.settings import SharedConfig, TrainConfig, UserError
from tools import distill


@pytest.fixture
def model(world, tmp_path):
    """A checkpoint that a test may damage."""
    return shutil.copytree(world / "base", tmp_path / "model")


def config_of(model, **values):
    """Change values of a checkpoint's config.json."""
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -------------------------------------------------------------------------------------------------------- model folders


def test_weights_that_are_not_finite_are_named_before_anything_is_trained(model):
    """Guards: an evaluation of NaN weights that prints 0.0 %; a trained model of NaN."""
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    weights[name][0] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{name.split('.')[-2]}.* has values that are not finite"):
        policy.load_policy(SharedConfig(model=str(model)))


def test_a_head_of_its_own_under_a_tied_config_is_refused(model):
    """Guards: a trained head that `final` silently replaces by the embedding."""
    weights = load_file(model / "model.safetensors")
    embedding = next(tensor for name, tensor in weights.items() if "embed_tokens" in name)
    save_file(weights | {"lm_head.weight": embedding + 1}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lm_head.weight differs from the embedding"):
        policy.load_policy(SharedConfig(model=str(model)))


@pytest.mark.parametrize("kind", ["pointer", "half"])
def test_weights_that_are_not_there_are_one_line(model, kind):
    """Guards: a library's traceback, without a file name, for a clone without git-lfs or half a download."""
    path = model / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" if kind == "pointer" else whole[: len(whole) // 2])
    with pytest.raises(UserError, match="model: its weights cannot be read: .*git-lfs"):
        policy.load_policy(SharedConfig(model=str(model)))


def test_quantized_models_and_training_checkpoints_are_named(model, tmp_path):
    """Guards: a traceback about a missing package; the advice to train again for somebody who only has to export."""
    config_of(model, quantization_config={"quant_method": "awq"})
    with pytest.raises(UserError, match="is quantized"):
        model_files.check_model(SharedConfig(model=str(model)), "sft")
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text("{}")
    with pytest.raises(UserError, match="python -m tools.export .*checkpoint-3 FOLDER"):
        model_files.check_model(SharedConfig(model=str(checkpoint)), "evaluate", made_by="tgrpo.py")


def test_an_adapter_on_itself_is_one_line(tmp_path):
    """Guards: a RecursionError."""
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        described = {"base_model_name_or_path": str(tmp_path / base)}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="is an adapter on itself"):
        storage.adapter_chain(str(tmp_path / "a"))


@pytest.mark.parametrize(
    "template, line", [("<think></think>", "closes <think>"), ("{% if %}", "its chat template fails")]
)
def test_templates_that_no_completion_can_follow_are_refused(model, template, line):
    """Guards: a format reward that stays 0, because the prompt opens the think block; a template's traceback."""
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=line):
        model_files.load_processor(SharedConfig(model=str(model)))


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja", "model.safetensors"])
def test_each_file_of_a_model_is_part_of_its_identity(model, name):
    """Guards: answers of two models mixed, or a run resumed with another tokenizer, template or rope base."""
    before = storage.fingerprint(str(model))
    path = model / name
    path.write_bytes(path.read_bytes() + b" ")
    storage.fingerprint.cache_clear()
    assert storage.fingerprint(str(model)) != before


# ----------------------------------------------------------------------------------------------------- answers and runs


def test_only_the_evaluations_own_files_are_read_and_removed(tmp_path):
    """Guards: a user's predictions_mine.jsonl that is taken for answers and then deleted."""
    for name in ("predictions.jsonl", "predictions.0.jsonl", "predictions.12.jsonl", "predictions_mine.jsonl"):
        (tmp_path / name).write_text("")
    names = [file.name for file in answer_files.files(tmp_path)]
    assert names == ["predictions.0.jsonl", "predictions.12.jsonl", "predictions.jsonl"]


def test_a_question_is_its_whole_record(tmp_path):
    """Guards: answers about another part of a clip, whose id and text are the same."""
    record = {"id": 1, "problem": "Which?", "path": "a.mp4", "start": 0, "end": 2, "process": "x"}
    row = record | {"settings": {}, "end": 3}
    answer_files.check_same_evaluation(tmp_path, row | {"end": 2, "process": "y"}, record, {})
    with pytest.raises(UserError, match="answers to other questions"):
        answer_files.check_same_evaluation(tmp_path, row, record, {})


def test_a_damaged_line_costs_that_line(tmp_path, capsys):
    """Guards: a crash that left NUL bytes in a log, after which the run cannot continue."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n\0\0\0\0\n{"step": 2}\n{"st')
    assert storage.read_jsonl(path) == [{"step": 0}, {"step": 2}]
    assert "metrics.jsonl, line 2: not a row in JSON, left out" in capsys.readouterr().out


@pytest.mark.parametrize("state", ['{"step": 5, "files": {}}', "{}", "[]", "null", '{"step": 4, "files": 7}'])
def test_a_checkpoint_whose_state_is_of_another_step_is_damaged(tmp_path, state):
    """Guards: a resume that skips a step, or that ends at once with a `final`."""
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / "state.json").write_text(state)
    assert "state.json" in checkpoints.damage(folder)
    (folder / "state.json").write_text('{"step": 4, "files": {}}')
    assert checkpoints.damage(folder) is None


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, capsys):
    """Guards: NFS, Lustre or FUSE on which nothing can be started."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    checkpoints.lock_folder(tmp_path / "out")
    assert "this file system has no locks (No locks available)" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- launching


def test_world_size_without_a_launcher_is_one_line(monkeypatch):
    """Guards: a process in a pod that waits silently for hours for a second one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but no launcher started this process"):
        distributed.make_accelerator(TrainConfig())


@pytest.mark.parametrize("rank, reason", [("0", "1/2 clients joined"), ("1", "trying to connect")])
def test_variables_left_over_from_a_launcher_are_one_line(monkeypatch, capfd, rank, reason):
    """Guards: a process that waits silently for hours for ranks that nobody has started."""
    variables = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
    for name, value in (variables | {"MASTER_PORT": free_port()}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "MEETING", timedelta(seconds=1))
    with pytest.raises(UserError, match=f"not come .*{reason}.*: WORLD_SIZE is 2; if no launcher") as error:
        distributed.make_accelerator(TrainConfig())
    assert "\n" not in str(error.value) and "waiting for the other processes: WORLD_SIZE" in capfd.readouterr().out


def test_a_launcher_is_known_by_its_program_and_not_by_a_word(tmp_path):
    """Guards: a run in a folder named accelerate-runs that stops when the script that started it ends."""
    sleep = "import time; time.sleep(60)"
    (tmp_path / "accelerate").write_text(sleep)
    (tmp_path / "accelerate-runs.py").write_text(sleep)
    for name, expected in (("accelerate", True), ("accelerate-runs.py", False)):
        process = subprocess.Popen([sys.executable, tmp_path / name, "launch"])
        # until the new program has its arguments
        while "launch" not in Path(f"/proc/{process.pid}/cmdline").read_text():
            time.sleep(0.01)
        try:
            assert distributed.is_launcher(process.pid) is expected, name
        finally:
            process.kill()
            process.wait()
    assert not distributed.is_launcher(2**22 + 1)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_the_end_of_a_terminal_and_slurms_signal_save_like_sigterm(number):
    """Guards: steps since the last checkpoint that are lost when an ssh session ends."""
    kept = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)}
    try:
        # under nohup it is ignored
        signal.signal(number, signal.SIG_DFL)
        stop = training.StopSignal()
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
    finally:
        for n, handler in kept.items():
            signal.signal(n, handler)


def test_an_error_is_the_last_line_also_with_data_workers(forker, tmp_path):
    """Guards: a traceback that ends with "DataLoader worker is killed" instead of the error that matters."""
    code = """
from types import SimpleNamespace
from support import workers
loader = workers.with_workers(list(range(99)), SimpleNamespace(num_workers=2), batch_size=1)
next(iter(loader))
raise ValueError("what matters")
"""
    (tmp_path / "script.py").write_text(code)
    assert forker.wait(forker.start(tmp_path / "said", str(tmp_path / "script.py"))) == 1
    assert (tmp_path / "said").read_text().strip().splitlines()[-1] == "ValueError: what matters"


def test_max_grad_norm_0_does_not_clip():
    """Guards: gradients scaled to 0, so that nothing is learned, without a word."""
    model = torch.nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    before = model.weight.grad.clone()
    clip = torch.nn.utils.clip_grad_norm_
    run = training.Run.__new__(training.Run)
    run.cfg = TrainConfig(max_grad_norm=0.0)
    run.accelerator = type("", (), {"clip_grad_norm_": staticmethod(clip)})
    assert run.clip_gradient(model) > 1 and torch.equal(model.weight.grad, before)


# ---------------------------------------------------------------------------------------------------- records and media


@pytest.mark.parametrize("text", ['[{"solution": "A", "solution": "B"}]', '{"solution": "A", "solution": "B"}\n'])
def test_a_key_twice_in_a_record_is_refused(tmp_path, text):
    """Guards: a record whose first solution is silently replaced by its second."""
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match="the key 'solution' occurs twice"):
        record_files.read_rows(tmp_path / "r.json")


GOOD = {
    "problem_id": 1,
    "problem": "Which way?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["left", "right"],
    "solution": "B",
    "path": "clip.mp4",
    "process": "<think>It moves.</think>",
}


def test_fields_of_others_never_change_what_happens(run, world, tmp_path):
    """Guards: an "error": null of an annotation tool, for which no question is asked; a thumbnail shown as a frame."""
    rows = json.loads((world / "world/test.json").read_text())[:4]
    foreign = {"error": None, "image_path": "gone.png", "last_frame": 7, "duration": 12.5, "id": 3, "benchmark": "x"}
    for name, extra in (("plain", {}), ("foreign", foreign)):
        records = [row | extra | {"task": 3} for row in rows]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    answers = {}
    for name in ("plain", "foreign"):
        out = run("evaluate", name, records=tmp_path / f"{name}.json", orders="ordered", max_new_tokens=4)
        answers[name] = [(row["id"], row["prediction"]) for row in storage.read_jsonl(out / "predictions.jsonl")]
    assert len(answers["plain"]) == 4 and answers["plain"] == answers["foreign"]
    usable, _ = record_files.split_rows(rewards.parse_solution, [GOOD | foreign], tmp_path)
    assert usable[1]["their_duration"] == 12.5 and "error" not in usable[1]


def test_the_name_of_a_record_file_never_chooses_a_benchmarks_rules(tmp_path):
    """Guards: own questions in timeblind.json that are scored by TimeBlind's rule, beside its published scores."""
    with pytest.raises(UserError, match="timeblind is a benchmark's name; rename the file"):
        evaluate.EvalConfig(records=str(tmp_path / "timeblind.json"))


@pytest.mark.parametrize(
    "change, line",
    [
        ({"options": ["B. left", "A. right"]}, "their letters are B, A, expected A, B or none"),
        ({"options": ["A. left", "A. right"]}, "their letters are A, A, expected A, B or none"),
        ({"options": ["A. yes", "no", "C. maybe"]}, "their letters are A, C, expected A, B, C or none"),
        ({"options": [f"option {i}" for i in range(28)]}, "28 of them, but only 26 letters"),
        ({"process": "Let me look. <think>x</think>"}, "process: expected one think block and nothing else"),
        ({"process": "<think>x</think> So it is B."}, "process: expected one think block and nothing else"),
        ({"solution": "The answer is <answer>B</answer>"}, "solution: text outside of the answer block"),
        ({"solution": "<ANSWER>B</ANSWER>"}, "solution: tags are written <answer> and </answer>"),
    ],
)
def test_records_that_would_teach_something_else_are_refused(tmp_path, change, line):
    """Guards: a prompt with two letters per option; SFT on a text whose format reward is 0."""
    with pytest.raises(ValueError, match=line):
        record_files.check_record(rewards.parse_solution, GOOD | change, tmp_path, need_process=True)


@pytest.mark.parametrize(
    "options", [["E. coli", "S. aureus"], ["C) x", "D) y"], ["A. x", "B. y"], ["J. S. Bach", "Mozart"]]
)
def test_options_whose_letters_say_nothing_wrong_are_kept(tmp_path, options):
    """Guards: names with initials taken for labels in the wrong order."""
    truth = "C" if options[0].startswith("C)") else "A"
    row = GOOD | {"options": options, "solution": truth}
    record_files.check_record(rewards.parse_solution, row, tmp_path, need_process=True)


@pytest.mark.parametrize("mark", ["<Image>", "<VIDEO>", "<image 1>", "<image_2>", "<video/>"])
def test_placeholders_in_other_spellings_are_no_words(mark):
    """Guards: a prompt that shows the placeholder of another format to the model as text."""
    assert record_files.plain_problem({"problem": f"{mark}\nWhich way?"}) == "Which way?"


@pytest.mark.parametrize("jump", [0, 1])
def test_a_clip_whose_clock_jumps_is_named(tmp_path, jump):
    """Guards: eight copies of one frame, because the times of a recorder or of two joined streams jump by hours."""
    ticks = [i * 100 for i in range(30)] if not jump else [0, *(3_600_000 * 100 + i * 100 for i in range(39))]
    write_clip(tmp_path / "clip.mkv", ticks)
    choose = functools.partial(data.even_frames, n=8)
    if jump:
        # also where the file has hardly more than twice as many frames as are shown
        for n in (8, 16):
            with pytest.raises(ValueError, match="its clock jumps, .*: one of 40 frames"):
                frames.read_clip(tmp_path / "clip.mkv", functools.partial(data.even_frames, n=n))
    else:
        assert len(np.unique(frames.read_clip(tmp_path / "clip.mkv", choose).frames_FHWC, axis=0)) == 8


def test_the_default_stream_of_several_is_the_clip(tmp_path):
    """Guards: a small preview shown instead of the clip, because it comes first in the file."""
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        streams = [container.add_stream("mpeg4", rate=5) for _ in range(2)]
        for stream, size in zip(streams, (32, 64)):
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
        streams[0].disposition = Disposition(0)
        streams[1].disposition = Disposition.default
        for stream, size in zip(streams, (32, 64)):
            for _ in range(4):
                frame = av.VideoFrame.from_ndarray(np.zeros((size, size, 3), np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    shown = frames.read_clip(tmp_path / "two.mkv", functools.partial(data.even_frames, n=2))
    assert shown.frames_FHWC.shape[1:3] == (64, 64)


def test_a_file_with_several_pictures_is_no_picture(tmp_path):
    """Guards: the first picture of an animation shown as if it were all."""
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:])
    with pytest.raises(ValueError, match="2 pictures in one file"):
        frames.read_picture(tmp_path / "a.gif")
    # a phone's picture with its preview
    pictures[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=pictures[1:])
    assert frames.read_picture(tmp_path / "a.jpg").getpixel((0, 0))[0] > 200


@pytest.mark.parametrize("tool", ["split", "distill"])
def test_no_tool_overwrites_a_file(tmp_path, tool):
    """Guards: a split of my/train.json into my/ that loses a tenth of the rows; a replaced test set."""
    path = tmp_path / "train.json"
    path.write_text("[]")
    words = {"split": [path, "--share", "0.5", "--out", tmp_path], "distill": [path, "--out", path]}[tool]
    with pytest.raises(UserError, match="train.json exists; choose another output"):
        importlib.import_module(f"tools.{tool}").main(list(map(str, words)))
    assert path.read_text() == "[]"


def test_only_equal_questions_are_compared():
    """Guards: two test sets whose questions have the same ids, compared with an interval of 0."""

    def row(problem):
        return {
            "id": 1,
            "problem": problem,
            "path": "a.mp4",
            "solution": "A",
            "status": "scored",
            "result": (1.0, True),
        }

    assert orders.paired_difference([row("Which?")], [row("Who?")]) is None
    assert orders.paired_difference([row("Which?")], [row("Which?")])["n"] == 1


def test_a_question_about_its_own_picture_is_not_distilled(tmp_path):
    """Guards: a chain of thought about a picture that SFT would not show."""
    row = GOOD | {"prediction": "<think>It moves.</think>\n<answer>B</answer>"}
    records, dropped = distill.distill([row, row | {"problem": "Who?", "image_path": "a.png"}], tmp_path)
    assert [record["problem"] for record in records] == ["Which way?"]
    assert list(dropped) == ["a question about a picture of its own, or about the last frame"]


def test_records_from_a_pipe_and_rows_without_a_benchmarks_fields_are_one_line(tmp_path):
    """Guards: a run that hangs on a pipe, or resumes with other records; a traceback for another program's answers."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: not a file"):
        record_files.read_rows(tmp_path / "pipe")
    row = {"benchmark": "timeblind", "id": 1, "prediction": "<answer>yes</answer>", "solution": "yes"}
    row |= {"problem_type": "free-form", "problem": "Does it move?", "path": "a.mp4", "data_type": "video"}
    with pytest.raises(UserError, match="timeblind cannot score it: KeyError"):
        answers.scored_rows([row])


def test_settings_that_cannot_work_are_one_line(world):
    """Guards: pixels that the prompt announces twice; answers written into the folder of the model."""
    with pytest.raises(UserError, match="prompt: the chat template adds the tokens"):
        SharedConfig(prompt="<|video_pad|>{problem}")
    with pytest.raises(UserError, match="evaluate.output_dir: .* is the folder of the model"):
        model_files.check_model(SharedConfig(model=str(world / "base"), output_dir=str(world / "base/")), "evaluate")


def test_answers_about_other_media_are_not_of_the_same_evaluation(world, monkeypatch):
    """Guards: a score over answers to the clips of two folders."""
    cfg = evaluate.EvalConfig(model=str(world / "base"), records="r.json", data_root="media")
    here = evaluate.answer_settings(cfg)
    monkeypatch.chdir(world)
    assert evaluate.answer_settings(cfg) != here
