"""Search spaces: immutable candidates; sampling, mutation, crossover, repair, text form, exact cost."""
