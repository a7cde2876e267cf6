# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Libraries that ask the network for models must not try in tests and the demo.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

.PHONY: demo test test-slow test-cuda lint format types clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $(VENV)/.installed $@

# Trained once; again only when the text or the configuration changes.
model/model.safetensors: data/train.json data/val.json configs/tiny.json | $(VENV)/.installed
	$(OFFLINE) $(BIN)/python train_reformer.py --raw --epochs 2 --model_config configs/tiny.json

demo: model/model.safetensors
	$(OFFLINE) $(BIN)/python predict.py --text "清晨的车站" --text "老人把钥匙放在桌上" --length 60 --seed 1
	$(OFFLINE) $(BIN)/python predict.py --ppl --text "他把门轻轻关上，走进了雨里。" --text "他把轻门轻关上，走雨里进了。" --text "上轻他关门把，里雨走了轻进。"

test: $(VENV)/.installed-dev lint types
	$(OFFLINE) $(BIN)/python -m pytest -n 2 -q

$(VENV)/.installed-slow: requirements-slow.txt requirements-dev.txt requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements-slow.txt
	touch $(VENV)/.installed $(VENV)/.installed-dev $@

test-slow: $(VENV)/.installed-slow
	$(OFFLINE) $(BIN)/python -m pytest -n 2 -q -m slow

test-cuda: $(VENV)/.installed-dev
	$(OFFLINE) $(BIN)/python -m pytest -q -m cuda

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf model data/tokenized tensorboard_summary .pytest_cache .mypy_cache .ruff_cache .hypothesis
