"""PTX text as a syntax tree."""
