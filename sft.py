"""SFT: supervised fine-tuning on chains of thought, before reinforcement learning (the paper's cold start).

    accelerate launch sft.py --config configs/toy.yaml         # the tiny model, on a CPU
    accelerate launch sft.py --config configs/7b.yaml          # Qwen2.5-VL-7B, FSDP over the GPUs of this machine

Each step:
    1. records: a batch of them, decoded and tokenized in worker processes
    2. log-probs of the target (chain of thought and answer), given the frames and the question
    3. loss: −(their sum) / (number of target tokens in the whole batch, over all GPUs and micro-batches)
    4. update: backward, clip the gradient, AdamW
The result is `output_dir`/final, a folder that from_pretrained and AutoProcessor load.

Axes: N targets of a micro-batch · T tokens of the longest target
"""

from dataclasses import dataclass

from torch.distributed.elastic.multiprocessing import errors

import data
import policy
from support import distributed, model_files, settings, training, workers


@dataclass
class SFTConfig(settings.TrainConfig):
    """Settings of SFT."""


# under a launcher: the traceback of the rank that failed is printed last
@errors.record
def main():
    cfg = settings.load_config(SFTConfig, "sft", doc=__doc__, required=("model", "records", "output_dir"))
    model_files.check_model(cfg, "sft")
    records, bad_rows = data.load_records(cfg.records, cfg.data_root, cfg.max_unreadable, need_process=True)
    accelerator = distributed.make_accelerator(cfg)
    rank = accelerator.process_index
    ranks = accelerator.num_processes
    run = training.Run(accelerator, cfg, "sft", records, bad_rows)

    # `model` is called, and backward runs through it; `unwrapped` has its weights and config
    processor = model_files.load_processor(cfg)
    starting_files = model_files.starting_files(cfg.model)
    model, optimizer = distributed.prepare(accelerator, policy.load_trainable(cfg, accelerator), cfg)
    unwrapped = accelerator.unwrap_model(model)
    run.resume()

    samples = data.Samples(records, processor, cfg, targets=True)
    batches = workers.loader(samples, data.rank_batches(cfg, run.first_step, rank, ranks), cfg)
    dummy = data.dummy_sample(processor, cfg)

    # 1. records
    for step, batch in run.steps(batches):
        # seeds the dropout of a LoRA adapter, so that a resumed step repeats it
        distributed.seed_everything(cfg.seed, step, rank)
        n_tokens = distributed.sum_over_ranks(accelerator, sum(len(sample.target) for sample in batch))
        loss_sum = 0.0
        # weight is 1, or 0 for the dummy; run.steps has dropped unreadable samples
        for micro, weight in run.micro_batches(batch, dummy):
            # 2. log-probs: one completion per prompt, its target
            prompts = [sample.inputs["ordered"] for sample in micro]
            targets = [[sample.target] for sample in micro]
            packed = policy.pack(unwrapped, prompts, targets, processor.tokenizer.pad_token_id)
            logps_NT, _ = policy.completion_logps(model, packed)
            # 3. loss
            loss = -weight * logps_NT.sum() / max(1, n_tokens)
            # 4. update: backward averages over the ranks, hence the factor
            accelerator.backward(loss * ranks)
            loss_sum += loss.item()
        training.set_learning_rate(optimizer, step, cfg)
        grad_norm = run.clip_gradient(model)
        if run.is_finite(grad_norm, step):
            optimizer.step()
        optimizer.zero_grad()
        run.lap("train")

        loss = distributed.sum_over_ranks(accelerator, loss_sum)
        run.log(step, {"loss": loss, "policy/grad_norm": grad_norm}, show="loss")
        if run.checkpoint_or_stop(step):
            return

    run.finish(model, starting_files, "SFT model")


if __name__ == "__main__":
    main()
