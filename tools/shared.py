"""What the tools share: their command line, and reading the files that a run logs to."""

import argparse

from support import settings, storage


def parser(doc):
    """An argument parser that shows a tool's docstring as its help."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=formatter, allow_abbrev=False)


def read_log(path, needed):
    """Rows of a JSONL file of a run. Raises UserError if it has none, or one without all fields in `needed`."""
    rows = storage.read_jsonl(path)
    if not rows:
        raise settings.UserError(f"{path}: no such file, or no row in it")
    for number, row in enumerate(rows, 1):
        missing = [name for name in needed if not isinstance(row, dict) or name not in row]
        if missing:
            raise settings.UserError(f"{path}, line {number}: this row lacks {', '.join(missing)}")
    return rows
