"""Families of decoders, with tiny random weights: what is true of the Llama is true of the others. A handful
runs with every test, the rest where the slow ones do."""

from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import sft
import train_dvpo
import train_gvm
import train_ppo
import train_rm
from common import (chat_ids, collate, generate, load_gvm, load_policy, load_tokenizer, load_value_base,
                    value_head)
from conftest import CONTEXT, run_of, run_stage, word_tokenizer, WORDS
from plumbing import lean
from plumbing.errors import BadInput
from plumbing.lean import LogProbs, OneBase, SharedPrefix

CPU = torch.device("cpu")
PROMPTS = [[0, 3, 6, 9], [0, 20], [0, 3, 6, 9, 15, 7]]
RESPONSES = [[5, 1], [12, 4, 8, 9], [10, 9, 12, 14, 8, 1]]
TAU = [("is thing1 red ?", "yes it is red"), ("is thing2 blue ?", "no .")]

# Under each of its names that a config has
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), CONTEXT),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "head_dim"), 8),
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "rotary_dim": 4, "sliding_window": 24, "vocab_size": len(WORDS),
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
OF_ITS_OWN = {"gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 24},
              "falcon": {"head_dim": None}, "falcon alibi": {"head_dim": None, "alibi": True},
              "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
              "diffllama": {"attention_dropout": 0.0},  # it refuses another
              "qwen2 window": {"use_sliding_window": True, "max_window_layers": 0}}
QUICK = ["mpt", "biogpt", "qwen3_next", "mistral", "gpt_neox"]
SLOW = ["llama", "gpt2", "bloom", "falcon", "falcon alibi", "gemma", "gemma2", "glm", "glm4", "gpt_bigcode",
        "gpt_neo", "gpt_oss", "helium", "minimax", "ministral", "ministral3", "mixtral", "nemotron",
        "persimmon", "phi", "phi3", "qwen2", "qwen2 window", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss",
        "smollm3", "stablelm", "starcoder2", "apertus", "arcee", "diffllama", "exaone4"]
WITHOUT_VALUES = ["opt", "cohere", "cohere2", "granite", "gptj", "codegen", "olmo2", "olmoe", "xglm",
                  "ernie4_5", "gemma3_text", "hunyuan_v1_dense"]


def of(*quick, slow):
    return [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


VALUED = of(*QUICK, slow=SLOW)
ALL = of(*QUICK, "opt", slow=SLOW + WITHOUT_VALUES[1:])


def config_of(family, dropout=0.0):
    """A tiny model's; dropout: of all of its keys that are one."""
    kind = family.split()[0]
    names = {name for name in vars(AutoConfig.for_model(kind)) if not name.startswith("_")}
    sizes = {**SIZES, **dict.fromkeys([name for name in names if "drop" in name
                                       and isinstance(getattr(AutoConfig.for_model(kind), name), float)],
                                      dropout)}
    given = {**{name: size for name, size in sizes.items() if name in names}, **OF_ITS_OWN.get(family, {})}
    return AutoConfig.for_model(kind, **{name: x for name, x in given.items() if x is not None})


def random_weights(model):
    """Wide enough that every token changes what comes after it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture
def saved(tmp_path):
    """Writes a family's model, with its dropout on, and returns its folder."""
    def write(family, dropout=0.3):
        model = random_weights(AutoModelForCausalLM.from_config(config_of(family, dropout)))
        model.save_pretrained(tmp_path / "model")
        word_tokenizer().save_pretrained(tmp_path / "model")
        return tmp_path / "model"
    return write


def inputs_of(batch):
    return {"input_ids": batch.ids, "attention_mask": batch.attention, "position_ids": batch.positions}


def assert_rows(got, wanted):
    for row, numbers in zip(got, wanted, strict=True):
        assert row[:len(numbers)].tolist() == pytest.approx(numbers, abs=2e-4, rel=1e-4)
        assert not row[len(numbers):].any()


@torch.no_grad()
@pytest.mark.parametrize("family", ALL)
def test_logprobs_of_every_family(family, saved, models_folder):
    """Alone, beside longer rows, and by a loop over tokens that reads each prefix anew: the same."""
    folder, tokenizer = saved(family), load_tokenizer(models_folder / "llama")
    model = load_policy(folder, tokenizer, torch.float32).eval()
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    wanted = [[torch.log_softmax(plain(torch.tensor([prompt + response[:t]])).logits[0, -1], -1)[token].item()
               for t, token in enumerate(response)] for prompt, response in zip(PROMPTS, RESPONSES)]
    run = run_of(tokenizer, temperature=1.0, response_length=6)
    for rows in ([0, 1, 2], [0], [1], [2]):
        batch = collate([PROMPTS[i] for i in rows], [RESPONSES[i] for i in rows], 1)
        logp, _ = train_dvpo.response_logprobs(LogProbs(model), batch, run)
        assert_rows(logp, [wanted[i] for i in rows])


@torch.no_grad()
@pytest.mark.parametrize("family", VALUED)
def test_values_of_every_family(family, saved, models_folder, capsys):
    """Alone, beside longer rows, and behind a tau that is read once where the model can: the same."""
    tokenizer = load_tokenizer(models_folder / "llama")
    model = load_value_base(saved(family), torch.float32)
    random_weights(value_head(model.eval()))
    rows = [{"prompt": [{"role": "user", "content": text}], "response_ids": ids}
            for text, ids in zip(("is thing0 red ?", "is it", "is thing2 green ? is it not blue"), RESPONSES)]
    wanted = []
    for row in rows:
        prompt = chat_ids(tokenizer, row["prompt"], TAU)
        logits = model(torch.tensor([prompt + row["response_ids"]])).logits[0, :, 0]
        wanted.append(logits[len(prompt) - 1:].tolist())
    assert max(map(max, wanted)) - min(map(min, wanted)) > 0.1
    for size in (1, 3):
        assert_rows(train_dvpo.gvm_values(model, rows, TAU, run_of(tokenizer, micro_batch=size)), wanted)
    batch = collate([chat_ids(tokenizer, row["prompt"], TAU) for row in rows], RESPONSES, 1)
    padded = model(**inputs_of(batch)).logits[:, batch.P - 1:, 0]
    assert_rows(padded * torch.cat([batch.mask[:, :1], batch.mask], 1), wanted)
    assert capsys.readouterr().out.count("cannot share it") == (family in CANNOT_SHARE)


@torch.no_grad()
@pytest.mark.parametrize("family", VALUED)
def test_attention_in_parts_of_every_family(family, saved, monkeypatch):
    monkeypatch.setattr(lean, "PART", 8)
    model = load_value_base(saved(family), torch.float32).eval()
    if model.config._attn_implementation != "sdpa":
        pytest.skip("it is not computed by that function")
    inputs = inputs_of(collate([ids * 8 for ids in PROMPTS], RESPONSES, 1))
    whole = model(**inputs).logits
    model.set_attn_implementation("sdpa_in_parts")
    seen = inputs["attention_mask"].bool()
    assert torch.allclose(model(**inputs).logits[seen], whole[seen], atol=1e-5)


CANNOT_SHARE = {"mpt", "falcon", "qwen3_next", "minimax",  # slots that are counted, a state in the cache
                "mistral", "gemma2", "gpt_neo", "gpt_oss", "ministral", "ministral3", "mixtral", "phi3",
                "starcoder2", "exaone4", "qwen2 window"}  # a window that is shorter than the rows


@torch.no_grad()
def test_no_prefix_is_shared_without_a_use_or_under_sliding_windows(chain, capsys):
    """Each prompt stays whole then, of a plain model and of a role on one base. What is shared ends before
    the last token of the shortest prompt. A window counts once rows may be longer than it."""
    base = load_policy(chain.sft, load_tokenizer(chain.sft), torch.float32)
    prompts = [[0, 3, 6], [0, 3, 6, 9]]
    config = config_of("mistral")
    config.sliding_window = 48
    windowed = random_weights(AutoModelForCausalLM.from_config(config)).eval()
    for plain in (base, windowed):
        for model in (plain, partial(OneBase(plain), role="reference")):
            assert SharedPrefix(model, prompts, True, CPU).rest == [[6], [6, 9]]
            assert SharedPrefix(model, prompts, False, CPU).rest == prompts
    assert not capsys.readouterr().out
    for model in (windowed, partial(OneBase(windowed), role="reference")):
        assert SharedPrefix(model, prompts, True, CPU, [[3] * 60]).rest == prompts
        assert SharedPrefix(model, prompts, True, CPU).rest == prompts  # it was found out
    assert SharedPrefix(base, prompts, True, CPU, [[3] * 60]).rest == [[6], [6, 9]]
    assert capsys.readouterr().out.count("mistral cannot share it") == 2


@torch.no_grad()
def test_a_class_that_swallows_the_cache_reads_prompts_whole(chain, monkeypatch):
    """Where the library gives the argument another name, a model with **kwargs would pass over tau."""
    gvm, prompts = load_gvm(chain.gvm, torch.float32)[0].eval(), [[0, 3, 6, 9, 15], [0, 3, 6, 9, 15, 7]]
    monkeypatch.setattr(lean, "CACHE", "keys_and_values")
    assert SharedPrefix(gvm, prompts, True, CPU).rest == prompts


@torch.no_grad()
@pytest.mark.parametrize("family", ALL)
def test_train_mode_changes_nothing_in_any_family(family, saved, models_folder):
    """Though every dropout of its config is 0.3."""
    model = load_policy(saved(family), load_tokenizer(models_folder / "llama"), torch.float32)
    inputs = inputs_of(collate(PROMPTS, RESPONSES, 1))
    still = model.eval()(**inputs).logits
    assert torch.equal(model.train()(**inputs).logits, model(**inputs).logits)
    assert torch.allclose(model(**inputs).logits, still, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ALL)
def test_greedy_answers_of_every_family(family, saved, models_folder):
    """As stock transformers gives them to each prompt alone."""
    folder, tokenizer = saved(family), load_tokenizer(models_folder / "llama")
    model = load_policy(folder, tokenizer, torch.float32)
    answers = generate(model, PROMPTS, range(3), 8, 0.0, tokenizer, CPU)
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, answer in zip(PROMPTS, answers):
        whole = stock.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(),
                               do_sample=False, max_new_tokens=8, pad_token_id=1)[0, len(prompt):].tolist()
        assert answer == whole[:len(answer)] and (len(answer) == len(whole) or answer[-1] == 1)


@pytest.mark.parametrize("family", of("opt", slow=WITHOUT_VALUES[1:]))
def test_a_family_without_values(family, saved, flags, tmp_path, capsys):
    """It can be tuned, with a warning; no value model is built on it, and a reward model where it can be."""
    folder = saved(family, 0.0)
    run_stage(sft, **{**flags.sft, "model": folder, "max_steps": 1, "output_dir": tmp_path / "sft"})
    assert "no TokenClassification class for its family" in capsys.readouterr().out
    for stage, settings in ((train_gvm, flags.gvm), (train_rm, flags.rm)):
        given = {**settings, "sft_model": tmp_path / "sft", "output_dir": tmp_path / "out", "max_steps": 1}
        scores = type(config_of(family)) in AutoModelForSequenceClassification._model_mapping
        if stage is train_rm and scores:
            run_stage(stage, **given)
        else:
            with pytest.raises(BadInput, match="no (Token|Sequence)Classification class for its family"):
                run_stage(stage, **given)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mpt", "biogpt", "qwen3_next", "gpt_neox", "falcon", "gpt_oss"])
def test_a_family_through_the_method(family, saved, flags, tmp_path, capsys):
    """sft.py, train_gvm.py, train_dvpo.py, train_rm.py and train_ppo.py: the self-checks hold."""
    at = {"sft": {"model": saved(family, 0.1)}, "gvm": {"sft_model": tmp_path / "sft"},
          "rm": {"sft_model": tmp_path / "sft"},
          "dvpo": {"sft_model": tmp_path / "sft", "value_model": tmp_path / "gvm"},
          "ppo": {"sft_model": tmp_path / "sft", "reward_model": tmp_path / "rm"}}
    for stage, name in ((sft, "sft"), (train_gvm, "gvm"), (train_dvpo, "dvpo"), (train_rm, "rm"),
                        (train_ppo, "ppo")):
        given = {**getattr(flags, name), "max_steps": 2, **at[name]}
        if family == "qwen3_next" and name in ("gvm", "rm"):
            given["lora_dropout"] = 0  # peft has none on its experts
        run_stage(stage, **given, output_dir=tmp_path / name)
    assert capsys.readouterr().out.count("self-check: max |ratio - 1|") == 2
