"""What saves memory and time changes no number: log-probs without [B, T, V] logits, micro batches without
padding, one copy of the frozen weights, tau read once."""

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import (AutoModelForCausalLM, CohereConfig, CohereForCausalLM, Gemma2Config,
                          Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM)

import sft
import train_dvpo
import train_gvm
import train_ppo
import train_rm
from common import (chat_ids, collate, freeze, generate, GumbelNoise, load_gvm, load_policy,
                    load_reward_model, load_tokenizer, lora_config, micro_batches, reward_scores, train_only,
                    value_head)
from conftest import metrics, recorded, run_of, run_stage
from plumbing import lean
from plumbing.checks import reward_scale
from plumbing.lean import can_share_prefix, LogProbs, OneBase

CPU, EOS = torch.device("cpu"), 1
PROMPTS = [[0, 3, 6, 9], [0, 20], [0, 3, 6, 9, 15, 7], [0, 4]]
RESPONSES = [[5, 1], [12, 4, 8, 9], [10, 9, 12, 14, 8, 1], [1]]
FLAGS = {"temperature": 0.7, "response_length": 6, "micro_batch": 2}


def batch_of(prompts=PROMPTS, responses=RESPONSES):
    return collate(prompts, responses, EOS)


def inputs_of(batch):
    return {"input_ids": batch.ids, "attention_mask": batch.attention, "position_ids": batch.positions}


def plain_logprobs(model, batch, temperature):
    """The definition of lean.response_logprobs, from the logits of every position: log-probs and entropy,
    [B, R]."""
    logits = model(**inputs_of(batch)).logits[:, batch.P - 1:-1].float() / temperature
    logp = torch.log_softmax(logits, -1)
    return (logp.gather(-1, batch.ids[:, batch.P:, None])[..., 0] * batch.mask,
            -(logp.exp() * logp).sum(-1) * batch.mask)


def asked_for_logprobs(model, batch, **settings):
    """model, to be called for the log-probs of a batch's responses."""
    return partial(model, **inputs_of(batch), states=slice(batch.P - 1, -1), actions=batch.ids[:, batch.P:],
                   mask=batch.mask, **settings)


def tiny(config, model, **extra):
    torch.manual_seed(0)
    return model(config(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, pad_token_id=1,
                        **extra))


def small_head(name):
    """Models that do something to their logits: a cap (Gemma 2), a factor (Cohere), a divisor (Granite)."""
    return {"gemma2": lambda: tiny(Gemma2Config, Gemma2ForCausalLM, head_dim=8, final_logit_softcapping=2.0),
            "cohere": lambda: tiny(CohereConfig, CohereForCausalLM, logit_scale=0.5),
            "granite": lambda: tiny(GraniteConfig, GraniteForCausalLM, logits_scaling=4.0)}[name]()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("chunks", [1, 3, 20])
def test_logprobs_in_chunks_are_the_plain_ones_with_their_gradients(name, chunks, models_folder):
    """Values and gradients of every weight; 20 chunks of 13 tokens leave some chunks empty."""
    model = (AutoModelForCausalLM.from_pretrained(models_folder / name) if name in ("llama", "gpt2")
             else small_head(name)).eval()
    batch, weights = batch_of(), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    wanted, entropy = plain_logprobs(model, batch, 0.7)
    (wanted * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ask = asked_for_logprobs(LogProbs(model), batch, temperature=0.7, chunks=chunks)
    got, none = ask()
    assert none is None and torch.allclose(got, wanted, atol=1e-5)
    (got * weights).sum().backward()
    assert gradients and all(torch.allclose(p.grad, gradients[n], atol=1e-5, rtol=1e-4)
                             for n, p in model.named_parameters() if n in gradients)
    with torch.no_grad():
        got, found = ask()
    assert torch.allclose(got, wanted, atol=1e-5)
    assert torch.allclose(found, entropy, atol=1e-4)
    assert torch.equal(LogProbs(model)(**inputs_of(batch)).logits, model(**inputs_of(batch)).logits)


def test_no_tensor_of_all_logits_is_made(models_folder):
    """The head sees answer tokens only, a chunk at a time, in both directions."""
    model = load_policy(models_folder / "llama", load_tokenizer(models_folder / "llama"), torch.float32)
    asked, seen = LogProbs(model), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    batch = batch_of()
    logp, _ = asked_for_logprobs(asked, batch, temperature=1.0, chunks=4)()
    logp.sum().backward()
    assert [shape[0] for shape in seen[:4]] == [4, 3, 3, 3] and len(seen) == 8  # 13 tokens, there and back
    assert sum(shape[0] for shape in seen[:4]) == batch.mask.sum()


def test_micro_batches_cover_every_row_once_and_hold_no_column_of_padding():
    batch, seen = batch_of(), []
    parts = list(micro_batches(batch, range(4), 2))
    for rows, part in parts:
        seen += rows
        assert part.attention[:, :part.P].any(0).all() and part.mask.any(0).all()
        for row, ids, attention, positions, mask in zip(rows, *part[:4]):
            assert ids[attention.bool()].tolist() == PROMPTS[row] + RESPONSES[row]
            assert positions[attention.bool()].tolist() == list(range(len(PROMPTS[row] + RESPONSES[row])))
            assert mask.sum() == len(RESPONSES[row])
    assert sorted(seen) == [0, 1, 2, 3]
    assert sum(part.ids.numel() for _, part in parts) < batch.ids.numel()
    assert [len(rows) for rows, _ in micro_batches(batch, [2, 0, 1], 2)] == [2, 1]


@torch.no_grad()
def test_bucketed_numbers_are_the_unbucketed_ones(models_folder):
    folder, batch = models_folder / "llama", batch_of()
    model = LogProbs(load_policy(folder, load_tokenizer(folder), torch.float32)).eval()
    wanted, _ = train_dvpo.response_logprobs(model, batch, run_of(**FLAGS))
    for rows, part in micro_batches(batch, range(4), 2):
        got, _ = train_dvpo.response_logprobs(model, part, run_of(**FLAGS))
        assert torch.allclose(got, wanted[rows, :got.shape[1]], atol=1e-5)
        assert not wanted[rows, got.shape[1]:].any()


# ---- one copy of the weights ----

def lora_of(model):
    return lora_config(model, "CAUSAL_LM", SimpleNamespace(lora_r=4, lora_alpha=8), init_lora_weights=False)


@torch.no_grad()
@pytest.mark.parametrize("lora", [False, True])
def test_one_base_says_what_separate_models_say(lora, chain):
    """Reference, GVM and a LoRA policy, in turn and again: nothing of one role stays behind for the next."""
    tokenizer, inputs = load_tokenizer(chain.sft), inputs_of(batch_of())
    reference = load_policy(chain.sft, tokenizer, torch.float32).eval()
    gvm = load_gvm(chain.gvm, torch.float32)[0].eval()
    base = load_policy(chain.sft, tokenizer, torch.float32)
    adapter = lora_of(base) if lora else None
    torch.manual_seed(3)
    one = OneBase(base, load_gvm(chain.gvm, torch.float32, lm=base)[0], adapter).eval()
    if lora:
        train_only(one, ".policy.")
    else:
        freeze(one, {}, CPU)
    policies = []
    for _ in range(2):
        assert torch.equal(one(role="reference", **inputs).logits, reference(**inputs).logits)
        assert torch.allclose(one(role="gvm", **inputs).logits, gvm(**inputs).logits, atol=1e-6)
        if lora:
            policies.append(one(**inputs).logits)
            assert (policies[-1] - reference(**inputs).logits).abs().max() > 0.1
    assert not lora or torch.equal(*policies)
    trained = {name for name, p in one.named_parameters() if p.requires_grad}
    assert all(".policy." in name for name in trained) and bool(trained) == lora


@pytest.mark.parametrize("lora", [False, True])
def test_one_base_never_changes_what_is_trained(lora, chain, baseline):
    """Every other parameter asks for a gradient: still exactly these after each role, in turn and backwards,
    in training and in generation."""
    tokenizer, batch = load_tokenizer(chain.sft), batch_of()
    base = load_policy(chain.sft, tokenizer, torch.float32)
    if lora:
        one = OneBase(base, lora=lora_of(base), reward=(baseline.rm, *reward_scale(baseline.rm)))
    else:
        one = OneBase(base, load_gvm(chain.gvm, torch.float32, lm=base)[0])
    roles = ["reference", *(["policy", "critic", "reward"] if lora else ["gvm"])]
    for i, p in enumerate(one.parameters()):
        p.requires_grad_(i % 2 == 0)
    marked = {name: p.requires_grad for name, p in one.named_parameters()}
    assert len(set(marked.values())) == 2
    for mode in (one.train, one.eval):
        mode()
        for role in roles + roles[::-1]:
            one(role=role, **inputs_of(batch)).logits.sum().backward()
            assert {name: p.requires_grad for name, p in one.named_parameters()} == marked, role
    if lora:
        generate(one, PROMPTS, range(4), 2, 1.0, tokenizer, CPU)
    assert {name: p.requires_grad for name, p in one.named_parameters()} == marked


def test_one_base_holds_one_copy(chain):
    """Its parameters are those of the reference, the GVM's adapter and head, and the policy's adapter."""
    tokenizer = load_tokenizer(chain.sft)
    base = load_policy(chain.sft, tokenizer, torch.float32)
    weights, lora = sum(p.numel() for p in base.parameters()), lora_of(base)
    gvm = load_gvm(chain.gvm, torch.float32, lm=base)[0]
    adapter = sum(p.numel() for name, p in gvm.named_parameters() if "lora_" in name)
    one = OneBase(base, gvm, lora)
    policy = sum(p.numel() for p in train_only(one, ".policy.")[0])
    heads = 2 * (32 + 1)  # peft keeps the head that it replaces
    assert policy > 0 and sum(p.numel() for p in one.parameters()) == weights + adapter + heads + policy
    paths = list(one.named_modules(remove_duplicate=False))
    assert len({id(module) for _, module in paths}) == len(paths)


def test_a_gvm_of_another_base_is_loaded_on_its_own(chain, flags, tmp_path, monkeypatch):
    """Its weights are not the reference's: --sft_model is a copy in another place."""
    shutil.copytree(chain.sft, tmp_path / "sft")
    frozen = []
    recorded(monkeypatch, train_dvpo, "freeze", frozen)
    run_stage(train_dvpo, **flags.dvpo, sft_model=tmp_path / "sft", value_model=chain.gvm,
              output_dir=tmp_path / "a")
    assert [type(args[0]).__name__ for args, _ in frozen] == ["OneBase", "PeftModelForTokenClassification"]
    assert (tmp_path / "a/model.safetensors").exists()
    # and the numbers are the same as with one copy
    for x, y in zip(metrics(tmp_path / "a"), metrics(chain.dvpo), strict=True):
        for name in ("objective/kl", "gvm/mean", "advantages/std", "policy/approxkl_avg"):
            assert x[name] == pytest.approx(y[name], abs=1e-5), name


@torch.no_grad()
def test_reward_model_and_critic_on_one_base_say_what_separate_ones_say(chain, baseline):
    """Scores and the critic's start, standardized, between calls of the other roles; only policy and critic
    are trained."""
    tokenizer = load_tokenizer(chain.sft)
    scores, rm_tokenizer, center, scale = load_reward_model(baseline.rm, torch.float32)
    critic = train_ppo.load_critic(baseline.rm, torch.float32).eval()
    reference = load_policy(chain.sft, tokenizer, torch.float32).eval()
    base = load_policy(chain.sft, tokenizer, torch.float32)
    one = OneBase(base, lora=lora_of(base), reward=(baseline.rm, center, scale)).eval()
    learned = sum(train_only(one, ".policy.", ".critic."), [])
    batch = batch_of()
    inputs = inputs_of(batch)
    chats = [([{"role": "user", "content": "is thing1 red ?"}], "yes it is red"),
             ([{"role": "user", "content": "is it ?"}], "no .")]
    wanted = [(x - center) / scale for x in reward_scores(scores, rm_tokenizer, chats, CPU, 2)]
    for _ in range(2):
        got = reward_scores(partial(one, role="reward"), rm_tokenizer, chats, CPU, 2)
        assert got == pytest.approx(wanted, abs=1e-5) and wanted[0] != pytest.approx(wanted[1], abs=1e-3)
        assert torch.allclose(train_ppo.response_values(partial(one, role="critic"), batch),
                              train_ppo.response_values(critic, batch), atol=1e-5)
        assert torch.equal(one(role="reference", **inputs).logits, reference(**inputs).logits)
        assert not torch.allclose(one(**inputs).logits, reference(**inputs).logits)
    trained = [name for name, p in one.named_parameters() if p.requires_grad]
    assert all(".policy." in name or ".critic." in name for name in trained)
    assert len(trained) == len(learned) > 0
    assert "heads.critic.weight" in trained


def test_ppo_on_one_base_steps_as_with_separate_models(chain, baseline, flags, tmp_path, monkeypatch):
    """The first step of the policy, whose advantages come from the same scores and values; gradients are
    computed again in backward, which must find the critic's adapter on. In the second step the critic has
    moved, and the reward model has not."""
    seen, one_base = [], OneBase

    def seeded(*args, **kwargs):
        torch.manual_seed(3)  # the policy's new adapter
        return one_base(*args, **kwargs)
    for module in (train_ppo, lean):
        monkeypatch.setattr(module, "OneBase", seeded)
    recorded(monkeypatch, train_ppo, "update", seen)
    run = {**flags.ppo, "sft_model": chain.sft, "reward_model": baseline.rm, "lora_r": 4, "lora_alpha": 64,
           "max_steps": 2, "max_grad_norm": 1e6, "gradient_checkpointing": True, "critic_lr": 1e-2}
    for share in (False, True):
        run_stage(train_ppo, **run, share_base=share, output_dir=tmp_path / str(share))
    apart, shared = metrics(tmp_path / "False"), metrics(tmp_path / "True")
    for name in ("objective/scores", "objective/kl", "critic/mean", "advantages/std", "loss/policy_avg",
                 "policy/approxkl_avg", "val/ratio_var"):
        assert shared[0][name] == pytest.approx(apart[0][name], abs=1e-5), name
    for name in ("objective/kl", "objective/scores", "policy/entropy_avg"):  # the policy moved as there
        assert shared[1][name] == pytest.approx(apart[1][name], abs=1e-4), name
    assert shared[1]["objective/kl"] != 0 and apart[0]["policy/updates"] > 1
    one = seen[-1][0][0].policy.module
    weights = dict(one.named_parameters())
    moved = {name.replace(".critic.", ".reward.") for name, p in weights.items() if ".critic." in name
             and not torch.equal(p, weights[name.replace(".critic.", ".reward.")])}
    assert {"heads.reward.weight", "heads.reward.bias"} < moved and any("lora_B" in name for name in moved)
    base = load_policy(chain.sft, load_tokenizer(chain.sft), torch.float32)
    fresh = OneBase(base, lora=lora_of(base), reward=(baseline.rm, *reward_scale(baseline.rm)))
    assert all(torch.equal(p, weights[name]) for name, p in fresh.named_parameters() if ".reward." in name)
    assert (tmp_path / "True/model.safetensors").exists()


# ---- tau is read once ----

TAU = [("is thing1 red ?", "yes it is red"), ("is thing2 blue ?", "no .")]


def system(text):
    return [{"role": "system", "content": text}] if text else []


@pytest.mark.parametrize("systems", [("", "", ""), ("is", "is", "is"), ("is", "not", "")])
def test_values_do_not_depend_on_reading_tau_once(systems, chain, monkeypatch):
    """Against every row read alone, with its own tau. Behind unequal system messages no row begins with the
    same tokens as the next, but for one or two."""
    tokenizer, gvm = load_tokenizer(chain.sft), load_gvm(chain.gvm, torch.float32)[0].eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(value_head(gvm.get_base_model()).modules_to_save["default"].weight)
    rows = [{"prompt": system(s) + [{"role": "user", "content": f"is thing{i} {colour} ?"}],
             "response_ids": ids}
            for i, (s, colour, ids) in enumerate(zip(systems, ("red", "blue is it", "green"), RESPONSES))]
    reads, prefixes = [], []
    assert can_share_prefix(gvm, 128, CPU)  # tried once, here
    recorded(monkeypatch, train_dvpo, "SharedPrefix", prefixes)
    hook = gvm.register_forward_pre_hook(lambda module, args, kwargs: reads.append(kwargs["input_ids"].shape),
                                         with_kwargs=True)
    got = train_dvpo.gvm_values(gvm, rows, TAU, run_of(tokenizer, **FLAGS))
    hook.remove()
    (_, prefix), = prefixes
    (one, n), *micro = reads  # the prefix, then two micro batches of what is left
    assert (one, n) == (1, prefix.cache.get_seq_length()) and [size for size, _ in micro] == [2, 1]
    assert len(set(systems)) > 1 or n > 15
    for row, values, rest in zip(rows, got, prefix.rest):
        prompt, T = chat_ids(tokenizer, row["prompt"], TAU), len(row["response_ids"])
        assert len(prompt) == n + len(rest)
        with torch.no_grad():
            alone = gvm(**inputs_of(batch_of([prompt], [row["response_ids"]]))).logits[0, len(prompt) - 1:, 0]
        assert values[:1 + T].tolist() == pytest.approx(alone.tolist(), abs=1e-5)
        assert not values[1 + T:].any()


# ---- sampling ----

def test_the_samplers_own_logprobs_are_the_training_forwards(models_folder, monkeypatch):
    """What generate() drew from, token by token and with a cache, is what response_logprobs says of it."""
    tokenizer = load_tokenizer(models_folder / "llama")
    model, drawn = load_policy(models_folder / "llama", tokenizer, torch.float32), []

    def noisy(self, ids, scores):
        choice = original(self, ids, scores)
        logp = torch.log_softmax(scores.float() / self.temperature, -1)
        drawn.append(logp.gather(-1, choice.argmax(-1, keepdim=True))[:, 0])
        return choice
    original = GumbelNoise.__call__
    monkeypatch.setattr(GumbelNoise, "__call__", noisy)
    answers = generate(model, PROMPTS, [1, 2, 3, 4], 6, 0.7, tokenizer, CPU)
    drawn = torch.stack(drawn, 1)                                                        # [B, R]
    batch = collate(PROMPTS, answers, EOS)
    with torch.no_grad():
        logp, _ = train_dvpo.response_logprobs(LogProbs(model), batch, run_of(**FLAGS))
    assert batch.mask.sum() > 8
    assert torch.allclose(logp[batch.mask], drawn[:, :logp.shape[1]][batch.mask], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "one base"])
def test_a_static_cache_samples_the_same(name, models_folder, monkeypatch):
    """With prompts below and above 64 tokens. On a CPU transformers does not compile."""
    folder = models_folder / name.replace("one base", "llama")
    tokenizer, seeds = load_tokenizer(folder), range(1, 5)
    model = load_policy(folder, tokenizer, torch.float32)
    if name == "one base":
        model = OneBase(model, lora=lora_of(model))
    kinds, family = [], type(getattr(model, "lm", model))
    generate_ = family.generate
    monkeypatch.setattr(family, "generate", lambda self, ids, **kwargs: kinds.append(
        (ids.shape[1], kwargs["generation_config"].cache_implementation)) or generate_(self, ids, **kwargs))
    for prompts in (PROMPTS, [PROMPTS[1] * 40, *PROMPTS[:3]]):
        plain, static = (generate(model, prompts, seeds, 12, 0.7, tokenizer, CPU, static)
                         for static in (False, True))
        assert plain == static and len(set(map(tuple, plain))) > 1
    assert kinds == [(6, None), (64, "static"), (80, None), (128, "static")]


# ---- gradient checkpointing ----

@pytest.mark.parametrize("lora_r", [0, 4])
def test_gradient_checkpointing_changes_no_number(lora_r, chain, flags, tmp_path):
    """With a LoRA policy GVM and policy are one model: its layers must not drop tau's cache."""
    rows = []
    for on in (False, True):
        run_stage(train_dvpo, **flags.dvpo, sft_model=chain.sft, value_model=chain.gvm, lora_r=lora_r,
                  gradient_checkpointing=on, output_dir=tmp_path / str(on))
        rows.append(metrics(tmp_path / str(on)))
    for off, on in zip(*rows, strict=True):
        for name in ("objective/kl", "gvm/mean", "gvm/drift", "advantages/std", "policy/approxkl_avg",
                     "grad_norm"):
            assert on[name] == pytest.approx(off[name], abs=1e-5, rel=1e-4), name


@pytest.mark.parametrize("stage, name", [(sft, "sft"), (train_gvm, "gvm"), (train_rm, "rm"),
                                         (train_ppo, "ppo")])
def test_gradient_checkpointing_in_every_stage(stage, name, chain, baseline, flags, tmp_path):
    folders = {"sft": {}, "gvm": {"sft_model": chain.sft}, "rm": {"sft_model": chain.sft},
               "ppo": {"sft_model": chain.sft, "reward_model": baseline.rm}}[name]
    run_stage(stage, **getattr(flags, name), **folders, gradient_checkpointing=True, output_dir=tmp_path)
    wanted = metrics({"sft": chain.sft, "gvm": chain.gvm, "rm": baseline.rm, "ppo": baseline.ppo}[name])
    for got, row in zip(metrics(tmp_path), wanted, strict=True):
        assert got["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)
