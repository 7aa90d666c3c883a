"""The space `formula`: importance metrics as expressions."""
