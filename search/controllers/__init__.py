"""Controllers: who proposes what to measure next; `registry` lists them."""
