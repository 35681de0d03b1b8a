"""The study of 08_optimizers.

runs       one row per optimizer, learning rate and seed; each optimizer's own rate; the papers' claims on them
mlp        a residual MLP on images, under SGD and under Adam
figures    the larger figures
"""
