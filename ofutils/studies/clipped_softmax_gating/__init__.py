"""What 06_clipped_softmax_gating alone computes.

`sinks`: where a trained model's attention and its outliers go. `runs`: its tables and the papers' claims on them.
`costs`: parameters, memory and time of each form. `figures`: the larger figures.
"""
