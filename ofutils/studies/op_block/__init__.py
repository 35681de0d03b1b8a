"""The study of 07_op_block.

runs       one row per run and per measurement: kurtosis, correlation, entropy, loss; the papers' claims on them
figures    the larger figures
"""
