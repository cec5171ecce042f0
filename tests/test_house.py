"""The two floors: scripts call support/, and nothing in support/ knows a script."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


def imports(path):
    """The modules that a file imports, wherever in it: "support.run" of `from support import run`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def test_no_import_runs_upward():
    """Guards: machinery that depends on a script, so that a reader of a script has to read it too."""
    above = SCRIPTS | {"benchmarks", "tools", "experiments", "bench", "tests"}
    for path in ROOT.glob("support/*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & above, path


def test_the_method_does_not_import_what_is_optional():
    """Guards: a training script that fails where an optional folder is missing."""
    for name in ("rewards", "data", "policy", "sft", "tgrpo"):
        found = {imported.split(".")[0] for imported in imports(ROOT / f"{name}.py")}
        assert not found & {"evaluate", "toy", "benchmarks", "tools", "experiments", "bench", "tests"}, name


def test_support_has_no_circle_of_imports():
    """Guards: two modules that can only be read together."""
    below = {}
    for path in ROOT.glob("support/*.py"):
        below[path.stem] = {name.split(".")[1] for name in imports(path) if name.startswith("support.")}
    while below:
        free = [name for name, needed in below.items() if not needed & below.keys()]
        assert free, f"a circle among {sorted(below)}"
        for name in free:
            del below[name]
