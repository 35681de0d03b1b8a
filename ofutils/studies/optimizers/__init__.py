"""The study of 08_optimizers.

mlp    he2024's residual MLP on images: SGD and Adam, with and without norms, whitened inputs or not
"""
