# make report   run every chapter and write outputs/<DATASET>/report/index.html
# make test     exported files, clean notebooks, every notebook, every test
# make lab      open the notebooks
# make clean    remove what runs made; keeps data/
#
# make report DATASET=cifar10 SEED=1 EPOCHS=3 DEVICE=cpu

PYTHON  ?= python3
DATASET ?= shapes
SEED    ?= 0
EPOCHS  ?=
DEVICE  ?= auto

BIN   := .venv/bin
READY := .venv/.installed
USABLE = $(BIN)/python -c "import pip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" >/dev/null 2>&1

.PHONY: report test lab clean

report: $(READY)
	$(BIN)/vision-course report --dataset "$(DATASET)" --seed $(SEED) --device $(DEVICE) $(if $(EPOCHS),--epochs $(EPOCHS))

test: $(READY)
	$(BIN)/python tests/run.py

lab: $(READY)
	$(BIN)/jupyter lab nbs

clean:
	rm -rf $(foreach made,checkpoints exports figures notebooks report results run.json,outputs/*/$(made)) .pytest_cache

$(READY): settings.ini constraints.txt setup.py
	@$(USABLE) || \
		$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" || \
		{ echo "This needs Python 3.11, 3.12 or 3.13; name one: make PYTHON=python3.12 …"; exit 1; }
	$(USABLE) || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,track,export,serve,tflite]"
	touch $@
