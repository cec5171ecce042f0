"""SFT: supervised fine-tuning on chains of thought, before reinforcement learning (the paper's cold start).

    accelerate launch sft.py --config configs/toy.yaml         # the tiny model, on a CPU
    accelerate launch sft.py --config configs/7b.yaml          # Qwen2.5-VL-7B, FSDP over the GPUs of this machine

Each step:
    1. records: a batch of them, decoded and tokenized in worker processes
    2. log-probs of the target (chain of thought and answer), given the frames and the question
    3. loss: −(their sum) / (number of target tokens in the whole batch, over all GPUs and micro-batches)
    4. update: backward, clip the gradient, AdamW
The result is `output_dir`/final, a folder that from_pretrained and AutoProcessor load.
"""

from dataclasses import dataclass

from torch.distributed.elastic.multiprocessing.errors import record

import common
import data
import policy
import settings


@dataclass
class SFTConfig(settings.TrainConfig):
    """Settings of SFT."""


# under a launcher: the traceback of the rank that failed is printed last
@record
def main():
    cfg = settings.load_config(SFTConfig, "sft", doc=__doc__)
    settings.require(cfg, "sft", "model", "records", "output_dir")
    common.check_model(cfg, "sft")
    records, bad_rows = data.load_records(cfg.records, cfg.data_root, cfg.max_unreadable, need_process=True)
    accelerator = common.make_accelerator(cfg)
    rank = accelerator.process_index
    ranks = accelerator.num_processes
    run = common.Run(accelerator, cfg, "sft", len(records), bad_rows)

    processor = policy.load_processor(cfg)
    starting_files = policy.starting_files(cfg.model)
    model = policy.load_trainable(cfg, accelerator)
    model, optimizer = common.prepare(accelerator, model, cfg)
    unwrapped = accelerator.unwrap_model(model)
    run.resume()

    samples = data.Samples(records, processor, cfg, targets=True)
    batches = data.loader(samples, data.rank_batches(cfg, run.first_step, rank, ranks), cfg)
    dummy = data.dummy_sample(processor, cfg)

    # 1. records
    for step, batch in run.steps(batches):
        # for the dropout of a LoRA adapter: a resumed step repeats it
        common.seed_everything(cfg.seed, step, rank)
        n_tokens = common.sum_over_ranks(accelerator, sum(len(sample.target) for sample in batch))
        loss_sum = 0.0
        for micro, weight in run.micro_batches(batch, dummy):
            # 2. log-probs: one completion per prompt, its target
            prompts = [sample.ordered for sample in micro]
            targets = [[sample.target] for sample in micro]
            packed = policy.pack(unwrapped, prompts, targets, processor.tokenizer.pad_token_id)
            logps_NT, _ = policy.completion_logps(model, packed)
            # 3. loss
            loss = -weight * logps_NT.sum() / max(1, n_tokens)
            # 4. update: backward averages over the ranks, hence the factor
            accelerator.backward(loss * ranks)
            loss_sum += loss.item()
        grad_norm = run.update(model, optimizer, step)
        run.lap("train")

        loss = common.sum_over_ranks(accelerator, loss_sum)
        run.log(step, {"loss": loss, "policy/grad_norm": grad_norm})
        run.bar.set_postfix(loss=loss)
        if run.checkpoint_or_stop(step):
            return

    final = f"{cfg.output_dir}/final"
    policy.save_model(accelerator, model, starting_files, final, common.compute_dtype(cfg))
    run.finish(f"SFT model: {final}")


if __name__ == "__main__":
    main()
