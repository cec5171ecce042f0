"""The whole method on a CPU in minutes: a small world of rendered videos, a tiny Qwen2.5-VL, and every stage.

    python toy.py                            # world, SFT, T-GRPO, evaluation; results in runs/toy
    python toy.py --seed 1 --out runs/one    # another seed, in another folder
    python toy.py --fresh                    # delete the results and start again

    1. render clips and pictures with questions about them, as records in the released format
    2. train a tokenizer on their text and build a random Qwen2.5-VL with 0.45 million parameters
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
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from benchmarks.shared import ORDERS
from support import settings, storage, tables
from tools.plot import draw_curve, save_figure

ROOT = Path(__file__).parent
# Options that have become commands of their own.
MOVED = {"--ablate": "python -m experiments.ablation", "--world": "python -m experiments.two_rationales"}

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


def choose_background(answer, rng, agreement, neutral):
    """(cue, background). A background that is not neutral points to the answer with probability `agreement`."""
    if rng.random() < neutral:
        return "neutral", "neutral"
    if rng.random() < agreement:
        return "agrees", CUED[answer]
    return "misleads", CUED[OPPOSITE[answer]]


def direction(rng, agreement, neutral):
    """A shape moves along one axis. Both directions show the same set of frames."""
    answer = rng.choice(["right", "left", "up", "down"])
    cue, background = choose_background(answer, rng, agreement, neutral)
    shape = rng.choice(SHAPES)
    colour = rng.choice(list(COLOURS))
    speed = rng.uniform(3, 4.5)
    radius = rng.uniform(6, 9)
    # the middle of the path, so that the shape never leaves the frame
    margin = radius + speed * (FRAMES - 1) / 2
    centre = SIZE / 2
    if margin < SIZE / 2:
        centre = rng.uniform(margin, SIZE - margin)
    other_axis = rng.uniform(radius, SIZE - radius)
    sign = 1 if answer in ("right", "down") else -1

    frames = []
    for t in range(FRAMES):
        moving_axis = centre + sign * speed * (t - (FRAMES - 1) / 2)
        x, y = (moving_axis, other_axis) if answer in ("right", "left") else (other_axis, moving_axis)
        frames.append(draw(BACKGROUNDS[background], shape, COLOURS[colour], x, y, radius))

    def explain(end):
        start = OPPOSITE[end]
        return rng.choice(
            [
                f"the {shape} starts near the {start} side and ends near the {end} side, so it moves {end}.",
                f"first the {shape} is more {start}, later it is more {end}, so it moves {end}.",
            ]
        )

    return Question(frames, f"Which way does the {shape} move?", answer, OPPOSITE[answer], explain, cue)


def size(rng, agreement, neutral):
    """A shape grows or shrinks. Both show the same set of frames."""
    answer = rng.choice(["grows", "shrinks"])
    cue, background = choose_background(answer, rng, agreement, neutral)
    shape = rng.choice(SHAPES)
    colour = rng.choice(list(COLOURS))
    middle_radius = rng.uniform(11, 14)
    speed = rng.uniform(1.5, 2.2)
    x = rng.uniform(22, 34)
    y = rng.uniform(22, 34)
    sign = 1 if answer == "grows" else -1

    frames = []
    for t in range(FRAMES):
        radius = middle_radius + sign * speed * (t - (FRAMES - 1) / 2)
        frames.append(draw(BACKGROUNDS[background], shape, COLOURS[colour], x, y, radius))

    def explain(change):
        start, end = ("small", "big") if change == "grows" else ("big", "small")
        return rng.choice(
            [
                f"the {shape} starts {start} and ends {end}, so it {change}.",
                f"first the {shape} is {start}, later it is {end}, so it {change}.",
            ]
        )

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

    def explain(number):
        return f"the {shape} is lit in {number} of the frames, so it flashes {number} times."

    return Question(frames, f"How often does the {shape} flash?", str(count), None, explain)


def still(rng, agreement, neutral):
    """One picture: where, how big, or of which colour the shape is."""
    shape = rng.choice(SHAPES)
    colour = rng.choice(list(COLOURS))
    kind = rng.choice(["where", "big", "colour"])
    x = 28
    y = 28
    radius = rng.uniform(8, 12)
    # {} in a reason is the answer that it leads to
    if kind == "where":
        answer, wrong = rng.sample(rng.choice([["left", "right"], ["up", "down"]]), 2)
        problem = f"Where is the {shape}?"
        reason = f"the {shape} is near the {{}} side."
        if answer in ("left", "right"):
            x = 14 if answer == "left" else 42
        else:
            y = 14 if answer == "up" else 42
    elif kind == "big":
        answer, wrong = rng.sample(["big", "small"], 2)
        problem = f"How big is the {shape}?"
        reason = f"the {shape} is {{}}."
        radius = rng.uniform(17, 22) if answer == "big" else rng.uniform(5, 8)
    else:
        answer, wrong = rng.sample(list(COLOURS), 2)
        problem = f"Which colour is the {shape}?"
        reason = f"the {shape} looks {{}}."
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
    # those of the first test questions
    temporal: tuple = TEMPORAL


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


def make_record(folder, rules, split, problem_id, source, key):
    """Render one question into `folder` and return its record. The same arguments always give the same record."""
    rng = random.Random(key)
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


def draw_sources(n, sources, seed):
    """Data sources of the n questions of a training split, drawn by weight."""
    weights = [weight for _, weight in sources.values()]
    return random.Random(seed).choices(list(sources), weights, k=n)


def draw_test_sources(n_temporal, n_other, seed, temporal=TEMPORAL):
    """Data sources of the test questions in random order, balanced within each kind."""
    sources = [temporal[i % len(temporal)] for i in range(n_temporal)]
    sources += [("toy-flash", "toy-image")[i % 2] for i in range(n_other)]
    return random.Random(seed).sample(sources, len(sources))


def make_world(folder, seed=0, n_sft=2000, n_rl=1000, n_temporal=256, n_other=80, processes=2, rules=RULES, log=None):
    """Write SPLIT.json for every split of the rules, world.json, and the media; all of them or nothing.

    The number of questions: n_rl for the split rl, n_temporal + n_other for test, n_sft for the others.
    """
    folder = Path(folder)
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "media").mkdir(parents=True)
    jobs = []
    for split in rules.agreement:
        split_seed = f"{seed}/{split}"
        if split == "test":
            sources = draw_test_sources(n_temporal, n_other, split_seed, rules.temporal)
        else:
            sources = draw_sources(n_rl if split == "rl" else n_sft, rules.sources, split_seed)
        for i, source in enumerate(sources, 1):
            jobs.append((unfinished, rules, split, i, source, f"{split_seed}/{i}"))

    records = {split: [] for split in rules.agreement}
    with ProcessPoolExecutor(processes) as pool:
        made = pool.map(make_record, *zip(*jobs), chunksize=16)
        bar = tqdm(made, total=len(jobs), desc="rendering", unit="clip", file=log)
        for job, record in zip(jobs, bar):
            records[job[2]].append(record)
    for split, rows in records.items():
        storage.write_atomic(unfinished / f"{split}.json", json.dumps(rows, indent=1))
    storage.write_atomic(unfinished / "world.json", json.dumps({"seed": seed}))
    storage.replace_folder(unfinished, folder)


# ----------------------------------------------------------------------------------------------- 2. the model


CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


def make_tokenizer(records):
    """Byte-level BPE trained on the text of the records. Each of the four tags is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [" ".join([r["problem"], *r["options"], r["process"], r["solution"], "user assistant"]) for r in records]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", *VISION_TOKENS],
        model_max_length=4096,
    )


def make_model(folder, records, seed=0):
    """Write a checkpoint with random weights, a tokenizer and a processor, laid out like any other checkpoint."""
    folder = Path(folder)
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer = make_tokenizer(records)
    token = tokenizer.convert_tokens_to_ids
    pixels = {"shortest_edge": 28 * 28, "longest_edge": SIZE * SIZE}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=pixels, do_sample_frames=False),
        chat_template=CHAT_TEMPLATE,
    )
    # initializer_range 0.12: with the usual 0.02 so small a model learns nothing visual
    text_config = dict(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        initializer_range=0.12,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 4, 4]),
    )
    vision_config = dict(
        depth=1,
        hidden_size=64,
        intermediate_size=128,
        num_heads=2,
        out_hidden_size=96,
        fullatt_block_indexes=[0],
        window_size=112,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        tokens_per_second=2,
        initializer_range=0.12,
    )
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    storage.replace_folder(unfinished, folder)


# ----------------------------------------------------------------------------------------------- 3. the stages


def stage(script, out, seed, model, records, output_dir, *overrides):
    """Arguments of `accelerate launch` for one stage; the paths are relative to `out`."""
    settings = {
        "seed": seed,
        "data_root": out / "world",
        "model": out / model,
        "records": out / "world" / records,
        "output_dir": out / output_dir,
    }
    arguments = [script, "--config", "configs/toy.yaml"]
    for name, value in settings.items():
        arguments += [f"--{name}", str(value)]
    return arguments + [str(value) for value in overrides]


def stages(out, seed):
    """The four commands of the toy, each with the file or folder that shows it has finished."""
    return [
        (stage("sft.py", out, seed, "base", "sft.json", "sft"), out / "sft/final"),
        (stage("tgrpo.py", out, seed, "sft/final", "rl.json", "tgrpo"), out / "tgrpo/final"),
        (stage("evaluate.py", out, seed, "sft/final", "test.json", "eval/sft"), out / "eval/sft/summary.json"),
        (stage("evaluate.py", out, seed, "tgrpo/final", "test.json", "eval/tgrpo"), out / "eval/tgrpo/summary.json"),
    ]


def launch(arguments, result, log=None):
    """Print and run `accelerate launch ARGUMENTS`, unless `result` exists. `log`: a file that receives all output.

    Raises UserError if the command fails.
    """
    command = f"accelerate launch {shlex.join(arguments)}"
    if (ROOT / result).exists():
        print(f"{result} exists: skipped", file=log, flush=True)
        return
    print(f"\n$ {command}", file=log, flush=True)
    try:
        subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *arguments],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        raise settings.UserError(f"toy.py: this command failed with status {error.returncode}: {command}") from None


# ----------------------------------------------------------------------------------------------- 4. the comparison


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
    """{name: (accuracy, standard error)} of one model, from 0 to 1; names as in HEADINGS.

    Orders that were not asked are left out. The others are of the temporal questions, and so is `conflict`, which has
    the clips with a misleading background.
    """
    rows = storage.read_jsonl(predictions)
    temporal = [row for row in rows if row["data_source"] in TEMPORAL]
    samples = {}
    for order in ORDERS:
        asked = [row["accuracy"] for row in temporal if row["frames"] == order]
        if asked:
            samples[order] = asked
    ordered = [row for row in rows if row["frames"] == "ordered"]
    samples["conflict"] = [
        row["accuracy"] for row in ordered if row["data_source"] in TEMPORAL and row["cue"] == "misleads"
    ]
    for name in ("flash", "image"):
        samples[name] = [row["accuracy"] for row in ordered if row["data_source"] == f"toy-{name}"]
    return {name: tables.mean_and_se(values) for name, values in samples.items()}


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


def plot(out, results):
    """Write learning_curves.png: the loss of SFT, p and p̃ of T-GRPO, and the test accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), width_ratios=(1, 1.3, 1.8))
    draw_curve(left, storage.read_jsonl(out / "sft/metrics.jsonl"), "loss", "loss", "tab:gray")
    left.set(title="1. SFT", xlabel="step", ylabel="loss, nats per token", yscale="log")

    metrics = storage.read_jsonl(out / "tgrpo/metrics.jsonl")
    draw_curve(middle, metrics, "temporal/p", "p: frames in order", "tab:blue")
    draw_curve(middle, metrics, "temporal/p_shuffled", "p̃: frames shuffled", "tab:orange")
    middle.set(title="2. T-GRPO, training videos", xlabel="step", ylabel="share of correct completions", ylim=(0, 1))
    middle.legend(loc="lower right", frameon=False)

    names = [*ORDERS, "conflict"]
    places = np.arange(len(names))
    for shift, model, colour in ((-0.2, "sft", "tab:gray"), (0.2, "tgrpo", "tab:blue")):
        means, errors = zip(*(results[model][name] for name in names))
        bars = right.bar(places + shift, means, 0.38, yerr=errors, label=MODELS[model], color=colour, capsize=3)
        right.bar_label(bars, [f"{100 * mean:.0f}" for mean in means], padding=2)
    right.axhline(0.5, color="black", linestyle=":", linewidth=1)
    right.text(len(names) - 0.3, 0.5, "chance", ha="left", va="center", fontsize=8)
    labels = [HEADINGS[name].replace(" ", "\n", 1) for name in names]
    right.set(title="3. test clips", xticks=places, xticklabels=labels, ylabel="accuracy")
    right.set(ylim=(0, 1.3), yticks=np.arange(0, 1.1, 0.2))
    right.legend(loc="upper center", ncols=2, frameon=False)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save_figure(figure, out / "learning_curves.png")


# ----------------------------------------------------------------------------------------------- main


def parse_arguments():
    for argument in sys.argv[1:]:
        flag = argument.split("=")[0]
        if flag in MOVED:
            raise settings.UserError(f"toy.py: {flag} is now a command of its own: {MOVED[flag]}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/toy", help="folder for all results; default: runs/toy")
    parser.add_argument("--seed", type=int, default=0, help="seed of world, model and training; default: 0")
    parser.add_argument("--fresh", action="store_true", help="delete the folder's earlier results and start again")
    return parser.parse_args()


def check_seed(out, seed):
    """Raise UserError if the folder holds a world of another seed."""
    world_file = out / "world/world.json"
    if world_file.exists():
        made = json.loads(world_file.read_text(encoding="utf-8"))["seed"]
        if made != seed:
            raise settings.UserError(
                f"{out} holds seed {made}, not {seed}; choose another --out, or delete that folder"
            )


def main():
    args = parse_arguments()
    out = args.out.resolve()
    if args.fresh:
        for name in ("world", "base", "sft", "tgrpo", "eval"):
            shutil.rmtree(out / name, ignore_errors=True)
    check_seed(out, args.seed)
    # short commands, which a reader can type in this folder
    if out.is_relative_to(ROOT):
        os.chdir(ROOT)
        out = out.relative_to(ROOT)
    begin = time.perf_counter()
    try:
        if not (out / "world").exists():
            make_world(out / "world", args.seed)
        if not (out / "base").exists():
            make_model(out / "base", json.loads((out / "world/sft.json").read_text(encoding="utf-8")), args.seed)
        for arguments, result in stages(out, args.seed):
            launch(arguments, result)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here, --fresh starts again")
        sys.exit(130)

    results = {model: measure(out / f"eval/{model}/predictions.jsonl") for model in MODELS}
    summary = {"seed": args.seed}
    for model in MODELS:
        summary[model] = {name: results[model][name][0] for name in (*ORDERS, "conflict")}
    storage.write_atomic(out / "summary.json", json.dumps(summary, indent=2))
    plot(out, results)
    print("\nTest accuracy in percent ± standard error. Chance is 50 in the first five columns.\n")
    print(results_table(results))
    print(f"\nlearning curves: {out / 'learning_curves.png'}")
    print(f"summary:         {out / 'summary.json'}")
    print(f"every answer:    {out / 'eval/tgrpo/predictions.jsonl'}")
    print(f"this took {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
