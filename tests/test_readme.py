"""The README says what is there: its commands run in a test or need what no test has, and all it names exists."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = {
    p.name: p.read_text()
    for p in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("docs/*.py"), *ROOT.glob("tools/*.py")]
}
FLAGS = set(re.findall(r"--(\w+)", " ".join(SOURCE.values()))) | {
    f
    for cls in ("SharedConfig", "TrainConfig", "DataConfig", "EvalConfig", "TGRPOConfig")
    for f in re.findall(
        r"^    (\w+): \w+ = option",
        next(t for t in SOURCE.values() if f"class {cls}(" in t or f"class {cls}:" in t),
        re.M,
    )
}
ELSEWHERE = ("needs GPUs; not run", "needs the hub; not run", "needs the data; not run")

# Every other command: the test that runs it, or the very code behind it.
RUN_BY = {
    "pip install -r requirements.txt && python toy.py": "test_every_stage_of_the_toy_runs_as_its_command",
    "pip install -r tests/requirements.txt && python -m pytest": ".ci/run",
    "python -m tools.plan_memory --config configs/7b.yaml --gpus 8": "test_what_the_plan_says_of_the_shipped_configs",
    "accelerate launch evaluate.py --config configs/toy.yaml": "test_every_stage_of_the_toy_runs_as_its_command",
    "python evaluate.py --score predictions.jsonl": "test_scoring_loads_no_torch",
    "python evaluate.py --score predictions.jsonl --annotations DIR": "test_bare_answers_joined_with_the_official_files",
    "python evaluate.py --score predictions.jsonl --report report.html --data_root DIR": "test_the_report_is_written_with_the_run",
    "python -m tools.distill predictions.jsonl --out cot.json --data_root DIR": "test_distilled_answers_train_the_sft_model",
    "python -m experiments.ablation": "test_ablation_runs_every_arm_once_per_seed",
    "for seed in 0 1 2 3 4; do python toy.py --seed $seed --out runs/seed$seed; done": "test_every_stage_of_the_toy_runs_as_its_command",
    "python -m tools.toy_table runs/seed0 runs/seed1 runs/seed2 runs/seed3 runs/seed4": "test_seeds_table_is_mean_and_range",
    "python -m tools.plot runs/toy/tgrpo/metrics.jsonl": "test_curves_are_written_beside_the_metrics",
    "python -m tools.plot runs/a/metrics.jsonl runs/b/metrics.jsonl --out both.png": "test_two_runs_have_two_colours_in_one_picture",
    "python -m tools.rollouts runs/toy/tgrpo/rollouts.jsonl": "test_a_page_of_rollouts_needs_only_the_run",
    "python -m tools.split mine.json --share 0.1 --out my_data": "test_a_split_is_written_whole_and_counted",
    "python sft.py --config examples/own.yaml --model runs/toy/base --output_dir runs/try/sft --steps 2": "test_the_examples_train_in_both_stages_and_are_answered",
    "python evaluate.py --config examples/own.yaml --model runs/try/tgrpo/final --output_dir runs/try/eval --max_new_tokens 40": "test_the_examples_train_in_both_stages_and_are_answered",
    "python tgrpo.py --config examples/own.yaml --model runs/try/sft/final --output_dir runs/try/tgrpo --steps 2 --max_new_tokens 40": "test_the_examples_train_in_both_stages_and_are_answered",
    "python -m tools.rollouts runs/try/tgrpo/rollouts.jsonl": "test_a_page_of_rollouts_needs_only_the_run",
    "python data.py --config examples/own.yaml --stage sft --check": "test_the_examples_media_can_be_read",
    "python data.py --config examples/own.yaml --check": "test_the_examples_media_can_be_read",
    "python -m tools.distill runs/own/teacher/predictions.jsonl --out my_data/cot.json": "test_distilled_answers_train_the_sft_model",
}


def commands():
    """(command, comment) of every line in the README's code blocks."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S):
        for line in [] if language else block.strip().split("\n"):
            command, _, comment = line.partition("  #")
            yield command.strip(), comment.strip()


@pytest.mark.parametrize("command, comment", list(commands()), ids=lambda text: text[:60])
def test_every_command_runs_in_a_test_or_says_why_not(command, comment):
    """Guards: a command that was true once; a flag that was renamed."""
    for name in re.findall(r"[\w/]+\.(?:py|yaml)\b", command):
        assert (ROOT / name).is_file(), name
    for flag in re.findall(r"--([a-z_]\w*)", command.split("hf download")[0]):
        assert flag in FLAGS or flag in (
            "multi_gpu",
            "num_machines",
            "num_processes",
            "machine_rank",
            "main_process_ip",
            "main_process_port",
        ), flag
    if comment not in ELSEWHERE:
        test = RUN_BY[command]
        assert (ROOT / test).is_file() or any(f"def {test}(" in text for text in SOURCE.values()), test


def test_everything_the_readme_names_exists():
    """Guards: a file, function, test, setting or metric that is gone, or was never there."""
    for name in set(re.findall(r"`([^`\n]+)`", README)) | set(re.findall(r"\]\(([^)]+)\)", README)):
        if re.fullmatch(r"(rewards|tgrpo|data|policy|common|toy)\.[a-zA-Z_]+", name) and not name.endswith(
            (".py", ".json")
        ):
            module, attribute = name.split(".")
            assert hasattr(importlib.import_module(module), attribute), name
        elif re.fullmatch(r"[\w./]+\.(py|yaml|png|txt)", name):
            assert (ROOT / name).exists(), name
        elif name.startswith("test_"):
            assert any(f"def {name}(" in text for text in SOURCE.values()), name
        elif match := re.match(r"--(\w+)", name):
            assert match[1] in FLAGS, name
        elif match := re.fullmatch(r"(\w+): [\w]+", name):
            assert match[1] in FLAGS, name
        elif re.fullmatch(r"(reward|temporal|group|policy|completion|data|time|rollout|memory)/\w+", name):
            group, key = name.split("/")
            made = {"time": f'lap("{key}")', "reward": f'"{key}"'}.get(group, name)
            assert any(
                made in text or name in text or f"{group}/{key.rsplit('_', 1)[0]}_{{" in text
                for text in SOURCE.values()
            ), name
        elif re.fullmatch(r"[a-z]+_[a-z_]+", name) and not name.startswith("object"):
            assert name in FLAGS or any(re.search(rf"\b{name}\b", text) for text in SOURCE.values()), name
    for name in ("GPT-4o", "not run", "Apache-2.0"):
        assert name in README


def test_published_scores_are_the_same_in_the_readme_and_in_the_table():
    """Guards: a typo in one of two places."""
    from benchmarks import PUBLISHED

    columns = ["vsibench", "videommmu", "mmvu", "mvbench", "tempcompass", "videomme"]
    for label, model in (
        ("GPT-4o", "GPT-4o"),
        ("Qwen2.5-VL-7B, CoT prompt", "Qwen2.5-VL-7B (CoT prompt)"),
        ("Video-R1-7B (T-GRPO)", "Video-R1-7B"),
    ):
        row = next(line for line in README.split("\n") if line.startswith(f"| {label} |")).split("|")[2:-1]
        for name, cell in zip(columns, row, strict=True):
            assert (
                tuple(map(float, cell.split("/"))) == PUBLISHED[model].get(name)
                if cell.strip() != "–"
                else name not in PUBLISHED[model]
            )
