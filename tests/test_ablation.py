"""experiments/: the world of two rationales, the controls of credit, and the ablation of all arms."""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import tgrpo
import toy
from experiments import ablation, controls, two_rationales

ROOT = Path(__file__).parent.parent


def test_teacher_gives_both_reasons_at_the_stated_rates(monkeypatch):
    """Guards: an SFT model with only one rationale, which leaves RL no choice; a reason that contradicts its answer."""
    black = np.zeros((toy.SIZE, toy.SIZE, 3), np.uint8)
    monkeypatch.setattr(toy, "draw", lambda *_, **__: black)
    counts = Counter()
    for i in range(1000):
        rng = random.Random(i)
        question = (toy.direction, toy.size)[i % 2](rng, 0.8, two_rationales.RULES.neutral)
        answer, explain = two_rationales.two_rationales_teacher(question, rng)
        text = explain(answer)
        assert text.endswith(f"{answer}.")
        if two_rationales.is_static(text):
            counts["static"] += 1
            assert toy.CUED[answer] in text
            assert (answer == question.answer) == (question.cue == "agrees")
        else:
            counts["misread"] += answer != question.answer
    assert counts["static"] / 1000 == pytest.approx(0.6, abs=0.05)
    assert counts["misread"] / (1000 - counts["static"]) == pytest.approx(0.35, abs=0.07)


# ------------------------------------------------------------------------------------------------------- the controls


CREDIT_G = torch.tensor([5.0, 0.25, -4.0, 0.5, 9.0])
CORRECT_G = torch.tensor([True, True, True, True, False])


def test_shuffled_bonus_goes_to_correct_completions_only():
    """Guards: a control that changes how much bonus there is, or pays wrong completions."""
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        bonus_G = controls.shuffled_bonus(CREDIT_G, CORRECT_G, alpha=0.5)
        assert sorted(bonus_G[:4].tolist()) == [0.0, 0.125, 0.25, 0.5]
        assert bonus_G[4] == 0
        seen.add(tuple(bonus_G.tolist()))
    assert len(seen) > 5


def test_noise_bonus_has_the_mean_and_spread_of_the_credit():
    """Guards: noise that is larger or smaller than the credit it replaces."""
    torch.manual_seed(0)
    own_G = tgrpo.credit_bonus(CREDIT_G, CORRECT_G, 0.5)[:4]
    draws = torch.stack([controls.noise_bonus(CREDIT_G, CORRECT_G, alpha=0.5) for _ in range(2000)])
    assert (draws[:, 4] == 0).all()
    assert draws[:, :4].mean().item() == pytest.approx(own_G.mean().item(), abs=0.01)
    assert draws[:, :4].std().item() == pytest.approx(own_G.std(correction=0).item(), abs=0.01)


def test_control_replaces_the_bonus_of_tgrpo(monkeypatch):
    """Guards: a control that is named but not applied; settings that do not reach tgrpo.py."""
    used = {}

    def main():
        used["arguments"] = sys.argv[1:]
        used["bonus"] = tgrpo.credit_bonus

    monkeypatch.setattr(tgrpo, "main", main)
    # restored after the test
    monkeypatch.setattr(tgrpo, "credit_bonus", tgrpo.credit_bonus)
    monkeypatch.setattr(sys, "argv", ["controls.py", "--steps", "2", "--control", "noise", "--alpha", "1"])
    controls.main()
    assert used == {"arguments": ["--steps", "2", "--alpha", "1"], "bonus": controls.noise_bonus}


def test_score_uses_the_replaced_bonus(monkeypatch):
    """Guards: a score that keeps the original bonus, so that a control trains the same policy as credit."""
    monkeypatch.setattr(tgrpo, "credit_bonus", lambda credit_G, correct_G, alpha: torch.full_like(credit_G, 0.125))
    record = {"problem_id": 1, "problem_type": "multiple choice", "solution": "<answer>B</answer>"}
    texts = ["<think>x</think><answer>B</answer>", "<think>x</think><answer>A</answer>"]
    completions = [torch.tensor([3, 1])] * 2
    group = tgrpo.Group(tgrpo.data.Sample(record), completions, texts, credit_G=torch.tensor([1.0, 1.0]))
    tgrpo.score(group, tgrpo.TGRPOConfig(temporal_rule="credit"), [1])
    assert group.rewards["temporal"].tolist() == [0.125, 0.125]


# ------------------------------------------------------------------------------------------------------- the ablation


class FakeStages:
    """Leaves what each stage would write, without running it. In seed 1 the model never learns to read motion."""

    def __init__(self):
        self.commands = []

    def launch(self, arguments, result, log=None):
        if result.exists():
            return
        options = dict(zip(arguments[:-1], arguments[1:]))
        folder = Path(options["--output_dir"])
        self.commands.append((arguments, folder))
        folder.mkdir(parents=True)
        if arguments[0] == "evaluate.py":
            self.evaluate(folder)
        else:
            self.train(folder)

    def train(self, folder):
        metrics = {"step": 0, "time/rollout": 1.0, "time/update": 2.0}
        text = "the background looks warm"
        rollout = {"step": 0, "frames": "ordered", "problem_id": 1, "text": text, "accuracy": 1.0}
        (folder / "final").mkdir()
        (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
        (folder / "rollouts.jsonl").write_text(json.dumps(rollout) + "\n")

    def evaluate(self, folder):
        texts = ["it moves left", "it moves left"]
        if "sampled" in folder.name:
            texts[0] = "the background looks cool"
        failing = folder.parts[-3] == "seed1" and folder.name.startswith("skill")
        rows = []
        for frames in ("ordered", "shuffled"):
            for text in texts:
                accuracy = 0.0 if failing else 1.0
                rows.append({"frames": frames, "prediction": text, "accuracy": accuracy, "cue": "misleads"})
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "summary.json").write_text("{}")

    def make_world(self, folder, seed, **_):
        folder.mkdir(parents=True)
        (folder / "rl.json").write_text(json.dumps([{"problem_id": 1, "cue": "misleads"}]))
        (folder / "sft.json").write_text("[]")


def test_ablation_runs_every_arm_once_per_seed(tmp_path, monkeypatch, capsys):
    """Guards: arms whose settings differ from their labels; a lost seed; a second run that repeats everything."""
    fake = FakeStages()
    monkeypatch.setattr(two_rationales, "launch", fake.launch)
    monkeypatch.setattr(two_rationales, "make_world", fake.make_world)
    monkeypatch.setattr(two_rationales, "make_model", lambda folder, *_: folder.mkdir())
    ablation.ablate(tmp_path, seeds=3, jobs=1)

    seed0 = [arguments for arguments, folder in fake.commands if folder.parent == tmp_path / "seed0"]
    arms = [arguments for arguments in seed0 if arguments[0] != "sft.py"]
    names = (
        "--control",
        "--temporal_rule",
        "--temporal_target",
        "--advantage_std",
        "--alpha",
        "--shuffled_generations",
    )
    settings = []
    for arguments in arms:
        options = dict(zip(arguments[:-1], arguments[1:]))
        settings.append({name.removeprefix("--"): options[name] for name in names if name in options})
        assert (arguments[:2] == ["-m", "experiments.controls"]) == ("--control" in options)
        # every arm starts from the same SFT model
        assert options["--model"] == str(tmp_path / "seed0/sft/final")
    credit = {
        "temporal_rule": "credit",
        "temporal_target": "reward",
        "advantage_std": "none",
        "alpha": "1",
        "shuffled_generations": "0",
    }
    assert settings == [
        {"temporal_rule": "none"},
        {"temporal_rule": "none", "advantage_std": "none"},
        {"temporal_target": "reward"},
        {},
        credit,
        {"control": "shuffled"} | credit,
        {"control": "noise"} | credit,
    ]

    # three attempts at the skill, then the second part
    seed1 = [arguments for arguments, folder in fake.commands if folder.parent == tmp_path / "seed1"]
    assert [arguments[0] for arguments in seed1] == ["sft.py"] * 4
    printed = capsys.readouterr().out
    assert "Left out: seed 1" in printed and "2 seeds" in printed
    assert (tmp_path / "ablation.png").exists()

    n_commands = len(fake.commands)
    ablation.ablate(tmp_path, seeds=3, jobs=1)
    assert len(fake.commands) == n_commands


def test_tables_in_the_readme_are_those_of_the_results_file():
    """Guards: a result typed by hand, or one of an earlier run."""

    def cells(line):
        return [cell.strip() for cell in line.split("|")[1:-1]]

    readme = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    in_readme = [cells(line) for line in readme.split("\n") if line.startswith("|")]
    tables = ablation.tables(json.loads((ROOT / "experiments/ablation.json").read_text()))
    rows = [cells(line) for line in tables.split("\n") if line.startswith("|") and "---" not in line]
    assert len(rows) == 16
    for row in rows:
        assert row in in_readme, row
