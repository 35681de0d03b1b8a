"""The study of 10_vit.

sinks      where a model's outliers sit, what its heads do there, what two dimensions carry; their records
finetune   a trained model on another task, with and without two dimensions; its record and claim
runs       one row per run, per row of a table of the paper, per published model; the papers' claims
figures    pictures with maps of outliers, attention and values; accuracy, norms and kurtosis by method
"""
