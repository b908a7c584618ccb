"""The search of one problem: its requests, its state, its algorithms. No model, no I/O, no other problem."""
