# make demo · make test · make bench · make lint
# Uses the Python it is given when that has everything; otherwise a .venv beside this file, which reuses an installed torch.
PY ?= python3
TORCH ?= torch==2.13.0
# the small CPU build of torch: make demo TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_ARGS ?=
VENV := .venv
CORE := torch, numpy, pydantic, yaml, typer, rich, safetensors, nibabel, h5py, matplotlib, psutil
TEST := $(CORE), pytest, pytest_timeout, hypothesis, skimage, scipy
HAVE_CORE := $(shell $(PY) -c "import $(CORE)" 2>/dev/null && echo yes)
HAVE_TEST := $(shell $(PY) -c "import $(TEST)" 2>/dev/null && echo yes)
HAVE_TORCH := $(shell $(PY) -c "import torch" 2>/dev/null && echo yes)
RUN := $(if $(HAVE_CORE),$(PY),$(VENV)/bin/python)
RUN_TEST := $(if $(HAVE_TEST),$(PY),$(VENV)/bin/python)
OUT ?= out/demo

.PHONY: demo test bench lint env clean

demo: $(if $(HAVE_CORE),,$(VENV)/core)
	$(RUN) -m recon3d demo -o $(OUT)

test: $(if $(HAVE_TEST),,$(VENV)/test)
	$(RUN_TEST) -m pytest

bench: $(if $(HAVE_TEST),,$(VENV)/test)
	for op in radon renoise tvz cg nufft sense pet job job_pet; do $(RUN_TEST) -m bench $$op --quick || exit 1; done

# a tool that the Python below .venv already has gets no script of its own in .venv/bin
lint: export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
lint: $(VENV)/lint
	ruff check .
	ruff format --check .
	$(VENV)/bin/python -m mypy
	find csrc \( -name '*.cpp' -o -name '*.cu' -o -name '*.h' \) -print0 | xargs -0 clang-format --dry-run -Werror

env: $(VENV)/test $(VENV)/lint

$(VENV)/bin/python:
	$(PY) -m venv $(if $(HAVE_TORCH),--system-site-packages) $(VENV)

$(VENV)/core: pyproject.toml | $(VENV)/bin/python
	$(if $(HAVE_TORCH),,$(VENV)/bin/python -m pip install -q $(TORCH) $(TORCH_ARGS))
	$(VENV)/bin/python -m pip install -q -e .
	@touch $@

$(VENV)/test: $(VENV)/core
	$(VENV)/bin/python -m pip install -q -e '.[test]'
	@touch $@

$(VENV)/lint: $(VENV)/core
	$(VENV)/bin/python -m pip install -q -e '.[lint]'
	@touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info
