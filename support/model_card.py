"""The model card of `final`: README.md in the form that the hub shows."""

import subprocess
from dataclasses import asdict
from pathlib import Path

import yaml

from support import tables

CARD = """---
{front_matter}---

# {stage} of {base}

Trained by `{stage}.py` of Video-R1{commit}: {steps} steps of {batch_size} records from `{records}`
(SHA-256 {records_hash}…).

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER OR HUB NAME", dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("FOLDER OR HUB NAME")
```

## Metrics of the last step

{metrics}

## Settings

```yaml
{settings}```
"""


def model_card(cfg, stage, steps, records_hash):
    """The text of README.md for the model that `stage` has trained, as bytes. steps: the rows of metrics.jsonl."""
    front_matter = {"library_name": "transformers", "pipeline_tag": "video-text-to-text", "tags": ["video-r1", stage]}
    # the hub refuses a card whose base model is no hub name
    if not Path(cfg.model).exists():
        front_matter["base_model"] = cfg.model
    last = {name: value for name, value in (steps[-1] if steps else {}).items() if not name.startswith("time/")}
    card = CARD.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False),
        stage=stage,
        base=cfg.model,
        commit=commit(),
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        records=cfg.records,
        records_hash=records_hash,
        metrics=tables.table(["metric", "value"], [[name, str(value)] for name, value in last.items()]),
        settings=yaml.safe_dump(asdict(cfg), sort_keys=False),
    )
    return card.encode(errors="replace")


def commit():
    """ " at commit abc", with "and changes" if there are any; empty outside of a git clone."""
    command = ["git", "describe", "--always", "--dirty= and changes", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        # without git
        return ""
    return f" at commit {done.stdout.strip()}" if done.returncode == 0 else ""
