"""Evaluation: tasks with known answers, records of what became of them, tables, plots and a page."""
