"""What the stages check before a model is loaded, from flags and small files, and where their models are."""

import math
from pathlib import Path

from transformers import AutoModelForTokenClassification

from common import load_reward_tokenizer, load_tokenizer
from plumbing.args import load_plug
from plumbing.checks import (check_class, check_model, check_tau, gvm_settings, read_as_gvm,
                             tokenizer_fingerprint)
from plumbing.deepspeed_config import ds_config
from plumbing.errors import BadInput
from plumbing.files import read_object
from plumbing.folders import base_of, model_place, stage_folder
from plumbing.ranks import print0


# ---- stages that train on given answers --------------------------------------------------------------------

def stage_inputs(args, world, base=None, head=None):
    """(model folder, its tokenizer, DeepSpeed config, context [tokens]) of a stage that trains on given
    answers. base: (folder or id, its flag) in place of the SFT model;  head: the class whose head is put on
    it, see check_class"""
    split_batch(args.batch_size, args.micro_batch, world)
    if base is None:
        base = stage_folder(args.model, "sft", args.sft_model, "--sft_model",
                            f"sft.py --model {args.model}"), "--sft_model"
    config = ds_config(args.ds_config, args.micro_batch, args.max_grad_norm)
    tokenizer = load_tokenizer(*base)
    context = check_model(base[0], tokenizer, base[1], args.max_length, f"--max_length {args.max_length}")
    check_class(head, *base)
    return base[0], tokenizer, config, context


def gvm_stage_inputs(args, world):
    """stage_inputs of train_gvm.py, the flags that only it has, and the reward model of --reward model."""
    if args.reward == "preference" and args.batch_size % 2:
        raise BadInput(f"--batch_size {args.batch_size} must be even with --reward preference: the two "
                       f"answers of a pair share a batch.")
    if (args.reward == "model") != bool(args.reward_model):
        raise BadInput("--reward model and --reward_model FOLDER belong together: give both or neither.")
    if args.lora_r < 1 or args.gamma <= 0 or args.score_min >= args.score_max:
        raise BadInput(f"--lora_r {args.lora_r} must be at least 1, --gamma {args.gamma:g} above 0 and "
                       f"--score_min {args.score_min:g} below --score_max {args.score_max:g}.")
    if args.reward_model:
        load_reward_tokenizer(args.reward_model, "--reward_model", args.max_length,
                              f"--max_length {args.max_length}")
    sft, tokenizer, *rest = stage_inputs(args, world, head=AutoModelForTokenClassification)
    if args.k:
        check_tau(tokenizer, f"--k {args.k}", sft, "--sft_model")
    if args.value_model:
        check_trained_on(args, sft, tokenizer)
    return sft, tokenizer, *rest


def check_trained_on(args, sft, tokenizer):
    """A GVM that is trained on grew from the same model, and its adapter is as the flags say."""
    settings, folder = gvm_settings(args.value_model), args.value_model
    if settings["base_model"] != model_place(sft):
        raise BadInput(f"--value_model {folder}: grew from {settings['base_model']}; give that as "
                       f"--sft_model.")
    read_as_gvm(tokenizer, settings)
    file = Path(folder) / "adapter_config.json"
    adapter = read_object(file, f"--value_model {folder}: {file.name} cannot be read", "train it again")
    for flag, name in (("lora_r", "r"), ("lora_alpha", "lora_alpha"), ("lora_dropout", "lora_dropout")):
        if adapter.get(name) != getattr(args, flag):
            raise BadInput(f"--{flag} {getattr(args, flag)}: the adapter of --value_model {folder} has "
                           f"{adapter.get(name)}, and keeps it; give that.")


def split_batch(batch_size, micro_batch, world):
    """Accumulation steps a, with batch_size = ranks x micro batch x a; BadInput where no integer fits."""
    if min(batch_size, micro_batch) < 1 or batch_size % (micro_batch * world):
        raise BadInput(f"--batch_size {batch_size} must be a positive multiple of ranks x --micro_batch = "
                       f"{world} x {micro_batch}: change one of the two.")
    return batch_size // (micro_batch * world)


def steps_of(args, train, test, what, world):
    """Optimizer steps of a run: --epochs passes over `train`, at most --max_steps. Prints the batch sizes."""
    steps = math.ceil(args.epochs * len(train) / args.batch_size)
    steps = min(steps, args.max_steps) if args.max_steps > 0 else steps
    print0(f"{len(train)} {what}, {len(test)} held out; optimizer batch {args.batch_size} = {world} ranks x "
           f"micro batch {args.micro_batch} x {split_batch(args.batch_size, args.micro_batch, world)} "
           f"accumulation; {steps} steps")
    return steps


# ---- stages that sample ------------------------------------------------------------------------------------

def rl_inputs(args, world):
    """(folder of the SFT model, its tokenizer, DeepSpeed config), checked from their small files."""
    check_batches(args, world)
    sft = stage_folder(args.model, "sft", args.sft_model, "--sft_model", f"sft.py --model {args.model}")
    config = ds_config(args.ds_config, args.micro_batch, args.max_grad_norm)
    tokenizer = load_tokenizer(sft, "--sft_model")
    check_model(sft, tokenizer, "--sft_model", *room(args))
    return sft, tokenizer, config


def room(args):
    """(tokens that a prompt and an answer may have, the flags that say so)"""
    return (args.max_prompt_length + args.response_length,
            f"--max_prompt_length {args.max_prompt_length} + --response_length {args.response_length}")


def check_batches(args, world):
    if args.temperature <= 0 or args.response_length < 1:
        raise BadInput(f"--temperature {args.temperature:g} must be above 0 (log-probs are taken at it) and "
                       f"--response_length {args.response_length} at least 1.")
    epochs = getattr(args, "ppo_epochs", 1)
    if min(epochs, args.max_steps) < 1:
        raise BadInput(f"--ppo_epochs {epochs} and --max_steps {args.max_steps} must be at least 1.")
    if hasattr(args, "group_size") and (args.group_size < 2 or args.rollout_batch % args.group_size):
        raise BadInput(f"--rollout_batch {args.rollout_batch} must be a multiple of --group_size "
                       f"{args.group_size}, answers to one prompt, of which there are at least 2.")
    size = args.micro_batch * args.accum_steps
    if min(args.rollout_batch, args.micro_batch, args.accum_steps) < 1 or args.rollout_batch % size:
        raise BadInput(f"--rollout_batch {args.rollout_batch} must be a positive multiple of --micro_batch x "
                       f"--accum_steps = {args.micro_batch} x {args.accum_steps}: change one of the three.")
    print0(f"rollouts/step {args.rollout_batch * world} = {world} ranks x rollout batch "
           f"{args.rollout_batch}; optimizer batch {size * world} = {world} ranks x micro batch "
           f"{args.micro_batch} x {args.accum_steps} accumulation; updates/step "
           f"{epochs * args.rollout_batch // size} = {epochs} epochs x {args.rollout_batch // size}")


def reference_inputs(args, sft, tokenizer):
    """The model that KL is taken to, checked: --reference_model, or the model that the policy starts as."""
    folder = args.reference_model or sft
    if model_place(folder) == model_place(sft):
        return sft
    its_tokenizer = load_tokenizer(folder, "--reference_model")
    check_model(folder, its_tokenizer, "--reference_model", *room(args))
    if tokenizer_fingerprint(its_tokenizer) != tokenizer_fingerprint(tokenizer):
        raise BadInput(f"--reference_model {folder}: another vocabulary than the policy's, which starts as "
                       f"{sft}; name the model that this one was trained from.")
    if getattr(args, "share_base", False):
        raise BadInput("--share_base has one copy of the weights, so that the policy starts as its "
                       "reference: leave --reference_model or --share_base out.")
    return folder


def gvm_inputs(args, reference, tokenizer):
    """(folder of the GVM, its gvm.json); the tokenizer gets the GVM's chat template. With --value_fn, which
    gives the values in its place, (None, {"k": 0})."""
    if args.value_fn and args.value_model:
        raise BadInput("--value_fn and --value_model both give the values: leave one out.")
    if args.value_fn:
        load_plug(args.value_fn, "--value_fn")  # it is there, or this ends here
        return None, {"k": 0}
    folder = stage_folder(args.model, "gvm", args.value_model, "--value_model",
                          f"train_gvm.py --model {args.model}")
    settings = gvm_settings(folder)
    tokens, asked = room(args)
    if tokens > settings["context"]:
        raise BadInput(f"{asked}: more than the {settings['context']} tokens that --value_model {folder} can "
                       f"read: lower one.")
    if settings["tokenizer_fingerprint"] != tokenizer_fingerprint(tokenizer):
        raise BadInput(f"--value_model {folder}: it was trained with another tokenizer than {reference} has; "
                       f"train a GVM on this model.")
    read_as_gvm(tokenizer, settings)
    settings["on_reference"] = settings["base_model"] == model_place(reference)
    return folder, settings


def reward_inputs(args):
    """The reward model's folder, checked; None with --reward_fn, which gives the reward in its place."""
    if args.reward_fn and args.reward_model:
        raise BadInput("--reward_fn and --reward_model both give the reward: leave one out.")
    if args.reward_fn:
        load_plug(args.reward_fn, "--reward_fn")
        return None
    rm = stage_folder(args.model, "rm", args.reward_model, "--reward_model",
                      f"train_rm.py --model {args.model}")
    load_reward_tokenizer(rm, "--reward_model", *room(args))
    return rm


def critic_inputs(args, sft, rm, tokenizer):
    """The folder that the critic starts from, checked: --critic_model, the reward model, or the SFT model."""
    folder = args.critic_model or rm or sft
    flag = "--critic_model" if args.critic_model else "--reward_model"
    its_tokenizer = load_tokenizer(folder, flag, asks=False)
    check_model(folder, its_tokenizer, flag, *room(args), head=True)
    check_class(AutoModelForTokenClassification, base_of(folder), flag)
    if tokenizer_fingerprint(its_tokenizer) != tokenizer_fingerprint(tokenizer):
        raise BadInput(f"--critic_model {folder}: another vocabulary than the policy's; name a model of the "
                       f"policy's family, for example the SFT model.")
    if args.share_base and (not args.lora_r or args.reward_fn or args.critic_model):
        raise BadInput("--share_base takes policy, critic and reward model as LoRA on the SFT model: give "
                       "--lora_r, a LoRA --reward_model and neither --reward_fn nor --critic_model.")
    if args.share_base and (rm == base_of(rm) or model_place(base_of(rm)) != model_place(sft)):
        raise BadInput(f"--share_base: the reward model {rm} is not LoRA on the SFT model {sft}; train "
                       f"one with train_rm.py, or leave --share_base out.")
    if args.critic_every and args.share_base:
        raise BadInput("--critic_every keeps a critic with weights of its own, which it has not with "
                       "--share_base: leave one of the two out.")
    if args.critic_warmup >= args.max_steps:
        print0(f"warning: --critic_warmup {args.critic_warmup} is all of --max_steps: no policy is trained")
    return folder
