"""Evaluation: tasks with known answers, records of their searches, tables, plots and a page."""
