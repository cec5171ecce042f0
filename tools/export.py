"""Converts a checkpoint of a training run to a plain model that from_pretrained loads. One CPU process; needs no GPU.

python -m tools.export runs/7b/tgrpo/checkpoint-50 FOLDER
"""

import argparse
import tempfile
from pathlib import Path

import torch
from accelerate.utils.fsdp_utils import merge_fsdp_weights
from safetensors.torch import load_file
from transformers import Qwen2_5_VLConfig

from policy import load_policy
from support.checkpoints import damage, weights_in
from support.distributed import compute_dtype
from support.model_files import (
    check_model,
    empty_model,
    merge_adapter,
    refuse_other_tensors,
    starting_files,
    write_model,
)
from support.settings import SharedConfig, UserError, read_yaml
from support.storage import adapter_chain


def export(checkpoint, folder):
    """Write the policy of `checkpoint`, sharded, whole or an adapter, into `folder`.

    Config and tokenizer come from the model that the run started from. Raises UserError if that model is gone, if the
    checkpoint is not whole, and if `folder` holds something.
    """
    checkpoint = Path(checkpoint)
    folder = Path(folder)
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such checkpoint")
    wrong = damage(checkpoint)
    if wrong:
        raise UserError(f"{checkpoint}: this checkpoint is damaged: {wrong}")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} exists already; choose another folder")
    (settings,) = read_yaml(checkpoint.parent / "config.yaml").values()
    cfg = SharedConfig(model=settings["model"], bf16=settings["bf16"])
    check_model(cfg, f"{checkpoint}, whose run started from: export")
    if weights_in(checkpoint) == "an adapter":
        model = merge_adapter(load_policy(cfg, compute_dtype(cfg)), checkpoint)
        state = model.state_dict()
    else:
        with torch.device("meta"):
            model = empty_model(Qwen2_5_VLConfig.from_pretrained(adapter_chain(cfg.model)[0]), compute_dtype(cfg))
        state = saved_weights(checkpoint)
    tied = model.all_tied_weights_keys
    missing = set(model.state_dict()) - set(state) - set(tied)
    refuse_other_tensors(checkpoint, {"missing_keys": missing, "unexpected_keys": set(state) - set(model.state_dict())})
    write_model(state, model, starting_files(cfg.model), folder, compute_dtype(cfg))


def saved_weights(checkpoint):
    """The weights, sharded or not, in a checkpoint of accelerate."""
    state = {}
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as merged:
        if (checkpoint / "pytorch_model_fsdp_0").is_dir():
            merge_fsdp_weights(str(checkpoint / "pytorch_model_fsdp_0"), merged)
        source = Path(merged) if any(Path(merged).iterdir()) else checkpoint
        for file in sorted(source.glob("*.safetensors")):
            state |= load_file(file)
    return state


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint")
    parser.add_argument("folder")
    arguments = parser.parse_args()
    export(arguments.checkpoint, arguments.folder)


if __name__ == "__main__":
    main()
