"""experiments/: the worlds of two rationales, the variants of credit, and the ablation of all arms."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import tgrpo
import toy
from experiments import ablation, two_rationales, variants, worlds
from support.settings import UserError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", worlds.WORLDS)
def test_teacher_gives_both_reasons_at_the_stated_rates(name, monkeypatch):
    """Guards: an SFT model with only one rationale, which leaves RL no choice; a reason that contradicts its answer; a
    shortcut that is not recognised, or one that does not point to the answer it is given for.
    """
    black = np.zeros((toy.SIZE, toy.SIZE, 3), np.uint8)
    monkeypatch.setattr(toy, "draw", lambda *_, **__: black)
    monkeypatch.setattr(worlds, "draw", lambda *_, **__: black)
    world = worlds.WORLDS[name]
    renderers = [render for render, _ in world.rules.sources.values()]
    counts = Counter()
    for i in range(1000):
        rng = random.Random(i)
        question = renderers[i % len(renderers)](rng, 0.8, world.rules.neutral)
        answer, explain = world.rules.teachers["sft"](question, rng)
        text = explain(answer)
        if world.names_shortcut(text):
            counts["shortcut"] += 1
            assert (toy.CUED | worlds.BLOCKS)[answer] in text
            assert (answer == question.answer) == (question.cue == "agrees")
        else:
            counts["misread"] += answer != question.answer
        assert f"{answer}." in text or f"{answer} comes first." in text
        assert answer in (question.answer, question.wrong)
    assert counts["shortcut"] / 1000 == pytest.approx(0.6, abs=0.05)
    assert counts["misread"] / (1000 - counts["shortcut"]) == pytest.approx(
        0.35 if name == "background" else 0.25, abs=0.05
    )


def test_stretched_answers_have_the_stated_length():
    """Guards: answers of ordinary length, with which the test of long answers would prove nothing."""
    lengths = {}
    for name in ("background", "stretched5", "stretched20"):
        total = 0
        for i in range(200):
            rng = random.Random(i)
            question = toy.Question([], "", "left", "right", "it moves {}.".format, "agrees")
            answer, explain = worlds.WORLDS[name].rules.teachers["sft"](question, rng)
            total += len(explain(answer))
        lengths[name] = total
    # the skill is learned in texts of any length up to that
    reason = "it moves left."
    question = toy.Question([], "", "left", "right", "it moves {}.".format, "agrees")
    for name, stretch in (("stretched5", 5), ("stretched20", 20)):
        teach = worlds.WORLDS[name].rules.teachers["skill"]
        texts = [teach(question, random.Random(i))[1]("left") for i in range(100)]
        assert all(text.endswith(reason) for text in texts)
        assert min(map(len, texts)) < 5 * len(reason) and max(map(len, texts)) > 0.9 * stretch * len(reason)
    assert lengths["stretched5"] / lengths["background"] == pytest.approx(5, rel=0.2)
    assert lengths["stretched20"] / lengths["background"] == pytest.approx(20, rel=0.1)


@pytest.mark.parametrize("name", worlds.WORLDS)
def test_the_length_reward_prefers_neither_reason(name, monkeypatch):
    """Guards: a window that only longer reasons reach, so that every rule leaves the shortcut for the length reward."""
    black = np.zeros((toy.SIZE, toy.SIZE, 3), np.uint8)
    monkeypatch.setattr(toy, "draw", lambda *_, **__: black)
    monkeypatch.setattr(worlds, "draw", lambda *_, **__: black)
    world = worlds.WORLDS[name]
    records = []
    for i in range(200):
        rng = random.Random(i)
        renderers = [render for render, _ in world.rules.sources.values()]
        question = renderers[i % len(renderers)](rng, 0.8, world.rules.neutral)
        answer, explain = world.rules.teachers["sft"](question, rng)
        record = {"problem": question.problem, "options": [], "solution": "<answer>A</answer>"}
        records.append(record | {"process": f"<think>{explain(answer)}</think>"})
    tokenizer = toy.make_tokenizer(records)
    lengths = [len(tokenizer(f"{r['process']}\n{r['solution']}<|im_end|>").input_ids) for r in records]
    assert world.length[0] <= min(lengths) and max(lengths) <= world.length[1]


def test_only_the_order_and_the_block_tell_which_event_came_first():
    """Guards: a second world that a single frame answers, a block in a later frame, a block of one colour, an event
    whose place or colour gives its time away.
    """
    rng = random.Random(0)
    cues = Counter()
    answers = Counter()
    looks = Counter()
    for _ in range(200):
        question = worlds.event_order(rng, agreement=0.8, neutral=0.0)
        frames = [frame.astype(int) for frame in question.frames]
        empty = np.array(toy.BACKGROUNDS["neutral"])
        shown = [t for t, frame in enumerate(frames) if np.abs(frame - empty).max() > 20]
        # the block, and two events of two frames each, which do not overlap
        assert shown[0] == 0 and len(shown) == 5
        assert np.array_equal(frames[shown[1]], frames[shown[2]]) and np.array_equal(frames[shown[3]], frames[shown[4]])
        assert not np.array_equal(frames[shown[1]], frames[shown[3]])
        block = frames[0][50, 28]
        pointed_at = "disc" if block[0] > block[2] else "square"
        assert (pointed_at == question.answer) == (question.cue == "agrees")
        cues[question.cue] += 1
        answers[question.answer] += 1
        # a disc covers less of its box than a square: the first event is the answer
        event = np.abs(frames[shown[1]] - empty).max(2) > 100
        rows, columns = np.where(event)
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert (event.sum() / box > 0.9) == (question.answer == "square")
        looks[question.answer, bool(columns.mean() > 28)] += 1
        colour = np.median(frames[shown[1]][rows, columns], 0)
        looks[question.answer, str(colour > 170)] += 1
    assert cues["agrees"] / 200 == pytest.approx(0.8, abs=0.08)
    assert answers["disc"] / 200 == pytest.approx(0.5, abs=0.1)
    # the first event: two places and four colours for either answer
    assert len(looks) == 12 and min(looks.values()) > 10
    assert worlds.event_order(rng, 0.8, neutral=1.0).cue == "neutral"


# ------------------------------------------------------------------------------------------------------- the variants


CREDIT_G = torch.tensor([5.0, 0.25, -4.0, 0.5, 9.0])
CORRECT_G = torch.tensor([True, True, True, True, False])


def test_shuffled_bonus_goes_to_correct_completions_only():
    """Guards: a control that changes how much bonus there is, or pays wrong completions."""
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        bonus_G = variants.shuffled_bonus(CREDIT_G, CORRECT_G, alpha=0.5)
        assert sorted(bonus_G[:4].tolist()) == [0.0, 0.125, 0.25, 0.5]
        assert bonus_G[4] == 0
        seen.add(tuple(bonus_G.tolist()))
    assert len(seen) > 5


def test_noise_bonus_has_the_mean_and_spread_of_the_credit():
    """Guards: noise that is larger or smaller than the credit it replaces."""
    torch.manual_seed(0)
    own_G = tgrpo.credit_bonus(CREDIT_G, CORRECT_G, 0.5)[:4]
    draws = torch.stack([variants.noise_bonus(CREDIT_G, CORRECT_G, alpha=0.5) for _ in range(2000)])
    assert (draws[:, 4] == 0).all()
    assert draws[:, :4].mean().item() == pytest.approx(own_G.mean().item(), abs=0.01)
    assert draws[:, :4].std().item() == pytest.approx(own_G.std(correction=0).item(), abs=0.01)
    # one value for the whole group would cancel in the advantages
    assert draws[:, :4].std(1).min() > 0


def test_relative_credit_is_credit_for_short_answers_and_keeps_its_order_for_long_ones():
    """Guards: a bonus equal for all long answers, whose credits all exceed 1 nat; wrong answers that are paid
    or set the scale.
    """
    credit_G = torch.tensor([0.9, 0.25, -4.0, 0.5, 9.0])
    expected_G = tgrpo.credit_bonus(credit_G, CORRECT_G, 0.5)
    assert torch.equal(variants.relative_bonus(credit_G, CORRECT_G, 0.5), expected_G)
    long_G = torch.tensor([40.0, 20.0, 30.0, -5.0, 99.0])
    assert tgrpo.credit_bonus(long_G, CORRECT_G, 1.0)[:3].tolist() == [1, 1, 1]
    assert variants.relative_bonus(long_G, CORRECT_G, 1.0).tolist() == [1.0, 0.5, 0.75, 0.0, 0.0]


def test_taro_pays_correct_completions_above_their_groups_mean_per_token(monkeypatch):
    """Guards: sums over tokens, with which long completions always win; the mean of the correct ones alone."""

    def add_credit(model, groups, cfg, pad_id):
        groups[0].credit_G = torch.tensor([4.0, 6.0, 1.0, 8.0])

    monkeypatch.setattr(variants, "add_credit", add_credit)
    completions = [torch.zeros(n) for n in (2, 12, 1, 1)]
    groups = [tgrpo.Group(None, completions, []), tgrpo.Group(None, completions, [])]
    variants.add_credit_per_token(None, groups, None, 0)
    # per token: 2, 0.5, 1, 8; their mean is 2.875
    assert groups[0].credit_G.tolist() == [2.0, 0.5, 1.0, 8.0] and groups[1].credit_G is None
    correct_G = torch.tensor([True, True, False, True])
    bonus_G = variants.above_mean_bonus(groups[0].credit_G, correct_G, 0.3)
    assert bonus_G.tolist() == pytest.approx([0, 0, 0, 0.3])
    # a mean of the three correct ones would be 3.5; of these it is 1.17, and that of the group 2.875
    low_G = variants.above_mean_bonus(torch.tensor([2.0, 0.5, 8.0, 1.0]), correct_G, 0.3)
    assert low_G.tolist() == [0, 0, 0, 0]


def test_gdpo_normalises_each_reward_alone(monkeypatch):
    """Guards: the sum that is normalised, in which the published temporal reward cancels."""

    def score(group, cfg, eos):
        group.rewards = {"accuracy": torch.tensor([1.0, 1, 0, 0]), "temporal": torch.tensor([0.3, 0.3, 0, 0])}
        group.advantages_G = torch.zeros(4)
        return {"reward/total": 1.0}

    monkeypatch.setattr(variants, "score", score)
    group = tgrpo.Group(None, [], [])
    assert variants.gdpo_score(group, None, []) == {"reward/total": 1.0}
    alone_G = tgrpo.group_advantages(torch.tensor([1.0, 1, 0, 0]))
    assert torch.allclose(group.advantages_G, 2 * alone_G, atol=1e-3)


def test_gdpo_scales_a_step_by_one_factor(monkeypatch):
    """Guards: advantages several times those of GRPO, next to which the KL counts less; a factor per group, which would
    cancel the temporal reward again; a second update that scales again; a step without groups.
    """
    monkeypatch.setattr(variants, "micro_batches", lambda run, groups, dummy: groups)
    groups = [tgrpo.Group(None, [], [], advantages_G=torch.tensor([n, n, -n, -n])) for n in (1.0, 3.0)]
    for _ in range(2):
        variants.gdpo_micro_batches(None, groups, None)
        assert torch.cat([group.advantages_G for group in groups]).std().item() == pytest.approx(1, abs=1e-3)
    assert torch.allclose(groups[1].advantages_G, 3 * groups[0].advantages_G)
    assert variants.gdpo_micro_batches(None, [], None) == []


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_variant_replaces_functions_of_tgrpo(variant, monkeypatch):
    """Guards: a variant that is named but not applied; settings that do not reach tgrpo.py."""
    used = {}
    replaced = variants.VARIANTS[variant]

    def main():
        used["arguments"] = sys.argv[1:]
        used["functions"] = {(where, name): getattr(where, name) for where, name in replaced}

    monkeypatch.setattr(tgrpo, "main", main)
    # restored after the test
    for where, name in replaced:
        monkeypatch.setattr(where, name, getattr(where, name))
    monkeypatch.setattr(sys, "argv", ["variants.py", "--steps", "2", "--variant", variant, "--alpha", "1"])
    variants.main()
    assert used == {"arguments": ["--steps", "2", "--alpha", "1"], "functions": replaced}


def test_score_uses_the_replaced_bonus(monkeypatch):
    """Guards: a score that keeps the original bonus, so that a control trains the same policy as credit."""
    monkeypatch.setattr(tgrpo, "credit_bonus", lambda credit_G, correct_G, alpha: torch.full_like(credit_G, 0.125))
    record = {"problem_id": 1, "problem_type": "multiple choice", "solution": "<answer>B</answer>"}
    texts = ["<think>x</think><answer>B</answer>", "<think>x</think><answer>A</answer>"]
    completions = [torch.tensor([3, 1])] * 2
    group = tgrpo.Group(tgrpo.data.Sample(record), completions, texts, credit_G=torch.tensor([1.0, 1.0]))
    tgrpo.score(group, tgrpo.TGRPOConfig(temporal_rule="credit"), [1])
    assert group.rewards["temporal"].tolist() == [0.125, 0.125]


# --------------------------------------------------------------------------------------------------------- the stages


def test_a_stage_runs_in_a_fork_with_its_output_in_a_log(tmp_path, monkeypatch, capfd):
    """Guards: a failed or stopped stage that counts as finished; a log that says nothing; a finished stage that runs
    again.
    """
    # as the forks of a prepared process, but without preparing one
    monkeypatch.setattr(two_rationales, "FORKS", multiprocessing.get_context("fork"))
    log = tmp_path / "log.txt"
    result = tmp_path / "result"
    with capfd.disabled():
        # its result is the log
        two_rationales.launch(["-m", "tools.toy_table", "--help"], log, log)
        assert "tools.toy_table --help" in log.read_text() and "usage:" in log.read_text()
        # status 0
        with pytest.raises(UserError, match=f"left no {result}: python -m tools.toy_table --help"):
            two_rationales.launch(["-m", "tools.toy_table", "--help"], result, log)
        with pytest.raises(UserError, match=f"left no {result}: python sft.py --steps 0"):
            two_rationales.launch(["sft.py", "--steps", "0"], result, log)
        assert "steps" in log.read_text().split("--steps 0\n")[1]
    result.touch()
    two_rationales.launch(["sft.py", "--steps", "0"], result, log)


# ------------------------------------------------------------------------------------------------------- the ablation


class FakeStages:
    """Leaves what each stage would write, without running it. In seed 1 the model never learns to read motion."""

    def __init__(self, **skilled_part):
        self.commands = []
        # after which run of the first part the model has the skill
        self.skilled_part = {"seed0": 1, "seed1": 99, "seed2": 1} | skilled_part

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
        metrics = {"step": 0, "completion/length": 20.0}
        text = "the background looks warm"
        rollout = {"step": 0, "frames": "ordered", "problem_id": 1, "text": text, "accuracy": 1.0}
        rollouts = [rollout, {"step": 0, "frames": "shuffled", "problem_id": 1, "text": text}]
        if folder.name == "credit":
            # the correct ones of the first ten steps count
            for step, accuracy, text, credit in (
                (0, 1.0, text, 0.25),
                (9, 1.0, "it moves left", 1.5),
                (9, 0.0, text, 9.0),
                (10, 1.0, text, 9.0),
            ):
                rollouts.append(rollout | {"step": step, "accuracy": accuracy, "text": text, "credit": credit})
        (folder / "final").mkdir()
        (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
        (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rollouts))

    def evaluate(self, folder):
        texts = ["it moves left", "it moves left"]
        if "sampled" in folder.name:
            texts[0] = "the background looks cool"
        seed = folder.parts[-3]
        n_part = int(folder.name.removeprefix("skill")) if folder.name.startswith("skill") else 0
        failing = 0 < n_part < self.skilled_part[seed]
        rows = []
        for frames in ("ordered", "shuffled") if not n_part else ("ordered",):
            for cue in ("agrees", "misleads"):
                for text in texts:
                    right = cue == "agrees" if "background" in text else not failing
                    # seed 2: credit alone answers wrong where the shortcut misleads
                    if seed == "seed2" and folder.name.startswith("credit") and cue == "misleads":
                        right = folder.name not in ("credit", "credit_sampled")
                    rows.append({"frames": frames, "prediction": text, "accuracy": float(right), "cue": cue})
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "summary.json").write_text("{}")

    def make_world(self, folder, seed, **_):
        folder.mkdir(parents=True)
        (folder / "sft.json").write_text("[]")


def test_ablation_runs_every_arm_once_per_seed(tmp_path, monkeypatch, capsys):
    """Guards: arms whose settings differ from their labels; a lost seed; a second run that repeats everything."""
    fake = FakeStages()
    monkeypatch.setattr(two_rationales, "launch", fake.launch)
    monkeypatch.setattr(two_rationales, "make_world", fake.make_world)
    monkeypatch.setattr(two_rationales, "make_model", lambda folder, *_: folder.mkdir())
    ablation.ablate(tmp_path, "background", [0, 1, 2], list(ablation.ARMS), jobs=1)

    seed0 = [arguments for arguments, folder in fake.commands if folder.parent == tmp_path / "background/seed0"]
    arms = [arguments for arguments in seed0 if arguments[0] != "sft.py"]
    names = ("variant", "temporal_rule", "temporal_target", "advantage_std", "alpha", "shuffled_generations")
    names += ("credit_shuffles",)
    settings = []
    for arguments in arms:
        options = dict(zip(arguments[:-1], arguments[1:]))
        settings.append({name: options[f"--{name}"] for name in names if f"--{name}" in options})
        assert (arguments[:2] == ["-m", "experiments.variants"]) == ("--variant" in options)
        # every arm starts from the same SFT model
        assert options["--model"] == str(tmp_path / "background/seed0/sft/final")
    no_std = {"advantage_std": "none"}
    in_reward = {"temporal_target": "reward"}
    published = {"temporal_rule": "paper"} | in_reward
    credit = {"temporal_rule": "credit", "alpha": "1", "shuffled_generations": "0"} | in_reward | no_std
    taro = {"temporal_rule": "credit", "shuffled_generations": "0", "credit_shuffles": "1"} | in_reward
    assert settings == [
        {"temporal_rule": "none"},
        {"temporal_rule": "none"} | no_std,
        published,
        {"variant": "gdpo"} | published,
        {},
        {"alpha": "1"} | in_reward | no_std,
        {"variant": "taro"} | taro,
        credit,
        {"credit_shuffles": "1"} | credit,
        {"variant": "relative"} | credit,
        {"variant": "shuffled"} | credit,
        {"variant": "noise"} | credit,
    ]

    # four attempts at the skill, then the second part
    seed1 = [arguments for arguments, folder in fake.commands if folder.parent == tmp_path / "background/seed1"]
    assert [arguments[0] for arguments in seed1] == ["sft.py"] * 5
    printed = capsys.readouterr().out
    assert "Left out: seed 1" in printed
    assert "in nats: 1.50 with the skill, 0.25 with the shortcut as reason" in printed
    # credit minus GRPO, where the shortcut misleads: 0 and -100
    differences = printed.split("credit minus the other")[1]
    assert re.search(r"GRPO, group std +\| +-25 \| +-50 \|.* 2 \|", differences)
    assert (tmp_path / "background.png").exists() and (tmp_path / "background_farming.png").exists()

    n_commands = len(fake.commands)
    ablation.ablate(tmp_path, "background", [0, 1, 2], list(ablation.ARMS), jobs=1)
    assert len(fake.commands) == n_commands


def test_sigterm_ends_the_running_stages_and_starts_no_others(tmp_path):
    """Guards: a stage that trains on after its parent was killed, and holds the folder that the next run needs."""
    before = signal.getsignal(signal.SIGTERM)
    stage = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    try:
        # first: a real stage comes from the forkserver and does not inherit the handler
        stage.start()
        two_rationales.stop_stages_on_sigterm()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        stage.join(20)
        assert stage.exitcode == -signal.SIGTERM
        with pytest.raises(UserError, match="stopped"):
            two_rationales.launch(["sft.py"], tmp_path / "final")
        with pytest.raises(UserError, match="stopped"):
            two_rationales.train_sft(tmp_path, worlds.WORLDS["background"], 0)
        assert not (tmp_path / "world").exists()
    finally:
        two_rationales.STOPPED.clear()
        signal.signal(signal.SIGTERM, before)
        stage.kill()


def test_sft_continues_from_the_model_that_it_would_have_continued_from(tmp_path, monkeypatch):
    """Guards: a resumed run whose second part starts from the first model, because a later one has the skill."""
    runs = []
    for stop in (True, False):
        fake = FakeStages(seed0=2)
        monkeypatch.setattr(two_rationales, "launch", fake.launch)
        monkeypatch.setattr(two_rationales, "make_world", fake.make_world)
        monkeypatch.setattr(two_rationales, "make_model", lambda folder, *_: folder.mkdir())
        if stop:
            monkeypatch.setattr(
                fake, "train", lambda folder: (folder / "final").mkdir() if folder.name != "sft" else 1 / 0
            )
            with pytest.raises(ZeroDivisionError):
                two_rationales.train_sft(tmp_path / "seed0", worlds.WORLDS["background"], 0)
            shutil.rmtree(tmp_path / "seed0/sft")
        else:
            two_rationales.train_sft(tmp_path / "seed0", worlds.WORLDS["background"], 0)
        runs.append(next(arguments for arguments, folder in fake.commands if folder.name == "sft"))
    assert runs[0] == runs[1] and str(tmp_path / "seed0/skill2/final") in runs[0]


@pytest.mark.parametrize(
    "fault, rows",
    [
        ("shortcut_share", {("block", "agrees", 1): 9, ("the", "misleads", 1): 1}),
        ("skill_right", {("block", "agrees", 1): 3, ("block", "misleads", 0): 3, ("the", "misleads", 0): 4}),
        ("shortcut_followed", {("block", "agrees", 0): 3, ("block", "misleads", 0): 3, ("the", "misleads", 1): 4}),
        ("", {("block", "agrees", 1): 3, ("block", "misleads", 0): 3, ("the", "misleads", 1): 4}),
    ],
)
def test_an_sft_model_without_a_choice_fails_its_check(fault, rows, tmp_path):
    """Guards: RL from a model that names the shortcut and does not follow it, which no arm could make leave it."""

    def answer(name, rows):
        folder = tmp_path / "eval" / name
        folder.mkdir(parents=True)
        lines = []
        for (text, cue, accuracy), times in rows.items():
            lines += [json.dumps({"prediction": text, "cue": cue, "accuracy": accuracy}) + "\n"] * times
        (folder / "predictions.jsonl").write_text("".join(lines))

    answer("skill1", {("the", "agrees", 0): 1})
    answer("skill2", {("the", "agrees", 1): 1})
    for i in range(two_rationales.CHECKS):
        answer(f"sft_sampled{i}", rows)
    _, faults = two_rationales.check_sft(tmp_path, worlds.WORLDS["object"])
    assert [text.split()[0] for text in faults] == [fault] * bool(fault)


def test_a_result_of_another_definition_of_its_arm_is_an_error(tmp_path):
    """Guards: a table that mixes two versions of an arm, because results are found by their names."""
    file = tmp_path / "grpo.json"
    file.write_text(json.dumps({"arm": "--temporal_rule none --variant noise"}))
    with pytest.raises(
        UserError, match="grpo.json: of the settings '--temporal_rule none --variant noise', now they are"
    ):
        ablation.read_arm(file, "grpo")


def test_a_report_has_what_is_finished(tmp_path):
    """Guards: differences between means over different seeds; a number of seeds that the arm does not have; a seed that
    failed its check.
    """

    def result(value):
        return dict.fromkeys(two_rationales.MEASURES, value)

    seeds = ((10, [], {"grpo": 0.1, "credit": 0.4}), (1, [], {"grpo": 0.3}), (2, ["bad"], {}), (3, [], {}))
    for seed, faults, arms in seeds:
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        (folder / "sft.json").write_text(json.dumps({"seed": seed, "faults": faults, "sft": result(0.5)}))
        for arm, value in arms.items():
            (folder / f"{arm}.json").write_text(
                json.dumps({"arm": ablation.described(ablation.ARMS[arm]), "credit": {}} | result(value))
            )
    results = ablation.collect(tmp_path, list(ablation.ARMS))
    assert [r["seed"] for r in results] == [1, 2, 10]
    means, differences = (cells(text) for text in ablation.tables(results).split("Paired differences"))
    assert [(row[0], row[1], row[-1]) for row in means[1:]] == [
        ("SFT model", "50", "2"),
        ("GRPO, group std", "20", "2"),
        ("credit", "40", "1"),
    ]
    assert differences[1:] == [["GRPO, group std", "30", "30", "30", "1"]]


def cells(text):
    """The cells of all rows of the Markdown tables in a text, without rules."""
    rows = [line.split("|")[1:-1] for line in text.split("\n") if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in row] for row in rows]


@pytest.mark.parametrize("file", sorted(ROOT.glob("experiments/*.json")), ids=lambda file: file.stem)
def test_tables_in_the_readme_are_those_of_the_results_file(file):
    """Guards: a result typed by hand, or one of an earlier run."""
    in_readme = cells((ROOT / "experiments/README.md").read_text(encoding="utf-8"))
    rows = cells(ablation.tables(json.loads(file.read_text())))
    assert len(rows) > 5
    for row in rows:
        assert row in in_readme, row
