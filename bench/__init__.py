"""Benches as rows: ``python -m bench run operator`` measures, ``python -m bench plot operator`` draws the rows."""
