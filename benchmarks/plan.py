"""What each GPU will hold, before anything is loaded: from a model's config and a DeepSpeed config alone.

    python benchmarks/plan.py benchmarks/configs/llama-3-8b.json
    python benchmarks/plan.py benchmarks/configs/llama-3-8b.json --gpus 1 --gpu_gb 140 --lora_r 16

P parameters are counted on PyTorch's meta device. Bytes per parameter, b = 2 (bf16) or 4:

    weights                 b   of every model that is on the GPU; ZeRO-3 divides by the number of GPUs
    gradients               b   of what is trained; ZeRO-2 and 3 divide
    optimizer              12   float32 master, first and second moment (6 with bf16 states); ZeRO-1, 2, 3
                                divide (offloaded, both are in host memory)
    gradients in float32    4   of what is trained, during the optimizer step; divided like the optimizer

A step has three phases, and the peak is what stays plus the largest of them:

    rollout   KV cache; under ZeRO-3 the gathered weights
    scoring   one layer of one micro batch, the logits of 1,024 tokens, the KV of tau
    update    what backward needs of every layer of a micro batch, the logits of 1,024 tokens; or the float32
              gradients

DVPO holds the policy and one frozen copy of the SFT weights, which is reference and GVM; with --lora_r that
one copy is all. PPO holds policy, critic, reference and reward model; with --lora_r policy and
reference are one. The GVM and the reward model are LoRA of rank 8 on a backbone without an LM head, and
a step of their training is an update alone. Of a micro batch the GVM reads tau once, in one sequence with its
rows (gvm; gvm_alone reads it with each); the reward model's (rm) is of as many answers.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plumbing.files import write_whole

GB = 1e9
LIVE = 1e9  # DeepSpeed's stage3_max_live_parameters: so many gathered weights at a time
LOGIT_TOKENS = 1024  # lean.response_logprobs makes the logits of about this many tokens at a time
FRAMEWORK_GB = 2.0  # CUDA context, NCCL's and DeepSpeed's buckets, fragmentation: a guess, not measured


def read_config(path):
    return AutoConfig.for_model(**json.loads(Path(path).read_text()))


def count(config):
    """(parameters of the causal LM, of the language-model head alone, of LoRA at rank 1)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    head = 0 if config.tie_word_embeddings else model.get_output_embeddings().weight.numel()
    return model.num_parameters(), head, sum(m.in_features + m.out_features for m in linear)


def widths(config):
    """(width of all queries, width of all keys) of one layer."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head, config.num_key_value_heads * head


def kv_bytes(config, b):
    """Keys and values of one token in all layers."""
    return 2 * config.num_hidden_layers * widths(config)[1] * b


def layer_bytes(config, b):
    """What backward keeps of one token in one layer, attention by a fused kernel (no T x T matrix).

    Two norms, which work in float32 (4 h each for what they read, b h for what they give), q, k and v before
    and after the rotation, the attention's output, and gate, up, its activation and their product.
    """
    h, i, (q, kv) = config.hidden_size, config.intermediate_size, widths(config)
    return 2 * (4 + b) * h + b * (3 * q + 3 * kv) + 4 * b * i


def plan(config, ds, gpus, method, lora_r=0, checkpointing=False, rollout_batch=8, micro_batch=2, prompt=1024,
         response=1024, tau=1024, gvm_micro_batch=2):
    """{item: GB on each GPU}, `peak` last.

    ds: the DeepSpeed config as a dict;  prompt, response, tau: tokens
    method: "dvpo", "ppo" (four models, as in the paper), "ppo_shared" (--share_base, with LoRA only), or of
    what is trained before "gvm", "gvm_alone", "gvm_0" (K = 0), "rm"
    """
    b = 2 if ds.get("bf16", {}).get("enabled") else 4
    zero = ds.get("zero_optimization", {})
    stage, offload = zero.get("stage", 0), "offload_optimizer" in zero
    # a float32 copy and two moments; without ZeRO and bf16 the weights are in float32 themselves
    state = 6 if ds.get("bf16", {}).get("bf16_optimizer_states") else 8 if stage == 0 and b == 4 else 12
    parameters, head, lora_rank_1 = count(config)
    backbone, lora = parameters - head, lora_rank_1 * lora_r

    # weights that are trained, and those that are not
    before = method in ("gvm", "gvm_alone", "gvm_0", "rm")
    if before:
        trained, frozen = 8 * lora_rank_1, backbone
    elif method == "dvpo":
        trained, frozen = lora or parameters, parameters + 8 * lora_rank_1  # the GVM's own adapter has rank 8
    elif method == "ppo_shared":
        trained, frozen = lora + 8 * lora_rank_1, parameters + 8 * lora_rank_1  # their rank is 8
    else:  # the critic and the reward model have a backbone and a one-label head
        trained = 2 * lora or parameters + backbone
        frozen = parameters + backbone + (backbone if lora_r else 0)
    share = {"weights": gpus if stage == 3 else 1, "gradients": gpus if stage >= 2 else 1,
             "optimizer": gpus if stage >= 1 else 1}
    held = {"weights, trained": trained * b / share["weights"],
            "weights, frozen": frozen * b / share["weights"],
            "gradients": 0 if offload else trained * b / share["gradients"],
            "optimizer": 0 if offload else trained * state / share["optimizer"]}

    # the phases
    tokens, layers = prompt + response, config.num_hidden_layers
    kv = kv_bytes(config, b)
    logits = min(LOGIT_TOKENS, micro_batch * response) * config.vocab_size * 4
    in_layer = micro_batch * tokens
    if before:  # tokens of a micro batch
        in_layer = gvm_micro_batch * tokens + {"gvm": tau, "gvm_alone": gvm_micro_batch * tau}.get(method, 0)
    one_layer = in_layer * layer_bytes(config, b)
    kept = one_layer * layers
    if checkpointing:  # the input of each layer, and one layer as it is made again
        kept = in_layer * config.hidden_size * b * layers + one_layer
    gathered, live = (parameters * b, min(parameters, LIVE) * b) if stage == 3 and gpus > 1 else (0, 0)
    learns = trained if before else lora or parameters  # policy and critic step one after the other
    float32 = 0 if offload or state == 6 else learns * 4 / share["optimizer"]
    phases = {"update: activations, mask": live + kept + (method == "gvm") * b * in_layer ** 2,
              "update: float32 gradients": float32} if before else {
        "rollout: KV cache" + (" and gathered weights" if gathered else ""):
            min(rollout_batch, 64) * tokens * kv + gathered,  # generate() takes 64 rows at a time
        # logits, log-probs, their exponential and the product
        "scoring: a layer, logits": live + one_layer + 4 * logits,
        # tau's keys and values once, and in front of those of each row
        "scoring: a layer, tau": (method == "dvpo") * (
            live + one_layer + kv * (tau + micro_batch * (tau + tokens))),
        "update: activations, logits": live + kept + 3 * logits,
        "update: float32 gradients": float32}
    gb = {name: n / GB for name, n in {**held, **phases}.items()}
    gb["peak"] = sum(gb[name] for name in held) + max(gb[name] for name in phases) + FRAMEWORK_GB
    return gb


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("config", help="config.json of the model, for example one of benchmarks/configs/")
    parser.add_argument("--ds_config", nargs="*", help="DeepSpeed configs",
                        default=sorted(map(str, (ROOT / "ds_configs").glob("*.json"))))
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8], help="numbers of GPUs")
    parser.add_argument("--gpu_gb", type=float, default=80, help="memory of one GPU [GB]")
    parser.add_argument("--lora_r", type=int, default=0, help="LoRA rank of what learns; 0: all weights")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="as the scripts' flag")
    parser.add_argument("--rollout_batch", type=int, default=8, help="prompts per step on one GPU")
    parser.add_argument("--micro_batch", type=int, default=2, help="rows of one forward pass on one GPU")
    parser.add_argument("--gvm_micro_batch", type=int, default=2, help="rows of one forward pass of the GVM")
    parser.add_argument("--prompt", type=int, default=1024, help="longest prompt [tokens]")
    parser.add_argument("--response", type=int, default=1024, help="longest answer [tokens]")
    parser.add_argument("--tau", type=int, default=1024, help="tokens of tau in front of a prompt")
    parser.add_argument("--json", help="write the numbers there")
    args = parser.parse_args(argv)
    try:
        config = read_config(args.config)
        ds = {Path(path).stem: json.loads(Path(path).read_text()) for path in args.ds_config}
        if min(args.gpus) < 1:
            sys.exit("error: --gpus must be at least 1.")
        plan(config, ds[min(ds)], 1, "dvpo")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        sys.exit(f"error: {args.config}, {' '.join(args.ds_config)}: cannot be read as the config of a "
                 f"Llama-like causal model and DeepSpeed configs ({e}).")
    flags = {name: getattr(args, name)
             for name in ("lora_r", "rollout_batch", "micro_batch", "prompt", "response", "tau",
                          "gvm_micro_batch")}
    rows = [{"ds_config": name, "gpus": gpus, "method": method,
             **plan(config, found, gpus, method, checkpointing=args.gradient_checkpointing, **flags)}
            for name, found in ds.items() for gpus in args.gpus
            for method in ("gvm", "dvpo", "rm", "ppo", *(["ppo_shared"] if args.lora_r else []))]
    print(f"{args.config}: {count(config)[0] / GB:.2f} billion parameters; GB on each GPU\n")
    print("| config | GPUs | | weights | gradients | optimizer | rollout | scoring | update | peak | "
          f"fits {args.gpu_gb:.0f} GB |\n|" + "---|" * 11)
    for row in rows:
        phases = {phase: max((x for name, x in row.items() if name.startswith(phase + ":")), default=0.0)
                  for phase in ("rollout", "scoring", "update")}
        numbers = [row["weights, trained"] + row["weights, frozen"], row["gradients"], row["optimizer"],
                   phases["rollout"], phases["scoring"], phases["update"], row["peak"]]
        print(f"| {row['ds_config']} | {row['gpus']} | {row['method'].upper()} | "
              + " | ".join(f"{x:.1f}" for x in numbers)
              + f" | {'yes' if row['peak'] <= args.gpu_gb else 'no'} |")
    if args.json:
        write_whole(args.json, json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
