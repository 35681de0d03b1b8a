"""Outlier features in transformers: what they are, what they cost, what removes them.

Letters used for shapes in every docstring and comment
    B batch, T tokens in a row, D width, H heads, K head width (D / H),
    V vocabulary, L layers, N tokens in all (B x T, over every batch).

Five floors; a module imports from lower floors only (a test reads the imports).

    floor  module       job
    0      params       scales, the check of parameters, seeds, device, provenance, paths
    0      records      content-addressed records: write, find, refuse
    1      metrics      outlier metrics, as definitions and as streaming statistics
    1      attention    softmax, clipped softmax, gates, QK norms
    1      optim        AdamW and SOAP, parameter groups, schedule
    1      reference    the papers' numbers, and `compare` for verdicts
    1      plots        theme, colours keyed by method, `save`
    2      data         corpora, tokenizer, batches with a cursor
    2      probes       `hooked`, `capture`, `edit`, `measure` at named sites
    2      transformer  one transformer with named sites, by configuration
    3      families     Hugging Face models into `Transformer`
    3      quant        quantizers, range estimators, calibration, `quantized`
    3      train        `TrainConfig`, `train`, resume
    4      sweep        many runs: here or in local processes; the notebooks' recipes

The recipes (which runs a notebook needs at each scale) are `recipes/*.yaml`, the papers' numbers
`papers/*.csv`; both are package data.
"""

import warnings

__version__ = "0.1.0"

# huggingface_hub, which accelerate imports, asks for widgets; the progress bars here are plain text
warnings.filterwarnings("ignore", message="IProgress not found")

#: Raised with every entry of the CHANGELOG's "Results changed": no older record is taken for a new one.
NUMERICS = 1


class UserError(ValueError):
    """Bad input. Shown as one line, in a notebook and on the command line; never as a traceback."""

    def _render_traceback_(self):
        return [f"UserError: {self}"]
