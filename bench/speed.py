"""Times one training step: ours, the plain Hugging Face loop, and TRL's GRPOTrainer if it is installed.

    python bench/speed.py [--rounds 4] [--sizes 464x64 1112x128]
    python bench/speed.py --data             # time to read 16 frames, ours and decord, and to prepare a sample
    python bench/speed.py --lora             # LoRA of rank 16 against all weights
    python bench/speed.py --optimizer        # CPU time of AdamW over the 729 sharded tensors of 7B

One process, one model, one image prompt, G = 8 completions of exactly C tokens, the same reward, β = 0.04, float32. The
contestants take turns step by step, so that a slow minute of the machine affects all of them; medians and ranges are
over rounds. The first round warms up and is not counted. Peak memory, measured in a fresh process per contestant, is
what one step adds to the resident size. The last line is one JSON object.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import av
import naive
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import data
import policy
import toy
from rewards import format_reward
from support import frames, lora, model_files
from support.settings import SharedConfig, TrainConfig
from tgrpo import group_advantages, grpo_loss

G = 8
S = 4
BETA = 0.04
# "prompt tokens x completion tokens": (picture size in pixels, hidden size, layers)
SIZES = {"464x64": ((616, 560), 512, 8), "1112x128": ((952, 896), 256, 4)}


class Clock:
    """Adds up seconds by phase."""

    def __init__(self):
        self.last = time.perf_counter()
        self.seconds = {}

    def lap(self, name):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0) + now - self.last
        self.last = now


def make_model(folder, hidden, layers):
    """A random Qwen2.5-VL of the wanted width in `folder`, with the toy's processor."""
    rows = [
        {"problem": f"{w} what is in the picture", "options": [], "process": "", "solution": ""} for w in "abcdefgh"
    ]
    toy.make_model(folder, rows)
    config = Qwen2_5_VLConfig.from_pretrained(folder)
    text = config.text_config
    text.hidden_size = hidden
    text.intermediate_size = 3 * hidden
    text.num_hidden_layers = layers
    text.num_attention_heads = hidden // 64
    text.num_key_value_heads = 2
    text.rope_parameters["mrope_section"] = [8, 12, 12]
    text.layer_types = None
    vision = config.vision_config
    vision.hidden_size = hidden // 2
    vision.intermediate_size = hidden
    vision.num_heads = hidden // 128
    vision.depth = layers // 2
    vision.out_hidden_size = hidden
    vision.fullatt_block_indexes = [layers // 2 - 1]
    config = Qwen2_5_VLConfig(**config.to_dict())
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(folder)


def prompt_of(processor, picture, n_text, cfg):
    """One image prompt whose text is filled up to P tokens."""
    record = {"problem": "", "data_type": "image", "problem_type": "free-form", "options": [], "path": "x"}
    bare = data.encode(processor, record, picture, None, cfg)["input_ids"].shape[1]
    record["problem"] = "?" * (n_text - bare)
    return record, data.encode(processor, record, picture, None, cfg)


class NoEnd:
    """The tokenizer with an end-of-turn token that is never sampled, so that every completion has C tokens."""

    def __init__(self, tokenizer):
        self.eos_token_id = len(tokenizer) + 1
        self.pad_token_id = tokenizer.pad_token_id


def rewards_of(processor, completions):
    texts = processor.tokenizer.batch_decode(completions)
    return torch.tensor([format_reward(text) + i % 2 for i, text in enumerate(texts)])


def our_step(model, reference, optimizer, prompts, counts, processor, C):
    """tgrpo.py's own functions. Only the first prompt's completions are trained; a second one is the shuffled clip."""
    clock = Clock()
    completions = policy.rollout(model, prompts, counts, NoEnd(processor.tokenizer), 1.0, C)[:G]
    clock.lap("rollout")
    advantages = group_advantages(rewards_of(processor, completions))
    packed = policy.pack(model, prompts[:1], [completions], 0)
    with torch.no_grad(), lora.adapter_off(reference):
        ref, _ = policy.completion_logps(reference, packed)
    clock.lap("reference")
    logps, _ = policy.completion_logps(model, packed)
    grpo_loss(logps, logps.detach(), ref, advantages, packed.mask_NT, 0.2, BETA)[0].mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    clock.lap("update")
    return clock.seconds


def naive_step(model, reference, optimizer, x, processor, C):
    """generate() with num_return_sequences, then G whole rows with their full logits, under reference and policy."""
    clock = Clock()
    model.model.rope_deltas = None
    x = naive.as_picture(x, model.config.image_token_id)
    P = x["input_ids"].shape[1]
    with torch.no_grad():
        rows = model.generate(
            **x,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=G,
            max_new_tokens=C,
            eos_token_id=NoEnd(processor.tokenizer).eos_token_id,
            pad_token_id=0,
            suppress_tokens=policy.placeholder_ids(model),
        )
    clock.lap("rollout")
    advantages = group_advantages(rewards_of(processor, rows[:, P:]))
    inputs = {
        "input_ids": rows,
        "attention_mask": torch.ones_like(rows),
        "mm_token_type_ids": torch.cat([x["mm_token_type_ids"].repeat(G, 1), torch.zeros(G, C, dtype=torch.long)], 1),
        "pixel_values": x["pixel_values"].repeat(G, 1),
        "image_grid_thw": x["image_grid_thw"].repeat(G, 1),
    }

    def logps(model):
        model.model.rope_deltas = None
        logits = model(**inputs, use_cache=False).logits[:, P - 1 : -1]
        return logits.log_softmax(-1).gather(2, rows[:, P:, None])[..., 0]

    with torch.no_grad():
        ref = logps(reference)
    clock.lap("reference")
    new = logps(model)
    grpo_loss(new, new.detach(), ref, advantages, torch.ones(G, C), 0.2, BETA)[0].mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    clock.lap("update")
    return clock.seconds


def run_trl(folder, picture, problem, processor, C, rounds, placeholders, between):
    """Seconds per step of TRL's trainer on the same prompt, for `rounds` steps; `between()` runs before each."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds = []

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            between()
            self.begin = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.begin)

    rows = [
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": problem}]}],
            "image": picture,
        }
    ] * 8
    settings = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=G,
        num_generations=G,
        max_completion_length=C,
        beta=BETA,
        temperature=1.0,
        max_steps=rounds,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        generation_kwargs={"min_new_tokens": C, "suppress_tokens": placeholders},
        disable_tqdm=True,
        logging_strategy="no",
        model_init_kwargs={"dtype": torch.float32},
    )

    def reward(completions, **_):
        rewards = []
        for i, completion in enumerate(completions):
            text = completion[0]["content"] if isinstance(completion, list) else completion
            rewards.append(format_reward(text) + i % 2)
        return rewards

    trainer = GRPOTrainer(
        model=str(folder),
        processing_class=processor,
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Turns()],
    )
    trainer.train()
    return seconds


def set_up(folder, size):
    """Model, prompt and optimizer of a size, from a checkpoint made in `folder`."""
    (width, height), hidden, layers = SIZES[size]
    P = int(size.split("x")[0])
    make_model(folder, hidden, layers)
    cfg = SharedConfig(model=str(folder), prompt="{problem}", min_pixels=784, max_pixels=width * height)
    processor = model_files.load_processor(cfg)
    processor.image_processor.size = {"shortest_edge": 784, "longest_edge": width * height}
    picture = Image.effect_noise((width, height), 80).convert("RGB")
    record, x = prompt_of(processor, picture, P, cfg)
    assert x["input_ids"].shape[1] == P, x["input_ids"].shape
    model = policy.load_policy(cfg).eval()
    reference = policy.load_policy(cfg).eval().requires_grad_(False)
    return processor, picture, record, x, model, reference, torch.optim.AdamW(model.parameters(), lr=1e-6)


def resident(name):
    """A field of /proc/self/status in GB: VmRSS is the resident size now, VmHWM its high-water mark."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith(name))
    return kilobytes * 1024 / 1e9


def memory_of(contestant, size):
    """GB (1e9 bytes) that one step adds to this process's resident size; to be called in a fresh process."""
    C = int(size.split("x")[1])
    with tempfile.TemporaryDirectory() as folder:
        processor, picture, record, x, model, reference, optimizer = set_up(Path(folder), size)
        before = resident("VmRSS")
        # the high-water mark starts again from here (Linux)
        Path("/proc/self/clear_refs").write_text("5")
        if contestant == "ours":
            our_step(model, reference, optimizer, [x], [G], processor, C)
        elif contestant == "naive":
            naive_step(model, reference, optimizer, x, processor, C)
        else:
            run_trl(
                Path(folder), picture, record["problem"], processor, C, 1, policy.placeholder_ids(model), lambda: None
            )
        return resident("VmHWM") - before


def write_noise(path, width, height, seconds, key_frame_every):
    """A clip of moving noise, 25 frames per second."""
    rng = np.random.default_rng(0)
    noise_HWC = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    options = {"g": str(key_frame_every), "keyint_min": str(key_frame_every), "sc_threshold": "0", "preset": "veryfast"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width = width
        stream.height = height
        stream.pix_fmt = "yuv420p"
        for i in range(25 * seconds):
            frame_HWC = np.roll(noise_HWC, (2 * i, 3 * i), (0, 1))
            frame_HWC[::7] += rng.integers(0, 30, frame_HWC[::7].shape, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode())


def read_with_decord(path, n):
    """The released way of reading: the middle frames of n equal parts of the clip, by decord in this process."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    return reader.get_batch([int((i + 0.5) * len(reader) / n) for i in range(n)]).asnumpy()


def bench_data(rounds=7, n=16):
    """Time our reader and decord in turn on n frames, and the preparation of one training sample."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        print(f"seconds to read {n} frames, median (range) of {rounds} rounds")
        for width, height, seconds, every in [
            (640, 360, 10, 250),
            (640, 360, 10, 48),
            (640, 360, 120, 250),
            (1280, 720, 60, 60),
        ]:
            path = folder / f"{width}_{seconds}_{every}.mp4"
            write_noise(path, width, height, seconds, every)
            laps = {"exact": [], "decord": []}
            for _ in range(rounds):
                begin = time.perf_counter()
                ours_FHWC = frames.read_clip(path, n).frames_FHWC
                laps["exact"].append(time.perf_counter() - begin)
                begin = time.perf_counter()
                theirs_FHWC = read_with_decord(path, n)
                laps["decord"].append(time.perf_counter() - begin)
                assert np.array_equal(ours_FHWC, theirs_FHWC)
            texts = [f"{name} {statistics.median(s):.2f} ({min(s):.2f} to {max(s):.2f})" for name, s in laps.items()]
            ratio = statistics.median(ours / theirs for ours, theirs in zip(*laps.values()))
            clip = f"{width} x {height}, {seconds} s, key frame every {every}"
            print(f"  {clip}: {', '.join(texts)}, exact / decord {ratio:.2f}")

        make_model(folder / "model", 256, 4)
        cfg = SharedConfig(model=str(folder / "model"), data_root=str(folder), num_workers=0)
        record = {
            "problem": "?",
            "data_type": "video",
            "problem_type": "free-form",
            "options": [],
            "path": "640_10_250.mp4",
        }
        samples = data.Samples([record], model_files.load_processor(cfg), cfg, ("ordered", "shuffled"))
        laps = []
        for i in range(2 * rounds):
            begin = time.perf_counter()
            assert not samples[i].error
            laps.append(1000 * (time.perf_counter() - begin))
        tokens = samples[0].ordered["input_ids"].shape[1]
        times = f"{statistics.median(laps):.0f} ms ({min(laps):.0f} to {max(laps):.0f})"
        print(f"one sample of a 10 s clip of 640 x 360, {tokens} prompt tokens, both frame orders: {times}")


def bench_optimizer(rounds, n_tensors=729):
    """Print the CPU time of one AdamW step over sharded tensors: one by one (torch's default for them) and foreach."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    mesh = init_device_mesh("cpu", (8,))
    optimizers = {}
    for name, foreach in (("one by one", False), ("foreach", True)):
        parameters = [
            torch.nn.Parameter(distribute_tensor(torch.zeros(8, 4), mesh, [Shard(0)])) for _ in range(n_tensors)
        ]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizers[name] = torch.optim.AdamW(parameters, foreach=foreach)
    laps = {name: [] for name in optimizers}
    for _ in range(rounds + 1):
        for name, optimizer in optimizers.items():
            begin = time.perf_counter()
            optimizer.step()
            laps[name].append(1000 * (time.perf_counter() - begin))
    medians = {name: statistics.median(times[1:]) for name, times in laps.items()}
    ratio = statistics.median(a / b for a, b in zip(laps["one by one"][1:], laps["foreach"][1:]))
    times = ", ".join(f"{name} {milliseconds:.0f} ms" for name, milliseconds in medians.items())
    print(f"AdamW over {n_tensors} sharded tensors: {times}; ratio {ratio:.1f}")


def bench_lora(sizes, rounds):
    """Print the seconds of a step that trains a LoRA adapter over those of a step that trains all weights, by phase."""
    for size in sizes:
        n_completion = int(size.split("x")[1])
        laps = {"LoRA": [], "all weights": []}
        with tempfile.TemporaryDirectory() as folder:
            processor, _, _, prompt, model, reference, optimizer = set_up(Path(folder), size)
            cfg = TrainConfig(model=folder, lora_rank=16)
            adapted = lora.add_adapter(policy.load_policy(cfg).eval(), cfg)
            adapter_optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-6)
            for _ in range(rounds + 1):
                for name, models in (
                    ("LoRA", (adapted, adapted, adapter_optimizer)),
                    ("all weights", (model, reference, optimizer)),
                ):
                    step = our_step(*models, [prompt, prompt], [G, S], processor, n_completion)
                    laps[name].append(step | {"whole step": sum(step.values())})
        print(f"\n{size}, LoRA / all weights, median (range) of {rounds} rounds")
        for phase in laps["LoRA"][0]:
            ratios = [a[phase] / b[phase] for a, b in zip(laps["LoRA"][1:], laps["all weights"][1:])]
            print(f"  {phase:<10} {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def time_steps(size, rounds, with_trl):
    """{contestant: [{phase: seconds} per round]}, the warm-up round included. The contestants take turns."""
    n_completion = int(size.split("x")[1])
    laps = {"ours": [], "ours, with 4 shuffled": [], "naive": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        processor, picture, record, prompt, model, reference, optimizer = set_up(folder, size)

        def turn():
            step = our_step(model, reference, optimizer, [prompt], [G], processor, n_completion)
            laps["ours"].append(step)
            step = our_step(model, reference, optimizer, [prompt, prompt], [G, S], processor, n_completion)
            laps["ours, with 4 shuffled"].append(step)
            step = naive_step(model, reference, optimizer, prompt, processor, n_completion)
            laps["naive"].append(step)

        if with_trl:
            placeholders = policy.placeholder_ids(model)
            seconds = run_trl(
                folder, picture, record["problem"], processor, n_completion, rounds + 1, placeholders, turn
            )
            laps["TRL"] = [{"whole": step_seconds} for step_seconds in seconds]
        else:
            for _ in range(rounds + 1):
                turn()
    return laps


def print_laps(size, laps, totals):
    n_prompt, n_completion = size.split("x")
    _, hidden, layers = SIZES[size]
    rounds = len(totals["ours"])
    print(f"\nP = {n_prompt}, C = {n_completion}, hidden {hidden}, {layers} layers")
    print(f"seconds per step, median (range) of {rounds}")
    for name, rows in laps.items():
        phases = []
        for phase in rows[0]:
            if phase != "whole":
                phases.append(f"{phase} {statistics.median(row[phase] for row in rows[1:]):.2f}")
        seconds = totals[name]
        spread = f"({min(seconds):.2f} to {max(seconds):.2f})"
        print(f"  {name:<22} {statistics.median(seconds):7.2f} {spread}  {'  '.join(phases)}")


def print_ratio(totals, first, second):
    """Prints and returns the median ratio of two contestants' seconds, taken per round so that slow minutes cancel."""
    ratios = [a / b for a, b in zip(totals[first], totals[second])]
    median = statistics.median(ratios)
    print(f"  {first} / {second}: {median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return round(median, 3)


def print_peaks(size, with_trl):
    """Peak memory of one step, each in a process of its own."""
    peaks = []
    for name in ["ours", "naive", "TRL"] if with_trl else ["ours", "naive"]:
        command = [sys.executable, __file__, "--memory", name, "--sizes", size]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        gigabytes = float(done.stdout.strip().split("\n")[-1])
        peaks.append(f"{name} {gigabytes:.2f} GB")
    print("  peak memory one step adds: " + ", ".join(peaks))


def compare(sizes, rounds):
    """Time all contestants at all sizes; print the results, and as JSON on the last line."""
    versions = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    with_trl = importlib.util.find_spec("trl") is not None
    print(f"TRL {importlib.metadata.version('trl')}, {versions}" if with_trl else f"TRL is not installed. {versions}")
    result = {}
    for size in sizes:
        laps = time_steps(size, rounds, with_trl)
        totals = {}
        for name, rows in laps.items():
            # the first round warms up
            totals[name] = [sum(row.values()) for row in rows[1:]]
        print_laps(size, laps, totals)
        print_peaks(size, with_trl)
        result[size] = {
            "ours_s": round(statistics.median(totals["ours"]), 3),
            "naive_s": round(statistics.median(totals["naive"]), 3),
            "trl_s": round(statistics.median(totals["TRL"]), 3) if with_trl else None,
            "ratio_naive": print_ratio(totals, "naive", "ours"),
            "ratio_trl": print_ratio(totals, "TRL", "ours") if with_trl else None,
        }
        result["tgrpo_over_grpo"] = print_ratio(totals, "ours, with 4 shuffled", "ours")
    print(json.dumps(result))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--memory", choices=["ours", "naive", "TRL"], help=argparse.SUPPRESS)
    parser.add_argument("--data", action="store_true", help="time the decoding and preparing of clips instead")
    parser.add_argument("--lora", action="store_true", help="time a LoRA adapter against all weights instead")
    parser.add_argument("--optimizer", action="store_true", help="time AdamW over sharded tensors instead")
    args = parser.parse_args()
    if args.optimizer:
        bench_optimizer(10 * args.rounds)
    elif args.lora:
        bench_lora(args.sizes, args.rounds)
    elif args.data:
        bench_data()
    elif args.memory:
        print(memory_of(args.memory, args.sizes[0]))
    else:
        compare(args.sizes, args.rounds)


if __name__ == "__main__":
    main()
