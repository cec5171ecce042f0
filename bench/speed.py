"""Times one training step: ours, the plain Hugging Face loop, and TRL's GRPOTrainer if it is installed.

    python bench/speed.py [--rounds 4] [--sizes 464x64 1112x128]
    python bench/speed.py --rounds 1 --sizes 64x8        # seconds: does the script run?

One process, one model, one image prompt, G = 8 completions of exactly C tokens, the same reward, β = 0.04, float32. The
contestants take turns step by step, so that a slow minute of the machine affects all of them; medians and ranges are
over rounds. The first round warms up and is not counted. Peak memory, measured in a fresh process per contestant, is
what one step adds to the resident size. The last line is one JSON object.
"""

import argparse
import functools
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import naive
import torch
from hub_checkpoint import write_hub_checkpoint
from PIL import Image

import data
import policy
from rewards import format_reward
from support import model_files
from support.settings import SharedConfig
from tgrpo import group_advantages, grpo_loss

G = 8
S = 4
BETA = 0.04
# "prompt tokens x completion tokens": (picture size in pixels, hidden size, layers)
SIZES = {"464x64": ((616, 560), 512, 8), "1112x128": ((952, 896), 256, 4), "64x8": ((56, 56), 128, 2)}


class Step:
    """What every contestant starts from: model, reference, optimizer, and one prompt of P tokens, for C more."""

    def __init__(self, folder, size):
        (width, height), hidden, layers = SIZES[size]
        P, self.C = map(int, size.split("x"))
        write_model(folder, hidden, layers)
        cfg = SharedConfig(model=str(folder), prompt="{problem}", min_pixels=784, max_pixels=width * height)
        self.folder = folder
        self.processor = model_files.load_processor(cfg)
        self.processor.image_processor.size = {"shortest_edge": 784, "longest_edge": width * height}
        self.picture = Image.effect_noise((width, height), 80).convert("RGB")
        self.record = {"problem": "", "data_type": "image", "problem_type": "free-form", "options": [], "path": "x"}
        bare = data.encode(self.processor, self.record, self.picture, None, cfg)["input_ids"].shape[1]
        self.record["problem"] = "?" * (P - bare)
        self.prompt = data.encode(self.processor, self.record, self.picture, None, cfg)
        assert self.prompt["input_ids"].shape[1] == P, self.prompt["input_ids"].shape
        self.model = policy.load_policy(cfg).eval()
        self.reference = policy.load_policy(cfg).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.placeholders = list(policy.placeholder_ids(self.model))
        tokenizer = self.processor.tokenizer
        # an end that is never sampled, so that every completion has C tokens
        self.tokenizer = types.SimpleNamespace(eos_token_id=len(tokenizer) + 1, pad_token_id=tokenizer.pad_token_id)

    def advantages(self, completions):
        texts = self.processor.tokenizer.batch_decode(completions)
        return group_advantages(torch.tensor([format_reward(text) + i % 2 for i, text in enumerate(texts)]))

    def update(self, logps, ref_logps, advantages, mask):
        grpo_loss(logps, logps.detach(), ref_logps, advantages, mask, 0.2, BETA)[0].mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def write_model(folder, hidden, layers):
    """A random Qwen2.5-VL of this width in `folder`."""
    text = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": 2,
        "vocab_size": 640,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    }
    vision = {
        "hidden_size": hidden // 2,
        "intermediate_size": hidden,
        "num_heads": hidden // 128,
        "depth": layers // 2,
        "fullatt_block_indexes": [layers // 2 - 1],
    }
    write_hub_checkpoint(folder, ["what is in the picture"], tied=True, text=text, vision=vision)


def our_step(step, n_shuffled=0):
    """tgrpo.py's own functions. Only the first prompt's completions are trained; a second one is the shuffled clip."""
    prompts = [step.prompt, step.prompt] if n_shuffled else [step.prompt]
    counts = [G, n_shuffled] if n_shuffled else [G]
    completions = policy.rollout(step.model, prompts, counts, step.tokenizer, 1.0, step.C)[:G]
    packed = policy.pack(step.model, prompts[:1], [completions], 0)
    with torch.no_grad():
        ref_logps, _ = policy.completion_logps(step.reference, packed)
    logps, _ = policy.completion_logps(step.model, packed)
    step.update(logps, ref_logps, step.advantages(completions), packed.mask_NT)


def naive_step(step):
    """generate() with num_return_sequences, then G whole rows with their full logits, under reference and policy."""
    x = naive.as_picture(step.prompt, step.model.config.image_token_id)
    P = x["input_ids"].shape[1]
    step.model.model.rope_deltas = None
    with torch.no_grad():
        rows = step.model.generate(
            **x,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=G,
            max_new_tokens=step.C,
            eos_token_id=step.tokenizer.eos_token_id,
            pad_token_id=0,
            suppress_tokens=step.placeholders,
        )
    kinds = torch.cat([x["mm_token_type_ids"].repeat(G, 1), torch.zeros(G, step.C, dtype=torch.long)], 1)
    inputs = {
        "input_ids": rows,
        "attention_mask": torch.ones_like(rows),
        "mm_token_type_ids": kinds,
        "pixel_values": x["pixel_values"].repeat(G, 1),
        "image_grid_thw": x["image_grid_thw"].repeat(G, 1),
    }

    def logps(model):
        model.model.rope_deltas = None
        logits = model(**inputs, use_cache=False).logits[:, P - 1 : -1]
        return logits.log_softmax(-1).gather(2, rows[:, P:, None])[..., 0]

    with torch.no_grad():
        ref_logps = logps(step.reference)
    step.update(logps(step.model), ref_logps, step.advantages(rows[:, P:]), torch.ones(G, step.C))


def run_trl(step, rounds, between):
    """Seconds per step of TRL's trainer on the same prompt, for `rounds` steps; `between()` runs before each."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds = []

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            between()
            self.begin = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.perf_counter() - self.begin)

    content = [{"type": "image"}, {"type": "text", "text": step.record["problem"]}]
    row = {"prompt": [{"role": "user", "content": content}], "image": step.picture}
    settings = GRPOConfig(
        output_dir=str(step.folder / "trl"),
        per_device_train_batch_size=G,
        num_generations=G,
        max_completion_length=step.C,
        beta=BETA,
        temperature=1.0,
        max_steps=rounds,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        generation_kwargs={"min_new_tokens": step.C, "suppress_tokens": step.placeholders},
        disable_tqdm=True,
        logging_strategy="no",
        model_init_kwargs={"dtype": torch.float32},
    )

    def reward(completions, **_):
        return [format_reward(completion[0]["content"]) + i % 2 for i, completion in enumerate(completions)]

    trainer = GRPOTrainer(
        model=str(step.folder),
        processing_class=step.processor,
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list([row] * 8),
        callbacks=[Turns()],
    )
    trainer.train()
    return seconds


CONTESTANTS = {
    "ours": our_step,
    "ours, with 4 shuffled": functools.partial(our_step, n_shuffled=S),
    "naive": naive_step,
}


def resident(name):
    """A field of /proc/self/status in GB: VmRSS is the resident size now, VmHWM its high-water mark."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith(name))
    return kilobytes * 1024 / 1e9


def memory_of(contestant, size):
    """GB (1e9 bytes) that one step adds to this process's resident size; to be called in a fresh process (Linux)."""
    with tempfile.TemporaryDirectory() as folder:
        step = Step(Path(folder) / "model", size)
        before = resident("VmRSS")
        # the high-water mark starts again from here
        Path("/proc/self/clear_refs").write_text("5")
        if contestant == "TRL":
            run_trl(step, 1, lambda: None)
        else:
            CONTESTANTS[contestant](step)
        return resident("VmHWM") - before


def time_steps(size, rounds, with_trl):
    """{contestant: seconds per round}, without the round that warms up. The contestants take turns."""
    seconds = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        step = Step(Path(folder) / "model", size)

        def turn():
            for name, contestant in CONTESTANTS.items():
                begin = time.perf_counter()
                contestant(step)
                seconds[name].append(time.perf_counter() - begin)

        if with_trl:
            seconds["TRL"] = run_trl(step, rounds + 1, turn)
        else:
            for _ in range(rounds + 1):
                turn()
    return {name: laps[1:] for name, laps in seconds.items()}


def compare(sizes, rounds):
    """Time all contestants at all sizes; print the results, and as JSON on the last line."""
    with_trl = importlib.util.find_spec("trl") is not None
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; TRL: {with_trl}")
    result = {}
    for size in sizes:
        seconds = time_steps(size, rounds, with_trl)
        print(f"\n{size}: medians of {rounds} rounds (and range)")
        result[size] = {}
        for name, laps in seconds.items():
            ratios = [lap / ours for lap, ours in zip(laps, seconds["ours"])]
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                memory = fresh.submit(memory_of, name, size).result()
            numbers = {"seconds": statistics.median(laps), "ratio": statistics.median(ratios), "added_gb": memory}
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"  {name:<22} {numbers['seconds']:7.2f} s, {numbers['ratio']:.2f} {spread} x ours, {memory:.2f} GB")
            result[size][name] = {key: round(value, 3) for key, value in numbers.items()}
    print(json.dumps(result))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sizes", nargs="+", default=["464x64", "1112x128"], choices=list(SIZES))
    args = parser.parse_args()
    compare(args.sizes, args.rounds)


if __name__ == "__main__":
    main()
