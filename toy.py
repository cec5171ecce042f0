"""The whole method on a CPU in minutes: a small world of rendered videos, a tiny Qwen-VL, and every stage.

    python toy.py                            # world, SFT, T-GRPO, evaluation; results in runs/toy. What exists is kept
    python toy.py --seed 1 --out runs/one    # another seed, in another folder

    1. render clips and pictures with questions about them, as records in the released format
    2. train a tokenizer on their text and build a random Qwen-VL of half a million parameters (support/tiny_model.py)
    3. run sft.py, tgrpo.py and evaluate.py, the same scripts that train the 7B model
    4. compare the SFT model with the trained policy: frames in order, frames shuffled, misleading backgrounds

The world has a shortcut. Most moving clips have a warm or a cool background, which points to the right answer in 80 %
of the training clips but in only 50 % of the test clips. The teacher that wrote the SFT data is flawed on purpose: if
the background misleads, its chain of thought follows the background 80 % of the time. Reinforcement learning is scored
against the truth and corrects that.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from support import families, settings, storage, tables, tiny_model, toy_curves

ROOT = Path(__file__).parent

# ----------------------------------------------------------------------------------------------- 1. the world

# width and height in pixels, frames per clip, frames per second
SIZE = 56
FRAMES = 8
FPS = 4

BACKGROUNDS = {"warm": (74, 26, 8), "cool": (8, 26, 74), "neutral": (26, 26, 26)}
COLOURS = {"yellow": (255, 240, 60), "green": (80, 255, 80), "pink": (255, 120, 230), "white": (255, 255, 255)}
SHAPES = ("disc", "square")
# the background that points to an answer
CUED = {"right": "warm", "down": "warm", "grows": "warm", "left": "cool", "up": "cool", "shrinks": "cool"}
OPPOSITE = {"right": "left", "left": "right", "up": "down", "down": "up", "grows": "shrinks", "shrinks": "grows"}
# what the shape is like at the end of the clip; at the start it is like the opposite
END = {"right": "right", "left": "left", "up": "up", "down": "down", "grows": "big", "shrinks": "small"}
DIRECTION_REASONS = (
    "the {shape} starts near the {start} side and ends near the {end} side, so it moves {answer}.",
    "first the {shape} is more {start}, later it is more {end}, so it moves {answer}.",
)
SIZE_REASONS = (
    "the {shape} starts {start} and ends {end}, so it {answer}.",
    "first the {shape} is {start}, later it is {end}, so it {answer}.",
)


@dataclass
class Question:
    """A rendered question. `explain(answer)` is a chain of thought that leads to this answer, right or wrong."""

    frames: list
    problem: str
    answer: str
    # the other option; None if the answer is a number
    wrong: str | None
    explain: Callable
    # whether the background "agrees" with the answer, "misleads", is "neutral", or cannot matter ("none")
    cue: str = "none"


def draw(background, shape=None, colour=None, x=28.0, y=28.0, radius=8.0):
    """One frame (56, 56, 3) uint8, drawn at 4 times the size for smooth edges."""
    image = Image.new("RGB", (4 * SIZE, 4 * SIZE), background)
    pen = ImageDraw.Draw(image)
    box = [4 * (x - radius), 4 * (y - radius), 4 * (x + radius), 4 * (y + radius)]
    if shape == "disc":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def choose_look(answer, rng, agreement, neutral):
    """(cue, background, shape, colour) of a moving clip, the background and the colour in RGB.

    A background that is not neutral points to the answer with probability `agreement`.
    """
    if rng.random() < neutral:
        cue, background = "neutral", "neutral"
    elif rng.random() < agreement:
        cue, background = "agrees", CUED[answer]
    else:
        cue, background = "misleads", CUED[OPPOSITE[answer]]
    shape = rng.choice(SHAPES)
    colour = rng.choice(list(COLOURS))
    return cue, BACKGROUNDS[background], shape, COLOURS[colour]


def steps(answer):
    """-3.5 to 3.5, one per frame, or 3.5 to -3.5: opposite answers show the same frames in opposite order."""
    forward = [t - (FRAMES - 1) / 2 for t in range(FRAMES)]
    return forward if answer in ("right", "down", "grows") else forward[::-1]


def explain_change(rng, reasons, shape, answer):
    """A chain of thought that leads to this answer, one of the `reasons`."""
    return rng.choice(reasons).format(shape=shape, start=END[OPPOSITE[answer]], end=END[answer], answer=answer)


def direction(rng, agreement, neutral):
    """A shape moves along one axis."""
    answer = rng.choice(["right", "left", "up", "down"])
    cue, background, shape, colour = choose_look(answer, rng, agreement, neutral)
    speed = rng.uniform(3, 4.5)
    radius = rng.uniform(6, 9)
    # the middle of the path, so that the shape never leaves the frame
    margin = radius + speed * (FRAMES - 1) / 2
    centre = rng.uniform(margin, SIZE - margin)
    other_axis = rng.uniform(radius, SIZE - radius)
    frames = []
    for step in steps(answer):
        moving_axis = centre + speed * step
        x, y = (moving_axis, other_axis) if answer in ("right", "left") else (other_axis, moving_axis)
        frames.append(draw(background, shape, colour, x, y, radius))
    explain = partial(explain_change, rng, DIRECTION_REASONS, shape)
    return Question(frames, f"Which way does the {shape} move?", answer, OPPOSITE[answer], explain, cue)


def size(rng, agreement, neutral):
    """A shape grows or shrinks."""
    answer = rng.choice(["grows", "shrinks"])
    cue, background, shape, colour = choose_look(answer, rng, agreement, neutral)
    middle_radius = rng.uniform(11, 14)
    speed = rng.uniform(1.5, 2.2)
    x = rng.uniform(22, 34)
    y = rng.uniform(22, 34)
    frames = [draw(background, shape, colour, x, y, middle_radius + speed * step) for step in steps(answer)]
    explain = partial(explain_change, rng, SIZE_REASONS, shape)
    return Question(frames, f"Does the {shape} grow or shrink?", answer, OPPOSITE[answer], explain, cue)


def flash(rng, agreement, neutral):
    """A shape is visible in some of the frames; their number does not depend on the order of the frames."""
    count = rng.randint(1, 4)
    shape = rng.choice(SHAPES)
    colour = rng.choice(list(COLOURS))
    lit = rng.sample(range(FRAMES), count)
    x = rng.uniform(18, 38)
    y = rng.uniform(18, 38)
    background = BACKGROUNDS[rng.choice(list(BACKGROUNDS))]
    frames = [draw(background, shape if t in lit else None, COLOURS[colour], x, y, 14) for t in range(FRAMES)]
    # {0} in a reason is the answer that it leads to
    reason = f"the {shape} is lit in {{0}} of the frames, so it flashes {{0}} times."
    return Question(frames, f"How often does the {shape} flash?", str(count), None, reason.format)


def still(rng, agreement, neutral):
    """One picture: where, how big, or of which colour the shape is."""
    shape = rng.choice(SHAPES)
    colour = rng.choice(list(COLOURS))
    kind = rng.choice(["where", "big", "colour"])
    x, y = 28, 28
    radius = rng.uniform(8, 12)
    if kind == "where":
        answer, wrong = rng.sample(rng.choice([["left", "right"], ["up", "down"]]), 2)
        problem = f"Where is the {shape}?"
        reason = f"the {shape} is near the {{0}} side."
        x, y = {"left": (14, 28), "right": (42, 28), "up": (28, 14), "down": (28, 42)}[answer]
    elif kind == "big":
        answer, wrong = rng.sample(["big", "small"], 2)
        problem = f"How big is the {shape}?"
        reason = f"the {shape} is {{0}}."
        radius = rng.uniform(17, 22) if answer == "big" else rng.uniform(5, 8)
    else:
        answer, wrong = rng.sample(list(COLOURS), 2)
        problem = f"Which colour is the {shape}?"
        reason = f"the {shape} looks {{0}}."
        colour = answer
    background = BACKGROUNDS[rng.choice(list(BACKGROUNDS))]
    frames = [draw(background, shape, COLOURS[colour], x, y, radius)]
    return Question(frames, problem, answer, wrong, reason.format)


# data source: (renderer, how often it is drawn)
SOURCES = {"toy-direction": (direction, 2), "toy-size": (size, 2), "toy-flash": (flash, 1), "toy-image": (still, 1)}
# the questions that only the order of the frames answers
TEMPORAL = ("toy-direction", "toy-size")


def flawed_teacher(question, rng):
    """(answer, explain): the truth, or 80 % of the time the background's answer if the background misleads."""
    if question.cue == "misleads" and rng.random() < 0.8:
        return question.wrong, question.explain
    return question.answer, question.explain


@dataclass
class Rules:
    """Rules of a world. The keys of `agreement` are its splits, each written to SPLIT.json."""

    # share of the moving clips with a neutral background
    neutral: float
    # {split: share of the other moving clips whose background points to the right answer}
    agreement: dict
    # {split: function of (Question, rng) that returns (answer, explain)}; without a teacher a record holds the truth
    teachers: dict
    # {data source: (renderer, how often it is drawn)}
    sources: dict = field(default_factory=SOURCES.copy)


RULES = Rules(neutral=0.3, agreement={"sft": 0.8, "rl": 0.8, "test": 0.5}, teachers={"sft": flawed_teacher})


def write_clip(path, frames):
    """Write uint8 frames (H, W, 3) as an mp4, with enough quality to keep the colours."""
    # mbtree reads uninitialised memory if the width is not a multiple of 16; the files would differ from run to run
    options = {"crf": "10", "preset": "veryfast", "x264-params": "mbtree=0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options=options)
        stream.width = SIZE
        stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def make_record(folder, rules, split, seed, problem_id, source):
    """Render one question into `folder` and return its record. The same arguments always give the same record."""
    rng = random.Random(f"{seed}/{split}/{problem_id}")
    render, _ = rules.sources[source]
    question = render(rng, rules.agreement[split], rules.neutral)
    options = []
    letters = {question.answer: question.answer}
    if question.wrong is not None:
        first, second = rng.sample([question.answer, question.wrong], 2)
        options = [f"A. {first}", f"B. {second}"]
        letters = {first: "A", second: "B"}
    answer = question.answer
    if split in rules.teachers:
        answer, explain = rules.teachers[split](question, rng)
    # random names, so that a file name never gives the answer away
    is_image = source == "toy-image"
    name = f"media/{rng.getrandbits(64):016x}.{'png' if is_image else 'mp4'}"
    if is_image:
        Image.fromarray(question.frames[0]).save(Path(folder) / name)
    else:
        write_clip(Path(folder) / name, question.frames)
    return {
        "problem_id": problem_id,
        "problem": question.problem,
        "data_type": "image" if is_image else "video",
        "problem_type": "multiple choice" if options else "numerical",
        "options": options,
        "solution": f"<answer>{letters[answer]}</answer>",
        "process": f"<think>{explain(answer)}</think>" if split in rules.teachers else "",
        "path": f"./{name}",
        "data_source": source,
        "cue": question.cue,
    }


def draw_sources(rules, split, seed, n_training, n_temporal, n_other):
    """Data source of every question of a split: training splits by weight; test balanced within each kind, shuffled."""
    rng = random.Random(f"{seed}/{split}")
    if split != "test":
        weights = [weight for _, weight in rules.sources.values()]
        return rng.choices(list(rules.sources), weights, k=n_training)
    sources = [TEMPORAL[i % len(TEMPORAL)] for i in range(n_temporal)]
    sources += [("toy-flash", "toy-image")[i % 2] for i in range(n_other)]
    return rng.sample(sources, len(sources))


def make_world(folder, seed=0, n_sft=2000, n_rl=1000, n_temporal=256, n_other=80, processes=2, rules=RULES):
    """Write SPLIT.json for every split of the rules, world.json, and the media; all of them or nothing.

    The number of questions: n_rl for the split rl, n_temporal + n_other for test, n_sft for the others.
    """
    folder = Path(folder)
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "media").mkdir(parents=True)
    # Ctrl-C is for this process, which then stops the workers
    with ProcessPoolExecutor(processes, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        for split in rules.agreement:
            n_training = n_rl if split == "rl" else n_sft
            sources = draw_sources(rules, split, seed, n_training, n_temporal, n_other)
            render = partial(make_record, unfinished, rules, split, seed)
            rendered = pool.map(render, range(1, len(sources) + 1), sources, chunksize=16)
            bar = tqdm(rendered, total=len(sources), desc=f"rendering {split}", unit="clip")
            storage.write_atomic(unfinished / f"{split}.json", json.dumps(list(bar), indent=1))
    storage.write_atomic(unfinished / "world.json", json.dumps({"seed": seed}))
    storage.replace_folder(unfinished, folder)


# ----------------------------------------------------------------------------------------------- 3. the stages

# of `accelerate launch`
ONE_PROCESS = ["--num_processes", "1"]
# its defaults; without them it prints a warning
DEFAULTS = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def stage(script, out, seed, model, records, output_dir, *overrides):
    """Arguments of `accelerate launch` for one stage; the paths are relative to `out`."""
    arguments = [script, "--config", "configs/toy.yaml", "--seed", seed, "--data_root", out / "world"]
    arguments += ["--model", out / model, "--records", out / "world" / records, "--output_dir", out / output_dir]
    return [str(argument) for argument in [*arguments, *overrides]]


def stages(out, seed):
    """The four commands of the toy, each with the file or folder that shows it has finished."""
    return [
        (stage("sft.py", out, seed, "base", "sft.json", "sft"), out / "sft/final"),
        (stage("tgrpo.py", out, seed, "sft/final", "rl.json", "tgrpo"), out / "tgrpo/final"),
        (stage("evaluate.py", out, seed, "sft/final", "test.json", "eval/sft"), out / "eval/sft/summary.json"),
        (stage("evaluate.py", out, seed, "tgrpo/final", "test.json", "eval/tgrpo"), out / "eval/tgrpo/summary.json"),
    ]


def launch(arguments, result):
    """Print and run `accelerate launch ARGUMENTS`, unless `result` exists. Raises UserError if the command fails."""
    if (ROOT / result).exists():
        print(f"{result} exists: skipped", flush=True)
        return
    command = shlex.join(["accelerate", "launch", *ONE_PROCESS, *arguments])
    print(f"\n$ {command}", flush=True)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *ONE_PROCESS, *DEFAULTS]
    done = subprocess.run([*launcher, *arguments], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    # a stage that is stopped saves a checkpoint and ends with status 0
    if done.returncode or not (ROOT / result).exists():
        raise settings.UserError(f"toy.py: this command did not finish (status {done.returncode}): {command}")


# ----------------------------------------------------------------------------------------------- 4. the comparison

# column of the results table: its heading; all but the last two are of the temporal questions
HEADINGS = {
    "ordered": "in order",
    "shuffled": "shuffled",
    "reversed": "reversed",
    "single": "one frame",
    "blind": "no frame",
    "conflict": "misleading background",
    "flash": "flashes",
    "image": "pictures",
}
MODELS = {"sft": "SFT model", "tgrpo": "T-GRPO"}


def measure(predictions):
    """{name: (accuracy, standard error)} of one model, from 0 to 1; names as in HEADINGS, if there are such answers."""
    accuracies = {name: [] for name in HEADINGS}
    for row in storage.read_jsonl(predictions):
        if row["data_source"] in TEMPORAL:
            accuracies[row["frames"]].append(row["accuracy"])
            if row["frames"] == "ordered" and row["cue"] == "misleads":
                accuracies["conflict"].append(row["accuracy"])
        elif row["frames"] == "ordered":
            accuracies[row["data_source"].removeprefix("toy-")].append(row["accuracy"])
    return {name: tables.mean_and_se(values) for name, values in accuracies.items() if values}


def results_table(results):
    """Accuracies in percent ± standard error, as an aligned Markdown table."""
    rows = []
    for model, label in MODELS.items():
        cells = []
        for name in HEADINGS:
            mean, se = results[model][name]
            cells.append(f"{100 * mean:.1f} ± {100 * se:.1f}")
        rows.append([label, *cells])
    return tables.table(["", *HEADINGS.values()], rows)


# ----------------------------------------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/toy", help="folder for all results; default: runs/toy")
    parser.add_argument("--seed", type=int, default=0, help="seed of world, model and training; default: 0")
    parser.add_argument("--model_family", choices=families.FAMILIES, default="qwen2_5_vl", help="default: qwen2_5_vl")
    args = parser.parse_args()
    out = args.out.resolve()
    asked = {"world/world.json": ("seed", args.seed), "base/config.json": ("model_type", args.model_family)}
    for file, (name, value) in asked.items():
        if (out / file).exists():
            made = json.loads((out / file).read_text(encoding="utf-8"))[name]
            if made != value:
                raise settings.UserError(f"{out} holds {name} {made}, not {value}; choose another --out, or delete it")
    # short commands, which a reader can type in this folder
    if out.is_relative_to(ROOT):
        os.chdir(ROOT)
        out = out.relative_to(ROOT)
    begin = time.perf_counter()
    # SIGTERM ends the running stage, too, as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not (out / "world").exists():
            make_world(out / "world", args.seed)
        if not (out / "base").exists():
            records = json.loads((out / "world/sft.json").read_text(encoding="utf-8"))
            tiny_model.make_model(out / "base", records, args.seed, args.model_family)
        for arguments, result in stages(out, args.seed):
            launch(arguments, result)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here")
        sys.exit(130)

    results = {model: measure(out / f"eval/{model}/predictions.jsonl") for model in MODELS}
    summary = {"seed": args.seed}
    for model in MODELS:
        summary[model] = {name: mean for name, (mean, _) in results[model].items()}
    storage.write_atomic(out / "summary.json", json.dumps(summary, indent=2))
    toy_curves.draw(out, results, MODELS, HEADINGS)
    print("\nTest accuracy in percent ± standard error. The first six columns are of the questions about direction and")
    print("size, where chance is 50; the accuracies of evaluate.py above include flashes and pictures.\n")
    print(results_table(results))
    print(f"\nlearning curves: {out / 'learning_curves.png'}")
    print(f"summary:         {out / 'summary.json'}")
    print(f"every answer:    {out / 'eval/tgrpo/predictions.jsonl'}")
    print(f"this took {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
