"""The whole method on a CPU in minutes: a tiny world of rendered videos, a tiny Qwen2.5-VL, and every stage for real.

    python toy.py                     # world, cold start, T-GRPO, evaluation; results in runs/toy
    python toy.py --seed 1 --out runs/one
    python toy.py --fresh             # the same again, from nothing
    python toy.py --world two_rationales          # a cold start that knows a shortcut and a skill: which will RL choose?
    python toy.py --ablate            # that question, for seven ways of rewarding and many seeds (hours; see experiments/ablation.py)

    1. render clips and stills with questions about them, as records in the released format
    2. train a tokenizer on their words and build a random Qwen2.5-VL of 0.45 million parameters
    3. run sft.py, tgrpo.py and evaluate.py as a user would: the scripts that train 7B
    4. compare the cold start with the trained policy: frames in order, frames shuffled, clips whose background lies

The world has a shortcut. The background of most moving clips is warm or cool, and agrees with the right answer in 80 % of
the training clips but in 50 % of the test clips. And the cold start's teacher is flawed on purpose: where the background
lies, its chain of thought follows the background 80 % of the time. Reinforcement learning sees the truth and undoes that.

In the world of two rationales the cold start first learns to read motion, then to give either of two reasons: the background
(60 % of the time) or the motion, misread 35 % of the time. The background is right in 90 % of the RL clips, so it pays more at
first; motion would pay more in the end. Its cold start is checked for the skill before any RL.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
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

from common import replace_folder
from evaluate import mean_and_se
from settings import print_utf8, read_jsonl, write_atomic
from tools.plot import draw_curve, save_figure

SIZE, FRAMES, FPS = 56, 8, 4  # pixels, frames a clip, frames a second
BACKGROUNDS = {"warm": (74, 26, 8), "cool": (8, 26, 74), "neutral": (26, 26, 26)}
COLOURS = {"yellow": (255, 240, 60), "green": (80, 255, 80), "pink": (255, 120, 230), "white": (255, 255, 255)}
SHAPES = ("disc", "square")
CUED = {"right": "warm", "down": "warm", "grows": "warm", "left": "cool", "up": "cool", "shrinks": "cool"}
OPPOSITE = {"right": "left", "left": "right", "up": "down", "down": "up", "grows": "shrinks", "shrinks": "grows"}
TEMPORAL = ("toy-direction", "toy-size")  # the questions that only the order of frames answers


# ----------------------------------------------------------------------------------------------- 1. the world


def draw(background, shape=None, colour=None, x=28.0, y=28.0, radius=8.0):
    """One frame (56, 56, 3) uint8, drawn at 4 times the size for smooth edges."""
    image = Image.new("RGB", (4 * SIZE, 4 * SIZE), background)
    if shape:
        box = [4 * (x - radius), 4 * (y - radius), 4 * (x + radius), 4 * (y + radius)]
        pen = ImageDraw.Draw(image)
        (pen.ellipse if shape == "disc" else pen.rectangle)(box, fill=colour)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def two_options(rng, right, wrong):
    """Options in random order and the letter of the right one."""
    texts = rng.sample([right, wrong], 2)
    return [f"A. {texts[0]}", f"B. {texts[1]}"], "AB"[texts.index(right)]


def cue_for(answer, rng, agreement, neutral):
    """(cue, background): neutral for this share of the clips, else a colour that points to the answer with chance `agreement`."""
    if rng.random() < neutral:
        return "neutral", "neutral"
    agrees = rng.random() < agreement
    return ("agrees" if agrees else "lies"), CUED[answer if agrees else OPPOSITE[answer]]


def direction(rng, agreement, neutral):
    """A shape moves along one axis. Forwards and backwards show the same set of frames."""
    answer = rng.choice(["right", "left", "up", "down"])
    cue, background = cue_for(answer, rng, agreement, neutral)
    shape, colour, speed, radius = rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.uniform(3, 4.5), rng.uniform(6, 9)
    reach = speed * (FRAMES - 1) / 2
    centre = rng.uniform(radius + reach, SIZE - radius - reach) if radius + reach < SIZE / 2 else SIZE / 2
    other, sign = rng.uniform(radius, SIZE - radius), 1 if answer in ("right", "down") else -1
    along = [centre + sign * speed * (t - (FRAMES - 1) / 2) for t in range(FRAMES)]
    places = [(p, other) if answer in ("right", "left") else (other, p) for p in along]
    frames = [draw(BACKGROUNDS[background], shape, COLOURS[colour], x, y, radius) for x, y in places]

    def thought(seen):
        return rng.choice(
            [
                f"the {shape} starts near the {OPPOSITE[seen]} side and ends near the {seen} side, so it moves {seen}.",
                f"first the {shape} is more {OPPOSITE[seen]}, later it is more {seen}, so it moves {seen}.",
            ]
        )

    return frames, f"Which way does the {shape} move?", answer, thought, cue


def size(rng, agreement, neutral):
    """A shape grows or shrinks. Both show the same set of frames."""
    answer = rng.choice(["grows", "shrinks"])
    cue, background = cue_for(answer, rng, agreement, neutral)
    shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    middle, speed, sign = rng.uniform(11, 14), rng.uniform(1.5, 2.2), 1 if answer == "grows" else -1
    x, y = rng.uniform(22, 34), rng.uniform(22, 34)
    frames = [
        draw(BACKGROUNDS[background], shape, COLOURS[colour], x, y, middle + sign * speed * (t - (FRAMES - 1) / 2))
        for t in range(FRAMES)
    ]

    def thought(seen):
        small, big = ("small", "big") if seen == "grows" else ("big", "small")
        return rng.choice(
            [
                f"the {shape} starts {small} and ends {big}, so it {seen}.",
                f"first the {shape} is {small}, later it is {big}, so it {seen}.",
            ]
        )

    return frames, f"Does the {shape} grow or shrink?", answer, thought, cue


def flash(rng, agreement, neutral):
    """A shape flashes in some of the frames; how often does not depend on their order."""
    count, shape, colour = rng.randint(1, 4), rng.choice(SHAPES), rng.choice(list(COLOURS))
    lit, x, y = rng.sample(range(FRAMES), count), rng.uniform(18, 38), rng.uniform(18, 38)
    background = BACKGROUNDS[rng.choice(list(BACKGROUNDS))]
    frames = [draw(background, shape if t in lit else None, COLOURS[colour], x, y, 14) for t in range(FRAMES)]
    thought = lambda seen: f"the {shape} is lit in {seen} of the frames, so it flashes {seen} times."
    return frames, f"How often does the {shape} flash?", str(count), thought, "none"


def still(rng, agreement, neutral):
    """One picture: where, how big, or of which colour the shape is."""
    shape, colour, kind = rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(["where", "big", "colour"])
    place, radius = {"x": 28, "y": 28}, rng.uniform(8, 12)
    if kind == "where":
        answer, other = rng.sample(rng.choice([["left", "right"], ["up", "down"]]), 2)
        place["x" if answer in ("left", "right") else "y"] = 14 if answer in ("left", "up") else 42
        question, thought = f"Where is the {shape}?", lambda seen: f"the {shape} is near the {seen} side."
    elif kind == "big":
        answer, other = rng.sample(["big", "small"], 2)
        radius = rng.uniform(17, 22) if answer == "big" else rng.uniform(5, 8)
        question, thought = f"How big is the {shape}?", lambda seen: f"the {shape} is {seen}."
    else:
        answer, other = rng.sample(list(COLOURS), 2)
        colour = answer
        question, thought = f"Which colour is the {shape}?", lambda seen: f"the {shape} looks {seen}."
    background = BACKGROUNDS[rng.choice(list(BACKGROUNDS))]
    return (
        [draw(background, shape, COLOURS[colour], **place, radius=radius)],
        question,
        (answer, other),
        thought,
        "none",
    )


QUESTIONS = {"toy-direction": (direction, 2), "toy-size": (size, 2), "toy-flash": (flash, 1), "toy-image": (still, 1)}


def write_clip(path, frames):
    """mp4 of uint8 frames (H, W, 3), good enough that colours survive."""
    with av.open(str(path), "w") as container:
        # mbtree off: at a width that is no multiple of 16 it reads memory nobody wrote, and the same seed gives other files
        options = {"crf": "10", "preset": "veryfast", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=Fraction(FPS), options=options)
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = SIZE, SIZE, "yuv420p", 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# Two worlds: how often a background is neutral, how often a coloured one points to the right answer (by split), which questions.
WORLDS = {
    "flawed_teacher": {"neutral": 0.3, "agreement": {"sft": 0.8, "rl": 0.8, "test": 0.5}, "sources": tuple(QUESTIONS)},
    "two_rationales": {
        "neutral": 0.0,
        "agreement": {"skill": 0.5, "sft": 0.8, "rl": 0.9, "test": 0.5},
        "sources": TEMPORAL,
    },
}


def teach(world, split, rng, answer, wrong, cue, thought):
    """(what the teacher says the answer is, how it tells why). Only the cold start listens; RL and test know the truth.

    The flawed teacher trusts the background in 80 % of the clips where it lies. The teacher of two rationales, whatever the
    truth, gives the background as its reason 60 % of the time, and else the motion, which it misreads 35 % of the time.
    """
    if world == "two_rationales" and split == "sft":
        if rng.random() < 0.6:
            trust = lambda said: (
                f"the background looks {CUED[said]}, so it {'' if said in ('grows', 'shrinks') else 'moves '}{said}."
            )
            return (answer if cue == "agrees" else wrong), trust
        said = wrong if rng.random() < 0.35 else answer
    else:
        said = wrong if split == "sft" and cue == "lies" and rng.random() < 0.8 else answer
    return said, thought


def make_record(job):
    """Render one question into `folder`; returns its record. Everything follows from the job, a tuple of plain values."""
    folder, world, split, problem_id, source, key = job
    rules, rng = WORLDS[world], random.Random(key)
    frames, problem, answer, thought, cue = QUESTIONS[source][0](rng, rules["agreement"][split], rules["neutral"])
    answer, wrong = answer if isinstance(answer, tuple) else (answer, OPPOSITE.get(answer))
    options, truth = two_options(rng, answer, wrong) if wrong else ([], answer)
    said, thought = teach(world, split, rng, answer, wrong, cue, thought)
    solution = truth if said == answer else "AB"[1 - "AB".index(truth)]
    taught = split in ("skill", "sft")
    name = f"media/{rng.getrandbits(64):016x}.{'png' if source == 'toy-image' else 'mp4'}"
    if source == "toy-image":
        Image.fromarray(frames[0]).save(Path(folder) / name)
    else:
        write_clip(Path(folder) / name, frames)
    return {
        "problem_id": problem_id,
        "problem": problem,
        "data_type": "image" if source == "toy-image" else "video",
        "problem_type": "multiple choice" if options else "numerical",
        "options": options,
        "solution": f"<answer>{solution}</answer>",
        "process": f"<think>{thought(said)}</think>" if taught else "",
        "path": f"./{name}",
        "data_source": source,
        "cue": cue,
    }


def plan(split, n, n_temporal, seed, sources=tuple(QUESTIONS)):
    """Sources of the questions of a split: drawn by weight, or for the test split `n_temporal` of the temporal ones."""
    rng = random.Random(f"{seed}/{split}")
    if n_temporal is None:
        return rng.choices(sources, [QUESTIONS[source][1] for source in sources], k=n)
    sources = [TEMPORAL[i % 2] for i in range(n_temporal)] + [
        ("toy-flash", "toy-image")[i % 2] for i in range(n - n_temporal)
    ]
    return rng.sample(sources, n)


def make_world(
    folder, seed=0, n_sft=2000, n_rl=1000, n_temporal=256, n_other=80, processes=2, world="flawed_teacher", log=None
):
    """`folder` with sft.json, rl.json, test.json, world.json and their media. It appears whole or not at all.

    The world of two rationales also has skill.json, as large as sft.json: clips for a teacher who reads motion right; and no
    question beside the temporal ones.
    """
    folder = Path(folder)
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "media").mkdir(parents=True)
    sources = WORLDS[world]["sources"]
    n_other = n_other if sources == tuple(QUESTIONS) else 0
    splits = {
        "skill": (n_sft, None),
        "sft": (n_sft, None),
        "rl": (n_rl, None),
        "test": (n_temporal + n_other, n_temporal),
    }
    splits = {split: splits[split] for split in WORLDS[world]["agreement"]}
    jobs = [
        (str(unfinished), world, split, i, source, f"{seed}/{split}/{i}")
        for split, (n, n_time) in splits.items()
        for i, source in enumerate(plan(split, n, n_time, seed, sources), 1)
    ]
    with ProcessPoolExecutor(processes) as pool:
        records = list(
            tqdm(pool.map(make_record, jobs, chunksize=16), total=len(jobs), desc="rendering", unit="clip", file=log)
        )
    for split in splits:
        rows = [record for job, record in zip(jobs, records) if job[2] == split]
        write_atomic(unfinished / f"{split}.json", json.dumps(rows, indent=1))
    write_atomic(unfinished / "world.json", json.dumps({"seed": seed, "world": world}))
    replace_folder(unfinished, folder)


# ----------------------------------------------------------------------------------------------- 2. the model


CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_tokenizer(records):
    """Byte-level BPE trained on the records' words; the four tags are one token each."""
    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [" ".join([r["problem"], *r["options"], r["process"], r["solution"], "user assistant"]) for r in records]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens(
        [AddedToken(tag, normalized=False) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=special[1:2] + special[3:],
        model_max_length=4096,
    )


def make_model(folder, records, seed=0):
    """`folder` becomes a checkpoint like any other: random weights, tokenizer, processor."""
    folder = Path(folder)
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer = make_tokenizer(records)
    pixels = {"shortest_edge": 28 * 28, "longest_edge": SIZE * SIZE}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=pixels, do_sample_frames=False),
        chat_template=CHAT_TEMPLATE,
    )
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=dict(
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
        ),
        vision_config=dict(
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
        ),
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    torch.manual_seed(seed)  # initializer_range .12: with the usual .02 it learns nothing visual
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        token("<|im_end|>"),
        token("<|endoftext|>"),
    )
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    replace_folder(unfinished, folder)


# ------------------------------------------------------------------------------------- 3. the stages, as a user runs them


def launch(script, *overrides, log=None):
    """Print and run `accelerate launch script …`, its output going straight through. Leaves with its exit status if it fails.

    With `log`, a file open for writing, `python script …` and all that is said go there.
    """
    arguments = [script, "--config", "configs/toy.yaml", *map(str, overrides)]
    print(f"\n$ {'python' if log else 'accelerate launch'} {' '.join(arguments)}", file=log, flush=True)
    child = subprocess.Popen(
        [sys.executable, *([] if log else ["-m", "accelerate.commands.launch"]), *arguments],
        stdout=log,
        stderr=log,
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        status = child.wait()
    except KeyboardInterrupt:  # the terminal sent it to the child too: let it end
        child.wait()
        raise
    if status:
        sys.exit(f"toy.py: this command failed with status {status}: accelerate launch {' '.join(arguments)}")


# What the two-rationale world changes in the config: the cold start has two parts, and RL is short.
TWO_RATIONALES = {"sft": ("--steps", 120, "--lr", 1e-3), "tgrpo": ("--steps", 50)}
SKILL = 0.9  # accuracy that the cold start must have reached before the mixture


class Stages:
    """The stages of one folder, one after the other; what is already there is left alone. `seconds` tells how long each took."""

    def __init__(self, out, seed, world="flawed_teacher", log=None):
        self.out, self.seed, self.world, self.log, self.file = out, seed, world, log, out / "seconds.json"
        self.seconds = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        as_configured = (out, seed, world) == (Path(__file__).parent / "runs/toy", 0, "flawed_teacher")
        self.own = [] if as_configured else ["--seed", seed, "--data_root", out / "world"]

    def stage(self, name, result, make):
        if result.exists():
            print(f"{result.relative_to(self.out)} is already there", file=self.log)
            return
        begin = time.perf_counter()
        make()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
        write_atomic(self.file, json.dumps(self.seconds))

    def place(self, **paths):
        """Overrides, where folder, seed or world differ from the config's."""
        return [*self.own, *(x for name, path in paths.items() for x in (f"--{name}", path))] if self.own else []

    def train(self, script, name, model, records, *overrides):
        """A training stage: its outputs in out/name."""
        self.stage(
            name,
            self.out / name / "final",
            lambda: launch(
                script,
                *self.place(model=self.out / model, records=self.out / "world" / records, output_dir=self.out / name),
                *overrides,
                log=self.log,
            ),
        )

    def evaluate(self, name, model, *overrides):
        """Answers of a model to the test questions, in out/eval/name."""
        folder, model = self.out / "eval" / name, self.out / model
        shown = [path if self.own else path.relative_to(Path(__file__).parent) for path in (model, folder)]
        self.stage(
            "evaluate",
            folder / "summary.json",
            lambda: launch(
                "evaluate.py",
                "--model",
                shown[0],
                "--output_dir",
                shown[1],
                *self.place(records=self.out / "world/test.json"),
                *overrides,
                log=self.log,
            ),
        )

    def cold_start(self, n=()):
        """World, random model, SFT; before it, in the two-rationale world, SFT on the skill alone until it is there."""
        world, two, model = self.out / "world", self.world == "two_rationales", "base"
        self.stage("world", world, lambda: make_world(world, self.seed, *n, world=self.world, log=self.log))
        self.stage(
            "world",
            self.out / "base",
            lambda: make_model(
                self.out / "base", json.loads((world / "sft.json").read_text(encoding="utf-8")), self.seed
            ),
        )
        for part in range(1, 4) if two else ():
            self.train("sft.py", f"skill{part}", model, "skill.json")
            model = f"skill{part}/final"
            self.evaluate(f"skill{part}", model, "--temporal_gap", "false")
            if skill_of(self.out) >= SKILL:
                break
        self.train("sft.py", "sft", model, "sft.json", *(TWO_RATIONALES["sft"] if two else ()))
        self.evaluate("cold_start", "sft/final")
        if two:
            self.evaluate("cold_start_sampled", "sft/final", "--temperature", 1, "--temporal_gap", "false")

    def reinforce(self, name="tgrpo", *overrides):
        self.train(
            "tgrpo.py",
            name,
            "sft/final",
            "rl.json",
            *(TWO_RATIONALES["tgrpo"] if self.world == "two_rationales" else ()),
            *overrides,
        )
        self.evaluate(name, f"{name}/final")


def is_static(text):
    """Whether a completion of the two-rationale world reasons with the background."""
    return "background" in text


def skill_of(out):
    """Greedy accuracy on the test clips after the last part of the training of the skill."""
    last = sorted((out / "eval").glob("skill*/predictions.jsonl"))[-1]
    return mean_and_se([r["accuracy"] for r in read_jsonl(last) if r["frames"] == "ordered"])[0]


def check_skill(out):
    """({what was measured}, [what is wrong with it]) of a two-rationale cold start. Uses nothing that comes after it.

    It must read motion before the mixture (greedy), and afterwards, sampled, give both reasons and still know motion better
    than chance: else RL has no choice to make.
    """
    share = lambda values: sum(values) / max(1, len(values))
    mixed = read_jsonl(out / "eval/cold_start_sampled/predictions.jsonl")
    found = {
        "skill": skill_of(out),
        "static_share": share([is_static(r["prediction"]) for r in mixed]),
        "motion_right": share([r["accuracy"] for r in mixed if not is_static(r["prediction"])]),
    }
    bounds = {"skill": (SKILL, 1.0), "static_share": (0.4, 0.8), "motion_right": (0.57, 1.0)}
    return found, [
        f"{name} is {found[name]:.2f}, not {low} to {high}"
        for name, (low, high) in bounds.items()
        if not low <= found[name] <= high
    ]


# ------------------------------------------------------------------------------------------------- 4. the comparison


def measure(predictions):
    """{name: (accuracy, standard error)} of one model: in order, shuffled, gap, conflict; flashes and stills beside them."""
    rows = read_jsonl(predictions)
    pick = lambda order, test: [r["accuracy"] for r in rows if r["frames"] == order and test(r)]
    temporal = lambda r: r["data_source"] in TEMPORAL
    ordered, shuffled = pick("ordered", temporal), pick("shuffled", temporal)
    return {
        "ordered": mean_and_se(ordered),
        "shuffled": mean_and_se(shuffled),
        "gap": mean_and_se([a - b for a, b in zip(ordered, shuffled)]),
        "conflict": mean_and_se(pick("ordered", lambda r: temporal(r) and r["cue"] == "lies")),
        **{
            name: mean_and_se(values)
            for name in ("flash", "image")
            if (values := pick("ordered", lambda r: r["data_source"] == f"toy-{name}"))
        },
    }


HEADINGS = {
    "ordered": "in order",
    "shuffled": "shuffled",
    "gap": "gap",
    "conflict": "background lies",
    "flash": "flashes",
    "image": "stills",
}


def print_table(results):
    print(
        "\nTest accuracy in %, ± standard error. Left: clips that only the order of frames answers (chance 50).\n"
        "'background lies': those of them whose background points to the wrong answer.\n"
    )
    keys = [key for key in HEADINGS if key in results["tgrpo"]]
    print(f"{'':<12}" + "".join(f"{HEADINGS[key]:>17}" for key in keys))
    for name, label in (("cold_start", "cold start"), ("tgrpo", "T-GRPO")):
        cells = (results[name][key] for key in keys)
        print(f"{label:<12}" + "".join(f"{100 * mean:>10.1f} ± {100 * se:>4.1f}" for mean, se in cells))


def plot(out, results):
    """Learning curves of both stages, and the table as bars, into one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sft, rl = read_jsonl(out / "sft/metrics.jsonl"), read_jsonl(out / "tgrpo/metrics.jsonl")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), width_ratios=(1, 1.3, 1.3))
    draw_curve(left, sft, "loss", "loss", "tab:gray")
    left.set(title="1. cold start (SFT)", xlabel="step", ylabel="loss per token, nats", yscale="log")
    draw_curve(middle, rl, "temporal/p", "p: frames in order", "tab:blue")
    draw_curve(middle, rl, "temporal/p_shuffled", "p̃: frames shuffled", "tab:orange")
    middle.set(title="2. T-GRPO on training videos", xlabel="step", ylabel="share of correct completions", ylim=(0, 1))
    middle.legend(loc="lower right", frameon=False)
    names = ["ordered", "shuffled", "conflict"]
    for shift, key, label, colour in (
        (-0.2, "cold_start", "cold start", "tab:gray"),
        (0.2, "tgrpo", "T-GRPO", "tab:blue"),
    ):
        means, errors = zip(*(results[key][name] for name in names))
        bars = right.bar(np.arange(3) + shift, means, 0.38, yerr=errors, label=label, color=colour, capsize=3)
        right.bar_label(bars, [f"{100 * m:.0f}" for m in means], padding=2)
    right.axhline(0.5, color="black", linestyle=":", linewidth=1)
    right.text(2.6, 0.5, "chance", ha="left", va="center", fontsize=8)
    right.set(
        title="3. held-out clips",
        xticks=range(3),
        xticklabels=[HEADINGS[n] for n in names],
        ylabel="accuracy",
        ylim=(0, 1.3),
        yticks=np.arange(0, 1.1, 0.2),
    )
    right.legend(loc="upper center", ncols=2, frameon=False)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save_figure(figure, out / "learning_curves.png")


def main():
    print_utf8()
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="folder for everything; default: runs/toy, runs/two_rationales, runs/ablate"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of world, model and training; default: 0")
    parser.add_argument("--world", choices=list(WORLDS), default="flawed_teacher", help="default: flawed_teacher")
    parser.add_argument(
        "--fresh", action="store_true", help="delete what an earlier run left in the folder, and start again"
    )
    parser.add_argument(
        "--ablate", action="store_true", help="compare ways of rewarding in the world of two rationales"
    )
    parser.add_argument("--seeds", type=int, default=10, help="with --ablate: how many seeds, from 0; default: 10")
    parser.add_argument(
        "--jobs", type=int, default=2, help="with --ablate: seeds at the same time, a core each; default: 2"
    )
    args = parser.parse_args()
    if args.ablate:
        from experiments.ablation import ablate

        return ablate((args.out or here / "runs/ablate").resolve(), args.seeds, args.jobs)
    two = args.world == "two_rationales"
    out = (args.out or here / ("runs/two_rationales" if two else "runs/toy")).resolve()
    if args.fresh:
        for name in ("world", "base", "skill1", "skill2", "skill3", "sft", "tgrpo", "eval"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in ("seconds.json", "summary.json", "learning_curves.png"):
            (out / name).unlink(missing_ok=True)
    elif (out / "world/world.json").exists():
        made = json.loads((out / "world/world.json").read_text(encoding="utf-8"))
        for name, wanted in (("seed", args.seed), ("world", args.world)):
            if made[name] != wanted:
                sys.exit(f"toy.py: {out} holds {name} {made[name]}, not {wanted}; choose another --out, or --fresh")
    in_place = (out / "summary.json").exists()

    stages = Stages(out, args.seed, args.world)
    try:
        stages.cold_start()
        if two:
            found, wrong = check_skill(out)
            print(f"\nthe cold start: {', '.join(f'{name} {value:.2f}' for name, value in found.items())}")
            if wrong:
                sys.exit(
                    f"toy.py: this cold start leaves RL no choice to make ({'; '.join(wrong)}): try another --seed"
                )
        stages.reinforce()
    except KeyboardInterrupt:
        print("\nstopped; nothing is broken: the same command goes on from here, --fresh begins again")
        sys.exit(130)
    results = {name: measure(out / "eval" / name / "predictions.jsonl") for name in ("cold_start", "tgrpo")}
    seconds = {**stages.seconds, "total": sum(stages.seconds.values())}
    summary = {
        name: {key: results[name][key][0] for key in ("ordered", "shuffled", "gap", "conflict")} for name in results
    }
    write_atomic(out / "summary.json", json.dumps({**summary, "seconds": seconds, "seed": args.seed}, indent=2))
    plot(out, results)
    print_table(results)
    print(
        f"\nlearning curves: {out / 'learning_curves.png'}\nsummary:         {out / 'summary.json'}"
        f"\nevery answer:    {out / 'eval/tgrpo/predictions.jsonl'}\nit took {seconds['total']:.0f} s"
        + ("; everything was in place: --fresh runs it again" if in_place else "")
    )


if __name__ == "__main__":
    main()
