"""Checkpoints in the hub's layout: checking, loading and saving a model and its processor.

A checkpoint may also be a LoRA adapter in peft's format; it is then merged into the checkpoint that it belongs to.
"""

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.utils.peft_utils import find_adapter_config_file
from transformers.video_utils import VideoMetadata

from support import checkpoints, distributed, families, lora, settings, storage, vision

# The files of a checkpoint besides its weights.
SMALL_FILES = "*config.json chat_template.* tokenizer* vocab.* merges.txt *_tokens*.json".split()
# What an error of a library means.
HINTS = {
    "deserializing header": "half a download, or a clone without git-lfs?",
    # of the first revision on the hub; the class was renamed
    "Unrecognized image": "in preprocessor_config.json, for Qwen2_5_VLImageProcessor write Qwen2VLImageProcessor",
}


@contextmanager
def usable(what):
    """Within it, any error of a library becomes a UserError. Only for reading and trying the files of a checkpoint."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = repr(error) if isinstance(error, KeyError) else " ".join(str(error).split())
        # the first sentence; what follows is advice about the library
        hints = [hint for words, hint in HINTS.items() if words in text]
        raise settings.UserError("; ".join([f"{what}: {text.split('. ')[0]:.200}", *hints])) from error


def model_config(model):
    """The config of a checkpoint. ValueError if its model cannot be trained."""
    # by default transformers asks on a terminal whether to run the repository's own code
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    families.check_type(config.model_type)
    parts = (config, config.text_config, config.vision_config)
    if any(getattr(part, "quantization_config", None) for part in parts):
        raise ValueError("it is quantized, and such weights cannot be trained")
    return config


def check_settings(cfg, config):
    """Raise UserError for settings that the model of this config cannot follow."""
    vision = config.vision_config
    token_pixels = (vision.patch_size * vision.spatial_merge_size) ** 2
    if cfg.max_pixels < token_pixels:
        raise settings.UserError(f"max_pixels: {cfg.max_pixels}, but a token of {cfg.model} is {token_pixels} pixels")
    if cfg.shuffle_stamps and not families.of(config).has_time_stamps:
        raise settings.UserError(f"shuffle_stamps: true: the prompts of {cfg.model} have no time stamps")


def load_processor(cfg):
    """The checkpoint's own processor (tokenizer, image and video processor). UserError if it cannot be used."""
    base = storage.adapter_chain(cfg.model)[0]
    check_hub(base)
    with usable(cfg.model):
        config = model_config(base)
    check_settings(cfg, config)
    with usable(f"{cfg.model}: its processor cannot be loaded"):
        processor = AutoProcessor.from_pretrained(base, trust_remote_code=False)
        # older folders have the template in the tokenizer's config only
        processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
        end = generation_config(base, config).eos_token_id
    with usable(f"{cfg.model}: its chat template fails"):
        content = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "?"}]
        question = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    with usable(f"{cfg.model}: its files do not fit together"):
        ends = end if isinstance(end, list) else [end]
        # None: the tokenizer's
        try_processor(processor, config, prompt, [processor.tokenizer.eos_token_id] if end is None else ends)
    return processor


def try_processor(processor, config, prompt, ends):
    """Raise ValueError if the model cannot read the prompt about a clip and a picture, or never ends its answer."""
    tokenizer = processor.tokenizer
    n_tokens = max(tokenizer.get_vocab().values()) + 1
    n_rows = config.text_config.vocab_size
    media = (processor.video_token_id, processor.image_token_id)
    merge = config.vision_config.spatial_merge_size
    merges = {processor.image_processor.merge_size, processor.video_processor.merge_size}
    family = families.of(config)
    name = type(processor).__name__
    video_name = type(processor.video_processor).__name__
    problems = {
        f"its processor is a {name}, not a {family.processor}": name != family.processor,
        f"its video processor is a {video_name}, not a {family.video_processor}": video_name != family.video_processor,
        "its chat template closes <think>, which a completion has to do": prompt.rstrip().endswith("</think>"),
        "its chat template leaves out the question": "?" not in prompt,
        "its tokenizer has no pad_token": tokenizer.pad_token is None,
        f"its eos_token is {tokenizer.eos_token}, but generation ends with {ends}": tokenizer.eos_token_id not in ends,
        f"its tokenizer has {n_tokens} tokens, vocab_size is {n_rows}": n_tokens > n_rows,
        f"its merge_size is not the model's, {merge}": merges != {merge},
        "video_token_id or image_token_id is wrong": media != (config.video_token_id, config.image_token_id),
    }
    for problem, is_there in problems.items():
        if is_there:
            raise ValueError(problem)
    # black above white
    clip = torch.zeros(2, 3, 56, 56, dtype=torch.uint8)
    clip[:, :, 28:] = 255
    # as data.encode passes them; the defaults print warnings
    video_settings = {
        "cap_pixels_per_frame": False,
        "video_metadata": [VideoMetadata(total_num_frames=2, fps=1.0, frames_indices=[0, 1])],
        "do_sample_frames": False,
    }
    # raises if the template has not one place for each
    inputs = processor(
        text=[prompt], images=[clip[0]], videos=[clip], videos_kwargs=video_settings, return_tensors="pt"
    )
    vision_config = config.vision_config
    patch_pixels = vision_config.in_channels * vision_config.temporal_patch_size * vision_config.patch_size**2
    # black and white, per channel, as the family is trained with
    usual = type(processor.video_processor)
    expected = (torch.tensor([[0.0], [1.0]]) - torch.tensor(usual.image_mean)) / torch.tensor(usual.image_std)
    for kind in ("pixel_values", "pixel_values_videos"):
        if inputs[kind].shape[1] != patch_pixels:
            raise ValueError(f"its patches have {inputs[kind].shape[1]} values, the model's have {patch_pixels}")
        channels = inputs[kind].unflatten(1, (vision_config.in_channels, -1))
        if not torch.allclose(torch.stack([channels.amin((0, 2)), channels.amax((0, 2))]), expected, atol=0.01):
            raise ValueError("image_mean, image_std or rescale_factor is wrong, or do_rescale or do_normalize is false")


def load_weights(cfg, dtype, accelerator=None, device=None):
    """The checkpoint `cfg.model` as transformers' model, see policy.load_policy.

    If it will be sharded, only rank 0 reads the weights and later sends them, so a machine holds one copy.
    """
    base, *adapters = storage.adapter_chain(cfg.model)
    if accelerator and distributed.is_sharded(accelerator) and not accelerator.is_main_process:
        with init_empty_weights():
            model = empty_model(model_config(base), dtype)
        # init_empty_weights has untied them
        model.tie_weights()
        model.generation_config = generation_config(base, model.config)
    else:
        with usable(f"{base}: its weights cannot be read"):
            model, report = AutoModelForImageTextToText.from_pretrained(
                base,
                dtype=dtype,
                attn_implementation="sdpa",
                device_map=device,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        refuse_other_tensors(base, report)
        for adapter in adapters:
            model = merge_adapter(model, adapter)
        refuse_bad_values(cfg.model, model)
    return set_up(model, cfg)


def set_up(model, cfg):
    """`model` with the vision attention of `cfg` and, with `gradient_checkpointing`, activations computed twice."""
    vision.set_attention(model, cfg.vision_attention)
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        # these hooks are only for reentrant checkpointing; here they would push gradients through a frozen vision tower
        model.disable_input_require_grads()
    return model


def refuse_bad_values(folder, model):
    """Raise UserError for weights that are not finite, and for a head that the tied embedding would replace."""
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise settings.UserError(f"{folder}: {name} has values that are not finite")
    head = model.lm_head.weight
    embedding = model.get_input_embeddings().weight
    if model.config.tie_word_embeddings and head is not embedding and not torch.equal(head, embedding):
        raise settings.UserError(
            f"{folder}: lm_head.weight differs from the embedding, but tie_word_embeddings is true; saving loses it"
        )


def generation_config(model, config):
    """The checkpoint's generation config; if it has none, the one that from_pretrained derives from its config."""
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return GenerationConfig.from_model_config(config)


def refuse_other_tensors(model, report):
    """Raise UserError with the tensors that the checkpoint lacks or should not have. Missing ones would be random."""
    problems = []
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(key if isinstance(key, str) else key[0] for key in report.get(f"{kind}_keys", ()))
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{kind} {', '.join(names[:3])}{more}")
    if problems:
        raise settings.UserError(f"{model}: these weights are not the model's: {'; '.join(problems)}")


def empty_model(config, dtype):
    """The model without loaded weights."""
    return AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")


def merge_adapter(model, folder):
    """`model` with the adapter in `folder`, in peft's format, added to its weights. UserError if that is impossible."""
    if not any(Path(folder).glob("adapter_model.*")):
        raise settings.UserError(f"{folder}: adapter_model.safetensors is missing")
    # how names of tensors begin in adapters that were made with transformers before 4.52, and how they do now
    older_names = {r"^model\.layers\.": "model.language_model.layers.", r"^visual\.": "model.visual."}
    with usable(f"{folder}: this adapter cannot be merged"):
        config = PeftConfig.from_pretrained(folder)
        if str(getattr(config, "init_lora_weights", "")).startswith(("pissa_niter", "loftq", "corda")):
            raise ValueError(f"made with init_lora_weights {config.init_lora_weights}; convert it to plain LoRA first")
        wrapped = PeftModel(model, config)
        report = wrapped.load_adapter(folder, "default", key_mapping=older_names)._asdict()
        refuse_other_tensors(folder, report)
        names = " ".join(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
        if model.config.tie_word_embeddings and re.search(r"\b(lm_head|embed_tokens)\b", names):
            raise ValueError("it changes the embedding or the head, which are one matrix in this model")
        # peft has frozen the model
        return wrapped.merge_and_unload().requires_grad_(True)


def starting_files(model):
    """{name: bytes} of the files, besides the weights, from which a model and its processor are loaded.

    `final` gets these files instead of newly written ones, so what loads the starting checkpoint loads `final` too:
    transformers 4.x and older vLLM cannot read what transformers 5 would write.
    """
    model = storage.adapter_chain(model)[0]
    folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(model, allow_patterns=SMALL_FILES))
    found = [path for pattern in SMALL_FILES for path in folder.glob(pattern)]
    return {path.name: path.read_bytes() for path in found if path.is_file()}


def with_dtype(config, dtype):
    """A copy of a config.json's dict in which every dtype entry (torch_dtype until transformers 4.55) is `dtype`."""
    name = str(dtype).removeprefix("torch.")
    named = {key: with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return named | {key: name for key in ("dtype", "torch_dtype") if key in config}


def save_model(accelerator, model, files, folder, dtype):
    """`folder` becomes a checkpoint laid out like the one `files` are from, or stays as it is. Collective."""
    # gathers the shards; the full state dict is on rank 0
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        write_model(state, accelerator.unwrap_model(model), files, folder, dtype)
    accelerator.wait_for_everyone()


def write_model(state, model, files, folder, dtype):
    """The files of save_model from a full state dict of `model`."""
    has_adapter = bool(lora.adapted_layers(model))
    if has_adapter:
        state = lora.merged_state(state, model)
    # transformers' own class, empty: it knows the names of the weights in files
    with torch.device("meta"):
        shell = empty_model(model.config, model.dtype)
    # the tied head is the embedding; in gathered shards they no longer share memory
    for name in shell.all_tied_weights_keys:
        state.pop(name, None)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    folder = Path(folder)
    # hidden: FOLDER.tmp may be somebody's
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with checkpoints.room_on_disk(folder):
        shell.save_pretrained(temporary, state_dict=state)
        for written in temporary.glob("*config*.json"):
            written.unlink()
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        config_json = json.loads(files["config.json"])
        if "dtype" not in config_json:
            config_json.setdefault("torch_dtype", None)
        text = json.dumps(with_dtype(config_json, dtype), indent=2) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")
        if has_adapter:
            # not beside the weights, where transformers would find it and add it to them again
            lora.save_adapter(model, temporary / "adapter")
        # safetensors writes files that nobody else may read
        for weights in temporary.rglob("*.safetensors"):
            weights.chmod((temporary / "config.json").stat().st_mode)
        storage.replace_folder(temporary, folder)


def check_model(cfg, stage, made_by=None):
    """Raise UserError if `cfg.model` is a local path without a known checkpoint. `made_by`: the script to run."""
    if cfg.output_dir and Path(cfg.output_dir).resolve() == Path(cfg.model).resolve():
        raise settings.UserError(f"{stage}.output_dir: {cfg.output_dir} is the folder of the model")
    is_hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", cfg.model) and not cfg.model.startswith(".")
    is_local = Path(cfg.model).exists() or ("/" in cfg.model and Path(cfg.model).parent.is_dir())
    if is_hub_name and not is_local:
        return
    base, *adapters = storage.adapter_chain(cfg.model)
    if adapters:
        check_model(settings.SharedConfig(model=base), f"{stage}.model: {cfg.model} is an adapter; its base")
        return
    config = Path(cfg.model) / "config.json"
    if not config.is_file():
        hint = ""
        if (config.parent / "state.json").is_file():
            hint = f", but of training; make a model of it with: python -m tools.export {cfg.model} FOLDER"
        elif made_by:
            hint = f"; make one with: accelerate launch {made_by} --config CONFIG"
        raise settings.UserError(f"{stage}.model: no checkpoint at {cfg.model}{hint}")
    small = [path for pattern in (*SMALL_FILES, "*.index.json") for path in config.parent.glob(pattern)]
    for path in small:
        if path.suffix == ".json":
            with usable(f"{path}: not JSON with names and values"):
                json.loads(path.read_text(encoding="utf-8")).keys()
    with usable(f"{stage}.model: {cfg.model}"):
        check_settings(cfg, model_config(cfg.model))


def check_hub(model):
    """UserError if `model` is a hub name of an adapter, or the hub cannot be reached, which is retried for minutes."""
    if Path(model).exists():
        return
    with usable(f"model: {model} is not a folder (HF_HUB_OFFLINE=1: use the hub's cache), and the hub says"):
        if not is_offline_mode():
            HfApi().model_info(model, timeout=10)
        is_adapter = find_adapter_config_file(model)
    if is_adapter:
        raise settings.UserError(f"{model} is an adapter on the hub; download it, and set model to its folder")
