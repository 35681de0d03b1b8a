"""The study of 03_quant.

figures    the larger figures
healing    a trained checkpoint healed, by way and seed: what rounding costs it before and after
"""
