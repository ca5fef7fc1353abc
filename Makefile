# The newest Python that runs and can make a virtual environment. Each is executed, since a name on PATH may be a shim
# with nothing behind it, and some systems ship Python without venv's parts.
CANDIDATES := python3.13 python3.12 python3.11 python3
USABLE := import ensurepip, sys, venv; assert sys.version_info >= (3, 11)
PYTHON ?= $(shell for p in $(CANDIDATES); do if $$p -c '$(USABLE)' >/dev/null 2>&1; then echo $$p; break; fi; done)

WORKERS ?= 2
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# What tells most in least time, for the oldest versions.
QUICK := tests/reliability/test_golden.py tests/reliability/test_properties.py tests/test_influence.py \
	tests/test_edit.py
OLDEST_STAMP := .venv-oldest/.installed

.PHONY: setup setup-oldest demo bench test test-slow test-oldest test-matrix lint docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@python='$(PYTHON)'; \
	if [ -z "$$python" ]; then \
		echo "No Python >= 3.11 with venv was found. Install one, or name one: make PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi; \
	echo "Making .venv with $$("$$python" -V); this takes a few minutes"; \
	"$$python" -m venv --clear .venv
	$(BIN)/pip install $(if $(CI),--quiet) -e '.[lab,notebooks,docs,dev]' -c constraints.txt
	@touch $@

demo: $(STAMP)
	$(BIN)/metainfluence demo $(ARGS)

bench: $(STAMP)
	$(BIN)/metainfluence bench $(ARGS)

test: $(STAMP)
	$(BIN)/pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: $(STAMP)
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m slow $(ARGS)

# On the oldest Python that is there, python3.11 where it is.
$(OLDEST_STAMP): pyproject.toml tests/oldest.txt
	@python="$$(for p in python3.11 python3.12 '$(PYTHON)'; do if $$p -c '$(USABLE)' >/dev/null 2>&1; then echo $$p; break; fi; done)"; \
	"$$python" -m venv --clear .venv-oldest
	.venv-oldest/bin/pip install $(if $(CI),--quiet) -e . -c tests/oldest.txt chex hypothesis lineax pytest pytest-xdist scipy
	@touch $@

setup-oldest: $(OLDEST_STAMP)

test-oldest: $(OLDEST_STAMP)
	.venv-oldest/bin/pytest -n $(WORKERS) --dist worksteal $(QUICK) $(ARGS)

# Installs into environments of its own; takes long.
test-matrix: $(STAMP)
	$(BIN)/python tests/matrix.py $(ARGS)

# Into build/docs. The variable silences a message of the theme about another program.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file .mkdocs/mkdocs.yml

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Spares .data, where prepared datasets lie that took long to make.
clean:
	rm -rf .venv .venv-oldest build dist demo-output train-output bench-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
