# make lab    set up on first use, then open JupyterLab on the chapters   (LAB_ARGS="--no-browser --port 8899" passes flags on)
# make test   set up on first use, then run every notebook and every test of the package
# make help   the rest
PYTHON ?= python3
VENV   := .venv
BIN    := $(CURDIR)/$(VENV)/bin
READY  := $(VENV)/.ready
# JupyterLab refuses to run as root unless told: in containers that is who one is.
ROOT_OK := $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: help setup lab test test-fast check export readme bench clean

help:
	@sed -n 's/^# //p' Makefile | head -n 3
	@echo "make test-fast  the tests without the notebooks: a minute, no network"
	@echo "make export     write the package from the notebooks and clean the notebooks (after editing one)"
	@echo "make readme     write README.md and the chapters' small pictures from the notebooks"
	@echo "make check      before a commit: are notebooks, package, README and site in step? Does the package install?"
	@echo "make bench      the hand-written steps beside PyTorch's: prints ratios"
	@echo "make clean      remove the virtual environment and what was built"

setup: $(READY)

$(READY): settings.ini setup.py constraints.txt
	@echo "== Setting up $(VENV): PyTorch, Jupyter and the tools of settings.ini (a few minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fromfound needs Python 3.10 or newer, this is " + sys.version.split()[0] + ". If you have a newer one: make setup PYTHON=python3.12")'
	@"$(BIN)/python" -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); } || { rm -rf $(VENV); \
		echo "No virtual environment could be made. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
	@PYTHONWARNINGS="ignore:Editable installation" "$(BIN)/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@if [ -d .git ]; then git config --local include.path ../.gitconfig; fi
	@touch $@
	@echo "== Ready"

# tools/jupyter has notebooks cleaned as they are saved, so that git shows what was changed and nothing else.
lab: $(READY)
	@echo "== Opening JupyterLab on the chapters; Ctrl-C here ends it"
	@cd nbs && PATH="$(BIN):$$PATH" JUPYTER_CONFIG_PATH="$(CURDIR)/tools/jupyter$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" \
		"$(BIN)/jupyter" lab $(ROOT_OK) --LabApp.default_url=/lab/tree/index.ipynb $(LAB_ARGS)

# nbdev_test runs with every connection to another machine refused: no chapter needs the network. One thread for each
# process: nbdev_test runs one notebook per core, and threads that wait for each other are slower than none.
test: export OMP_NUM_THREADS = 1
test: $(READY)
	@echo "== Every notebook's cells, by nbdev_test, with the network refused (all in all about six minutes on two cores)"
	@PATH="$(BIN):$$PATH" PYTHONPATH=tests/offline "$(BIN)/nbdev_test" --timing
	@echo "== Every notebook alone in a Jupyter kernel, and the tests of the package"
	@PATH="$(BIN):$$PATH" "$(BIN)/python" -m pytest -m "not committed and not network" --nbmake --nbmake-kernel=python3 --nbmake-timeout=180 tests nbs

test-fast: export OMP_NUM_THREADS = 1
test-fast: $(READY)
	@PATH="$(BIN):$$PATH" "$(BIN)/python" -m pytest -q -m "not committed and not network" tests

check: $(READY)
	@PATH="$(BIN):$$PATH" "$(BIN)/python" -m pytest -q -m "committed or network" tests

export: $(READY)
	@PATH="$(BIN):$$PATH"; export PATH; nbdev_export && nbdev_clean

readme: $(READY)
	@"$(BIN)/python" tools/covers.py
	@"$(BIN)/jupyter" nbconvert --log-level=WARN --config tools/readme_config.py --to markdown nbs/index.ipynb --output-dir . --output README

bench: $(READY)
	@for f in bench/bench_*.py; do echo "== $$f"; "$(BIN)/python" $$f || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info _docs _proc
