"""The study of 09_moment_updates.

follow     a training, step by step: what each step does to the moments of one activation, split into terms
growth     tables of that, the papers' claims on them, the figures
"""
