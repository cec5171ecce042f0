"""Seconds of one step: ours, the plain Hugging Face loop, and TRL's GRPOTrainer where it is installed. Not a test.

    python bench/speed.py [--rounds 4] [--sizes 464x64 1112x128]
    python bench/speed.py --data                # seconds to read 16 frames of clips, beside decord, and to prepare a sample
    python bench/speed.py --optimizer           # the host's time for AdamW over the 729 sharded tensors of 7B

One process, one model, one image prompt, G = 8 completions of exactly C tokens, the same reward, β = 0.04, float32. The
contestants take turns step by step, so that noise of the machine meets all of them; medians and ranges are over rounds.
The first round warms up and is not counted. Peak memory is taken in a fresh process each: what one step adds to the
resident size. The last line is one JSON object.
"""

import argparse
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
import frames
import policy
import toy
from rewards import format_reward
from settings import SharedConfig
from tgrpo import group_advantages, grpo_loss

G, S, BETA = 8, 4, 0.04
# prompt tokens, completion tokens: picture size in pixels and the model that is slow enough to measure, quick enough to wait for
SIZES = {"464x64": ((616, 560), 512, 8), "1112x128": ((952, 896), 256, 4)}


class Clock:
    """Adds up seconds by phase."""

    def __init__(self):
        self.last, self.parts = time.perf_counter(), {}

    def lap(self, name):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[name], self.last = self.parts.get(name, 0) + now - self.last, now


def make_model(folder, hidden, layers):
    """A random Qwen2.5-VL of the wanted width in `folder`, with the toy's processor."""
    rows = [
        {"problem": f"{w} what is in the picture", "options": [], "process": "", "solution": ""} for w in "abcdefgh"
    ]
    toy.make_model(folder, rows)
    config = Qwen2_5_VLConfig.from_pretrained(folder)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = hidden, 3 * hidden, layers
    text.num_attention_heads, text.num_key_value_heads, text.rope_parameters["mrope_section"] = (
        hidden // 64,
        2,
        [8, 12, 12],
    )
    text.layer_types = None
    vision.hidden_size, vision.intermediate_size, vision.num_heads, vision.depth = (
        hidden // 2,
        hidden,
        hidden // 128,
        layers // 2,
    )
    vision.out_hidden_size, vision.fullatt_block_indexes = hidden, [layers // 2 - 1]
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
        self.eos_token_id, self.pad_token_id = len(tokenizer) + 1, tokenizer.pad_token_id


def rewards_of(processor, completions):
    return torch.tensor(
        [format_reward(t) + (i % 2) for i, t in enumerate(processor.tokenizer.batch_decode(completions))]
    )


def our_step(model, reference, optimizer, prompts, counts, processor, C):
    """tgrpo.py's own functions. Only the first prompt's completions are trained; a second one is the shuffled clip."""
    clock = Clock()
    completions = policy.rollout(model, prompts, counts, NoEnd(processor.tokenizer), 1.0, C)[:G]
    clock.lap("rollout")
    advantages = group_advantages(rewards_of(processor, completions))
    packed = policy.pack(model, prompts[:1], [completions], 0)
    with torch.no_grad():
        ref, _ = policy.completion_logps(reference, packed)
    clock.lap("reference")
    logps, _ = policy.completion_logps(model, packed)
    grpo_loss(logps, logps.detach(), ref, advantages, packed.mask_NT, 0.2, BETA)[0].mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    clock.lap("update")
    return clock.parts


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
    return clock.parts


def run_trl(folder, picture, problem, processor, C, rounds, placeholders, between):
    """`rounds` steps of TRL's trainer on the same prompt; `between()` runs before each of them. Seconds of each step."""
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
    reward = lambda completions, **_: [
        format_reward(c[0]["content"] if isinstance(c, list) else c) + (i % 2) for i, c in enumerate(completions)
    ]
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
    processor = policy.load_processor(cfg)
    processor.image_processor.size = {"shortest_edge": 784, "longest_edge": width * height}
    picture = Image.effect_noise((width, height), 80).convert("RGB")
    record, x = prompt_of(processor, picture, P, cfg)
    assert x["input_ids"].shape[1] == P, x["input_ids"].shape
    model, reference = policy.load_policy(cfg).eval(), policy.load_policy(cfg).eval().requires_grad_(False)
    return processor, picture, record, x, model, reference, torch.optim.AdamW(model.parameters(), lr=1e-6)


def resident(name):
    """A line of /proc/self/status in GB: VmRSS is the resident size now, VmHWM its high-water mark."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024 / 1e9


def memory_of(contestant, size):
    """GB (1e9 bytes) that one step adds to this process's resident size; to be called in a fresh process."""
    C = int(size.split("x")[1])
    with tempfile.TemporaryDirectory() as folder:
        processor, picture, record, x, model, reference, optimizer = set_up(Path(folder), size)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here (Linux)
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
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(25 * seconds):
            frame_HWC = np.roll(noise_HWC, (2 * i, 3 * i), (0, 1))
            frame_HWC[::7] += rng.integers(0, 30, frame_HWC[::7].shape, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode())


def read_with_decord(path, n):
    """What the reader was before: the middles of equal parts, counted, by decord in this process."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    return reader.get_batch([int((i + 0.5) * len(reader) / n) for i in range(n)]).asnumpy()


def bench_data(rounds=7, n=16):
    """Prints seconds to read n frames, by our reader and by decord in turn, and those a worker needs for a training sample."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        print(f"seconds to read {n} frames, median (range) of {rounds} turns")
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
            print(
                f"  {width} x {height}, {seconds} s, key frame every {every}: {', '.join(texts)}, exact / decord {ratio:.2f}"
            )

        make_model(folder / "model", 256, 4)
        cfg = SharedConfig(model=str(folder / "model"), data_root=str(folder), num_workers=0)
        record = {
            "problem": "?",
            "data_type": "video",
            "problem_type": "free-form",
            "options": [],
            "path": "640_10_250.mp4",
        }
        samples = data.Samples([record], policy.load_processor(cfg), cfg, ("ordered", "shuffled"))
        laps = []
        for i in range(2 * rounds):
            begin = time.perf_counter()
            assert not samples[i].error
            laps.append(1000 * (time.perf_counter() - begin))
        tokens = samples[0].ordered["input_ids"].shape[1]
        print(
            f"one sample of a 10 s clip of 640 x 360, {tokens} prompt tokens, both orders: {statistics.median(laps):.0f} ms "
            f"({min(laps):.0f} to {max(laps):.0f})"
        )


def bench_optimizer(rounds, n_tensors=729):
    """Milliseconds of the host for one AdamW step over small sharded tensors, one by one (torch's default there) and foreach."""
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
    print(
        f"AdamW over {n_tensors} sharded tensors: one by one {medians['one by one']:.0f} ms, foreach {medians['foreach']:.0f} ms; ratio {ratio:.1f}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--memory", choices=["ours", "naive", "TRL"], help=argparse.SUPPRESS)
    parser.add_argument("--data", action="store_true", help="time the decoding and preparing of clips instead")
    parser.add_argument("--optimizer", action="store_true", help="time AdamW over sharded tensors instead")
    args = parser.parse_args()
    if args.optimizer:
        return bench_optimizer(10 * args.rounds)
    if args.data:
        return bench_data()
    if args.memory:
        return print(memory_of(args.memory, args.sizes[0]))
    try:
        import trl

        print(f"TRL {trl.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    except ImportError:
        trl = None
        print(
            f"TRL is not installed: its column stays empty. torch {torch.__version__}, {torch.get_num_threads()} threads"
        )

    result = {}
    for size in args.sizes:
        P, C = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            processor, picture, record, x, model, reference, optimizer = set_up(folder, size)
            laps = {"ours": [], "ours, with 4 shuffled": [], "naive": []}

            def turn():
                laps["ours"].append(our_step(model, reference, optimizer, [x], [G], processor, C))
                laps["ours, with 4 shuffled"].append(
                    our_step(model, reference, optimizer, [x, x], [G, S], processor, C)
                )
                laps["naive"].append(naive_step(model, reference, optimizer, x, processor, C))

            if trl:
                laps["TRL"] = [
                    {"whole": s}
                    for s in run_trl(
                        folder,
                        picture,
                        record["problem"],
                        processor,
                        C,
                        args.rounds + 1,
                        policy.placeholder_ids(model),
                        turn,
                    )
                ]
            else:
                for _ in range(args.rounds + 1):
                    turn()

        totals = {name: [sum(parts.values()) for parts in rows[1:]] for name, rows in laps.items()}
        print(
            f"\nP = {P}, C = {C}, hidden {SIZES[size][1]}, {SIZES[size][2]} layers: seconds a step, median (range) of {args.rounds}"
        )
        for name, rows in laps.items():
            phases = "  ".join(f"{p} {statistics.median(r[p] for r in rows[1:]):.2f}" for p in rows[0] if p != "whole")
            print(
                f"  {name:<22} {statistics.median(totals[name]):7.2f} ({min(totals[name]):.2f} to {max(totals[name]):.2f})  {phases}"
            )

        def ratio(a, b):  # of neighbours in time, so that slow minutes cancel
            ratios = [p / q for p, q in zip(totals[a], totals[b])]
            print(f"  {a} / {b}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
            return round(statistics.median(ratios), 3)

        peaks = {}
        for name in ["ours", "naive"] + ["TRL"] * bool(trl):
            done = subprocess.run(
                [sys.executable, __file__, "--memory", name, "--sizes", size],
                capture_output=True,
                text=True,
                check=True,
            )
            peaks[name] = float(done.stdout.strip().split("\n")[-1])
        print("  peak memory one step adds: " + ", ".join(f"{name} {gb:.2f} GB" for name, gb in peaks.items()))
        result[size] = {
            "ours_s": round(statistics.median(totals["ours"]), 3),
            "naive_s": round(statistics.median(totals["naive"]), 3),
            "trl_s": round(statistics.median(totals["TRL"]), 3) if trl else None,
            "ratio_naive": ratio("naive", "ours"),
            "ratio_trl": ratio("TRL", "ours") if trl else None,
        }
        result["tgrpo_over_grpo"] = ratio("ours, with 4 shuffled", "ours")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
