"""LoRA beside full training on the toy: does an adapter of rank 16 learn what all weights learn?

    python -m experiments.lora --seeds 0 1 2        # CPU, 13 minutes per seed on a busy machine; results in runs/lora

An adapter needs a model that already sees: with random weights, as in toy.py, its frozen vision tower shows nothing.
So each seed first pretrains a model, all weights, on clips whose teacher is always right. From it both ways of training
start: SFT on the toy's flawed teacher, who follows a misleading background, and T-GRPO, which unlearns that.
"""

import argparse
import json
from pathlib import Path

from experiments.two_rationales import BOTH_ORDERS
from experiments.worlds import skill_teacher
from support.tables import table
from toy import HEADINGS, ROOT, Rules, check_seed, flawed_teacher, launch, make_model, make_world, measure, stage

RULES = Rules(
    neutral=0.3,
    agreement={"pretrain": 0.5, "sft": 0.8, "rl": 0.8, "test": 0.5},
    teachers={"pretrain": skill_teacher, "sft": flawed_teacher},
)
# twice those of the toy's SFT
PRETRAINING_STEPS = 700
# of both stages; chosen on seed 100
ARMS = {
    "full": {"sft": ("--lr", 3e-3), "tgrpo": ()},
    "lora": {"sft": ("--lora_rank", 16, "--lr", 1e-2), "tgrpo": ("--lora_rank", 16, "--lr", 2e-3)},
}
MODELS = {
    "pretrained": "pretrained",
    "full/sft": "SFT, all weights",
    "lora/sft": "SFT, LoRA",
    "full/tgrpo": "T-GRPO, all weights",
    "lora/tgrpo": "T-GRPO, LoRA",
}
COLUMNS = {name: HEADINGS[name] for name in ("ordered", "shuffled", "conflict")}


def run_seed(out, seed):
    """Pretrain, then train and evaluate both arms. {model: {column: accuracy, 0 to 1}}; finished parts are kept."""
    check_seed(out, seed)
    if not (out / "world").exists():
        make_world(out / "world", seed, rules=RULES)
    if not (out / "base").exists():
        make_model(out / "base", json.loads((out / "world/sft.json").read_text(encoding="utf-8")), seed)

    def train(script, model, records, name, *settings):
        launch(stage(script, out, seed, model, records, name, "--save_every", 0, *settings), out / name / "final")
        evaluation = stage("evaluate.py", out, seed, f"{name}/final", "test.json", f"eval/{name}", *BOTH_ORDERS)
        launch(evaluation, out / f"eval/{name}/summary.json")

    train("sft.py", "base", "pretrain.json", "pretrained", "--steps", PRETRAINING_STEPS)
    for arm, settings in ARMS.items():
        train("sft.py", "pretrained/final", "sft.json", f"{arm}/sft", *settings["sft"])
        train("tgrpo.py", f"{arm}/sft/final", "rl.json", f"{arm}/tgrpo", *settings["tgrpo"])
    return {model: measure(out / f"eval/{model}/predictions.jsonl") for model in MODELS}


def seeds_table(results):
    """Markdown: test accuracy in percent, mean (lowest to highest seed), of each model. `results`: one per seed."""
    rows = []
    for model, label in MODELS.items():
        cells = []
        for column in COLUMNS:
            percent = [100 * measured[model][column][0] for measured in results]
            cells.append(f"{sum(percent) / len(percent):.1f} ({min(percent):.0f} to {max(percent):.0f})")
        rows.append([label, *cells])
    return table(["", *COLUMNS.values()], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/lora", help="folder for all results")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="seeds of world, model and training; default: 0"
    )
    args = parser.parse_args()
    results = [run_seed(args.out.resolve() / f"seed{seed}", seed) for seed in args.seeds]
    seeds = ", ".join(map(str, args.seeds))
    print(f"\nTest accuracy in percent, mean (lowest to highest seed), seeds {seeds}:\n")
    print(seeds_table(results))


if __name__ == "__main__":
    main()
