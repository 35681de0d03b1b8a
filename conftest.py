"""Every test run, nbval's included: scale tiny, one thread unless OMP_NUM_THREADS says more, and all output in a
fresh temporary folder."""

import os
import shutil
import tempfile


def pytest_configure(config):
    os.environ.setdefault("OFUTILS_SCALE", "tiny")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    config.ofutils_out = os.environ["OFUTILS_OUT"] = tempfile.mkdtemp(prefix="ofutils-")


def pytest_unconfigure(config):
    shutil.rmtree(config.ofutils_out, ignore_errors=True)
