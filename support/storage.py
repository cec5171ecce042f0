"""Files that are whole even after a crash, and hashes by which their content is recognised. Needs no torch."""

import functools
import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from support import settings


def replace_folder(new, old):
    """Put the finished folder `new` where `old` is."""
    trash = old.with_name(f".{old.name}.old")
    shutil.rmtree(trash, ignore_errors=True)
    if old.exists():
        os.replace(old, trash)
    os.replace(new, old)
    shutil.rmtree(trash, ignore_errors=True)


def write_atomic(path, content):
    """Write text or bytes: even after a crash the file is the old or the new one. UserError if that is impossible."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except (OSError, UnicodeEncodeError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise settings.UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def refuse_existing(output):
    """Raise UserError if a file that will be written exists: it may be somebody's records, or a test set in use."""
    if Path(output).exists():
        raise settings.UserError(f"{output} exists; choose another output, or delete it")


def json_line(row):
    """A row of a JSONL file. NaN and infinities, which JSON does not have, become null."""
    return json.dumps(json.loads(json.dumps(row), parse_constant=lambda name: None)) + "\n"


def append_rows(path, rows):
    """Append `rows` (dicts) to a JSONL file. Raises UserError if they cannot be written; earlier rows stay."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(map(json_line, rows)))
    except OSError as error:
        raise settings.UserError(f"cannot write {path}: {error.strerror}; free disk space and start again") from error


def file_hash(path):
    """SHA-256 of a file's bytes, as 16 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def sampled_hash(path):
    """A hash of a file's size and of 1 MB at 16 offsets: all of a small file, and enough of a large one."""
    size = Path(path).stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(16):
            file.seek(size * i // 16)
            digest.update(file.read(2**20))
    return digest.hexdigest()[:16]


def adapter_chain(model, above=()):
    """[plain checkpoint, adapter, ..., model] if the folder `model` is a LoRA adapter in peft's format, else [model].

    Raises UserError for an adapter without a base, and for a model beside an adapter: transformers would load both.
    """
    config = Path(model) / "adapter_config.json"
    if not config.is_file():
        return [model]
    if config.with_name("config.json").is_file():
        raise settings.UserError(f"{model} holds a model and an adapter; move {config.name} and its weights elsewhere")
    try:
        base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise settings.UserError(f"{config}: not the config of an adapter: {error!r}") from None
    if not isinstance(base, str):
        raise settings.UserError(f"{config}: base_model_name_or_path: expected the model below it, got {base!r}")
    if base in (model, *above):
        raise settings.UserError(f"{config}: base_model_name_or_path: {base} is an adapter on itself")
    return [*adapter_chain(base, (model, *above)), model]


@functools.cache
def fingerprint(model):
    """A hash of a model's files (weights, config, tokenizer, template) and of those below an adapter.

    By it, another model at the same path is noticed. "" for a hub name.
    """
    kinds = (".safetensors", ".bin", ".json", ".jinja", ".txt", ".model")
    files = []
    for folder in adapter_chain(model):
        files += sorted(file for file in Path(folder).glob("*") if file.suffix in kinds and file.is_file())
    digest = hashlib.sha256("".join(f"{path.name} {sampled_hash(path)} " for path in files).encode())
    return digest.hexdigest()[:16] if files else ""


def read_jsonl(path):
    """Rows of a JSONL file that a run wrote. A damaged line is left out, and so is an incomplete last one."""
    if not Path(path).exists():
        return []
    rows = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            print(f"{path}, line {number}: not a row in JSON, left out")
    return rows
