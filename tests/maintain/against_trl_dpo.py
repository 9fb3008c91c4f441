"""Our DPO loss, its gradient and the implied rewards against the DPOTrainer of TRL 1.16, on the same batches.

    pip install --target /tmp/trl16 --no-deps "trl==1.16.*" accelerate
    PYTHONPATH=/tmp/trl16 python tests/maintain/against_trl_dpo.py

TRL is not a dependency. Its trainer is built on a random Llama with another random one as reference; its own
collator makes the batch and its own _compute_loss the loss. Ours are the functions of train_dpo.py on the
same token ids: the reference's log-probs through the file that it keeps, the loss through dpo_loss. TRL's
loss is a mean over pairs, ours a sum that the loop divides. Its "sigmoid" has no label smoothing; of a single
pair its "aot" is the smoothed loss, and that is what smoothing is compared with.
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_dpo
from common import load_policy, load_tokenizer
from plumbing.lean import LogProbs
from datasets import Dataset
from toy.make import make_tokenizer
from trl import DPOConfig, DPOTrainer

DEVICE, BETA = torch.device("cpu"), 0.3


def random_model(seed, tokenizer, folder):
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                                 num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2,
                                 max_position_embeddings=256)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_pairs(seed, n, vocabulary, eos):
    """Rows (prompt, chosen, rejected) of token ids, ragged, answers ending with EOS or cut."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))
    text = lambda low, high: [draw(5, vocabulary) for _ in range(draw(low, high))]
    return [(text(1, 12), text(0, 9) + [eos], text(1, 9) + [eos] * draw(0, 2)) for _ in range(n)]


def theirs(rows, policy, reference, tokenizer, loss_type, smoothing, folder):
    """TRL's loss, implied rewards and gradients of the policy."""
    words = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}  # the trainer wants a data set to be built
    trainer = DPOTrainer(
        model=LlamaForCausalLM.from_pretrained(policy), ref_model=LlamaForCausalLM.from_pretrained(reference),
        args=DPOConfig(output_dir=folder, beta=BETA, loss_type=[loss_type], label_smoothing=smoothing,
                       per_device_train_batch_size=len(rows), report_to=[], use_cpu=True, bf16=False,
                       gradient_checkpointing=False),
        processing_class=PreTrainedTokenizerFast.from_pretrained(policy),
        train_dataset=Dataset.from_dict(words))
    names = "prompt_ids", "chosen_ids", "rejected_ids"
    batch = trainer.data_collator([dict(zip(names, row)) for row in rows])
    trainer.model.eval()  # no dropout anyway; only the mode of its own log
    loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    loss.backward()
    log = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    return loss.item(), log, {name: p.grad for name, p in trainer.model.named_parameters()}


def ours(rows, policy, reference, smoothing, folder):
    """The same of train_dpo.py."""
    args = SimpleNamespace(micro_batch=len(rows), max_length=64)
    tokenizer = load_tokenizer(policy)
    frozen = LogProbs(load_policy(reference, tokenizer, torch.float32))
    kept, _ = train_dpo.reference_logprobs(frozen, rows, folder / "reference.npz", "key", tokenizer, args, 0,
                                           1, DEVICE)
    model = load_policy(policy, tokenizer, torch.float32)
    logp = torch.stack(train_dpo.answer_logprobs(LogProbs(model), rows, tokenizer, args, DEVICE))
    chosen, rejected = train_dpo.implied_rewards(logp, torch.tensor(kept).T, BETA)
    loss = train_dpo.dpo_loss(chosen, rejected, smoothing) / len(rows)
    loss.backward()
    log = {"rewards/chosen": chosen.mean().item(), "rewards/rejected": rejected.mean().item(),
           "rewards/margins": (chosen - rejected).mean().item(),
           "rewards/accuracies": train_dpo.wins((chosen - rejected).tolist()) / len(rows)}
    return loss.item(), log, {name: p.grad for name, p in model.named_parameters()}


def main():
    worst = {"loss": 0.0, "gradient": 0.0, "implied rewards": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        folder, tokenizer = Path(folder), make_tokenizer()
        for seed in range(20):
            policy = random_model(2 * seed, tokenizer, folder / f"policy{seed}")
            reference = random_model(2 * seed + 1, tokenizer, folder / f"reference{seed}")
            loss_type, smoothing, n = ("aot", 0.1, 1) if seed % 4 == 3 else ("sigmoid", 0.0, 1 + seed % 6)
            rows = random_pairs(seed, n, len(tokenizer), tokenizer.eos_token_id)
            (folder / "reference.npz").unlink(missing_ok=True)
            loss, log, grads = theirs(rows, policy, reference, tokenizer, loss_type, smoothing, folder)
            our_loss, our_log, our_grads = ours(rows, policy, reference, smoothing, folder)
            assert max(g.abs().max() for g in grads.values()) > 1e-3 and grads.keys() == our_grads.keys()
            worst["loss"] = max(worst["loss"], abs(loss - our_loss))
            worst["gradient"] = max(worst["gradient"], *((grads[name] - our_grads[name]).abs().max().item()
                                                         for name in grads))
            worst["implied rewards"] = max(worst["implied rewards"], *(abs(log[name] - our_log[name])
                                                                       for name in our_log))
    for name, x in worst.items():
        print(f"{name}: largest difference over 20 batches {x:.1e}")
    assert max(worst.values()) <= 1e-5


if __name__ == "__main__":
    main()
