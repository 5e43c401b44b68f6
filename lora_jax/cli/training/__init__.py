"""What `lora-jax train`, `eval`, `generate`, `plan` and `export` are made of.

config     the options, as dataclasses, and the settings of each task
jobs       a task made ready: model, data, objective (classification.py, causal_lm.py)
learners   the two front ends behind one interface: a step, an evaluation, a state to save
run        the output directory: configuration, metrics, checkpoints; refusing and resuming
loop       steps, evaluations and checkpoints in order
"""
