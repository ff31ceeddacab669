# make train   sets everything up and runs the main job: DFA on 5,000 MNIST digits that come with a package
# make test    sets everything up and runs the tests; make test-all: the slow ones too
PYTHON ?= python3
VENV := .venv
LBP := $(VENV)/bin/lbp

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

.PHONY: train test test-all
train: $(VENV)/ready
	$(LBP) train

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/ready
	$(VENV)/bin/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder -m "slow or not slow"
