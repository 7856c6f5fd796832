# Two commands on a machine with Python 3.11: `make demo` and `make test`. Both set up .venv themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo
# one process; with every option given, accelerate needs no configuration file. It finds a GPU by itself
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: demo test test-device test-oldest test-fid test-slow bench lint format clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

demo: $(READY)
	rm -rf $(DEMO)
	$(LAUNCH) -m ddpm_hf train --config digits --output_dir $(DEMO)
	$(BIN)/ddpm-hf sample $(DEMO)/pipeline --count 64 --steps 250 --out $(DEMO)/samples.png
	$(BIN)/ddpm-hf evaluate $(DEMO)/pipeline --data digits --split test --images 64 --histogram train \
	    --first 14  # below t = 14 the steps are much finer than one of the 17 grey levels; chosen on the training split
	$(BIN)/python -W ignore -c "from diffusers import DiffusionPipeline as P; \
	    print('opened by plain diffusers as', type(P.from_pretrained('$(DEMO)/pipeline')).__name__)"
	@echo "look at $(DEMO)/samples.png, $(DEMO)/curves.png and $(DEMO)/pipeline/evaluation.png"

# one process per core; the tests of a file share their trained networks, and the long files come first
test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# on a simulated accelerator, "cuda" and "mps"; the first call compiles it, which takes a minute
test-device: $(READY)
	for device in cuda mps; do \
	    SIMULATED_ACCELERATOR=$$device $(BIN)/python -m pytest -n auto --dist loadfile tests/device || exit 1; done

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# the core of the suite on the oldest versions that pyproject.toml allows; for torch without CUDA, set PIP_EXTRA_INDEX_URL to an
# index of CPU wheels
OLDEST := .venv-oldest
$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --constraint constraints-oldest.txt --editable ".[demo,metrics]" tensorboard pytest hypothesis mpmath
	touch $(OLDEST)/.ready

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest tests/schedulers tests/models tests/pipelines tests/likelihood tests/hub tests/evaluation \
	    tests/training tests/data tests/end_to_end/test_training.py

# features and metrics beside torch-fidelity's own; torch and torchvision of one index, 6 GB
FID := .venv-fid
$(FID)/.ready: pyproject.toml constraints-fid.txt
	$(PYTHON) -m venv $(FID)
	$(FID)/bin/pip install --quiet --constraint constraints-fid.txt --editable ".[fid]" torchvision torchmetrics pytest
	touch $(FID)/.ready

test-fid: $(FID)/.ready
	$(FID)/bin/python -m pytest tests/fid

# more than an hour on two cores; benchmarks/lucidrains.py needs a separate environment, see its first lines
bench: $(READY)
	for benchmark in scheduler_step cold_start sampling network training_step growth profiles; do \
	    $(BIN)/python benchmarks/$$benchmark.py || exit 1; done

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) $(FID) runs
