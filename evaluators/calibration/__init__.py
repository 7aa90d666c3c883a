"""Which windows of which texts methods calibrate on."""
