"""Settings: defaults, then the YAML file, then --name value; one clear line for every mistake."""

import argparse
import difflib
import functools
import io
import math
import sys
from dataclasses import MISSING, dataclass, field, fields
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import yaml

STAGES = ("sft", "tgrpo", "evaluate")
# Arguments that have become commands of their own.
MOVED = {
    "--plan": "python -m tools.plan_memory --config FILE --gpus N",
    "--gpus": "python -m tools.plan_memory --config FILE --gpus N",
    "--distill": "python -m tools.distill PREDICTIONS --out FILE",
    "--split": "python -m tools.split RECORDS --share 0.1 --out FOLDER",
    "--report": "python -m tools.report PREDICTIONS",
    "--credit_control": "python -m experiments.variants --variant shuffled --config FILE",
}
# Settings that have become others: what to write now.
RENAMED = {
    "shuffle_frames": "--orders shuffled (in YAML: orders: [shuffled])",
    "temporal_gap": "--orders ordered shuffled (in YAML: orders: [ordered, shuffled])",
}


class UserError(SystemExit):
    """A mistake in the user's settings or files: Python prints the one line and exits with 1, no traceback."""


def print_utf8():
    """Print UTF-8 in every locale: in Latin-1 or ASCII, "p̃" would end a run with a UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def option(default, help, choices=None, low=None, high=None):
    """A setting: its default, what it does, and the values it may take."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
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
        "exact",
        "exact: frames by their times; decord: as in the released pipeline, often wrong (docs/frames.md)",
        choices=("exact", "decord"),
    )
    min_pixels: int = option(16 * 28 * 28, "frames and images below this many pixels are enlarged to it", low=784)
    max_pixels: int = option(128 * 28 * 28, "frames and images above this many pixels are shrunk to it", low=784)
    max_prompt_tokens: int = option(16384, "longer prompts are skipped, counted and named, never cut", low=1)
    shuffle_unit: str = option(
        "frame",
        "what shuffling moves: single frames, or temporal patches (pairs of frames)",
        choices=("frame", "patch"),
    )
    max_unreadable: float = option(
        0.01,
        "share of the rows that may be wrong or unreadable; past it the run stops (evaluation counts unreadable media)",
        low=0,
        high=1,
    )
    num_workers: int = option(4, "processes that decode and prepare clips beside the training step", low=0)
    fsdp: str = option(
        "none", "full_shard: shard weights, gradients and optimizer over the GPUs", choices=("none", "full_shard")
    )
    bf16: bool = option(False, "compute in bfloat16; trained weights stay float32, frozen ones of LoRA do not")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, about a quarter slower"
    )

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
    max_grad_norm: float = option(5.0, "gradients are clipped to this norm", low=0)
    freeze_vision: bool = option(False, "train the language model only (LoRA always does)")
    lora_rank: int = option(
        0, "train a LoRA adapter of this rank on the language model; 0: train all weights", low=0, high=4096
    )
    lora_alpha: int = option(32, "the adapter is scaled by alpha / rank", low=1)
    lora_dropout: float = option(
        0.0, "dropout of the adapter's input; 0 for T-GRPO, whose ratio it would make noisy", low=0, high=0.999999
    )
    save_every: int = option(100, "steps between checkpoints; 0: only the final model", low=0)
    keep_checkpoints: int = option(2, "how many checkpoints to keep", low=1)
    resume: bool = option(
        True,
        "continue from the newest checkpoint in output_dir; false: move an earlier run aside and start from scratch",
    )
    log_with: str = option(
        "none",
        "also write the metrics to TensorBoard (files in output_dir) or Weights & Biases",
        choices=("none", "tensorboard", "wandb"),
    )
    resume_changed: bool = option(
        False, "continue from a checkpoint although settings, records or starting weights changed"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.lora_rank and self.fsdp == "full_shard":
            raise UserError(
                f"lora_rank: {self.lora_rank}: LoRA needs the whole model on each GPU; set fsdp: none, or lora_rank: 0"
            )


def convert(text, kind, choices=None, low=None, high=None):
    """The value of a setting from its text, as its type. Raises ArgumentTypeError with what was expected.

    >>> convert("1e-6", float), convert("false", bool), convert("a,b", list)
    (1e-06, False, ['a', 'b'])
    """
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
        return text.lower() == "true"
    if kind is list:
        return [convert(part, str, choices) for part in text.replace(",", " ").split()]
    try:
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
    except ValueError:
        expected = {int: "a whole number", float: "a number"}[kind]
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r:.80}") from None
    if choices and value not in choices:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(choices)}, got {text!r}")
    if low is not None and value < low:
        raise argparse.ArgumentTypeError(f"expected at least {low}, got {text}")
    if high is not None and value > high:
        raise argparse.ArgumentTypeError(f"expected at most {high}, got {text}")
    return value


class SettingsParser(argparse.ArgumentParser):
    """argparse for the command line and for the YAML file alike. A mistake is one line that names where it was made."""

    source = "command line: --"

    def error(self, message):
        for flag, command in MOVED.items():
            if flag in message:
                raise UserError(f"{flag} is now a command of its own: {command}")
        for name, now in RENAMED.items():
            if f"--{name}" in message:
                raise UserError(f"--{name} is now {now}")
        # argparse writes "argument --lr: expected a number, got 'fast'"
        raise UserError(message.replace("argument --", self.source))


def make_parser(cls, stage, doc):
    """A parser with one argument per field of the config class `cls`. Its result only has what was given."""
    parser = SettingsParser(
        usage="%(prog)s --config FILE [--name value ...]",
        description=doc,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help=f"YAML file: shared settings at the top level, then a section '{stage}:'")
    for f in fields(cls):
        limits = {key: f.metadata[key] for key in ("choices", "low", "high")}
        default = f.default if f.default is not MISSING else f.default_factory()
        choices = f" ({' | '.join(limits['choices'])})" if limits["choices"] else ""
        help_text = f"{f.metadata['help']}{choices}; default: {default if default not in ('', []) else 'none'}"
        several = {}
        if f.type is list:
            several = {"nargs": "*"}
        if f.type is bool:
            several = {"nargs": "?", "const": True}
        parser.add_argument(
            f"--{f.name}",
            type=functools.partial(convert, kind=f.type, **limits),
            metavar=f.type.__name__,
            help=help_text.replace("%", "%%"),
            **several,
        )
    return parser


def load_config(cls, stage, argv=None, doc=None, partial=False, required=()):
    """Settings of a stage: defaults, then the YAML's shared keys, then its section, then --name value.

    Raises UserError (one line: file, field, value) for an unknown name, a wrong type, a value out of range.
    With `partial` the section may hold settings that `cls` does not know.
    """
    print_utf8()
    parser = make_parser(cls, stage, doc)
    from_command_line = parsed(parser, argv)
    path = from_command_line.pop("config", None)
    values = {}
    if path:
        known = [f.name for f in fields(cls)]
        for source, name, value in yaml_settings(path, stage, known):
            if name not in known and partial:
                continue
            check_name(f"{source}{name}", name, known)
            parser.source = source
            values |= parsed(parser, as_arguments(source, name, value))
    cfg = cls(**values | from_command_line)
    require(cfg, stage, *required)
    return cfg


def parsed(parser, arguments):
    """{name: value} of the arguments. A list may be given as separate words, with commas, or both."""
    values = vars(parser.parse_args(arguments))
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = list(chain.from_iterable(value))
    return values


def yaml_settings(path, stage, known):
    """Yields (source, name, value) of a config's shared settings, then those of the section `stage`."""
    tree = read_yaml(path)
    sections = {name: tree.pop(name, None) for name in STAGES}
    section = sections[stage]
    if section is None:
        section = {}
    if not isinstance(section, dict):
        raise UserError(f"{path}: {stage}: expected a section of settings, got {section!r}")
    shared = [f.name for f in fields(SharedConfig)]
    for name, value in tree.items():
        if name in known and name not in shared:
            raise UserError(f"{path}: {name}: no such setting here; put it into the section '{stage}:'")
        check_name(f"{path}: {name}", name, shared)
        yield f"{path}: ", name, value
    for name, value in section.items():
        yield f"{path}: {stage}.", name, value


def check_name(where, name, known):
    """Raise UserError if `name` is not among the known settings."""
    if name in RENAMED and name not in known:
        raise UserError(f"{where} is now {RENAMED[name]}")
    if name not in known:
        similar = difflib.get_close_matches(str(name), known, 1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        raise UserError(f"{where}: no such setting{hint}")


def as_arguments(source, name, value):
    """A setting of the YAML file as command-line arguments. Raises UserError for what no setting can be."""
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if value is None or isinstance(value, dict):
        raise UserError(f"{source}{name}: expected a value, got {value!r}")
    return [f"--{name}={value}"]


class UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader that rejects duplicate keys (PyYAML silently keeps the last one)."""

    def construct_mapping(self, node, deep=False):
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                raise yaml.YAMLError(
                    f"line {line}: merge keys (<<) are not read; write shared settings at the top level"
                )
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


def given(name, default):
    """The value of --name on the command line, before the settings are read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", default=default)
    return getattr(parser.parse_known_args()[0], name)


def require(cfg, stage, *names):
    """Raise UserError if one of these settings is empty."""
    for name in names:
        if not getattr(cfg, name):
            raise UserError(f"{stage}.{name}: missing; set it in the config's section '{stage}:' or with --{name}")
