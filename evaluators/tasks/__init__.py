"""Tasks of lm-eval on live models, in this process and without the network."""
