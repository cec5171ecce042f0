"""Converts a checkpoint of a training run to a plain model that from_pretrained loads. One CPU process; needs no GPU.

python -m tools.export runs/7b/tgrpo/checkpoint-50 FOLDER
"""

import json
import tempfile
from pathlib import Path

import torch
from accelerate.utils.fsdp_utils import merge_fsdp_weights
from safetensors.torch import load_file

from policy import load_policy
from support import checkpoints, distributed, model_files, settings, storage
from support.settings import UserError
from tools import shared


def export(checkpoint, folder):
    """Write the policy of `checkpoint`, sharded, whole or an adapter, into `folder`.

    Config and tokenizer come from the model that the run started from. Raises UserError if that model is gone or has
    changed, if the checkpoint is not whole, and if `folder` holds something or is inside the folder of a run.
    """
    checkpoint = Path(checkpoint)
    folder = Path(folder).resolve()
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such checkpoint")
    wrong = checkpoints.damage(checkpoint)
    if wrong:
        raise UserError(f"{checkpoint}: this checkpoint is damaged: {wrong}")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} exists already; choose another folder")
    if any((parent / "run.json").is_file() for parent in folder.parents):
        raise UserError(f"{folder} is inside the folder of a run, which moves and deletes; choose another folder")
    (run_settings,) = settings.read_yaml(checkpoint.parent / "config.yaml").values()
    cfg = settings.SharedConfig(model=run_settings["model"], bf16=run_settings["bf16"])
    model_files.check_model(cfg, f"{checkpoint}, whose run started from: export")
    start = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))["weights"]
    if start not in (cfg.model, storage.fingerprint(cfg.model)):
        raise UserError(f"{checkpoint}: {cfg.model}, seen from {Path.cwd()}, is not what its run started from")
    dtype = distributed.compute_dtype(cfg)
    if (checkpoint / "adapter_config.json").is_file():
        model = model_files.merge_adapter(load_policy(cfg, dtype), checkpoint)
        state = model.state_dict()
    else:
        with torch.device("meta"):
            base = storage.adapter_chain(cfg.model)[0]
            model = model_files.empty_model(model_files.model_config(base), dtype)
        state = saved_weights(checkpoint)
    missing = set(model.state_dict()) - set(state) - set(model.all_tied_weights_keys)
    unexpected = set(state) - set(model.state_dict())
    model_files.refuse_other_tensors(checkpoint, {"missing_keys": missing, "unexpected_keys": unexpected})
    model_files.write_model(state, model, model_files.starting_files(cfg.model), folder, dtype)


def saved_weights(checkpoint):
    """The weights, sharded or not, in a checkpoint of accelerate."""
    state = {}
    shards = checkpoint / "pytorch_model_fsdp_0"
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as merged:
        source = checkpoint
        if shards.is_dir():
            merge_fsdp_weights(str(shards), merged)
            source = Path(merged)
        for file in sorted(source.glob("*.safetensors")):
            state |= load_file(file)
    return state


def main():
    parser = shared.parser(__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("folder")
    arguments = parser.parse_args()
    export(arguments.checkpoint, arguments.folder)
    print(f"model: {arguments.folder}")


if __name__ == "__main__":
    main()
