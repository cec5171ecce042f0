"""Sets a share of the clips aside as a test set. All questions on one clip are on the same side.

python -m tools.split mine.json --share 0.1 --out my_data      # writes my_data/train.json and my_data/test.json
"""

import json
import os
import random
from functools import partial
from pathlib import Path

from support import record_files, settings, storage
from tools import shared


def clip_of(row):
    """The clip that a row is on; "./a.mp4" and "a.mp4" are one."""
    return os.path.normpath(row["path"])


def split(rows, share, seed):
    """(training rows, test rows), each in file order. Each side has at least one clip; `share` counts clips.

    rows: dicts with a `path`. Raises UserError for a row without one, or for fewer than two clips.
    """
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("path"), str):
            raise settings.UserError(f"row {number}: path: missing")
    clips = sorted({clip_of(row) for row in rows})
    if len({os.path.isabs(clip) for clip in clips}) > 1:
        raise settings.UserError("path: some are absolute, others relative: one clip could be on both sides")
    if len(clips) < 2:
        raise settings.UserError(f"all {len(rows)} rows are on one clip: nothing to split")
    random.Random(seed).shuffle(clips)
    n_test = max(1, min(round(share * len(clips)), len(clips) - 1))
    test_clips = set(clips[:n_test])
    train = [row for row in rows if clip_of(row) not in test_clips]
    test = [row for row in rows if clip_of(row) in test_clips]
    return train, test


def main(argv=None):
    parser = shared.parser(__doc__)
    parser.add_argument("records", help="JSON or JSONL file of records")
    share = partial(settings.convert, kind=float, low=1e-6, high=0.9)
    parser.add_argument("--share", type=share, required=True, help="share of the clips in the test set")
    parser.add_argument("--out", required=True, help="folder for train.json and test.json")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    outputs = [Path(args.out) / f"{name}.json" for name in ("train", "test")]
    for path in outputs:
        storage.refuse_existing(path)
    rows = record_files.read_rows(args.records)
    sides = split(rows, args.share, args.seed)
    n_clips = len({clip_of(row) for row in rows})
    for path, side in zip(outputs, sides):
        storage.write_atomic(path, json.dumps(side, indent=1, ensure_ascii=False))
        n_side = len({clip_of(row) for row in side})
        print(f"{path}: {len(side)} of {len(rows)} rows, on {n_side} of {n_clips} clips")


if __name__ == "__main__":
    main()
