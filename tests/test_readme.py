"""README.md, docs/ and experiments/README.md: their commands run in a test, and everything they name exists."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "experiments/README.md"]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
FOLDERS = (".", "tests", "docs", "tools", "benchmarks", "experiments", "bench")
SOURCE = {path: path.read_text(encoding="utf-8") for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
ALL_SOURCE = "\n".join(SOURCE.values())
# settings of the stages, and arguments of the tools and of accelerate
FLAGS = set(re.findall(r"^    (\w+): \w+ = option", ALL_SOURCE, re.M)) | set(re.findall(r'"--(\w+)"', ALL_SOURCE))
FLAGS |= {"config", "help", "config_file", "multi_gpu", "num_machines", "num_processes", "machine_rank"}
FLAGS |= {"main_process_ip", "main_process_port"}
NOT_HERE = ("needs GPUs", "needs the hub", "needs the data")

# Every other command: the test that runs it, or the code behind it. The 7B commands of the README need GPUs.
RUN_BY = {
    "accelerate launch sft.py --config configs/7b.yaml": "test_every_shipped_config_loads",
    "accelerate launch tgrpo.py --config configs/7b.yaml": "test_every_shipped_config_loads",
    "accelerate launch evaluate.py --config configs/7b.yaml": "test_every_shipped_config_loads",
    "accelerate launch tgrpo.py --config configs/credit.yaml": "test_a_credit_run_samples_no_shuffled_completions",
    "accelerate launch evaluate.py --config configs/toy.yaml": "test_every_stage_of_the_toy_runs_as_its_command",
    "accelerate launch -m experiments.variants --variant shuffled": "test_variant_replaces_functions_of_tgrpo",
    "pip install -r requirements.txt && python toy.py": "test_every_stage_of_the_toy_runs_as_its_command",
    "pip install -r tests/requirements.txt && python -m pytest": ".ci/run",
    "python -m tools.plan_memory --config configs/7b.yaml --gpus 8": "test_what_the_plan_says_of_the_shipped_configs",
    "python -m tools.plan_memory --config configs/3b_one_gpu.yaml --gpus 1 --card_gb 24": (
        "test_what_the_plan_says_of_the_shipped_configs"
    ),
    "python -m experiments.lora": "test_lora_and_full_training_start_from_one_pretrained_model",
    "python evaluate.py --score predictions.jsonl": "test_scoring_loads_no_torch",
    "python evaluate.py --score predictions.jsonl --annotations DIR": "test_bare_answers_are_joined",
    "python -m tools.report predictions.jsonl --data_root DIR": "tests/test_report.py",
    "python -m tools.report SFT/predictions.jsonl TGRPO/predictions.jsonl": "test_several_files_are_named",
    "python -m tools.distill predictions.jsonl --out cot.json --data_root DIR": "test_distilled_answers_train",
    "python -m experiments.ablation": "test_ablation_runs_every_arm",
    "python -m experiments.two_rationales": "test_teacher_gives_both_reasons",
    "for seed in 0 1 2; do python toy.py --seed $seed --out runs/seed$seed; done": "test_every_stage_of_the_toy_runs",
    "python -m tools.toy_table runs/seed0 runs/seed1 runs/seed2": "test_seeds_table_is_mean_and_range",
    "python -m tools.plot runs/toy/tgrpo/metrics.jsonl": "test_curves_are_written_beside_the_metrics",
    "python -m tools.plot runs/a/metrics.jsonl runs/b/metrics.jsonl": "test_two_runs_have_two_colours_in_one_picture",
    "python -m tools.rollouts runs/toy/tgrpo/rollouts.jsonl": "test_page_of_rollouts_needs_only",
    "python -m tools.rollouts runs/try/tgrpo/rollouts.jsonl": "test_page_of_rollouts_needs_only",
    "python -m tools.split mine.json --share 0.1 --out my_data": "test_a_split_is_written_whole_and_counted",
    "python data.py --config examples/own.yaml --stage sft --check": "test_the_examples_media_can_be_read",
    "python data.py --config examples/own.yaml --check": "test_the_examples_media_can_be_read",
    "python -m tools.distill runs/own/teacher/predictions.jsonl --out my_data/cot.json": "test_distilled_answers_train",
    "python sft.py --config examples/own.yaml": "test_the_examples_train_in_both_stages_and_are_answered",
    "python tgrpo.py --config examples/own.yaml": "test_the_examples_train_in_both_stages_and_are_answered",
    "python evaluate.py --config examples/own.yaml": "test_the_examples_train_in_both_stages_and_are_answered",
}


def commands():
    """(command, comment) of every line in the pages' code blocks."""
    for text in TEXTS.values():
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
            for line in [] if language else block.strip().split("\n"):
                command, _, comment = line.partition("  #")
                yield command.strip(), comment.strip()


@pytest.mark.parametrize("command, comment", sorted(set(commands())), ids=lambda text: text[:60])
def test_every_documented_command_runs_in_a_test_or_names_what_it_needs(command, comment):
    """Guards: a command that no longer works; a flag that was renamed."""
    for name in re.findall(r"[\w/]+\.(?:py|yaml)\b", command):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"-m ((?:tools|experiments)\.\w+)", command):
        assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), name
    for flag in re.findall(r"--([a-z_]\w*)", command.split("hf download")[0]):
        assert flag in FLAGS, flag
    if comment not in NOT_HERE:
        # a command with more arguments is run by the test of the shorter one
        known = [start for start in RUN_BY if command == start or command.startswith(f"{start} --")]
        assert known, command
        test = RUN_BY[max(known, key=len)]
        assert (ROOT / test).is_file() or f"def {test}" in ALL_SOURCE, test


def names_in(page):
    """Names between backquotes outside of code blocks."""
    text = re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.M | re.S)
    return sorted(set(re.findall(r"`([^`\n]+)`", text)))


def exists(name):
    """True if a name on a page is a file, function, test, setting or metric of this repository, or looks like none."""
    module = re.fullmatch(r"(rewards|tgrpo|data|policy|common|frames|settings|toy)\.([a-zA-Z_]+)", name)
    if module and module[2] not in ("py", "json", "yaml"):
        return hasattr(importlib.import_module(module[1]), module[2])
    if re.fullmatch(r"[\w./]+\.(py|yaml|png|txt)|[\w./]+/", name):
        places = (ROOT, ROOT / "experiments", ROOT / "docs")
        return any((place / name).exists() for place in places) or name.startswith(("data/", "my_data/", "runs/"))
    if name.startswith("test_"):
        return f"def {name}(" in ALL_SOURCE
    if name in ("--name value", "benchmarks/") or name.endswith("_003.png"):
        return True
    flag = re.match(r"--(\w+)", name) or re.fullmatch(r"(\w+): \w+", name)
    if flag:
        return flag[1] in FLAGS
    if re.fullmatch(r"(reward|temporal|group|policy|completion|data|time|rollout|memory)/\w+", name):
        group, key = name.split("/")
        if group == "time":
            return f'lap("{key}")' in ALL_SOURCE
        if group == "reward":
            return f'"{key}"' in ALL_SOURCE
        return name in ALL_SOURCE or f"{group}/{key.rsplit('_', 1)[0]}_{{" in ALL_SOURCE
    if re.fullmatch(r"[a-z]+_[a-z_]+", name):
        return re.search(rf"\b{name}\b", ALL_SOURCE) is not None
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_everything_a_page_names_exists(page):
    """Guards: a file, function, test, setting, metric or link that was removed or renamed."""
    assert [name for name in names_in(page) if not exists(name)] == []
    for target in re.findall(r"\]\((?!https://)([^)#]+)[^)]*\)", TEXTS[page]):
        assert (page.parent / target).exists(), target


def test_the_readme_is_short_and_says_once_what_was_not_run():
    """Guards: a README that grows back into a manual; a claim about GPUs without a run."""
    assert len(README.encode()) < 9500
    assert README.count("several GPUs have not been tried") == 1 and "Apache-2.0" in README
    assert re.findall(r"@\w+@|NNN", README) == []


def test_the_lines_in_the_readme_are_those_of_the_files():
    """Guards: a reading time computed for an earlier version (5 % off at most)."""
    for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M):
        actual = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(actual - int(lines)) <= 0.05 * actual, (name, actual)


def test_published_scores_are_equal_in_the_docs_and_in_the_code():
    """Guards: a typo in one of the two."""
    from benchmarks import PUBLISHED

    columns = ["vsibench", "videommmu", "mmvu", "mvbench", "tempcompass", "videomme"]
    lines = TEXTS[ROOT / "docs/benchmarks.md"].split("\n")
    models = {
        "GPT-4o": "GPT-4o",
        "Qwen2.5-VL-7B, CoT prompt": "Qwen2.5-VL-7B (CoT prompt)",
        "Video-R1-7B (T-GRPO)": "Video-R1-7B",
    }
    for label, model in models.items():
        row = next(line for line in lines if line.startswith(f"| {label} |")).split("|")[2:-1]
        for name, cell in zip(columns, row, strict=True):
            if cell.strip() == "–":
                assert name not in PUBLISHED[model]
            else:
                assert tuple(map(float, cell.split("/"))) == PUBLISHED[model][name]
