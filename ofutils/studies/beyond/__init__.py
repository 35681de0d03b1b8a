"""The study of 12_beyond.

folded     trained models smoothed, rotated or as they are, rounded at equal bits; tables, figures
"""
