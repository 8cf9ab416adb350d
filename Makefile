# Everything starts here: each target sets up what it needs by itself. Only Python 3.11 or newer and make are assumed.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The first interpreter that is new enough; `make PYTHON=/path/to/python ...` overrides it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)

# Two processes: more would fight for memory bandwidth. One thread each, so that they don't fight for the cores.
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1
OUT ?= outputs
ARGS ?=

.PHONY: help setup setup-dev setup-bench demo app bench test lint format docs clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-12s %s\n' "$$name" "$$text"; done

setup: $(STAMPS)/run ## make .venv with what `mm` needs (a few minutes the first time: torch is large)

setup-dev: $(STAMPS)/dev ## the same with the tools of `make test` and `make lint`

setup-bench: $(STAMPS)/bench ## the same with the peers of `make bench`

demo: $(STAMPS)/run ## pictures, speech, a video and a 3D shape for prompts, and captions, by one model that comes along
	@mkdir -p $(OUT)
	$(BIN)/mm generate "mushroom, twemoji" --to image --num 4 --seed 0 --out $(OUT)/mushroom.png
	$(BIN)/mm generate --to text --from $(OUT)/mushroom-01.png --seed 0 --out $(OUT)/mushroom.txt
	$(BIN)/mm generate "handwritten digit seven" --to image --num 12 --seed 0 --out $(OUT)/seven.png
	$(BIN)/mm generate "three five one seven" --to speech --voice slt --seed 0 --out $(OUT)/three-five-one-seven.wav
	$(BIN)/mm generate --to text --from $(OUT)/three-five-one-seven.wav --seed 0 --out $(OUT)/heard.txt
	$(BIN)/mm generate "a handwritten seven moves right" --to video --seed 0 --out $(OUT)/seven-moves.gif
	$(BIN)/mm generate "a tall table with four legs and a square top" --to 3d --seed 0 --out $(OUT)/table.glb
	$(BIN)/mm generate --to text --from $(OUT)/table.glb --seed 0 --out $(OUT)/table.txt
	@printf 'Everything is in $(OUT)/. In words, the first mushroom: %s; the sound: %s; the table: %s\n' \
		"$$(cat $(OUT)/mushroom.txt)" "$$(cat $(OUT)/heard.txt)" "$$(cat $(OUT)/table.txt)"

app: $(STAMPS)/run ## the demo in a browser (ARGS="--port 8000" and the like; Ctrl+C ends it)
	$(BIN)/mm app $(ARGS)

bench: $(STAMPS)/bench ## speed side by side with what one would use instead (ARGS="decode" chooses; minutes)
	$(BIN)/mm bench $(ARGS)

test: $(STAMPS)/dev ## all tests (ARGS="-k name" chooses)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(STAMPS)/dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMPS)/dev ## rewrite the files the way `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMPS)/dev ## the documentation as a site, below site/; a warning is an error
	$(BIN)/mkdocs build

clean: ## remove caches and what `make demo` wrote; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage site $(OUT)

# A stamp is newer than what it depends on exactly when the environment is up to date; it is written last,
# so an interrupted installation is taken up again by the next call.
$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found. Install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Making $(VENV) with $(PYTHON)"
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
		echo "Could not make $(VENV). On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/run: $(STAMPS)/venv pyproject.toml constraints.txt
	@echo "Installing mm and what it needs (the first time about 3 GB)"
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(STAMPS)/dev: $(STAMPS)/venv pyproject.toml constraints.txt
	@echo "Installing mm with the tools for tests (the first time about 3 GB)"
	$(PIP) install -c constraints.txt -e ".[dev,docs,video,speech,mesh]"
	@touch $@ $(STAMPS)/run

$(STAMPS)/bench: $(STAMPS)/dev
	$(PIP) install -c constraints.txt -e ".[bench]"
	@touch $@
