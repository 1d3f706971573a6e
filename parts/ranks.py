"""Chooses the device and the precision, and connects the ranks (the processes that torchrun starts).

Each rank trains on its share of every batch (`fit` in finetune.py), but computes the loss of the whole batch
(`objective`). Each rank evaluates its share of the examples (`predict`). Only rank 0 prints results, and writes
records and checkpoints.
"""

import os
import platform
import sys

import torch
import torch.distributed as dist
import transformers

from parts.errors import UserError, explain_errors


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def join_ranks(device: torch.device) -> None:
    """Connects the processes that torchrun has started. A single process needs no connection."""
    if dist.is_torchelastic_launched():
        if not dist.is_initialized() and int(os.environ["WORLD_SIZE"]) > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    elif (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(f"the environment has WORLD_SIZE={processes}, but torchrun did not start this process; "
                        "start it with torchrun, or unset WORLD_SIZE")


def from_all_ranks(value: object) -> list:
    """Returns a list with the value of each rank, so that all ranks make the same decision."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def check_same_run(name: str) -> None:
    """Checks that all ranks train the same run. The name of a run has a digest of its data and flags."""
    names = set(from_all_ranks(name))
    if len(names) > 1:
        raise UserError(f"the processes have different data or flags (runs {', '.join(sorted(names))}); give every "
                        "process the same files and flags, then repeat the command")


def pick_device(name: str | None = None) -> torch.device:
    """Returns the device `name`, by default the fastest device of this machine. Checks that the device works."""
    local_rank = os.environ["LOCAL_RANK"] if dist.is_torchelastic_launched() else None
    has_mps = torch.backends.mps.is_available() and local_rank is None  # torch.distributed does not support MPS
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    name = f"cuda:{local_rank}" if name == "cuda" and local_rank else name
    with explain_errors("--device", name, "cpu, or a device that torch sees"):
        device = torch.empty(1, device=name).device
        autocast(device, "fp32")  # raises an error if the device has no autocast
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def warn_if_slow(device: torch.device, precision: str) -> None:
    if device.type == "cpu" and precision == "bf16" and "bfloat16" not in cpu_capability():
        print("warning: this CPU has no bfloat16 instructions, so --precision bf16 may be much slower than fp32",
              file=sys.stderr)


def cpu_capability() -> str:
    """Returns the instruction set that torch uses, such as "AVX512, bfloat16"."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    has_bf16 = any("bf16" in name and available for name, available in capabilities.items())
    return torch.backends.cpu.get_cpu_capability() + (", bfloat16" if has_bf16 else "")


def machine_facts(device: torch.device) -> dict[str, str]:
    """Returns the fields of a record that describe the machine and the library versions."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_capability": cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
