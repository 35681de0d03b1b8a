"""What 11_pretraining_data computes: what the text of a training decides about outliers, and when they appear.

texts      what trainings on seven texts measured, and the numbers by which claims are judged
emergence  every dimension through the checkpoints of a training: its size, its norms' parameters, its frequency
speech     a model that hears a waveform and has no tokens, and its row in the table of the weight rule
figures    the larger figures
"""
