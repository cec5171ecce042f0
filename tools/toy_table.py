"""The toy's results over several seeds, mean and range, as the README's table.

for seed in 0 1 2; do python toy.py --seed $seed --out runs/seed$seed; done
python -m tools.toy_table runs/seed0 runs/seed1 runs/seed2
"""

import json
from pathlib import Path

import toy
from benchmarks.shared import ORDERS
from support.settings import UserError
from support.tables import table
from tools import shared

COLUMNS = (*ORDERS, "conflict")


def seeds_table(folders):
    """Markdown: test accuracy in percent, mean (lowest to highest seed), of the SFT model and of the trained policy.

    Raises UserError for a folder without results, and for a repeated seed.
    """
    summaries = {}
    for folder in folders:
        path = Path(folder) / "summary.json"
        if not path.is_file():
            raise UserError(f"no summary.json in {folder}: run python toy.py --seed N --out {folder}")
        summary = json.loads(path.read_text(encoding="utf-8"))
        if summary["seed"] in summaries:
            raise UserError(f"{folder}: seed {summary['seed']} twice")
        summaries[summary["seed"]] = summary
    rows = []
    for model, label in toy.MODELS.items():
        cells = []
        for column in COLUMNS:
            percent = [100 * summary[model][column] for summary in summaries.values()]
            cells.append(f"{sum(percent) / len(percent):.1f} ({min(percent):.1f} to {max(percent):.1f})")
        rows.append([label, *cells])
    headings = [toy.HEADINGS[column] for column in COLUMNS]
    return f"{table(['', *headings], rows)}\n\nmean and range of seeds {', '.join(map(str, sorted(summaries)))}"


def main(argv=None):
    parser = shared.parser(__doc__)
    parser.add_argument("folders", nargs="+", help="folders that toy.py --out wrote, one per seed")
    print(seeds_table(parser.parse_args(argv).folders))


if __name__ == "__main__":
    main()
