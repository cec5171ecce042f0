"""Settings: defaults, then the YAML file, then --name value; one clear line for every mistake. Needs no torch."""

import argparse
import difflib
import math
import re
import sys
from dataclasses import MISSING, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path

import yaml

STAGES = ("sft", "tgrpo", "evaluate")

# In a Latin-1 or ASCII locale "p̃" is printed as an escape; by default it would end the run with a UnicodeEncodeError.
if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="backslashreplace")


class UserError(SystemExit):
    """A mistake in the user's settings or files: Python prints the one line and exits with 1, no traceback."""


def option(default, help, **limits):
    """A setting: its default, what it does, and the values it may take (choices, low, high)."""
    metadata = {"help": help, "limits": limits}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class SharedConfig:
    """What all stages share. Each stage's own class adds to it; a stage's section in the YAML may override these."""

    model: str = option("", "checkpoint folder (or hub name) the stage starts from")
    records: str = option("", "JSON or JSONL file of records (see data.py)")
    data_root: str = option(".", "folder that the records' paths are relative to")
    output_dir: str = option("", "folder for checkpoints, metrics.jsonl, and the final model")
    seed: int = option(0, "seed of data order, frame shuffling and sampling", low=0, high=2**32 - 1)
    prompt: str = option("", "prompt template with {problem}, {options} and {hint}; empty: data.PROMPT")
    max_frames: int = option(16, "most frames taken from a video, spread uniformly", low=1)
    video_reader: str = option(
        "exact", "exact: frames by time; decord: as released, often wrong (docs/frames.md)", choices=("exact", "decord")
    )
    min_pixels: int = option(16 * 28 * 28, "frames and images below this many pixels are enlarged to it", low=784)
    max_pixels: int = option(128 * 28 * 28, "frames and images above this many pixels are shrunk to it", low=784)
    max_prompt_tokens: int = option(16384, "longer prompts (SFT: with target) are skipped and named, never cut", low=1)
    shuffle_unit: str = option(
        "frame", "what shuffling moves: frames, or temporal patches (pairs of frames)", choices=("frame", "patch")
    )
    shuffle_stamps: bool = option(False, "Qwen3-VL: if frames are shuffled or reversed, their time stamps move, too")
    max_unreadable: float = option(
        0.01, "past this share of bad rows, or of recent draws without media, the run stops", low=0, high=1
    )
    num_workers: int = option(4, "processes that decode and prepare clips beside the training step", low=0)
    fsdp: str = option(
        "none", "full_shard: shard weights, gradients and optimizer over the GPUs", choices=("none", "full_shard")
    )
    bf16: bool = option(False, "compute in bfloat16; trained weights stay float32, frozen ones of LoRA do not")
    vision_attention: str = option(
        "loop", "loop: one call per window; fused: one per vision block, for a GPU", choices=("loop", "fused")
    )
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, about a quarter slower")

    def __post_init__(self):
        if self.video_reader == "decord" and find_spec("decord") is None:
            raise UserError("video_reader: decord is not installed; its package is decord2: pip install decord2")
        if self.min_pixels > self.max_pixels:
            raise UserError(f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}")
        try:
            filled = (self.prompt or "{problem}").format(problem="<problem>", options="", hint="")
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise UserError(
                f"prompt: only {{problem}}, {{options}} and {{hint}} may be in braces: {error} in {self.prompt!r}"
            ) from None
        if re.search(r"<\|\w+\|>", self.prompt):
            raise UserError(f"prompt: the chat template adds the tokens in <| |>, but {self.prompt!r:.200} has some")
        if "<problem>" not in filled:
            raise UserError(f"prompt: {{problem}} is missing in {self.prompt!r}")


@dataclass
class TrainConfig(SharedConfig):
    """What the two training stages share."""

    steps: int = option(1000, "optimizer steps", low=1)
    batch_size: int = option(8, "records of one optimizer step, over all GPUs", low=1)
    micro_batch_size: int = option(1, "records of one forward pass on one GPU; changes memory, not the result", low=1)
    lr: float = option(1e-6, "peak learning rate", low=0)
    lr_schedule: str = option("constant", "shape after the warm-up", choices=("constant", "linear", "cosine"))
    min_lr_ratio: float = option(0.0, "last learning rate as a share of the peak", low=0, high=1)
    warmup_steps: int = option(0, "steps of linear warm-up", low=0)
    adam_beta1: float = option(0.9, "AdamW beta 1", low=0, high=0.999999)
    adam_beta2: float = option(0.999, "AdamW beta 2", low=0, high=0.999999)
    weight_decay: float = option(0.01, "AdamW weight decay", low=0)
    max_grad_norm: float = option(5.0, "gradients are clipped to this norm; 0: never", low=0)
    freeze_vision: bool = option(False, "train the language model only (LoRA always does)")
    lora_rank: int = option(0, "train a LoRA adapter of this rank; 0: train all weights", low=0, high=4096)
    lora_alpha: int = option(32, "the adapter is scaled by alpha / rank", low=1)
    lora_dropout: float = option(
        0.0, "dropout of the adapter's input; 0 for T-GRPO, whose ratio it would make noisy", low=0, high=0.999999
    )
    save_every: int = option(100, "steps between checkpoints; 0: only the final model", low=0)
    keep_checkpoints: int = option(2, "how many checkpoints to keep", low=1)
    resume: bool = option(True, "continue from the newest checkpoint; false: move the earlier run aside")
    resume_changed: bool = option(False, "continue although settings, records or starting weights changed")
    log_with: str = option("none", "log the metrics there too", choices=("none", "tensorboard", "wandb"))

    def __post_init__(self):
        super().__post_init__()
        if self.lora_rank and self.fsdp == "full_shard":
            raise UserError(
                f"lora_rank: {self.lora_rank}: LoRA needs the whole model on each GPU; set fsdp: none, or lora_rank: 0"
            )


def load_config(cls, stage, argv=None, doc=None, partial=False, required=()):
    """Settings of a stage: defaults, then the YAML's shared keys, then its section, then --name value.

    Raises UserError (one line: file, field, value) for an unknown name, a wrong type, a value out of range.
    With `partial` the section may hold settings that `cls` does not know.
    """
    known = {f.name: f for f in fields(cls)}
    arguments, unknown = make_parser(known, stage, doc).parse_known_args(argv)
    for word in unknown:
        check_name(f"command line: {word}", word, [f"--{name}" for name in known])
    found = []
    if "config" in arguments:
        found = yaml_settings(arguments.config, stage, known, partial)
        del arguments.config
    found += [("command line: --", name, value) for name, value in vars(arguments).items()]
    values = {}
    for source, name, value in found:
        try:
            values[name] = convert(value, known[name].type, **known[name].metadata["limits"])
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{source}{name}: {error}") from None
    cfg = cls(**values)
    require(cfg, stage, *required)
    return cfg


def make_parser(known, stage, doc):
    """A parser with one argument for each field in `known`. Its result has only what was given, not yet converted."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --config FILE [--name value ...]",
        description=doc,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help=f"YAML file: shared settings at the top level, then a section '{stage}:'")
    for name, f in known.items():
        limits = f.metadata["limits"]
        choices = f" ({' | '.join(limits['choices'])})" if "choices" in limits else ""
        default = f.default_factory() if f.default is MISSING else f.default
        text = f"{f.metadata['help']}{choices}; default: {default!r}"
        # --resume alone is --resume true
        parser.add_argument(
            f"--{name}",
            nargs="*" if f.type is list else "?",
            const=True if f.type is bool else None,
            metavar=f.type.__name__,
            help=text.replace("%", "%%"),
        )
    return parser


def yaml_settings(path, stage, known, partial):
    """[(source, name, value)]: the config's shared settings, then those of the section `stage`."""
    shared = read_yaml(path)
    sections = {name: shared.pop(name, None) for name in STAGES}
    section = {} if sections[stage] is None else sections[stage]
    if not isinstance(section, dict):
        raise UserError(f"{path}: {stage}: expected a section of settings, got {section!r}")
    if partial:
        section = {name: value for name, value in section.items() if name in known}
    shared_names = [f.name for f in fields(SharedConfig)]
    found = []
    for name, value in shared.items():
        if name in known and name not in shared_names:
            raise UserError(f"{path}: {name}: no such setting here; put it into the section '{stage}:'")
        check_name(f"{path}: {name}", name, [*shared_names, *STAGES])
        found.append((f"{path}: ", name, value))
    for name, value in section.items():
        check_name(f"{path}: {stage}.{name}", name, known)
        found.append((f"{path}: {stage}.", name, value))
    return found


def check_name(where, name, known):
    """Raise UserError if `name` is not among the known settings."""
    if name not in known:
        similar = difflib.get_close_matches(str(name), known, 1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        raise UserError(f"{where}: no such setting{hint}")


def convert(value, kind, choices=(), low=-math.inf, high=math.inf):
    """A value from YAML or from the command line as its setting's type. Raises ArgumentTypeError: what was expected.

    >>> convert("1e-6", float), convert("false", bool), convert(["a,b", "c"], list)
    (1e-06, False, ['a', 'b', 'c'])
    """
    if kind is list:
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        return [convert(word, str, choices) for word in text.replace(",", " ").split()]
    text = str(value)
    expected = "one value"
    if kind in (int, float):
        expected = "a whole number" if kind is int else "a number"
        expected += f" of at least {low}" if high == math.inf else f" from {low} to {high}"
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if low <= number <= high and number < math.inf:
            return number
    elif kind is bool:
        expected = "true or false"
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif choices:
        expected = f"one of {', '.join(choices)}"
        if text in choices:
            return text
    elif value is not None and not isinstance(value, list | dict):
        return text
    raise argparse.ArgumentTypeError(f"expected {expected}, got {value!r:.80}")


class UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, except that duplicate keys are an error. (PyYAML silently keeps the last one.)"""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"duplicate key {key}")
        return super().construct_mapping(node, deep)


def read_yaml(path):
    """The settings in a YAML file, a dict. Raises UserError if it cannot be read or is not a mapping."""
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeys)
    except OSError as error:
        raise UserError(f"{path}: cannot read this config: {error.strerror}") from None
    # ValueError: bytes that are not text, a number with thousands of digits
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict | None):
        raise UserError(f"{path}: expected settings 'name: value', got {type(tree).__name__}")
    # an empty file is None: all defaults
    return tree or {}


def require(cfg, stage, *names):
    """Raise UserError if one of these settings is empty."""
    for name in names:
        if not getattr(cfg, name):
            raise UserError(f"{stage}.{name}: missing; set it in the config's section '{stage}:' or with --{name}")
