"""README.md, docs/ and experiments/README.md: every command, name, link and line count on them is that of the code."""

import importlib
import re
from pathlib import Path

import pytest
import yaml

import data
from support import settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "experiments/README.md"]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
FOLDERS = (".", "support", "tests", "tools", "benchmarks", "experiments", "bench")
ALL_SOURCE = "\n".join(path.read_text(encoding="utf-8") for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
# settings of the stages, and arguments of the tools and of accelerate
FLAGS = set(re.findall(r"^    (\w+): \w+ = (?:settings\.)?option", ALL_SOURCE, re.M)) | set(
    re.findall(r'"--(\w+)"', ALL_SOURCE)
)
FLAGS |= {"config", "help", "config_file", "multi_gpu", "num_machines", "num_processes", "machine_rank"}
FLAGS |= {"main_process_ip", "main_process_port"}


def commands():
    """Every command in the pages' code blocks."""
    found = set()
    for text in TEXTS.values():
        # with the language, or the end of a block of YAML would be taken for the start of one
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
            if not language:
                found |= {line.partition("  #")[0].strip() for line in block.strip().split("\n")}
    return sorted(found)


@pytest.mark.parametrize("command", commands(), ids=lambda text: text[:60])
def test_every_documented_command_names_files_and_flags_that_exist(command):
    """Guards: a command that no longer works; a flag that was renamed."""
    for name in re.findall(r"[\w/]+\.(?:py|yaml)\b", command):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"-m ((?:tools|experiments|benchmarks|bench)\.\w+)", command):
        assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), name
    ours = re.split(r"hf download|modelscope download|pip install", command)[0]
    for flag in re.findall(r"--([a-z_]\w*)", ours):
        assert flag in FLAGS, flag


def test_the_released_prompt_of_the_docs_is_accepted_and_has_the_options():
    """Guards: a brace or an indentation that the settings refuse, a prompt that loses the question or its options."""
    block = re.search(r"^```yaml\n(prompt: .*?)^```$", TEXTS[ROOT / "docs/training.md"], re.M | re.S)[1]
    cfg = settings.SharedConfig(prompt=yaml.safe_load(block)["prompt"])
    record = {
        "problem": "Which way?",
        "options": ["A. left", "B. right"],
        "problem_type": "multiple choice",
        "data_type": "video",
    }
    text = data.messages(record, cfg)[0]["content"][1]["text"]
    assert text.startswith("Which way?\nA. left\nB. right\n\nPlease think about this question as if")
    assert text.endswith("<answer> </answer> tags. The result is the letter of one option.")


def names_in(page):
    """Names between backquotes outside of code blocks."""
    text = re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.M | re.S)
    return sorted(set(re.findall(r"`([^`\n]+)`", text)))


def exists(name):
    """True if a name on a page is a file, function, test, setting or metric of this repository, or looks like none."""
    module = re.fullmatch(r"(\w+)\.([a-zA-Z_]+)(\.\w+)?", name)
    if module and module[2] not in ("py", "json", "jsonl", "yaml", "png", "txt"):
        for place in (f"{module[1]}.py", f"support/{module[1]}.py", f"tools/{module[1]}.py"):
            if (ROOT / place).is_file():
                found = importlib.import_module(place.removesuffix(".py").replace("/", "."))
                return hasattr(found, module[2])
        return re.search(rf"\b{module[2]}\b", ALL_SOURCE) is not None or (ROOT / f"tools/{module[2]}.py").is_file()
    if re.fullmatch(r"[\w./]+\.(py|yaml|png|txt)|[\w./]+/", name):
        places = (ROOT, ROOT / "experiments", ROOT / "docs")
        return any((place / name).exists() for place in places) or name.startswith(("data/", "my_data/", "runs/"))
    if name.startswith("test_"):
        return f"def {name}(" in ALL_SOURCE
    flag = re.match(r"--(\w+)", name) or re.fullmatch(r"(\w+): \w+", name)
    if flag and name != "--name value":
        return flag[1] in FLAGS
    if re.fullmatch(r"(reward|temporal|group|policy|completion|data|time|rollout|memory)/\w+", name):
        return f'"{name.split("/")[1]}"' in ALL_SOURCE or name in ALL_SOURCE
    if re.fullmatch(r"[a-z]+_[a-z_]+", name):
        return re.search(rf"\b{name}\b", ALL_SOURCE) is not None
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_everything_a_page_names_exists(page):
    """Guards: a file, function, test, setting, metric or link that was removed or renamed."""
    assert [name for name in names_in(page) if not exists(name)] == []
    for target in re.findall(r"\]\((?!https://)([^)#]+)[^)]*\)", TEXTS[page]):
        assert (page.parent / target).exists(), target


def test_the_readme_is_short_and_its_line_counts_are_those_of_the_files():
    """Guards: a README that grows back into a manual; line counts of an earlier version (an idea may add 20 %)."""
    assert len(README.encode()) < 10_500
    counts = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)
    assert len(counts) == 5
    for name, lines in counts:
        actual = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(actual - int(lines)) <= 0.2 * actual, (name, actual)


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
