"""The study of 04_token_frequency.

counts          token counts as they are compared, one of them with a mistake
correlations    how the size of each dimension goes with token frequency
predictions     what a model predicts: how diverse, and which parts of speech it trades
"""
