"""Strangers' texts and model folders: what is read in an answer, and which folders are refused in one line."""

import json
import math
import shutil

import pytest
import torch

import policy
from support import model_files, record_files, storage
from support.parsing import lettered, number_or_nan, parse_letter
from support.settings import SharedConfig, UserError
from tools import export

# fmt: off
CHANGED = [
    "2 pi", "2pi", "2 doz", "5 grand", "3 sixteenths", "5 twelfths", "2 sqrt", "7 factorial", "3i", "2y", "3 none",
    "2 Tausend", "3 Dutzend", "2 milhões", "3 juta", "5 M", "$5m", "5双", "5折", "5个半", "5 decades", "4 chairs",
    "①②", "2④", "④2", "㉑㉒", "1O", "4 times", "4 m m", "4 per m", "4/m",
]
FIVE = [
    "5km/h", "5 m^2", "5 m²", "5 square meters", "5 miles per hour", "5%", "5€", "$5", "$5 USD", "5 Km", "5g/cm3",
    "5°C", "5 degrees", "5个", "5人", "5次", "5平方米", "5公里/小时", "5분", "5歳", "5 hours", "5 fps", "5 Inches",
]
LETTER_B = [
    "B.left", "B:right", "B)left", "(B) x", "(B)left", "B.4", "B is correct", "B is the right answer", "B - left",
    "B – left", "B because it moves", "B选项", "B项", "B正确", "It is B", "It's B", "Ans: B", "<B>", "“B”", "B、left",
]
NO_LETTER = [
    "B left", "A cat", "e.g. this", "U.S. Navy", "A.B", "A - B", "A is wrong", "A is not correct", "A选项错误", "X-ray",
    "A is correct, B is correct", "A选项和B选项", "A.cat, B.dog", "A>B>C", "<A> or <B>", "a.m. x", "A because B",
]
OF_OTHERS = [
    "C. A and B", "(C) A and B", "C) A and B", "C: A & B", "C - A and B", "C. (A) and (B)", "C. A and B only",
    "C. A和B", "C. Both A and B", "C. Neither A nor B", "C. None of A, B", "C. All of the above", "It is C. A and B.",
    "C. Vitamin D", "C. Vitamins A, B and D", "C. vitamin E, d", "C. He and I", "C. Python and R", "C. U.S.A",
]
SEVERAL = [
    "C, A and B", "C: A", "C. A", "C. A or B", "C. A, B", "C. A and D", "C. B and A", "A. B and C", "C. A and A",
    "C. A and B or D", "C\nA and B", "C and A", "C. Red or B", "C. Red, B", "C. Red and B", "C. Red|B", "C. Red. B",
    "C. None of the above, A", "C. Red, B, A", "C. Red or option (B)", "C. Red, so the answer is B", "A. B. C. D.",
    "C. Red. So the answer is B", "C. Red, so B", "C, maybe B", "C. Red; then B", "C. Red or maybe B", "C、A和B",
]
FIT = "model: its files do not fit together: "
INDEX = "model.safetensors.index.json"
DAMAGES = [
    (INDEX, "{}", "weights cannot be read: KeyError.'weight_map'"), (INDEX, "[]", "index.json: not JSON with names"),
    (INDEX, '{"weight_map": {"a": "part-2"}, "metadata": {}}', "weights cannot be read: .*No such file.*part-2"),
    ("pytorch_model.bin", "garbage", "weights cannot be read: Weights only load failed"),
    ("generation_config.json", "{", "generation_config.json: not JSON"),
    ("tokenizer_config.json", {"pad_token": None}, f"{FIT}its tokenizer has no pad_token"),
    ("generation_config.json", {"eos_token_id": 7}, f"{FIT}its eos_token is .*generation ends with"),
    ("config.json", {"text_config": {"vocab_size": 300}}, f"{FIT}.* vocab_size is 300"),
    ("config.json", {"video_token_id": 1}, f"{FIT}video_token_id"),
    ("config.json", {"text_config": {"hidden_size": 97}}, "weights cannot be read: hidden_size must be divisible"),
    ("config.json", {"text_config": {"hidden_size": "big"}}, "'hidden_size' expected int"),
    ("processor_config.json", {"video_processor": {"image_std": [0, 0, 0]}}, f"{FIT}image_mean, image_std or"),
    ("processor_config.json", {"image_processor": {"patch_size": 16}}, f"{FIT}its patches have 1536 values"),
    ("chat_template.jinja", "What? {{ messages }}", f"{FIT}The total number of"),
    ("chat_template.jinja", "hello", f"{FIT}its chat template leaves out the question"),
]
# fmt: on


def test_only_known_units_may_follow_a_number():
    """Guards: "3 Dutzend" read as 3, "①②" as 12; a right answer that earns nothing because of its unit."""
    assert [text for text in CHANGED if not math.isnan(number_or_nan(text))] == []
    assert {text: number_or_nan(text) for text in FIVE} == dict.fromkeys(FIVE, 5.0)


def test_labels_of_options_are_read_in_answers():
    """Guards: 0 for "B.left" though the prompt shows that label; a letter read in an article or a denial; 0 for an
    option whose text has other letters (a pair of persons, a title, a chord).
    """
    assert {text: parse_letter(text) for text in LETTER_B} == dict.fromkeys(LETTER_B, "B")
    assert {text: parse_letter(text) for text in NO_LETTER} == dict.fromkeys(NO_LETTER)
    two = ["B) left C) right", "(B) left (C) right", "B. left C. right D. up", "B. It is C", "B. The answer is C"]
    assert {text: parse_letter(text) for text in two} == dict.fromkeys(two)
    own_text = ["B. x, y", "B. a, b", "B. C → A", "B. C - A - D", "B, because C is not", "B\nleft", "B (left)", "B?"]
    own_text += ["B. B and C", "B. B&B", "b. R&B", "B. Mr. A", "B. Ph.D.", "B. A.C.", "B. B12 and C", "B. 维生素C和D"]
    assert {text: parse_letter(text) for text in own_text} == dict.fromkeys(own_text, "B")
    assert lettered(["A、left", " B. right"]) == ["A、left", " B. right"]


def test_an_option_may_speak_of_other_options():
    """Guards: 0 for "C. A and B", which is what the prompt shows; 1 for an answer that names a second option."""
    assert {text: parse_letter(text) for text in OF_OTHERS} == dict.fromkeys(OF_OTHERS, "C")
    assert {text: parse_letter(text) for text in SEVERAL} == dict.fromkeys(SEVERAL)


@pytest.mark.parametrize("mark", ["[video]", "[image 1]", "<vid>", "<IMG>"])
def test_placeholders_at_the_ends_are_no_words(mark):
    """Guards: a prompt that shows another format's placeholder; a word in brackets that is lost in the middle."""
    texts = (f"{mark}\nWhich?", f"{mark}{mark} Which? {mark}", f"Is {mark} a tag?")
    assert [record_files.plain_problem({"problem": text}) for text in texts] == ["Which?", "Which?", texts[2]]


def change(path, values):
    """Put a text, or values into a JSON file."""
    if isinstance(values, dict):
        content = json.loads(path.read_text())
        content |= {name: content[name] | v if isinstance(v, dict) else v for name, v in values.items()}
        values = json.dumps(content)
    path.write_text(values)


@pytest.mark.parametrize("name, values, line", DAMAGES)
def test_model_folders_that_cannot_be_used_are_one_line(world, tmp_path, name, values, line):
    """Guards: a library's traceback without a file's name; a damaged generation config that is silently ignored."""
    folder = shutil.copytree(world / "base", tmp_path / "model")
    cfg = SharedConfig(model=str(folder))
    change(folder / name, values)
    if name in (INDEX, "pytorch_model.bin"):
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=line) as error:
        model_files.check_model(cfg, "sft")
        model_files.load_processor(cfg)
        policy.load_policy(cfg)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_an_adapter_on_the_hub_is_named_and_too_little_memory_is_no_damage(monkeypatch):
    """Guards: "We couldn't connect" for an adapter in the hub's cache, offline; a full GPU told as damaged weights."""
    with pytest.raises(torch.OutOfMemoryError), model_files.usable("model"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(model_files, "is_offline_mode", lambda: True)
    monkeypatch.setattr(model_files, "find_adapter_config_file", lambda name: name)
    with pytest.raises(UserError, match="^me/ada is an adapter on the hub"):
        model_files.load_processor(SharedConfig(model="me/ada"))


def test_an_export_from_elsewhere_names_the_starting_model(world, run, tmp_path, monkeypatch):
    """Guards: a hub lookup for a relative path; an adapter merged into another model that has the same path."""
    start = shutil.copytree(world / "base", tmp_path / "here/start")
    out = run("sft", model=start, save_every=1, lora_rank=4)
    (out / "config.yaml").write_text((out / "config.yaml").read_text().replace(str(start), "start"))
    shutil.copytree(start, tmp_path / "other/start")
    change(tmp_path / "other/start/config.json", {"rope_theta": 7})
    for place in ("other", "out"):
        monkeypatch.chdir(tmp_path / place)
        with pytest.raises(UserError, match=f"start, seen from .*{place}, is not what its run started from"):
            export.export(out / "checkpoint-1", tmp_path / "exported")
        storage.fingerprint.cache_clear()
    monkeypatch.chdir(tmp_path / "here")
    export.export(out / "checkpoint-1", "exported")
