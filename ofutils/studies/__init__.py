"""What one notebook alone computes, under that notebook's name; the others need the core only.

start_here              00: the map of every figure, table and item of the papers
bert_outliers           02: damage without dimensions, geometry; fine-tuning, and its tasks
quant                   03: a trained checkpoint healed; figures
token_frequency         04: correlations with frequency, token counts, what is predicted
attention_sinks         05: statistics of heads and outliers, maps of heads, figures
clipped_softmax_gating  06: ways for a head to do nothing: tables, claims, where attention goes, what each costs
op_block                07: tables of kurtosis, correlation and entropy over training, figures
optimizers              08: kurtosis by optimizer and learning rate; a residual MLP on images under SGD and Adam
moment_updates          09: what each step of a training does to the moments of an activation
vit                     10: scenes of digits: where outliers and attention of image models sit, figures
pretraining_data        11: trainings by text, every dimension through their checkpoints, a model that hears
beyond                  12: what is folded into trained models, against remedies of training
"""
