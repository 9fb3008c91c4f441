"""Reading a DeepSpeed JSON, and the few lines around an engine that its settings call for."""

import json
import math
import os
import re
from pathlib import Path

import torch

from plumbing.errors import BadInput, one_line


def ds_config(path, micro_batch=1, max_grad_norm=1.0):
    """Read a DeepSpeed JSON (precision, ZeRO and offload only) and add what the script knows.

    With `managed_gradient_accumulation` off, engine.backward only adds to the gradients and
    engine.step applies them, as in plain PyTorch. The managed form silently keeps only the last
    backward (ZeRO-1/2) when the counts disagree.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    try:
        config = json.loads(Path(path).read_text())
        unknown = set(config) - DS_KEYS
        if unknown:  # DeepSpeed passes over a misspelt key without a word
            raise ValueError(f"{', '.join(map(repr, sorted(unknown)))} is not for this file, which has "
                             f"precision, ZeRO and offload")
        config = {**config, "train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": 1,
                  "gradient_clipping": 0.0 if is_plain(config) else max_grad_norm,  # plain: see adamw
                  "managed_gradient_accumulation": False, "zero_allow_untested_optimizer": True}
        DeepSpeedConfig(config)
        bf16 = config.get("bf16", {}).get("enabled", False)
        if type(zero_stage(config)) is not int or type(bf16) is not bool:  # DeepSpeed takes "3" and "false"
            raise ValueError("`stage` must be a whole number and bf16's `enabled` true or false, unquoted")
        check_zero(config.get("zero_optimization", {}))
        if "offload_optimizer" in config.get("zero_optimization", {}) and config.get(
                "zero_force_ds_cpu_optimizer", True):
            raise ValueError("offload_optimizer needs zero_force_ds_cpu_optimizer: false, as in "
                             "zero3_offload.json, because the optimizer here is PyTorch's")
    except Exception as e:  # DeepSpeed's check fails in a dozen ways, which all mean: the file is wrong
        raise BadInput(f"--ds_config {path}: {one_line(e)}; choose a JSON file from ds_configs/.") from None
    return config


DS_KEYS = {"bf16", "zero_optimization", "zero_force_ds_cpu_optimizer", "communication_data_type",
           "prescale_gradients", "aio", "comms_logger", "wall_clock_breakdown", "flops_profiler"}


def check_zero(zero):
    """Raise for settings that DeepSpeed takes, and that would change numbers or write to a wrong place."""
    lossy = [name for name, value in zero.items() if value and re.match("zero_|zeropp_|zenflow", name)]
    if lossy:
        raise ValueError(f"{', '.join(lossy)}: ZeRO++ and ZenFlow round or delay weights and gradients, "
                         f"and no number here would be what it says; take it out")
    for part in ("offload_param", "offload_optimizer"):
        offload = zero.get(part) or {}
        place = str(offload.get("nvme_path") or "")
        if offload.get("device") == "nvme" and not (os.path.isdir(place) and os.access(place, os.W_OK)):
            raise ValueError(f"{part}: nvme_path {place!r} is no folder to write to, and DeepSpeed would "
                             f"make one, wherever that is; make it yourself")


def is_plain(config):
    """Neither ZeRO nor bf16: the optimizer steps on the model's own weights and gradients."""
    return zero_stage(config) == 0 and dtype_of(config) == torch.float32


def adamw(groups, config, max_grad_norm):
    """AdamW over groups of parameters, [(parameters, learning rate)], without weight decay.

    Without ZeRO and bf16 DeepSpeed clips gradients but keeps no norm of them. Here the optimizer itself
    does it at the start of its step, where the gradients of all ranks are averaged already, and leaves the
    norm where engine.get_global_grad_norm() looks for it.
    """
    optimizer = torch.optim.AdamW([{"params": parameters, "lr": lr} for parameters, lr in groups],
                                  weight_decay=0.0, fused=True)

    def clip(optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer._global_grad_norm = torch.nn.utils.clip_grad_norm_(parameters,
                                                                     max_grad_norm or float("inf"))

    if is_plain(config):
        optimizer.register_step_pre_hook(clip)
    return optimizer


def dtype_of(config):
    return torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32


def zero_stage(config):
    return config.get("zero_optimization", {}).get("stage", 0)


def step_norm(engine):
    """Norm of the gradient of the step just taken, before clipping, 0 before the first step. Ends the run
    where it is not finite: DeepSpeed takes such a step in float32 and leaves it out unsaid in bf16."""
    norm = engine.get_global_grad_norm()
    if norm is None:
        return 0.0
    if not math.isfinite(norm) or not engine.was_step_applied():
        raise BadInput("The gradient is not finite: this step is not saved and the last checkpoint is good; "
                       "lower --lr.")
    return float(norm)


def set_lr(engine, *lrs):
    """One learning rate for each group of parameters."""
    for group, lr in zip(engine.optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
