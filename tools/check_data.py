"""Check a stage's records before training: print one example, then decode every file once.

    python -m tools.check_data --config configs/toy.yaml --stage tgrpo                     # lists what is unusable
    python -m tools.check_data --config configs/toy.yaml --stage sft --out usable.json     # writes the usable rows, too

The exit status is 1 if more rows are unusable than `max_unreadable` allows. With --out it is 0.
"""

import argparse
import functools
import json
import sys
from contextlib import suppress

from tqdm import tqdm

import data
import rewards
from support import model_files, record_files, settings, storage, workers
from support.settings import UserError
from tools import plan_memory


def read_media(record, cfg):
    """(why the media of a record cannot be read, or None; whether they are a video of one frame)."""
    try:
        _, metadata = data.load_media(record, cfg)
    except data.Unusable as error:
        return str(error), False
    return None, metadata is not None and metadata.total_num_frames == 1


def check_media(records, cfg):
    """Reads the media of {row number: record} in worker processes, once for all rows that show the same part.

    Prints which rows show a video of one frame. Returns {row number: why its media cannot be read}.
    """
    groups = {}
    for number, record in records.items():
        path = record_files.media_path(record["path"], cfg.data_root)
        part = [record.get(name) for name in ("data_type", "start", "end", "fps")]
        groups.setdefault(f"{path} {part}", []).append(number)
    first_records = [records[numbers[0]] for numbers in groups.values()]
    read = functools.partial(read_media, cfg=cfg)
    results = workers.with_workers(first_records, cfg, batch_size=None, collate_fn=read)
    results = tqdm(results, total=len(first_records), desc="reading media", unit="clip")
    reasons = {}
    stills = []
    # results first, or its bar would miss the last one
    for (reason, is_still), numbers in zip(results, groups.values()):
        reasons |= dict.fromkeys(numbers, reason)
        stills += numbers if is_still else []
    if stills:
        print(f"{len(stills)} of {len(records)} rows show a video of one frame, which has no order: {sorted(stills)}")
    return {number: reason for number, reason in reasons.items() if reason}


def check(cfg, stage, out):
    """Prints an example and the unusable rows, writes the others to `out` if it is given. Returns the exit status."""
    if out:
        storage.refuse_existing(out)
    # the model of an earlier stage may not be made yet
    with suppress(plan_memory.UnknownModel):
        model_files.check_settings(cfg, plan_memory.model_shape(cfg.model))
    rows = record_files.read_rows(cfg.records)
    record_files.refuse_conversations(cfg.records, rows)
    usable, reasons = record_files.split_rows(rewards.parse_solution, rows, cfg.data_root, need_process=stage == "sft")
    if usable:
        record_files.check_data_root(list(usable.values()), cfg.data_root)
    for record in list(usable.values())[:1]:
        print(json.dumps(record, indent=2, ensure_ascii=False))
        print("\nprompt:\n" + data.messages(record, cfg)[0]["content"][1]["text"] + "\n")
    reasons |= check_media(usable, cfg)
    for number in sorted(reasons):
        row = rows[number - 1]
        name = f" (problem_id {row['problem_id']})" if isinstance(row, dict) and "problem_id" in row else ""
        print(f"row {number}{name}: {reasons[number]}")
    usable_rows = [row for number, row in enumerate(rows, 1) if number not in reasons]
    print(f"{len(usable_rows)} of {len(rows)} rows of {cfg.records} can be used by {stage}")
    print("not checked: max_prompt_tokens, which needs the model's processor")
    if not out:
        return int(len(reasons) > cfg.max_unreadable * len(rows))
    if not usable_rows:
        raise UserError(f"{cfg.records}: no row can be used, {out} is not written")
    storage.write_atomic(out, json.dumps(usable_rows, indent=1, ensure_ascii=False))
    return 0


def main():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # the section of the config to read
    parser.add_argument("--stage", choices=settings.STAGES, default="tgrpo")
    parser.add_argument("--out")
    args, rest = parser.parse_known_args()
    # not EvalConfig: its benchmarks have a folder of their own, which is not that of the records
    config = settings.SharedConfig if args.stage == "evaluate" else plan_memory.CONFIGS[args.stage]
    # partial: a config of experiments has more settings
    cfg = settings.load_config(config, args.stage, rest, __doc__, partial=True, required=["records"])
    sys.exit(check(cfg, args.stage, args.out))


if __name__ == "__main__":
    main()
