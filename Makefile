# make quickstart   create the environment and run the main job on a task made here (no download of data or weights)
#                   on a host with an NVIDIA driver JAX for CUDA is installed and used;  ACCELERATOR= keeps to the CPU, ACCELERATOR=tpu
# make test         the quickstart, then every test, 12 to 25 minutes on two cores;  PYTHON=python3.12 uses another interpreter and environment
# make test-quick   one case of each light test, about two minutes on two cores: while you work
# make test-all     with every case of the tests that the default suite takes samples of
# make test-faults   inject faults: flipped bits, full disks, killed runs (minutes)
# make test-lowest   install the lowest releases that pyproject.toml allows, into an environment of their own; a smoke test
# make lock          renew requirements/, the releases that are installed here;  LOCK= installs the newest instead
# make docs          build the site of docs/ into build/site; a broken link fails it
# make test-deviceless   compile the kernels for TPUs and GPUs that are not here (installs their compilers, 2.1 GB)
PYTHON ?= python3
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart
ACCELERATOR ?= $(if $(shell command -v nvidia-smi),cuda)
comma := ,
LOCK ?= $(wildcard requirements/python$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt)

.PHONY: quickstart test tests test-quick test-all test-faults test-lowest lock docs test-deviceless lint format clean

quickstart: $(VENV)/installed
	$(BIN)/fpo quickstart --workdir $(WORKDIR)

test: quickstart tests

tests: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-quick:
	$(MAKE) tests PYTEST_ARGS="--quick $(PYTEST_ARGS)"

test-all:
	$(MAKE) tests PYTEST_ARGS="--every-case $(PYTEST_ARGS)"

test-faults: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m faults --durations=0 $(PYTEST_ARGS) \
	  $$(grep -rl --include='test_*.py' 'mark.faults' tests)

test-lowest: $(VENV)/installed-test
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)-lowest
	$(BIN)/uv pip install --quiet --python $(VENV)-lowest/bin/python --resolution lowest-direct --requirement pyproject.toml
	PYTHONPATH=. $(VENV)-lowest/bin/python -m tests.smoke

lock: $(VENV)/installed-test
	for version in 3.11 3.12 3.13; do $(BIN)/uv pip compile --quiet --upgrade --generate-hashes --no-annotate \
	  --custom-compile-command "make lock" --python-version $$version --extra report --extra eval --extra tensorboard \
	  pyproject.toml --output-file requirements/python$$version.txt || exit 1; done

docs: $(VENV)/installed-docs
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/site/index.html; its search needs a server: python3 -m http.server --directory build/site"

# The two compilers cannot meet in one process: each has a folder of its own, outside of the environment.
test-deviceless: $(VENV)/installed-compilers
	PYTHONPATH=$(VENV)/tpu $(BIN)/python -m pytest -m deviceless tests/kernels/test_pallas_tpu_compiled.py tests/kernels/test_loss_kernel_compiled.py tests/trainer/test_step_compiled.py tests/attention/test_attention_compiled.py tests/plan/test_plan_compiled.py
	PYTHONPATH=$(VENV)/cuda JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 $(BIN)/python -m pytest -m deviceless tests/kernels/test_pallas_gpu_compiled.py tests/kernels/test_loss_kernel_compiled.py tests/kernels/test_pallas_triton_compiled.py tests/kernels/test_attention_mosaic_compiled.py tests/trainer/test_step_compiled.py tests/attention/test_attention_compiled.py tests/plan/test_plan_compiled.py
	PYTHONPATH=$(VENV)/tpu $(BIN)/python benchmarks/kernels.py --parts deviceless --targets v5e-4 v5p-8 v6e-4 v7x-4
	PYTHONPATH=$(VENV)/cuda JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 $(BIN)/python benchmarks/kernels.py --parts deviceless --targets h100:1

lint: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/installed: pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and "fpo_jax needs Python 3.11 or newer, $(PYTHON) is %d.%d; run make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(LOCK),$(BIN)/python -m pip install --quiet --require-hashes --requirement $(LOCK),@echo "the newest releases are installed")
	$(BIN)/python -m pip install --quiet --editable '.[report$(addprefix $(comma),$(ACCELERATOR))]'
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

$(VENV)/installed-compilers: $(VENV)/installed-test
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)'); \
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/cuda jax-cuda13-plugin==$$version \
	  jax-cuda13-pjrt==$$version nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-cccl nvidia-cuda-crt nvidia-cuda-runtime nvidia-cudnn-cu13
	libtpu=$$($(BIN)/python -c 'import importlib.metadata as m; print([r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")][0])'); \
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/tpu "$$libtpu"
	@touch $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info runs
