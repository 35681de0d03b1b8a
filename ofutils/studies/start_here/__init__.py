"""00_start_here: what the first notebook alone computes.

items   the map: every figure, table and item of the papers, its notebook, cell and scale, and what became of it
"""
