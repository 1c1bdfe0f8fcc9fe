"""The paper's experiments at the size of the machine at hand: each a set of pieces, tables and a figure."""
