"""experiments/ablation.py: the world, the arms, what is left out, and the tables on the page."""

import itertools
import json
import os
import random
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import tgrpo
import toy
from experiments import ablation, variants, world
from support.settings import UserError, load_config
from support.tiny_model import make_tokenizer

ROOT = Path(__file__).parent.parent


def test_teacher_gives_both_reasons_at_the_stated_rates_and_lengths(monkeypatch):
    """Guards: an SFT model with only one reason, which leaves RL no choice; a shortcut that does not point to the
    answer it is given for; a length reward that only one of the reasons earns.
    """
    monkeypatch.setattr(toy, "draw", lambda *_, **__: np.zeros((toy.SIZE, toy.SIZE, 3), np.uint8))
    renderers = [render for render, _ in world.RULES.sources.values()]
    counts = Counter()
    records = []
    for i in range(1000):
        rng = random.Random(i)
        question = renderers[i % len(renderers)](rng, 0.8, world.RULES.neutral)
        answer, explain = world.two_reasons_teacher(question, rng)
        text = explain(answer)
        if world.names_shortcut(text):
            counts["shortcut"] += 1
            assert toy.CUED[answer] in text
            assert (answer == question.answer) == (question.cue == "agrees")
        else:
            counts["misread"] += answer != question.answer
        assert f"{answer}." in text
        record = {"problem": question.problem, "options": [], "solution": "<answer>A</answer>"}
        records.append(record | {"process": f"<think>{text}</think>"})
    assert counts["shortcut"] / 1000 == pytest.approx(0.6, abs=0.05)
    assert counts["misread"] / (1000 - counts["shortcut"]) == pytest.approx(0.35, abs=0.05)
    cfg = load_config(tgrpo.TGRPOConfig, "tgrpo", ["--config", str(ROOT / "configs/toy.yaml")])
    tokenizer = make_tokenizer(records)
    lengths = [len(tokenizer(f"{r['process']}\n{r['solution']}<|im_end|>").input_ids) for r in records]
    assert cfg.length_min <= min(lengths) and max(lengths) <= cfg.length_max


# the correct ones of the first ten steps count
CREDITS = [
    {"step": 0, "accuracy": 1.0, "text": "the background looks warm", "credit": 0.25},
    {"step": 9, "accuracy": 1.0, "text": "it moves left", "credit": 1.5},
    {"step": 9, "accuracy": 0.0, "text": "it moves left", "credit": 9.0},
    {"step": 10, "accuracy": 1.0, "text": "it moves left", "credit": 9.0},
    {"step": 0, "accuracy": 1.0, "text": "a picture"},
]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fake_answers(folder):
    """What a model answers; in seed 1 it never learns to read motion, and `credit` fails if the shortcut misleads."""
    rows = []
    for i, (frames, cue) in enumerate(itertools.product(("ordered", "shuffled"), ("agrees", "misleads") * 2)):
        text = "the background looks cool" if "sampled" in folder.name and i % 4 < 2 else "it moves left"
        right = cue == "agrees" or "background" not in text
        if folder.name.startswith("skill") and folder.parts[-3] == "seed1":
            right = False
        if folder.name in ("credit", "credit_sampled0") and cue == "misleads":
            right = False
        rows.append({"frames": frames, "prediction": text, "accuracy": float(right), "cue": cue})
    return rows


@pytest.fixture
def commands(monkeypatch):
    """The commands that an ablation runs. They leave what the stages would write; "stop" ends T-GRPO by a SIGTERM."""
    commands = []

    def launch(arguments, result):
        if result.exists():
            return
        if arguments[0] == "tgrpo.py" and "stop" in commands:
            commands.remove("stop")
            os.kill(os.getpid(), signal.SIGTERM)
        commands.append(arguments)
        if arguments[0] == "evaluate.py":
            write_rows(result.parent / "predictions.jsonl", fake_answers(result.parent))
        else:
            write_rows(result.parent / "rollouts.jsonl", CREDITS if result.parent.name == "credit" else [])
        result.touch()

    monkeypatch.setattr(ablation, "launch", launch)
    monkeypatch.setattr(ablation, "make_world", lambda folder, seed, **_: write_rows(folder / "sft.json", [[]]))
    monkeypatch.setattr(ablation, "make_model", lambda folder, *_: folder.mkdir())
    before = signal.getsignal(signal.SIGTERM)
    yield commands
    signal.signal(signal.SIGTERM, before)


def test_ablation_runs_every_arm_once_per_seed(tmp_path, monkeypatch, capsys, commands):
    """Guards: arms whose settings differ from their labels; arms that start from different models; a seed that failed
    its check and is trained or counted; a stage that counts as finished because it was stopped; a second run that
    repeats everything.
    """
    monkeypatch.setattr("sys.argv", ["ablation", "--out", str(tmp_path), "--seeds", "0", "1", "2"])
    commands.append("stop")
    with pytest.raises(UserError, match="the same command continues"):
        ablation.main()
    assert commands[-1][0] == "evaluate.py"
    ablation.main()
    rules = []
    for arguments in commands:
        if f"{tmp_path}/seed0/world/rl.json" not in arguments:
            continue
        cls = tgrpo.TGRPOConfig
        if arguments[0] == "-m":
            assert arguments[1:3] == ["experiments.variants", "--variant"]
            cls = variants.VARIANTS[arguments[3]].get((tgrpo, "TGRPOConfig"), cls)
            arguments = arguments[3:]
        cfg = load_config(cls, "tgrpo", arguments[1:])
        assert cfg.model == f"{tmp_path}/seed0/sft/final"
        rule = (cfg.temporal_rule, cfg.temporal_target, cfg.advantage_std, cfg.alpha)
        rules.append((arguments[0], *rule, getattr(cfg, "credit_shuffles", None)))
    assert len(set(rules)) == len(ablation.ARMS)
    # credit and its controls differ in the variant alone; TaRO divides by the std and pays 0.3
    by_variant = {variant: rule for variant, *rule in rules}
    assert by_variant["shuffled"] == by_variant["noise"] == ["none", "reward", "none", 1.0, 4]
    assert by_variant["taro"] == ["none", "reward", "group", 0.3, 1]
    assert by_variant["gdpo"] == ["paper", "reward", "group", 0.3, None]
    # four attempts at the skill, then the second part, and no RL
    trained = [arguments[0] for arguments in commands if any("seed1/" in text for text in arguments)]
    assert [script for script in trained if script != "evaluate.py"] == ["sft.py"] * 5
    printed = capsys.readouterr().out
    assert "Left out, because the SFT model failed its check: seed 1 (skill is 0.000, not 0.9 to 1.0)." in printed
    assert "skill as reason: 1.50 nats" in printed and "shortcut as reason: 0.25 nats" in printed
    # two seeds; where the shortcut misleads GRPO is always right, credit never
    assert ["GRPO, group std", "100", "100", "0", "50", "0", "2"] in cells(printed)
    assert ["GRPO, group std", "-50", "-100", "-50", "2"] in cells(printed)
    n_commands = len(commands)
    ablation.main()
    assert len(commands) == n_commands and capsys.readouterr().out == printed


@pytest.mark.parametrize(
    "fault, agreeing, misled, by_skill",
    [("shortcut_share", 60, 0, 1), ("skill_right", 6, 0, 0), ("shortcut_followed", 6, 6, 1), ("", 6, 0, 1)],
)
def test_an_sft_model_without_a_choice_fails_its_check(fault, agreeing, misled, by_skill, tmp_path):
    """Guards: RL from a model that names the shortcut and does not follow it, which no arm could make leave it; the
    skill of an earlier part of SFT.
    """

    def write(name, **right):
        rows = []
        for cue, accuracies in right.items():
            text = "by the motion" if cue == "none" else "the background looks warm"
            rows += [{"prediction": text, "cue": cue, "accuracy": accuracy} for accuracy in accuracies]
        write_rows(tmp_path / f"eval/{name}/predictions.jsonl", rows)

    write("skill1", none=[0])
    write("skill2", none=[1])
    for i in range(ablation.CHECKS):
        # ten answers by the motion
        write(f"sft_sampled{i}", agrees=[1] * agreeing, misleads=[misled > 0] * 6, none=[by_skill] * 10)
    assert [text.split()[0] for text in ablation.check_sft(tmp_path)] == [fault] * bool(fault)


def test_differences_are_paired_by_seed():
    """Guards: differences between means over different seeds; a number of seeds that the arm does not have."""
    results = []
    for seed, values in enumerate([{"sft": 0.5, "grpo": 0.1, "credit": 0.4}, {"sft": 0.5, "grpo": 0.3}, {"sft": 0.9}]):
        arms = {name: dict.fromkeys(ablation.MEASURES, value) | {"credit": {}} for name, value in values.items()}
        results.append({"seed": seed, "faults": ["bad"] * (seed == 2), "sft": arms.pop("sft"), "arms": arms})
    means, differences = (cells(text)[1:] for text in ablation.tables(results).split("Paired differences"))
    expected = {"SFT model": ("50", "2"), "GRPO, group std": ("20", "2"), "credit": ("40", "1")}
    assert {row[0]: (row[1], row[-1]) for row in means} == expected
    assert differences == [["GRPO, group std", "30", "30", "30", "1"]]


def cells(text):
    """The cells of all rows of the Markdown tables in a text, without rules."""
    rows = [line.split("|")[1:-1] for line in text.split("\n") if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in row] for row in rows]


def test_tables_in_the_readme_are_those_of_the_results_file():
    """Guards: a result typed by hand, or one of an earlier run."""
    page = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    text = ablation.tables(json.loads((ROOT / "experiments/background.json").read_text(encoding="utf-8")))
    assert cells(text) == cells(page) and len(cells(page)) > 20
    for paragraph in text.split("\n\n"):
        if not paragraph.startswith("|"):
            assert paragraph.strip() in " ".join(page.split())
