"""The study of 10_vit.

sinks      where a model's outliers sit, what its heads do there, what two dimensions carry; their records
runs       one row per run, one per published model; the papers' claims
figures    pictures with maps of outliers, attention and values; accuracy, norms and kurtosis by method
"""
