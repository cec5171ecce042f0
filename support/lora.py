"""LoRA: a trainable adapter on the frozen language model, and its files, which are peft's own."""

from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from support import distributed

# The linear layers of the language model. The vision tower has some of the same names, but stays frozen.
ADAPTED_LAYERS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"


def adapted_layers(model):
    """The linear layers that have an adapter."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def add_adapter(model, cfg):
    """`model`, frozen, with a trainable adapter: each adapted weight W acts as W + (alpha / rank) B A (Hu et al. 2021).

    B is 0 at first, so the policy starts as the checkpoint. A and B are float32 whatever the dtype of W.
    """
    # A is random, and the same each time the run starts
    distributed.seed_everything(cfg.seed)
    config = LoraConfig(
        r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout, target_modules=ADAPTED_LAYERS
    )
    # an absolute path, so that the adapter can be loaded from any folder
    config.base_model_name_or_path = str(Path(cfg.model).resolve()) if Path(cfg.model).exists() else cfg.model
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for layer in adapted_layers(model):
        # in bfloat16 autocast does it; peft would first cast to float32
        layer.cast_input_dtype_enabled = False
    return model


@contextmanager
def adapter_off(model):
    """Within it the model computes without its adapter, if it has one: as the checkpoint it started from."""
    for layer in adapted_layers(model):
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in adapted_layers(model):
            layer.enable_adapters(True)


def merged_parameters(model):
    """Yields (name, tensor) as a plain model has them: W + (alpha / rank) B A of each adapted layer, in float32."""
    for name, parameter in model.named_parameters():
        if name.endswith(".base_layer.weight"):
            layer = model.get_submodule(name.removesuffix(".base_layer.weight"))
            parameter = parameter + layer.get_delta_weight("default")
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), parameter


@contextmanager
def merged(model, lora_rollout):
    """Within it, with "merged_in_place", the adapter is added to the weights of `model`; otherwise it does nothing.

    Afterwards the weights are restored bit for bit from host memory. Subtracting the adapter would change them a little
    each time in bfloat16.
    """
    if lora_rollout != "merged_in_place":
        yield
        return
    layers = adapted_layers(model)
    for layer in layers:
        weight = layer.get_base_layer().weight.data
        if not hasattr(layer, "frozen_on_host"):
            on_host = weight.to("cpu", copy=True)
            layer.frozen_on_host = on_host.pin_memory() if weight.is_cuda else on_host
        weight.add_(layer.get_delta_weight("default").detach())
    try:
        with adapter_off(model):
            yield
    finally:
        for layer in layers:
            layer.get_base_layer().weight.data.copy_(layer.frozen_on_host, non_blocking=True)


def merged_state(state, model):
    """`state`, the state dict of `model`, as that of a plain model. Changes the model: its weights include the adapter.

    In place, because a second copy may not fit beside the model. Each sum is rounded once, to the dtype of W.
    """
    for layer in adapted_layers(model):
        layer.merge()
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}


def adapter_tensors(model):
    """The tensors of the model's adapter, under the names that peft gives them in a file."""
    # embeddings are not adapted; by default peft would look on the hub whether they were
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}


def save_adapter(model, folder):
    """Write the model's adapter into `folder`, as files that peft's PeftModel.from_pretrained loads."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(adapter_tensors(model), f"{folder}/adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(folder)


def checkpoint_adapter_only(accelerator):
    """Checkpoints then hold the adapter in peft's format, and no other weights."""

    def save(models, states, folder):
        if accelerator.is_main_process:
            save_adapter(accelerator.unwrap_model(models[0]), folder)
        states.clear()

    @torch.no_grad()
    def load(models, folder):
        saved = load_file(f"{folder}/adapter_model.safetensors")
        for name, tensor in adapter_tensors(accelerator.unwrap_model(models.pop())).items():
            tensor.copy_(saved[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
