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
# settings that differ from seed to seed
OF_SEED = ("seed", "model", "weights", "records", "data_root")


def read_json(path):
    """The content of a file that toy.py has written. UserError if it is not there."""
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}: run python toy.py --seed N --out FOLDER")
    return json.loads(path.read_text(encoding="utf-8"))


def made_with(folder):
    """{name: value} of what a toy's results depend on besides its seed: model family, and settings of all stages."""
    made = {"model_type": read_json(folder / "base/config.json")["model_type"]}
    for stage in toy.MODELS:
        for file in (f"{stage}/run.json", f"eval/{stage}/summary.json"):
            found = read_json(folder / file)
            values = found["settings"] | {"steps": found.get("schedule_steps")}
            made |= {f"{file}: {name}": value for name, value in values.items() if name not in OF_SEED}
    return made


def seeds_table(folders):
    """Markdown: test accuracy in percent, mean (lowest to highest seed), of the SFT model and of the trained policy.

    Raises UserError for a folder without results, for a repeated seed, and for another model family or setting.
    """
    summaries = {}
    first = made_with(Path(folders[0]))
    for folder in folders:
        summary = read_json(Path(folder) / "summary.json")
        made = made_with(Path(folder))
        other = [f"{name} is {made.get(name)!r}" for name in first | made if made.get(name) != first.get(name)]
        if other:
            raise UserError(f"{folder}: not made like {folders[0]}: {', '.join(other)}")
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
