"""Other frameworks on our policies and verifiers, one module each; imported by nobody else."""
