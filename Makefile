# Every target works on a fresh machine with git, make and Python 3.11+ with venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN = .venv/bin
OUT = out
TEST_ENV = env OMP_NUM_THREADS=1 MPLBACKEND=agg
.PHONY: demo test test-ui test-faults faults lab bench check docs install export clean-nbs

.venv/installed: constraints.txt settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

install: .venv/installed

demo: .venv/installed
	mkdir -p $(OUT)
	$(BIN)/papermill papers/gkd.ipynb $(OUT)/gkd_phantom.ipynb -p runs $(OUT)/runs --no-progress-bar --log-output
	@cat $(OUT)/runs/gkd/phantom-chasedb1/results.md
	@echo "rendered notebook: $(OUT)/gkd_phantom.ipynb"
	@echo "figures:           $(OUT)/runs/gkd/phantom-chasedb1/figures/"
	@echo "result table:      $(OUT)/runs/gkd/phantom-chasedb1/results.md"

test: .venv/installed
	$(TEST_ENV) $(BIN)/nbdev_test --n_workers 2 --skip_file_glob start.ipynb
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q tests

# a sample of the faults: kills, damaged files, processes that die
test-faults: .venv/installed
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadscope -q tests/faults

# every stage of every paper killed and continued, every other fault: benchmarks/results/faults.md
faults: .venv/installed
	$(TEST_ENV) $(BIN)/python tests/faults/run.py

# JupyterLab in a real browser: Debian's chromium, which root installs here where it is missing, driven by PyPI's playwright without browsers of its own.
# Nobody else's machine is changed: one loud line, and every test is skipped
NO_BROWSER = "!!! NO BROWSER TESTS: chromium is missing and cannot be installed here (as root, with apt-get: Debian's packages chromium, fonts-liberation)"
test-ui: .venv/ui
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { test "$$(id -u)" = 0 && apt-get update -q \
		&& env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends chromium fonts-liberation; } || echo $(NO_BROWSER)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist load --maxschedchunk 1 -q tests/ui

# the site of documentation in _docs: notebooks and papers (smoke, phantoms) executed, API, results; links checked
docs: .venv/docs
	$(BIN)/python docs/build.py

.venv/ui .venv/docs: .venv/installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev,$(@F)]"
	touch $@

lab: .venv/installed
	$(BIN)/jupyter lab --ip=127.0.0.1 nbs/start.ipynb

bench: .venv/installed
	$(BIN)/python benchmarks/run.py

# notebooks clean, package in step with them, no leaked notebook globals
check: .venv/installed
	$(BIN)/python tests/check_sync.py
	$(BIN)/python -m pyflakes medkd

# nbs/ -> medkd/ and README.md, everything clean
export: .venv/installed
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_clean --fname papers
	$(BIN)/python tests/make_readme.py
