"""The study of 03_quant.

runs       the runs as tables, like for like, and the papers' claims on them
finetuned  a trained model fine-tuned with gates, its attention kept or drawn anew
healing    a trained checkpoint healed, by way and seed: what rounding costs it before and after
figures    the larger figures
"""
