"""What a recipe names that is in no other registry."""
