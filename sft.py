"""The cold start: supervised fine-tuning on chains of thought, before any reinforcement learning.

    accelerate launch sft.py --config configs/toy.yaml         # the tiny model, on a CPU
    accelerate launch sft.py --config configs/7b.yaml          # Qwen2.5-VL-7B, FSDP over the GPUs of this machine

Each step:
    1. a batch of records, decoded and tokenized in worker processes
    2. the log-probs of the assistant's words, given frames and question; nothing else carries loss
    3. loss = −(their sum) / (their number in the whole batch, over all GPUs and micro-batches)
    4. backward, clip, AdamW step
The result is `output_dir`/final, a folder that from_pretrained and AutoProcessor load.

Axes: B rows · L tokens of a row · N target tokens of all rows
"""

from dataclasses import dataclass

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

import common
import data
import policy
import settings


@dataclass
class SFTConfig(settings.TrainConfig):
    """Settings of the cold start."""


def collate(samples, pad_id, vision_config):
    """Rows prompt + target, right-padded, and where the targets are predicted.

    Returns (inputs, predict, targets): predict (N,) are flattened (B·L) positions, targets (N,) the tokens that follow.
    """
    prompts = [s.ordered for s in samples]
    rows = [torch.cat([x["input_ids"][0], s.target]) for x, s in zip(prompts, samples)]
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    kinds = [torch.cat([x["mm_token_type_ids"][0], torch.zeros_like(s.target)]) for x, s in zip(prompts, samples)]
    positions = []
    for x, row_kinds in zip(prompts, kinds):
        positions.append(policy.mrope_positions({**x, "mm_token_type_ids": row_kinds[None]}, vision_config).T)
    inputs = {
        "input_ids": data.pad(rows, pad_id, "right"),
        "attention_mask": data.pad([torch.ones(n, dtype=torch.long) for n in lengths], 0, "right"),
        "position_ids": data.pad(positions, 0, "right").permute(2, 0, 1),
        **data.join_media(prompts),
    }
    predict = [
        b * longest + torch.arange(n - len(s.target) - 1, n - 1) for b, (n, s) in enumerate(zip(lengths, samples))
    ]
    return inputs, torch.cat(predict), torch.cat([s.target for s in samples])


@record  # under a launcher: this rank's traceback stands last
def main():
    cfg = settings.load_config(SFTConfig, "sft", doc=__doc__)
    settings.require(cfg, "sft", "model", "records", "output_dir")
    policy.check_model(cfg, "sft")
    records, bad_rows = data.load_records(cfg.records, cfg.data_root, cfg.max_unreadable, need_process=True)
    accelerator = common.make_accelerator(cfg, **common.trackers(cfg))
    common.check_batches(cfg, accelerator)
    checkpoint = common.claim_folder(accelerator, cfg, "sft")
    common.seed_everything(cfg.seed)

    processor = policy.load_processor(cfg)
    files = policy.starting_files(cfg.model)
    model = policy.load_model(cfg, accelerator=accelerator).train()
    vision_config = model.config.vision_config
    model, optimizer = common.prepare(accelerator, model, cfg)
    resumed = common.resume(accelerator, checkpoint)
    start = resumed["step"]
    log = common.Log(accelerator, cfg, "sft", start)
    stop = common.StopSignal()
    skipped = common.Skipped(accelerator, cfg, len(records), bad_rows, resumed.get("skipped", {}))

    samples = data.Samples(records, processor, cfg, targets=True)
    blank = data.blank_sample(processor, cfg)
    batches = data.loader(
        samples, data.rank_batches(cfg, start, accelerator.process_index, accelerator.num_processes), cfg
    )
    timer = common.Timer()
    bar = tqdm(batches, initial=start, total=cfg.steps, desc="sft", disable=not accelerator.is_main_process)
    for step, batch in enumerate(bar, start):
        timer.lap("data_wait")
        batch = skipped.drop(accelerator, batch)  # 1. a batch
        total = common.all_sum(accelerator, {"tokens": sum(len(s.target) for s in batch)})["tokens"]
        loss_sum = 0.0
        for micro, weight in common.micro_batches(batch, cfg, accelerator, blank):
            inputs, predict, targets = collate(micro, processor.tokenizer.pad_token_id, vision_config)
            logps_N, _ = model(
                **common.to_device(inputs, accelerator.device),
                predict=predict.to(accelerator.device),
                targets=targets.to(accelerator.device),
            )  # 2. log-probs
            loss = -weight * logps_N.sum() / max(1, total)  # 3. loss
            accelerator.backward(loss * accelerator.num_processes)  # 4. backward; ranks' gradients are averaged
            loss_sum += loss.item()
        grad_norm = common.update(accelerator, model, optimizer, step, cfg)  # 4. step
        timer.lap("train")

        metrics = {
            **common.all_sum(accelerator, {"loss": loss_sum}),
            "policy/grad_norm": grad_norm,
            "lr": common.learning_rate(step, cfg),
            "data/skipped": len(skipped),
            **timer.report(),
            **common.peak_memory(accelerator),
        }
        log(step, metrics)
        bar.set_postfix(loss=f"{metrics['loss']:.3f}")
        if common.after_step(accelerator, cfg, step, stop, {"skipped": skipped.seen}):
            return

    policy.save_model(accelerator, model, files, f"{cfg.output_dir}/final", common.compute_dtype(cfg))
    skipped.report(accelerator)
    accelerator.print(f"cold start: {cfg.output_dir}/final")
    accelerator.end_training()


if __name__ == "__main__":
    main()
