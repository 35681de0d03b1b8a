"""Outlier features in transformers: what they are, what they cost, what removes them.

Letters used for shapes in every docstring and comment
    B batch, T tokens in a row, D width, H heads, K head width (D / H),
    V vocabulary (of images: classes), L layers, N tokens in all (B x T, over every batch).

The core stands on six floors; a room imports from lower floors only (a test reads the imports). It holds the papers'
metrics, blocks, optimizers and quantizers, and what several notebooks or the command line need. What one notebook
alone computes is a study, `studies.<notebook>`: the core never imports a study, and no study another.

    floor  room         job
    0      params       scales, settings and the check of parameters, device, provenance, paths
    0      records      content-addressed records: write, find, refuse
    0      pool         many tasks in local processes; one that fails costs itself only
    0      devices      random numbers of one device, its speed in bf16, a clock
    1      metrics      outlier metrics, as definitions
    1      streaming    the same metrics over any number of batches, from shared sums
    1      attention    softmax, clipped softmax, capped scores, gates, rotary positions
    1      layers       norms, activations, residual gains
    1      layouts      what the modules of Hugging Face's families are called
    1      quantizers   grids, range estimators, rounding
    1      optim        AdamW, SGD, AdaFactor, SOAP, Shampoo, Muon; parameter groups, schedule
    1      resume       the state of a broken training, written and read back
    1      reference    the papers' numbers and claims, and `compare` for verdicts
    1      plots        theme, colours keyed by method, `save`
    1      sources      what each notebook loads from the Hub, by scale
    1      hub          checkpoints and data by name and revision, the packaged MiniLM, a stand-in
    1      batches      batches by number, cut from one long row of ids, plain or masked
    1      images       digits, scenes and files of images, as rows of bytes; patches
    1      backcopy     a task whose best predictor needs heads that do nothing
    2      data         corpora and their tokenizer
    2      frequency    how often each token occurs: shipped counts, a text's own
    2      probes       `hooked`, `capture`, `edit`, `measure` at named sites
    2      variants     texts without natural frequencies, order or separators, for trainings
    2      huggingface  the papers' attention on Hugging Face models, saved and read back
    2      transformer  one transformer with named sites, by configuration
    3      sentences    sentences for encoders: out of a corpus, as batches, masked; kinds of tokens
    3      families     Hugging Face models into `Transformer`, or with their sites, to be read
    3      dims         outlier dimensions: by LayerNorm parameters, by activation; `ablated`
    3      heads        MLM heads on a frozen encoder
    3      quant        models rounded: calibration, `quantized`, tables of many settings
    3      train        `TrainConfig`, `train`, resume
    4      remedies     a trained model healed (its outliers trained away), smoothed or rotated
    4      presets      he2024's settings and blocks, as configurations of trainings
    4      sweep        many runs: here or in local processes; the notebooks' recipes
    4      preflight    whether all that is there, asked without downloading it
    4      report       the scoreboard: claims, what was measured, verdicts
    5      laboratory   the recorded runs on `backcopy`, as tables
    5      trajectories what runs measured while they trained, by block: tables and small multiples
    5      campaign     all runs of a scale within a time limit, in one queue

The recipes (which runs a notebook needs at each scale) are `recipes/*.yaml`, the papers' numbers
`papers/*.csv`, their claims `papers/claims.yaml`; all are package data.
"""

import warnings

__version__ = "0.1.0"

# huggingface_hub, which accelerate imports, asks for widgets; the progress bars here are plain text
warnings.filterwarnings("ignore", message="IProgress not found")

#: Raised with every entry of the CHANGELOG's "Results changed": no older record is taken for a new one.
NUMERICS = 2


class UserError(ValueError):
    """Bad input. Shown as one line, in a notebook and on the command line; never as a traceback."""

    def _render_traceback_(self):
        return [f"UserError: {self}"]
