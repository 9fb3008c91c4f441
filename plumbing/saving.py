"""Writing a model that stock transformers and peft load."""

import json
import os
import shutil
from pathlib import Path

import torch.distributed as dist
from transformers import AutoModelForCausalLM

from plumbing.checks import pretrained
from plumbing.errors import writing
from plumbing.files import sync
from plumbing.ranks import print0


def replace_files(saving, out):
    """Move a finished folder's files over the old ones; a crash while writing leaves the old ones alone. What
    else an earlier model left there goes: an old shard or adapter would be read as part of the new one. All
    is on the disk afterwards."""
    new = sorted(Path(saving).iterdir())
    sync(*Path(saving).rglob("*"))
    for path in new:
        old = Path(out) / path.name
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        os.replace(path, old)
    Path(saving).rmdir()
    for pattern in ("*.safetensors", "*.index.json", "adapter_config.json", "gvm.json", "rm.json"):
        for old in Path(out).glob(pattern):
            if old.name not in {path.name for path in new}:
                old.unlink()
    sync(out)


def save_model(engine, tokenizer, out, base=None, adapter="policy", extra=None):
    """Write what stock transformers (and peft) load, safetensors, from any ZeRO stage. Called by every rank.

    base:  folder or id of the LoRA base, or a function dtype -> model: `adapter` is merged into a fresh copy
           of it. None: save as it is.
    extra: {file name: JSON-able}, written beside the weights
    """
    state = engine._zero3_consolidated_16bit_state_dict() if engine.zero_optimization_stage() == 3 else None
    if dist.get_rank() == 0:
        with writing(out):
            module, saving = getattr(engine.module, "lm", engine.module), Path(out) / ".saving"
            shutil.rmtree(saving, ignore_errors=True)
            state = {name.removeprefix("lm."): x.cpu()
                     for name, x in (state or engine.module.state_dict()).items()}
            if base is not None:  # merged in a fresh copy, because the weights of the run may be sharded
                from peft import PeftModel
                getattr(engine.module, "adapters", engine.module).save_pretrained(
                    saving / "adapter", selected_adapters=[adapter],
                    state_dict={name.removeprefix("adapters."): x for name, x in state.items()})
                dtype = next(iter(state.values())).dtype
                model = base(dtype) if callable(base) else pretrained(AutoModelForCausalLM, base, dtype=dtype)
                model.generation_config = getattr(module, "generation_config", None)
                place = saving / "adapter" / adapter.removeprefix("default")  # peft's own name has no folder
                module = PeftModel.from_pretrained(model, place).merge_and_unload()
                state = module.state_dict()
                shutil.rmtree(saving / "adapter")
            if hasattr(module, "peft_config"):
                for adapter in module.peft_config.values():  # a relative path would fail from another folder
                    if Path(adapter.base_model_name_or_path or "").exists():
                        adapter.base_model_name_or_path = str(Path(adapter.base_model_name_or_path).resolve())
            for config, name, value in (dropout := getattr(module, "dropout_of_config", [])):
                setattr(config, name, value)  # off in the run, see common.disable_dropout
            module.save_pretrained(saving, state_dict=state)
            for config, name, _ in dropout:
                setattr(config, name, 0.0)
            tokenizer.save_pretrained(saving)
            for name, content in (extra or {}).items():
                (saving / name).write_text(json.dumps(content, indent=1))
            replace_files(saving, out)
    dist.barrier()
    print0(f"saved to {out}")
