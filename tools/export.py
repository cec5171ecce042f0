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

from common import check_model, compute_dtype, weights_in
from policy import empty_model, load_policy, starting_files, write_model
from settings import SharedConfig, adapter_chain, read_yaml


def export(checkpoint, folder):
    """Write the policy of `checkpoint`, sharded, whole or an adapter, into `folder`.

    Config and tokenizer come from the model that the run started from. Raises UserError if that model is gone.
    """
    checkpoint = Path(checkpoint)
    (settings,) = read_yaml(checkpoint.parent / "config.yaml").values()
    cfg = SharedConfig(model=settings["model"], bf16=settings["bf16"])
    check_model(cfg, f"{checkpoint}, whose run started from: export")
    if weights_in(checkpoint) == "an adapter":
        model = load_policy(SharedConfig(model=str(checkpoint)), compute_dtype(cfg))
        state = model.state_dict()
    else:
        with torch.device("meta"):
            model = empty_model(Qwen2_5_VLConfig.from_pretrained(adapter_chain(cfg.model)[0]), compute_dtype(cfg))
        state = saved_weights(checkpoint)
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
