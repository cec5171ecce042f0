"""The toy's results over several seeds, mean and range, as the README's table.

for seed in 0 1 2 3 4; do python toy.py --seed $seed --out runs/seed$seed; done
python -m tools.toy_table runs/seed0 runs/seed1 runs/seed2 runs/seed3 runs/seed4
"""

import argparse
import json
from pathlib import Path

from support.settings import UserError
from support.tables import table

MODELS = {"sft": "SFT model", "tgrpo": "T-GRPO"}
# columns of toy.HEADINGS
COLUMNS = {
    "ordered": "in order",
    "shuffled": "shuffled",
    "reversed": "reversed",
    "single": "one frame",
    "blind": "no frame",
    "conflict": "misleading background",
}


def read_summaries(folders):
    """{seed: summary} of these runs of toy.py. Raises UserError for a folder without one, and for a repeated seed."""
    summaries = {}
    for folder in folders:
        try:
            summary = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
        except OSError:
            raise UserError(f"no summary.json in {folder}: run python toy.py --seed N --out {folder}") from None
        if summary["seed"] in summaries:
            raise UserError(f"{folder}: seed {summary['seed']} twice")
        summaries[summary["seed"]] = summary
    return summaries


def seeds_table(folders):
    """Markdown: test accuracy in percent, mean (lowest to highest seed), of the SFT model and of the trained policy."""
    summaries = read_summaries(folders)
    rows = []
    for model, label in MODELS.items():
        cells = []
        for column in COLUMNS:
            percent = [100 * summary[model][column] for summary in summaries.values()]
            cells.append(f"{sum(percent) / len(percent):.1f} ({min(percent):.0f} to {max(percent):.0f})")
        rows.append([label, *cells])
    seeds = ", ".join(str(seed) for seed in sorted(summaries))
    return f"{table(['', *COLUMNS.values()], rows)}\n\nmean and range of seeds {seeds}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders that toy.py --out wrote, one per seed")
    print(seeds_table(parser.parse_args(argv).folders))


if __name__ == "__main__":
    main()
