"""docs/one_step.ipynb. After a change, write its output again, twice if runs/toy was missing (pip install notebook):

python -m nbconvert --to notebook --execute --inplace docs/one_step.ipynb
"""

import ast
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from test_readme import exists

import data
import policy
import rewards
import tgrpo

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/one_step.ipynb").read_text(encoding="utf-8")
CELLS = json.loads(TEXT)["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_the_notebook_is_short_and_defines_nothing_of_the_method():
    """Guards: a second version of an equation, which readers would trust; a notebook that grows."""
    assert len(CELLS) <= 25
    assert len("\n".join(CODE).splitlines()) <= 200
    with_functions = [code for code in CODE if any(isinstance(n, ast.FunctionDef) for n in ast.walk(ast.parse(code)))]
    # the one cell that only draws
    (drawing,) = with_functions
    assert "torch" not in drawing and "show_table" in drawing
    method = {name for script in (data, policy, rewards, tgrpo) for name in vars(script) if not name.startswith("_")}
    stored = {
        n.id for n in ast.walk(ast.parse("\n".join(CODE))) if isinstance(n, ast.Name) and type(n.ctx) is ast.Store
    }
    assert not stored & method


def test_everything_the_notebooks_text_names_exists():
    """Guards: a file, function or setting that was renamed."""
    text = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    assert [name for name in re.findall(r"`([^`\n]+)`", text) if not exists(name)] == []


def test_the_notebooks_output_is_complete_and_clean():
    """Guards: a notebook without its pictures; output of cells run out of order; a path of the machine that ran it."""
    assert len(TEXT.encode()) < 400_000
    cells = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = json.dumps([cell["outputs"] for cell in cells])
    assert outputs.count('"image/png"') == 2 and '"stderr"' not in outputs and '"error"' not in outputs
    for word in ("Warning", "/home/", "/root/", "/tmp/", str(ROOT)):
        assert word not in outputs, word


def test_the_notebook_runs_and_its_update_follows_the_advantages(world, tmp_path, monkeypatch):
    """Guards: a cell that no longer runs; an update of the wrong sign; a step computed on other completions."""
    # the session's world and model, laid out like runs/toy; the notebook reads questions 49 to 64 of those that mislead
    for name, target in (("base", "base"), ("sft/final", "base"), ("world/media", "world/media")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(world / target)
    clips = [row for row in json.loads((world / "world/rl.json").read_text()) if row["data_type"] == "video"]
    rows = [clips[i % len(clips)] | {"problem_id": i, "cue": "misleads"} for i in range(52)]
    (tmp_path / "world/rl.json").write_text(json.dumps(rows))
    # a model with random weights is sometimes right about this
    monkeypatch.setattr(tgrpo, "accuracy_reward", lambda completion, *_: float(completion.count("e") > 4))
    shown = []
    jupyter = types.ModuleType("IPython.display")
    jupyter.HTML = str
    jupyter.display = shown.append
    monkeypatch.setitem(sys.modules, "IPython.display", jupyter)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT / "docs")
    AcceleratorState._reset_state(reset_partial_state=True)

    names = {}
    for number, code in enumerate(CODE):
        if number == 0:
            assert 'Path("runs/toy")' in code
            code = code.replace('Path("runs/toy")', f"Path({str(tmp_path)!r})")
        exec(compile(code, f"code cell {number}", "exec"), names)

    group = names["group"]
    assert 0 < group.correct_G.sum() < 8 and names["p"] == group.correct_G.double().mean()
    assert names["loss"].item() == pytest.approx(-group.advantages_G.mean().item(), abs=1e-6)
    log_ratio_G = (names["new_logps_GT"] - names["old_logps_GT"]).sum(1)
    assert (log_ratio_G * group.advantages_G).sum() > 0.01
    assert names["kl_GT"].max() > 0 and torch.equal(names["old_logps_GT"], names["ref_logps_GT"])
    tables = [text for text in shown if isinstance(text, str)]
    assert len(tables) == 9 and "legend" in tables[-1] and len(shown) == 11
