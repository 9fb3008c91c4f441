"""Folders of models that are not what they seem: the right number, or one sentence that names them."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import models, pre_tokenizers, Tokenizer
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          PreTrainedTokenizerFast)

import common
import evaluate
import judge
import sft
import train_dvpo
import train_grpo
import train_gvm
import train_ppo
import train_remax
import train_rm
from common import (collate, disable_dropout, load_gvm, load_policy, load_reward_model, load_tokenizer,
                    load_value_base, reward_scores)
from conftest import (copy_of, edit_json, edit_weights, ROOT, run_stage, TEMPLATE, tiny_gpt2, tiny_llama,
                      word_tokenizer, WORDS, write_jsonl)
from plumbing import rl
from plumbing.checks import check_model, check_reading
from plumbing.errors import BadInput
from plumbing.lean import LogProbs, OneBase
from plumbing.log import MetricLog

CPU = torch.device("cpu")
USER = [{"role": "user", "content": "is thing1 red ?"}]


def save(model, place):
    model.save_pretrained(place)
    word_tokenizer().save_pretrained(place)
    return place


def tiny(kind, auto=AutoModelForCausalLM, **changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.3,
             "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
    return auto.from_config(AutoConfig.for_model(kind, **{**sizes, **changes}))


# ---- dropout ----

@pytest.mark.parametrize("kind, changes", [
    ("llama", {"attention_dropout": 0.1}), ("biogpt", {}), ("gpt2", {"resid_pdrop": 0.2}),
    ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.25})])
def test_what_is_saved_has_the_dropout_that_the_model_came_with(kind, changes, flags, tmp_path):
    """In the run it is off, in config and modules; through sft.py, whose model the next stages read."""
    save(tiny(kind, **changes), tmp_path / "model")
    came = json.loads((tmp_path / "model/config.json").read_text())
    run_stage(sft, **{**flags.sft, "model": tmp_path / "model", "max_steps": 1}, output_dir=tmp_path / "sft")
    saved = json.loads((tmp_path / "sft/config.json").read_text())
    dropout = {name: value for name, value in came.items() if "drop" in name}
    assert any(dropout.values()) and dropout == {name: saved[name] for name in dropout}
    model = load_policy(tmp_path / "sft", load_tokenizer(tmp_path / "sft"), torch.float32)
    assert not any(getattr(model.config, name) for name in dropout)


def test_everything_random_in_train_mode_is_off_by_its_name():
    """Attributes that are no module, drop path, router noise; other numbers and switches stay."""
    model = tiny("llama")
    model.model.layers[0].drop_path, model.model.layers[1].router_jitter_noise = 0.3, 0.01
    model.model.extra = torch.nn.Sequential(torch.nn.Dropout2d(0.4), torch.nn.LSTM(2, 2, dropout=0.0))
    model.model.extra[1].dropout, model.model.extra[1].p, model.model.drops = 0.5, 0.6, True
    disable_dropout(model)
    assert model.model.layers[0].drop_path == model.model.layers[1].router_jitter_noise == 0
    assert model.model.extra[0].p == model.model.extra[1].dropout == 0
    assert model.model.extra[1].p == 0.6 and model.model.drops is True


def test_the_dropout_that_was_asked_for_stays(chain, flags, monkeypatch):
    """--lora_dropout of the stages that have it."""
    for stage, settings in ((train_gvm, flags.gvm), (train_rm, flags.rm)):
        args = stage.Args(**{k: v for k, v in settings.items() if k in stage.Args.__dataclass_fields__})
        args.lora_dropout, seen = 0.35, []
        monkeypatch.setattr("deepspeed.initialize", lambda model, **_: (seen.append(model), 0))
        stage.load_model(chain.sft, {}, args)
        assert {m.p for m in seen[0].modules() if isinstance(m, torch.nn.Dropout) and m.p} == {0.35}


# ---- the self-check ----

LLAMA2 = ("{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + ' user : ' + m['content'] }}"
          "{% else %}{{ ' assistant : ' + m['content'] + ' ' + eos_token + ' ' }}{% endif %}{% endfor %}")
TURNS = USER + [{"role": "assistant", "content": "no ."}] + USER


@pytest.mark.parametrize("change, wrong", [
    ({}, None), ({"ratio": 0.26}, "policy that is trained"),
    ({"ratio": float("nan")}, "policy that is trained"), ({"kl": 0.05}, "reference"),
    ({"kl": -0.05}, "reference"), ({"kl": float("nan")}, "reference"),
    ({"ratio": 0.26, "kl": 0.01, "dtype": torch.bfloat16}, None),
    ({"ratio": 1.5, "dtype": torch.bfloat16}, "policy that is trained"),
    ({"kl": 0.5, "dtype": torch.bfloat16}, "reference"),
    ({"template": "{{ bos_token + ' ' }}" + TEMPLATE}, "two BOS"),
    ({"template": TEMPLATE.replace("{{ bos_token }}", "")}, None),
    ({"template": LLAMA2, "chat": TURNS}, None), ({"bos_token": None}, None)])
def test_the_self_check_checks(change, wrong, capsys):
    """Ratio 1, KL 0 and one BOS; a template that writes none, or one a turn, is its model's own way."""
    tokenizer = word_tokenizer(template=change.get("template", TEMPLATE),
                               **({"bos_token": None} if "bos_token" in change else {}))
    if "bos_token" in change:
        tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    ids = common.chat_ids(tokenizer, change.get("chat", USER))
    batch, row = collate([ids], [[3, 5, 1]], 1), {"prompt_ids": ids}
    check = lambda: rl.self_check(row, batch, change.get("kl", 0.0), change.get("ratio", 0.0), tokenizer,
                                  change.get("dtype", torch.float32))
    if wrong:
        with pytest.raises(BadInput, match=f"self-check: .*{wrong}"):
            check()
    else:
        check()
    assert "self-check: max |ratio - 1|" in capsys.readouterr().out


@pytest.mark.parametrize("name, numbers, said", [
    ("gvm/drift", [0.2, 0.45, 0.45, 0.45, 0.45, 0.45], "warning: gvm/drift is 0.45 on average of five steps"),
    ("gvm/drift", [0.45, 0.45, 0.45, 0.45], ""), ("gvm/drift", [0.9, 0.3, 0.2, 0.2, 0.3], ""),
    ("objective/kl", [0.0, -1.1], "warning: KL"), ("objective/kl", [-1.1, 0.0], ""),
    ("policy/clipfrac_avg", [0.31], "warning: more than 30 %"), ("policy/clipfrac_avg", [0.3], ""),
    ("completions/clipped_ratio", [0.51], "warning: most answers"), ("completions/clipped_ratio", [0.5], "")])
def test_the_log_warns(name, numbers, said, tmp_path, capsys):
    """The drift by five steps together, because one step's is noisy; the others by the last step alone."""
    log = MetricLog(tmp_path, SimpleNamespace(track=False), [], len(numbers) + 1)
    for step, number in enumerate(numbers):
        log.write(step, {"objective/kl": 0.0, "completions/clipped_ratio": 0.0, name: number})
    capsys.readouterr()
    rl.warn(log.last_rows)
    found = capsys.readouterr().out
    assert found.startswith(said) and bool(found) == bool(said)


@pytest.mark.parametrize("stage, name", [(train_dvpo, "dvpo"), (train_ppo, "ppo"), (train_remax, "remax"),
                                         (train_grpo, "grpo")])
def test_an_overlooked_dropout_ends_the_run(stage, name, chain, baseline, flags, tmp_path, monkeypatch):
    folder = copy_of(chain.sft, tmp_path / "sft")
    edit_json(folder / "config.json", attention_dropout=0.5)
    monkeypatch.setattr(common, "disable_dropout", lambda model: model)
    with pytest.raises(BadInput, match="self-check: the policy that is trained does not say"):
        run_stage(stage, **{**getattr(flags, name), "max_steps": 1, "sft_model": folder},
                  **({"value_model": chain.gvm} if stage is train_dvpo else {"reward_model": baseline.rm}),
                  output_dir=tmp_path / "out")
    assert not (tmp_path / "out/model.safetensors").exists()


# ---- encoders ----

@pytest.mark.parametrize("kind", ["bert", "electra", "roberta", "bart", "roformer"])
def test_an_encoder_is_no_reward_model(kind, tmp_path):
    """Its score would depend on the rows beside an answer, or on what stands behind a token."""
    sizes = {"bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64,
                      "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                      "forced_eos_token_id": None, "decoder_start_token_id": 0},
             "electra": {"embedding_size": 32}}
    changes = {"num_labels": 1, **sizes.get(kind, {})}
    save(tiny(kind, AutoModelForSequenceClassification, **changes), tmp_path / kind)
    with pytest.raises(BadInput, match="not a causal model|cannot load it .*position_ids"):
        load_reward_model(tmp_path / kind, torch.float32)


def test_an_encoder_is_no_policy(tmp_path):
    """Nor is one that was made a decoder, where it does more to its hidden states than log-probs know of."""
    folder = save(tiny("bert"), tmp_path / "bert")
    with pytest.raises(BadInput, match="not a causal model"):
        load_policy(folder, load_tokenizer(folder), torch.float32)
    edit_json(folder / "config.json", is_decoder=True)
    model = load_policy(folder, load_tokenizer(folder), torch.float32)
    for wrap in (LogProbs, OneBase):
        with pytest.raises(BadInput, match="its log-probs are not those of its output layer"):
            wrap(model)


def test_a_model_that_left_padding_changes_is_refused(tmp_path):
    save(tiny("recurrent_gemma", lru_width=32, attention_window_size=64, num_key_value_heads=1, head_dim=8,
              block_types=["recurrent", "attention"]), tmp_path / "model")
    with pytest.raises(BadInput, match="padding on the left"):
        load_policy(tmp_path / "model", load_tokenizer(tmp_path / "model"), torch.float32)


@pytest.mark.parametrize("disturbed, refused", [(slice(-2, -1), False), (slice(None), True)])
def test_one_token_that_rounding_turns_over_is_no_effect_of_padding(disturbed, refused, tmp_path):
    """As of SmolLM2 after PPO in bfloat16: one of eight tokens was off by 1.2 standard deviations."""
    folder = save(tiny("llama"), tmp_path / "model")
    model = load_policy(folder, load_tokenizer(folder), torch.bfloat16)

    def disturb(norm, args, states):
        states = states.clone()
        if states.shape[1] > 8:
            states[:, disturbed] += 1.2 * states.std()
        return states

    model.base_model.norm.register_forward_hook(disturb)
    with pytest.raises(BadInput, match="padding on the left") if refused else contextlib.nullcontext():
        check_reading(model, folder, "--sft_model")


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoders_are_reward_models(kind, dtype, tmp_path):
    heads = {"num_key_value_heads": 2} if kind == "qwen2" else {}
    model = tiny(kind, AutoModelForSequenceClassification, num_labels=1, vocab_size=40, **heads)
    save(model, tmp_path / kind)
    model, tokenizer, *_ = load_reward_model(tmp_path / kind, dtype)
    chats = [(USER, "no ."), (USER, "yes it is red indeed . it is not blue")]
    together = reward_scores(model, load_tokenizer(tmp_path / kind), chats, CPU, 2)
    alone = reward_scores(model, load_tokenizer(tmp_path / kind), chats, CPU, 1)
    assert together == pytest.approx(alone, abs=1e-5 if dtype == torch.float32 else 0.1)


# ---- weights that are left over ----

def of_three_layers(place, **changes):
    save(tiny("llama", num_hidden_layers=3), place)
    edit_json(place / "config.json", **{"num_hidden_layers": 1, "layer_types": None, **changes})
    return place


def prefixless(place):
    """As the first GPT-2 files are: the backbone alone, its layers not under `transformer`."""
    save(tiny_gpt2(), place)
    edit_json(place / "config.json", n_layer=1)
    edit_weights(place / "model.safetensors", lambda weights: [
        weights.update({name.removeprefix("transformer."): weights.pop(name)}) for name in list(weights)])
    return place


def other_kind(place):
    """The query's norms of Qwen3 in a folder that calls itself Llama."""
    save(tiny("qwen3", head_dim=8, num_key_value_heads=4), place)
    edit_json(place / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    return place


@pytest.mark.parametrize("folder", [of_three_layers, prefixless, other_kind])
def test_weights_without_a_place_are_refused(folder, tmp_path):
    place = folder(tmp_path / "model")
    for load in (lambda: load_policy(place, load_tokenizer(place), torch.float32),
                 lambda: load_value_base(place, torch.float32)):
        with pytest.raises(BadInput, match=f"--.*model {place}: its files hold .* no place for"):
            load()


def test_a_reward_model_that_is_cut_is_refused(tmp_path):
    save(tiny("llama", AutoModelForSequenceClassification, num_labels=1), tmp_path / "rm")
    edit_json(tmp_path / "rm/config.json", num_hidden_layers=1, layer_types=None)
    with pytest.raises(BadInput, match="no place for"):
        load_reward_model(tmp_path / "rm", torch.float32)


@pytest.mark.parametrize("kind, extra", [
    ("gpt2", {"transformer.h.0.attn.bias": (1, 1, 8, 8), "transformer.h.0.attn.masked_bias": (1,)}),
    ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}),
    ("llama", {"score.weight": (1, 32), "v_head.summary.weight": (1, 32)})])
def test_heads_and_tables_may_be_left_over(kind, extra, tmp_path):
    """Masks and tables of older files, heads of another use; the LM head where a value head is put on."""
    place = save(tiny_gpt2() if kind == "gpt2" else tiny_llama(), tmp_path / "model")
    edit_weights(place / "model.safetensors",
                 lambda weights: weights.update({name: torch.ones(shape) for name, shape in extra.items()}))
    load_policy(place, load_tokenizer(place), torch.float32)
    load_value_base(place, torch.float32)


@pytest.mark.parametrize("change", ["more", "fewer"])
def test_an_adapter_that_does_not_fit_is_refused(change, chain, tmp_path):
    folder = copy_of(chain.gvm, tmp_path / "gvm")

    def edit(weights):
        name = next(name for name in weights if "layers.1." in name)
        tensor = weights[name] if change == "more" else weights.pop(name)
        weights.update({name.replace("layers.1.", "layers.2."): tensor.clone()} if change == "more" else {})
    edit_weights(folder / "adapter_model.safetensors", edit)
    with pytest.raises(BadInput, match="its adapter does not fit its base model"):
        load_gvm(folder, torch.float32)


# ---- vocabularies with a hole ----

def with_a_hole(place, highest=200):
    """As many tokens as the model has, one of them behind its end."""
    words = {word: i for i, word in enumerate(WORDS)}
    words[WORDS[-1]] = highest
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, bos_token="<s>",
                            eos_token="</s>", unk_token="<unk>").save_pretrained(place)
    return place


@pytest.mark.parametrize("what", ["sft", "policy", "generate", "gvm", "rank", "load_reward_model"])
def test_an_id_behind_the_vocabularys_end(what, chain, baseline, flags, data, tmp_path):
    place = with_a_hole(copy_of({"gvm": chain.gvm, "rank": chain.gvm, "load_reward_model": baseline.rm}.get(
        what, chain.sft), tmp_path / "model"))
    assert len(load_tokenizer(place)) == len(WORDS)
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "is it ?", "chosen": "white", "rejected": "no ."}])
    at, out = ["--model", "other", "--data", data], tmp_path / "out"
    with pytest.raises(BadInput, match="ids up to 200, the model only 32: they do not belong together"):
        {"sft": lambda: run_stage(sft, **{**flags.sft, "model": place}, output_dir=out),
         "policy": lambda: evaluate.main(["policy", *at, "--policies", f"a={place}"]),
         "generate": lambda: judge.main(["generate", *at, "--policy", str(place), "--out", f"{out}.json"]),
         "gvm": lambda: evaluate.main(["gvm", *at, "--value_model", str(place)]),
         "rank": lambda: judge.main(["rank", "--pairs", pairs, "--value_model", str(place)]),
         "load_reward_model": lambda: load_reward_model(place, torch.float32)}[what]()


def test_a_hole_within_the_vocabulary_is_none_of_our_business(chain, tmp_path):
    place = with_a_hole(copy_of(chain.sft, tmp_path / "model"), len(WORDS) - 1)
    check_model(place, load_tokenizer(place), "--model")


# ---- indices of weights ----

def sharded(place):
    tiny_llama().save_pretrained(place, max_shard_size="20KB")
    word_tokenizer().save_pretrained(place)
    assert len(list(place.glob("model-*.safetensors"))) > 1
    return place


def point(place, to):
    """Let the index name another place for its first file."""
    path = place / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"] = {name: to if file == first else file for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    return place / first


@pytest.mark.parametrize("way", ["..", "absolute", "link", "folder that is a link", "bin"])
def test_an_index_that_names_a_file_elsewhere_is_refused(way, tmp_path):
    place, elsewhere = sharded(tmp_path / "model"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    other = elsewhere / "w.safetensors"
    first = point(place, {"..": "../elsewhere/w.safetensors", "absolute": str(other), "link": "w.safetensors",
                          "folder that is a link": "sub/w.safetensors", "bin": "w.bin"}[way])
    shutil.copy(first, other)
    if way == "link":
        (place / "w.safetensors").symlink_to(other)
    elif way == "folder that is a link":
        (place / "sub").symlink_to(elsewhere)
    elif way == "bin":
        torch.save(load_file(first), place / "w.bin")
    tokenizer = load_tokenizer(place)
    for load in (lambda: load_policy(place, tokenizer, torch.float32),
                 lambda: load_value_base(place, torch.float32)):
        with pytest.raises(BadInput, match=f"{place}: cannot load it .*index.json names .* no safetensors"):
            load()


def test_an_index_of_ones_own_files_is_read(tmp_path):
    """Also where they are links, as the hub's cache has them."""
    place = sharded(tmp_path / "model")
    wanted = load_policy(place, load_tokenizer(place), torch.float32).state_dict()
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(place.iterdir()):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    got = load_policy(snapshot, load_tokenizer(snapshot), torch.float32).state_dict()
    assert all(torch.equal(got[name], x) for name, x in wanted.items())


# ---- the library ----

def test_the_installed_transformers_is_one_of_those_that_are_allowed():
    low, high = re.search(r"^transformers>=([\d.]+),<([\d.]+)", (ROOT / "requirements.txt").read_text(),
                          re.M).groups()
    number = lambda version: [int(x) for x in version.split(".")[:2]]
    assert number(low) <= number(transformers.__version__) < number(high)
