"""The study of 02_bert_outliers.

damage      what breaks in an encoder without some dimensions; its geometry; where dimensions are large
tasks       GLUE and other tasks of sentences and pairs: texts, labels, metrics
finetune    a pre-trained encoder fine-tuned on a task, and scored on it
"""
