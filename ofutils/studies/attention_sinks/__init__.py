"""The study of 05_attention_sinks.

statistics    where heads look, what they find there, which dimensions go with it; outliers by token
maps          single heads: maps, gates, what a head does not read; controls
figures       the larger figures
"""
