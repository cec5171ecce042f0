"""A device for machines without a GPU: its tensors hold CPU tensors, but must not meet CPU tensors, as on a GPU.

    python tests/made_up_device.py      # steps on the CPU and there; prints as JSON how they compare

Other tests see neither a tensor that was left on the CPU nor a value that is read from the device, for which the host
waits. This registers torch's PrivateUse1 device for the whole process, so it is a program of its own.
"""

import functools
import json
import sys
import traceback
import types
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import naive
import torch
import transformers
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import policy
import tgrpo
from support import decoding, lora, metrics, model_files

# operators that may have tensors of both devices, besides numbers (0-d)
COPIES = ("_to_copy", "copy_", "_copy_from")
INDEXING = ("index", "index_put", "index_put_")
# operators whose result the host needs
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal")

# model family, attention of its vision tower, rollouts with LoRA (None: without LoRA)
CASES = (
    ("qwen2_5_vl", "loop", None),
    ("qwen2_5_vl", "fused", "merged_in_place"),
    ("qwen3_vl", "fused", "adapter"),
)

# {function of this repository: how often it waited for the device}
waits = Counter()


class Module(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


class OnChip(torch.Tensor):
    """A tensor of the device. `raw` is the CPU tensor that has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw):
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, raw.size(), device="chip:0", **layout)
        tensor.raw = raw
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return compute(operator, *args, **(kwargs or {}))

    def __repr__(self, **_):
        return repr(self.raw)

    def tolist(self):
        count_wait()
        return self.raw.tolist()


def is_chip(device):
    return device is not None and torch.device(device).type == "chip"


def count_wait():
    """Count a wait for the function of this repository that caused it, unless transformers did."""
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    frame = next(frame for frame in reversed(frames) if frame.filename != __file__ or frame.name == "one_step")
    if Path(frame.filename).is_relative_to(ROOT) and "site-packages" not in frame.filename:
        waits[frame.name] += 1


def compute(operator, *args, **kwargs):
    """The result of an operator with tensors of the device, or that makes one there."""
    name = operator.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_chip = [isinstance(tensor, OnChip) for tensor in tensors]
    elsewhere = [tensor.shape for tensor in tensors if tensor.ndim and not isinstance(tensor, OnChip)]
    by_cpu_index = name in INDEXING and on_chip[0]
    if any(on_chip) and elsewhere and name not in COPIES and not by_cpu_index:
        raise RuntimeError(f"{operator}: a tensor of the device meets CPU tensors of shape {elsewhere}")
    device = kwargs.get("device")
    to_cpu = any(on_chip) and device is not None and not is_chip(device)
    if any(on_chip) and (name in READS or to_cpu):
        count_wait()
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    raw_args, raw_kwargs = tree_map(lambda leaf: getattr(leaf, "raw", leaf), (args, kwargs))
    result = operator(*raw_args, **raw_kwargs)
    if name == "copy_":
        return args[0]
    if to_cpu or not (any(on_chip) or is_chip(device)):
        return result
    result = tree_map(lambda leaf: OnChip(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)
    return return_and_correct_aliasing(operator, args, kwargs, result) if any(on_chip) else result


# these last as long as the process
everything = torch.library.Library("_", "IMPL")
makers = torch.library.Library("aten", "IMPL")
cpu_tensor = torch.tensor


def tensor(data, device=None, **kwargs):
    """torch.tensor, which cannot make a tensor of this device at once."""
    return cpu_tensor(data, **kwargs).to(device) if is_chip(device) else cpu_tensor(data, device=device, **kwargs)


def register():
    """Make the device known to torch."""
    _setup_privateuseone_for_python_backend("chip", backend_module=Module())
    everything.fallback(compute, "PrivateUse1")
    # operators that would resize a tensor, which a wrapper cannot
    for overload in ("default", "start", "start_step"):
        operator = getattr(torch.ops.aten.arange, overload)
        makers.impl(operator.name(), functools.partial(compute, operator), "PrivateUse1")
    torch.tensor = tensor


def one_step(model, prompts, lora_rollout):
    """Rollouts, plain and with decode(), and the gradient of one update, with everything that tgrpo.py does there."""
    counts = [3] * len(prompts)
    completions = []
    for rows in (0, sum(counts)):
        model.compiled_rows = rows
        torch.manual_seed(0)
        with lora.merged(model, lora_rollout):
            completions += policy.rollout(model, prompts, counts, naive.tokenizer, 1.0, 20)
    groups = [completions[3 * i : 3 * i + 3] for i in range(len(prompts))]
    banned = policy.placeholder_ids(model)
    packed = policy.pack(model, prompts, groups, naive.PAD)
    with torch.no_grad(), lora.adapter_off(model):
        ref_logps_NT, _ = policy.completion_logps(model, packed, 1.0, banned)
    logps_NT, _ = policy.completion_logps(model, packed, 1.0, banned)
    advantages_N = torch.linspace(-1, 1, sum(counts)).to(model.device)
    loss_N, _, _ = tgrpo.grpo_loss(logps_NT, logps_NT.detach(), ref_logps_NT, advantages_N, packed.mask_NT, 0.2, 0.04)
    # what the update logs of a micro-batch
    metrics.averages({"loss": loss_N})
    loss_N.mean().backward()
    found = dict(waits)
    gradients = [parameter.grad.cpu().flatten() for parameter in model.parameters() if parameter.grad is not None]
    return [completion.tolist() for completion in completions], torch.cat(gradients), found


def compare(family, vision_attention, lora_rollout):
    """How a step there compares with one on the CPU, and its waits."""
    model = naive.tiny_policy(family=family)
    if lora_rollout:
        adapter = {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "seed": 0, "model": "tiny"}
        lora.add_adapter(model, types.SimpleNamespace(**adapter))
    settings = types.SimpleNamespace(vision_attention=vision_attention, gradient_checkpointing=True)
    model_files.set_up(model, settings).train()
    prompts = naive.mixed_prompts(family)
    completions, gradient, _ = one_step(model, prompts, lora_rollout)
    model.zero_grad()
    # its keys and values are on the CPU
    decoding.buffers.cache_clear()
    model.to("chip")
    there, gradient_there, found = one_step(model, prompts, lora_rollout)
    difference = ((gradient - gradient_there).norm() / gradient.norm()).item()
    return {"same_completions": completions == there, "difference": difference, "waits": found}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    register()
    # on a GPU it is compiled
    decoding.compiled_step = lambda device: decoding.decode_step
    for case in CASES:
        print(json.dumps(compare(*case)))
        waits.clear()
