"""Bad input ends in one sentence that says what to change, and in a non-zero exit status; never in a
traceback, and before a model is loaded unless the fault lies in its weights."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import evaluate
import report
import sft
import train_dpo
import train_dvpo
import train_grpo
import train_gvm
import train_ppo
import train_remax
import train_rm
from common import load_tokenizer
from plumbing import limits, page as pages, rl
from plumbing.args import parse_args
from plumbing.checkpoint import Checkpoints, checksum_of, size_and_checksum
from plumbing.checks import check_model, gvm_settings, reward_scale
from plumbing.data import split_of
from plumbing.deepspeed_config import ds_config
from plumbing.errors import BadInput
from plumbing.folders import base_of
from conftest import (FP32, ROOT, TEMPLATE, WORDS, clean_env, feedback_rows, run_of, run_stage, tiny_llama,
                      word_tokenizer, write_jsonl)
from test_data import damaged

ROWS = feedback_rows()
PAIRS = [{"prompt": row["instruction"], "chosen": "yes .", "rejected": "no ."} for row in ROWS]


def ends_with(stage, flags, capsys):
    """The sentence that a stage ends with: the exit's own, or argparse's last line."""
    with pytest.raises(SystemExit) as end:
        if stage is evaluate:
            evaluate.main([str(word) for word in flags])
        else:
            run_stage(stage, **flags)
    text = end.value.code
    if text == 2:  # argparse: usage lines, then the sentence
        text = capsys.readouterr().err.strip().splitlines()[-1]
    assert isinstance(text, str) and "\n" not in text and " " in text and len(text) < 1200, text
    return text


@pytest.fixture
def world(flags, chain, baseline, tmp_path, monkeypatch):
    """Flags of each stage that would run, the folders of the chain, an empty folder to break things in."""
    monkeypatch.chdir(tmp_path)
    out = {"output_dir": tmp_path / "out"}
    on_sft = {"sft_model": chain.sft, **out}
    return SimpleNamespace(
        folder=tmp_path, model=flags.sft["model"], sft_folder=chain.sft, gvm_folder=chain.gvm,
        rm_folder=baseline.rm, folder_of_metrics=chain.dvpo,
        flags={sft: {**flags.sft, **out}, train_gvm: {**flags.gvm, **on_sft},
               train_rm: {**flags.rm, **on_sft},
               train_dvpo: {**flags.dvpo, "value_model": chain.gvm, **on_sft},
               train_ppo: {**flags.ppo, "reward_model": baseline.rm, **on_sft},
               train_remax: {**flags.remax, "reward_model": baseline.rm, **on_sft},
               train_grpo: {**flags.grpo, "reward_model": baseline.rm, **on_sft},
               train_dpo: {**flags.dpo, **on_sft}})


@pytest.fixture
def loaded(monkeypatch):
    """Notes every model whose weights are read."""
    load, found = PreTrainedModel.from_pretrained.__func__, []

    def noting(cls, path, *args, **kwargs):
        found.append(str(path))
        return load(cls, path, *args, **kwargs)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(noting))
    return found


# ---- ways to break a folder or a file ----

def copy(world, source, **changes):
    """A copy of a model's folder with some files changed: name -> bytes, function of the old, or None."""
    folder = world.folder / "copy"
    shutil.copytree(source, folder)
    for name, change in changes.items():
        path = folder / {"config": "config.json", "tokenizer": "tokenizer.json", "rm": "rm.json",
                         "weights": "model.safetensors", "tokenizer_config": "tokenizer_config.json",
                         "gvm": "gvm.json", "template": "chat_template.jinja",
                         "adapter": "adapter_model.safetensors",
                         "adapter_config": "adapter_config.json"}[name]
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()) if callable(change) else change)
    return folder


def half(content):
    return content[:len(content) // 2]


def edited(**changes):
    """Change a JSON object: None takes a key out."""
    def edit(content):
        value = {**json.loads(content), **changes}
        return json.dumps({k: v for k, v in value.items() if v is not None}).encode()
    return edit


def of_weights(change):
    def apply(content):
        Path("weights").write_bytes(content)
        tensors = load_file("weights")
        change(tensors)
        save_file(tensors, "weights", metadata={"format": "pt"})
        return Path("weights").read_bytes()
    return apply


def no_eos(world):
    folder = copy(world, world.model)
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_bytes(edited(eos_token=None)(path.read_bytes()))
    return folder


def model_with(world, words=WORDS, model=None):
    folder = world.folder / "model"
    (model or tiny_llama()).save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)
    return folder


def pickled(world):
    folder = copy(world, world.model)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def short_reward_model(world):
    model = AutoModelForSequenceClassification.from_pretrained(world.sft_folder, num_labels=1)
    model.config.max_position_embeddings = 32
    model.save_pretrained(world.folder / "short")
    load_tokenizer(world.sft_folder).save_pretrained(world.folder / "short")
    return world.folder / "short"


def file(world, content, name="data.jsonl"):
    path = world.folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(world, *given):
    return write_jsonl(world.folder / "data.jsonl", given)


def scored(score):
    return [{**row, "completions": [{**c, "overall_score": score} for c in row["completions"]]}
            for row in ROWS]


def without(share, held_out):
    """Rows of no prompt of that share: the data is fine, there is too little of it."""
    shares = {split_of(row["instruction"], 0): row for row in ROWS}
    return [row for other, row in shares.items() if other != share and (held_out or other != "test")]


# ---- what goes wrong ----

LATE = "the fault is in the weights, or shows when they answer"

MODELS = [  # stage, flags to change (or a function of the world that gives them), what the sentence has
    (sft, {"model": "nobody/nothing"}, "--model nobody/nothing: .*no such folder"),
    (sft, lambda w: {"model": w.folder}, "--model .*cannot load"),
    (sft, lambda w: {"model": copy(w, w.model, config=half)}, "--model .*copy"),
    (sft, lambda w: {"model": copy(w, w.model, config=b"[]")}, "--model .*copy"),
    (sft, lambda w: {"model": copy(w, w.model, config=b"\xff\xfe")}, "--model .*copy"),
    (sft, lambda w: {"model": copy(w, w.model, config=edited(model_type="nosuch"))}, "--model .*nosuch"),
    (sft, lambda w: {"model": copy(w, w.model, config=edited(model_type="own", auto_map={
        "AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}))}, "--model .*custom code"),
    (sft, lambda w: {"model": copy(w, w.model, config=edited(vocab_size=5))}, "37|do not belong together"),
    (sft, lambda w: {"model": copy(w, w.model, tokenizer=half)}, "--model .*copy"),
    (sft, lambda w: {"model": copy(w, w.model, tokenizer=None, tokenizer_config=None)}, "--model .*copy"),
    (sft, lambda w: {"model": no_eos(w)}, "no EOS token"),
    (sft, lambda w: {"model": copy(w, w.model, template=b"{{ raise_exception('never') }}")},
     "chat template .*never"),
    (sft, lambda w: {"model": copy(w, w.model, template=b"{% for m in %}")}, "chat template fails"),
    (sft, lambda w: {"model": copy(w, w.model, template=b"{{ messages[0]['role'].nothing.at_all }}")},
     "chat template fails"),
    (sft, lambda w: {"model": model_with(w, [*WORDS, "more"])}, "do not belong together"),
    (sft, lambda w: {"model": copy(w, w.model, weights=half)}, "--model .*cannot load", LATE),
    (sft, lambda w: {"model": copy(w, w.model, weights=b"")}, "--model .*cannot load", LATE),
    (sft, lambda w: {"model": copy(w, w.model, weights=None)}, "--model .*cannot load", LATE),
    (sft, lambda w: {"model": copy(w, w.model, weights=of_weights(lambda t: t.pop("model.norm.weight")))},
     "missing .*model.norm.weight", LATE),
    (sft, lambda w: {"model": copy(w, w.model, config=edited(intermediate_size=48))},
     "--model .*cannot load", LATE),
    (sft, lambda w: {"model": pickled(w)}, "--model .*safetensors", LATE),
    (train_gvm, {"sft_model": "./nothing"}, "run `sft.py --model .*--sft_model"),
    (train_gvm, lambda w: {"sft_model": "", "model": w.model}, "run `sft.py --model .*--sft_model"),
    (train_rm, {"sft_model": "./nothing"}, "run `sft.py --model .*--sft_model"),
    (train_dvpo, {"sft_model": "./nothing"}, "run `sft.py --model .*--sft_model"),
    (train_ppo, {"sft_model": "./nothing"}, "run `sft.py --model .*--sft_model"),
    (train_gvm, lambda w: {"sft_model": copy(w, w.sft_folder, weights=half)},
     "--sft_model .*cannot load", LATE),
    (train_rm, lambda w: {"sft_model": copy(w, w.sft_folder, weights=of_weights(
        lambda t: t.pop("model.norm.weight")))}, "missing .*model.norm.weight", LATE),
    (train_dvpo, lambda w: {"sft_model": w.gvm_folder}, "--sft_model .*adapter"),
    (train_dvpo, {"value_model": "./nothing"}, "run `train_gvm.py --model .*--value_model"),
    (train_dvpo, lambda w: {"value_model": w.sft_folder}, "--value_model .*train_gvm.py"),
    (train_dvpo, lambda w: {"value_model": copy(w, w.gvm_folder, gvm=half)}, "--value_model .*train_gvm.py"),
    (train_dvpo, lambda w: {"value_model": copy(w, w.gvm_folder, gvm=b"3")}, "--value_model .*train_gvm.py"),
    (train_dvpo, lambda w: {"value_model": copy(w, w.gvm_folder, gvm=edited(k=None))},
     "train_gvm.py wrote .*k"),
    (train_dvpo, lambda w: {"value_model": copy(w, w.gvm_folder, gvm=edited(k="four"))}, "gvm.json: wrong k"),
    (train_dvpo, lambda w: {"value_model": copy(w, w.gvm_folder, gvm=edited(base_model="/gone"))}, "/gone"),
    (train_dvpo, lambda w: {"value_model": copy(w, w.gvm_folder, adapter=half)}, "--value_model"),
    (train_dvpo, lambda w: {"value_model": copy(w, w.gvm_folder, adapter=of_weights(
        lambda t: [t.pop(k) for k in list(t) if "score" in k]))}, "--value_model .*head is missing"),
    (train_dvpo, lambda w: {"value_model": copy(w, w.gvm_folder, adapter=of_weights(
        lambda t: [t.update({k: x[:1].clone()}) for k, x in t.items() if "lora_A" in k]))},
     "--value_model .*cannot load", LATE),
    (train_dvpo, lambda w: {"value_model": copy(w, w.gvm_folder, adapter_config=b"{")},
     "--value_model .*cannot load", LATE),
    (train_dvpo, lambda w: {"sft_model": model_with(w, [*WORDS[:-2], WORDS[-1], WORDS[-2]])},
     "--value_model .*another tokenizer"),
    (train_ppo, {"reward_model": "./nothing"}, "run `train_rm.py --model .*--reward_model"),
    (train_ppo, lambda w: {"reward_model": w.sft_folder}, "--reward_model .*no trained one-label head", LATE),
    (train_ppo, lambda w: {"reward_model": copy(w, w.rm_folder, rm=half)}, "rm.json cannot be read"),
    (train_ppo, lambda w: {"reward_model": copy(w, w.rm_folder, rm=b"{}")}, "rm.json cannot be read"),
    (train_ppo, lambda w: {"reward_model": copy(w, w.rm_folder, rm=edited(scale="wide"))},
     "rm.json cannot be read"),
    (train_ppo, lambda w: {"reward_model": copy(w, w.rm_folder, rm=edited(scale=0))},
     "rm.json cannot be read"),
    (train_ppo, lambda w: {"reward_model": copy(w, w.rm_folder, adapter_config=b"{")}, "adapter_config.json"),
    (train_ppo, lambda w: {"reward_model": copy(w, w.rm_folder, adapter=half)}, "--reward_model"),
    (train_ppo, lambda w: {"reward_model": short_reward_model(w)}, "38 tokens .* 32 of --reward_model"),
    (train_ppo, lambda w: {"critic_model": model_with(w, [*WORDS[:-2], WORDS[-1], WORDS[-2]])},
     "--critic_model .*another vocabulary"),
    *((stage, {"sft_model": "./nothing"}, "run `sft.py --model .*--sft_model")
      for stage in (train_remax, train_dpo)),
    *((stage, lambda w: {"sft_model": w.gvm_folder}, "--sft_model .*adapter")
      for stage in (train_remax, train_dpo)),
    *((stage, lambda w: {"sft_model": copy(w, w.sft_folder, weights=half)}, "--sft_model .*cannot load", LATE)
      for stage in (train_remax, train_dpo)),
    (train_remax, {"reward_model": "./nothing"}, "run `train_rm.py --model .*--reward_model"),
    (train_remax, lambda w: {"reward_model": w.sft_folder},
     "--reward_model .*no trained one-label head", LATE),
    (train_remax, lambda w: {"reward_model": copy(w, w.rm_folder, rm=half)}, "rm.json cannot be read"),
    (train_remax, lambda w: {"reward_model": short_reward_model(w)}, "38 tokens .* 32 of --reward_model"),
]

DATA = [
    (sft, {"data": "missing.jsonl"}, "missing.jsonl: no such file"),
    (sft, {"data": ""}, "'': no such file"),
    (sft, {"data": "nobody/nothing"}, "nobody/nothing: .*hub"),
    (sft, lambda w: {"data": w.folder}, "is a folder"),
    (sft, lambda w: {"data": file(w, "a,b", "x.csv")}, "x.csv: unknown extension"),
    (sft, lambda w: {"data": file(w, "")}, "data.jsonl is empty"),
    (sft, lambda w: {"data": file(w, json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1])[:30])},
     "data.jsonl:2: not valid"),
    (sft, lambda w: {"data": file(w, b'{"instruction": "caf\xe9"}')}, "data.jsonl:1: .*UTF-8"),
    (sft, lambda w: {"data": file(w, "[1, 2]")}, "data.jsonl:1: the row must be an object"),
    (sft, lambda w: {"data": file(w, b"PAR1", "x.parquet")}, "x.parquet: unreadable"),
    (sft, lambda w: {"data": rows(w, {"text": "a"})}, "data.jsonl:1: no known shape"),
    (sft, lambda w: {"data": rows(w, ROWS[0], {**ROWS[1], "completions": "b"})},
     "data.jsonl:2: completions must be"),
    (sft, lambda w: {"data": rows(w, {**ROWS[0], "completions": [{"model": "m"}]})}, "has no `response`"),
    (sft, lambda w: {"data": rows(w, {**ROWS[0], "group": []})}, "group must be"),
    (sft, lambda w: {"data": rows(w, {"chosen": "a", "rejected": "b"})}, "without their prompt"),
    (sft, lambda w: {"data": rows(w, *({**row, "completions": []} for row in ROWS))}, "nothing is left"),
    (sft, lambda w: {"data": rows(w, *({"instruction": "a", "output": " "} for _ in range(3)))},
     "nothing is left"),
    (sft, lambda w: {"data": rows(w, *ROWS[:40], *({**row, "completions": []} for row in ROWS[40:]))},
     r"more than 10%.*--allow_dropped"),
    (train_gvm, lambda w: {"data": rows(w, *scored(float("nan")))}, "no score.*nothing is left"),
    (train_gvm, lambda w: {"data": rows(w, *scored("N/A"))}, "no score.*nothing is left"),
    (train_gvm, lambda w: {"data": rows(w, *scored(7))}, "no pair of unequal scores|10%"),
    (train_gvm, lambda w: {"data": rows(w, *PAIRS)}, "no policy name.*--k 0"),
    (train_gvm, lambda w: {"data": rows(w, *PAIRS), "reward": "score", "k": 0},
     "data.jsonl:.*--reward preference"),
    (train_gvm, {"reward": "score", "score_max": 5}, "--score_min.*--score_max"),
    *((stage, lambda w, share=share, held_out=held_out: {"data": rows(w, *without(share, held_out))},
       "data.jsonl.*too few")
      for stage, share in ((sft, "sft"), (train_gvm, "value"), (train_rm, "value"), (train_dvpo, "rl"),
                           (train_ppo, "rl"), (train_remax, "rl"), (train_dpo, "value"))
      for held_out in (False, True)),
    (train_dpo, lambda w: {"data": rows(w, *scored(7))}, "no pair of unequal scores|10%"),
    (train_dpo, {"data": "missing.jsonl"}, "missing.jsonl: no such file"),
    (train_remax, {"max_prompt_length": 3}, "--max_prompt_length 3"),
    (sft, {"max_length": 9}, "--max_length 9"),
    (train_dvpo, {"max_prompt_length": 3}, "--max_prompt_length 3"),
]

def zero_3(**more):
    return json.dumps({"zero_optimization": {"stage": 3, **more}})


def nvme(place):
    return {"device": "nvme", "nvme_path": place}


LONG, ODD = "a" * 5000, "out\udcff"  # as Python reads a byte that is no UTF-8

FLAGS = [
    *((stage, {"model": LONG}, "^--model 'aaa.* 5000 letters")
      for stage in (sft, train_gvm, train_rm, train_dvpo, train_ppo, train_remax, train_dpo)),
    (sft, {"model": f"nobody/{LONG}"}, "^--model 'nobody/aaa"),
    (sft, {"model": "./" + 2000 * "a/"}, "^--model './a/a"),
    (sft, {"data": LONG + ".jsonl"}, "^--data 'aaa"),
    (sft, {"base_model": "\u9ec4" * 100}, "^--base_model"),  # 300 bytes
    (train_dvpo, {"sft_model": LONG}, "^--sft_model 'aaa"),
    *((stage, {"output_dir": ODD}, r"^--output_dir 'out\\udcff': not UTF-8")
      for stage in (sft, train_gvm, train_rm, train_dvpo, train_ppo, train_remax, train_dpo)),
    (sft, {"model": ODD}, "^--model .*not UTF-8"),
    (sft, {"ds_config": ODD}, "^--ds_config .*not UTF-8"),
    *((stage, {"lora_r": 1000000000}, "--lora_r 1e.09")
      for stage in (sft, train_gvm, train_rm, train_dvpo, train_ppo, train_remax, train_dpo)),
    (train_gvm, {"k": 1000000}, "--k 1e.06"),
    (train_gvm, {"batch_size": 10**9}, "--batch_size 1e.09"),
    (train_dvpo, {"rollout_batch": 10**9}, "--rollout_batch 1e.09"),
    (train_ppo, {"ppo_epochs": 10**9}, "--ppo_epochs 1e.09"),
    *((sft, lambda w, given=given: {"ds_config": file(w, zero_3(**given), "ds.json")},
       f"--ds_config .*ds.json: .*{part}")
      for given, part in (*(({name: True}, name) for name in (
          "zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")),
                          ({"zero_hpz_partition_size": 2}, "zero_hpz_partition_size"),
                          ({"offload_param": nvme("nowhere")}, "offload_param: nvme_path 'nowhere'"),
                          ({"offload_param": nvme(None)}, "offload_param: nvme_path ''"),
                          ({"offload_param": nvme("ds.json")}, "nvme_path 'ds.json'"),
                          ({"offload_optimizer": nvme("/proc/nowhere")}, "nvme_path '/proc/nowhere'"))),
    *((sft, lambda w, text=text: {"model": copy(w, w.model, template=text)}, "template: .* takes more than")
      for text in (b"{{ 'a' * 10 ** 10 }}", b"{{ 'a' * 10 ** 7 }}", b"{{ ('a' * 10 ** 9)|length }}",
                   b"{% set n = namespace(x='a') %}"
                   b"{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}")),
    *((stage, lambda w: {"output_dir": copy(w, w.model)}, "--output_dir .*: a model lies here that is of no")
      for stage in (train_gvm, train_remax)),
    (sft, {"learning_rate": 1}, "--learning_rate"),
    (sft, {"micro": 1}, "--micro"),  # the beginning of a flag's name is not the flag
    (sft, {"lr": "high"}, "--lr"),
    (sft, {"lr": "nan"}, "--lr nan"),
    (sft, {"lr": "-1"}, "--lr -1"),
    (sft, {"lr": "inf"}, "--lr inf"),
    (sft, {"resume": "perhaps"}, "--resume|truthy"),
    (sft, {"epochs": 0}, "--epochs 0"),
    (sft, {"warmup_steps": -1}, "--warmup_steps -1"),
    (sft, {"batch_size": 5, "micro_batch": 2}, "--batch_size 5 .*--micro_batch"),
    (sft, {"batch_size": 0}, "--batch_size 0"),
    (sft, {"micro_batch": 0}, "--micro_batch"),
    (sft, {"max_length": 0}, "--max_length 0"),
    (sft, {"max_length": 129}, "--max_length 129: .* 128 of"),
    (sft, {"max_grad_norm": -1}, "--max_grad_norm -1"),
    (sft, {"max_steps": -2}, "--max_steps -2"),
    (sft, {"lora_r": -1}, "--lora_r -1"),
    (sft, {"lora_dropout": 1.5}, "--lora_dropout 1.5"),
    (sft, {"seed": -1}, "--seed -1"),
    (sft, {"keep": 0}, "--keep 0"),
    (sft, {"save_every": -1}, "--save_every -1"),
    (sft, {"eval_every": -1}, "--eval_every -1"),
    (sft, {"ds_config": "ds_configs/zero4.json"}, "--ds_config ds_configs/zero4.json"),
    *((sft, lambda w, text=text: {"ds_config": file(w, text, "ds.json")}, f"--ds_config .*ds.json: .*{part}")
      for text, part in (("{", "choose"), ("[]", "choose"), ("3", "choose"),
                         ('{"zero_optimization": 3}', "choose"),
                         ('{"zero_optimization": {"stage": 7}}', "stage"),
                         ('{"zero_optimization": {"stage": 2, "nonsense": 1}}', "nonsense"),
                         ('{"zero_optimisation": {"stage": 3}}', "zero_optimisation"),
                         ('{"bf16": {"enabled": "false"}}', "unquoted"),
                         ('{"zero_optimization": {"stage": "3"}}', "unquoted"),
                         ('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}',
                          "zero_force_ds_cpu_optimizer"),
                         ('{"bf16": {"enabled": "perhaps"}}', "bool"), ('{"bf16": true}', "choose"),
                         ('{"fp16": {"enabled": true}}', "fp16"),
                         ('{"optimizer": {"type": "Adam"}}', "optimizer"),
                         ('{"train_batch_size": 7}', "train_batch_size"))),
    (train_gvm, {"k": -1}, "--k -1"),
    (train_gvm, {"lam": 1.5}, "--lam 1.5"),
    (train_gvm, {"gamma": 0}, "--gamma 0"),
    (train_gvm, {"tau_warmup": 2}, "--tau_warmup 2"),
    (train_gvm, {"tau_answer_tokens": 0}, "--tau_answer_tokens 0"),
    (train_gvm, {"lora_r": 0}, "--lora_r 0"),
    (train_gvm, {"batch_size": 5, "micro_batch": 5}, "--batch_size 5 must be even"),
    (train_gvm, {"reward": "luck"}, "--reward"),
    (train_gvm, {"reward": "model"}, "--reward model and --reward_model"),
    (train_gvm, lambda w: {"reward_model": w.rm_folder}, "--reward model and --reward_model"),
    (train_gvm, {"reward": "model", "reward_model": "./nothing"}, "--reward_model ./nothing"),
    (train_gvm, {"score_min": 5, "score_max": 5}, "--score_min"),
    (train_gvm, {"max_length": 129}, "--max_length 129"),
    (train_rm, {"lora_r": 0}, "--lora_r 0"),
    (train_rm, {"pairs": "some"}, "--pairs"),
    (train_rm, {"max_length": 129}, "--max_length 129"),
    *((train_dvpo, changes, "--rollout_batch .*--micro_batch .*--accum_steps")
      for changes in ({"rollout_batch": 3}, {"rollout_batch": 0}, {"accum_steps": 0})),
    (train_dvpo, {"ppo_epochs": 0}, "--ppo_epochs"),
    (train_dvpo, {"max_steps": 0}, "--max_steps"),
    (train_dvpo, {"temperature": 0}, "--temperature 0"),
    (train_dvpo, {"temperature": "nan"}, "--temperature nan"),
    (train_dvpo, {"response_length": 0}, "--response_length 0"),
    (train_dvpo, {"kl_horizon": 0}, "--kl_horizon 0"),
    (train_dvpo, {"cliprange": 0}, "--cliprange 0"),
    (train_dvpo, {"gae_lam": -0.5}, "--gae_lam -0.5"),
    (train_dvpo, {"advantage": "best"}, "--advantage"),
    (train_dvpo, {"max_prompt_length": 100, "response_length": 29},
     "--max_prompt_length 100 .*--response_length 29.* 128"),
    *((train_dvpo, {"value_model": "", flag: spec}, f"--{flag} {spec}: .*module:function")
      for flag in ("value_fn", "truth_fn")
      for spec in ("nomodule:values", "json:nofunction", "json", "json:decoder", "..x:y")),
    (train_dvpo, {"value_fn": "json:dumps"}, "--value_fn and --value_model"),
    (train_dvpo, lambda w: {"value_model": copy(w, w.gvm_folder, gvm=edited(chat_template="{% for"))},
     "chat template fails"),
    (train_dvpo, lambda w: {"value_model": copy(w, w.gvm_folder, gvm=edited(context=16))},
     "38|more than the 16"),
    (train_dvpo, lambda w: {"value_model": copy(w, w.gvm_folder, gvm=edited(k=-3))}, "gvm.json: wrong k"),
    (sft, lambda w: {"model": copy(w, w.model), "output_dir": w.folder / "copy"},
     "a model that this run reads"),
    (train_ppo, {"share_base": True}, "--share_base .*--lora_r"),
    (train_ppo, {"reward_fn": "json:dumps"}, "--reward_fn and --reward_model"),
    (train_ppo, {"cliprange_value": 0}, "--cliprange_value 0"),
    (train_dpo, {"beta": 0}, "--beta 0"),
    (train_dpo, {"beta": "nan"}, "--beta nan"),
    (train_dpo, {"label_smoothing": 0.6}, "--label_smoothing 0.6"),
    (train_dpo, {"label_smoothing": -0.1}, "--label_smoothing -0.1"),
    (train_dpo, {"pairs": "some"}, "--pairs"),
    (train_dpo, {"batch_size": 5, "micro_batch": 2}, "--batch_size 5 .*--micro_batch"),
    (train_dpo, {"max_length": 129}, "--max_length 129"),
    (train_dpo, {"critic_lr": 1}, "--critic_lr"),
    *((train_remax, changes, "--rollout_batch .*--micro_batch .*--accum_steps")
      for changes in ({"rollout_batch": 3}, {"accum_steps": 0})),
    (train_grpo, {"rollout_batch": 6, "group_size": 4}, "--rollout_batch 6 .*--group_size 4"),
    (train_grpo, {"group_size": 1}, "--group_size 1"),
    (train_grpo, {"ppo_epochs": 0}, "--ppo_epochs 0"),
    (train_grpo, {"loss_mean": "sum"}, "--loss_mean"),
    (train_grpo, {"cliprange": 0}, "--cliprange 0"),
    (train_grpo, lambda w: {"reward_model": short_reward_model(w)}, "38 tokens .* 32 of --reward_model"),
    (train_remax, {"max_steps": 0}, "--max_steps 0"),
    (train_remax, {"temperature": 0}, "--temperature 0"),
    (train_remax, {"ppo_epochs": 2}, "--ppo_epochs"),
    (train_remax, {"reward_fn": "json:dumps"}, "--reward_fn and --reward_model"),
    (train_remax, {"reward_model": "", "reward_fn": "nomodule:x"},
     "--reward_fn nomodule:x: .*module:function"),
    *((stage, lambda w, below=below: {"output_dir": file(w, "", "taken") / below}, "--output_dir .*taken")
      for stage in (sft, train_gvm, train_rm, train_dvpo, train_ppo, train_remax, train_dpo)
      for below in ("", "below")),
    (sft, {"output_dir": "/proc/nothing"}, "--output_dir /proc/nothing: cannot write"),  # not even by root
]

EVALUATE = [
    (evaluate, [], "usage"),
    (evaluate, ["judge"], "usage"),
    (evaluate, ["gvm", "--png", "x.png"], "--png is a flag of `evaluate.py plot`"),
    (evaluate, ["gvm", "--json", "/proc/nothing/x.json"], "--json"),
    (evaluate, ["gvm", "--json", ODD], r"--json 'out\\udcff': not UTF-8"),
    (evaluate, ["policy", "--policies", f"a={ODD}"], "--policies .*not UTF-8"),
    (evaluate, ["values", "--model", LONG], "--model 'aaa"),
    (evaluate, ["values", "--question", ODD, "--responses", "a"], "--question .*not UTF-8"),
    (evaluate, ["values", "--question", "a"], "--question and --responses"),
    (evaluate, ["plot", "--runs", "dvpo"], "--runs dvpo: expected name=path"),
    (evaluate, ["plot", "--runs", "dvpo=nothing"], "nothing/metrics.jsonl"),
    (evaluate, ["policy", "--policies", "a=nothing"], "--policies nothing"),
    (evaluate, ["gvm", "--pairs", "0"], "--pairs 0"),
    (evaluate, ["gvm", "--micro_batch", "-1"], "--micro_batch -1"),
    (evaluate, ["gvm", "--png=x.png"], "--png is a flag"),
    (evaluate, ["gvm", "--tau-policy", "nobody"], "--tau_policy is a flag"),
    (evaluate, ["gvm", "--model", "none", "--unseen_data", "x.jsonl"], "--unseen_data"),
]
BAD = MODELS + DATA + FLAGS + EVALUATE


def name_of(case):
    stage, changes, part, *_ = case
    given = part if callable(changes) else changes if isinstance(changes, list) else "-".join(changes)
    return f"{stage.__name__}-{given}"


@pytest.mark.parametrize("case", BAD, ids=map(name_of, BAD))
def test_bad_input_ends_in_one_sentence(case, world, loaded, capsys):
    """Which names the flag, file or row; nothing is left in the output folder, and no model is loaded unless
    the fault is in its weights."""
    stage, changes, part, *late = case
    if stage is evaluate:
        text = ends_with(stage, changes, capsys)
    else:
        changes = changes(world) if callable(changes) else changes
        loaded.clear()  # of making the case
        text = ends_with(stage, {**world.flags[stage], **changes}, capsys)
    assert re.search(part, text), text
    assert late or not loaded, loaded
    out = world.folder / "out"
    assert not out.exists() or {path.name for path in out.iterdir()} <= {".lock", "args.json"}


def test_a_template_that_never_ends(world, monkeypatch, capsys):
    monkeypatch.setattr(limits, "SECONDS", 1)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    folder = copy(world, world.model, template=f"{loop}{TEMPLATE}".encode())
    assert "takes more than 1 seconds" in ends_with(sft, {**world.flags[sft], "model": folder}, capsys)


def test_names_and_texts_of_any_language_go_through():
    """A question may be long."""
    args = parse_args(evaluate.Args, ["--question", "\u9ec4" * 3000, "--responses", "a/" * 3000,
                                      "--json", "\u9ec4" * 80, "--policies", "\u9ec4=\u9ec4/\U0001f600"])
    assert len(args.question) == 3000 and args.json == "\u9ec4" * 80


OWN = {"short": "[1.0]", "text": "['good'] * len(rows)", "digits": "['1'] * len(rows)", "none": "None",
       "one_text": "'1' * len(rows)", "nan": "[float('nan')] * len(rows)", "number": "1.0",
       "lists": "[[1.0, 2.0]] * len(rows)", "more": "[1.0] * (len(rows) + 1)",
       "huge": "[10 ** 400] * len(rows)"}
OWN_VALUES = {"nan": "[float('nan')] * (1 + len(row['response_ids']))", "one": "[1.0]", "none": "None",
              "text": "'1' * (1 + len(row['response_ids']))"}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module `own` with a function for each of them."""
    returned = {**OWN, **{f"long_{name}": f"[{what} for row in rows]" for name, what in OWN_VALUES.items()}}
    (tmp_path / "own.py").write_text("".join(f"def {name}(rows, policy, tokenizer): return {what}\n"
                                             for name, what in returned.items()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)


ANSWERS = [{"response_ids": [1, 2], "prompt_ids": [3], "response": "a"}] * 2


@pytest.mark.parametrize("name", OWN)
def test_a_function_of_ones_own_returns_a_number_for_each_row(name, own):
    args = SimpleNamespace(truth_fn=f"own:{name}", reward_fn=f"own:{name}")
    run = run_of(**vars(args))
    for flag, function in (("truth", lambda: rl.load_truth(args)(ANSWERS, None, run)),
                           ("reward", lambda: rl.load_reward(None, {}, run)(ANSWERS, None))):
        with pytest.raises(BadInput, match=f"^--{flag}_fn own:{name}: returned . rewards for 2 rows"):
            function()


@pytest.mark.parametrize("name", [*(f"long_{name}" for name in OWN_VALUES), "none", "one_text", "number"])
def test_a_value_function_of_ones_own_returns_numbers_for_each_row(name, own):
    run = run_of(value_fn=f"own:{name}")
    with pytest.raises(BadInput, match=f"^--value_fn own:{name}: .*one finite value more"):
        rl.load_value_fn(None, run)(ANSWERS, [])


def test_numbers_of_any_kind_are_taken(tmp_path, monkeypatch):
    (tmp_path / "kinds.py").write_text("import numpy, torch\ndef all(rows, *more): return iter([True, 2, "
                                       "numpy.float32(0.5), torch.tensor(1.5), torch.ones(1)])\n")
    monkeypatch.chdir(tmp_path)
    args = SimpleNamespace(truth_fn="kinds:all")
    assert rl.load_truth(args)(ANSWERS[:1] * 5, None, run_of(**vars(args))) == 6 / 5


def test_a_truth_that_is_too_short_ends_a_run_and_an_evaluation(own, flags, chain, capsys):
    """Both gave a mean of the wrong rows, and an error far from the cause."""
    for stage, words in ((train_dvpo, {**flags.dvpo, "sft_model": chain.sft, "value_model": chain.gvm,
                                       "truth_fn": "own:short", "output_dir": "out"}),
                         (evaluate, ["policy", "--model", "none", "--data", flags.sft["data"],
                                     "--dtype", "float32", "--response_length", 8, "--truth_fn", "own:short",
                                     "--policies", f"a={chain.sft}"])):
        assert "--truth_fn own:short: returned 1 rewards" in ends_with(stage, words, capsys)


OUTPUTS = [  # what writes a file, its words, and how a file begins that is its own
    (evaluate, ["gvm", "--json"], '{\n "command": "gvm",\n "args": {'),
    (evaluate, ["values", "--html"], pages.PAGE),
    (evaluate, ["policy", "--out"], '{"policy": "a\\"b", "prompt": []}'),
    (evaluate, ["plot", "--png"], b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + 21 * b"\0"
     + b"tEXtSoftware\0evaluate.py plot"),
    (report, ["--runs", "a=none", "--out"], '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
     '<meta http-equiv="Content-Security-Policy"')]


@pytest.mark.parametrize("theirs", ['{"model_type": "llama"}', "<!doctype html>\n<html>", b"\x89PNG\r\n",
                                    '{"policy": "reject"}', "\n"])
@pytest.mark.parametrize("script, words, ours", OUTPUTS, ids=[words[-1] for _, words, _ in OUTPUTS])
def test_a_file_of_others_is_not_written_over(script, words, ours, theirs, tmp_path, monkeypatch):
    """One's own earlier output is, and an empty file: the runs then end at what they read."""
    monkeypatch.chdir(tmp_path)
    words, place = [*words, "place"], Path("place")
    for content, part in ((theirs, f"{words[-2]} place: a file that this command did not write"),
                          (ours, "none"), ("", "none"), (None, "none")):
        place.unlink(missing_ok=True)
        if content is not None:
            place.write_bytes(content if isinstance(content, bytes) else content.encode())
        before = place.exists() and place.read_bytes()
        with pytest.raises(BadInput, match=part):
            script.main([*words, *(["--model", "none"] if script is evaluate else [])])
        assert before == (place.exists() and place.read_bytes())


def test_there_are_many_of_them():
    assert len({name_of(case) + case[2] for case in BAD}) >= 60


@pytest.mark.slow
def test_what_is_odd_but_right_goes_through(world, capsys):
    """A byte order mark, CRLF, other scripts, rows that come twice, and a row of 10 MB, which is dropped by
    the length limit and counted."""
    rows = [*ROWS, ROWS[0], {**ROWS[1], "instruction": "ist жёлтый 黄色 rot\u2028?"},
            {"instruction": next(f"is it {i} ?" for i in range(99) if split_of(f"is it {i} ?", 0) == "sft"),
             "completions": [
                 {"model": "m", "response": "yes " * 2_500_000, "overall_score": 5}]}]
    text = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    run_stage(sft, **{**world.flags[sft], "data": file(world, text), "max_steps": 1})
    shown = capsys.readouterr().out
    assert "dropped 1 (" in shown and "63 ultrafeedback rows" in shown


def refuse(wrong):
    if wrong:
        raise BadInput(wrong)


def readers(world):
    """name -> (file, reader of it) of every small file that the scripts read beside the data."""
    folder = shutil.copytree(world.gvm_folder, world.folder / "gvm")
    rm = shutil.copytree(world.rm_folder, world.folder / "rm")
    model = shutil.copytree(world.sft_folder, world.folder / "sft")
    tokenizer = load_tokenizer(model)
    shutil.copy(ROOT / "ds_configs/zero3.json", world.folder)
    checkpoint, alone = world.folder / "step", SimpleNamespace(rank=0, world=1)
    checkpoint.mkdir()
    (checkpoint / "rank0.json").write_text("{}")
    files = {"rank0.json": size_and_checksum(checkpoint / "rank0.json")}
    (checkpoint / "done.json").write_text(json.dumps({"ranks": 1, "files": files,
                                                      "checksum": checksum_of(1, files)}))
    assert not Checkpoints.damage(alone, checkpoint)
    shutil.copy(world.folder_of_metrics / "metrics.jsonl", world.folder)
    return {"gvm.json": (folder / "gvm.json", lambda: gvm_settings(folder)),
            "rm.json": (rm / "rm.json", lambda: reward_scale(rm)),
            "adapter_config.json": (rm / "adapter_config.json", lambda: base_of(rm)),
            "config.json": (model / "config.json",
                            lambda: check_model(model, tokenizer, "--model", 9, "asked")),
            "tokenizer_config.json": (model / "tokenizer_config.json", lambda: load_tokenizer(model)),
            "zero3.json": (world.folder / "zero3.json", lambda: ds_config(world.folder / "zero3.json")),
            "done.json": (checkpoint / "done.json", lambda: refuse(Checkpoints.damage(alone, checkpoint))),
            "metrics.jsonl": (world.folder / "metrics.jsonl",
                              lambda: evaluate.read_metrics(world.folder / "metrics.jsonl"))}


@pytest.mark.parametrize("name", ["gvm.json", "rm.json", "adapter_config.json", "config.json",
                                  "tokenizer_config.json", "zero3.json", "done.json", "metrics.jsonl"])
def test_damaged_settings_are_read_or_refused_and_nothing_else(name, world):
    """Values replaced and bytes overwritten, at random. (tests/test_data.py has the data's readers.)"""
    path, read = readers(world)[name]
    sound, draw, refused = path.read_text(), random.Random(0), 0
    rounds = 60 if name == "tokenizer_config.json" else 200
    for i in range(rounds):
        if i % 2:
            lines = sound.splitlines() if name.endswith("l") else [sound]
            path.write_text("\n".join(json.dumps(damaged(json.loads(line), draw)) for line in lines))
        else:
            raw = bytearray(sound.encode())
            for _ in range(draw.randrange(1, 6)):
                raw[draw.randrange(len(raw))] = draw.randrange(256)
            path.write_bytes(raw)
        try:
            read()
        except BadInput as error:
            assert "\n" not in str(error) and len(str(error)) < 800
            refused += 1
    assert refused > rounds / 10


def test_a_run_writes_only_into_its_folder(world):
    """No new file beside the scripts, and of theirs none is changed (the tests' own log may grow there)."""
    tracked = lambda: {path: path.stat().st_mtime if path.suffix in (".py", ".json", ".md") else None
                       for path in ROOT.rglob("*") if path.is_file()
                       and not {".git", ".venv", "__pycache__", ".pytest_cache"} & set(path.parts)}
    before = tracked()
    run_stage(sft, **{**world.flags[sft], "max_steps": 1})
    assert tracked() == before and [path.name for path in world.folder.iterdir()] == ["out"]


def test_no_compiler_for_deepspeeds_cpu_library(world, monkeypatch, capsys):
    """Said at once, not by a failing build."""
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert "C++" in ends_with(sft, world.flags[sft], capsys)


@pytest.mark.parametrize("stage", [sft, train_rm, train_gvm, train_dvpo, train_ppo, train_remax, train_dpo])
def test_track_without_wandb_ends_before_training(stage, world, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    steps = []
    counting = register_optimizer_step_pre_hook(lambda *args: steps.append(args))
    text = ends_with(stage, {**world.flags[stage], "track": True}, capsys)
    counting.remove()
    assert not steps
    assert re.search("--track .*`pip install .*wandb", text), text
    out = world.folder / "out"
    assert not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text()
    assert not list(out.glob("*.safetensors")) and not list(out.glob("checkpoints/*"))


def test_a_clean_clone_names_the_command_that_makes_its_files(tmp_path):
    """`python sft.py` is typed first."""
    for name in ("common.py", "sft.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("plumbing", "toy", "ds_configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("build", "__pycache__"))
    done = subprocess.run([sys.executable, "sft.py"], cwd=tmp_path, env=clean_env(), timeout=120, text=True,
                          capture_output=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search("--base_model toy/build/model: .*; run `python -m toy.make` first.$",
                     done.stderr.strip().splitlines()[-1]), done.stderr[-2000:]


@pytest.mark.parametrize("stage, given, part", [
    (sft, [], "--base_model toy/build/model: .*; run `python -m toy.make` first"),
    (sft, ["base_model"], "toy/build/sft.jsonl: no such file; run `python -m toy.make` first"),
    (train_gvm, [], "run `sft.py --model toy` first"),
    (train_gvm, ["sft_model"], "toy/build/preferences.jsonl: .*; run `python -m toy.make` first")])
def test_what_is_to_be_run_first(stage, given, part, world, capsys):
    """In an empty folder the defaults of --model toy name files that are not there."""
    text = ends_with(stage, {"ds_config": FP32, **{name: world.sft_folder for name in given}}, capsys)
    assert re.search(part, text), text


def test_a_defaults_file_outside_of_the_repository_is_not_executed(tmp_path):
    """A model's folder may come from anybody: of such a one no code is run, whatever it is called."""
    for name in ("mine", "toy"):
        (tmp_path / "here" / name).mkdir(parents=True)
        (tmp_path / "here" / name / "defaults.py").write_text(
            f"open({str(tmp_path / 'executed')!r}, 'w').close()\nDEFAULTS, MADE = {{}}, ('', '')\n")
        (tmp_path / "here" / name / "__init__.py").write_text("")
    code = ("import sys; sys.path[0] = sys.argv[1]; import sft; from plumbing.args import parse_args; "
            "print([parse_args(sft.Args, ['--model', model]).lr for model in sys.argv[2:]])")
    done = subprocess.run([sys.executable, "-c", code, ROOT, "toy", "mine", "./mine", "../here/mine",
                           tmp_path / "here/mine", "mine.defaults", "here/../mine"],
                          cwd=tmp_path / "here", env=clean_env(), timeout=120, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "executed").exists()
    its_own = parse_args(sft.Args, ["--model", "toy"]).lr
    assert done.stdout.strip().splitlines()[-1] == str([its_own] + 6 * [sft.Args.lr])
    assert its_own != sft.Args.lr


@pytest.mark.parametrize("stage", [sft, train_rm, train_gvm, train_dvpo, train_ppo])
def test_ends_of_the_ranges_are_allowed(stage):
    """0 where it means never, off or none."""
    zeros = ["lr", "max_grad_norm", "eval_every", "save_every", "seed"]
    args = parse_args(stage.Args, [word for name in zeros for word in (f"--{name}", "0")])
    assert [getattr(args, name) for name in zeros] == [0] * 5


# ---- the command line itself ----

@pytest.mark.parametrize("words, status, part", [
    (["train_dvpo.py", "--model", "./none"], 1, "run `sft.py --model ./none"),
    (["train_gvm.py", "--lambda", "0.5"], 2, "--lambda"),
    (["sft.py", "--data", "missing.jsonl"], 1, "missing.jsonl: no such file"),
    (["train_ppo.py", "--lr", "nan"], 1, "--lr nan"),
    (["evaluate.py", "plot", "--runs", "dvpo"], 1, "--runs dvpo"),
])
def test_the_command_line_ends_without_a_traceback(words, status, part, world):
    """The sentence is the last line on stderr."""
    words = [ROOT / words[0], *words[1:], *(["--ds_config", FP32] if words[0] != "evaluate.py" else []),
             *(["--base_model", world.model] if words[0] == "sft.py" else [])]
    done = subprocess.run([sys.executable, *map(str, words)], env=clean_env(), timeout=120, text=True,
                          capture_output=True)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert part in done.stderr.strip().splitlines()[-1]
