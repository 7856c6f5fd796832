# Two commands on a machine with Python 3.11: `make demo` and `make test`. Both set up .venv themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo
# one process, every choice named so that accelerate asks for no configuration; it finds a GPU by itself
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: demo test test-device test-oldest test-slow bench lint format clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

demo: $(READY)
	rm -rf $(DEMO)
	$(LAUNCH) -m ddpm_hf train --config digits --output_dir $(DEMO)
	$(BIN)/ddpm-hf sample $(DEMO)/pipeline --count 64 --steps 250 --out $(DEMO)/samples.png
	$(BIN)/ddpm-hf evaluate $(DEMO)/pipeline --data digits --split test --images 64 --histogram train \
	    --first 14  # steps of less noise are far finer than one of 17 grey levels; 14 is the best for the training split
	$(BIN)/python -W ignore -c "from diffusers import DiffusionPipeline as P; \
	    print('opened by plain diffusers as', type(P.from_pretrained('$(DEMO)/pipeline')).__name__)"
	@echo "look at $(DEMO)/samples.png, $(DEMO)/curves.png and $(DEMO)/pipeline/evaluation.png"

# a process for each core; a file's tests share what they have trained, and the long files come first
test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# on an accelerator that is simulated, "cuda" and "mps"; the first call compiles it, in a minute
test-device: $(READY)
	for device in cuda mps; do \
	    SIMULATED_ACCELERATOR=$$device $(BIN)/python -m pytest -n auto --dist loadfile tests/device || exit 1; done

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# the core of the suite on the oldest versions that pyproject.toml allows; where bundled wheels of torch need it, with an index of
# CPU wheels in PIP_EXTRA_INDEX_URL
OLDEST := .venv-oldest
$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --constraint constraints-oldest.txt --editable ".[demo]" transformers pytest hypothesis mpmath
	touch $(OLDEST)/.ready

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest tests/schedulers tests/models tests/pipelines tests/likelihood tests/hub tests/evaluation \
	    tests/training tests/data tests/end_to_end/test_training.py

# an hour and more on two cores; of lucidrains' package: benchmarks/lucidrains.py, in an environment of its own
bench: $(READY)
	for what in scheduler_step cold_start sampling network training_step growth profiles; do \
	    $(BIN)/python benchmarks/$$what.py || exit 1; done

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) runs
