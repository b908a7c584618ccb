"""The search of one problem: what it asks for, its state, its algorithms. No model, no I/O, no other problem."""
