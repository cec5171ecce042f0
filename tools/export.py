"""Converts a checkpoint of a training run to a plain model that from_pretrained loads. One CPU process; needs no GPU.

python -m tools.export runs/7b/tgrpo/checkpoint-50 FOLDER
"""

import argparse
import tempfile
from pathlib import Path

from accelerate.utils.fsdp_utils import merge_fsdp_weights
from safetensors.torch import load_file
from transformers import Qwen2_5_VLConfig

from common import check_model, compute_dtype
from policy import starting_files, write_model
from settings import SharedConfig, read_yaml


def export(checkpoint, folder):
    """Write the policy of `checkpoint`, sharded or not, into `folder`.

    Config and tokenizer come from the model that the run started from. Raises UserError if that model is gone.
    """
    checkpoint = Path(checkpoint)
    (settings,) = read_yaml(checkpoint.parent / "config.yaml").values()
    state = {}
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as merged:
        if (checkpoint / "pytorch_model_fsdp_0").is_dir():
            merge_fsdp_weights(str(checkpoint / "pytorch_model_fsdp_0"), merged)
        source = Path(merged) if any(Path(merged).iterdir()) else checkpoint
        for file in sorted(source.glob("*.safetensors")):
            state |= load_file(file)
    cfg = SharedConfig(model=settings["model"], bf16=settings["bf16"])
    check_model(cfg, f"{checkpoint}, whose run started from: export")
    config = Qwen2_5_VLConfig.from_pretrained(cfg.model)
    write_model(state, config, starting_files(cfg.model), folder, compute_dtype(cfg))


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
