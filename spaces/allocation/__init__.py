"""The space `allocation`: a level of sparsity for each unit."""
