"""How long models take on a device: tables for sub-layers of every size, and whole models beside each other."""
