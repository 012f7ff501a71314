"""Evaluation: tasks of lmms-eval, the paper's table, needles in real video, memory of runs."""
