# make demo    ask the bundled model about a picture (light: no torch)
# make test    everything that must pass before a change lands
# make gpu-check   the CUDA kernels and PyTorch's engine on a GPU (docs/plugins.md says what it needs)
# make site    the documents as pages, in build/site/html (Python 3.11 or newer)
# make release-check   what is built and installed before a release (docs/releasing.md)
# make format  let ruff rewrite the code
# make clean   remove what the above have made
#
# PYTHON=/path/to/python picks the interpreter. Only relative paths below, so that a clone may lie anywhere.

PICTURE ?= examples/hamburgers.png
QUESTION ?= How many hamburgers are there?

PYTHON ?= $(shell sh .ci/find-python)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# A stamp is written only after a complete install, and names the folder that it was made for: an editable install
# does not survive a move. Without its stamp an environment is made anew, whatever state it is in.
HERE := $(shell pwd | cksum | cut -d ' ' -f 1)
DEMO_STAMP := .venv-demo/complete-$(HERE)
TEST_STAMP := .venv/complete-$(HERE)
SITE_STAMP := .venv-site/complete-$(HERE)

.PHONY: demo test gpu-check site release-check format clean

demo: $(DEMO_STAMP)
	@.venv-demo/bin/python -m svcli chat "$(PICTURE)" "$(QUESTION)"

test: $(TEST_STAMP)
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	.venv/bin/lint-imports
	.venv/bin/python -m pytest

gpu-check:
	@export PYTHONPATH=.:export:engines; $(PYTHON) -m benchmarks.gpu_check; kernels=$$?; \
	$(PYTHON) -m benchmarks.gpu_engine && exit $$kernels

site: $(SITE_STAMP)
	@PYTHONPATH=.:export:engines .venv-site/bin/python docs/pages.py
	@.venv-site/bin/zensical build --strict
	@echo "build/site/html/index.html; with its search: $(PYTHON) -m http.server -d build/site/html"

release-check:
	@$(PYTHON) -m release.check

format: $(TEST_STAMP)
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

clean:
	rm -rf .venv .venv-demo .venv-site .cache build/site dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(DEMO_STAMP): pyproject.toml constraints.txt
	@echo "Setting up .venv-demo (once; about a minute)" >&2
	@$(call fresh_venv,.venv-demo)
	@.venv-demo/bin/python -m pip install --quiet -c constraints.txt -e ".[cpu]"
	@touch "$@"

$(TEST_STAMP): pyproject.toml constraints.txt
	@echo "Setting up .venv (once; some minutes, most of them for torch)" >&2
	@$(call fresh_venv,.venv)
	@.venv/bin/python -m pip install --quiet --upgrade "pip>=25.1"  # the first that knows dependency groups
	@.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[cpu,torch,train,data,rtx,plots,serve,eval]" --group dev --group docs
	@touch "$@"

$(SITE_STAMP): pyproject.toml constraints.txt
	@echo "Setting up .venv-site (once; about a minute)" >&2
	@$(call fresh_venv,.venv-site)
	@.venv-site/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	@.venv-site/bin/python -m pip install --quiet -c constraints.txt --group docs
	@touch "$@"

define fresh_venv
test -n "$(PYTHON)" || { \
  echo "No Python 3.10 or newer with venv found. Install one (Debian: apt install python3-venv), or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
  exit 1; }; \
"$(PYTHON)" -m venv --clear $(1)
endef
