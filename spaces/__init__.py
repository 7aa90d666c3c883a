"""What can be searched: immutable candidates; sampling, variation, repair, text form, exact cost."""
