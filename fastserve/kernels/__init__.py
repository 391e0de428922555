"""How to compute one operation. `interface` says what there is, `reference` defines what is correct."""
